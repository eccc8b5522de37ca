"""The course: its pages print what they show, their claims are among what is printed, and both languages agree."""

import contextlib
import io
import re
from pathlib import Path

import matplotlib
import pytest
import torch
from code_blocks import code_blocks

COURSE = Path(__file__).resolve().parents[1] / "docs" / "course"
PAGES = sorted(COURSE.glob("[0-9]*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


@pytest.fixture
def workplace(monkeypatch, tmp_path):
    """An empty folder, and torch as the page found it afterwards."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    kind = torch.get_default_dtype()
    yield tmp_path
    torch.set_default_dtype(kind)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_prints_what_it_shows(page, workplace):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    names, figures = {}, set()
    for place, (kind, code) in enumerate(blocks):
        if kind != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), names)
        shown = blocks[place + 1] if place + 1 < len(blocks) else ("", "")
        assert printed.getvalue() == (shown[1] if shown[0] == "text" else "")
        figures |= set(re.findall(r'savefig\("(\w+\.png)"', code))
    assert figures and all((workplace / name).is_file() and (page.parent / name).is_file() for name in figures)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_ends_in_a_claim_that_it_measured(page):
    text = page.read_text(encoding="utf-8")
    claim = text.rpartition("\n## ")[2]
    assert claim.startswith("What was measured")
    measured = "".join(shown for kind, shown in BLOCK.findall(text) if kind == "text")
    values = {float(value) for value in re.findall(r"\d[\d.]*(?:e[+-]?\d+)?", measured)}
    claimed = re.findall(r"\b0\.\d+|\d\.\d\d\b|\d+e-\d+", claim)
    assert claimed
    for number in map(float, claimed):
        assert any(abs(value - number) <= 0.02 * number for value in values), number


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_both_languages_have_the_same_code_headings_and_numbers(page):
    texts = [path.read_text(encoding="utf-8") for path in (page, COURSE / "zh" / page.name)]
    english, chinese = texts
    assert BLOCK.findall(english) == BLOCK.findall(chinese) and code_blocks(english)
    prose = [BLOCK.sub("", text) for text in texts]
    levels, formulas, numbers = (
        [re.findall(pattern, text, flags) for text in prose]
        for pattern, flags in ((r"^#+ ", re.M), (r"\$+[^$]+\$+", re.S), (r"\d+(?:\.\d+)?(?:e-\d+)?", 0))
    )
    assert levels[0] == levels[1]
    assert sorted(formulas[0]) == sorted(formulas[1])
    assert sorted(numbers[0]) == sorted(numbers[1])
    links = [re.findall(r"\]\((?:\.\./)?([\w./-]+)\)", text) for text in prose]
    assert links[0] == links[1]


def test_every_page_is_in_the_table():
    index = (COURSE / "index.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"({page.name})" in index and f"(zh/{page.name})" in index
