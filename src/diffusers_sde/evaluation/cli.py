"""The command lines ``diffusers-sde evaluate`` and ``sample``, which two scripts have too."""

from __future__ import annotations

from collections.abc import Sequence

from ..basics.options import fail, names_of, parse_options
from .configuration import EvaluationConfig
from .evaluate import evaluate
from .generate import generate
from .report import markdown_table
from .samplers import launched_processes
from .sampling import SamplingConfig


def evaluate_main(argv: Sequence[str] | None = None, prog: str = "evaluate.py") -> None:
    """Evaluate as the command line says; mistakes end in one line and exit code 2."""
    try:
        config = parse_options(
            EvaluationConfig,
            argv,
            prog=prog,
            description="Evaluate a saved pipeline: samples of any samplers against data, likelihood, latent codes.",
        )
        report = evaluate(config)
    except (ValueError, OSError) as error:
        raise fail(prog, error, names=names_of(EvaluationConfig)) from None
    if launched_processes().is_main_process:
        print(markdown_table(report))
        if "figure" in report:
            figure = report["figure"]
            print(f"{figure['path']}: codes give the images back to {figure['round_trip_rms']:.2e} RMS")


def sample_main(argv: Sequence[str] | None = None, prog: str = "sample.py") -> None:
    """Draw images as the command line says; mistakes end in one line and exit code 2."""
    try:
        config = parse_options(
            SamplingConfig,
            argv,
            prog=prog,
            description="Draw images from a saved pipeline, each from a seed of its own. Start the command again to go "
            "on after an interruption.",
        )
        record = generate(config)
    except (ValueError, OSError) as error:
        raise fail(prog, error, names=names_of(SamplingConfig)) from None
    if launched_processes().is_main_process and record["calls_per_image"] is not None:
        print(f"{record['num_images']} images, {record['calls_per_image']:g} network calls each.")
