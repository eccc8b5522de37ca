"""Model cards say what is true of the pipeline and of the measurements, in metadata that the Hub accepts."""

import re

import pytest
from hub_models import tiny_pipeline
from huggingface_hub import ModelCard
from tiny_networks import tiny_unet

from diffusers_sde import SDEPipeline, SubVPSDEScheduler, VPSDEScheduler
from diffusers_sde.hub.cards import TEMPLATE, add_card, model_card

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
    assert ["`predictor='ancestral', corrector=None`", "7", "7", "3.21", "0.011"] in table
    assert ["`method='ode', rtol=0.01`", "", "24.5", "2.1", "0.009"] in table
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
    picture.write_bytes(b"png")
    folder = tmp_path / "model"
    folder.mkdir()
    add_card(folder, tiny_pipeline(), "user/name", {"pictures": {"Samples": str(picture)}})
    assert "![Samples](images/grid.png)" in (folder / "README.md").read_text()
    assert (folder / "images" / "grid.png").read_bytes() == b"png"
    with pytest.raises(ValueError, match="no file"):
        add_card(folder, tiny_pipeline(), "user/name", {"pictures": {"Samples": "absent.png"}})


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
