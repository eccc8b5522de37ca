"""Rectified flow (flow matching with the straight path)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import SDE


@dataclass(frozen=True)
class RectifiedFlowSDE(SDE):
    """alpha = 1 - t, sigma = t: dx = -x/(1 - t) dt + sqrt(2 t/(1 - t)) dw, with N(0, I) at t = 1.

    Its probability-flow ODE is the straight-line flow of Liu et al. 2022 (arXiv:2209.03003) and Lipman et al. 2022
    (arXiv:2210.02747); the SDE with the same marginals gives such a model stochastic samplers. alpha vanishes at
    t = 1, where f and g^2 are infinite: predictors that evaluate them there start just below.
    """

    def _log_alpha(self, t: Tensor) -> Tensor:
        return torch.log1p(-t)

    def _log_sigma(self, t: Tensor) -> Tensor:
        return torch.log(t)

    def _time_of(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr)
