"""How a sample number becomes a training sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .randomness import AUGMENTATION, NOISE, SampleRandom, epoch_order
from .source import ImageSource


class TrainingSamples(Dataset):
    """Training samples by number: the image, and the random numbers that go with it.

    Noise is drawn here, so that loader processes share the work, in float32 on the host: a run sees the same noise on
    every device and at every precision.

    Args:
        source: The images.
        seed: Of order, augmentation, times and noise.
        random_flip: Mirror half of the samples.
        strata: Number n has its u in part n mod ``strata`` of so many equal parts of [0, 1); 1: anywhere.
    """

    def __init__(self, source: ImageSource, seed: int, random_flip: bool, strata: int = 1) -> None:
        self._source, self._seed, self._random_flip, self._strata = source, seed, random_flip, strata
        self._augmentation, self._noise = SampleRandom(seed, AUGMENTATION), SampleRandom(seed, NOISE)

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """A batch.

        Args:
            numbers: Sample numbers, length B.

        Returns:
            ``images``, bytes (B, C, H, W); ``noise``, unit Gaussian, float32 (B, C, H, W); ``u``, uniform in [0, 1),
            float64 (B,), which stands for the time; and where the data have classes ``labels``, int64 (B,), and
            ``label_draw``, uniform in [0, 1), float64 (B,), which decides whether the class is hidden.
        """
        source, n = self._source, len(self._source)
        indices = [int(epoch_order(self._seed, number // n, n)[number % n]) for number in numbers]
        labels = None if source.labels is None else source.labels[indices]
        return self._batch(numbers, lambda i, random: source.get(indices[i], random), labels)

    def deal(self, first: int, batch_size: int, process: int, processes: int) -> Iterable[list[Any]]:
        """What ``__getitems__`` takes for each batch of one process, from sample number ``first`` on, without end.

        Micro-batch m of the run holds numbers first + m P B + [p B, (p + 1) B) on process p of P.
        """
        start = first + process * batch_size
        while True:
            yield list(range(start, start + batch_size))
            start += processes * batch_size

    def _batch(
        self,
        numbers: Sequence[int],
        image_of: Callable[[int, np.random.Generator], np.ndarray],
        labels: Tensor | None,
    ) -> dict[str, Tensor]:
        source = self._source
        shape = (len(numbers), source.channels, source.resolution, source.resolution)
        images, noise = np.empty(shape, dtype=np.uint8), np.empty(shape, dtype=np.float32)
        u, label_draw = np.empty(len(numbers)), np.empty(len(numbers))
        for i, number in enumerate(numbers):
            augment = self._augmentation(number)
            flip = self._random_flip and augment.random() < 0.5
            image = image_of(i, augment)
            images[i] = image[..., ::-1] if flip else image
            draw = self._noise(number)
            u[i] = (number % self._strata + draw.random()) / self._strata
            draw.standard_normal(out=noise[i], dtype=np.float32)
            label_draw[i] = draw.random()
        batch = {"images": torch.from_numpy(images), "noise": torch.from_numpy(noise), "u": torch.from_numpy(u)}
        if labels is not None:
            batch["labels"] = labels
            batch["label_draw"] = torch.from_numpy(label_draw)
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
