"""The pictures of a model card that the model draws itself: a sheet of samples, and how they form."""

from __future__ import annotations

import copy
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

logger = logging.getLogger(__name__)

SHEET_COUNTS = (16, 4, 1)  # images of the sheet: as many as there is time for
SECONDS = 60.0  # to draw them in
LEVELS = 20
SHOWN_STATES = 8
SHOWN_PATHS = 4
SMALLEST_SIDE = 64  # pixels; smaller images are enlarged to it


class _TooSlow(Exception):
    """The images would not be finished in time."""


def draw_pictures(pipe: Any, folder: Path) -> dict[str, str]:
    """Draw a sheet of samples and, for models of pixels, the states on the way to the first of them.

    Everything is drawn by the pipeline's own scheduler with the seeds 0, 1, ..., so that the same model gives the same
    files on the same machine. Classes take turns. The pipeline is left as it was.

    Args:
        pipe: A pipeline of this package.
        folder: Where the files go; created if there is something to put into it.

    Returns:
        The files by the titles of their pictures. It is empty where the model is too slow for a single image, or fails:
        a card does without pictures then, and the log says why.
    """
    scheduler, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", {})
    pipe.scheduler = copy.deepcopy(scheduler)  # a run changes its timesteps
    pipe.set_progress_bar_config(disable=True)
    try:
        for count in SHEET_COUNTS:
            try:
                images, states = _drawn(pipe, count)
            except _TooSlow:
                continue
            return _saved(images, states, folder)
        logger.info("The card gets no pictures: one image takes longer than %g seconds.", SECONDS)
    except Exception as error:  # a network of somebody else, in a precision that this machine cannot compute in
        logger.warning("The card gets no pictures: %s: %s", type(error).__name__, error)
    finally:
        pipe.scheduler = scheduler
        pipe._progress_bar_config = bar
    return {}


def _drawn(pipe: Any, count: int) -> tuple[list[Image.Image], list[list[Image.Image]]]:
    """Samples, and for each of the first ones its states on the way.

    Raises:
        _TooSlow: They would take too long.
    """
    draws = next(cls for cls in reversed(type(pipe).__mro__) if cls.__name__ == "SDEPipeline")
    arguments: dict[str, Any] = {"batch_size": count}
    if hasattr(pipe, "labels"):
        classes, draws = sorted(pipe.labels.values()), type(pipe)
        arguments |= {"class_labels": [classes[i % len(classes)] for i in range(count)]} if classes else {}
    before, seen = time.monotonic(), []

    def watch(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        total = len(pipe.scheduler.timesteps)
        if (time.monotonic() - before) / (index + 1) * total > SECONDS and index > 0:
            raise _TooSlow
        if getattr(pipe.scheduler, "sde", None) is not None and pipe.vae is None:
            after = pipe.scheduler.timesteps[index + 1] if index + 1 < total else None
            seen.append(_view(pipe, tensors["latents"][:SHOWN_PATHS], after))
        return {}

    fitted = getattr(pipe.scheduler, "config", {}).get("fitted_plan")
    arguments |= {"num_inference_steps": LEVELS if fitted is None else fitted["levels"], "callback_on_step_end": watch}
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    images = draws.__call__(pipe, **arguments, generator=generators).images
    shown = [seen[round(i * (len(seen) - 1) / (SHOWN_STATES - 1))] for i in range(SHOWN_STATES)] if seen else []
    return images, [list(states) for states in zip(*shown, strict=True)]


def _view(pipe: Any, x: Tensor, timestep: Tensor | None) -> list[Image.Image]:
    """States at the contrast of the data, (x - alpha m)/(alpha^2 + (sigma/h)^2)^(1/2) + m for data in [m - h, m + h].

    Args:
        pipe: The pipeline.
        x: The states, shape (B, C, H, W).
        timestep: Of the states; None for data.
    """
    if timestep is not None:
        t = pipe.scheduler.sde_time(timestep)
        alpha, sigma = float(pipe.scheduler.sde.alpha(t)), float(pipe.scheduler.sde.sigma(t))
        middle, half = (
            (pipe.config.data_max + pipe.config.data_min) / 2,
            (pipe.config.data_max - pipe.config.data_min) / 2,
        )
        x = (x - alpha * middle) / math.sqrt(alpha**2 + (sigma / half) ** 2) + middle
    images: list[Image.Image] = pipe.postprocess(x, "pil")
    return images


def _saved(images: list[Image.Image], paths: list[list[Image.Image]], folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"Samples": folder / "samples.png"}
    _in_rows(images, math.ceil(math.sqrt(len(images)))).save(pictures["Samples"])
    if paths:
        pictures["From noise to samples"] = folder / "trajectories.png"
        _in_rows([image for path in paths for image in path], SHOWN_STATES).save(pictures["From noise to samples"])
    return {title: str(path) for title, path in pictures.items()}


def _in_rows(images: list[Image.Image], columns: int) -> Image.Image:
    """Images in rows, each in a white frame."""
    scale = max(1, SMALLEST_SIDE // images[0].width)
    framed = [
        ImageOps.expand(image.resize((image.width * scale, image.height * scale), 0), 2, "white") for image in images
    ]
    width, height = framed[0].size
    picture = Image.new(framed[0].mode, (columns * width, math.ceil(len(framed) / columns) * height), "white")
    for place, image in enumerate(framed):
        picture.paste(image, (place % columns * width, place // columns * height))
    return picture
