"""The finest floating point that a device computes in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WITHOUT_FLOAT64 = frozenset({"mps"})  # types of devices


def finest_dtype(device: torch.device | str) -> torch.dtype:
    """float64, or float32 on a device that has no float64."""
    return torch.float32 if torch.device(device).type in WITHOUT_FLOAT64 else torch.float64


def finest(x: Tensor) -> Tensor:
    """The same numbers in the finest floating point of the device that they are on."""
    return x.to(finest_dtype(x.device))


def on_device(numbers: Tensor | float | Sequence[float], device: torch.device | str) -> Tensor:
    """Numbers of the host on a device, in its finest floating point.

    The type changes before the place, and in the backward pass after it: a device without float64 does not copy to it.
    """
    return torch.as_tensor(numbers, dtype=finest_dtype(device)).to(device)


def uniform_numbers(
    shape: int | Sequence[int],
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform numbers in [0, 1), in the finest floating point of the device, by default the generator's or the CPU."""
    if device is None:
        device = "cpu" if generator is None else generator.device
    return torch.rand(shape, generator=generator, dtype=finest_dtype(device), device=device)
