"""The command lines ``diffusers-sde push`` and ``convert``, which two scripts have too."""

from __future__ import annotations

from collections.abc import Sequence

from ..basics.options import fail, names_of, parse_options
from .convert import ConvertConfig, convert
from .export import ExportConfig, export


def export_main(argv: Sequence[str] | None = None, prog: str = "push_to_hub.py") -> None:
    """Export as the command line says; mistakes end in one line and exit code 2."""
    try:
        config = parse_options(
            ExportConfig,
            argv,
            prog=prog,
            description="Upload a saved pipeline with its code and a model card, so that anyone can load it.",
        )
        print(export(config))
    except (ValueError, OSError) as error:
        raise fail(prog, error, names=names_of(ExportConfig)) from None


def convert_main(argv: Sequence[str] | None = None, prog: str = "convert.py") -> None:
    """Convert as the command line says; mistakes end in one line and exit code 2."""
    try:
        config = parse_options(
            ConvertConfig,
            argv,
            prog=prog,
            description="Turn a stock diffusers repository, or a checkpoint of score_sde_pytorch's ddpm network, into "
            "an SDEPipeline.",
        )
        convert(config)
    except (ValueError, OSError) as error:
        raise fail(prog, error, names=names_of(ConvertConfig)) from None
