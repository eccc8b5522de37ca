"""Which models the page has, and the three that come with the project."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_networks import tiny_unet

from diffusers_sde import SDEPipeline, VPSDEScheduler
from diffusers_sde.basics.options import parse_options
from diffusers_sde.space import cli, runs

ROOT = Path(__file__).resolve().parents[2]
OWN = ROOT / cli.OWN_MODELS
MODELS = ("digits", "fashion", "colour")  # in the order of the page
CARDS = {"digits": "digits-class", "fashion": "fashion-mnist-28-class", "colour": "cifar10-32-class"}
if not OWN.is_dir():
    pytest.skip("the source archive leaves the models of the page out", allow_module_level=True)


def test_models_are_added_up_and_named():
    assert parse_options(cli.SpaceConfig, []).model == ()
    config = parse_options(cli.SpaceConfig, ["--model", "a=x", "b=y", "--model", "somewhere/c"])
    assert [cli.named(each) for each in config.model] == [("a", "x"), ("b", "y"), ("c", "somewhere/c")]


@pytest.fixture
def served(monkeypatch):
    """What would be served: the names of the models, and the address."""
    found = []
    monkeypatch.setattr(cli, "_server", lambda: (lambda names, host, **_: found.append((names, host)), list))
    return found


@pytest.mark.parametrize("way", ["command", "space"])
def test_nothing_set_serves_the_models_of_the_project(way, served, monkeypatch):
    if way == "command":
        monkeypatch.chdir(ROOT)
        cli.main([])
    else:
        monkeypatch.delenv("MODELS", raising=False)
        code = (ROOT / "examples" / "space" / "app.py").read_text(encoding="utf-8")
        exec(code, {"__file__": str(ROOT / "examples" / "space" / "app.py"), "__name__": "app"})
    assert served == [(list(MODELS), "127.0.0.1" if way == "command" else "0.0.0.0")]


def test_a_variable_of_the_space_names_other_models(served, monkeypatch, tmp_path):
    SDEPipeline(tiny_unet(), VPSDEScheduler()).save_pretrained(tmp_path)
    monkeypatch.setenv("MODELS", f"mine={tmp_path}")
    cli.space_main(OWN)
    assert served == [(["mine"], "0.0.0.0")]


@pytest.mark.usefixtures("served")
def test_without_a_model_anywhere_the_command_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2
    assert "--model must name a model" in capsys.readouterr().err


def test_there_are_these_models():
    assert sorted(path.name for path in OWN.iterdir()) == sorted(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_project_is_small_and_carries_no_code(name):
    files = [path for path in (OWN / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    weights = safetensors.torch.load_file(OWN / name / "unet" / "diffusion_pytorch_model.safetensors")
    assert {each.dtype for each in weights.values()} == {torch.float16}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_project_draws(name):
    model = runs.load_model(name, str(OWN / name))
    parts = list(runs.form(model, seed=1, steps=6))
    assert [part["sampler"] for part in parts] == list(runs.SAMPLERS)
    seeds = range(3)
    *_, last = runs.trace(model.sampler(12, **runs.SAMPLERS["ode"]), model.guided("", seeds), model.noise(seeds))
    images = runs.pixels(model, last.sample)
    # Three pictures of three classes, not flat.
    assert images.std((1, 2, 3)).min() > 0.05 and (images[0] - images[1]).abs().mean() > 0.05
    if (
        images.shape[-1] > 8
    ):  # and no noise, where the mean square of the difference of neighbours is twice the variance
        steps = (images[..., 1:] - images[..., :-1]).square().mean((1, 2, 3))
        assert (steps / images.var((1, 2, 3))).max() < 0.7


def test_the_digits_are_those_that_are_asked_for():
    """By the nearest of the means of scikit-learn's digits, which is right for nine tenths of real ones."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    means = torch.stack([torch.tensor(data.images[data.target == k] / 16.0).mean(0) for k in range(10)]).float()
    model, seeds = runs.load_model("digits", str(OWN / "digits")), range(30)
    *_, last = runs.trace(model.sampler(12, **runs.SAMPLERS["ode"]), model.guided("", seeds), model.noise(seeds))
    nearest = (runs.pixels(model, last.sample) - means).square().sum((2, 3)).argmin(1)
    assert (nearest == torch.arange(30) % 10).sum() >= 24  # by chance 3


@pytest.mark.parametrize("name", CARDS)
def test_the_card_of_a_model_of_the_project_says_what_it_is(name):
    card = (ROOT / "model_cards" / f"{CARDS[name]}.md").read_text(encoding="utf-8")
    model = runs.load_model(name, str(OWN / name))
    channels, height, width = model.shape
    millions = sum(p.numel() for p in model.pipe.unet.parameters()) / 1e6
    assert f", {millions:.2f} million parameters" in card
    assert f"| images | {channels} x {height} x {width} |" in card
    assert f"| the network predicts | `{model.pipe.scheduler.config.prediction_type}` |" in card
    assert f"`{model.pipe.scheduler.sde}`" in card
    assert f'class_labels="{next(iter(model.classes))}"' in card
    for picture in ("samples", "trajectories"):
        assert f"](images/{CARDS[name]}/{picture}.png)" in card


def test_the_fitted_sampler_is_one_for_six_calls():
    config = json.loads((OWN / "digits" / f"fitted_{runs.FEW}.json").read_text(encoding="utf-8"))
    assert config["fitted_plan"]["levels"] == runs.FEW
