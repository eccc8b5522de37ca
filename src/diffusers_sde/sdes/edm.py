"""EDM's path: time is the noise level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import SDE


@dataclass(frozen=True)
class EDMSDE(SDE):
    """alpha = 1, sigma(t) = t: dx = sqrt(2 t) dw (Karras et al. 2022, arXiv:2206.00364, Table 1)."""

    t_min: float = 0.002
    t_max: float = 80.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _log_sigma(self, t: Tensor) -> Tensor:
        return torch.log(t)

    def _time_of(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-0.5 * log_snr)
