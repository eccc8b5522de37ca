"""Training of noise-conditional classifiers: they learn, resume, guide; and the command line says what is wrong."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from shades import TINY as CONDITIONAL

from diffusers_sde import ClassConditionalSDEPipeline, NoiseConditionalClassifier, SDEPipeline
from diffusers_sde.images.loading import load_digits, load_images
from diffusers_sde.training import TrainingConfig, train
from diffusers_sde.training.classifier import ClassifierTrainer, train_classifier
from diffusers_sde.training.cli import classifier_main
from diffusers_sde.training.configuration import ClassifierTrainingConfig

TINY = {k: CONDITIONAL[k] for k in ("block_out_channels", "layers_per_block", "train_batch_size", "logger")}
TINY |= {"checkpointing_steps": 0, "learning_rate": 3e-3, "ema_max_decay": 0.95}


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def tiny(output_dir, **options):
    return ClassifierTrainingConfig(output_dir=str(output_dir), **(TINY | options))


def test_a_classifier_trained_apart_guides_an_unconditional_network(tmp_path, shades, caplog):
    """Pictures that are dark or light: the network knows no classes, the classifier no denoising."""
    caplog.set_level("INFO")
    train_classifier(tiny(tmp_path / "classifier", sde="flow", max_train_steps=100), shades, shades)
    assert "Accuracy on 40 test images" in caplog.text and "100.0% at 0.1" in caplog.text
    classifier = NoiseConditionalClassifier.from_pretrained(tmp_path / "classifier")
    assert classifier.config.lowest_log_snr == -14.0 and not classifier.training
    options = {**CONDITIONAL, **TINY, "class_conditional": False, "sde": "flow", "max_train_steps": 250}
    train(TrainingConfig(output_dir=str(tmp_path / "network"), **options), shades)
    pipe = ClassConditionalSDEPipeline.from_pretrained(tmp_path / "network", classifier=classifier)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == {"dark": 0, "light": 1} and type(pipe) is not SDEPipeline
    run = {"num_inference_steps": 20, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    means = pipe(["dark", "light"] * 20, classifier_guidance_scale=2.0, **run).images.mean((1, 2, 3))
    assert float((means[::2] < 0.5).float().mean()) >= 0.95 and float((means[1::2] > 0.5).float().mean()) >= 0.95, means


def test_resuming_continues_exactly(tmp_path, shades):
    def weights(classifier):
        return torch.cat([p.detach().flatten() for p in classifier.parameters()])

    whole = train_classifier(tiny(tmp_path / "whole", max_train_steps=6), shades)
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {"max_train_steps": 6, "checkpointing_steps": 3}
    interrupted = ClassifierTrainer(tiny(tmp_path / "parts", **options), shades)
    interrupted.max_steps = 3  # the schedule is that of six steps
    interrupted._prepare = lambda: (
        setattr(interrupted, "max_steps", 6),
        ClassifierTrainer._prepare(interrupted),
        setattr(interrupted, "max_steps", 3),
    )
    interrupted.run()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="already holds a run"):
        ClassifierTrainer(tiny(tmp_path / "parts", **options), shades)
    resumed = train_classifier(tiny(tmp_path / "parts", resume_from_checkpoint="latest", **options), shades)
    assert torch.equal(weights(whole), weights(resumed))
    AcceleratorState._reset_state(reset_partial_state=True)
    network = {**CONDITIONAL, **TINY, "max_train_steps": 9, "label_dropout": 0.0}
    checkpoint = str(tmp_path / "parts" / "checkpoint-6")
    with pytest.raises(ValueError, match="trained with network='classifier', this run has"):
        train(TrainingConfig(output_dir=str(tmp_path / "n"), resume_from_checkpoint=checkpoint, **network), shades)


def test_a_stream_teaches_the_classes_and_resumes_exactly(tmp_path, shades, caplog):
    caplog.set_level("INFO")
    options = {"sde": "flow", "max_train_steps": 60, "checkpointing_steps": 30, "shuffle_buffer": 8}
    stream = shades.to_iterable_dataset(num_shards=3)
    whole = train_classifier(tiny(tmp_path, **options), stream, shades)
    assert "Accuracy on 40 test images" in caplog.text and "100.0% at 0.1" in caplog.text
    shutil.rmtree(tmp_path / "checkpoint-60")
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = train_classifier(tiny(tmp_path, resume_from_checkpoint="latest", **options), stream)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    numbers = shades.cast_column("label", datasets.Value("int64")).to_iterable_dataset()
    options["label_column"] = "label"
    with pytest.raises(ValueError, match="does not say how many classes there are: pass num_classes"):
        ClassifierTrainer(tiny(tmp_path / "numbers", **options), numbers)
    trainer = ClassifierTrainer(tiny(tmp_path / "numbers", num_classes=2, **options), numbers)
    assert trainer.network.config.num_classes == 2


def test_accuracy_is_measured_at_the_noise_that_is_named(tmp_path, shades):
    trainer, seen = ClassifierTrainer(tiny(tmp_path, sde="ve"), shades, shades), []
    trainer.network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    trainer._measure(trainer.network.eval(), trainer.test_source)
    ratios = sorted({round(float(torch.exp(-0.5 * log_snr[0])), 6) for _, log_snr in seen})
    assert ratios == [0.1, 0.3, 1.0, 3.0]
    assert all(float(x.std()) < 1.3 for x, _ in seen)


def test_what_a_classifier_has_no_use_for_is_refused(tmp_path, capsys):
    with pytest.raises(TypeError, match="unexpected keyword argument 'prediction_type'"):
        tiny(tmp_path, prediction_type="epsilon")
    with pytest.raises(SystemExit, match="2"):
        classifier_main(["--prediction_type", "epsilon"])
    assert "unrecognized arguments: --prediction_type" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        classifier_main(["--dataset_split", "test", "--output_dir", str(tmp_path)])
    assert "train_classifier.py: error: The split of the digits must be train or a slice" in capsys.readouterr().err


def test_errors_of_the_data(tmp_path, shades):
    with pytest.raises(ValueError, match="needs images with classes"):
        ClassifierTrainer(tiny(tmp_path), shades.remove_columns("label"))
    with pytest.raises(ValueError, match="test_split must have the classes"):
        ClassifierTrainer(tiny(tmp_path), shades, load_digits().select(range(10)))


def test_slices_of_the_digits(tmp_path):
    first, rest = (load_images(tiny(tmp_path, dataset_split=s)) for s in ("train[:1500]", "train[1500:]"))
    everything = load_digits()["label"]
    assert len(first) == 1500 and first["label"][:] + rest["label"][:] == everything[:]
    with pytest.raises(ValueError, match="slice of it, got 'validation'"):
        load_images(tiny(tmp_path, dataset_split="validation"))


def test_the_loss_is_the_cross_entropy_of_the_noisy_image(tmp_path, shades):
    trainer = ClassifierTrainer(tiny(tmp_path, sde="ve"), shades)
    trainer.model, seen = trainer.network, []
    trainer.network.forward = lambda sample, log_snr: seen.append((sample, log_snr)) or torch.tensor([[2.0, 0.0]] * 2)
    images = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
    noise, u = torch.ones(2, 1, 8, 8), torch.tensor([0.3, 0.9], dtype=torch.float64)
    loss = trainer.loss({"images": images, "noise": noise, "u": u, "labels": torch.tensor([0, 1])})
    np.testing.assert_allclose(loss, [np.log1p(np.exp(-2.0)), np.log1p(np.exp(2.0))], rtol=1e-5)
    sample, log_snr = seen[0]
    sigma = trainer.sde.sigma(1.0 - u * (1.0 - 1e-5))
    np.testing.assert_allclose(log_snr, -2.0 * np.log(sigma), rtol=1e-5)
    np.testing.assert_allclose(sample[:, 0, 0, 0], (1.0 + sigma) / np.sqrt(1.0 + sigma**2), rtol=1e-5)
    assert json.loads(json.dumps(trainer._identity()))["network"] == "classifier"
