"""Variance-preserving SDE, the continuous limit of DDPM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..basics.checks import check_number, check_ordered
from .base import SDE


@dataclass(frozen=True)
class LinearBetaSDE(SDE):
    """What VP and sub-VP share: dx = -beta(t)/2 x dt + ..., beta(t) = beta_min + t (beta_max - beta_min).

    alpha(t) = exp(-B(t)/2) with B(t) = integral of beta from 0 to t; both start from N(0, I). Equal betas give the
    constant beta(t), with B(t) = beta_min t; a path of that kind is usually longer, such as t_max = 10 for beta = 1.

    Args:
        beta_min: beta(0), in 1/time.
        beta_max: beta(1), in 1/time, whatever ``t_max`` is. A DDPM table beta_1..beta_N corresponds to N beta_1 and
            N beta_N.

    Raises:
        ValueError: ``beta_min`` is negative or above ``beta_max``, or both are 0.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ordered("beta_min", self.beta_min, "beta_max", self.beta_max, at_least=0.0, may_be_equal=True)
        check_number("beta_max", self.beta_max, above=0.0)

    @property
    def prior_std(self) -> float:
        """1: the prior is N(0, I), which p_t reaches to within alpha(t_max)."""
        return 1.0

    @classmethod
    def from_ends(cls, beta_start: float, beta_end: float, t_max: float = 1.0) -> LinearBetaSDE:
        """The SDE on [0, t_max] with beta(0) = ``beta_start`` and beta(t_max) = ``beta_end``, in 1/time."""
        # For t_max = 1 and for equal betas this is beta_end itself, without round-off.
        return cls(beta_start, beta_end + (beta_start - beta_end) * (1.0 - 1.0 / t_max), t_max=t_max)

    def beta(self, t: Tensor) -> Tensor:
        """beta(t), in 1/time."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral_beta(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def _time_of_integral(self, integral: Tensor) -> Tensor:
        # The root of beta_min t + (beta_max - beta_min) t^2 / 2 = B in the form without cancellation.
        root = torch.sqrt(self.beta_min**2 + 2.0 * (self.beta_max - self.beta_min) * integral)
        return 2.0 * integral / (self.beta_min + root)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * self._integral_beta(t)


@dataclass(frozen=True)
class VPSDE(LinearBetaSDE):
    """Variance-preserving SDE: dx = -beta/2 x dt + sqrt(beta) dw (Song et al. 2021, eq. 11 and 32).

    alpha = exp(-B/2) and sigma^2 = 1 - exp(-B) with B(t) = beta_min t + (beta_max - beta_min) t^2 / 2.
    """

    def _log_sigma(self, t: Tensor) -> Tensor:
        return 0.5 * torch.log(-torch.expm1(-self._integral_beta(t)))

    def _time_of(self, log_snr: Tensor) -> Tensor:
        return self._time_of_integral(torch.nn.functional.softplus(-log_snr))
