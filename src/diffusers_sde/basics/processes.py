"""What the processes of one launch do together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .files import lock_folder


@contextmanager
def lock_for_all(folder: Path, process: PartialState) -> Iterator[None]:
    """``files.lock_folder``, held by the main process; to be called on all, which raise alike.

    Raises:
        FolderInUse: Another run has it.
        ValueError: The folder cannot be.
        OSError: It cannot be created.
    """
    lock = lock_folder(folder) if process.is_main_process else nullcontext()
    error: Exception | None = None
    try:
        lock.__enter__()
    except (ValueError, OSError) as found:
        error = found
    (error,) = broadcast_object_list([error]) if process.num_processes > 1 else [error]
    if error is not None:
        raise error
    try:
        yield
    finally:
        lock.__exit__(None, None, None)
