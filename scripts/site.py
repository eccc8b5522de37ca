"""Hooks of mkdocs for ``make docs``: pages from outside docs/, links, mathematics, and nothing from other servers."""

from __future__ import annotations

import dataclasses
import html
import importlib
import posixpath
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

import diffusers_sde

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "https://github.com/diffusers-sde/diffusers-sde/blob/main/"

# Files that GitHub shows where they are, and their pages here.
OUTSIDE = {
    **{
        f"pipelines/{path.name}": f"gallery/{'index.md' if path.stem == 'README' else path.name}"
        for path in sorted((ROOT / "pipelines").glob("*.md"))
    },
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.zh.md": "zh.md",
    "SECURITY.md": "security.md",
}
INSIDE = {page: source for source, page in OUTSIDE.items()}

CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.M | re.S)
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
OPTIONS = re.compile(r"<!-- options: ([\w.]+) -->")
MATHEMATICS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
ASSET = re.compile(
    r"""<(?:script|img|iframe)[^>]+src=["']?(?:https?:)?//[^>]*>|<link(?![^>]+canonical)[^>]+href=["']?(?:https?:)?//[^>]*>"""
)


def on_config(config: Any) -> Any:
    """Say the version in the header of every page."""
    config.site_name = f"diffusers-sde {diffusers_sde.__version__}"
    return config


def on_files(files: Any, config: Any) -> Any:
    """Take the pages that live outside docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links between files of the repository to pages, or else to the repository; write the tables of options."""
    parts = CODE.split(markdown)
    place = page.file.src_uri
    parts[::2] = [LINK.sub(lambda link: site_link(link[1], place), part) for part in parts[::2]]
    return OPTIONS.sub(lambda found: options_table(found[1]), "".join(parts))


def site_link(link: str, place: str) -> str:
    """A link of a file of the repository, as one of its page.

    Args:
        link: The target, as the file spells it.
        place: The page that has the link, relative to docs/.

    Raises:
        PluginError: The repository has no such file.
    """
    if re.match(r"\w+:|#", link):
        return link
    path, hash, anchor = link.partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(INSIDE.get(place, f"docs/{place}")), path))
    if not (ROOT / target).exists():
        raise PluginError(f"{place} links to {link}, but there is no {target}.")
    site = OUTSIDE.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
    if site is None:
        return SOURCE + target + hash + anchor
    return posixpath.relpath(site, posixpath.dirname(place) or ".") + hash + anchor


def options_table(path: str) -> str:
    """A dataclass of command-line options as a Markdown table."""
    module, _, name = path.rpartition(".")
    rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for f in dataclasses.fields(getattr(importlib.import_module(module), name)):
        default = "required" if f.default is dataclasses.MISSING else f"`{f.default!r}`"
        choices = f.metadata.get("choices")
        allowed = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
        meaning = html.escape(f.metadata["help"], quote=False).replace("|", "\\|") + allowed
        rows.append(f"| `{f.name}` | `{f.type}` | {default} | {meaning} |")
    return "\n".join(rows)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Write LaTeX as MathML, which browsers show without a script."""
    return MATHEMATICS.sub(lambda found: mathml(found[2], display=found[1] == "div"), content)


def mathml(latex: str, display: bool) -> str:
    """MathML of a formula.

    Raises:
        PluginError: The formula has an unknown command.
    """
    source = html.unescape(latex)
    # latex2mathml sets one upright letter in italics, and functions without the space that TeX puts around them.
    source = source.replace(r"\mathrm{d}", r"\text{d}")
    source = re.sub(r"(?<=[\w)}])\s*\\(log|exp|cos|sin)\b", r"\\,\\\1", source)
    source = re.sub(r"\\(log|exp|cos|sin)\b(?!\s*(?:[(^_]|\\big))", r"\\\1\\,", source)
    try:
        formula = latex2mathml.converter.convert(source, display="block" if display else "inline")
    except Exception as error:
        raise PluginError(f"{latex!r} is no formula that latex2mathml knows: {error!r}.") from None
    if "\\" in formula:
        raise PluginError(f"latex2mathml left a command of {latex!r} as it was: {formula}")
    return f'<span class="math-block">{formula}</span>' if display else formula


def on_post_build(config: Any) -> None:
    """Refuse a site that asks other servers for scripts, styles or pictures."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        if found := ASSET.search(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path} loads from another server: {found[0]}")
