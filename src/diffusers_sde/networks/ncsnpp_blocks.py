"""The parts of NCSN++ and DDPM++ (Song et al. 2021, appendix H)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from .resampling import Doubled, Halved, conv3x3, set_initial

MOST_GROUPS, GROUP_CHANNELS = 32, 4
NEXT_TO_ZERO = 1e-10  # scale of the last layer of each branch before training, which so begins as no branch
LONGEST_PERIOD = 10_000.0  # of the positional embedding, over 2 pi


def group_norm(channels: int, groups: int | None) -> nn.GroupNorm:
    """A normalisation in ``groups``; for None in groups of 4 channels, but in 32 groups at most.

    Raises:
        ValueError: The channels cannot be divided so.
    """
    wanted = min(channels // GROUP_CHANNELS, MOST_GROUPS) if groups is None else groups
    if wanted < 1 or channels % wanted:
        raise ValueError(
            f"block_out_channels must be multiples of the groups of each normalisation "
            f"(norm_num_groups, or a quarter of the channels but 32 at most), got {channels} in {wanted} groups."
        )
    return nn.GroupNorm(wanted, channels, eps=1e-6)


def positional_embedding(position: Tensor, channels: int) -> Tensor:
    """Sines and then cosines of ``position`` at frequencies from 1 to 1e-4, float32, shape (B, channels)."""
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=position.device) / max(half - 1, 1)
    angles = position.float()[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * exponents)
    return torch.cat([angles.sin(), angles.cos()], 1)


class FourierFeatures(nn.Module):
    """Sines and cosines of 2 pi W u for fixed Gaussian frequencies W (Tancik et al. 2020, arXiv:2006.10739).

    The frequencies stay in float32 in a network of lower precision: an angle is hundreds of turns, of which rounding to
    bfloat16 would leave no digit.

    Args:
        channels: Number of frequencies; there are twice as many features.
        scale: Their standard deviation.
    """

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        # A parameter and no buffer, although it is fixed: whatever copies a network's averages copies it too.
        self.frequencies = nn.Parameter(torch.randn(channels) * scale, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourierFeatures:
        frequencies = self.frequencies.data
        super()._apply(fn, recurse)
        if self.frequencies.dtype != frequencies.dtype:
            self.frequencies.data = frequencies.to(self.frequencies.device)
        return self

    def forward(self, u: Tensor) -> Tensor:
        """Features, float32, shape (B, 2 channels), of ``u``, shape (B,)."""
        angles = u.float()[:, None] * self.frequencies * (2.0 * math.pi)
        return torch.cat([angles.sin(), angles.cos()], 1)


class ResidualBlock(nn.Module):
    """A residual block of DDPM or of BigGAN, which may resample on both of its branches.

    norm, SiLU, [resampling,] conv, + embedding, norm, SiLU, dropout, conv; and the input, [resampled and] by a 1 x 1
    convolution where channels change or where it resamples. With ``rescale`` the sum is divided by sqrt(2).

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        embedding_channels: Of the embedding of noise level and class; None without one.
        resample: What resamples: a parameter-free module, or None.
        groups: See ``group_norm``.
        dropout: Its probability.
        rescale: Whether the sum keeps the variance.
        biggan: Whether it is BigGAN's, which may resample; the two begin with other shortcuts.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int | None,
        resample: Halved | Doubled | None,
        groups: int | None,
        dropout: float,
        rescale: bool,
        biggan: bool,
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.embedding = (
            None if embedding_channels is None else set_initial(nn.Linear(embedding_channels, out_channels))
        )
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3x3(out_channels, out_channels, NEXT_TO_ZERO)
        changes = in_channels != out_channels or resample is not None
        self.shortcut = (
            set_initial(nn.Conv2d(in_channels, out_channels, 1), 1.0 if biggan else 0.1) if changes else None
        )
        self.resample = resample
        self.rescale, self.biggan = rescale, biggan

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W'); ``embedding`` of shape (B, E)."""
        h = silu(self.norm1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h)
        if self.embedding is not None:
            assert embedding is not None
            h = h + self.embedding(silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(silu(self.norm2(h))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        return rescaled_sum(x, h, self.rescale)


class AttentionBlock(nn.Module):
    """Self-attention of one head between the pixels, added to the input.

    Args:
        channels: Of the image, and of the head.
        groups: See ``group_norm``.
        rescale: Whether the sum is divided by sqrt(2).
    """

    def __init__(self, channels: int, groups: int | None, rescale: bool) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.query = set_initial(nn.Linear(channels, channels), 0.1)
        self.key = set_initial(nn.Linear(channels, channels), 0.1)
        self.value = set_initial(nn.Linear(channels, channels), 0.1)
        self.out = set_initial(nn.Linear(channels, channels), NEXT_TO_ZERO)
        self.rescale = rescale

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        pixels = self.norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1, H W, C)
        attended = scaled_dot_product_attention(self.query(pixels), self.key(pixels), self.value(pixels))
        h = self.out(attended)[:, 0].transpose(1, 2).reshape(x.shape)
        return rescaled_sum(x, h, self.rescale)


class CombinedImage(nn.Module):
    """The image at a lower resolution, by a 1 x 1 convolution, beside the features of the network or added to them.

    Args:
        image_channels: Of the image.
        channels: Of the features.
        concatenate: Whether the two are concatenated, which doubles the channels.
    """

    def __init__(self, image_channels: int, channels: int, concatenate: bool) -> None:
        super().__init__()
        self.conv = set_initial(nn.Conv2d(image_channels, channels, 1))
        self.concatenate = concatenate

    def forward(self, image: Tensor, h: Tensor) -> Tensor:
        """(B, C, H, W) and (B, C', H, W) -> (B, C' or 2 C', H, W)."""
        projected = self.conv(image)
        return torch.cat([projected, h], 1) if self.concatenate else projected + h


class NormalizedConv(nn.Module):
    """norm, SiLU and a 3 x 3 convolution: the step from features to an image.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        groups: See ``group_norm``.
        scale: Initial variance; see ``set_initial``.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int | None, scale: float = NEXT_TO_ZERO) -> None:
        super().__init__()
        self.norm = group_norm(in_channels, groups)
        self.conv = conv3x3(in_channels, out_channels, scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return self.conv(silu(self.norm(x)))


def rescaled_sum(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    """x + h, over sqrt(2) with ``rescale``, which keeps the variance of independent terms."""
    return (x + h) * math.sqrt(0.5) if rescale else x + h
