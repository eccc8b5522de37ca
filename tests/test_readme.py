"""The README: short enough to be finished, and the same in both languages. tests/test_guides.py runs its code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_a_newcomer_finishes_it():
    assert all(len(text.splitlines()) <= 150 for text in (ENGLISH, CHINESE))
    assert len(re.findall(r"^### \d\. ", ENGLISH, re.M)) == 5
    assert BLOCK.findall(ENGLISH)[0][1].splitlines()[0].startswith("make demo ")


def test_both_languages_have_the_same_code_headings_and_numbers():
    assert BLOCK.findall(ENGLISH) == BLOCK.findall(CHINESE)
    prose = [BLOCK.sub("", text) for text in (ENGLISH, CHINESE)]
    for pattern in (r"^#+ ", r"`[^`\n]+`", r"^\|(?:.*\|)+$"):
        english, chinese = (re.findall(pattern, text, re.M) for text in prose)
        assert len(english) == len(chinese), pattern
    in_code, numbers = (
        [sorted(re.findall(p, text)) for text in prose] for p in (r"`[^`\n]+`", r"(?<![\w.])\d+(?:\.\d+)*")
    )
    assert in_code[0] == in_code[1]
    assert numbers[0] == numbers[1]
    english, chinese = ([link for link in LINK.findall(text) if not link.startswith("README")] for text in prose)
    assert english == chinese
    assert "](README.zh.md)" in ENGLISH and "](README.md)" in CHINESE


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_links_lead_to_files(text):
    links = [link for link in LINK.findall(text) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link.partition("#")[0]).is_file(), link
