"""The command that serves the page."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..basics.options import CheckedOptions, fail, names_of, option, parse_options
from .runs import Model, load_model

OWN_MODELS = Path("examples", "space", "models")  # in a clone of the project


@dataclasses.dataclass(frozen=True)
class SpaceConfig(CheckedOptions):
    """What the page shows and where.

    Attributes:
        model: Models by name.
        host: Address that the server listens at.
        port: Its port.
    """

    model: tuple[str, ...] = option(
        (),
        "Models as NAME=SOURCE, or SOURCE alone: a folder that was trained here, or a repository. A folder may hold "
        "fitted_6.json, the config of a sampler that was fitted for six calls. Default: those of "
        f"{OWN_MODELS.as_posix()}, in the project's folder.",
        adds=True,
    )
    host: str = option("127.0.0.1", "Address to listen at; 0.0.0.0 for visitors from other machines.")
    port: int = option(7860, "Port to listen at.", least=0, most=65535)


def named(argument: str) -> tuple[str, str]:
    """NAME=SOURCE, or a source alone, whose last part is the name."""
    name, equals, source = argument.partition("=")
    return (name, source) if equals else (Path(argument).name, argument)


def models_below(folder: Path) -> list[str]:
    """The saved pipelines directly below a folder as NAME=SOURCE, the smallest, which answers at once, first."""
    found = [index.parent for index in folder.glob("*/model_index.json")]
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*.safetensors")) for path in found}
    return [f"{path.name}={path}" for path in sorted(found, key=lambda path: (sizes[path], path.name))]


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
        ValueError: A model does not fit, none is named and none is there, or Gradio is not installed.
        OSError: There is no such folder or repository.
    """
    serve, build = _server()
    sources = config.model or models_below(OWN_MODELS)
    if not sources:
        raise ValueError(
            f"model must name a model, as NAME=SOURCE, because there is none below {OWN_MODELS.as_posix()!r} here: a "
            "clone of the project has some there."
        )
    models = {name: load_model(name, source) for name, source in map(named, sources)}
    print(f"The page is at http://{config.host}:{config.port}", flush=True)
    serve(build(models), host=config.host, port=config.port, log_level="warning")


def _server() -> tuple[Callable[..., None], Callable[[dict[str, Model]], Any]]:
    """What serves an application, and what makes one of models.

    Raises:
        ValueError: Gradio is not installed.
    """
    try:
        import uvicorn

        from .server import build
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed: the page needs the extra 'space', as in "
            "pip install 'diffusers-sde[space]'."
        ) from None
    return uvicorn.run, build


def space_main(folder: Path) -> None:
    """Serve the page on a Hugging Face Space.

    The variable MODELS holds the models, separated by spaces. Where it is not set, they are those below ``folder``.
    """
    models = os.environ.get("MODELS", "").split() or models_below(folder)
    main(["--model", *models, "--host", "0.0.0.0", "--port", os.environ.get("GRADIO_SERVER_PORT", "7860")])
