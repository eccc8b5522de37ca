"""Bits per dimension of a data set under a saved pipeline, and a picture of its latent codes."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from ..likelihood import DEQUANTIZATIONS, TraceOptions
from ..pipelines import ProbabilityFlow
from ..training.configuration import TrainingConfig
from ..training.data import ImageSource, load_images

STRIPS = 6  # pairs of images in the picture
STRIP_LENGTH = 9


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What to evaluate.

    Args:
        model: Folder or Hub name of a pipeline.
        bpd: Compute bits per dimension.
        figure: Write a picture here: real images, their reconstruction from their codes, interpolations.
        dataset_name: ``digits`` or a name on the Hub; see ``TrainingConfig``.
        data_dir: Local data; see ``TrainingConfig.train_data_dir``.
        dataset_split: Split.
        image_column: Column with the images.
        num_images: How many images, evenly spread over the data; all if None.
        batch_size: Images in one network call.
        dequantization: ``uniform`` or ``truncated_normal``.
        importance_samples: Dequantisations per image.
        num_probes: Probes per network call.
        rtol: Relative tolerance of the solver.
        atol: Absolute tolerance.
        t_min: SDE time of the data; the model's own if None.
        seed: Of dequantisation and probes.
        output: JSON file for the results; not written if None.
    """

    model: str
    bpd: bool = False
    figure: str | None = None
    dataset_name: str | None = None
    data_dir: str | None = None
    dataset_split: str = "train"
    image_column: str | None = None
    num_images: int | None = None
    batch_size: int = 64
    dequantization: str = "uniform"
    importance_samples: int = 1
    num_probes: int = 1
    rtol: float = 3e-4
    atol: float = 3e-4
    t_min: float | None = None
    seed: int = 0
    output: str | None = None

    def __post_init__(self) -> None:
        if not (self.bpd or self.figure):
            raise ValueError("nothing to do: set bpd or figure.")
        if self.num_images is not None and self.num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {self.num_images!r}.")


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Evaluate a pipeline on a data set.

    Under ``accelerate launch`` the images, not the solves, are divided among the processes; an image's value does not
    depend on the division.

    Returns:
        The results, the same on every process.

    Raises:
        ValueError: Bad arguments, data or pipeline.
    """
    process = PartialState()
    pipe = DiffusionPipeline.from_pretrained(config.model).to(process.device)
    flow = ProbabilityFlow(pipe, t_min=config.t_min)
    levels = _images(config, pipe)
    report: dict[str, Any] = {
        "model": config.model,
        "sde": repr(flow.sde) if len(repr(flow.sde)) < 200 else type(flow.sde).__name__,
        "images": len(levels),
    }
    if config.bpd:
        report["bits_per_dim"] = _bits_per_dim(config, flow, levels, process)
    if config.figure is not None and process.is_main_process:
        report["figure"] = {"path": config.figure, "round_trip_rms": _figure(config, flow, levels)}
    if config.output is not None and process.is_main_process:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        Path(config.output).write_text(json.dumps(report, indent=2) + "\n")
    return report


def _images(config: EvaluationConfig, pipe: Any) -> Tensor:
    """The images as bytes, shape (B, C, H, W)."""
    channels, height, width = (
        pipe.sample_shape
        if hasattr(pipe, "sample_shape")
        else (
            pipe.unet.config.in_channels,
            pipe.unet.config.sample_size,
            pipe.unet.config.sample_size,
        )
    )
    if height != width:
        raise ValueError(f"the network's images are {width}x{height}; only square ones are read here.")
    data = TrainingConfig(
        dataset_name=config.dataset_name,
        train_data_dir=config.data_dir,
        dataset_split=config.dataset_split,
        image_column=config.image_column,
        resolution=int(height),
        channels=int(channels),
        center_crop=True,
        cache_images=False,
    )
    source = ImageSource(load_images(data), data)
    count = len(source) if config.num_images is None else min(config.num_images, len(source))
    indices = np.unique(np.linspace(0, len(source) - 1, count).round().astype(int))
    return torch.from_numpy(source.get_many(indices.tolist()))


def _bits_per_dim(
    config: EvaluationConfig, flow: ProbabilityFlow, levels: Tensor, process: PartialState
) -> dict[str, Any]:
    mine = list(range(process.process_index, len(levels), process.num_processes))
    results: list[tuple[int, float, float, int]] = []
    if mine:
        result = flow.bits_per_dim(
            levels[mine],
            dequantization=config.dequantization,
            importance_samples=config.importance_samples,
            trace=TraceOptions(num_probes=config.num_probes),
            options=flow.options(config.rtol, config.atol, batch_size=config.batch_size),
            generator=torch.Generator().manual_seed(config.seed),
            progress_bar=process.is_main_process,
        )
        columns = (result.per_image, result.per_image_error, result.calls)
        results = [(i, *row) for i, row in zip(mine, zip(*(c.tolist() for c in columns), strict=True), strict=True)]
    everything = sorted(gather_object(results))
    values = np.array([row[1] for row in everything])
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {
        "mean": float(values.mean()),
        "standard_error": error,
        "standard_error_of_one_image_from_probes": float(np.sqrt(np.mean([row[2] ** 2 for row in everything]))),
        "calls_per_image": float(np.mean([row[3] for row in everything])),
        "dequantization": config.dequantization,
        "importance_samples": config.importance_samples,
        "num_probes": config.num_probes,
        "rtol": config.rtol,
        "atol": config.atol,
        "t_min": flow.t_min,
        "noise_at_t_min": float(flow.sde.sigma(flow.t_min)),
        "per_image": values.tolist(),
    }


def _figure(config: EvaluationConfig, flow: ProbabilityFlow, levels: Tensor) -> float:
    """A row per pair of images: the first, the way between their codes, the second; returns the round-trip error."""
    chosen = levels[np.unique(np.linspace(0, len(levels) - 1, min(2 * STRIPS, len(levels))).round().astype(int))]
    if len(chosen) < 2:
        raise ValueError("figure needs at least two images.")
    first, second = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 : 2 * (len(chosen) // 2)]
    options = flow.options(1e-5, 1e-5, batch_size=config.batch_size)
    strips = flow.interpolate(first, second, STRIP_LENGTH, options).sample
    real = torch.stack([flow._state(first), flow._state(second)], 1)
    rebuilt = strips[:, [0, -1]]
    # real | its reconstruction | interpolation, whose ends are reconstructions | real
    rows = torch.cat([real[:, :1], strips, real[:, 1:]], 1)
    pixels = ((rows - flow.data_min) / (flow.data_max - flow.data_min)).clamp(0, 1).mul(255).round().byte().cpu()
    scale = max(1, 64 // pixels.shape[-1])
    tiles = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=255)
    sheet = torch.cat([torch.cat(list(row), -1) for row in tiles], -2).permute(1, 2, 0).numpy()
    picture = Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet)
    Path(str(config.figure)).parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(str(config.figure))
    return float((rebuilt - real).square().mean().sqrt())


def parse_args(argv: Sequence[str] | None = None) -> EvaluationConfig:
    """The configuration that a command line describes.

    Raises:
        ValueError: See ``EvaluationConfig``.
        SystemExit: An unknown option.
    """
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description="Evaluate a saved pipeline on a data set.", allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="Folder or Hub name of a pipeline.")
    parser.add_argument("--bpd", action="store_true", help="Compute bits per dimension.")
    parser.add_argument("--figure", help="Write a picture: real images, reconstructions, interpolations.")
    parser.add_argument("--dataset_name", help="'digits' or a name on the Hub. Default: digits.")
    parser.add_argument("--data_dir", help="Local data: a folder of images or Parquet, or a Parquet file.")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument("--image_column", help="Column with the images. Default: the data's image column.")
    parser.add_argument("--num_images", type=int, help="Images, spread evenly over the data. Default: all.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images in one network call.")
    parser.add_argument("--dequantization", choices=DEQUANTIZATIONS[:2], default="uniform")
    parser.add_argument("--importance_samples", type=int, default=1, help="Dequantisations per image.")
    parser.add_argument("--num_probes", type=int, default=1, help="Trace probes per network call.")
    parser.add_argument("--rtol", type=float, default=3e-4, help="Relative tolerance of the solver.")
    parser.add_argument("--atol", type=float, default=3e-4, help="Absolute tolerance of the solver.")
    parser.add_argument("--t_min", type=float, help="SDE time of the data. Default: the model's own.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of dequantisation and probes.")
    parser.add_argument("--output", help="JSON file for the results.")
    return EvaluationConfig(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says; mistakes end in one line and exit code 2."""
    try:
        report = evaluate(parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if PartialState().is_main_process:
        bits = report.get("bits_per_dim")
        if bits is not None:
            print(
                f"{bits['mean']:.4f} +- {bits['standard_error']:.4f} bits/dim on {report['images']} images at t = "
                f"{bits['t_min']:g} ({bits['dequantization']} dequantisation, {bits['importance_samples']} per image; "
                f"{bits['num_probes']} probe(s), scatter {bits['standard_error_of_one_image_from_probes']:.4f} per "
                f"image; rtol {bits['rtol']:g}; {bits['calls_per_image']:.1f} network calls per image)"
            )
        if "figure" in report:
            figure = report["figure"]
            print(f"{figure['path']}: codes give the images back to {figure['round_trip_rms']:.2e} RMS")
