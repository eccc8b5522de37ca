"""A data set seen as square byte images of one size."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .arrays import GREY_MODES, as_pil, to_network
from .columns import classes_of, decoded, image_column
from .fitting import ImageFormat, open_image
from .options import ImageOptions
from .randomness import epoch_order
from .samples import TrainingSamples

logger = logging.getLogger(__name__)

CACHE_BYTES = 2**30
SCANNED_IMAGES = 256
FINGERPRINTED = 16  # images


class ImageSource:
    """A data set seen as square byte images of one size: a ``TrainingSource``, and images by number.

    Args:
        dataset: Its rows have an image (a PIL image, or an array: bytes, integers of 16 bits, or floats in [0, 1]), or
            the bytes of its file, and perhaps a class.
        config: Resolution, cropping and columns.
        show_progress: Whether to show a progress bar while images are read into memory.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        resolution: Side in pixels.
        format: Channels and resolution, and how images are cropped.
        class_names: Names of the classes; empty where there are none.
        labels: Class of each image, shape (n,), or None.

    Raises:
        ValueError: No images, no such column, images that are broken, not finite or of mixed sizes.
    """

    def __init__(self, dataset: datasets.Dataset, config: ImageOptions, show_progress: bool = False) -> None:
        if len(dataset) == 0:
            raise ValueError("The data set is empty: there is nothing to train on.")
        self._white = config.white_level
        self._image_column = image_column(dataset.features, config.image_column)
        self._dataset = dataset = decoded(dataset, self._image_column)
        if config.skip_broken_images:
            self._dataset = dataset = self._without_broken(show_progress)
        self.class_names, self.labels = classes_of(dataset, config.label_column, config.num_classes)
        first = [self._read(i) for i in range(min(len(dataset), SCANNED_IMAGES))]
        self.channels = config.channels or (1 if all(image.mode in GREY_MODES for image in first) else 3)
        self.resolution = config.resolution or first[0].width
        self.format = ImageFormat(self.channels, self.resolution, config.resolution is None, config.center_crop)
        for i, image in enumerate(first):
            self.format.check_size(i, image)
        fits = len(dataset) * self.channels * self.resolution**2 <= CACHE_BYTES
        self._cache: np.ndarray | None = None
        if config.cache_images or (config.cache_images is None and fits):
            self._cache = self._read_all(show_progress)

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def num_images(self) -> int:
        """Images in one pass through the data."""
        return len(self)

    def epoch(self, samples_seen: int) -> float:
        """Passes through the data when so many samples have been seen."""
        return samples_seen / len(self)

    @property
    def is_cached(self) -> bool:
        """Whether all images are in memory."""
        return self._cache is not None

    def get(self, index: int, random: np.random.Generator | None = None) -> np.ndarray:
        """Image ``index``, bytes of shape (C, H, W); ``random`` places the crop unless cropping is central."""
        if self._cache is not None:
            return self._cache[index]
        return self.format.fit(index, self._read(index), random)

    def get_many(self, indices: Sequence[int]) -> np.ndarray:
        """Images, central crops, shape (B, C, H, W)."""
        return np.stack([self.get(i) for i in indices])

    def spread(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Up to ``count`` images, central crops, evenly spread over the data, and their classes.

        Returns:
            Bytes, shape (N, C, H, W), and classes, shape (N,), or None.
        """
        indices = np.unique(np.linspace(0, len(self) - 1, min(len(self), count)).round().astype(int)).tolist()
        return torch.from_numpy(self.get_many(indices)), None if self.labels is None else self.labels[indices]

    def samples(self, seed: int, random_flip: bool, strata: int = 1) -> StoredSamples:
        """The training samples of the images; arguments as in ``TrainingSamples``."""
        return StoredSamples(self, seed, random_flip, strata)

    def state(self, samples_seen: int) -> dict[str, Any]:
        """Nothing: the number of samples seen says where training goes on."""
        return {}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, for which nothing needs to be done."""

    def statistics(self, data_min: float = -1.0) -> tuple[float, float]:
        """Standard deviation of the pixels and the largest distance between two images, for values in [data_min, 1].

        Measured on up to 1024 images spread evenly over the data set.
        """
        count = max(2, min(1024, 2**25 // (self.channels * self.resolution**2)))
        images = to_network(self.spread(count)[0].flatten(1), data_min)
        return float(images.std(correction=0)), float(torch.cdist(images, images).max())

    def fingerprint(self, with_classes: bool = False) -> str:
        """A hash of some images, the first and the last among them, and perhaps of all classes."""
        digest, n = hashlib.sha256(), len(self._dataset)
        for index in np.unique(np.linspace(0, n - 1, min(n, FINGERPRINTED)).round().astype(int)).tolist():
            image = self._read(index)
            digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
        if with_classes and self.labels is not None:
            digest.update(json.dumps([self.class_names, self.labels.tolist()]).encode())
        return digest.hexdigest()[:16]

    @property
    def has_fixed_crops(self) -> bool:
        """Whether an image is the same every time: it is not cropped at random."""
        return self.is_cached or self.format.center_crop or self.format.fixed_size

    def content_key(self) -> str:
        """A hash of all images as they are prepared.

        Those in memory are hashed. Others are not read for it: datasets' own fingerprint stands for them, which changes
        with their files, and what says how they are prepared.
        """
        digest = hashlib.sha256(repr((len(self), self.format)).encode())
        if self._cache is not None:
            digest.update(self._cache.tobytes())
        else:
            digest.update(repr((self._dataset._fingerprint, self._image_column, self._white)).encode())
            digest.update(self.fingerprint().encode())
        return digest.hexdigest()[:32]

    def order(self, seed: int, numbers: Sequence[int]) -> list[int]:
        """Which images the samples of these numbers are."""
        n = len(self)
        return [int(epoch_order(seed, number // n, n)[number % n]) for number in numbers]

    def _read(self, index: int) -> Image.Image:
        return open_image(index, lambda: self._dataset[index][self._image_column], self._white)

    def _without_broken(self, show_progress: bool) -> datasets.Dataset:
        """The data set without the images that cannot be read, which are reported."""
        whole, broken = [], []
        for i in self._progress(range(len(self)), "Checking images", show_progress):
            try:
                self._read(i).load()
                whole.append(i)
            except (ValueError, OSError):
                broken.append(i)
        if not whole:
            raise ValueError(f"None of the {len(broken)} images of the data set can be read.")
        if broken:
            first = ", ".join(self._name(i) for i in broken[:5])
            logger.warning(
                "Left out %d of %d images, which cannot be read: %s%s.",
                len(broken),
                len(self),
                first,
                ", ..." if len(broken) > 5 else "",
            )
        return self._dataset.select(whole)

    def _name(self, index: int) -> str:
        """The file that an image comes from, or its number."""
        if not isinstance(self._dataset.features[self._image_column], datasets.Image):
            return str(index)
        raw = self._dataset.cast_column(self._image_column, datasets.Image(decode=False))[index][self._image_column]
        return (raw or {}).get("path") or str(index)

    def _read_all(self, show_progress: bool) -> np.ndarray | None:
        pixels = np.empty((len(self), self.channels, self.resolution, self.resolution), dtype=np.uint8)
        for i, image in self._progress(self._read_in_order(), "Reading images", show_progress):
            if not self.format.center_crop and not self.format.fixed_size and image.width != image.height:
                logger.info("Images that are not square are cropped at random, so they are read again every time.")
                return None
            pixels[i] = self.format.fit(i, image, None)
        return pixels

    def _read_in_order(self) -> Iterator[tuple[int, Image.Image]]:
        """All images with their numbers, a few hundred at a time, which is much faster than one by one."""
        column = self._dataset.select_columns([self._image_column])
        for start in range(0, len(self), SCANNED_IMAGES):
            numbers = range(start, min(start + SCANNED_IMAGES, len(self)))
            try:
                images = [as_pil(value, self._white) for value in column[start : numbers.stop][self._image_column]]
            except Exception:  # one of them is broken: one by one, the error names it
                images = [self._read(i) for i in numbers]
            yield from zip(numbers, images, strict=True)

    def _progress(self, items: Iterable[Any], what: str, show: bool) -> Iterable[Any]:
        interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file needs no animation
        return tqdm(items, desc=what, total=len(self), disable=not show, leave=False, mininterval=interval)


class StoredSamples(TrainingSamples):
    """The training samples of an ``ImageSource``, each pass in a random order; arguments as in ``TrainingSamples``."""

    def __init__(self, source: ImageSource, seed: int, random_flip: bool, strata: int = 1) -> None:
        super().__init__((source.channels, source.resolution, source.resolution), seed, random_flip, strata)
        self._source, self._seed = source, seed

    def deal(self, first: int, batch_size: int, process: int, processes: int) -> Iterable[list[int]]:
        """Sample numbers for each batch of one process; see ``TrainingSamples.deal``."""
        start = first + process * batch_size
        while True:
            yield list(range(start, start + batch_size))
            start += processes * batch_size

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """A batch of sample numbers."""
        source = self._source
        indices = source.order(self._seed, numbers)
        labels = None if source.labels is None else source.labels[indices]
        return self.batch(numbers, lambda i, random: source.get(indices[i], random), labels)
