"""The program ``diffusers-sde``: one command for each of the project's scripts.

Several processes are launched by accelerate: ``accelerate launch -m diffusers_sde.commands train ...``.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..shipping.version import __version__

PROGRAM = "diffusers-sde"
LIBRARY_PACKAGE = "diffusers_sde"


class Command(NamedTuple):
    """A command and where its function is, which is imported only when the command is run.

    Attributes:
        module: Module of this package.
        function: Its function, which takes the arguments and ``prog``, the words of the command.
        summary: What the command does, in one line.
    """

    module: str
    function: str
    summary: str


COMMANDS = {
    "train": Command("training.cli", "main", "train a score model on images"),
    "classifier": Command("training.cli", "classifier_main", "train a classifier of noisy images, for guidance"),
    "rl": Command("training.cli", "policy_main", "let a trained pipeline learn from rewards"),
    "fit": Command("training.fits", "fit_main", "fit a sampler to a trained pipeline, for few network calls"),
    "sample": Command("evaluation.cli", "sample_main", "draw images from a saved pipeline"),
    "evaluate": Command("evaluation.cli", "evaluate_main", "measure a saved pipeline: samples, likelihood, codes"),
    "push": Command("hub.cli", "export_main", "upload a saved pipeline with its code and a model card"),
    "convert": Command("hub.cli", "convert_main", "turn another project's model into a pipeline of this package"),
    "space": Command("space.cli", "main", "serve a page on which models can be watched and played with"),
    "demo": Command("commands.demo", "main", "train on handwritten digits, sample in many ways, draw the pictures"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names, with the others as its own.

    Args:
        argv: Arguments without the program's name; None for those of this process.

    Raises:
        SystemExit: With code 2, there is no such command, or a package that it needs is not installed; with 0, help
            or the version was asked for.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(_help())
        raise SystemExit(0)
    if name == "--version":
        print(f"{PROGRAM} {__version__}")
        raise SystemExit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        print(f"{PROGRAM}: error: no command {name!r}{hint}; known are {', '.join(COMMANDS)}.", file=sys.stderr)
        raise SystemExit(2)
    function = _function(name)
    function(argv[1:], prog=f"{PROGRAM} {name}")


def _function(name: str) -> Any:
    """The function of a command.

    Raises:
        SystemExit: A package that it needs is not installed.
    """
    command = COMMANDS[name]
    try:
        module = importlib.import_module(f"{LIBRARY_PACKAGE}.{command.module}")
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.split(".")[0] == LIBRARY_PACKAGE:
            raise
        print(
            f"{PROGRAM} {name}: error: {missing} is not installed: the commands need the extra 'training', as in "
            "pip install 'diffusers-sde[training]'.",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    return getattr(module, command.function)


def _help() -> str:
    """The commands with a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND ...",
            "",
            "Score-based generative modelling through SDEs, with diffusers.",
            "",
            *lines,
            "",
            f"'{PROGRAM} COMMAND --help' explains the options of a command.",
            f"On several processes or GPUs: 'accelerate launch -m {LIBRARY_PACKAGE}.commands COMMAND ...'.",
        ]
    )
