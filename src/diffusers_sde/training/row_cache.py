"""Rows that are computed once and kept in files, from which training reads them.

A cache is a folder of safetensors files, each of which holds consecutive rows of some tensors. A file is written whole
or not at all, so that an interrupted run goes on with the files that are missing. They are mapped into memory and read
where they are asked for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..basics.files import saving, write_whole

SHARD_BYTES = 2**26  # of rows in a file, all of which are held in memory while it is made
KEY = "key"


class RowCache(ABC):
    """Rows of some tensors, in a folder.

    Args:
        folder: Where the files are, or will be.
        key: Hash of all that the rows depend on, which files of another cache do not have.
        prefix: What the names of the files begin with.
        names: Names of the tensors.
        row_bytes: Bytes of a row of all tensors together.
        rows: Number of rows.
        unit: What a row stands for, in one word for the progress bar.
    """

    def __init__(
        self, folder: Path, key: str, prefix: str, names: Sequence[str], row_bytes: int, rows: int, unit: str
    ) -> None:
        self.folder, self._key, self._prefix, self._names, self._unit = folder, key, prefix, list(names), unit
        self._bytes, self._rows = row_bytes, rows
        self._per_file = max(1, SHARD_BYTES // row_bytes)
        self._files = math.ceil(rows / self._per_file)
        self._open: dict[int, dict[str, Tensor]] = {}

    @abstractmethod
    def _compute(self, rows: range, bar: Any) -> dict[str, Tensor]:
        """These rows of the tensors by name; the progress bar is told of each row."""

    @property
    def size(self) -> int:
        """Bytes of the whole cache."""
        return self._bytes * self._rows

    def path(self, number: int) -> Path:
        """The file of this number, which is one of several."""
        return self.folder / f"{self._prefix}-{number + 1:05d}-of-{self._files:05d}.safetensors"

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
        count = sum(len(self._rows_of(number)) for number in own)
        disable = not process.is_main_process or not own
        with tqdm(total=count, desc="Encoding", unit=self._unit, disable=disable) as bar:
            for number in own:
                tensors = self._compute(self._rows_of(number), bar)
                with saving(f"The cache of {self._prefix}", self.folder):
                    save = partial(save_file, tensors, metadata={"format": "pt", KEY: self._key})
                    write_whole(self.path(number), save)
        process.wait_for_everyone()
        return len(own)

    def _rows_of(self, number: int) -> range:
        first = number * self._per_file
        return range(first, min(first + self._per_file, self._rows))

    def row(self, index: int) -> dict[str, Tensor]:
        """A row of each tensor by name; its file is mapped into memory and stays so."""
        number, row = divmod(index, self._per_file)
        if number not in self._open:
            with safe_open(self.path(number), "pt") as file:
                self._open[number] = {name: file.get_tensor(name) for name in self._names}
        return {name: tensor[row] for name, tensor in self._open[number].items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a loader process maps the files itself
