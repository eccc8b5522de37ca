"""The images that a pipeline is evaluated on, as it sees them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..images.columns import captions_of, classes_of
from ..images.loading import load_images
from ..images.options import ImageOptions, is_local
from ..images.source import ImageSource
from .configuration import EvaluationConfig


@dataclass(frozen=True)
class Images:
    """Some images of a split.

    Attributes:
        pixels: Bytes, shape (N, C, H, W).
        labels: Classes, shape (N,), or None.
        class_names: Names of the classes.
        split: Name of the split.
    """

    pixels: Tensor
    labels: Tensor | None
    class_names: list[str]
    split: str


@dataclass(frozen=True)
class AskedImages:
    """What samples are asked for: the captions of images that are spread evenly over a split.

    Attributes:
        captions: One for each sample.
        labels: The classes of these images, shape (N,); None where the data have none.
    """

    captions: list[str]
    labels: Tensor | None


class DataOptions(Protocol):
    """What says where images are; ``EvaluationConfig`` is one."""

    @property
    def dataset_name(self) -> str | None:
        """See ``EvaluationConfig``."""

    @property
    def data_dir(self) -> str | None:
        """See ``EvaluationConfig``."""

    @property
    def image_column(self) -> str | None:
        """See ``EvaluationConfig``."""

    @property
    def label_column(self) -> str | None:
        """See ``EvaluationConfig``."""

    @property
    def white_level(self) -> int | None:
        """See ``EvaluationConfig``."""


def data_name(config: EvaluationConfig) -> str:
    """The name of the data in reports, which holds no path of this machine."""
    name = config.dataset_name or "digits"
    folder = config.data_dir or (name if is_local(name) else None)
    return name if folder is None else Path(folder).resolve().name


def asked_of_data(config: EvaluationConfig) -> AskedImages | None:
    """What the samples of an evaluation are asked for; None where they are not asked for captions.

    Raises:
        ValueError: There are no such captions.
    """
    if config.caption_column is None:
        return None
    dataset = load_images(_image_options(config, config.dataset_split))
    captions = captions_of(dataset, config.caption_column)
    _, labels = classes_of(dataset, config.label_column, None)
    places = np.linspace(0, len(captions) - 1, config.samples).round().astype(int)
    return AskedImages([captions[place] for place in places], None if labels is None else labels[places])


def _image_options(config: DataOptions, split: str, **more: Any) -> ImageOptions:
    return ImageOptions(
        dataset_name=config.dataset_name,
        train_data_dir=config.data_dir,
        dataset_split=split,
        image_column=config.image_column,
        label_column=config.label_column,
        white_level=config.white_level,
        **more,
    )


def read_images(config: DataOptions, pipe: Any, split: str, count: int | None, show_progress: bool) -> Images:
    """Images of a split, evenly spread over it, in the size of the pipeline's network.

    Args:
        config: Says where the data are.
        pipe: The pipeline, whose network decides the size.
        split: Name of the split.
        count: Largest number of images; all if None.
        show_progress: Whether to show a progress bar.

    Raises:
        ValueError: Bad data, or a network whose images are not square.
    """
    if hasattr(pipe, "image_shape"):
        channels, height, width = pipe.image_shape
    else:
        channels, height, width = pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2
    if height != width:
        raise ValueError(f"the network's images are {width}x{height}; only square ones are read here.")
    size = {"resolution": int(height), "channels": int(channels)}
    data = _image_options(config, split, **size, center_crop=True, cache_images=False)
    source = ImageSource(load_images(data), data)
    count = len(source) if count is None else min(count, len(source))
    indices = np.unique(np.linspace(0, len(source) - 1, count).round().astype(int))
    pixels = np.empty((len(indices), channels, height, width), np.uint8)
    for row, index in enumerate(tqdm(indices, desc=f"Reading {split}", disable=not show_progress, leave=False)):
        pixels[row] = source.get(int(index))
    labels = None if source.labels is None else source.labels[torch.from_numpy(indices)]
    return Images(torch.from_numpy(pixels), labels, source.class_names, split)
