"""The course: its pages print what they show, their claims are among what is printed, translations and notebooks fit.

``scripts/course.py`` writes the outputs, the Chinese pages' code and the notebooks; here they are compared.
"""

import importlib.util
import re
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
COURSE = ROOT / "docs" / "course"
PAGES = sorted(COURSE.glob("[0-9]*.md"))
TRANSLATIONS = [COURSE / "zh" / page.name for page in PAGES]

spec = importlib.util.spec_from_file_location("course", ROOT / "scripts" / "course.py")
course = importlib.util.module_from_spec(spec)
sys.modules["course"] = course
spec.loader.exec_module(course)


def prose(text):
    """A page without its code."""
    return re.sub(r"^```\w+\n.*?^```$", "", text, flags=re.M | re.S)


@pytest.fixture
def workplace(monkeypatch, tmp_path):
    """A folder with what the pages share, and torch as the page found it afterwards."""
    matplotlib.use("Agg")
    course.shared(tmp_path)
    monkeypatch.chdir(tmp_path)
    kind = torch.get_default_dtype()
    yield tmp_path
    torch.set_default_dtype(kind)
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_prints_what_it_shows(page, workplace):
    text = page.read_text(encoding="utf-8")
    for cell, printed in zip(course.cells(text), course.run(page), strict=True):
        assert printed == cell.shown
    drawn = course.pictures(text)
    assert drawn and all((workplace / name).is_file() and (COURSE / name).is_file() for name in drawn)
    assert all((COURSE / name).stat().st_size < 600_000 for name in drawn)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_ends_in_a_claim_that_it_measured(page):
    text = page.read_text(encoding="utf-8")
    claim = text.rpartition("\n## ")[2]
    assert claim.startswith("What was measured")
    measured = "".join(cell.shown for cell in course.cells(text))
    values = {float(value) for value in re.findall(r"\d[\d.]*(?:e[+-]?\d+)?", measured)}
    claimed = re.findall(r"\b0\.\d+|\d\.\d\d\b|\d+e-\d+|\d+\.\d(?=%)", claim)
    assert claimed
    for number in map(float, claimed):
        assert any(abs(value - number) <= 0.02 * number for value in values), number


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_both_languages_have_the_same_code_headings_and_numbers(page):
    english, chinese = (path.read_text(encoding="utf-8") for path in (page, COURSE / "zh" / page.name))
    assert course.cells(english) == course.cells(chinese) and course.cells(english)
    texts = [prose(english), prose(chinese)]
    levels, formulas, numbers = (
        [re.findall(pattern, text, flags) for text in texts]
        for pattern, flags in ((r"^#+ ", re.M), (r"\$+[^$]+\$+", re.S), (r"\d+(?:\.\d+)?(?:e-\d+)?", 0))
    )
    assert levels[0] == levels[1]
    assert sorted(formulas[0]) == sorted(formulas[1])
    assert sorted(numbers[0]) == sorted(numbers[1])
    links = [re.findall(r"\]\((?:\.\./)*([\w./-]+)\)", text) for text in texts]
    assert [Path(link).name for link in links[0]] == [Path(link).name for link in links[1]]


@pytest.mark.parametrize("page", [*PAGES, *TRANSLATIONS], ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_a_notebook_is_the_page(page):
    nbformat = pytest.importorskip("nbformat")
    path = course.notebook_path(page)
    assert path.read_text(encoding="utf-8") == course.notebook_text(page), "run scripts/course.py --notebooks"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    install, *code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert f"https://github.com/{course.REPOSITORY}" in install and "pip install" in install
    assert code == [cell.code.strip("\n") for cell in course.cells(page.read_text(encoding="utf-8"))]


def test_every_page_is_in_the_table_and_in_the_menu():
    index = (COURSE / "index.md").read_text(encoding="utf-8")
    translated = (COURSE / "zh" / "index.md").read_text(encoding="utf-8")
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.stem[:2] for page in PAGES] == [f"{number:02d}" for number in range(1, 9)]
    for page in PAGES:
        assert f"({page.name})" in index and f"(zh/{page.name})" in index and f"({page.name})" in translated
        assert f"course/{page.name}" in menu and f"course/zh/{page.name}" in menu
        for text in (index, translated):
            assert f"docs/course/notebooks/{page.stem}.ipynb" in text or f"notebooks/zh/{page.stem}.ipynb" in text
