"""What training asks of its data, and how a sample number becomes a training sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .randomness import AUGMENTATION, LATENT_NOISE, NOISE, SampleRandom


class TrainingSource(Protocol):
    """What training asks of its data, whether they are stored or streamed.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        resolution: Side in pixels.
        class_names: Names of the classes; empty where there are none.
        labels: Class of each image that is known beforehand, shape (n,), or None where there are no classes.
    """

    channels: int
    resolution: int
    class_names: list[str]
    labels: Tensor | None

    @property
    def num_images(self) -> int | None:
        """Images in one pass through the data; None where that is not known."""

    def epoch(self, samples_seen: int) -> float:
        """Passes through the data when so many samples have been seen."""

    def spread(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Up to ``count`` images, bytes (N, C, H, W), evenly spread over those known beforehand, and their classes."""

    def statistics(self, data_min: float) -> tuple[float, float]:
        """Standard deviation of the pixels and the largest distance between two images, for values in [data_min, 1]."""

    def fingerprint(self, with_classes: bool) -> str:
        """A hash of some images, and perhaps of all classes."""

    def samples(self, seed: int, random_flip: bool, strata: int) -> TrainingSamples:
        """The training samples by number; arguments as in ``TrainingSamples``."""

    def state(self, samples_seen: int) -> dict[str, Any]:
        """What a checkpoint must hold, as JSON, so that ``resume`` goes on after so many samples."""

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; it may hold other entries than those of ``state``."""


class TrainingSamples(Dataset, ABC):
    """Training samples by number: the image, and the random numbers that go with it.

    Noise is drawn here, so that loader processes share the work, in float32 on the host: a run sees the same noise on
    every device and at every precision.

    Args:
        shape: Shape of an image, (C, H, W).
        seed: Seed of order, augmentation, times and noise.
        random_flip: Whether half of the samples are mirrored.
        strata: Number n has its u in part n mod ``strata`` of so many equal parts of [0, 1); 1: anywhere.

    Attributes:
        noise_shape: Shape of the noise of a sample, which is that of the image where nothing else is set.
        draws_latents: Whether batches also hold ``latent_noise``, unit Gaussian, float32 (B, *noise_shape), by which
            the latents of an image are drawn from their distribution.
    """

    draws_latents = False

    def __init__(self, shape: tuple[int, int, int], seed: int, random_flip: bool, strata: int = 1) -> None:
        self._shape, self._random_flip, self._strata = shape, random_flip, strata
        self.noise_shape = shape
        self._augmentation, self._noise = SampleRandom(seed, AUGMENTATION), SampleRandom(seed, NOISE)
        self._latent_noise = SampleRandom(seed, LATENT_NOISE)

    @abstractmethod
    def deal(self, first: int, batch_size: int, process: int, processes: int) -> Iterable[list[Any]]:
        """What ``__getitems__`` takes for each batch of one process, from sample number ``first`` on, without end.

        Micro-batch m of the run holds numbers first + m P B + [p B, (p + 1) B) on process p of P.
        """

    @abstractmethod
    def __getitems__(self, dealt: Sequence[Any]) -> dict[str, Tensor]:
        """A batch.

        Args:
            dealt: One entry for each of B samples, from ``deal``.

        Returns:
            ``images``, bytes (B, C, H, W); ``noise``, unit Gaussian, float32 (B, *noise_shape); ``u``, uniform in
            [0, 1), float64 (B,), which stands for the time; ``label_draw``, likewise, which decides whether the class
            or the caption is hidden; and where the data have classes ``labels``, int64 (B,).
        """

    def batch(
        self,
        numbers: Sequence[int],
        image_of: Callable[[int, np.random.Generator], np.ndarray],
        labels: Tensor | None,
    ) -> dict[str, Tensor]:
        """What ``__getitems__`` returns.

        Args:
            numbers: Sample numbers, length B.
            image_of: Returns the image at a position of the batch, bytes (C, H, W), cropped by a generator.
            labels: Classes, int64 (B,), or None.
        """
        images = np.empty((len(numbers), *self._shape), dtype=np.uint8)
        for i, number in enumerate(numbers):
            flip, augment = self.is_flipped(number)
            image = image_of(i, augment)
            images[i] = image[..., ::-1] if flip else image
        return {"images": torch.from_numpy(images), **self.draws(numbers, labels)}

    def is_flipped(self, number: int) -> tuple[bool, np.random.Generator]:
        """Whether a sample is mirrored, and the generator of the rest of its augmentation."""
        augment = self._augmentation(number)
        return self._random_flip and augment.random() < 0.5, augment

    def draws(self, numbers: Sequence[int], labels: Tensor | None) -> dict[str, Tensor]:
        """What a batch holds beside its images: their random numbers and classes."""
        noise = np.empty((len(numbers), *self.noise_shape), dtype=np.float32)
        u, label_draw = np.empty(len(numbers)), np.empty(len(numbers))
        for i, number in enumerate(numbers):
            draw = self._noise(number)
            u[i] = (number % self._strata + draw.random()) / self._strata
            draw.standard_normal(out=noise[i], dtype=np.float32)
            label_draw[i] = draw.random()
        batch = {
            name: torch.from_numpy(each) for name, each in (("noise", noise), ("u", u), ("label_draw", label_draw))
        }
        if self.draws_latents:
            latent_noise = np.empty_like(noise)
            for i, number in enumerate(numbers):
                self._latent_noise(number).standard_normal(out=latent_noise[i], dtype=np.float32)
            batch["latent_noise"] = torch.from_numpy(latent_noise)
        if labels is not None:
            batch["labels"] = labels
        return batch


def batches(
    samples: TrainingSamples,
    first: int,
    batch_size: int,
    process: int = 0,
    processes: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """The batches of one process, without end, from sample number ``first`` on."""
    loader = DataLoader(
        samples,
        batch_sampler=samples.deal(first, batch_size, process, processes),
        collate_fn=lambda batch: batch,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Not torch's global generator, from which a loader would otherwise draw: a resumed run must find it unmoved.
        generator=torch.Generator(),
    )
    return iter(loader)
