"""Training of an autoencoder: its loss, its run, and what a denoiser makes of the result."""

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from shades import TINY
from tiny_parts import tiny_vae
from torch.distributions import Normal, kl_divergence

from diffusers_sde.images.loading import load_digits
from diffusers_sde.training import TrainingConfig, train
from diffusers_sde.training.autoencoder import AutoencoderTrainer, ReconstructionLoss, train_autoencoder
from diffusers_sde.training.autoencoder_configuration import AutoencoderTrainingConfig


def config(folder, **options):
    given = {
        "downsampling": 2,
        "block_out_channels": (8, 8),
        "latent_channels": 2,
        "train_batch_size": 8,
        "logger": "none",
    }
    given |= {"checkpointing_steps": 0, "sample_every": 0, "max_train_steps": 4, "lr_warmup_steps": 0}
    return AutoencoderTrainingConfig(output_dir=str(folder), **(given | options))


def digits(count=64):
    return load_digits().select(range(count))


@pytest.mark.parametrize("reconstruction", ["l1", "l2"])
def test_the_loss_is_reconstruction_and_divergence(reconstruction):
    vae, generator = tiny_vae(), torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 8, 8, generator=generator) * 2 - 1
    noise = torch.randn(3, 4, 4, 4, generator=generator)
    with torch.no_grad():
        loss, error, kl = ReconstructionLoss(vae, reconstruction, 0.3)(x, noise)
        law = vae.encode(x).latent_dist
        decoded = vae.decode(law.mean + law.std * noise).sample
        divergence = kl_divergence(Normal(law.mean, law.std), Normal(0.0, 1.0)).mean()
        expected = torch.nn.functional.l1_loss(decoded, x) if reconstruction == "l1" else ((decoded - x) ** 2).mean()
    torch.testing.assert_close(error, expected)
    torch.testing.assert_close(kl, divergence, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, expected + 0.3 * divergence, rtol=1e-4, atol=1e-5)


def test_it_learns_and_its_latents_are_trained_on(tmp_path):
    vae = train_autoencoder(config(tmp_path / "vae", max_train_steps=80, learning_rate=5e-3, sample_every=80), digits())
    assert (tmp_path / "vae" / "samples" / "step-0000080.png").is_file()
    images = torch.stack([torch.from_numpy(np.array(row["image"]))[None] for row in digits()]) / 127.5 - 1
    with torch.no_grad():
        z = vae.encode(images).latent_dist.mean
        error = (vae.decode(z).sample - images).abs().mean()
    assert error < 0.7 * (images - images.median()).abs().mean(), "better than the best constant"
    assert z.std() * vae.config.scaling_factor == pytest.approx(1.0, rel=1e-2)
    saved = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in vae.state_dict().items())
    options = TINY | {"vae": str(tmp_path / "vae"), "max_train_steps": 1, "block_out_channels": (8, 8)}
    pipe = train(TrainingConfig(output_dir=str(tmp_path / "out"), **options), digits())
    assert pipe.sample_shape == (2, 4, 4) and pipe.image_shape == (1, 8, 8)


def test_a_resumed_run_is_the_same_to_the_last_bit(tmp_path):
    train_autoencoder(config(tmp_path / "whole", checkpointing_steps=2), digits())
    at = str(tmp_path / "whole" / "checkpoint-2")
    train_autoencoder(config(tmp_path / "resumed", resume_from_checkpoint=at), digits())
    whole, resumed = (
        load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("whole", "resumed")
    )
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    with pytest.raises(ValueError, match="the checkpoint was trained with kl_weight=0.001, this run has 0.1"):
        AutoencoderTrainer(config(tmp_path / "other", resume_from_checkpoint=at, kl_weight=0.1), digits())
    with pytest.raises(ValueError, match="already holds a run"):
        AutoencoderTrainer(config(tmp_path / "whole"), digits())
    train_autoencoder(config(tmp_path / "whole", overwrite_output_dir=True, max_train_steps=1), digits())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"downsampling": 6}, "downsampling must be a power of 2, got 6"),
        ({"downsampling": 4}, "block_out_channels must have 3 levels for downsampling 4, got 2"),
        ({"block_out_channels": (8, 6)}, "block_out_channels must be multiples of 4, got 8 6"),
        ({"resolution": 9}, "downsampling must divide the resolution 9, got 2"),
        ({"streaming": True}, "streaming must be False for an autoencoder"),
        ({"torch_compile": True}, "torch_compile must be False"),
        ({"reconstruction": "lpips"}, "reconstruction must be one of l1, l2"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderTrainer(config(tmp_path, **options), digits())
