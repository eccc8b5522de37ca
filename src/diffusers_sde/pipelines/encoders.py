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

    The autoencoder sees images in [-1, 1]. One that returns a distribution is asked for its mode.

    Args:
        vae: The autoencoder, such as ``AutoencoderKL`` or ``AutoencoderTiny``.
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
        mean, std = self._moments(images)
        return torch.cat([(z - mean) / std for z in self.raw(images)])

    def raw(self, images: Tensor) -> Iterator[Tensor]:
        """What the autoencoder makes of images, bytes (B, C, H, W), chunk by chunk: float32."""
        for part in images.split(self.chunk):
            output = self.vae.encode(to_network(part, -1.0).to(self.vae.dtype))
            z = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents
            yield z.float()

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """See ``ImageEncoder``."""
        mean, std = self._moments(x)
        parts = ((part.float() * std + mean).to(self.vae.dtype) for part in x.split(self.chunk))
        return from_network(torch.cat([self.vae.decode(part).sample.float() for part in parts]), -1.0, 1.0)

    def image_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """See ``ImageEncoder``."""
        factor = downsampling_of(self.vae)
        return (self.vae.config.out_channels, *(factor * side for side in sample_shape[1:]))

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(each, device=like.device).reshape(-1, 1, 1) for each in (self.mean, self.std))
        return mean, std


def downsampling_of(vae: Any) -> int:
    """How many pixels along a side one latent stands for."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def latent_channels_of(vae: Any) -> int:
    """Channels of the latents of an autoencoder."""
    return int(vae.config.latent_channels)


def latents_of(vae: Any, mean: Sequence[float] | None, std: Sequence[float] | None) -> Latents:
    """The latents of an autoencoder, with its config's scale and shift where nothing else is given.

    With the names of diffusers' configs, x_0 = (z - shift_factor) scaling_factor.

    Args:
        vae: The autoencoder.
        mean: Mean of each channel, or None.
        std: Standard deviation of each channel, or None.

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
    return Latents(vae, means, stds)
