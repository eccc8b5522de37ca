"""Files that are whole or absent, and folders that one run at a time may write to."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .modes import give_mode

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
_held: set[tuple[int, int]] = set()  # device and inode of the lock files of this process


class FolderInUse(ValueError):
    """Another run is writing to the folder."""


class SaveError(OSError):
    """Something could not be written; the message names the folder and its free space."""


def write_whole(path: Path, save: Callable[[Path], Any]) -> None:
    """Write a file, and the folders above it, so that an interruption leaves the old one or none.

    The disk holds the contents before the file gets its name, so a crash of the machine leaves no empty file either.

    Args:
        path: The file.
        save: Called with the path to write to, another name in the same folder, which is renamed afterwards.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.unlink(missing_ok=True)
        unfinished.touch()
        mode = unfinished.stat().st_mode
        save(unfinished)
        give_mode(unfinished, mode)
        sync(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)  # a full disk gets its space back
        raise


def write_folder_whole(folder: Path, unfinished: Path, save: Callable[[Path], Any]) -> None:
    """Write many files into a folder; each of them is the old one or the new one at any moment.

    Nothing in the folder changes before all of the new files are on the disk; other files stay as they are.

    Args:
        folder: Where the files go.
        unfinished: Another folder on the same disk, which holds them until then. It is deleted first.
        save: Called with the folder to write to.
    """
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        save(unfinished)
        # An index after what it lists.
        files = sorted(p for p in unfinished.rglob("*") if p.is_file())
        files.sort(key=lambda file: file.name.endswith("index.json"))
        mode = unfinished.stat().st_mode
        for file in files:
            give_mode(file, mode)
            sync(file)
        for file in files:
            target = folder / file.relative_to(unfinished)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        for parent in {(folder / file.relative_to(unfinished)).parent for file in files}:
            sync(parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until the disk holds a file's contents, or a folder's entries."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def saving(what: str, folder: Path) -> Iterator[None]:
    """Turn whatever goes wrong while something is written into one line that names the folder and its free space.

    A full disk has many faces: torch raises a RuntimeError, safetensors an error of its own.

    Raises:
        SaveError: Any exception in the block.
    """
    try:
        yield
    except SaveError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        try:
            free = f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB free"
        except OSError:
            free = "unknown free space"
        raise SaveError(
            f"{what} could not be written to output_dir {str(folder)!r}, whose disk has {free} (quotas and limits of "
            f"file sizes count too): {reason}"
        ) from error


def check_folder(folder: Path, name: str = "output_dir") -> None:
    """Make sure that a folder exists or can be created; nothing is changed on disk.

    Raises:
        ValueError: It is a file, or it or a folder above it is a link to nothing.
    """
    for place in (folder, *folder.parents):
        if place.is_symlink() and not place.exists():
            raise ValueError(
                f"{name} {str(folder)!r}: {str(place)!r} is a link to {os.readlink(place)!r}: no such folder."
            )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{name} {str(folder)!r} is a file.")


@contextmanager
def lock_folder(folder: Path, name: str = "output_dir") -> Iterator[None]:
    """Keep a folder, which is created, to oneself. However the process ends, the lock ends with it.

    It is a record lock on the file ``.lock``, which loader processes do not inherit. Where there are no such locks, as
    on Windows and on some network disks, nothing is locked.

    Raises:
        FolderInUse: Another process, or another run in this one, has it.
    """
    check_folder(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = None if fcntl is None else _lock(folder, name)
    try:
        yield
    finally:
        if descriptor is not None:
            if _identity(folder / LOCK_FILE) == _identity(descriptor):
                (folder / LOCK_FILE).unlink()
            _held.discard(_identity(descriptor))
            os.close(descriptor)


def check_unlocked(folder: Path, name: str = "output_dir") -> None:
    """Raise ``FolderInUse`` as ``lock_folder`` would, without creating anything."""
    path = folder / LOCK_FILE
    if fcntl is None or not path.is_file():
        return
    _refuse_twice(path, name)
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise _in_use(folder, name, path.read_text()) from None
    except OSError:
        pass  # no locks on this disk
    finally:
        os.close(descriptor)


def _lock(folder: Path, name: str) -> int | None:
    path = folder / LOCK_FILE
    while True:
        _refuse_twice(path, name)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise _in_use(folder, name, path.read_text() if path.exists() else "") from None
        except OSError:  # no locks on this disk
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        if _identity(path) == _identity(descriptor):
            break
        os.close(descriptor)  # its owner has just ended and deleted it
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode())
    _held.add(_identity(descriptor))
    return descriptor


def _refuse_twice(path: Path, name: str) -> None:
    """Record locks do not exclude a process from itself, and end when it closes the file a second time."""
    if _identity(path) in _held:
        raise _in_use(path.parent, name, f"{os.getpid()}, which is this one")


def _identity(file: Path | int) -> tuple[int, int]:
    """Device and inode; of no file where it does not exist."""
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return -1, -1
    return status.st_dev, status.st_ino


def _in_use(folder: Path, name: str, owner: str) -> FolderInUse:
    return FolderInUse(
        f"{name} {str(folder)!r} is in use by process {owner.strip() or 'unknown'}: wait for it, stop it, or choose "
        "another folder."
    )
