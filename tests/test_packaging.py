"""What pip installs is the whole package, built from the source archive as pip builds it."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import diffusers_sde

ROOT = Path(__file__).resolve().parents[1]


def build(kind, source, target):
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(target)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    return next(path for path in target.iterdir() if path.suffix in (".gz", ".whl"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, folder / "archive")) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("diffusers_sde-*"))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    with zipfile.ZipFile(build("wheel", source, tmp_path_factory.mktemp("wheel"))) as archive:
        yield {name: archive.read(name).decode() for name in archive.namelist()}


def test_the_wheel_holds_the_package(wheel):
    source = ROOT / "src"
    expected = {
        str(path.relative_to(source)): path.read_text()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name: text for name, text in wheel.items() if ".dist-info" not in name} == expected


def test_the_metadata_says_what_it_is(wheel):
    metadata = next(text for name, text in wheel.items() if name.endswith("METADATA"))
    head, _, description = metadata.partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head
    assert "Requires-Dist: jinja2" in head
    assert f"\nVersion: {diffusers_sde.__version__}\n" in head
    links = re.findall(r"\]\(([^)\s]+)\)", description)
    assert links and all(link.startswith(("https://", "#")) for link in links), links
    home = re.search(r"^Project-URL: Homepage, (\S+)$", head, re.M)[1]
    assert (
        f"({home}/raw/main/docs/samples.png)" in description
        and f"({home}/blob/main/pipelines/README.md)" in description
    )
    for kind in ("raw", "blob"):
        description = description.replace(f"]({home}/{kind}/main/", "](")
    assert description == (ROOT / "README.md").read_text()


def test_the_source_archive_holds_what_the_readme_shows(source):
    for path in re.findall(r"\]\(((?![a-z]+:|#)[^)\s#]+)", (ROOT / "README.md").read_text()):
        assert (source / path).exists(), path
    for path in (*(ROOT / "benchmarks").glob("*.py"), *ROOT.glob("constraints*.txt")):
        assert (source / path.relative_to(ROOT)).is_file(), path


def test_the_source_archive_holds_what_its_tests_read(source):
    names = ["CITATION.cff", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "README.md"]
    names += ["SECURITY.md", "Makefile", "constraints.txt", "mkdocs.yml", "docs/stability.md", "docs/guides/hub.md"]
    names += [str(path.relative_to(ROOT)) for path in (ROOT / ".github").rglob("*") if path.is_file()]
    assert not [name for name in names if not (source / name).is_file()]
    assert not (source / "site").exists()
    page = source / "examples" / "space"
    assert (page / "app.py").is_file() and not (page / "models").exists()  # megabytes of weights
