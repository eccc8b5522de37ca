"""Variance-exploding SDE, the continuous limit of SMLD."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..basics.checks import check_integer, check_ordered
from .base import SDE


@dataclass(frozen=True)
class VESDE(SDE):
    """Variance-exploding SDE: alpha = 1, sigma(t) = sigma_min (sigma_max / sigma_min)^t.

    dx = sigma(t) sqrt(2 log(sigma_max / sigma_min)) dw (Song et al. 2021, eq. 30). The standard deviation of x_t given
    x_0 is sigma(t) itself, as in the official code, so that x at t = 0 still carries noise sigma_min.

    Args:
        sigma_min: Smallest noise, in units of the data.
        sigma_max: Largest noise; about the largest distance between two data points (Song & Ermon 2020). The paper's
            0.01 and 50 belong to images in [0, 1]: rescaling the data rescales both.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ordered("sigma_min", self.sigma_min, "sigma_max", self.sigma_max, above=0.0)

    @property
    def prior_std(self) -> float:
        """sigma(t_max): sigma_max for t_max = 1."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** self.t_max

    def _log_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _log_sigma(self, t: Tensor) -> Tensor:
        return math.log(self.sigma_min) + t * math.log(self.sigma_max / self.sigma_min)

    def _time_of(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


def smld_sigmas(num_scales: int, sigma_min: float = 0.01, sigma_max: float = 50.0) -> Tensor:
    """SMLD's geometric noise scales sigma_1 < ... < sigma_N, float64 (Song & Ermon 2019).

    They are the VE SDE's sigma at the times (i - 1) / (N - 1): training on them is training on that grid.
    """
    num_scales = check_integer("num_scales", num_scales, at_least=2)
    return VESDE(sigma_min, sigma_max).sigma(torch.linspace(0.0, 1.0, num_scales, dtype=torch.float64))
