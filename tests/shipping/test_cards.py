"""Model cards say what is true of the pipeline and of the measurements, in metadata that the Hub accepts."""

import re
from pathlib import Path

import pytest
import torch
from hub_models import tiny_pipeline
from huggingface_hub import ModelCard
from PIL import Image
from tiny_networks import tiny_unet

from diffusers_sde import SDEPipeline, SubVPSDEScheduler, VPSDEScheduler
from diffusers_sde.evaluation.samplers import CALL_OPTIONS as SAMPLER_OPTIONS
from diffusers_sde.shipping import figures
from diffusers_sde.shipping.cards import CALL_OPTIONS, PIP_NAME, TEMPLATE, add_card, model_card
from diffusers_sde.shipping.version import __version__

BITS = {"mean": 2.5, "standard_error": 0.01, "images": 90, "dequantization": "uniform", "t_min": 1e-5, "rtol": 3e-4}
EVALUATION = {
    "model": "somewhere",
    "data": {"name": "digits", "split": "train", "images": 1797},
    "num_samples": 500,
    "features": {"name": "classifier", "dimensions": 64},
    "samplers": [
        {
            "label": "fast",
            "options": {"predictor": "ancestral", "corrector": None, "num_inference_steps": 7},
            "calls_per_image": 7.0,
            "metrics": {"FD-classifier": 3.21, "KID": 0.011, "KID_std": 0.001},
        },
        {
            "label": "ode",
            "options": {"method": "ode", "rtol": 0.01},
            "calls_per_image": 24.5,
            "metrics": {"FD-classifier": 2.1, "KID": 0.009, "KID_std": 0.001},
        },
    ],
    "bits_per_dim": BITS,
}


def rows(card):
    lines = re.findall(r"^\|(.*)\|$", str(card), re.M)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_the_facts_are_the_pipelines_own():
    card = str(model_card(SDEPipeline(tiny_unet(), SubVPSDEScheduler(beta_end=0.03), data_min=0.0), "user/name"))
    assert "SubVPSDE(t_min=1e-05, t_max=1.0, beta_min=0.1, beta_max=30.0)" in card
    assert "[0, 1]" in card
    assert "1 x 8 x 8" in card
    assert f"{sum(p.numel() for p in tiny_unet().parameters()) / 1e6:.2f} million" in card


def test_calls_are_counted():
    recipes = [
        {"options": {"predictor": "reverse_diffusion", "corrector": "langevin", "correct_steps": 2}},
        {"options": {"predictor": "heun", "corrector": None, "probability_flow": True}},
    ]
    card = model_card(
        tiny_pipeline(), "user/name", {"recipes": [{**recipe, "num_inference_steps": 5} for recipe in recipes]}
    )
    assert [(row[1], row[2]) for row in rows(card) if row[1] == "5"] == [("5", "15"), ("5", "9")]


def test_measurements_reach_table_and_metadata():
    results = {
        **EVALUATION,
        "license": "mit",
        "dataset": {"id": "user/digits", "name": "Digits"},
        "metrics": [{"name": "FID, 50 images", "type": "fid", "value": 12.34567, "on": "4 calls"}],
    }
    card = model_card(tiny_pipeline(), "user/name", results)
    table = rows(card)
    assert ["`predictor='ancestral', corrector=None`", "7", "7", "3.21", "0.011 +- 0.001"] in table
    assert ["`method='ode', rtol=0.01`", "", "24.5", "2.1", "0.009 +- 0.001"] in table
    assert ["FID, 50 images", "12.35", "4 calls"] in table
    assert ["bits/dim", "2.5000 +- 0.0100"] == next(row for row in table if row[0] == "bits/dim")[:2]
    read = ModelCard(str(card)).data
    assert read.library_name == "diffusers"
    assert read.license == "mit"
    assert read.datasets == ["user/digits"]
    assert {"diffusers_sde", "sde"} <= set(read.tags)
    found = {(r.metric_name, r.metric_type): r.metric_value for r in read.eval_results}
    assert found["FID, 50 images", "fid"] == 12.34567
    assert found["bits/dim", "bits_per_dim"] == 2.5
    assert found["FD-classifier (ode, 24.5 calls, 500 samples)", "FD-classifier"] == 2.1
    assert len(found) == 6
    assert {r.dataset_type for r in read.eval_results} == {"user/digits"}


def test_the_example_is_a_sampler_that_exists():
    card = str(model_card(tiny_pipeline(), "user/name", EVALUATION))
    line = re.search(r"^pipe\.scheduler = .*$", card, re.M)[0]
    pipe = tiny_pipeline()
    exec(line, {"pipe": pipe})
    assert pipe.scheduler.config.predictor == "ancestral"


def test_only_models_of_ddpm_type_are_offered_to_stock_diffusers():
    def offered(pipe):
        return "DDPMPipeline" in str(model_card(pipe, "user/name"))

    assert offered(tiny_pipeline())
    assert not offered(tiny_pipeline("ve"))
    assert not offered(SDEPipeline(tiny_unet(), VPSDEScheduler(prediction_type="score")))
    assert not offered(SDEPipeline(tiny_unet(), VPSDEScheduler(), data_min=0.0))


def test_pictures_travel_with_the_card(tmp_path):
    picture = tmp_path / "grid.png"
    Image.new("L", (4, 4)).save(picture)
    folder = tmp_path / "model"
    folder.mkdir()
    add_card(folder, tiny_pipeline(), "user/name", {"pictures": {"Samples": str(picture)}})
    assert "![Samples](images/grid.png)" in (folder / "README.md").read_text()
    assert (folder / "images" / "grid.png").read_bytes() == picture.read_bytes()
    with pytest.raises(ValueError, match="no file"):
        add_card(folder, tiny_pipeline(), "user/name", {"pictures": {"Samples": "absent.png"}})


def test_pictures_are_pictures(tmp_path):
    """Results may come from somebody else: a card publishes no file of this machine that is no image."""
    folder = tmp_path / "model"
    folder.mkdir()
    secret, cut, bitmap = tmp_path / "passwd", tmp_path / "cut.png", tmp_path / "grid.bmp"
    secret.write_text("root:x:0:0")
    Image.new("L", (64, 64)).save(cut)
    cut.write_bytes(cut.read_bytes()[:40])
    Image.new("L", (4, 4)).save(bitmap)
    first, second = tmp_path / "a" / "grid.png", tmp_path / "b" / "grid.png"
    for path in (first, second):
        path.parent.mkdir()
        Image.new("L", (4, 4)).save(path)
    for pictures, message in (
        ([secret], "no image"),
        ([cut], "no image"),
        ([bitmap], "must be one of PNG, JPEG, GIF, WEBP, got BMP"),
        ([first, second], "file names must differ"),
    ):
        with pytest.raises(ValueError, match=message):
            results = {"pictures": {str(i): str(path) for i, path in enumerate(pictures)}}
            add_card(folder, tiny_pipeline(), "user/name", results)
        assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "results, message",
    [
        ({"pictures": ["a.png"]}, "pictures must be an object"),
        ({"recipes": {"options": {}}}, "recipes must be a list"),
        ({"recipes": [{"options": {}}]}, "recipes must have a num_inference_steps each"),
        ({"recipes": ["heun"]}, "each of recipes must be an object"),
        ({"metrics": [{"name": "FID", "type": "fid", "value": "x"}]}, "metrics must have a value each, got 'x'"),
        ({"metrics": "FID 3"}, "metrics must be a list"),
        ({"license": ["mit"]}, "license must be text"),
        ({"dataset": "digits"}, "dataset must be an object"),
        ({"recipes": [{"options": {"snr": "abc"}, "num_inference_steps": 2}]}, "no sampler has .*snr"),
        ({"recipes": [{"options": {"sn": 1}, "num_inference_steps": 2, "calls": 2}]}, "has no option sn"),
    ],
)
def test_results_of_another_form_are_named(results, message):
    with pytest.raises(ValueError, match=message):
        model_card(tiny_pipeline(), "user/name", results)


def test_what_a_card_shows_is_what_the_scheduler_takes():
    """Options of the call and of another scheduler's class are not among those of this pipeline's scheduler."""
    assert set(SAMPLER_OPTIONS) < set(CALL_OPTIONS)
    measured = EVALUATION["samplers"][0]
    samplers = [
        {**measured, "options": {"scheduler": "EulerDiscreteScheduler", "use_karras_sigmas": True}},
        {
            **measured,
            "options": {
                "guidance_scale": 2.0,
                "classifier_guidance_scale": 3.0,
                "predictor": None,
                "corrector": "langevin",
                "snr": 0.1,
            },
        },
    ]
    card = str(model_card(tiny_pipeline(), "user/name", {**EVALUATION, "samplers": samplers}))
    line = re.search(r"^pipe\.scheduler = .*$", card, re.M)[0]
    pipe = tiny_pipeline()
    exec(line, {"pipe": pipe})
    assert (pipe.scheduler.config.predictor, pipe.scheduler.config.corrector) == ("none", "langevin")
    assert "classifier_guidance_scale=3.0" in card and "scheduler='EulerDiscreteScheduler'" in card


@pytest.mark.parametrize(("samples", "images", "shown"), [(128, 1797, True), (127, 1797, False), (500, 127, False)])
def test_numbers_of_too_few_samples_stay_off_the_card(samples, images, shown):
    evaluation = {**EVALUATION, "num_samples": samples, "data": {**EVALUATION["data"], "images": images}}
    accurate = {**EVALUATION["samplers"][0]["metrics"], "class_accuracy": 0.5}
    evaluation["samplers"] = [{**EVALUATION["samplers"][0], "metrics": accurate}]
    card = model_card(tiny_pipeline(), "user/name", evaluation)
    types = {result.metric_type for result in card.data.eval_results}
    assert types == {"class_accuracy", "bits_per_dim", *(("FD-classifier", "KID") if shown else ())}
    assert ("3.21" in str(card)) == shown and ("too few for numbers" in str(card)) != shown


def test_a_misspelt_result_is_refused():
    with pytest.raises(ValueError, match="unknown keys licence; known are license"):
        model_card(tiny_pipeline(), "user/name", {"licence": "mit"})


def test_a_recipe_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="predictor"):
        model_card(
            tiny_pipeline(), "user/name", {"recipes": [{"options": {"predictor": "x"}, "num_inference_steps": 2}]}
        )


def test_a_card_needs_no_result_and_says_so():
    card = str(model_card(tiny_pipeline(), "user/name"))
    assert "## Measured" not in card
    assert "## Training" not in card
    assert "{{" not in card
    assert TEMPLATE.is_file()


# ---------------------------------------------------------------------- what the model draws itself


def pictures_of(folder):
    return {path.name: Image.open(path) for path in sorted((folder / "images").iterdir())}


@pytest.mark.parametrize("kind", ["vp", "ve", "classes", "inpaint"])
def test_a_card_shows_samples_and_how_they_form(kind, tmp_path):
    pipe = tiny_pipeline(kind)
    before = torch.get_rng_state()
    add_card(tmp_path, pipe, "user/name")
    card = (tmp_path / "README.md").read_text()
    assert "![Samples](images/samples.png)" in card and "![From noise to samples](images/trajectories.png)" in card
    pictures = pictures_of(tmp_path)
    assert {name: picture.size for name, picture in pictures.items()} == {
        "samples.png": (4 * 68, 4 * 68),
        "trajectories.png": (8 * 68, 4 * 68),
    }
    assert torch.equal(torch.get_rng_state(), before)
    if kind == "ve":  # the last state is the sample; at the first the data's contrast is kept, though sigma is 20
        sheet, states = (picture.convert("L") for picture in pictures.values())
        assert states.crop((7 * 68, 0, 8 * 68, 68)).tobytes() == sheet.crop((0, 0, 68, 68)).tobytes()
        first = torch.tensor(list(states.crop((2, 2, 66, 66)).resize((8, 8), 0).tobytes())) / 255
        assert 0.2 < float(first.std()) < 0.45  # (x_t/sigma + 1)/2 within 0 and 1 has 0.38
    again = tmp_path / "again"
    again.mkdir()
    add_card(again, pipe, "user/name")
    assert all((again / "images" / name).read_bytes() == (tmp_path / "images" / name).read_bytes() for name in pictures)


def test_drawing_leaves_the_pipeline_as_it_was(tmp_path):
    pipe = tiny_pipeline()
    pipe.scheduler.set_timesteps(7)
    scheduler, timesteps, bar = pipe.scheduler, pipe.scheduler.timesteps.clone(), dict(pipe._progress_bar_config)
    add_card(tmp_path, pipe, "user/name")
    assert pipe.scheduler is scheduler and torch.equal(scheduler.timesteps, timesteps)
    assert pipe._progress_bar_config == bar


def test_a_model_that_is_too_slow_or_fails_gets_fewer_pictures_or_none(tmp_path, monkeypatch, caplog):
    now = [0.0]
    pipe = tiny_pipeline("inpaint")
    pipe.unet.register_forward_hook(lambda module, args, output: now.__setitem__(0, now[0] + 0.5 * len(args[0])))
    monkeypatch.setattr(figures.time, "monotonic", lambda: now[0])
    for seconds, size in ((60.0, (2 * 68, 2 * 68)), (15.0, (68, 68)), (5.0, None)):  # 20 calls of 16, 4 and 1 images
        monkeypatch.setattr(figures, "SECONDS", seconds)
        folder = tmp_path / str(seconds)
        folder.mkdir()
        add_card(folder, pipe, "user/name")
        if size is None:
            assert not (folder / "images").exists() and "![" not in (folder / "README.md").read_text()
        else:
            assert pictures_of(folder)["samples.png"].size == size
    monkeypatch.setattr(type(pipe.unet), "forward", lambda *args, **options: 1 / 0)
    add_card(tmp_path, pipe, "user/name")
    assert "The card gets no pictures: ZeroDivisionError" in caplog.text
    assert "![" not in (tmp_path / "README.md").read_text()


def test_pictures_can_be_refused(tmp_path):
    add_card(tmp_path, tiny_pipeline(), "user/name", {"pictures": {}})
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_numbers_have_their_errors():
    """A share p of n samples has the error (p (1 - p)/n)^(1/2): 0.02 for 0.8 of 400, and about 1/n for all of them."""
    metrics = {"precision": 0.8, "recall": 1.0, "KID": 0.011, "KID_std": 0.001, "FD-classifier": 3.21}
    evaluation = {**EVALUATION, "num_samples": 400, "samplers": [{**EVALUATION["samplers"][0], "metrics": metrics}]}
    evaluation["baseline"] = {"label": "real images (test)", "metrics": {"FD-classifier": 0.33, "KID": 0.0}}
    card = model_card(tiny_pipeline(), "user/name", evaluation)
    assert "real images (test): FD-classifier 0.33." in str(card)
    row = next(row for row in rows(card) if "0.8 +- 0.02" in row)
    assert row[3:] == ["0.8 +- 0.02", "1 +- 0.002", "0.011 +- 0.001", "3.21"]


def test_a_card_says_what_the_model_cannot_do_and_where_pip_finds_the_package():
    card = str(model_card(tiny_pipeline(), "user/name"))
    assert "- It makes grey images of 8 x 8 pixels, as chance has them. It understands no text." in card
    assert "of the classes that it was trained on" in str(model_card(tiny_pipeline("classes"), "user/name"))
    name = re.search(r"`pip install (\S+)`", card)[1]
    assert name == ("git+https://github.com/diffusers-sde/diffusers-sde" if "dev" in __version__ else "diffusers-sde")


# ---------------------------------------------------------------------- the cards of this repository

CARDS = sorted((Path(__file__).resolve().parents[2] / "model_cards").glob("*-*.md"))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_card_of_this_repository_is_what_the_template_makes(path):
    text, template = path.read_text(encoding="utf-8"), TEMPLATE.read_text(encoding="utf-8")
    headings = re.findall(r"^## .+$", template, re.M)
    found = re.findall(r"^## .+$", text, re.M)
    assert found == [heading for heading in headings if heading in found or heading != "## Measured"]
    assert f"`pip install {PIP_NAME}`" in text and "+-" in text
    assert "It understands no text." in text
    assert ModelCard(text).data.model_name == path.stem
    for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text):
        assert (path.parent / picture).is_file()
        assert (path.parent / picture).stat().st_size < 100_000
