"""Uploads during training: they go out, they stop nothing, and they hold no secret."""

import json
import logging

import pytest
from accelerate.state import AcceleratorState, GradientState
from hub_models import use_hub
from loopback_hub import TOKEN, LoopbackHub

from diffusers_sde.images.loading import load_digits
from diffusers_sde.training import TrainingConfig, train


@pytest.fixture
def hub(monkeypatch):
    with LoopbackHub() as server:
        use_hub(monkeypatch, server, "hf_of_somebody_else")
        yield server
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def config(output_dir, **options):
    tiny = {"block_out_channels": (8, 16), "layers_per_block": 1, "train_batch_size": 8, "sample_every": 0}
    tiny |= {"checkpointing_steps": 2, "max_train_steps": 4, "logger": "none", "hub_token": TOKEN}
    return TrainingConfig(output_dir=str(output_dir), push_to_hub=True, **(tiny | options))


def test_checkpoints_and_the_end_are_pushed(hub, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    settings = config(tmp_path / "run")
    train(settings, load_digits().select(range(40)))
    assert hub.titles("user/run") == ["initial commit", "Step 2", "The trained pipeline"]
    files = hub.files("user/run")
    assert not [name for name in files if "checkpoint" in name or "training" in name]
    assert b"accelerate launch scripts/train.py --block_out_channels 8 16" in files["README.md"]
    local = (tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert files["unet/diffusion_pytorch_model.safetensors"] == local

    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for text in (*written, *files.values(), repr(settings).encode(), caplog.text.encode()):
        assert TOKEN.encode() not in text
    assert "hub_token" not in json.loads((tmp_path / "run" / "training_config.json").read_text())


def test_a_failed_upload_stops_nothing_and_says_how_to_repeat_it(hub, tmp_path, caplog):
    hub.failures += [("POST .*/commit/", 500)] * 2
    train(config(tmp_path / "run", hub_model_id="user/model"), load_digits().select(range(40)))
    assert (tmp_path / "run" / "model_index.json").is_file()
    assert caplog.text.count("The upload failed") == 2
    assert f"push_to_hub.py --model {tmp_path / 'run'} --hub_model_id user/model" in caplog.text
    assert len(hub.titles("user/model")) == 1


def test_a_wrong_token_is_found_before_training(hub, tmp_path):
    with pytest.raises(OSError, match="token is not valid"):
        train(config(tmp_path / "run", hub_token="hf_wrong"), load_digits().select(range(40)))
    assert not (tmp_path / "run").exists()


def test_options_of_the_hub_need_push_to_hub():
    with pytest.raises(ValueError, match="hub_model_id has no effect without push_to_hub"):
        TrainingConfig(hub_model_id="user/x")
