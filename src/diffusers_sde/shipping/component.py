"""Components whose code travels with their files, so that a saved pipeline loads without this package."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import FrozenDict
from packaging.version import InvalidVersion, Version

from .flattening import LIBRARY, self_contained_source
from .version import __version__

VERSION_KEY = f"_{LIBRARY}_version"


def refuse_newer(config: Mapping[str, Any], known: Callable[[], Collection[str]], what: str) -> None:
    """Raise a ValueError if a newer version wrote the config, with keys that are not among the ``known`` ones."""
    written = config.get(VERSION_KEY)
    try:
        if written is None or Version(written) <= Version(__version__):
            return
    except (InvalidVersion, TypeError):  # somebody else wrote this entry, so it says nothing about our versions
        return
    unknown = {key for key in config if not key.startswith("_")}.difference(known())
    if unknown:
        raise ValueError(
            f"{what} was saved by {LIBRARY} {written} with {', '.join(sorted(unknown))}, which {__version__} does not "
            "know: upgrade by 'pip install -U diffusers-sde'."
        )


def written_before(config: Mapping[str, Any], version: str) -> bool:
    """Whether an earlier version of this package wrote the config; False if the config names no version."""
    try:
        return Version(config[VERSION_KEY]) < Version(version)
    except (KeyError, InvalidVersion, TypeError):
        return False


class ShipsItsCode:
    """Mixin, before diffusers' own base classes: saving writes the class's code beside its config.

    The config states the version that wrote it, and no path of the machine it was loaded on. A class that a user has
    derived from ours is saved without code, and saving says so: its module is the user's, and may need other files.
    """

    _source_file = f"{LIBRARY}.py"  # diffusers looks for a component's code under the library's name
    _source_entries: tuple[str, ...]
    _internal_dict: dict[str, Any]  # diffusers' config

    @property
    def _is_ours(self) -> bool:
        return type(self).__module__ == LIBRARY

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the config, and the code that it belongs to; ``save_pretrained`` calls this.

        Args:
            save_directory: The folder, created if it does not exist.
            push_to_hub: Whether to upload it; see diffusers.
            **kwargs: Arguments of the upload.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self._is_ours:
            (folder / self._source_file).write_text(self_contained_source(*self._source_entries), encoding="utf-8")
        else:
            cls = type(self)
            warnings.warn(
                f"{cls.__name__} is saved without its code, which is in the module {cls.__module__!r}: whoever loads "
                "it needs that module, and has to import it first.",
                stacklevel=3,
            )
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]

    def to_json_string(self) -> str:
        """The config as it is written."""
        in_memory = dict(self._internal_dict)
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        self._internal_dict = FrozenDict(in_memory)  # undoes that diffusers writes its version into it
        config.pop("_name_or_path", None)
        config[VERSION_KEY] = __version__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"
