"""Command lines from dataclasses: a field knows its help text and what it accepts, and becomes an option."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any, get_args, get_type_hints


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    aliases: Sequence[str] = (),
    secret: bool = False,
) -> Any:
    """A field that knows its help text, its command-line aliases and which values it accepts (None always).

    A ``default`` of ``dataclasses.MISSING`` makes it required. A ``secret`` one is left out of ``repr``.
    """
    metadata = {"help": help, "choices": choices, "least": least, "above": above, "most": most, "aliases": aliases}
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


def check_options(config: Any) -> None:
    """Check every field of a dataclass of options, and make its lists tuples.

    Raises:
        ValueError: A value is none of those allowed, or out of range.
    """
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if value is None:
            continue
        if isinstance(value, list):
            object.__setattr__(config, f.name, tuple(value))
        for entry in value if isinstance(value, (tuple, list)) else [value]:
            _check(f.name, entry, f.metadata)


def _check(name: str, value: Any, allowed: Any) -> None:
    if allowed["choices"] is not None and value not in allowed["choices"]:
        raise ValueError(f"{name} must be one of {', '.join(allowed['choices'])}, got {value!r}.")
    bounds = [("at least", allowed["least"]), ("greater than", allowed["above"]), ("at most", allowed["most"])]
    wanted = " and ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None)
    if not wanted:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if (
        not is_number
        or (allowed["least"] is not None and value < allowed["least"])
        or (allowed["above"] is not None and value <= allowed["above"])
        or (allowed["most"] is not None and value > allowed["most"])
    ):
        raise ValueError(f"{name} must be {wanted}, got {value!r}.")


def parser_of(config: type, exclude: Collection[str] = (), **arguments: Any) -> argparse.ArgumentParser:
    """A parser with one option per field of a dataclass of options, with its help text and default.

    Args:
        config: The dataclass.
        exclude: Fields that are no options.
        **arguments: Of ``argparse.ArgumentParser``, such as ``prog`` and ``description``; ``argument_default`` stands
            for all defaults, and SUPPRESS leaves out what is not given.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, **arguments)
    hints = get_type_hints(config)
    for f in dataclasses.fields(config):
        if f.name in exclude:
            continue
        types = [t for t in get_args(hints[f.name]) if t is not type(None)] or [hints[f.name]]
        required = f.default is dataclasses.MISSING
        default = None if required else f.default
        given = default if parser.argument_default is None else parser.argument_default
        settings: dict[str, Any] = {"default": given, "choices": f.metadata["choices"]}
        element = next((t for t in get_args(types[0]) if t is not Ellipsis), None)
        if types[0] is bool:
            settings = {"default": given, "action": argparse.BooleanOptionalAction}
        elif element is not None or Ellipsis in types:  # tuple[int, ...], alone or beside None
            element = element or types[0]
            # "--sampler a --sampler b" is "--sampler a b"; a default that is not None would stay in front.
            settings |= {"type": element, "nargs": "+", "action": "extend" if default is None else "store"}
        else:
            settings["type"] = types[0]
        if types[0] is int and f.name != "seed" and "choices" in settings:
            settings["metavar"] = "N"
        if required:
            settings["required"] = True
        shown = "" if default is None or "Default:" in f.metadata["help"] else f" Default: {default}."
        names = [f"--{name}" for name in (f.name, *f.metadata["aliases"])]
        parser.add_argument(*names, dest=f.name, help=(f.metadata["help"] + shown).replace("%", "%%"), **settings)
    return parser
