"""Cosine schedule in continuous time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..basics.checks import check_number
from .base import SDE


@dataclass(frozen=True)
class CosineSDE(SDE):
    """Variance-preserving path with alpha(t) = cos((t + s)/(1 + s) pi/2) / cos(s/(1 + s) pi/2).

    Nichol & Dhariwal 2021 (arXiv:2102.09672, eq. 17) in continuous time and without the cap on beta; with offset
    s = 0 it is alpha = cos(pi t / 2), sigma = sin(pi t / 2), f = -(pi/2) tan(pi t / 2). alpha vanishes at t = 1.

    Args:
        offset: The s above; 0.008 is the value of the discrete schedule.
    """

    offset: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("offset", self.offset, at_least=0.0, below=1.0)

    @property
    def prior_std(self) -> float:
        """1: the prior is N(0, I)."""
        return 1.0

    @property
    def _angle_at_zero(self) -> float:
        return 0.5 * math.pi * self.offset / (1.0 + self.offset)

    def _log_alpha(self, t: Tensor) -> Tensor:
        # cos of the angle as the sine of its complement, which is exactly 0 at t = 1 in every precision.
        return torch.log(torch.sin(0.5 * math.pi * (1.0 - t) / (1.0 + self.offset))) - math.log(
            math.cos(self._angle_at_zero)
        )

    def _log_sigma(self, t: Tensor) -> Tensor:
        # cos^2 b - cos^2 a = sin(a + b) sin(a - b): no cancellation at small t.
        b = self._angle_at_zero
        difference = 0.5 * math.pi * t / (1.0 + self.offset)
        product = torch.sin(difference + 2.0 * b) * torch.sin(difference)
        return 0.5 * torch.log(product) - math.log(math.cos(b))

    def _time_of(self, log_snr: Tensor) -> Tensor:
        b = self._angle_at_zero
        cos2 = math.cos(b) ** 2 * torch.sigmoid(log_snr)
        sin2 = math.sin(b) ** 2 + math.cos(b) ** 2 * torch.sigmoid(-log_snr)
        angle = torch.atan2(sin2.sqrt(), cos2.sqrt())
        return (angle - b) * (1.0 + self.offset) * 2.0 / math.pi
