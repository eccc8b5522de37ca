"""The gallery in ``pipelines/``: its code runs as it stands, its links lead somewhere, and no pipeline is missing."""

import inspect
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from code_blocks import code_blocks
from diffusers import DiffusionPipeline
from hub_models import tiny_pipeline, use_hub
from loopback_hub import TOKEN, LoopbackHub
from tiny_networks import tiny_unet

import diffusers_sde
from diffusers_sde import ClassConditionalSDEPipeline, VPSDEScheduler

GALLERY = Path(__file__).resolve().parents[1] / "pipelines"
PIPELINES = {
    name: cls
    for name in diffusers_sde.__all__
    if inspect.isclass(cls := getattr(diffusers_sde, name)) and issubclass(cls, DiffusionPipeline)
}
PAGES = {page.read_text().splitlines()[0].removeprefix("# "): page for page in GALLERY.glob("[!R]*.md")}
HALVES = ((0, 0, 8, 4), (0, 4, 8, 8))


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as server:
        yield server


@pytest.fixture
def clone(monkeypatch, tmp_path, hub):
    """An empty folder to run in, with a cache and a Hub of its own."""
    use_hub(monkeypatch, hub, TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def demo_pipeline():
    """A tiny network in the place of that of ``make demo``, with classes as that one."""
    names = {number: str(number) for number in range(10)}
    scheduler = VPSDEScheduler(prediction_type="v_prediction")  # of a network that returns almost 0: of Gaussian data
    return ClassConditionalSDEPipeline(tiny_unet(num_class_embeds=11), scheduler, id2label=names, null_class=10)


def execute(name):
    """Execute the blocks of a page one after another, as a reader pastes them; return the names that they leave."""
    names = {}
    for block in code_blocks(PAGES[name].read_text()):
        exec(compile(block, str(PAGES[name]), "exec"), names)
    return names


@pytest.mark.parametrize("has_demo", [False, True])
@pytest.mark.parametrize("name", PIPELINES)
def test_the_code_of_a_page_runs(name, has_demo, clone, hub, capsys):
    told = name == "TextSDEPipeline"
    demo = tiny_pipeline("text") if told else demo_pipeline()
    if has_demo:
        demo.save_pretrained(clone / "outputs" / ("captions" if told else "demo"))
    names = execute(name)
    said = "the images are noise." if told else "Run `make demo` first"
    assert (said in capsys.readouterr().out) is not has_demo

    pipe, again = names["pipe"], names["again"]
    assert type(pipe) is type(again) is PIPELINES[name]
    assert has_demo is all(torch.equal(value, weights(demo).get(key)) for key, value in weights(pipe).items())
    assert all(torch.equal(value, weights(again)[key]) for key, value in weights(pipe).items())
    assert any(repo.startswith("user/digits") for repo in hub.repositories)
    assert {image.size for image in names["images"]} == {(8, 8)}
    if name == "InpaintSDEPipeline":  # the known half comes back, and the other half is new
        upper, lower = ([image.crop(box).tobytes() for image in (names["image"], *names["images"])] for box in HALVES)
        assert set(upper) == {upper[0]} and len(set(lower)) == len(lower) == 5


def weights(pipe):
    return pipe.unet.state_dict()


def test_every_pipeline_has_a_page():
    assert set(PAGES) == set(PIPELINES)
    index = (GALLERY / "README.md").read_text()
    assert all(f"[{name}]({page.name})" in index for name, page in PAGES.items())


@pytest.mark.parametrize("name", PIPELINES)
def test_a_page_has_all_its_parts(name):
    text = PAGES[name].read_text()
    assert "$$" in text and "push_to_hub" in "".join(code_blocks(text))
    source = Path(inspect.getsourcefile(inspect.unwrap(PIPELINES[name].__call__))).name
    assert f"](../src/diffusers_sde/pipelines/{source})" in text
    assert re.search(r"!\[[^]]+\]\(\.\./docs/\w+\.png\)", text)


@pytest.mark.parametrize("page", sorted(GALLERY.glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path
        assert target.is_file(), link
        titles = re.findall(r"^#+ (.+)$", target.read_text(), re.M) if anchor else []
        assert not anchor or anchor in [title.lower().replace(" ", "-") for title in titles], link
