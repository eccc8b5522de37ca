"""Latents in files: they are those of the autoencoder, and training with them is the training without."""

import pytest
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from shades import TINY
from tiny_parts import tiny_vae

from diffusers_sde.images.loading import load_digits
from diffusers_sde.training import Trainer, TrainingConfig, row_cache, train


@pytest.fixture
def vae(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


@pytest.fixture
def small_files(monkeypatch):
    """Files of eight images: 4 x 4 x 4 numbers, four of them with mirrored ones."""
    monkeypatch.setattr(row_cache, "SHARD_BYTES", 8 * 4 * 64 * 4)


def config(tmp_path, vae, name="out", **options):
    given = {"vae": vae, "channels": 3, "block_out_channels": (8, 8), "class_conditional": False, "max_train_steps": 4}
    given |= {"random_flip": True, "vae_batch_size": 5, "train_batch_size": 7}
    if options.get("cache_latents"):
        given["latent_cache_dir"] = str(tmp_path / "cache")
    return TrainingConfig(output_dir=str(tmp_path / name), **(TINY | given | options))


def digits(count=40):
    return load_digits().select(range(count))


def files(tmp_path):
    return sorted((tmp_path / "cache").glob("*/*.safetensors"))


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_files_hold_mean_and_std_of_both_flips(tmp_path, vae, small_files):
    trainer = Trainer(config(tmp_path, vae, cache_latents=True), digits())
    trainer.source.prepare(PartialState())
    assert len(files(tmp_path)) == 5, "40 images, eight to a file"
    images, network = trainer.source.spread(40)[0] / 127.5 - 1.0, AutoencoderKL.from_pretrained(vae)
    numbers, flips = [3, 39, 0, 11], [True, False, False, True]
    read = trainer.source.cache.read(numbers, flips)
    with torch.no_grad():
        for i, (number, flip) in enumerate(zip(numbers, flips, strict=True)):
            image = images[number].flip(-1) if flip else images[number]
            law = network.encode(image[None]).latent_dist
            torch.testing.assert_close(read["latent_mean"][i], law.mean[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(read["latent_std"][i], law.std[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampling", ["sample", "mode"])
def test_training_is_the_same_to_the_last_bit(tmp_path, vae, small_files, sampling):
    """With the cache and without, in one go, resumed, and resumed the other way round."""
    own = {"latent_sampling": sampling, "checkpointing_steps": 2}
    train(config(tmp_path, vae, "on_the_way", **own), digits())
    train(config(tmp_path, vae, "cached", cache_latents=True, **own), digits())
    expected = weights(tmp_path / "on_the_way")
    results = [weights(tmp_path / "cached")]
    for name, cached in (("on_the_way", True), ("cached", False)):
        checkpoint = str(tmp_path / name / "checkpoint-2")
        resumed = config(tmp_path, vae, f"from_{name}", cache_latents=cached, resume_from_checkpoint=checkpoint, **own)
        train(resumed, digits())
        results.append(weights(tmp_path / f"from_{name}"))
    for result in results:
        assert all(torch.equal(value, result[name]) for name, value in expected.items())


def test_latents_are_drawn_anew_every_epoch(tmp_path, vae):
    trainer = Trainer(config(tmp_path, vae, random_flip=False, cache_latents=True), digits())
    trainer.source.prepare(PartialState())
    samples = trainer.source.samples(0, False, 1)
    first, second = (samples.__getitems__(range(epoch * 40, epoch * 40 + 40)) for epoch in (0, 1))
    order = [torch.tensor(trainer.source._images.order(0, range(e * 40, e * 40 + 40))).argsort() for e in (0, 1)]
    means = [batch["latent_mean"][rows] for batch, rows in zip((first, second), order, strict=True)]
    assert torch.equal(*means)
    drawn = [trainer._x0(batch)[rows] for batch, rows in zip((first, second), order, strict=True)]
    std = first["latent_std"][order[0]] / torch.tensor(trainer.source.encoder.std).reshape(4, 1, 1)
    unit = (drawn[0] - drawn[1]) / (std * 2**0.5)
    # 2560 unit Gaussians: mean and variance are off by more than this with probability 1e-4.
    assert abs(unit.mean()) < 0.08 and abs(unit.var() - 1) < 0.12
    again = Trainer(config(tmp_path, vae, random_flip=False, cache_latents=True), digits())
    assert torch.equal(again._x0(samples.__getitems__(range(40))), trainer._x0(first)), "by seed and number"


def test_an_interrupted_cache_goes_on_with_what_is_missing(tmp_path, vae, small_files, monkeypatch):
    class Stopped(Exception):
        pass

    trainer = Trainer(config(tmp_path, vae, cache_latents=True), digits())
    encoded, encode = [], type(trainer.source.encoder).moments

    def counting(encoder, images, fixed=False):
        encoded.append(len(images))
        if sum(encoded) > 40:  # in the third file, where every image is encoded twice
            raise Stopped
        return encode(encoder, images, fixed)

    monkeypatch.setattr(type(trainer.source.encoder), "moments", counting)
    with pytest.raises(Stopped):
        trainer.source.prepare(PartialState())
    assert len(files(tmp_path)) == 2 and not list((tmp_path / "cache").glob("*/.*")), "whole files only"
    before = [path.stat().st_mtime_ns for path in files(tmp_path)]
    monkeypatch.setattr(type(trainer.source.encoder), "moments", encode)
    assert trainer.source.cache.missing() == [2, 3, 4]
    trainer.source.prepare(PartialState())
    assert len(files(tmp_path)) == 5 and [p.stat().st_mtime_ns for p in files(tmp_path)[:2]] == before
    files(tmp_path)[1].write_bytes(files(tmp_path)[1].read_bytes()[:100])  # damaged from outside
    assert trainer.source.cache.missing() == [1]


def test_each_has_its_own_files(tmp_path, vae):
    def folder(data=None, **options):
        options = {"vae": vae, "cache_latents": True, **options}
        return Trainer(
            config(tmp_path, options.pop("vae"), **options), digits() if data is None else data
        ).source.cache.folder

    network = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        network.decoder.conv_out.bias.add_(0.1)
    network.save_pretrained(tmp_path / "other")
    changed = digits().map(
        lambda row, i: {"image": digits()[5]["image"] if i == 7 else row["image"]}, with_indices=True
    )
    assert folder() == folder() == folder(latent_scaling="config") == folder(seed=3)
    different = [
        folder(),
        folder(vae=str(tmp_path / "other")),
        folder(resolution=16),
        folder(random_flip=False),
        folder(latent_sampling="mode"),
        folder(vae_dtype="bf16"),
        folder(digits(39)),
        folder(changed),
        folder(changed, cache_images=False),
        folder(cache_images=False),
    ]
    assert len(set(different)) == len(different)


def test_half_precision_is_kept_as_it_is(tmp_path, vae):
    trainer = Trainer(config(tmp_path, vae, vae_dtype="bf16", cache_latents=True), digits(10))
    trainer.source.prepare(PartialState())
    stored = load_file(files(tmp_path)[0])
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    x0 = trainer._x0(next(iter([trainer.source.samples(0, True, 1).__getitems__(range(7))])))
    assert x0.dtype == torch.float32 and torch.isfinite(x0).all()


def test_loader_processes_read_the_files(tmp_path, vae, small_files):
    train(config(tmp_path, vae, "one", cache_latents=True), digits())
    train(config(tmp_path, vae, "more", cache_latents=True, dataloader_num_workers=1), digits())
    one, more = weights(tmp_path / "one"), weights(tmp_path / "more")
    assert all(torch.equal(value, more[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streaming": True, "max_train_steps": 2}, "cache_latents needs data that are not streamed"),
        ({"cache_images": False, "resolution": 8}, "cache_latents needs the same crops every time"),
        ({"vae": None}, "has no effect without vae"),
        ({"cache_latents": False, "latent_cache_dir": "x"}, "latent_cache_dir 'x' has no effect without cache_latents"),
        ({"vae_batch_size": 0}, "vae_batch_size must be"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, vae, options, message):
    given = {"cache_latents": True, **options}
    with pytest.raises(ValueError, match=message):
        Trainer(config(tmp_path, given.pop("vae", vae), **given), None if "streaming" in options else digits())
