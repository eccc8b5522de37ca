"""The variables in which the probability flow is integrated."""

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
    """The map between (x, t) and (z, tau); see the head of this module. Times and scales are float64 on the host."""

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
