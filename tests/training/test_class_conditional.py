"""Training by class: the network is told the labels, now and then the null class, and learns what they mean."""

import datasets
import pytest
import torch
from PIL import Image
from shades import TINY

from diffusers_sde.images.loading import load_digits
from diffusers_sde.images.source import ImageSource
from diffusers_sde.pipelines import ClassConditionalSDEPipeline
from diffusers_sde.training import Trainer, TrainingConfig, train


def tiny(output_dir, **options):
    return TrainingConfig(output_dir=str(output_dir), **(TINY | options))


def fed_labels(trainer, batches):
    """What the network is told, for ``batches`` samples of the data."""
    trainer.model, fed = trainer.network, []
    hook = trainer.network.register_forward_pre_hook(
        lambda module, arguments, keywords: fed.append(keywords["class_labels"]), with_kwargs=True
    )
    samples = trainer.source.samples(0, False)
    batch = samples.__getitems__(range(batches))
    with torch.no_grad():
        trainer.loss(batch)
    hook.remove()
    return batch["labels"], fed[0]


def test_it_learns_the_classes_and_comes_back(tmp_path, shades):
    options = {"sde": "flow", "max_train_steps": 250, "learning_rate": 3e-3, "ema_max_decay": 0.95, "sample_every": 250}
    trained = train(tiny(tmp_path, **options), shades)
    assert (tmp_path / "samples" / "step-0000250.png").exists()
    pipe = ClassConditionalSDEPipeline.from_pretrained(tmp_path)
    assert pipe.labels == {"dark": 0, "light": 1} and pipe.config.null_class == 2
    for pipeline in (trained, pipe):
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            ["dark", "light"] * 8,
            num_inference_steps=20,
            guidance_scale=1.5,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        means = images.mean((1, 2, 3))
        assert float(means[::2].max()) < 0.45 < 0.55 < float(means[1::2].min()), means


def test_labels_are_hidden_in_the_given_fraction(tmp_path):
    digits = load_digits().select(range(100))
    given, fed = fed_labels(Trainer(tiny(tmp_path, label_dropout=0.3), digits), 2000)
    hidden = fed == 10
    assert torch.equal(fed[~hidden], given[~hidden])
    assert abs(float(hidden.float().mean()) - 0.3) < 0.05  # five standard errors


def test_without_dropout_there_is_no_null_class(tmp_path):
    digits = load_digits().select(range(40))
    trainer = Trainer(tiny(tmp_path, label_dropout=0.0), digits)
    given, fed = fed_labels(trainer, 100)
    assert torch.equal(given, fed) and trainer.network.config.num_class_embeds == 10
    assert trainer._pipeline(trainer.network).config.null_class is None


def test_classes_do_not_change_noise_and_times(tmp_path):
    digits = load_digits().select(range(40))
    trainer = Trainer(tiny(tmp_path), digits)
    labelled = trainer.source.samples(0, False).__getitems__(range(8))
    trainer.source.labels = None
    plain = trainer.source.samples(0, False).__getitems__(range(8))
    assert set(labelled) - set(plain) == {"labels"}
    assert all(torch.equal(plain[k], labelled[k]) for k in plain)


def test_a_given_network_config_gets_the_classes(tmp_path, shades):
    trainer = Trainer(tiny(tmp_path / "a"), shades)
    trainer.network.save_config(tmp_path / "config")
    again = Trainer(tiny(tmp_path / "b", model_config_name_or_path=str(tmp_path / "config")), shades)
    assert again.network.config.num_class_embeds == 3
    plain = tiny(tmp_path / "c", model_config_name_or_path=str(tmp_path / "config"), class_conditional=False)
    assert Trainer(plain, shades).network.config.num_class_embeds is None


def test_errors(tmp_path, shades):
    with pytest.raises(ValueError, match="label_dropout"):
        tiny(tmp_path, label_dropout=1.0)
    with pytest.raises(ValueError, match="needs images with classes"):
        Trainer(tiny(tmp_path), shades.remove_columns("label"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": [Image.new("L", (8, 8))] * 2, "label": [-1, 0]}
    unlabelled = datasets.Dataset.from_dict(columns, features=features)
    with pytest.raises(ValueError, match="the data hold -1 to 0"):
        Trainer(tiny(tmp_path, label_column="label"), unlabelled)


def test_plain_integers_have_as_many_classes_as_stated():
    data = load_digits().select(range(10)).cast_column("label", datasets.Value("int64"))
    counts = [
        len(ImageSource(data, TrainingConfig(label_column="label", num_classes=n)).class_names) for n in (None, 12)
    ]
    assert counts == [10, 12]
