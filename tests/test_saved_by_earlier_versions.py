"""Schedulers, pipelines and a training run that an earlier version saved load, and give the samples of then.

``write_saved.py`` has written the data, with that version; its docstring says what they hold.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from write_saved import LEVELS, OPTIONS, TRAINING, draw, sample, trained_weights

import diffusers_sde
from diffusers_sde.training import Trainer, TrainingConfig

SAVED = Path(__file__).with_name("data") / "saved_by_0_1"
SAMPLES = json.loads((SAVED / "samples.json").read_text())
CONFIGS = sorted((SAVED / "schedulers").glob("*/*"))
CONFIG_IDS = [f"{folder.parent.name}-{folder.name}" for folder in CONFIGS]


def same(values, expected):
    torch.testing.assert_close(torch.tensor(values), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def read(folder):
    return json.loads((folder / "scheduler_config.json").read_text())


def load(folder, **given):
    return getattr(diffusers_sde, folder.parent.name).from_pretrained(folder, **given)


def test_the_data_are_of_that_version_and_whole():
    written = [*SAVED.rglob("scheduler_config.json"), *SAVED.rglob("model_index.json")]
    assert {json.loads(path.read_text())["_diffusers_sde_version"] for path in written} == {"0.1.0.dev0"}
    assert {entry["name"] for entry in SAMPLES["schedulers"]} == {
        folder.relative_to(SAVED / "schedulers").as_posix() for folder in CONFIGS
    }
    assert {entry["name"] for entry in SAMPLES["pipelines"]} == {path.name for path in (SAVED / "pipelines").iterdir()}


@pytest.mark.parametrize("folder", CONFIGS, ids=CONFIG_IDS)
def test_configs_keep_their_values(folder):
    """All keys, those of the scheduler that was swapped out among them; the old default order alone changes."""
    saved = {key: value for key, value in read(folder).items() if not key.startswith("_")}
    expected = saved | {"solver_order": {3: None}.get(saved["solver_order"], saved["solver_order"])}
    config = load(folder).config
    assert {key: config[key] for key in saved} == expected


@pytest.mark.parametrize("folder", [f for f in CONFIGS if f.name not in OPTIONS], ids=lambda f: f.name)
def test_swapped_schedulers_keep_their_own_levels(folder):
    """Evenly spaced in the network's time, with diffusers' offset, or shifted: closed forms, not what was saved."""
    scheduler = load(folder)
    scheduler.set_timesteps(LEVELS)
    if folder.name == "from_ddim":
        assert scheduler.timesteps.tolist() == [801, 601, 401, 201, 1]
        return
    # The end is shifted once more than the other levels, as FlowMatchEulerDiscreteScheduler has it.
    t = torch.linspace(1.0, 3e-3 / (1 + 2e-3), LEVELS, dtype=torch.float64)
    torch.testing.assert_close(scheduler.timesteps.double() / 1000, 3 * t / (1 + 2 * t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("folder", CONFIGS, ids=CONFIG_IDS)
def test_the_default_order_of_then_is_read_as_none(folder):
    """As written, it would now be order 3 at every number of levels."""
    if folder.name == "ode":
        assert read(folder)["solver_order"] == load(folder).config.solver_order == 2
    else:
        assert read(folder)["solver_order"] == 3
        assert load(folder).config.solver_order is None
        assert load(folder, solver_order=3).config.solver_order == 3  # of who asks for it now


@pytest.mark.parametrize(
    "entry", SAMPLES["schedulers"], ids=lambda e: "-".join([e["name"], *map(str, e["given"].values())])
)
def test_schedulers_give_the_samples_of_then(entry):
    same(sample(load(SAVED / "schedulers" / entry["name"], **entry["given"])), entry["sample"])


@pytest.mark.parametrize("entry", SAMPLES["pipelines"], ids=lambda e: e["name"])
def test_pipelines_give_the_samples_of_then(entry, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(SAVED / "pipelines" / entry["name"])
    assert type(pipeline) is getattr(diffusers_sde, entry["name"])
    same(draw(pipeline, entry["arguments"]), entry["sample"])
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    same(draw(again, entry["arguments"]), entry["sample"])


def test_the_saved_class_names_count():
    pipeline = DiffusionPipeline.from_pretrained(SAVED / "pipelines" / "ClassConditionalSDEPipeline")
    assert pipeline.labels == {"zero": 0, "one": 1}
    assert (pipeline.config.null_class, pipeline.config.data_min) == (2, 0.0)


@pytest.fixture
def run(tmp_path):
    """A copy of the saved run, as it was stopped after step 2 of 3."""
    shutil.copytree(SAVED / "run", tmp_path / "run")
    yield tmp_path / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_training_run_goes_on_to_the_weights_of_then(run, caplog):
    """By the options that the run itself has written down, all of which still exist."""
    options = json.loads((run / "training_config.json").read_text())
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    assert options.items() >= TRAINING.items()
    options |= {"output_dir": str(run), "resume_from_checkpoint": "latest"}
    trainer = Trainer(TrainingConfig(**options))
    assert trainer.step == 2
    trainer.run()
    # What checkpoints of then do not record is said, and nothing else.
    words = [record.getMessage() for record in caplog.records if record.name.startswith("diffusers_sde")]
    assert len(words) == 2
    assert "did not record architecture, data, train_eps" in words[0]
    assert "does not say which options it was trained with" in words[1]
    before = load_file(SAVED / "run" / "checkpoint-2" / "ema.safetensors")
    weights = trained_weights(run)
    same(weights, SAMPLES["trained_weights"])
    assert (before["0"].flatten()[:6] - torch.tensor(weights[:6])).abs().max() > 1e-3  # one step counts


def test_a_training_run_of_then_refuses_another_network(run):
    options = TRAINING | {"block_out_channels": (8,), "output_dir": str(run), "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=r"trained with block_out_channels=\[4\], this run has \[8\]"):
        Trainer(TrainingConfig(**options))


def test_the_data_stay_small():
    sizes = [path.stat().st_size for path in SAVED.rglob("*") if path.is_file()]
    assert max(sizes) < 100_000
    assert sum(sizes) < 300_000


def test_nothing_ran_that_a_folder_carries():
    """The package reads what was saved by itself."""
    before = set(sys.modules)
    DiffusionPipeline.from_pretrained(SAVED / "pipelines" / "SDEPipeline")
    assert not [name for name in set(sys.modules) - before if name.startswith("diffusers_modules.")]
