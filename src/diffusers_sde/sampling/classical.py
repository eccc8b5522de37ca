"""Predictors with no memory beyond their own interval: the paper's, ancestral sampling and Heun's method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..basics.checks import check_choice
from ..sdes import SDE
from .stages import ESTIMATE, Predictor, Stage

VARIANCE_TYPES = (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


def _with_score(sde: SDE, t: Tensor, x: Tensor, score: Tensor, noise: Tensor) -> Stage:
    """A stage given by its coefficient of the score, (alpha x0_hat - x_t) / sigma^2."""
    per_variance = score * torch.exp(-2.0 * sde.log_sigma(t))
    return Stage(x - per_variance, sde.alpha(t) * per_variance, noise)


@dataclass(frozen=True)
class EulerMaruyama(Predictor):
    """Euler-Maruyama on the reverse SDE; Euler on the probability-flow ODE for stochasticity 0.

    x_s = x_t - [f x_t - (1 + eta^2)/2 g^2 score] (t - s) + eta g sqrt(t - s) z (Song et al. 2021, eq. 6 and 13).
    """

    finite_at_zero_snr: ClassVar[bool] = False

    def stages(self, sde: SDE, times: Tensor, stochasticity: Tensor | float) -> list[Stage]:
        """See ``Predictor.stages``."""
        t, dt = times[:-1], times[:-1] - times[1:]
        g2 = sde.g2(t)
        score = 0.5 * (1.0 + stochasticity**2) * g2 * dt
        return [_with_score(sde, t, 1.0 - sde.f(t) * dt, score, stochasticity * torch.sqrt(g2 * dt))]


@dataclass(frozen=True)
class ReverseDiffusion(Predictor):
    """The forward discretisation, reversed: x_s = (2 - a) x_t + v score + sqrt(v) z (Song et al. 2021, eq. 46).

    a and v come from the exact transition kernel x_t | x_s ~ N(a x_s, v I). For VP they are DDPM's sqrt(1 - beta) and
    beta, for VE they are SMLD's 1 and sigma_t^2 - sigma_s^2. The probability flow takes half the score and no noise.
    """

    def stages(self, sde: SDE, times: Tensor, stochasticity: Tensor | float) -> list[Stage]:
        """See ``Predictor.stages``."""
        t, s = times[:-1], times[1:]
        a, v = sde.transition(s, t)
        return [_with_score(sde, t, 2.0 - a, 0.5 * (1.0 + stochasticity**2) * v, stochasticity * v.sqrt())]


@dataclass(frozen=True)
class Ancestral(Predictor):
    """Ancestral sampling: x_s ~ q(x_s | x_t, x_0 = x0_hat), for every SDE.

    The variance is eta^2 sigma_s^2 v / sigma_t^2 with v of the transition kernel. eta = 1 is DDPM's posterior (Ho et
    al. 2020, eq. 6-7) and SMLD's (Song et al. 2021, eq. 47); eta = 0 is DDIM and values between are DDIM's eta (Song et
    al. 2020, arXiv:2010.02502, eq. 12).

    Args:
        variance_type: One of diffusers' names. With ``fixed_large`` and ``fixed_large_log`` the noise has the variance
            eta^2 v instead, DDPM's beta, as in the official code. The other names mean the posterior variance.
    """

    variance_type: str | None = "fixed_small"

    def __post_init__(self) -> None:
        check_choice("variance_type", self.variance_type, VARIANCE_TYPES)

    def stages(self, sde: SDE, times: Tensor, stochasticity: Tensor | float) -> list[Stage]:
        """See ``Predictor.stages``."""
        t, s = times[:-1], times[1:]
        _, v = sde.transition(s, t)
        sigma_t, sigma_s = sde.sigma(t), sde.sigma(s)
        std = stochasticity * sigma_s * v.sqrt() / sigma_t
        x = torch.sqrt(sigma_s.square() - std.square()) / sigma_t
        noise = stochasticity * v.sqrt() if self.variance_type in ("fixed_large", "fixed_large_log") else std
        return [Stage(x, sde.alpha(s) - sde.alpha(t) * x, noise)]


@dataclass(frozen=True)
class Heun(Predictor):
    """Heun's method on the probability-flow ODE dx = x0_hat d alpha + eps_hat d sigma; second order, two calls.

    Euler's method on this form is DDIM. The second call is made at the Euler point, and each integrand is replaced by
    the mean of its values at the two ends: x_s += (D_s - D_t) (d alpha - d sigma alpha_s/sigma_s) / 2. For VE this is
    Algorithm 1 of Karras et al. 2022 (arXiv:2206.00364), for rectified flow it is Heun's method on the velocity.
    """

    calls: ClassVar[int] = 2
    deterministic: ClassVar[bool] = True

    @property
    def order(self) -> int:
        """See ``Predictor.order``."""
        return 2

    def stages(self, sde: SDE, times: Tensor, stochasticity: Tensor | float) -> list[Stage]:
        """See ``Predictor.stages``."""
        t, s = times[:-1], times[1:]
        (euler,) = Ancestral().stages(sde, times, 0.0)
        alpha_s, sigma_s = sde.alpha(s), sde.sigma(s)
        weight = 0.5 * ((alpha_s - sde.alpha(t)) - (sigma_s - sde.sigma(t)) * alpha_s / sigma_s)
        ones, zeros = torch.ones_like(weight), torch.zeros_like(weight)
        return [euler._replace(keep=ESTIMATE), Stage(ones, weight, zeros, (-weight,), t=s)]


@dataclass(frozen=True)
class NoPredictor(Predictor):
    """Corrector-only sampling: the sample is carried from level to level unchanged."""

    calls: ClassVar[int] = 0

    def stages(self, sde: SDE, times: Tensor, stochasticity: Tensor | float) -> list[Stage]:
        """See ``Predictor.stages``."""
        return []
