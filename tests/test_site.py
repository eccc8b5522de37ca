"""The reference: every public name has one entry, every entry is a name, and every name is documented."""

import importlib
import inspect
import pkgutil
import re
from collections import Counter
from pathlib import Path
from typing import get_origin

import pytest

import diffusers_sde

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md"))}
ENTRIES = [entry for page in PAGES.values() for entry in re.findall(r"^::: (\S+)$", page, re.M)]
PACKAGES = ["diffusers_sde"] + [
    f"diffusers_sde.{module.name}"
    for module in pkgutil.iter_modules(diffusers_sde.__path__)
    if hasattr(importlib.import_module(f"diffusers_sde.{module.name}"), "__all__")
]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_an_entry(package):
    documented = [pkgutil.resolve_name(entry) for entry in ENTRIES]
    module = importlib.import_module(package)
    missing = [n for n in module.__all__ if not any(getattr(module, n) is value for value in documented)]
    assert not missing


def test_the_packages_with_public_names_are_these():
    short = {package.removeprefix("diffusers_sde.") for package in PACKAGES}
    assert short >= {"sdes", "networks", "sampling", "flow", "guidance", "schedulers", "pipelines", "training"}
    assert short >= {"evaluation", "metrics", "diffusers_sde"}


def test_no_name_has_two_entries():
    assert [entry for entry, times in Counter(ENTRIES).items() if times > 1] == []
    objects = [pkgutil.resolve_name(e) for e in ENTRIES]
    assert len({id(value) for value in objects}) == len(objects)


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_is_documented(entry):
    value = pkgutil.resolve_name(entry)
    is_alias = get_origin(value) is not None  # which Python 3.10 takes for a class
    if not is_alias and (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)):
        assert inspect.getdoc(value), entry


def test_the_options_of_every_script_are_listed():
    listed = re.findall(r"<!-- options: ([\w.]+) -->", "".join(PAGES.values()))
    assert {path.rpartition(".")[2] for path in listed} == {
        "TrainingConfig",
        "PolicyTrainingConfig",
        "EvaluationConfig",
        "SamplingConfig",
        "ExportConfig",
        "ConvertConfig",
    }
    for path in listed:
        assert all("help" in field.metadata for field in pkgutil.resolve_name(path).__dataclass_fields__.values()), path


def test_the_menu_has_every_page():
    menu = set(
        re.findall(r"[\w/-]+\.md", (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2])
    )
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert pages <= menu
