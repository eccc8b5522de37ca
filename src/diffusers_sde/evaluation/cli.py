"""scripts/evaluate.py: the command line of ``evaluate``."""

from __future__ import annotations

from collections.abc import Sequence

from ..basics.options import fail, parser_of
from .configuration import EvaluationConfig
from .evaluate import evaluate
from .report import markdown_table
from .samplers import launched_processes


def parse_args(argv: Sequence[str] | None = None) -> EvaluationConfig:
    """The configuration that a command line describes.

    Raises:
        ValueError: See ``EvaluationConfig``.
        SystemExit: An unknown option or a value that is not of its type.
    """
    parser = parser_of(
        EvaluationConfig,
        prog="evaluate.py",
        description="Evaluate a saved pipeline: samples of any samplers against data, likelihood, latent codes.",
    )
    return EvaluationConfig(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says; mistakes end in one line and exit code 2."""
    try:
        report = evaluate(parse_args(argv))
    except (ValueError, OSError) as error:
        raise fail("evaluate.py", error) from None
    if launched_processes().is_main_process:
        print(markdown_table(report))
        if "figure" in report:
            figure = report["figure"]
            print(f"{figure['path']}: codes give the images back to {figure['round_trip_rms']:.2e} RMS")
