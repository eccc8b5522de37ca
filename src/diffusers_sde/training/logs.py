"""When something is to be logged, and how data and pictures are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from ..images.samples import TrainingSource


def due(step: int, every: int | None, last: bool) -> bool:
    """Whether something that is done every so many steps, and after the last one, is due; None and 0 mean never."""
    return every is not None and every > 0 and (last or step % every == 0)


def log_pictures(trackers: Sequence[Any], name: str, images: Tensor, step: int) -> None:
    """Hand images, bytes (N, C, H, W), to the trackers that show pictures."""
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: pixels}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [Image.fromarray(image) for image in pixels]}, step=step)


def describe_source(source: TrainingSource) -> str:
    """The data of a run in words."""
    return (
        f"{source.num_images or 'streamed'} images, {source.channels} channel(s), {source.resolution}x"
        f"{source.resolution} pixels, {len(source.class_names)} classes"
    )
