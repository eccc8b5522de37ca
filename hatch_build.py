"""The README as the package index shows it, where links and pictures need whole addresses."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<path>(?![a-z]+:|#)[^)\s]+)\)")


def with_whole_addresses(text: str, home: str) -> str:
    """Relative links of a Markdown text as those of the repository at the address ``home``."""

    def whole(match: re.Match) -> str:
        kind = "raw" if match["picture"] else "blob"
        return f"{match['picture']}[{match['text']}]({home}/{kind}/main/{match['path']})"

    return LINK.sub(whole, text)


class ReadmeHook(MetadataHookInterface):
    """Fills in ``project.readme``."""

    def update(self, metadata: dict) -> None:
        """Put the README into the project's metadata, which hold everything else already."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = with_whole_addresses(text, metadata["urls"]["Homepage"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
