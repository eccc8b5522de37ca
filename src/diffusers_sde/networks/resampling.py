"""Halving and doubling of images: by FIR filters, or by means and copies of pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, conv_transpose2d, interpolate, pad

from ..basics.checks import check_numbers


def fir_filter(kernel: Sequence[float]) -> Tensor:
    """The outer product of a kernel with itself, of sum 1, shape (n, n), float32.

    Raises:
        ValueError: ``kernel`` has fewer than two taps, or they sum to 0.
    """
    taps = check_numbers("fir_kernel", kernel, at_least=2)
    square = torch.outer(taps, taps)
    total = float(square.sum())
    if not 0.0 < total < float("inf"):
        raise ValueError(f"fir_kernel must be finite numbers that do not sum to 0, got {tuple(kernel)!r}.")
    return (square / total).float()


def set_initial(layer: nn.Module, scale: float = 1.0) -> Any:
    """Draw the weight with variance scale over the mean of its fans, uniformly, and zero the bias; return the layer."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))  # type: ignore[arg-type]
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def conv3x3(in_channels: int, out_channels: int, scale: float = 1.0) -> nn.Conv2d:
    """A convolution that keeps the side."""
    return set_initial(nn.Conv2d(in_channels, out_channels, 3, padding=1), scale)


class Resampler(nn.Module):
    """Base of what resamples: it holds the FIR filter, which no file of weights contains.

    Args:
        kernel: Taps of the filter along one axis; None for the filter-free kind.
    """

    fir: Tensor | None

    def __init__(self, kernel: Sequence[float] | None) -> None:
        super().__init__()
        self.register_buffer("fir", None if kernel is None else fir_filter(kernel), persistent=False)

    def _filtered(self, x: Tensor, before: int, after: int, stride: int = 1) -> Tensor:
        """The convolution of each channel of x with the filter, with zeros ``before`` and ``after`` each axis."""
        assert self.fir is not None
        weight = self.fir.flip(0, 1).to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return conv2d(pad(x, (before, after, before, after)), weight, stride=stride, groups=x.shape[1])


class Halved(Resampler):
    """Images of half the side, (B, C, H, W) -> (B, C, H/2, W/2): filtered, or the means of 2 x 2 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if self.fir is None:
            return avg_pool2d(x, 2)
        excess = len(self.fir) - 2
        return self._filtered(x, (excess + 1) // 2, excess // 2, stride=2)


class Doubled(Resampler):
    """Images of twice the side, (B, C, H, W) -> (B, C, 2H, 2W): zeros in between and filtered, or repeated pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if self.fir is None:
            return interpolate(x, scale_factor=2.0, mode="nearest")
        height, width = x.shape[-2:]
        # Zeros between the pixels take away three quarters of the brightness.
        weight = 4.0 * self.fir.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        cut = (len(self.fir) - 2) // 2 if len(self.fir) % 2 == 0 else (len(self.fir) - 3) // 2
        return conv_transpose2d(x, weight, stride=2, padding=cut, groups=x.shape[1])[..., : 2 * height, : 2 * width]


class HalvedConv(Resampler):
    """A learned 3 x 3 convolution that halves the side: of stride 2, behind the filter if there is one.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        kernel: See ``Resampler``.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[float] | None) -> None:
        super().__init__(kernel)
        self.conv = set_initial(nn.Conv2d(in_channels, out_channels, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H/2, W/2)."""
        if self.fir is None:
            return self.conv(pad(x, (0, 1, 0, 1)))
        both = len(self.fir)  # what the filter and the convolution take away, less the pixel that stride 2 skips
        return self.conv(self._filtered(x, (both + 1) // 2, both // 2))


class DoubledConv(Resampler):
    """A learned 3 x 3 convolution of images of twice the side.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        kernel: See ``Resampler``.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[float] | None) -> None:
        super().__init__(None)
        self.doubled = Doubled(kernel)
        self.conv = conv3x3(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', 2H, 2W)."""
        return self.conv(self.doubled(x))
