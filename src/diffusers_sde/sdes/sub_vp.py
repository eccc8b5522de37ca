"""Sub-variance-preserving SDE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .vp import LinearBetaSDE


@dataclass(frozen=True)
class SubVPSDE(LinearBetaSDE):
    """Sub-VP SDE: dx = -beta/2 x dt + sqrt(beta (1 - exp(-2 B))) dw (Song et al. 2021, eq. 12).

    alpha = exp(-B/2) as for VP, but sigma = 1 - exp(-B): VP's variance, as a standard deviation. Its noise near the
    data is far smaller than VP's (1e-6 against 1e-3 at t = 1e-5), so grids and step sizes of VP do not carry over.
    """

    def _log_sigma(self, t: Tensor) -> Tensor:
        return torch.log(-torch.expm1(-self._integral_beta(t)))

    def _time_of(self, log_snr: Tensor) -> Tensor:
        # With k = exp(-log_snr) the standard deviation w = 1 - exp(-B) solves w^2 = k (1 - w).
        half = 0.5 * log_snr
        w = 2.0 / (1.0 + torch.sqrt(1.0 + 4.0 * torch.exp(log_snr)))
        small = 2.0 * torch.exp(-half) / (torch.exp(-half) + torch.sqrt(torch.exp(-log_snr) + 4.0))
        # exp(-B) = 1 - w = w^2 / k: the first form is exact for small noise, the second for large noise.
        integral = torch.where(log_snr > 0, -torch.log1p(-small), -(2.0 * torch.log(w) + log_snr))
        return self._time_of_integral(integral)
