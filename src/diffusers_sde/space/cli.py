"""The command that serves the page."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from ..basics.options import CheckedOptions, fail, names_of, option, parse_options
from .runs import load_model


@dataclasses.dataclass(frozen=True)
class SpaceConfig(CheckedOptions):
    """What the page shows and where.

    Attributes:
        model: Models by name.
        host: Address that the server listens at.
        port: Its port.
    """

    model: tuple[str, ...] = option(
        dataclasses.MISSING,
        "Models as NAME=SOURCE, or SOURCE alone: a folder that was trained here, or a repository. A folder may hold "
        "fitted_6.json, the config of a sampler that was fitted for six calls.",
        adds=True,
    )
    host: str = option("127.0.0.1", "Address to listen at; 0.0.0.0 for visitors from other machines.")
    port: int = option(7860, "Port to listen at.", least=0, most=65535)


def named(argument: str) -> tuple[str, str]:
    """NAME=SOURCE, or a source alone, whose last part is the name."""
    name, equals, source = argument.partition("=")
    return (name, source) if equals else (Path(argument).name, argument)


def main(argv: Sequence[str] | None = None, prog: str = "space") -> None:
    """Serve the page as the command line says; mistakes end in one line and exit code 2."""
    try:
        config = parse_options(
            SpaceConfig, argv, prog=prog, description="Serve a page on which models can be watched and played with."
        )
        run(config)
    except (ValueError, OSError) as error:
        raise fail(prog, error, names=names_of(SpaceConfig)) from None


def run(config: SpaceConfig) -> None:
    """Load the models and serve the page until it is interrupted.

    Raises:
        ValueError: A model does not fit, or Gradio is not installed.
        OSError: There is no such folder or repository.
    """
    try:
        import uvicorn

        from .server import build
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed: the page needs the extra 'space', as in "
            "pip install 'diffusers-sde[space]'."
        ) from None
    models = {name: load_model(name, source) for name, source in map(named, config.model)}
    print(f"The page is at http://{config.host}:{config.port}", flush=True)
    uvicorn.run(build(models), host=config.host, port=config.port, log_level="warning")


def space_main() -> None:
    """Serve the page on a Hugging Face Space: the variable MODELS holds the models, separated by spaces."""
    models = os.environ.get("MODELS", "").split()
    main(["--model", *models, "--host", "0.0.0.0", "--port", os.environ.get("GRADIO_SERVER_PORT", "7860")])
