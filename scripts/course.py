"""The course: run its pages, write down what they print, and make notebooks of them.

The English pages of ``docs/course`` are the source. ``python scripts/course.py`` runs their Python blocks one after
another, writes what each prints behind it, keeps the pictures that they draw, copies code and outputs into the Chinese
pages, and writes the notebooks of both languages. Names of pages, such as ``02-score``, restrict all of this to them;
``--notebooks`` runs nothing and writes the notebooks only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COURSE = Path(__file__).resolve().parents[1] / "docs" / "course"
REPOSITORY = "diffusers-sde/diffusers-sde"
PICTURE = re.compile(r'"(\w+\.(?:png|gif))"')

# A cell: its code, and the block of what it prints, if it prints anything.
CELL = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<shown>.*?)^```\n)?", re.M | re.S)
IMAGE = re.compile(r"^!\[(?P<text>[^\]]*)\]\((?:\.\./)?(?P<name>[\w.]+)\)\n", re.M)
LINK = re.compile(r"\]\((?!\w+:|#)(?P<target>[^)\s]+)\)")

# Colab starts in an empty folder. The digits network of the second page lies beside the pages.
INSTALL = f"""\
!git clone --quiet --depth 1 https://github.com/{REPOSITORY}
%cd {REPOSITORY.partition("/")[2]}/docs/course
%pip install --quiet ../.. matplotlib scikit-learn"""


@dataclass(frozen=True)
class Cell:
    """A Python block of a page.

    Attributes:
        code: Its text.
        shown: What the page says that it prints; empty if nothing.
    """

    code: str
    shown: str


def cells(text: str) -> list[Cell]:
    """The Python blocks of a page in their order."""
    return [Cell(found["code"], found["shown"] or "") for found in CELL.finditer(text)]


def pages(names: Iterable[str] = ()) -> list[Path]:
    """The English pages, or those of them that are named."""
    found = sorted(COURSE.glob("[0-9]*.md"))
    unknown = set(names) - {page.stem for page in found}
    if unknown:
        raise ValueError(f"names must be pages of {COURSE}, got {', '.join(sorted(unknown))}.")
    return [page for page in found if not names or page.stem in names]


def run(page: Path) -> Iterator[str]:
    """Execute the cells of a page in the current folder, and yield what each of them prints.

    The folder needs the network that the second page leaves, ``digits``; see ``shared``.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(page.read_text(encoding="utf-8")):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(cell.code, str(page), "exec"), names)
        yield printed.getvalue()


def shared(folder: Path) -> None:
    """Put what the pages share into a folder."""
    if (COURSE / "digits").is_dir():
        shutil.copytree(COURSE / "digits", folder / "digits", dirs_exist_ok=True)


def pictures(text: str) -> list[str]:
    """The names of the pictures that the code of a page draws."""
    return [name for cell in cells(text) for name in PICTURE.findall(cell.code)]


def with_cells(text: str, contents: Iterable[Cell]) -> str:
    """The text with other cells, one for each of its own.

    Raises:
        ValueError: Not as many cells as the text has.
    """
    rest = list(contents)
    if len(rest) != len(cells(text)):
        raise ValueError(f"contents must have {len(cells(text))} cells, one for each of the page, got {len(rest)}.")

    def block(found: re.Match[str]) -> str:
        cell = rest.pop(0)
        shown = f"\n```text\n{cell.shown}```\n" if cell.shown else ""
        return f"```python\n{cell.code}```\n{shown}"

    return CELL.sub(block, text)


def write(page: Path) -> None:
    """Run a page; write its outputs, its pictures, and the cells of its Chinese translation."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        folder, before = Path(name), Path.cwd()
        shared(folder)
        os.chdir(folder)
        try:
            printed = list(run(page))
        finally:
            os.chdir(before)
        text = page.read_text(encoding="utf-8")
        done = [Cell(cell.code, shown) for cell, shown in zip(cells(text), printed, strict=True)]
        page.write_text(with_cells(text, done), encoding="utf-8")
        for picture in pictures(text):
            shutil.copyfile(folder / picture, COURSE / picture)
        if not (COURSE / "digits").is_dir():
            shutil.copytree(folder / "digits", COURSE / "digits", dirs_exist_ok=True)
    translation = COURSE / "zh" / page.name
    if translation.is_file():
        translation.write_text(with_cells(translation.read_text(encoding="utf-8"), done), encoding="utf-8")
    print(f"{page.stem}: {time.process_time() - started:.1f} s of CPU")


def notebook_path(page: Path) -> Path:
    """Where the notebook of a page of either language lies."""
    return COURSE / "notebooks" / page.relative_to(COURSE).with_suffix(".ipynb")


def notebook(page: Path) -> dict[str, Any]:
    """A page as a notebook, without outputs.

    Code cells are those of the page, behind one that installs the package in Colab. Still pictures are left to the
    cells that draw them. Other pictures and links lead to the repository.
    """
    text = page.read_text(encoding="utf-8")
    folder = page.parent.relative_to(COURSE.parents[1]).as_posix()
    raw = f"https://raw.githubusercontent.com/{REPOSITORY}/main/docs/course/"
    parts: list[tuple[str, str]] = []
    end = 0
    for found in CELL.finditer(text):
        parts += [("markdown", text[end : found.start()]), ("code", found["code"])]
        end = found.end()
    parts.append(("markdown", text[end:]))

    def prose(part: str) -> str:
        part = IMAGE.sub(lambda image: "" if image["name"].endswith(".png") else image[0], part)
        part = IMAGE.sub(lambda image: f"![{image['text']}]({raw}{image['name']})\n", part)
        there = f"https://github.com/{REPOSITORY}/blob/main/{folder}/"
        return LINK.sub(lambda link: f"]({there}{link['target']})", part)

    made = [_cell("code", 0, INSTALL)]
    for number, (kind, part) in enumerate(parts, start=1):
        source = (prose(part) if kind == "markdown" else part).strip("\n")
        if source:
            made.append(_cell(kind, number, source))
    return {
        "cells": made,
        "metadata": {
            "colab": {"provenance": []},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cell(kind: str, number: int, source: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    return cell | {"source": source.splitlines(keepends=True)}


def notebook_text(page: Path) -> str:
    """The file of a page's notebook."""
    return json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n"


def write_notebooks(chosen: Iterable[Path]) -> None:
    """Write the notebooks of pages, in both languages."""
    for english in chosen:
        for page in (english, COURSE / "zh" / english.name):
            path = notebook_path(page)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(notebook_text(page), encoding="utf-8")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Run the pages of the course and write what follows from them.")
    parser.add_argument("pages", nargs="*", help="names of pages, such as 02-score; all of them without")
    parser.add_argument("--notebooks", action="store_true", help="run nothing, write the notebooks only")
    arguments = parser.parse_args()
    chosen = pages(arguments.pages)
    if not arguments.notebooks:
        import matplotlib
        import torch

        matplotlib.use("Agg")
        for page in chosen:
            write(page)
            torch.set_default_dtype(torch.float32)
    write_notebooks(chosen)


if __name__ == "__main__":
    main()
