"""Images that are read as they come: nothing is downloaded or indexed first."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .columns import as_captions, decoded, image_column, label_column
from .fitting import open_image
from .options import ImageOptions
from .samples import TrainingSamples, TrainingSource
from .source import ImageSource

logger = logging.getLogger(__name__)

FIRST_IMAGES = 2000
REPORTED = 5

Row = Mapping[str, Any]


class StreamSource:
    """A stream seen as square byte images of one size: a ``TrainingSource``.

    The first 2000 images of the first pass tell the resolution, the channels and the statistics. ``rows`` is the stream
    itself. Its order is datasets' own: shards in random order, and a buffer out of which images are drawn, from the
    seed and the number of the pass. So every process sees the same order, and takes its samples by their numbers;
    images that it does not take are read, but not decoded.

    Args:
        dataset: Its rows are those of ``ImageSource``. It is to be whole: not split among processes.
        config: Resolution, cropping, columns, seed and buffer.
        show_progress: Whether to show a progress bar; see ``ImageSource``.
        caption_column: The column with a caption of each image, text or a class, whose name is the caption then; None
            where none are asked for.

    Attributes:
        first: The first images.
        captions: Their captions; none where none are asked for.
        channels: 1 (grey) or 3 (RGB).
        resolution: Side in pixels.
        class_names: Names of the classes; empty where there are none.
        labels: Classes of the first images, or None.

    Raises:
        ValueError: See ``ImageSource``; or an option that needs the number of images, or of classes, is left open.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        config: ImageOptions,
        show_progress: bool = False,
        caption_column: str | None = None,
    ) -> None:
        dataset = dataset.with_format(None)
        features = dataset.features or dict.fromkeys(next(iter(dataset), {}))
        if not features:
            raise ValueError("The data set is empty: there is nothing to train on.")
        self._image_column = image_column(features, config.image_column)
        if dataset.features is not None:
            dataset = decoded(dataset, self._image_column)
            features = dataset.features
        self._label_column = label_column(features, config.label_column)
        if config.needs_labels and self._label_column is not None and config.num_classes is None:
            if not isinstance(features[self._label_column], datasets.ClassLabel):
                raise ValueError(
                    f"class_conditional: label_column {self._label_column!r} of a stream does not say how many classes "
                    "there are: pass num_classes."
                )
        if caption_column is not None and caption_column not in features:
            raise ValueError(f"caption_column must be one of {', '.join(features)}, got {caption_column!r}.")
        self._caption_column = caption_column
        self._caption_feature = None if caption_column is None else features[caption_column]
        columns = (self._image_column, self._label_column, caption_column)
        stream = dataset.select_columns(list(dict.fromkeys(name for name in columns if name is not None)))
        encoded = isinstance(features[self._image_column], datasets.Image)
        if encoded:
            stream = stream.cast_column(self._image_column, datasets.Image(decode=False))
        self._stream = stream
        if config.shuffle_buffer:
            self._stream = stream.shuffle(seed=config.seed, buffer_size=config.shuffle_buffer)
        self._skip_broken, self._white = config.skip_broken_images, config.white_level
        self._needs_labels = config.needs_labels
        self._broken = 0
        self._passes: list[tuple[int, int]] = [(0, 0)]

        rows = [dict(row) for row in islice(self._one_pass(0), FIRST_IMAGES)]
        self.captions = self.captions_of(rows) or []
        first = datasets.Dataset.from_list(rows, features=stream.features if rows else None)
        if encoded and rows:
            first = first.cast_column(self._image_column, datasets.Image())
        # Broken ones are left out already.
        config = replace(config, skip_broken_images=False, cache_images=False)
        self.first = ImageSource(first, config, show_progress)
        self.channels, self.resolution = self.first.channels, self.first.resolution
        self.class_names, self.labels = self.first.class_names, self.first.labels
        logger.info("Size, channels and statistics of the data are those of the first %d images.", len(first))

    @property
    def num_images(self) -> None:
        """Images in one pass through the data: their number is not known."""

    def spread(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Up to ``count`` of the first images, evenly spread over them, and their classes."""
        return self.first.spread(count)

    def statistics(self, data_min: float = -1.0) -> tuple[float, float]:
        """Those of the first images; see ``ImageSource.statistics``."""
        return self.first.statistics(data_min)

    def fingerprint(self, with_classes: bool = False) -> str:
        """A hash of some of the first images, and perhaps of their classes."""
        return self.first.fingerprint(with_classes)

    def samples(self, seed: int, random_flip: bool, strata: int = 1) -> StreamedSamples:
        """The training samples of the stream; arguments as in ``TrainingSamples``."""
        return StreamedSamples(self, seed, random_flip, strata)

    def epoch(self, samples_seen: int) -> float:
        """The pass, counted from 0, in which this number of samples is reached."""
        return float(self.pass_at(samples_seen)[0])

    def pass_at(self, samples_seen: int) -> tuple[int, int]:
        """The pass in which this number of samples is reached, and the sample number with which it began."""
        return next(begun for begun in reversed(self._passes) if begun[1] <= samples_seen)

    def state(self, samples_seen: int) -> dict[str, Any]:
        """The pass in which this number of samples is reached, and the sample number with which it began."""
        return {"stream": list(self.pass_at(samples_seen))}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Let ``rows`` begin with the pass that ``state`` has returned.

        A shuffle buffer cannot be restored, so the pass is read again up to where training goes on: that is exact, and
        costs the reading of these images, without decoding (with it, to leave out broken ones).
        """
        epoch, number = state["stream"]
        self._passes = [(epoch, number)]

    def rows(self, first: int) -> Iterator[tuple[int, Row]]:
        """Sample numbers and rows from number ``first`` on, pass after pass, without end."""
        epoch, number = self._passes[-1]
        while True:
            begun = number
            for row in self._one_pass(epoch):
                if number >= first:
                    yield number, row
                number += 1
            if number == begun:
                raise ValueError(f"Pass {epoch} through the data set has no image that can be read.")
            logger.info("Pass %d through the data had %d images.", epoch, number - begun)
            epoch += 1
            self._passes.append((epoch, number))

    def prepare(self, number: int, row: Row, random: np.random.Generator | None = None) -> np.ndarray:
        """The image of a row, bytes of shape (C, H, W); ``random`` places the crop unless cropping is central."""
        return self.first.format.fit(number, self._decode(number, row), random)

    def labels_of(self, rows: Sequence[Row]) -> Tensor | None:
        """Classes of rows, int64 (B,), where training asks for them."""
        column = self._label_column
        if not self._needs_labels or column is None:
            return None
        labels, classes = [row[column] for row in rows], len(self.class_names)
        for label in labels:
            if label is None or not 0 <= label < classes:
                raise ValueError(f"class_conditional needs labels in [0, {classes}), the data hold {label!r}.")
        return torch.tensor(labels, dtype=torch.int64)

    def captions_of(self, rows: Sequence[Row]) -> list[str] | None:
        """Captions of rows, where they are asked for.

        Raises:
            ValueError: A row has none.
        """
        column = self._caption_column
        if column is None:
            return None
        captions = as_captions([row[column] for row in rows], self._caption_feature)
        for caption in captions:
            if not isinstance(caption, str):
                raise ValueError(
                    f"caption_column {column!r} must hold one text for each image, the data hold {caption!r}."
                )
        return captions

    def _one_pass(self, epoch: int) -> Iterator[Row]:
        self._stream.set_epoch(epoch)
        for position, row in enumerate(self._stream):
            if self._skip_broken:
                try:
                    self._decode(position, row)
                except ValueError as error:
                    self._report_broken(position, row, error)
                    continue
            yield row

    def _decode(self, number: int, row: Row) -> Image.Image:
        value = row[self._image_column]
        # A dictionary is an image that datasets has not decoded.
        read = (lambda: datasets.Image().decode_example(value)) if isinstance(value, dict) else (lambda: value)
        return open_image(number, read, self._white)

    def _report_broken(self, position: int, row: Row, error: ValueError) -> None:
        self._broken += 1
        if self._broken <= REPORTED:
            value = row[self._image_column]
            name = value.get("path") if isinstance(value, dict) else None
            logger.warning("Left out an image that cannot be read, %s: %s", name or position, error.__cause__)
        if self._broken == REPORTED:
            logger.warning("More images that cannot be read are left out without a word.")


class StreamedSamples(TrainingSamples):
    """Training samples of a ``StreamSource``; arguments and batches as in ``TrainingSamples``.

    The training process reads; loader processes decode and draw the noise.
    """

    def __init__(self, source: StreamSource, seed: int, random_flip: bool, strata: int = 1) -> None:
        super().__init__((source.channels, source.resolution, source.resolution), seed, random_flip, strata)
        self._source = source

    def deal(self, first: int, batch_size: int, process: int, processes: int) -> Iterable[list[Any]]:
        """Numbers and rows for each batch of one process; see ``TrainingSamples.deal``."""
        batch = []
        for number, row in self._source.rows(first):
            if (number - first) // batch_size % processes == process:
                batch.append((number, row))
                if len(batch) == batch_size:
                    yield batch
                    batch = []

    def __getitems__(self, numbered: Sequence[tuple[int, Row]]) -> dict[str, Any]:
        """A batch of numbers and rows from ``deal``, with ``captions``, a list of B, where they are asked for."""
        numbers, rows = zip(*numbered, strict=True)
        source = self._source
        batch = self.batch(
            numbers, lambda i, random: source.prepare(numbers[i], rows[i], random), source.labels_of(rows)
        )
        captions = source.captions_of(rows)
        return batch if captions is None else batch | {"captions": captions}


def is_streamed(dataset: datasets.Dataset | datasets.IterableDataset, config: ImageOptions) -> bool:
    """Whether images are read as they come: an iterable data set, or any with ``streaming``."""
    return config.streaming or isinstance(dataset, datasets.IterableDataset)


def open_source(
    dataset: datasets.Dataset | datasets.IterableDataset, config: ImageOptions, show_progress: bool = False
) -> TrainingSource:
    """The source of training images that suits a data set."""
    if is_streamed(dataset, config):
        return open_stream(dataset, config, show_progress)
    return ImageSource(dataset, config, show_progress)


def open_stream(
    dataset: datasets.Dataset | datasets.IterableDataset,
    config: ImageOptions,
    show_progress: bool = False,
    caption_column: str | None = None,
) -> StreamSource:
    """A data set as a stream; arguments as in ``StreamSource``."""
    stream = dataset.to_iterable_dataset() if isinstance(dataset, datasets.Dataset) else dataset
    return StreamSource(stream, config, show_progress, caption_column)
