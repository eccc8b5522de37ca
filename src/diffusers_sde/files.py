"""Files that are whole or absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, save: Callable[[Path], Any]) -> None:
    """Write a file, and the folders above it, so that an interruption leaves the old one or none.

    Args:
        path: The file.
        save: Called with the path to write to, another name in the same folder, which is renamed afterwards.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    save(unfinished)
    os.replace(unfinished, path)
