"""The command lines of ``scripts/push_to_hub.py`` and ``scripts/convert.py``."""

from __future__ import annotations

from collections.abc import Sequence

from ..basics.options import fail, parse_options
from .convert import ConvertConfig, convert
from .export import ExportConfig, export


def export_main(argv: Sequence[str] | None = None) -> None:
    """Export as the command line says; mistakes end in one line and exit code 2."""
    try:
        config = parse_options(
            ExportConfig,
            argv,
            prog="push_to_hub.py",
            description="Upload a saved pipeline with its code and a model card, so that anyone can load it.",
        )
        print(export(config))
    except (ValueError, OSError) as error:
        raise fail("push_to_hub.py", error) from None


def convert_main(argv: Sequence[str] | None = None) -> None:
    """Convert as the command line says; mistakes end in one line and exit code 2."""
    try:
        config = parse_options(
            ConvertConfig,
            argv,
            prog="convert.py",
            description="Turn a stock diffusers repository, or a checkpoint of score_sde_pytorch's ddpm network, into "
            "an SDEPipeline.",
        )
        convert(config)
    except (ValueError, OSError) as error:
        raise fail("convert.py", error) from None
