"""What turns images into the x_0 that a network knows, and back: the range of its pixels, or an autoencoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..basics.checks import check_number
from ..images.arrays import from_network, to_network


class ImageEncoder(Protocol):
    """What training, pipelines and evaluation ask of a way to see images."""

    def encode(self, images: Tensor) -> Tensor:
        """x_0 of images, bytes (B, C, H, W): float32 on their device."""

    def decode(self, x: Tensor) -> Tensor:
        """Images of x_0, in [0, 1], shape (B, C, H, W)."""

    def image_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the images, (C, H, W), of which x_0 has ``sample_shape``."""


@dataclass(frozen=True)
class PixelRange:
    """x_0 is the image itself, with black at ``data_min`` and white at ``data_max``.

    Args:
        data_min: Value of black.
        data_max: Value of white.
    """

    data_min: float
    data_max: float

    def encode(self, images: Tensor) -> Tensor:
        """See ``ImageEncoder``."""
        return to_network(images, self.data_min, self.data_max)

    def decode(self, x: Tensor) -> Tensor:
        """See ``ImageEncoder``."""
        return from_network(x, self.data_min, self.data_max)

    def image_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """See ``ImageEncoder``."""
        return sample_shape


@dataclass(frozen=True)
class Latents:
    """x_0 = (z - mean) / std per channel, where z is what an autoencoder of diffusers makes of the image.

    The autoencoder sees images in [-1, 1]. Of one that returns a distribution, ``encode`` takes the mode.

    Args:
        vae: The autoencoder: ``AutoencoderKL``, ``AutoencoderTiny``, ``AutoencoderDC`` or ``VQModel``, whose latents
            are those before they are quantised.
        mean: Mean of z, one number for each channel.
        std: Standard deviation of z, likewise.
        chunk: Images that are encoded or decoded at a time, which bounds the memory.
    """

    vae: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    chunk: int = 16

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See ``ImageEncoder``."""
        return torch.cat([self.normalized(z.float()) for z, _ in self.moments(images)])

    def moments(self, images: Tensor, fixed: bool = False) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What the autoencoder makes of images, chunk by chunk, in its own precision.

        Args:
            images: Bytes, shape (B, C, H, W), on the autoencoder's device.
            fixed: Whether every call of the autoencoder gets ``chunk`` images, some of them repeated. The latents of an
                image then do not depend on how many others are asked for, down to the last bit.

        Returns:
            The mode of z, and its standard deviation where the autoencoder returns a distribution, else None.
        """
        for part in images.split(self.chunk):
            count = len(part)
            if fixed and count < self.chunk:
                part = torch.cat([part, part[-1:].expand(self.chunk - count, *part.shape[1:])])
            output = self.vae.encode(to_network(part, -1.0).to(self.vae.dtype))
            if hasattr(output, "latent_dist"):
                yield output.latent_dist.mode()[:count], output.latent_dist.std[:count]
            else:
                yield getattr(output, "latents" if hasattr(output, "latents") else "latent")[:count], None

    def encoded(self, images: Tensor) -> Tensor:
        """x_0 of images in [-1, 1], floating point; a gradient passes."""
        output = self.vae.encode(images.to(self.vae.dtype))
        if hasattr(output, "latent_dist"):
            return self.normalized(output.latent_dist.mode().float())
        return self.normalized(getattr(output, "latents" if hasattr(output, "latents") else "latent").float())

    def normalized(self, z: Tensor) -> Tensor:
        """x_0 of float32 latents z, same shape."""
        return (z - per_channel(self.mean, z)) / per_channel(self.std, z)

    def decode(self, x: Tensor) -> Tensor:
        """See ``ImageEncoder``."""
        with torch.no_grad():
            return from_network(torch.cat([self.decoded(part) for part in x.split(self.chunk)]), -1.0, 1.0)

    def decoded(self, x: Tensor) -> Tensor:
        """Images of x_0 in the autoencoder's range, around [-1, 1] and not cut off, float32; a gradient passes.

        The latents of a ``VQModel`` are quantised, and the gradient is that of the identity there.
        """
        z = x.float() * per_channel(self.std, x) + per_channel(self.mean, x)
        image: Tensor = self.vae.decode(z.to(self.vae.dtype)).sample
        return image.float()

    def image_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """See ``ImageEncoder``."""
        factor = downsampling_of(self.vae)
        channels = self.vae.config.get("out_channels") or self.vae.config.in_channels
        return (channels, *(factor * side for side in sample_shape[1:]))


@dataclass(frozen=True)
class LatentPreview:
    """A cheap picture of latents: colours that are linear in the latents of a place, at their resolution.

    Args:
        weight: Shape (C, c), for c channels of latents and C of images in [0, 1].
        bias: Shape (C,).
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, encoder: Latents, x: Tensor) -> LatentPreview:
        """Fit the colours to what the decoder makes of some latents, by least squares.

        Args:
            encoder: Decodes the latents, once.
            x: Latents x_0 of some images, shape (B, c, h, w): samples, or encoded images.
        """
        colours = torch.nn.functional.adaptive_avg_pool2d(encoder.decode(x), (x.shape[2], x.shape[3]))
        rows = x.float().permute(0, 2, 3, 1).flatten(0, 2)
        targets = colours.permute(0, 2, 3, 1).flatten(0, 2)
        # A little ridge, for channels that do not vary. The factorisation is on the host, which every device allows.
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1).cpu().double()
        gram = rows.T @ rows + 1e-6 * len(rows) * torch.eye(rows.shape[1], dtype=rows.dtype)
        solution = torch.linalg.solve(gram, rows.T @ targets.cpu().double()).to(torch.float32).to(x.device)
        return cls(solution[:-1].T, solution[-1])

    def __call__(self, x: Tensor) -> Tensor:
        """Pictures in [0, 1], shape (B, C, h, w), of latents x_0, shape (B, c, h, w)."""
        colours = torch.einsum("oc,bchw->bohw", self.weight.to(x.device), x.float())
        return (colours + self.bias.to(x.device).reshape(-1, 1, 1)).clamp(0.0, 1.0)


def per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """Return one number for each channel as float32 of shape (C, 1, 1), on the device of ``like``."""
    return torch.tensor(values, device=like.device).reshape(-1, 1, 1)


def downsampling_of(vae: Any) -> int:
    """How many pixels along a side one latent stands for."""
    levels = vae.config.get("encoder_block_out_channels") or vae.config.block_out_channels
    return int(2 ** (len(levels) - 1))


def latent_channels_of(vae: Any) -> int:
    """Channels of the latents of an autoencoder; those of a ``VQModel`` are those of its codebook."""
    return int(vae.config.get("vq_embed_dim") or vae.config.latent_channels)


def latents_of(vae: Any, mean: Sequence[float] | None, std: Sequence[float] | None, chunk: int = 16) -> Latents:
    """The latents of an autoencoder, with its config's scale and shift where nothing else is given.

    With the names of diffusers' configs, x_0 = (z - shift_factor) scaling_factor.

    Args:
        vae: The autoencoder.
        mean: Mean of each channel, or None.
        std: Standard deviation of each channel, or None.
        chunk: See ``Latents``.

    Raises:
        ValueError: No autoencoder, or other than one number for each channel.
    """
    if not all(hasattr(vae, name) for name in ("encode", "decode", "config")):
        raise ValueError(f"vae must be an autoencoder of diffusers, such as AutoencoderKL, got {type(vae).__name__}.")
    channels = latent_channels_of(vae)
    shift, scale = vae.config.get("shift_factor") or 0.0, vae.config.get("scaling_factor") or 1.0
    given = {"latents_mean": [shift] * channels if mean is None else mean}
    given["latents_std"] = [1.0 / scale] * channels if std is None else std
    for name, value in given.items():
        if not isinstance(value, (list, tuple)) or len(value) != channels:
            raise ValueError(f"{name} must hold one number for each of the vae's {channels} channels, got {value!r}.")
    means = tuple(check_number(f"latents_mean[{i}]", each) for i, each in enumerate(given["latents_mean"]))
    stds = tuple(check_number(f"latents_std[{i}]", each, above=0.0) for i, each in enumerate(given["latents_std"]))
    return Latents(vae, means, stds, chunk)
