"""Latents of all images, computed once and kept in files, from which training reads them.

A row of the cache is the latent of an image: its mode, its standard deviation where the autoencoder returns a
distribution, and the same of the mirrored image where training mirrors them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..images.samples import TrainingSamples
from ..images.source import ImageSource
from ..pipelines.encoders import Latents
from .row_cache import RowCache

MIRRORED = "_mirrored"  # what the names of the mirrored images' tensors end in


class LatentCache(RowCache):
    """The latents of the images of a source, in a folder.

    Args:
        folder: Where the files are, or will be.
        key: Hash of all that the latents depend on, which files of another cache do not have.
        encoder: Computes the latents.
        images: The images.
        mirrored: Whether the mirrored images are kept too.
        sampled: Whether standard deviations are kept too.
        shape: Shape of the latents of one image.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        encoder: Latents,
        images: ImageSource,
        mirrored: bool,
        sampled: bool,
        shape: tuple[int, int, int],
    ) -> None:
        moments = ("mean", "std") if sampled else ("mean",)
        names = [name + end for end in (("", MIRRORED) if mirrored else ("",)) for name in moments]
        row_bytes = math.prod(shape) * encoder.vae.dtype.itemsize * len(names)
        super().__init__(folder, key, "latents", names, row_bytes, len(images), "image")
        self._encoder, self._images = encoder, images

    @torch.no_grad()
    def _compute(self, rows: range, bar: Any) -> dict[str, Tensor]:
        """See ``RowCache``; images are read and encoded a chunk at a time."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self._names}
        for start in range(0, len(rows), self._encoder.chunk):
            part = rows[start : start + self._encoder.chunk]
            images = torch.from_numpy(self._images.get_many(part)).to(self._encoder.vae.device)
            for end in {name.removeprefix("mean").removeprefix("std") for name in self._names}:
                ((mean, std),) = self._encoder.moments(images.flip(-1) if end else images, fixed=True)
                parts["mean" + end].append(mean.cpu())
                if "std" + end in parts:
                    assert std is not None
                    parts["std" + end].append(std.cpu())
            bar.update(len(part))
        return {name: torch.cat(each).contiguous() for name, each in parts.items()}

    def read(self, indices: Sequence[int], mirrored: Sequence[bool]) -> dict[str, Tensor]:
        """Moments of the latents of images, float32 (B, c, h, w) each: ``latent_mean``, and perhaps ``latent_std``.

        Args:
            indices: Numbers of the images, length B.
            mirrored: Whether each is mirrored, likewise.
        """
        moments = [name for name in self._names if not name.endswith(MIRRORED)]
        rows: dict[str, list[Tensor]] = {name: [] for name in moments}
        for index, flip in zip(indices, mirrored, strict=True):
            tensors = self.row(index)
            for name in moments:
                rows[name].append(tensors[name + MIRRORED * flip])
        return {f"latent_{name}": torch.stack(each).float() for name, each in rows.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_encoder": None}  # a loader process encodes nothing


class CachedSamples(TrainingSamples):
    """The training samples of an ``ImageSource`` with moments of latents in the place of the images.

    They are those of ``StoredSamples`` otherwise, in the same order.

    Args:
        cache: The latents.
        source: The images, for their order and classes.
        shape: Shape of the latents of one image.
        seed: As in ``TrainingSamples``.
        random_flip: Likewise.
        strata: Likewise.
    """

    def __init__(
        self,
        cache: LatentCache,
        source: ImageSource,
        shape: tuple[int, int, int],
        seed: int,
        random_flip: bool,
        strata: int,
    ) -> None:
        super().__init__(shape, seed, random_flip, strata)
        self._cache, self._source, self._seed = cache, source, seed

    def deal(self, first: int, batch_size: int, process: int, processes: int) -> Iterable[list[int]]:
        """Sample numbers for each batch of one process; see ``TrainingSamples.deal``."""
        return self._source.samples(self._seed, False).deal(first, batch_size, process, processes)

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """A batch of sample numbers: ``latent_mean`` and perhaps ``latent_std`` in the place of ``images``."""
        source = self._source
        indices = source.order(self._seed, numbers)
        labels = None if source.labels is None else source.labels[indices]
        flips = [self.is_flipped(number)[0] for number in numbers]
        return {**self._cache.read(indices, flips), **self.draws(numbers, labels)}
