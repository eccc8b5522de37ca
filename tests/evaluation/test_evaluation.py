"""scripts/evaluate.py: samplers against data, one process and two, and what is written."""

import functools
import json
import os

import datasets
import numpy as np
import pytest
import torch
from hub_models import tiny_pipeline
from huggingface_hub import EvalResult, ModelCardData
from PIL import Image
from processes import side_by_side
from tiny_networks import tiny_unet
from tiny_parts import HAS_TRANSFORMERS

from diffusers_sde import ClassConditionalSDEPipeline, FlowSDEScheduler, SDEPipeline, TextSDEPipeline
from diffusers_sde.basics.options import parse_options
from diffusers_sde.evaluation import (
    EvaluationConfig,
    SamplingConfig,
    eval_results,
    evaluate,
    generate,
    launched_processes,
    markdown_table,
)
from diffusers_sde.evaluation.cli import evaluate_main

SAMPLERS = ("sde: num_inference_steps=3", "pc/0.1: num_inference_steps=3, corrector=langevin, snr=0.1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    unet = tiny_unet(num_class_embeds=2)
    folder = tmp_path_factory.mktemp("model")
    ClassConditionalSDEPipeline(unet, FlowSDEScheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes, dark and light, in a training and a test split."""
    folder = tmp_path_factory.mktemp("data") / "shades"
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    for split, n, seed in (("train", 80, 0), ("test", 40, 1)):
        pixels = np.random.default_rng(seed).integers(-40, 40, (n, 8, 8)) + np.tile([70, 180], n // 2)[:, None, None]
        images = [Image.fromarray(x.astype(np.uint8)) for x in pixels]
        rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * (n // 2)}, features=features)
        rows.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def options(model, data, output_dir, **more):
    given = {"num_samples": 10, "classifier_steps": 30, "sampler": SAMPLERS, "test_split": "test", "batch_size": 4}
    return {"model": model, "data_dir": data, "output_dir": str(output_dir)} | given | more


def close(a, b):
    """Whether two JSON values are the same but for the rounding of images to bytes."""
    if isinstance(a, dict):
        return set(a) == set(b) and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=2e-2, abs=2e-2) if isinstance(a, float) else a == b


def evaluate_and_generate(evaluation, generation, rank):
    """One of two processes."""
    assert launched_processes().num_processes == 2
    assert len(evaluate(EvaluationConfig(**evaluation))["samplers"]) == 2
    assert generate(SamplingConfig(**generation))["calls_per_image"] == 2


def test_one_process_and_two_give_the_same_numbers(model, data, tmp_path):
    likelihood = {"bpd": True, "num_images": 5, "rtol": 1e-3, "atol": 1e-3}
    classifier = str(tmp_path / "classifier.safetensors")
    one = evaluate(EvaluationConfig(**options(model, data, tmp_path / "one", classifier=classifier, **likelihood)))
    assert json.loads((tmp_path / "one" / "results.json").read_text()) == one
    assert (tmp_path / "one" / "results.md").read_text() == markdown_table(one) + "\n"
    for place in ("samples", "nearest"):
        assert sorted(p.name for p in (tmp_path / "one" / place).iterdir()) == ["pc_0.1.png", "sde.png"]
    assert Image.open(tmp_path / "one" / "samples" / "sde.png").size == (4 * 80, 3 * 80)  # 10 samples make rows of 4

    two = options(model, data, tmp_path / "two", classifier=classifier, batch_size=3, **likelihood)
    generation = {"model": model, "output_dir": str(tmp_path / "images"), "num_images": 5, "num_inference_steps": 2}
    assert side_by_side(evaluate_and_generate, two, generation, timeout=240) == [0, 0]
    assert close(json.loads((tmp_path / "two" / "results.json").read_text()), one)
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == [f"{i:06d}.png" for i in range(5)] + [
        "samples.json"
    ]


def test_twice_gives_the_same_numbers_and_they_mean_something(model, data, tmp_path):
    config = EvaluationConfig(**options(model, data, tmp_path, num_samples=40))
    report = evaluate(config)
    assert evaluate(config) == report  # the second time with the classifier of the first
    assert [entry["calls_per_image"] for entry in report["samplers"]] == [3.0, 6.0]
    assert report["features"]["name"] == "classifier" and report["features"]["accuracy"] == 1.0
    assert report["data"] == {
        "name": "shades",
        "split": "train",
        "images": 80,
        "test_split": "test",
        "test_images": 40,
    }
    real, samples = report["baseline"], report["samplers"][0]
    assert real["metrics"]["class_accuracy"] == 1.0 and real["metrics"]["precision"] > 0.6
    assert samples["metrics"]["precision"] < 0.2  # of an untrained network
    assert 10 * real["metrics"]["FD-classifier"] < samples["metrics"]["FD-classifier"]
    assert real["nearest"]["share_below"] < 0.1 and samples["nearest"]["share_below"] == 0.0
    assert real["nearest"]["median"] < samples["nearest"]["median"]


def test_copies_of_training_images_are_seen(model, data):
    """The training images as "test" images have no distance, without any each image has that to the others."""
    config = {"output_dir": None, "features": "pixels", "sampler": SAMPLERS[:1]}
    copies = evaluate(EvaluationConfig(**(options(model, data, "") | config | {"test_split": "train"})))
    assert copies["baseline"]["nearest"]["median"] == 0.0
    alone = evaluate(EvaluationConfig(**(options(model, data, "") | config | {"test_split": None})))
    assert alone["baseline"]["metrics"] is None and alone["baseline"]["nearest"]["median"] > 0.01
    assert "FD-pixels" in alone["samplers"][0]["metrics"] and "IS-pixels" not in alone["samplers"][0]["metrics"]


def test_results_become_a_model_card(model, data, tmp_path, caplog):
    report = evaluate(EvaluationConfig(**options(model, data, tmp_path, bpd=True, num_images=3, rtol=1e-2, atol=1e-2)))
    # 10 samples are too few for the 128 dimensions of the classifier's features.
    types = {result.metric_type for result in eval_results(report)}
    assert types == {"class_accuracy", "bits_per_dim"}
    warning = "10 images are too few for 128 features: take 256 or more"
    assert sum(warning in record.getMessage() for record in caplog.records) == 1
    assert warning in markdown_table(report) and "FD-classifier" in markdown_table(report)
    report["features"]["dimensions"] = 5
    assert "too few" not in markdown_table(report)
    results = eval_results(report)
    assert all(isinstance(result, EvalResult) for result in results)
    names = [result.metric_name for result in results]
    assert "FD-classifier (pc/0.1, 6 calls, 10 samples)" in names and len(set(names)) == len(names)
    values = {result.metric_name: result.metric_value for result in results}
    assert values["bits/dim (3 images, uniform dequantisation)"] == report["bits_per_dim"]["mean"]
    assert report["bits_per_dim"]["given_class"] is True and report["bits_per_dim"]["split"] == "test"
    card = ModelCardData(model_name="shades", eval_results=results).to_dict()
    assert {m["type"] for r in card["model-index"][0]["results"] for m in r["metrics"]} >= {"FD-classifier", "recall"}


def test_held_out_digits_can_be_evaluated(tmp_path):
    """Slices that training knows, such as the digits that it left out, are known here too."""
    ClassConditionalSDEPipeline(tiny_unet(num_class_embeds=10), FlowSDEScheduler()).save_pretrained(tmp_path / "model")
    digits = {"dataset_name": "digits", "dataset_split": "train[:1700]", "test_split": "train[1700:]"}
    settings = {"num_samples": 5, "features": "pixels", "num_reference": 20, "sampler": SAMPLERS[:1]}
    report = evaluate(EvaluationConfig(model=str(tmp_path / "model"), **digits, **settings))
    assert report["data"] == {
        "name": "digits",
        "split": "train[:1700]",
        "images": 20,
        "test_split": "train[1700:]",
        "test_images": 97,
    }


def test_the_picture_is_written_whole(data, tmp_path, monkeypatch):
    import diffusers_sde.evaluation.codes as codes

    path, own = tmp_path / "figure.jpg", tmp_path / "model"
    SDEPipeline(tiny_unet(), FlowSDEScheduler()).save_pretrained(own)
    config = EvaluationConfig(model=str(own), data_dir=data, figure=str(path), rtol=1e-2, atol=1e-2)
    written = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (written.append((str(a), str(b))), replace(a, b)))
    evaluate(config)
    assert [b for a, b in written if a != b] == [str(path)] and Image.open(path).format == "JPEG"
    before = path.read_bytes()

    class Cut:
        def save(self, file, format):
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(codes, "tile", lambda pixels: Cut())
    with pytest.raises(OSError):
        evaluate(config)
    assert path.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {"figure.jpg", "model"}


def test_a_folder_in_use_is_left_alone(model, data, tmp_path):
    from diffusers_sde.basics.files import FolderInUse, lock_folder

    with lock_folder(tmp_path), pytest.raises(FolderInUse, match="is in use by process"):
        evaluate(EvaluationConfig(**options(model, data, tmp_path)))


def test_options_of_the_command_line():
    config = parse_options(
        EvaluationConfig, ["--model", "m", "--data", "d", "--sampler", "a: snr=1", "--sampler", "b", "c"]
    )
    assert config.sampler == ("a: snr=1", "b", "c") and config.data_dir == "d" and config.samples == 5000
    assert parse_options(EvaluationConfig, ["--model", "m", "--bpd"]).samples == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "fast: predictr=heun"], "did you mean 'predictor'"),
        (["--sampler", "a: snr=1", "a: snr=2"], "'a' stands twice"),
        (
            ["--test_split", "validation", "--dataset_name", "digits"],
            "must be train or a slice of it",
        ),
        (["--rtol", "0"], "rtol must be a finite number greater than 0, got 0.0"),
        (["--atol", "nan"], "atol must be a finite number greater than 0, got nan"),
        (["--importance_samples", "0"], "importance_samples must be an integer at least 1, got 0"),
        (["--num_probes", "0"], "num_probes must be an integer at least 1, got 0"),
        (["--t_min", "-1"], "t_min must be a finite number greater than 0"),
        (["--seed", str(2**70)], "seed must be an integer at least 0 and at most"),
        (["--figure", "picture"], "figure must end in the suffix of a picture"),
        (["--data_dir", "EMPTY"], "holds no images"),
        (["--output_dir", "FILE"], "FILE"),
        (["--num_samples", "-1"], "num_samples"),
        (["--features", "pixels", "--classifier", "x"], "classifier needs features"),
        (["--num_samples", "3"], "images must be more than 4"),
    ],
)
def test_mistakes_end_in_one_line(model, tmp_path, capsys, arguments, message):
    (tmp_path / "FILE").touch()
    (tmp_path / "EMPTY").mkdir()
    arguments = [str(tmp_path / word) if word in ("FILE", "EMPTY") else word for word in arguments]
    settings = ["--num_samples", "5", "--classifier_steps", "1", "--num_reference", "20"]
    with pytest.raises(SystemExit) as stopped:
        evaluate_main(["--model", model, *settings, *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "evaluate.py: error:" in error.splitlines()[-1]


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="captions are embedded by transformers")
def test_samples_are_asked_for_the_captions_of_the_data(data, tmp_path, monkeypatch):
    """In their proportion; the class of a sample is that of the image whose caption it has.

    A pipeline that draws dark images of "dark" and light ones of "light" has the accuracy of the classifier, and one
    that does the contrary has what is left to 1.
    """
    tiny_pipeline("pixart").save_pretrained(tmp_path / "model")
    asked, shades = [], {"dark": 70.0, "light": 180.0}
    call = TextSDEPipeline.__call__

    @functools.wraps(call)
    def drawn(self, prompt, **arguments):
        asked.extend(prompt)
        noise = torch.randint(-40, 40, (len(prompt), 1, 8, 8), generator=torch.Generator().manual_seed(len(asked)))
        return ((torch.tensor([shades[each] for each in prompt])[:, None, None, None] + noise) / 255.0,)

    monkeypatch.setattr(TextSDEPipeline, "__call__", drawn)
    more = {"sampler": None, "test_split": None, "num_samples": 20, "caption_column": "label"}
    config = EvaluationConfig(**options(str(tmp_path / "model"), data, tmp_path / "out", **more))
    report = evaluate(config)
    places = np.linspace(0, 79, 20).round().astype(int)
    assert asked == ["dark" if place % 2 == 0 else "light" for place in places]
    right = report["samplers"][0]["metrics"]["class_accuracy"]
    assert right > 0.9 and report["data"]["caption_column"] == "label"
    shades.update(dark=180.0, light=70.0)
    wrong = evaluate(config)["samplers"][0]["metrics"]["class_accuracy"]
    assert wrong < 0.1
    with pytest.raises(ValueError, match="caption_column must be one of image, label, got 'text'"):
        evaluate(EvaluationConfig(**options(str(tmp_path / "model"), data, tmp_path / "out", caption_column="text")))
