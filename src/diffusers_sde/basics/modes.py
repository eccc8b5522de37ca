"""Who may read a file."""

from __future__ import annotations

import stat
from pathlib import Path


def give_mode(file: Path, mode: int) -> None:
    """Let those read and write a file who may do so by the mode of another file or folder, newly made by this process.

    That is what the umask says. safetensors 0.8 lets nobody but the owner read what it writes.

    Args:
        file: The file.
        mode: ``st_mode`` of the other one.
    """
    wanted = stat.S_IMODE(mode) & 0o666
    if stat.S_IMODE(file.stat().st_mode) & 0o666 != wanted:
        file.chmod(wanted)
