"""Training for a scheduler that is given, of a class that training does not know."""

import math
import re
import shutil
from dataclasses import dataclass

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_sde import SDE, SDEScheduler, VESDEScheduler, VPSDEScheduler, sampler_arguments
from diffusers_sde.images.loading import load_digits
from diffusers_sde.training import Trainer, TrainingConfig, train

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


@dataclass(frozen=True)
class PowerSDE(SDE):
    """alpha = 1, sigma(t) = scale t."""

    scale: float = 5.0

    def _log_alpha(self, t):
        return torch.zeros_like(t)

    def _log_sigma(self, t):
        return torch.log(t) + math.log(self.scale)


class PowerScheduler(SDEScheduler):
    @sampler_arguments(time_conditioning="time", num_train_timesteps=1)
    def __init__(self, scale: float = 5.0, t_min: float = 1e-2, prediction_type: str = "edm", **sampler):
        self.setup(PowerSDE(t_min=t_min, scale=scale))


@pytest.fixture(scope="module")
def digits():
    return load_digits().select(range(20))


def trainer(output_dir, digits, scheduler, **options):
    return Trainer(TrainingConfig(output_dir=str(output_dir), **(TINY | options)), digits, scheduler)


def test_times_targets_and_inputs_are_the_scheduler_s(tmp_path, digits):
    """A network that returns zero costs the mean of the target's square, in closed form for edm prediction."""
    scheduler = PowerScheduler(scale=3.0, sigma_data=0.5)
    run, seen = trainer(tmp_path, digits, scheduler), {}
    run.model = lambda x, timestep: (seen.update(x=x, timestep=timestep), torch.zeros_like(x))[1]
    noise, u = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 0.5, 0.75], dtype=torch.float64)
    white = torch.full((3, 1, 8, 8), 255, dtype=torch.uint8)
    loss = run.loss({"images": white, "noise": noise, "u": u})
    t = 1.0 - u * 0.99  # from 1 to the t_min of the scheduler's SDE
    torch.testing.assert_close(seen["timestep"], t.float())
    sigma = (3.0 * t).float().reshape(3, 1, 1, 1)
    x_t = 1.0 + sigma * noise
    # Karras et al. 2022, eq. 7 and table 1: c_in x, and the target (x_0 - c_skip x)/c_out.
    total = (sigma**2 + 0.5**2).sqrt()
    torch.testing.assert_close(seen["x"], x_t / total)
    target = (1.0 - 0.25 / total**2 * x_t) / (sigma * 0.5 / total)
    torch.testing.assert_close(loss, target.square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_it_learns_and_the_pipeline_draws_the_data(tmp_path):
    """Pictures of one grey each: their mean and their spread over pixels come back."""
    greys = np.random.default_rng(0).integers(150, 200, 40)
    data = datasets.Dataset.from_dict({"image": [Image.fromarray(np.full((8, 8), g, np.uint8)) for g in greys]})
    options = {"max_train_steps": 250, "learning_rate": 3e-3, "ema_max_decay": 0.95, "checkpointing_steps": 0}
    options |= {"block_out_channels": (8, 16), "train_batch_size": 16}
    config = TrainingConfig(output_dir=str(tmp_path), **(TINY | options))
    pipe = train(config, data, PowerScheduler(sigma_data=0.4))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(16, 20, torch.Generator().manual_seed(0), output_type="pt").images
    assert type(pipe.scheduler) is PowerScheduler
    assert float(images.mean()) == pytest.approx(175 / 255, abs=0.05) and float(images.std((1, 2, 3)).mean()) < 0.1


def test_a_run_is_continued_with_the_same_scheduler_only(tmp_path, digits):
    whole = trainer(tmp_path / "run", digits, PowerScheduler()).run()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")

    def again(scheduler, **options):
        return trainer(tmp_path / "run", digits, scheduler, resume_from_checkpoint="latest", **options)

    for other, words in (
        (PowerScheduler(scale=4.0), "trained with sde="),
        (PowerScheduler(t_min=1e-3), "trained with sde="),
        (PowerScheduler(prediction_type="v_prediction"), "trained with prediction_type="),
        (PowerScheduler(sigma_data=0.4), "trained with sigma_data="),
        (PowerScheduler(time_conditioning="sigma", num_train_timesteps=2), "trained with time_conditioning="),
        (PowerScheduler(num_train_timesteps=2), "trained with scheduler's num_train_timesteps=1"),
        (type("OtherScheduler", (PowerScheduler,), {})(), "trained with scheduler's class='PowerScheduler'"),
        (VESDEScheduler(prediction_type="edm"), "trained with sde="),
    ):
        with pytest.raises(ValueError, match=words):
            again(other)
    with pytest.raises(ValueError, match="trained with sde="):
        trainer(tmp_path / "run", digits, None, resume_from_checkpoint="latest", sde="ve")
    resumed = again(PowerScheduler(snr=0.3, predictor="ancestral")).run()  # another sampler is no other training
    pairs = zip(whole.unet.parameters(), resumed.unet.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) and resumed.scheduler.config.snr == 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"sde": "ve"},
        {"prediction_type": "edm"},
        {"time_conditioning": "sigma"},
        {"sigma_max": 3.0},
        {"sigma_data": 0.4},
        {"train_eps": 1e-3},
        {"sampling_eps": 1e-3},
        {"num_train_timesteps": 100},
        {"beta_end": 0.01},
    ],
    ids=str,
)
def test_options_that_describe_another_scheduler_are_refused(tmp_path, digits, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} cannot be set beside a scheduler")):
        trainer(tmp_path, digits, PowerScheduler(), **options)


def test_what_is_no_scheduler_is_refused(tmp_path, digits):
    for wrong in (PowerSDE(), PowerScheduler, "vp"):
        with pytest.raises(ValueError, match="scheduler must be an SDEScheduler"):
            trainer(tmp_path, digits, wrong)


def test_a_given_scheduler_of_the_package_trains_what_its_options_train(tmp_path, digits):
    by_options = trainer(tmp_path / "a", digits, None, discrete=True, sampling_eps=1e-3).run()
    scheduler = VPSDEScheduler(timestep_spacing="trailing")
    given = trainer(tmp_path / "b", digits, scheduler, discrete=True).run()
    pairs = zip(by_options.unet.parameters(), given.unet.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_card_of_a_given_scheduler_has_no_command_line(tmp_path, digits):
    from diffusers_sde.hub.export import ExportConfig, export

    for name, scheduler in (("a", None), ("b", VPSDEScheduler())):
        trainer(tmp_path / name, digits, scheduler, max_train_steps=1).run()
        export(ExportConfig(model=str(tmp_path / name), hub_model_id="u/m", output_dir=str(tmp_path / f"{name}-out")))
    cards = [(tmp_path / f"{name}-out" / "README.md").read_text() for name in "ab"]
    assert ["scripts/train.py" in card for card in cards] == [True, False]
