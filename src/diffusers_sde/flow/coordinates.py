r"""The variables in which the probability flow is integrated.

Every Gaussian path has a deterministic flow with its marginals (Song et al. 2021, eq. 13). It is integrated here in

    z = (x - alpha m) / s,   s^2 = alpha^2 c^2 + sigma^2,      tau = asinh(c alpha / sigma),

with m and c the mean and standard deviation of the data, in which it becomes, for every SDE alike,

    dz / dtau = (x0_hat - m) / c - tanh(tau) z.

z keeps unit variance along the whole path, and the linear part is exact: for Gaussian data with this mean and variance
the right-hand side is zero. Where noise dominates, tau is proportional to alpha/sigma, so that alpha = 0 (rectified
flow and cosine at t = 1) is an ordinary point. Where the data dominate, tau is half the log-SNR plus a constant, which
spreads out the fine structure evenly. m and c need not be right, because they only decide how straight the flow is. The
density follows from

    d log p(z) / dtau = d tanh(tau) - (s / c) tr(d x0_hat / d x),

where the d before tanh is the number of dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..basics.checks import check_number
from ..sdes import SDE


@dataclass(frozen=True)
class FlowCoordinates:
    """The map between (x, t) and (z, tau); see the head of this module. Times and scales are float64 on the host.

    Args:
        sde: The SDE.
        t_low: Smallest time of the flow.
        t_high: Largest time of the flow.
        mean: m, the approximate mean of the data.
        std: c, the approximate standard deviation of the data.
    """

    sde: SDE
    t_low: float
    t_high: float
    mean: float
    std: float

    def tau_of(self, t: float) -> float:
        """tau = asinh(c alpha / sigma)."""
        return math.asinh(self.std * math.exp(0.5 * float(self.sde.log_snr(t))))

    def at(self, tau: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """(t, alpha, s) at ``tau``, float64 on the host, shape of ``tau``."""
        log_snr = 2.0 * (torch.log(torch.sinh(torch.from_numpy(tau))) - math.log(self.std))
        t = self.sde.time_of(log_snr).clamp(self.t_low, self.t_high)
        alpha = self.sde.alpha(t)
        return t, alpha, torch.sqrt((alpha * self.std).square() + self.sde.sigma(t).square())

    def to_z(self, x: Tensor, t: float) -> Tensor:
        """(x - alpha m) / s at time ``t``."""
        alpha, s = self._scales(t)
        return (x - alpha * self.mean) / s

    def to_x(self, z: Tensor, t: float) -> Tensor:
        """The inverse of ``to_z``."""
        alpha, s = self._scales(t)
        return s * z + alpha * self.mean

    def log_scale(self, t: float) -> float:
        """Log of s = dx/dz at time ``t``."""
        return math.log(self._scales(t)[1])

    def _scales(self, t: float) -> tuple[float, float]:
        alpha, sigma = float(self.sde.alpha(t)), float(self.sde.sigma(t))
        return alpha, math.hypot(alpha * self.std, sigma)


def check_flow_times(sde: SDE, t_start: float, t_end: float) -> None:
    """Check that the flow can run from one time to the other; a ``ValueError`` says which of the two is wrong."""
    for name, t in (("t_start", t_start), ("t_end", t_end)):
        check_number(name, t)
        if not (0.0 <= t <= sde.t_max) or math.isinf(float(sde.log_sigma(t))):
            raise ValueError(
                f"{name} must lie in (0, {sde.t_max}], where sigma is positive; got {t!r}. The smallest time of this "
                f"SDE is t_min = {sde.t_min!r}."
            )
    if t_start == t_end:
        raise ValueError(f"t_start and t_end must differ, got {t_start!r} twice.")
