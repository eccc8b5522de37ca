"""Bits per dimension under a pipeline, and a picture of its latent codes."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from ..basics.files import write_whole
from ..flow.trace import TraceOptions
from ..images.arrays import to_bytes
from ..images.pictures import tile
from ..metrics.quality import spread
from ..pipelines import ProbabilityFlow
from .configuration import EvaluationConfig
from .data import Images

STRIPS = 6  # number of pairs of images in the picture
STRIP_LENGTH = 9


def measured_bits_per_dim(
    config: EvaluationConfig, flow: ProbabilityFlow, images: Images, conditional: bool, process: PartialState
) -> dict[str, Any]:
    """Bits per dimension of images, which are divided among the processes; given their classes if ``conditional``."""
    levels, labels, mine = _own_images(config, images, conditional, process)
    results: list[tuple[int, float, float, int]] = []
    if mine:
        result = flow.bits_per_dim(
            levels[mine],
            conditioning=None if labels is None else {"class_labels": labels[mine]},
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
        "images": len(levels),
        "split": images.split,
        "given_class": labels is not None,
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


def measured_latent_bits(
    config: EvaluationConfig, flow: ProbabilityFlow, images: Images, conditional: bool, process: PartialState
) -> dict[str, Any]:
    """The density of the latents of images, in bits per dimension of latents; otherwise ``measured_bits_per_dim``."""
    levels, labels, mine = _own_images(config, images, conditional, process)
    results: list[tuple[int, float]] = []
    if mine:
        values = flow.latent_bits_per_dim(
            levels[mine],
            conditioning=None if labels is None else {"class_labels": labels[mine]},
            trace=TraceOptions(num_probes=config.num_probes),
            options=flow.options(config.rtol, config.atol, batch_size=config.batch_size),
            generator=torch.Generator().manual_seed(config.seed),
            progress_bar=process.is_main_process,
        )
        results = list(zip(mine, values.tolist(), strict=True))
    ordered = np.array([row[1] for row in sorted(gather_object(results))])
    return {
        "mean": float(ordered.mean()),
        "standard_error": float(ordered.std(ddof=1)) / math.sqrt(len(ordered)) if len(ordered) > 1 else math.nan,
        "images": len(levels),
        "split": images.split,
        "given_class": labels is not None,
        "num_probes": config.num_probes,
        "rtol": config.rtol,
        "atol": config.atol,
        "t_min": flow.t_min,
        "per_image": ordered.tolist(),
    }


def _own_images(
    config: EvaluationConfig, images: Images, conditional: bool, process: PartialState
) -> tuple[Tensor, Tensor | None, list[int]]:
    """The images whose likelihood is asked for, their classes where they count, and the numbers of this process."""
    levels = spread(images.pixels, min(config.num_images or len(images.pixels), len(images.pixels)))
    labels = spread(images.labels, len(levels)) if conditional and images.labels is not None else None
    return levels, labels, list(range(process.process_index, len(levels), process.num_processes))


def draw_codes(config: EvaluationConfig, flow: ProbabilityFlow, levels: Tensor) -> float:
    """Draw a row for each pair of images, and return the error of images, or latents, rebuilt from their codes.

    A row shows the first image, the images on the way from its code to that of the second, and the second image.
    """
    chosen = levels[np.unique(np.linspace(0, len(levels) - 1, min(2 * STRIPS, len(levels))).round().astype(int))]
    if len(chosen) < 2:
        raise ValueError("figure needs at least two images.")
    first, second = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 : 2 * (len(chosen) // 2)]
    options = flow.options(1e-5, 1e-5, batch_size=config.batch_size)
    strips = flow.interpolate(first, second, STRIP_LENGTH, options).sample
    real = torch.stack([flow.data_of(part) for part in (first, second)], 1).to(strips)
    rebuilt = strips[:, [0, -1]]
    # A row is: the first image | its reconstruction, the interpolation, the other's reconstruction | the second image.
    rows = torch.cat([real[:, :1], strips, real[:, 1:]], 1)
    pixels = to_bytes(flow.images_of(rows.flatten(0, 1)), 0.0).unflatten(0, rows.shape[:2])
    path = Path(str(config.figure))
    write_whole(path, partial(tile(pixels).save, format=Image.registered_extensions()[path.suffix.lower()]))
    return float((rebuilt - real).square().mean().sqrt())
