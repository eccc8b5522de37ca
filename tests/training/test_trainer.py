"""The training loop: it learns, it resumes exactly, and its layout does not change what it computes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image

from diffusers_sde import FlowSDEScheduler, SDEPipeline, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.images.loading import load_digits
from diffusers_sde.networks.parametrizations import PREDICTION_TYPES
from diffusers_sde.training import Trainer, TrainingConfig, train
from diffusers_sde.training.checkpoints import UNFINISHED, list_checkpoints

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
TINY = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "train_batch_size": 8,
    "sample_every": 0,
    "checkpointing_steps": 0,
    "num_inference_steps": 2,
    "mixed_precision": "no",
    "num_sample_images": 2,
    "logger": "none",
}


@pytest.fixture(scope="module")
def digits():
    return load_digits().select(range(40))


def tiny(output_dir, **options):
    return TrainingConfig(output_dir=str(output_dir), **(TINY | options))


def weights(pipeline):
    return torch.cat([p.detach().flatten() for p in pipeline.unet.parameters()])


def run_and_record_losses(config, dataset=None):
    trainer, losses = Trainer(config, dataset), []
    original = trainer.loss

    def recording(batch):
        loss = original(batch)
        losses.append(float(loss.detach().mean()))
        return loss

    trainer.loss = recording
    return trainer.run(), losses


def test_the_loss_falls(tmp_path):
    config = tiny(
        tmp_path, block_out_channels=(16, 32), train_batch_size=32, max_train_steps=80, learning_rate=3e-3, seed=1
    )
    _, losses = run_and_record_losses(config)
    # Predicting nothing costs 1; 0.15 was measured.
    assert np.mean(losses[:3]) > 0.8
    assert np.mean(losses[-10:]) < 0.25


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("sde", ["ve", "vp", "sub_vp", "flow"])
def test_every_sde_and_prediction_type_trains(tmp_path, digits, sde, prediction_type, discrete):
    config = tiny(tmp_path, sde=sde, prediction_type=prediction_type, discrete=discrete, max_train_steps=2)
    if (sde, discrete) == ("flow", True) and prediction_type in ("epsilon", "score"):
        with pytest.raises(ValueError, match="v_prediction, flow_prediction"):
            Trainer(config, digits)
        return
    pipeline, losses = run_and_record_losses(config, digits)
    assert np.isfinite(losses).all()
    assert torch.isfinite(weights(pipeline)).all()
    assert pipeline.scheduler.config.prediction_type == prediction_type


@pytest.mark.parametrize(
    ("sde", "scheduler", "expected"),
    [
        ("ve", VESDEScheduler, {"prediction_type": "edm", "time_conditioning": "continuous"}),
        ("vp", VPSDEScheduler, {"prediction_type": "epsilon", "time_conditioning": "continuous", "continuous": True}),
        ("sub_vp", SubVPSDEScheduler, {"prediction_type": "epsilon", "time_conditioning": "continuous"}),
        ("flow", FlowSDEScheduler, {"prediction_type": "flow_prediction", "time_conditioning": "continuous"}),
    ],
)
def test_defaults_of_each_sde(tmp_path, digits, sde, scheduler, expected):
    trainer = Trainer(tiny(tmp_path, sde=sde, max_train_steps=1), digits)
    assert type(trainer.scheduler) is scheduler
    assert {name: trainer.scheduler.config[name] for name in expected} == expected
    assert trainer.sde.t_min == 1e-5
    assert trainer.scheduler.config.sampling_eps == scheduler().config.sampling_eps
    assert trainer.scheduler.config.bound_above_sigma == 1.0
    assert trainer.scheduler.config.data_range == [-1.0, 1.0]
    images = torch.stack([torch.tensor(np.asarray(row["image"])) for row in digits]).flatten(1).double() / 127.5 - 1
    if sde == "ve":
        assert trainer.scheduler.config.sigma_max == pytest.approx(float(torch.cdist(images, images).max()), rel=5e-3)
        assert trainer.scheduler.config.sigma_data == pytest.approx(float(images.std()), rel=5e-3)


def test_discrete_vp_trains_on_the_ddpm_table(tmp_path, digits):
    trainer = Trainer(tiny(tmp_path, discrete=True, beta_schedule="squaredcos_cap_v2", max_train_steps=1), digits)
    fed = []
    trainer._prepare()
    trainer.model = lambda x, timestep: (fed.append(timestep), x)[1]
    batch = {"images": torch.zeros(200, 1, 8, 8, dtype=torch.uint8), "noise": torch.zeros(200, 1, 8, 8)}
    trainer.loss(batch | {"u": torch.linspace(0, 0.9999, 200, dtype=torch.float64)})
    (timesteps,) = fed
    assert timesteps.dtype == torch.float32
    torch.testing.assert_close(timesteps, timesteps.round(), atol=1e-3, rtol=0)
    assert timesteps.min().round() == 0 and timesteps.max().round() == 999


def test_the_network_is_fed_float_times_times_n(tmp_path, digits):
    trainer = Trainer(tiny(tmp_path, max_train_steps=1), digits)
    trainer._prepare()
    seen = {}
    trainer.model = lambda x, timestep: (seen.update(x=x, timestep=timestep), x)[1]
    noise = torch.randn(3, 1, 8, 8)
    u = torch.tensor([0.0, 0.5, 0.75], dtype=torch.float64)
    trainer.loss({"images": torch.full((3, 1, 8, 8), 255, dtype=torch.uint8), "noise": noise, "u": u})
    t = 1 - u * (1 - 1e-5)
    torch.testing.assert_close(seen["timestep"], (1000 * t).float())
    # VP of the paper: white is +1, x_t = sqrt(a) + sqrt(1 - a) noise with a = exp(-0.1 t - 9.95 t^2).
    a = torch.exp(-0.1 * t - 0.5 * 19.9 * t**2).float().reshape(3, 1, 1, 1)
    torch.testing.assert_close(seen["x"], a.sqrt() + (1 - a).sqrt() * noise, rtol=1e-5, atol=1e-5)


RESUME = {
    "dropout": 0.2,
    "random_flip": True,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 8,
    "checkpointing_steps": 3,
}


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, digits):
    whole = train(tiny(tmp_path / "whole", **RESUME), digits)
    # Interrupted after step 5: two steps behind its only checkpoint. Sample grids, drawn here only, change nothing.
    interrupted = Trainer(tiny(tmp_path / "resumed", **RESUME, sample_every=2), digits)
    loss, calls = interrupted.loss, iter(range(10))

    def power_cut(batch):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return loss(batch)

    interrupted.loss = power_cut
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    assert [path.name for path in list_checkpoints(tmp_path / "resumed")] == ["checkpoint-3"]
    torch.manual_seed(12345)
    resumed = Trainer(tiny(tmp_path / "resumed", **RESUME, resume_from_checkpoint="latest"), digits)
    assert resumed.step == 3
    assert torch.equal(weights(resumed.run()), weights(whole))
    for file in ("model.safetensors", "ema.safetensors"):
        a, b = (tmp_path / run / "checkpoint-8" / file for run in ("whole", "resumed"))
        assert a.read_bytes() == b.read_bytes(), file
    a, b = (
        torch.load(tmp_path / run / "checkpoint-8" / "optimizer.bin", weights_only=True)["state"]
        for run in ("whole", "resumed")
    )
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])


def test_another_seed_is_another_run(tmp_path, digits):
    a, b = (train(tiny(tmp_path / str(seed), seed=seed, max_train_steps=2), digits) for seed in (0, 1))
    assert not torch.equal(weights(a), weights(b))


def test_accumulated_gradients_equal_the_large_batch(tmp_path, digits):
    large = train(tiny(tmp_path / "large", train_batch_size=8, max_train_steps=4), digits)
    small = train(
        tiny(tmp_path / "small", train_batch_size=2, gradient_accumulation_steps=4, max_train_steps=4), digits
    )
    other = train(tiny(tmp_path / "other", train_batch_size=4, max_train_steps=4), digits)
    difference, scale = (weights(large) - weights(small)).norm(), (weights(large) - weights(other)).norm()
    assert difference < 1e-3 * scale


def test_two_processes_train_like_one(tmp_path):
    options = {
        "dataset_name": "digits",
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "dropout": 0.0,
        "lr_warmup_steps": 0,
    }
    one = train(tiny(tmp_path / "one", train_batch_size=8, **options))
    other = train(tiny(tmp_path / "other", train_batch_size=4, **options))
    arguments = "--block_out_channels 8 16 --layers_per_block 1 --train_batch_size 4 --max_train_steps 4 "
    arguments += "--checkpointing_steps 2 --lr_warmup_steps 0 --sample_every 4 --num_inference_steps 2 "
    arguments += "--mixed_precision no"
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        + ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        + [str(SCRIPT), "--output_dir", str(tmp_path / "two"), *arguments.split()],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2 process(es)" in done.stderr
    two = SDEPipeline.from_pretrained(tmp_path / "two")
    difference, scale = (weights(one) - weights(two)).norm(), (weights(one) - weights(other)).norm()
    assert difference < 1e-3 * scale
    # The learning rate was counted in optimiser steps, not once per process.
    state = json.loads((tmp_path / "two" / "checkpoint-4" / "training_state.json").read_text())
    assert state["lr_scheduler"]["last_epoch"] == 4
    assert (tmp_path / "two" / "checkpoint-4" / "random_states_1.pkl").is_file()
    assert (tmp_path / "two" / "samples" / "step-0000004.png").is_file()


def test_what_a_run_leaves(tmp_path, digits):
    config = tiny(
        tmp_path,
        max_train_steps=4,
        checkpointing_steps=1,
        checkpoints_total_limit=2,
        sample_every=2,
        num_sample_images=3,
        logger="tensorboard",
    )
    pipeline = train(config, digits)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    assert not (tmp_path / UNFINISHED).exists()
    grids = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert grids == ["step-0000002.png", "step-0000004.png"]
    assert Image.open(tmp_path / "samples" / grids[0]).size == (160, 160)  # 2 x 2 cells of 80 pixels, framed
    assert any("tfevents" in path.name for path in (tmp_path / "logs").rglob("*"))
    assert json.loads((tmp_path / "training_config.json").read_text())["max_train_steps"] == 4
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is SDEPipeline and type(loaded.scheduler) is VPSDEScheduler
    assert torch.equal(weights(loaded), weights(pipeline))
    a, b = (p(2, 2, generator=torch.Generator().manual_seed(0), output_type="pt").images for p in (pipeline, loaded))
    assert torch.equal(a, b) and a.shape == (2, 1, 8, 8)


def test_the_pipeline_has_the_averaged_weights(tmp_path, digits):
    decay = 0.9
    trajectory = [
        weights(train(tiny(tmp_path / str(n), use_ema=False, max_train_steps=n, lr_scheduler="constant"), digits))
        for n in (1, 2, 3)
    ]
    # inv_gamma so small that the warm-up is over at once; the first update copies (decay 0).
    averaged = train(
        tiny(tmp_path / "ema", ema_max_decay=decay, ema_inv_gamma=1e-9, max_train_steps=3, lr_scheduler="constant"),
        digits,
    )
    expected = trajectory[0]
    for current in trajectory[1:]:
        expected = decay * expected + (1 - decay) * current
    torch.testing.assert_close(weights(averaged), expected, rtol=1e-6, atol=1e-6)


def test_epochs_count_images(tmp_path, digits):
    trainer = Trainer(tiny(tmp_path, num_epochs=3, gradient_accumulation_steps=2, save_images_epochs=1), digits)
    assert trainer.max_steps == 8  # 120 images in steps of 16
    assert trainer.sample_every == 2


def test_bfloat16_keeps_noise_and_times_in_float32(tmp_path, digits):
    trainer = Trainer(tiny(tmp_path, mixed_precision="bf16", max_train_steps=2), digits)
    dtypes = []
    trainer.network.register_forward_pre_hook(lambda module, inputs: dtypes.extend(v.dtype for v in inputs))
    inner = []
    trainer.network.conv_in.register_forward_hook(lambda module, inputs, output: inner.append(output.dtype))
    pipeline = trainer.run()
    assert set(dtypes) == {torch.float32}
    assert set(inner) == {torch.bfloat16}
    assert weights(pipeline).dtype == torch.float32


def test_the_papers_ncsnpp_embedding(tmp_path, digits):
    config = tiny(
        tmp_path,
        sde="ve",
        prediction_type="score",
        time_conditioning="sigma",
        time_embedding_type="fourier",
        max_train_steps=2,
    )
    assert torch.isfinite(weights(train(config, digits))).all()


def test_a_diverging_run_stops_and_keeps_its_checkpoint(tmp_path, digits):
    trainer = Trainer(
        tiny(tmp_path, max_train_steps=20, checkpointing_steps=1, checkpoints_total_limit=1, logging_steps=1), digits
    )
    loss, calls = trainer.loss, iter(range(100))
    trainer.loss = lambda batch: loss(batch) * (float("nan") if next(calls) == 3 else 1.0)
    with pytest.raises(RuntimeError, match="loss is nan at step 4"):
        trainer.run()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]


# ------------------------------------------------------------------ refused before work is lost


def test_an_earlier_run_is_not_overwritten(tmp_path, digits):
    config = tiny(tmp_path, max_train_steps=1, checkpointing_steps=1)
    train(config, digits)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="output_dir .* already holds a run.*resume_from_checkpoint='latest'"):
        Trainer(config, digits)
    train(tiny(tmp_path, max_train_steps=2, overwrite_output_dir=True), digits)
    assert list_checkpoints(tmp_path) == []
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resume_needs_a_checkpoint(tmp_path, digits):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(ValueError, match="resume_from_checkpoint.*is not a checkpoint"):
            Trainer(tiny(tmp_path / "o", resume_from_checkpoint=str(path)), digits)
    # 'latest' in a new folder starts a new run, so that one command line serves for both.
    assert Trainer(tiny(tmp_path / "o", resume_from_checkpoint="latest"), digits).step == 0
    assert not (tmp_path / "o").exists()


def test_latest_starts_again_where_nothing_was_saved_yet(tmp_path, digits):
    config = tiny(tmp_path, max_train_steps=1, resume_from_checkpoint="latest")
    (tmp_path / "samples").mkdir()
    train(config, digits)
    # Now there is a trained pipeline and no checkpoint to continue it from.
    with pytest.raises(ValueError, match="output_dir .* already holds a run"):
        Trainer(config, digits)


def test_resume_refuses_another_kind_of_run(tmp_path, digits):
    train(tiny(tmp_path, max_train_steps=1, checkpointing_steps=1), digits)
    for options, name in (
        ({"sde": "sub_vp"}, "sde"),
        ({"prediction_type": "v_prediction"}, "prediction_type"),
        ({"block_out_channels": (8, 8)}, "block_out_channels"),
        ({"use_ema": False}, "use_ema"),
    ):
        with pytest.raises(ValueError, match=f"resume_from_checkpoint.*{name}="):
            Trainer(tiny(tmp_path, resume_from_checkpoint="latest", **options), digits)


def test_a_half_written_checkpoint_is_ignored(tmp_path, digits):
    train(tiny(tmp_path, max_train_steps=2, checkpointing_steps=1), digits)
    (tmp_path / "checkpoint-2").rename(tmp_path / UNFINISHED)
    (tmp_path / UNFINISHED / "training_state.json").unlink()
    trainer = Trainer(tiny(tmp_path, max_train_steps=2, checkpointing_steps=1, resume_from_checkpoint="latest"), digits)
    assert trainer.step == 1
    trainer.run()
    assert not (tmp_path / UNFINISHED).exists()


def test_a_model_config_must_fit_the_images(tmp_path, digits):
    options = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    for name, sizes in (
        ("in_channels=3", {"sample_size": 8}),
        ("side 32", {"sample_size": 32, "in_channels": 1, "out_channels": 1}),
    ):
        UNet2DModel(**options, **sizes).save_config(tmp_path / name)
        with pytest.raises(ValueError, match=f"model_config_name_or_path.*{name}"):
            Trainer(tiny(tmp_path / "o", model_config_name_or_path=str(tmp_path / name)), digits)
    UNet2DModel(**options, sample_size=8, in_channels=1, out_channels=1).save_config(tmp_path / "fits")
    trainer = Trainer(tiny(tmp_path / "o", model_config_name_or_path=str(tmp_path / "fits")), digits)
    assert trainer.network.config.norm_num_groups == 4


def test_levels_must_divide_the_resolution(tmp_path, digits):
    with pytest.raises(ValueError, match="block_out_channels has 5 levels.*resolution 8 is no multiple of 16"):
        Trainer(tiny(tmp_path, block_out_channels=(8,) * 5), digits)


@pytest.mark.parametrize(("resolution", "levels"), [(8, 2), (16, 3), (28, 3), (32, 4), (64, 5), (7, 1)])
def test_default_networks_fit_their_resolution(tmp_path, digits, resolution, levels):
    trainer = Trainer(
        TrainingConfig(output_dir=str(tmp_path), resolution=resolution, logger="none", max_train_steps=1), digits
    )
    assert len(trainer.network.config.block_out_channels) == levels
    x = torch.randn(1, 1, resolution, resolution)
    assert trainer.network(x, torch.tensor([500.0]), return_dict=False)[0].shape == x.shape


def test_images_in_zero_to_one(tmp_path, digits):
    options = {"sde": "ve", "prediction_type": "edm", "max_train_steps": 1}
    usual = Trainer(tiny(tmp_path / "usual", **options), digits).scheduler.config
    trainer = Trainer(tiny(tmp_path / "o", data_min=0.0, **options), digits)
    assert (usual.sigma_min, trainer.scheduler.config.sigma_min) == (0.02, 0.01)
    assert trainer.scheduler.config.data_range == [0.0, 1.0]
    assert (usual.data_std, trainer.scheduler.config.data_std) == (None, 0.25)
    for name in ("sigma_max", "sigma_data"):
        assert trainer.scheduler.config[name] == pytest.approx(usual[name] / 2, rel=0.01)
    trainer._prepare()
    seen = {}
    trainer.model = lambda x, timestep: (seen.update(x=x), x)[1]
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 1, 8, 8)
    u = torch.ones(3, dtype=torch.float64)
    trainer.loss({"images": images, "noise": torch.zeros(3, 1, 8, 8), "u": u})
    levels = seen["x"][:, 0, 0, 0]
    torch.testing.assert_close(levels / levels[2], torch.tensor([0.0, 0.2, 1.0]))
    pipeline = Trainer(tiny(tmp_path / "saved", data_min=0.0, **options), digits).run()
    assert pipeline.config.data_min == DiffusionPipeline.from_pretrained(tmp_path / "saved").config.data_min == 0.0


def test_importance_sampling_reaches_the_loss(tmp_path, digits):
    """A network that is wrong by one in the noise everywhere costs every sample the mean of the likelihood loss."""
    options = {"prediction_type": "epsilon", "weighting": "likelihood", "time_sampling": "importance"}
    trainer = Trainer(tiny(tmp_path, max_train_steps=1, **options), digits)
    noise = torch.randn(6, 1, 8, 8)
    trainer.model = lambda x, timestep: noise + 1.0
    batch = {"images": torch.zeros(6, 1, 8, 8, dtype=torch.uint8), "noise": noise}
    loss = trainer.loss(batch | {"u": torch.linspace(0.0, 0.99, 6, dtype=torch.float64)})
    exact = float(trainer.sde.log_snr(1e-5) - trainer.sde.log_snr(1.0)) / (1.0 - 1e-5)
    torch.testing.assert_close(loss, torch.full((6,), exact), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "options", [{"channels_last": True}, {"ema_relative_std": 0.1}, {"time_sampling": "log_normal", "sde": "ve"}]
)
def test_options_that_change_the_run_train_and_resume(tmp_path, digits, options):
    options = {"max_train_steps": 4, "checkpointing_steps": 2, **options}
    whole = train(tiny(tmp_path, **options), digits)
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = train(tiny(tmp_path, **options, resume_from_checkpoint="latest"), digits)
    assert torch.equal(weights(whole), weights(resumed))
    assert weights(whole).isfinite().all()


def test_a_compiled_network_trains_without_inductors_choice_of_layouts(tmp_path, digits, monkeypatch):
    """On the CPU that choice gives UNet2DModel wrong gradients. (Compiling takes minutes; it is not done here.)"""
    seen = []
    monkeypatch.setattr(UNet2DModel, "compile", lambda self, **arguments: seen.append(arguments))
    train(tiny(tmp_path, max_train_steps=1, torch_compile=True), digits)
    assert seen == [{"options": {"layout_optimization": False}}]
