"""Check a tag against version and changelog, and print the notes: ``python scripts/release.py v1.2.3``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def stated_version(root: Path = ROOT) -> str:
    """Read the version from the one file that states it, without an import of the package."""
    source = (root / "src" / "diffusers_sde" / "shipping" / "version.py").read_text(encoding="utf-8")
    return re.findall(r'^__version__ = "(.+)"$', source, re.M)[0]


def release_notes(tag: str, root: Path = ROOT) -> str:
    """Return the section of the changelog for a tag.

    Args:
        tag: ``v`` and the version.
        root: The repository.

    Raises:
        ValueError: The tag is not the version, the version is one of development, or the changelog has no such section.
    """
    version = stated_version(root)
    if tag != f"v{version}":
        raise ValueError(f"tag must be v{version}, the version of the package, got {tag!r}.")
    if "dev" in version:
        raise ValueError(f"version must be that of a release, got {version!r}.")
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(rf"^## \[{re.escape(version)}\].*?$(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    if found is None or not found[1].strip():
        raise ValueError(f"CHANGELOG.md must have a section '## [{version}]' that says what has changed.")
    return found[1].strip() + "\n"


if __name__ == "__main__":
    try:
        print(release_notes(sys.argv[1]), end="")
    except (IndexError, ValueError) as error:
        sys.exit(f"release.py: error: {error}")
