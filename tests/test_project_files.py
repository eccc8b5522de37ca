"""Workflows, forms, the citation and the release script say what is true of the rest of the repository."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml

import diffusers_sde

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github" / "workflows").glob("*"))}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


# ---------------------------------------------------------------------- workflows


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_calls_targets_and_files_that_exist(name):
    commands = "\n".join(step["run"] for step in steps(WORKFLOWS[name]) if "run" in step)
    called = re.findall(r"^make ([\w-]+)", commands, re.M)
    assert called or name == "release.yml"
    assert set(called) <= TARGETS
    for script in re.findall(r"scripts/\w+\.py", commands):
        assert (ROOT / script).is_file()


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_may_do_little(name):
    """It reads unless a job says otherwise, leaves no token behind a checkout, and ends in bounded time."""
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "uses" in job or job["timeout-minutes"] <= 60
    for step in steps(workflow):
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_runs_nothing_that_others_have_written(name):
    """Titles and branch names reach a shell by the environment only, never by substitution into its text."""
    for step in steps(WORKFLOWS[name]):
        assert "${{" not in step.get("run", "")


def test_the_tests_run_on_three_pythons_that_are_declared():
    pythons = WORKFLOWS["tests.yml"]["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert len(pythons) == 3 and PROJECT["requires-python"] == f">={pythons[0]}"
    assert {f"Programming Language :: Python :: {version}" for version in pythons} <= set(PROJECT["classifiers"])


def test_a_release_is_tested_before_it_is_published_without_a_secret():
    jobs = WORKFLOWS["release.yml"]["jobs"]
    assert set(jobs["publish"]["needs"]) == {"tests", "build"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and jobs["publish"]["environment"] == "pypi"
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()
    commands = [step.get("run") for step in jobs["build"]["steps"]]
    assert commands.index("make dist") < commands.index("make test-wheel")


def test_the_run_of_this_place_tests_both_ends_of_the_ranges_and_ends_with_the_newest():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"make ([\w-]+)", script.splitlines()[-1]) == ["test-lowest", "test"]
    limit = int(re.search(r"timeout --kill-after=(?P<after>\d+) (?P<limit>\d+) ", script)["limit"])
    assert limit <= 35 * 60


# ---------------------------------------------------------------------- forms


def test_the_form_for_bugs_asks_for_the_diagnosis():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    fields = {entry["id"]: entry for entry in form["body"] if "id" in entry}
    assert "print(diffusers_sde.diagnose(pipe))" in fields["diagnosis"]["attributes"]["description"]
    assert all(fields[name]["validations"]["required"] for name in ("what", "script", "diagnosis", "versions"))
    assert callable(diffusers_sde.diagnose)


def test_links_of_forms_lead_to_files():
    for form in (ROOT / ".github").rglob("*.yml"):
        for path in re.findall(r"github\.com/diffusers-sde/diffusers-sde/blob/main/([\w./-]+)", form.read_text()):
            assert (ROOT / path).is_file(), (form, path)


# ---------------------------------------------------------------------- the citation


def test_the_citation_has_what_the_format_demands_and_what_the_project_says():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert (citation["title"], citation["license"]) == (PROJECT["name"], PROJECT["license"])
    assert citation["repository-code"] == PROJECT["urls"]["Homepage"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    assert "version" not in citation  # it stands in version.py alone
    paper = citation["references"][0]
    assert paper["url"] == PROJECT["urls"]["Paper"]
    assert paper["identifiers"][0]["value"] == "arXiv:" + PROJECT["urls"]["Paper"].rpartition("/")[2]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Song",
        "Sohl-Dickstein",
        "Kingma",
        "Kumar",
        "Ermon",
        "Poole",
    ]


# ---------------------------------------------------------------------- the release script


@pytest.fixture
def release():
    spec = importlib.util.spec_from_file_location("release_script", ROOT / "scripts" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def released(tmp_path):
    """A repository of version 1.2.0."""
    file = tmp_path / "src" / "diffusers_sde" / "shipping" / "version.py"
    file.parent.mkdir(parents=True)
    file.write_text('"""The version."""\n\n__version__ = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n- next\n\n## [1.2.0] - 2027-01-01\n\n- A flow.\n\n## [1.1.0]\n\n- old\n"
    )
    return tmp_path


def test_the_script_reads_the_version_that_python_sees(release):
    assert release.stated_version() == diffusers_sde.__version__


def test_the_notes_of_a_release_are_its_section(release, released):
    assert release.release_notes("v1.2.0", released) == "- A flow.\n"


@pytest.mark.parametrize("tag", ["v1.1.0", "1.2.0", "v1.2", "v1.2.0.dev0"])
def test_another_tag_is_refused(release, released, tag):
    with pytest.raises(ValueError, match=r"tag must be v1\.2\.0"):
        release.release_notes(tag, released)


def test_a_release_needs_its_section_and_a_version_that_is_none_of_development(release, released):
    changelog = released / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace("- A flow.\n", ""))
    with pytest.raises(ValueError, match=r"must have a section '## \[1\.2\.0\]'"):
        release.release_notes("v1.2.0", released)
    file = released / "src" / "diffusers_sde" / "shipping" / "version.py"
    file.write_text('__version__ = "1.3.0.dev0"\n')
    with pytest.raises(ValueError, match="must be that of a release"):
        release.release_notes("v1.3.0.dev0", released)
