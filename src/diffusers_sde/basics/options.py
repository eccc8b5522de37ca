"""Command lines from dataclasses: a field knows its help text and what it accepts, and becomes an option."""

from __future__ import annotations

import argparse
import dataclasses
import math
import numbers
import os
import re
import sys
from collections.abc import Collection, Sequence
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

LARGEST_SEED = 2**63 - 1

Options = TypeVar("Options")


def option(
    default: Any,
    help: str,
    *,
    choices: Collection[str] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    aliases: Sequence[str] = (),
    secret: bool = False,
    adds: bool = False,
) -> Any:
    """A field that knows its help text, its command-line aliases and which values it accepts.

    A ``default`` of ``dataclasses.MISSING`` makes it required. ``choices`` may grow, as a registry does: they are
    read when a value is checked. A ``secret`` one is left out of ``repr``. A list that ``adds`` grows where it is given
    again on a command line; otherwise the last one counts, as for any option.
    """
    metadata = {"help": help, "choices": choices, "least": least, "above": above, "most": most, "aliases": aliases}
    metadata["adds"] = adds
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


class CheckedOptions:
    """Base of the dataclasses of options: every field is checked when an object is made.

    A dataclass with further checks begins its own ``__post_init__`` with ``super().__post_init__()``, so that several
    of them can be the bases of one.

    Raises:
        ValueError: See ``check_options``.
    """

    def __post_init__(self) -> None:
        check_options(self)


def check_options(config: Any) -> None:
    """Check types and ranges of every field of a dataclass of options, and make its lists tuples and its paths words.

    Raises:
        ValueError: A value is of another type, none of those allowed, or out of range.
    """
    hints = get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        hint = hints[f.name]
        allowed = (hint,) if isinstance(hint, type) or get_origin(hint) is tuple else get_args(hint)
        if value is None and type(None) in allowed:
            continue
        kind = next(t for t in allowed if t is not type(None))
        several = get_origin(kind) is tuple
        if several and isinstance(value, (list, tuple)):
            value = tuple(value)
            object.__setattr__(config, f.name, value)
        elif several:
            raise ValueError(f"{f.name} must be a list, got {value!r}.")
        elif kind is str and isinstance(value, os.PathLike):
            value = os.fspath(value)
            object.__setattr__(config, f.name, value)
        elif isinstance(value, np.generic):
            value = value.item()
            object.__setattr__(config, f.name, value)
        for entry in value if several else (value,):
            _check(f.name, entry, get_args(kind)[0] if several else kind, f.metadata)


_WORDS = {bool: "True or False", int: "an integer", float: "a finite number", str: "text"}


def _is_a(value: Any, kind: type) -> bool:
    if kind in (bool, str):
        return isinstance(value, kind)
    if isinstance(value, (bool, np.bool_)):
        return False
    if kind is int:
        return isinstance(value, numbers.Integral)
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _check(name: str, value: Any, kind: type, allowed: Any) -> None:
    if allowed["choices"] is not None and value not in allowed["choices"]:
        raise ValueError(f"{name} must be one of {', '.join(allowed['choices'])}, got {value!r}.")
    bounds = [("at least", allowed["least"]), ("greater than", allowed["above"]), ("at most", allowed["most"])]
    wanted = " and ".join(f"{words} {_shown(bound)}" for words, bound in bounds if bound is not None)
    if (
        not _is_a(value, kind)
        or (allowed["least"] is not None and value < allowed["least"])
        or (allowed["above"] is not None and value <= allowed["above"])
        or (allowed["most"] is not None and value > allowed["most"])
    ):
        raise ValueError(f"{name} must be {_WORDS[kind]}{wanted and ' '}{wanted}, got {value!r}.")


def _shown(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def parser_of(config: type, exclude: Collection[str] = (), **arguments: Any) -> argparse.ArgumentParser:
    """A parser with one option per field of a dataclass of options, with its help text and default.

    The fields that a base of the dataclass brings are a group of the help, under the first line of its docstring.

    Args:
        config: The dataclass.
        exclude: Fields that are no options.
        **arguments: Of ``argparse.ArgumentParser``, such as ``prog`` and ``description``; ``argument_default`` stands
            for all defaults, and SUPPRESS leaves out what is not given.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, **arguments)
    groups: dict[str, Any] = {}
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
            settings |= {"type": element, "nargs": "+", "action": "extend" if f.metadata["adds"] else "store"}
            if f.metadata["adds"] and isinstance(given, tuple):
                settings["default"] = list(given)  # argparse extends a list only
        else:
            settings["type"] = types[0]
        if types[0] is int and f.name != "seed" and "choices" in settings:
            settings["metavar"] = "N"
        if required:
            settings["required"] = True
        shown = "" if default is None or "Default:" in f.metadata["help"] else f" Default: {default}."
        names = [f"--{name}" for name in (f.name, *f.metadata["aliases"])]
        subject = _subject(config, f.name)
        if subject is not None and subject not in groups:
            groups[subject] = parser.add_argument_group(subject)
        group = parser if subject is None else groups[subject]
        group.add_argument(*names, dest=f.name, help=(f.metadata["help"] + shown).replace("%", "%%"), **settings)
    return parser


def _subject(config: type, name: str) -> str | None:
    """The first line of the docstring of the base that brings a field; None for a field of the dataclass itself."""
    owner = next((base for base in config.__mro__[1:] if name in vars(base).get("__annotations__", {})), None)
    return None if owner is None else (owner.__doc__ or owner.__name__).splitlines()[0].rstrip(".")


def parse_options(config: type[Options], argv: Sequence[str] | None, **arguments: Any) -> Options:
    """The options that a command line spells, as an object of their dataclass.

    Args:
        config: The dataclass of options.
        argv: Arguments without the program's name; None for those of this process.
        **arguments: See ``parser_of``.

    Raises:
        ValueError: A value that the dataclass refuses.
        SystemExit: An unknown option or a value that is not of its type.
    """
    return config(**vars(parser_of(config, **arguments).parse_args(argv)))


def one_line(error: BaseException) -> str:
    """What an exception says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def in_option_words(text: str, names: Collection[str]) -> str:
    """A message about fields of options, with the options of a command line in their place.

    ``name`` becomes ``--name``, ``name='word'`` becomes ``--name word``, and ``name=True`` becomes ``--name``. A name
    that is an English word too is one only where a value follows, or at the beginning, before "must".
    """

    def spelled(match: re.Match[str]) -> str:
        name, value, flag = match["name"], match["value"], {"True": "--", "False": "--no-"}
        if value in flag:
            return f"{flag[value]}{name}"
        return f"--{name}" + ("" if value is None else f" {value.strip(chr(39))}")

    for name in names:
        value = r"=(?P<value>'[^'\n]*'|True|False|-?[\d.]*\d(?:e-?\d+)?)(?!\w)"
        text = re.sub(rf"(?<![\w./'\"-])(?P<name>{name}){value}", spelled, text)
        anywhere = rf"(?<![\w./'\"-]){name}(?![\w/'\"(=-])" if "_" in name else rf"\A{name}(?= must )"
        text = re.sub(anywhere, f"--{name}", text)
    return text


def fail(prog: str, error: BaseException, code: int = 2, names: Collection[str] = ()) -> SystemExit:
    """The end of a command line: one line on stderr, and this exit code.

    Args:
        prog: What was run.
        error: What went wrong.
        code: The exit code.
        names: Options of the command line, which the line spells as such.
    """
    print(f"{prog}: error: {in_option_words(one_line(error), names)}", file=sys.stderr)
    return SystemExit(code)


def names_of(config: type) -> tuple[str, ...]:
    """The names of the fields of a dataclass of options."""
    return tuple(f.name for f in dataclasses.fields(config))
