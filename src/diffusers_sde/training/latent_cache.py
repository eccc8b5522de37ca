"""Latents of all images, computed once and kept in files, from which training reads them.

A cache is a folder of safetensors files. Each holds the latents of consecutive images: their modes, their standard
deviations where the autoencoder returns a distribution, and the same of the mirrored images where training mirrors
them. A file is written whole or not at all, so that an interrupted run goes on with the files that are missing. They
are mapped into memory and read where they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..basics.files import saving, write_whole
from ..images.samples import TrainingSamples
from ..images.source import ImageSource
from ..pipelines.encoders import Latents

SHARD_BYTES = 2**26  # of latents in a file, all of which are held in memory while it is made
MIRRORED = "_mirrored"  # what the names of the mirrored images' tensors end in
KEY = "key"


class LatentCache:
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
        self.folder, self._key, self._encoder, self._images = folder, key, encoder, images
        moments = ("mean", "std") if sampled else ("mean",)
        self._names = [name + end for end in (("", MIRRORED) if mirrored else ("",)) for name in moments]
        self._bytes = math.prod(shape) * encoder.vae.dtype.itemsize * len(self._names)
        self._per_file = max(1, SHARD_BYTES // self._bytes)
        self._files = math.ceil(len(images) / self._per_file)
        self._open: dict[int, dict[str, Tensor]] = {}

    @property
    def size(self) -> int:
        """Bytes of the whole cache."""
        return self._bytes * len(self._images)

    def path(self, number: int) -> Path:
        """The file of this number, which is one of several."""
        return self.folder / f"latents-{number + 1:05d}-of-{self._files:05d}.safetensors"

    def missing(self) -> list[int]:
        """Numbers of the files that are not there, or are of something else."""
        return [number for number in range(self._files) if not self._is_there(number)]

    def _is_there(self, number: int) -> bool:
        try:
            with safe_open(self.path(number), "pt") as file:
                return (file.metadata() or {}).get(KEY) == self._key and set(file.keys()) == set(self._names)
        except (OSError, SafetensorError):
            return False

    def build(self, process: PartialState) -> int:
        """Compute what is missing, each process its part; to be called on all of them, which share the folder.

        Returns:
            How many files this process has written.

        Raises:
            SaveError: The disk is full, or the like; the files that are there are whole.
        """
        missing = self.missing()
        process.wait_for_everyone()  # all of them have looked before the first one writes
        own = missing[process.process_index :: process.num_processes]
        count = sum(len(self._indices(number)) for number in own)
        with tqdm(total=count, desc="Encoding", unit="image", disable=not process.is_main_process or not own) as bar:
            for number in own:
                tensors = self._compute(self._indices(number), bar)
                with saving("The cache of latents", self.folder):
                    save = partial(save_file, tensors, metadata={"format": "pt", KEY: self._key})
                    write_whole(self.path(number), save)
        process.wait_for_everyone()
        return len(own)

    def _indices(self, number: int) -> range:
        first = number * self._per_file
        return range(first, min(first + self._per_file, len(self._images)))

    @torch.no_grad()
    def _compute(self, indices: range, bar: Any) -> dict[str, Tensor]:
        """The latents of these images by name; images are read and encoded a chunk at a time."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self._names}
        for start in range(0, len(indices), self._encoder.chunk):
            part = indices[start : start + self._encoder.chunk]
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
            number, row = divmod(index, self._per_file)
            tensors = self._tensors(number)
            for name in moments:
                rows[name].append(tensors[name + MIRRORED * flip][row])
        return {f"latent_{name}": torch.stack(each).float() for name, each in rows.items()}

    def _tensors(self, number: int) -> dict[str, Tensor]:
        """The tensors of a file, which are mapped into memory and stay so."""
        if number not in self._open:
            with safe_open(self.path(number), "pt") as file:
                self._open[number] = {name: file.get_tensor(name) for name in self._names}
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        # A loader process maps the files itself, and encodes nothing.
        return {**self.__dict__, "_open": {}, "_encoder": None}


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
