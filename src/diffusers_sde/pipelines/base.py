"""How the pipelines are saved and pushed: files that load with this package, and without it as remote code."""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from diffusers import DiffusionPipeline, ModelMixin
from diffusers import pipelines as diffusers_pipelines
from diffusers.pipelines import pipeline_loading_utils

from ..basics.modes import give_mode
from ..shipping.cards import add_card
from ..shipping.component import VERSION_KEY, ShipsItsCode, refuse_newer
from ..shipping.flattening import LIBRARY
from ..shipping.uploads import create_repository, upload
from ..shipping.version import __version__

PIPELINE_MODULE = f"{LIBRARY}_pipeline"


def own_index(index: dict[str, Any]) -> dict[str, Any]:
    """A model_index.json as this package reads it: its own classes take the place of the code in the repository.

    diffusers runs a repository's code, with ``trust_remote_code=True`` only, where the index names a file of it. With
    the package imported there is nothing to run: the file is not even downloaded.
    """
    if not isinstance(index, Mapping):
        return index  # this is not an index, and diffusers says so
    name = index.get("_class_name")
    index = dict(index)
    for value in index.values():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value):
            _admit(*value)
    shipped = [f"{key}/{LIBRARY}.py" for key, value in index.items() if isinstance(value, list) and LIBRARY in value]
    if isinstance(name, list) and len(name) == 2 and name[0] == PIPELINE_MODULE:
        pipeline = next((cls for cls in _descendants(SharedPipeline) if cls.__name__ == name[1]), None)
        if pipeline is None:
            raise ValueError(
                f"{name[1]} is not in {LIBRARY} {__version__}, but the model was saved by {index.get(VERSION_KEY)}: "
                "upgrade by 'pip install -U diffusers-sde'."
            )
        refuse_newer(index, lambda: inspect.signature(pipeline).parameters, name[1])
        index["_class_name"] = name[1]
        shipped.append(f"{PIPELINE_MODULE}.py")
    if shipped:
        ignored = index.get("_ignore_files")
        index["_ignore_files"] = [*(ignored if isinstance(ignored, list) else []), *shipped]
    return index


def _admit(library: str, name: str) -> None:
    """Let diffusers load a scheduler derived from ours, or a network, of a user's module that is imported.

    diffusers loads a class from such a module only if that also holds the base class, such as ``SchedulerMixin``, which
    a user has no reason to import; and from the Hub only if the module is an attribute of ``diffusers.pipelines``.
    """
    module = sys.modules.get(library)
    cls = None if module is None else vars(module).get(name)  # no getattr: transformers would import what it names
    known = library in (LIBRARY, "diffusers", "transformers")
    if known or not (inspect.isclass(cls) and issubclass(cls, (ShipsItsCode, ModelMixin))):
        return
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES[name] = ["save_pretrained", "from_pretrained"]
    # diffusers would look for all that is defined below a package in the package itself.
    if not hasattr(module, "__path__") and not hasattr(diffusers_pipelines, library):
        setattr(diffusers_pipelines, library, module)


def _descendants(cls: type[Any]) -> Iterator[type[Any]]:
    for child in cls.__subclasses__():
        yield child
        yield from _descendants(child)


class ComponentTypes(tuple[Any, ...]):
    """The types that a component may have. ``in`` finds subclasses too, where diffusers asks for the type itself."""

    def __contains__(self, kind: object) -> bool:
        return super().__contains__(kind) or (
            inspect.isclass(kind) and any(inspect.isclass(each) and issubclass(kind, each) for each in self)
        )


class SharedPipeline(ShipsItsCode, DiffusionPipeline):
    """Base of the pipelines: saving, pushing and loading of repositories that carry their own code."""

    _source_file = f"{PIPELINE_MODULE}.py"
    _source_entries = ("pipelines",)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load a pipeline from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path: The folder, or ``user/name``. One of another class, a stock ``DDPMPipeline``
                included, loads as this one if its parts fit.
            **kwargs: As in diffusers' ``DiffusionPipeline.from_pretrained``.

        Raises:
            OSError: There is no such pipeline, or a weight file is damaged.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            if "Unable to load weights" not in str(error):
                raise
            raise OSError(
                f"{error} It is damaged or incomplete: download it again with force_download=True, or copy it again."
            ) from error

    @classmethod
    def _dict_from_json_file(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return own_index(super()._dict_from_json_file(*args, **kwargs))

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[Any, ...]]:
        # diffusers 0.35 does not read annotations that are strings, and fails for what it has not read.
        hints = get_type_hints(cls.__init__)

        def types(hint: Any) -> tuple[Any, ...]:
            allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            # Where the package is missing, a network of ours has the class of its own file, a second copy of the same
            # code.
            ours = any(inspect.isclass(each) and issubclass(each, ShipsItsCode) for each in allowed)
            return ComponentTypes((*allowed, ModelMixin) if ours else allowed)

        return {name: types(hints[name]) for name in inspect.signature(cls.__init__).parameters if name in hints}

    def to_json_string(self) -> str:
        """The index as it is written: the class is named with the file that holds it."""
        index = json.loads(super().to_json_string())
        if index.get("vae") == [None, None]:
            del index["vae"]  # most pipelines have none, and versions before 0.2 know no such part
        if self._is_ours:
            index["_class_name"] = [PIPELINE_MODULE, type(self).__name__]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the index and the pipeline's code, after the components; see ``ShipsItsCode``."""
        for path in Path(save_directory).glob("*/*config.json"):
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None) is not None:  # the place it was loaded from, which is private
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        mode = (Path(save_directory) / self.config_name).stat().st_mode
        for weights in Path(save_directory).glob("*/*.safetensors"):
            give_mode(weights, mode)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        results: Mapping[str, Any] | None = None,
    ) -> str:
        """Upload the pipeline: weights, configs, the code to load them, and a model card if the repository has none.

        Unchanged files are not uploaded again, and a card that is on the Hub is left alone.

        Args:
            repo_id: ``user/name``, or ``name`` for your own namespace.
            commit_message: Title of the commit.
            private: Whether a new repository is private; None for the account's default.
            token: Access token; the one of ``hf auth login`` or of HF_TOKEN if None.
            create_pr: Open a pull request instead of committing.
            safe_serialization: Save weights as safetensors; False needs trust from everyone who loads them.
            variant: Name that these weights get, such as ``fp16``, beside others in the same repository.
            max_shard_size: Largest weight file, such as ``"2GB"``.
            results: What the card is to say of data set, metrics, recipes and training command; see ``shipping.cards``.

        Returns:
            Address of the repository.

        Raises:
            ValueError: ``results`` are not understood.
            OSError: The upload failed; the message says what to do.
        """
        with tempfile.TemporaryDirectory() as folder:
            # First, so that what cannot be saved leaves no empty repository behind.
            self.save_pretrained(folder, safe_serialization, variant, max_shard_size)
            repo_id = create_repository(repo_id, private, token)
            add_card(folder, self, repo_id, results)
            return upload(folder, repo_id, token, commit_message, create_pr, variant)

    def _upload_folder(  # what diffusers' save_pretrained(..., push_to_hub=True) ends in
        self,
        working_dir: str | os.PathLike,
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> str:
        add_card(working_dir, self, repo_id)
        return upload(working_dir, repo_id, token, commit_message, create_pr)
