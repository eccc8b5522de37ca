"""The finest floating point that a device computes in."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = frozenset({"mps"})  # types of devices


def finest_dtype(device: torch.device | str) -> torch.dtype:
    """float64, or float32 on a device that has no float64."""
    return torch.float32 if torch.device(device).type in WITHOUT_FLOAT64 else torch.float64


def finest(x: Tensor) -> Tensor:
    """The same numbers in the finest floating point of the device that they are on."""
    return x.to(finest_dtype(x.device))
