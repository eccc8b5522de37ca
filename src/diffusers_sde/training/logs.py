"""When something is to be logged, and how: bars, trackers, pictures, data in words."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..images.samples import TrainingSource
from .checkpoints import TRACKER


def due(step: int, every: int | None, last: bool) -> bool:
    """Whether something that is done every so many steps, and after the last one, is due; None and 0 mean never."""
    return every is not None and every > 0 and (last or step % every == 0)


def progress_bar(accelerator: Accelerator, total: int, initial: int, description: str, unit: str) -> tqdm:
    """The bar of a run, shown once per machine; a log file needs no animation."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    hidden = not accelerator.is_local_main_process
    return tqdm(total=total, initial=initial, desc=description, unit=unit, disable=hidden, mininterval=interval)


def start_trackers(accelerator: Accelerator, config: Any) -> None:
    """Start the tracker of a run, if it has one, with those of its options that trackers can show."""
    if config.logger != "none":
        plain = {k: v for k, v in config.public().items() if isinstance(v, (bool, int, float, str))}
        accelerator.init_trackers(TRACKER, config=plain)


def log_pictures(trackers: Sequence[Any], name: str, images: Tensor, step: int) -> None:
    """Hand images, bytes (N, C, H, W), to the trackers that show pictures."""
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: pixels}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [Image.fromarray(image) for image in pixels]}, step=step)


def describe_source(source: TrainingSource, told: str | None = None) -> str:
    """The data of a run in words.

    Args:
        source: The data.
        told: What else there is to every image, in words; None for their classes.
    """
    return (
        f"{source.num_images or 'streamed'} images, {source.channels} channel(s), {source.resolution}x"
        f"{source.resolution} pixels, {told or f'{len(source.class_names)} classes'}"
    )
