"""A resumed run is the run that was asked for: what differs counts and is logged, or is refused by name."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_sde.images.loading import load_digits
from diffusers_sde.training import Trainer, TrainingConfig
from diffusers_sde.training.checkpoints import _state_fingerprint

TINY = {
    "block_out_channels": (4, 4),
    "layers_per_block": 1,
    "train_batch_size": 4,
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "sample_every": 0,
    "logger": "none",
    "mixed_precision": "no",
}


@pytest.fixture(scope="module")
def digits():
    return load_digits().select(range(20))


def trainer(output_dir, digits, **options):
    return Trainer(TrainingConfig(output_dir=str(output_dir), **(TINY | options)), digits)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("trained")
    trainer(folder, digits).run()
    return folder


@pytest.fixture
def resumable(trained, tmp_path):
    """A copy of a run, to be continued from step 2."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    return tmp_path / "run"


OPTIMISER = {
    "learning_rate": 0.1,
    "adam_beta1": 0.5,
    "adam_beta2": 0.6,
    "adam_weight_decay": 0.25,
    "adam_epsilon": 0.5,
}


@pytest.mark.parametrize("name", OPTIMISER)
def test_options_of_the_optimiser_count_from_the_checkpoint_on(resumable, digits, caplog, name):
    """The state of Adam is the checkpoint's, its constants and the course of the rate are this run's."""
    options = {"resume_from_checkpoint": "latest", "lr_scheduler": "constant"}
    run = trainer(resumable, digits, **options, **{name: OPTIMISER[name]})
    assert f"{name} {getattr(TrainingConfig(), name)!r} -> {OPTIMISER[name]!r}" in caplog.text
    used, step = [], run._loop

    def loop(stop):
        used.append({k: v for k, v in run.optimizer.param_groups[0].items() if k != "params"})
        moments = run.optimizer.optimizer.state_dict()["state"][0]
        assert float(moments["step"]) == 2.0
        step(stop)
        used.append(run.optimizer.param_groups[0]["lr"])

    run._loop = loop
    run.run()
    wanted = {name: getattr(TrainingConfig(), name) for name in OPTIMISER} | {name: OPTIMISER[name]}
    assert used[0]["lr"] == used[0]["initial_lr"] == used[1] == wanted["learning_rate"]
    assert used[0]["betas"] == (wanted["adam_beta1"], wanted["adam_beta2"])
    assert (used[0]["weight_decay"], used[0]["eps"]) == (wanted["adam_weight_decay"], wanted["adam_epsilon"])
    assert json.loads((resumable / "training_config.json").read_text())[name] == OPTIMISER[name]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"random_flip": True}, "random_flip False -> True"),
        ({"dropout": 0.5}, "dropout 0.0 -> 0.5"),
        ({"stratified_times": False}, "stratified_times True -> False"),
        ({"train_batch_size": 2}, "train_batch_size 4 -> 2"),
        ({"max_grad_norm": 3.0}, "max_grad_norm 1.0 -> 3.0"),
        ({"ema_power": 0.5}, "ema_power 0.75 -> 0.5"),
        ({"max_train_steps": 9}, "max_train_steps 4 -> 9"),
        ({"sampling_eps": 0.5}, "sampling_eps None -> 0.5"),
        ({"lr_warmup_steps": 1}, "lr_warmup_steps None -> 1"),
    ],
)
def test_other_options_that_count_are_logged(resumable, digits, caplog, options, words):
    trainer(resumable, digits, resume_from_checkpoint="latest", **options)
    assert words in caplog.text


def test_the_same_options_are_resumed_without_a_word(resumable, digits, caplog):
    trainer(resumable, digits, resume_from_checkpoint="latest")
    assert not caplog.records


REFUSED = {
    "attention_resolutions": {"attention_resolutions": (4,)},
    "time_embedding_type": {
        "time_embedding_type": "fourier",
        "prediction_type": "score",
        "time_conditioning": "sigma",
    },
    "layers_per_block": {"layers_per_block": 2},
    "train_eps": {"train_eps": 1e-3},
    "prediction_type": {"prediction_type": "v_prediction"},
    "num_train_timesteps": {"num_train_timesteps": 500},
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_network_or_loss_is_refused_before_anything_is_written(resumable, digits, name):
    before = {path: path.read_bytes() for path in resumable.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="resume_from_checkpoint: the checkpoint was trained with "):
        trainer(resumable, digits, resume_from_checkpoint="latest", **REFUSED[name])
    assert {path: path.read_bytes() for path in resumable.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ({"weighting": "min_snr"}, {"weighting": "min_snr", "min_snr_gamma": 1.0}, "min_snr_gamma"),
        ({"time_sampling": "log_normal"}, {"time_sampling": "log_normal", "log_normal_mean": 0.0}, "log_normal_mean"),
        ({"time_sampling": "log_normal"}, {"time_sampling": "log_normal", "log_normal_std": 1.0}, "log_normal_std"),
    ],
)
def test_constants_of_the_loss_are_part_of_it(tmp_path, digits, first, second, name):
    trainer(tmp_path, digits, max_train_steps=2, **first).run()
    with pytest.raises(ValueError, match=f"trained with {name}="):
        trainer(tmp_path, digits, resume_from_checkpoint="latest", **second)
    trainer(tmp_path, digits, resume_from_checkpoint="latest", min_snr_gamma=5.0, **first)


def images(seed, classes=(0, 1) * 10):
    draw = np.random.default_rng(seed)
    pictures = [Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in classes]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"image": pictures, "label": list(classes)}, features=features)


def test_other_images_of_the_same_number_and_size_are_refused(tmp_path):
    trainer(tmp_path, images(0), max_train_steps=2).run()
    with pytest.raises(ValueError, match="trained on other images or classes than those of this run"):
        trainer(tmp_path, images(1), resume_from_checkpoint="latest")
    # Classes that the network is not told do not matter.
    assert trainer(tmp_path, images(0, (1, 0) * 10), resume_from_checkpoint="latest").step == 2


def test_other_classes_of_the_same_images_are_refused_where_they_count(tmp_path):
    trainer(tmp_path, images(0), max_train_steps=2, class_conditional=True).run()
    options = {"class_conditional": True, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match="other images or classes"):
        trainer(tmp_path, images(0, (1, 0) * 10), **options)
    assert trainer(tmp_path, images(0), **options).step == 2


def as_an_earlier_version(checkpoint, *names):
    """Let a checkpoint look as if these had not been recorded yet."""
    path = checkpoint / "training_state.json"
    state = json.loads(path.read_text())
    for name in names:
        del state["identity"][name]
    del state["options"], state["files"]["training_state.json"]
    path.write_text(json.dumps(state))


def test_checkpoints_of_earlier_versions_go_on_with_a_warning(resumable, digits, trained, caplog):
    as_an_earlier_version(resumable / "checkpoint-2", "data", "architecture", "train_eps")
    run = trainer(resumable, digits, resume_from_checkpoint="latest")
    assert "did not record architecture, data, train_eps" in caplog.text
    assert "does not say which options" in caplog.text
    weights = [p.detach() for p in run.run().unet.parameters()]
    from diffusers_sde import SDEPipeline

    whole = SDEPipeline.from_pretrained(trained).unet
    assert all(torch.equal(a, b) for a, b in zip(weights, whole.parameters(), strict=True))


def test_a_network_is_no_classifier(resumable, digits, tmp_path):
    from diffusers_sde.training.classifier import ClassifierTrainer
    from diffusers_sde.training.configuration import ClassifierTrainingConfig

    options = {name: value for name, value in TINY.items() if name != "sample_every"}
    config = ClassifierTrainingConfig(
        output_dir=str(tmp_path / "classifier"), resume_from_checkpoint=str(resumable / "checkpoint-2"), **options
    )
    with pytest.raises(ValueError, match="the checkpoint was trained with class_conditional=False, this run has True"):
        ClassifierTrainer(config, digits)


def test_weights_that_do_not_fit_are_refused_even_if_no_record_says_so(resumable, digits):
    as_an_earlier_version(resumable / "checkpoint-2", "architecture")
    with pytest.raises(ValueError, match="is of another network than this run's: its .*attentions.* has shape None"):
        trainer(resumable, digits, resume_from_checkpoint="latest", attention_resolutions=(4,))


def test_the_checksum_of_a_state_covers_the_whole_state():
    state = {"step": 1, "nested": {"b": [1.5, None], "a": "x"}, "files": {"x": [1, 2], "training_state.json": [0, 0]}}
    checksum = _state_fingerprint(state)
    assert checksum == _state_fingerprint(json.loads(json.dumps(state)))
    for change in ({"step": 2}, {"nested": {"b": [1.25, None], "a": "x"}}, {"files": {}}):
        assert _state_fingerprint(state | change) != checksum
    assert _state_fingerprint(state | {"files": {"x": [1, 2]}}) == checksum
