"""Evaluation during training: it is logged, and training does not notice."""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from diffusers_sde.images.loading import load_digits
from diffusers_sde.metrics import extractors
from diffusers_sde.training import Trainer, TrainingConfig


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(output_dir, dataset, **options):
    """The final weights, and what was logged."""
    config = TrainingConfig(
        output_dir=str(output_dir),
        block_out_channels=(8, 16),
        layers_per_block=1,
        dropout=0.1,  # draws from the global generator
        train_batch_size=8,
        max_train_steps=4,
        sample_every=0,
        checkpointing_steps=0,
        num_inference_steps=2,
        logger="none",
        **options,
    )
    trainer, logged = Trainer(config, dataset), {}
    trainer.accelerator.log = lambda values, step: logged.setdefault(step, {}).update(values)
    pipeline = trainer.run()
    return torch.cat([p.detach().flatten() for p in pipeline.unet.parameters()]), logged


def test_training_is_measured_and_does_not_notice(tmp_path):
    digits = load_digits().select(range(60))
    options = {"eval_every": 2, "num_eval_images": 12, "eval_batch_size": 5}
    plain, _ = run(tmp_path / "plain", digits)
    weights, logged = run(tmp_path / "measured", digits, **options, eval_features="pixels")
    assert torch.equal(plain, weights)
    measured = {step: values["eval/FD-pixels"] for step, values in logged.items() if "eval/FD-pixels" in values}
    assert set(measured) == {2, 4} and measured[2] != measured[4] > 0
    weights, again = run(tmp_path / "again", digits, **options, eval_features="pixels")
    assert {step: again[step]["eval/FD-pixels"] for step in measured} == measured


def test_the_classifier_is_kept_and_missed_before_training(tmp_path, monkeypatch):
    train = extractors.train_feature_classifier
    monkeypatch.setattr(
        extractors, "train_feature_classifier", lambda images, labels, steps, *more, **m: train(images, labels, 3)
    )
    digits = load_digits().select(range(60))
    _, logged = run(tmp_path, digits, eval_every=4, num_eval_images=12)
    assert logged[4]["eval/IS-classifier"] >= 1.0
    assert (tmp_path / "classifier.safetensors").exists()
    with pytest.raises(ValueError, match="need data with classes"):
        run(tmp_path / "other", digits.remove_columns("label"), eval_every=4, eval_features="classifier")
    assert not (tmp_path / "other" / "model_index.json").exists()
