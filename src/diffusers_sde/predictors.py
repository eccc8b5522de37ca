"""Predictors: one step of the reverse SDE or the probability-flow ODE, as coefficients.

A predictor maps a grid of times t_0 > t_1 > ... > t_n to *stages*, one per model call of an interval: coefficients of
x_t, of x0_hat and of fresh unit noise z (and of earlier x0_hats) for every interval at once, in float64:

    x_s = x * x_t + x0 * x0_hat(x_t, t) + noise * z + sum_k history_k * x0_hat_{k calls ago}.

``stochasticity`` (eta) interpolates between the probability-flow ODE, 0, and Anderson's reverse SDE, 1, through
dx = [f x - (1 + eta^2)/2 g^2 score] dt + eta g dw; every value has the same marginals. A new predictor is one function
and one line in ``PREDICTORS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .sdes import SDE


class Stage(NamedTuple):
    """Coefficients of one model call for each of n intervals, each of shape (n,), float64.

    Attributes:
        x: Of the sample.
        x0: Of the denoised estimate at this call.
        noise: Of fresh unit noise.
        history: Of the denoised estimates of earlier calls, most recent first; entries where none exists yet are 0.
        at_target: The network is called at the interval's end s instead of its start t.
        remember: A later stage or interval uses this call's estimate.
    """

    x: Tensor
    x0: Tensor
    noise: Tensor
    history: tuple[Tensor, ...] = ()
    at_target: bool = False
    remember: bool = False


@dataclass(frozen=True)
class Predictor:
    """A registered predictor.

    Attributes:
        stages: (sde, times, stochasticity, options) -> stages.
        calls: Model calls per interval, the number of stages.
        finite_at_zero_snr: Whether it can start where alpha(t) = 0; f and g^2 are infinite there.
        deterministic: Integrates the probability-flow ODE only.
    """

    stages: Callable[[SDE, Tensor, float, PredictorOptions], list[Stage]]
    calls: int = 1
    finite_at_zero_snr: bool = True
    deterministic: bool = False


@dataclass(frozen=True)
class PredictorOptions:
    """Options that some predictors read.

    Attributes:
        solver_order: 1, 2 or 3, for ``exponential``.
        large_variance: Noise of the ``ancestral`` predictor from beta instead of the posterior variance.
    """

    solver_order: int = 1
    large_variance: bool = False

    def __post_init__(self) -> None:
        if self.solver_order not in (1, 2, 3):
            raise ValueError(f"solver_order must be 1, 2 or 3, got {self.solver_order!r}.")


def _with_score(sde: SDE, t: Tensor, x: Tensor, score: Tensor, noise: Tensor) -> Stage:
    """A stage given by its coefficient of the score, (alpha x0_hat - x_t) / sigma^2."""
    per_variance = score * torch.exp(-2.0 * sde.log_sigma(t))
    return Stage(x - per_variance, sde.alpha(t) * per_variance, noise)


def euler_maruyama(sde: SDE, times: Tensor, stochasticity: float, options: PredictorOptions) -> list[Stage]:
    """Euler-Maruyama on the reverse SDE; Euler on the probability-flow ODE for stochasticity 0.

    x_s = x_t - [f x_t - (1 + eta^2)/2 g^2 score] (t - s) + eta g sqrt(t - s) z (Song et al. 2021, eq. 6 and 13).
    """
    t, dt = times[:-1], times[:-1] - times[1:]
    g2 = sde.g2(t)
    score = 0.5 * (1.0 + stochasticity**2) * g2 * dt
    return [_with_score(sde, t, 1.0 - sde.f(t) * dt, score, stochasticity * torch.sqrt(g2 * dt))]


def reverse_diffusion(sde: SDE, times: Tensor, stochasticity: float, options: PredictorOptions) -> list[Stage]:
    """The forward discretisation, reversed: x_s = (2 - a) x_t + v score + sqrt(v) z (Song et al. 2021, eq. 46).

    a and v are of the exact transition kernel x_t | x_s ~ N(a x_s, v I), which is DDPM's sqrt(1 - beta) and beta for
    VP and SMLD's 1 and sigma_t^2 - sigma_s^2 for VE; half the score and no noise for the probability flow.
    """
    t, s = times[:-1], times[1:]
    a, v = sde.transition(s, t)
    return [_with_score(sde, t, 2.0 - a, 0.5 * (1.0 + stochasticity**2) * v, stochasticity * v.sqrt())]


def ancestral(sde: SDE, times: Tensor, stochasticity: float, options: PredictorOptions) -> list[Stage]:
    """Ancestral sampling: x_s ~ q(x_s | x_t, x_0 = x0_hat), for every SDE.

    The variance is eta^2 sigma_s^2 v / sigma_t^2 with v of the transition kernel. eta = 1 is DDPM's posterior (Ho et
    al. 2020, eq. 6-7) and SMLD's (Song et al. 2021, eq. 47); eta = 0 is DDIM and values between are DDIM's eta (Song et
    al. 2020, arXiv:2010.02502, eq. 12). ``large_variance`` puts v itself in the noise, as the official code.
    """
    t, s = times[:-1], times[1:]
    _, v = sde.transition(s, t)
    sigma_t, sigma_s = sde.sigma(t), sde.sigma(s)
    std = stochasticity * sigma_s * v.sqrt() / sigma_t
    x = torch.sqrt(sigma_s.square() - std.square()) / sigma_t
    noise = stochasticity * v.sqrt() if options.large_variance else std
    return [Stage(x, sde.alpha(s) - sde.alpha(t) * x, noise)]


def exponential(sde: SDE, times: Tensor, stochasticity: float, options: PredictorOptions) -> list[Stage]:
    """Exponential integrator: the linear part and the noise exact, x0_hat extrapolated in lambda = log(alpha/sigma).

    With h = lambda_s - lambda_t and q = 1 + eta^2 the solution of the SDE is

        x_s = sigma_s/sigma_t exp(-eta^2 h) x_t + alpha_s q int exp(-q (lambda_s - l)) x0_hat(l) dl
              + sigma_s sqrt(1 - exp(-2 eta^2 h)) z

    (Lu et al. 2022, arXiv:2211.01095, appendix A). Order p takes x0_hat(l) as the polynomial through the last p
    estimates, with exact weights and no extra model call; fewer at the start. Order 1 is DDIM for eta = 0 and ancestral
    sampling for eta = 1. The integral needs no special case at lambda = -infinity, where alpha(t) = 0.
    """
    log_sigma, lam = sde.log_sigma(times), 0.5 * sde.log_snr(times)
    alpha_s, h = sde.alpha(times[1:]), lam[1:] - lam[:-1]
    eta2, q = stochasticity**2, 1.0 + stochasticity**2
    decay = eta2 * h if eta2 > 0 else torch.zeros_like(h)
    x = torch.exp(log_sigma[1:] - log_sigma[:-1] - decay)
    noise = torch.exp(log_sigma[1:]) * torch.sqrt(-torch.expm1(-2.0 * decay))
    weights = _adams_weights(h, q, options.solver_order)
    history = tuple(alpha_s * w for w in weights[1:])
    return [Stage(x, alpha_s * weights[0], noise, history, remember=options.solver_order > 1)]


def _adams_weights(h: Tensor, q: float, order: int) -> list[Tensor]:
    """Weights of the last ``order`` estimates in q int_0^h exp(q (w - h)) x0_hat(lambda_t + w) dw.

    The Newton form of the interpolation polynomial through lambda_t, the time before, ...: a divided difference over
    an infinite interval is 0, which is its limit.
    """
    moments = [_moment(h, q, j) for j in range(order)]
    weights = [moments[0]] + [torch.zeros_like(h) for _ in range(order - 1)]
    # h1, h2: distances from lambda_t back to the two estimates before it; infinite where there are none.
    infinite = torch.full_like(h[:1], float("inf"))
    h1 = torch.cat([infinite, h[:-1]])
    if order > 1:
        slope = moments[1] / h1
        weights[0], weights[1] = weights[0] + slope, weights[1] - slope
    if order > 2:
        # [D0, D1, D2] = ((D0 - D1)/h1 - (D1 - D2)/(h2 - h1)) / h2 times the integral of exp(q (w - h)) w (w + h1).
        h2 = h1 + torch.cat([infinite, h1[:-1]])
        exists = torch.isfinite(h2)
        curvature = torch.where(exists, (moments[2] + h1 * moments[1]) / h2, torch.zeros_like(h))
        back = torch.where(exists, h2 - h1, infinite)
        weights[0] = weights[0] + curvature / h1
        weights[1] = weights[1] - curvature / h1 - curvature / back
        weights[2] = weights[2] + curvature / back
    return weights


def _moment(h: Tensor, q: float, j: int) -> Tensor:
    """Q int_0^h exp(q (w - h)) w^j dw, accurate for every h (h may be infinite for j = 0)."""
    if j == 0:
        return -torch.expm1(-q * h)
    nodes, quadrature = np.polynomial.legendre.leggauss(20)
    theta = torch.as_tensor(0.5 * (nodes + 1.0), device=h.device)
    half = torch.as_tensor(0.5 * quadrature, device=h.device)
    small = torch.where(torch.isfinite(h), h, torch.zeros_like(h)).clamp(max=1.0 / q).unsqueeze(-1)
    by_quadrature = q * small.squeeze(-1) ** (j + 1) * (torch.exp(q * small * (theta - 1.0)) * theta**j * half).sum(-1)
    by_recurrence = torch.where(torch.isfinite(h), h, torch.zeros_like(h)) ** j - (j / q) * _moment(h, q, j - 1)
    moment = torch.where(h * q <= 1.0, by_quadrature, by_recurrence)
    return torch.where(torch.isfinite(h), moment, torch.zeros_like(moment))


def heun(sde: SDE, times: Tensor, stochasticity: float, options: PredictorOptions) -> list[Stage]:
    """Heun's method on the probability-flow ODE dx = x0_hat d alpha + eps_hat d sigma; second order, two calls.

    Euler's method on this form is DDIM; the second call, at the Euler point, replaces both integrands by the mean of
    the two ends: x_s += (D_s - D_t) (d alpha - d sigma alpha_s/sigma_s) / 2. For VE this is Algorithm 1 of Karras et
    al. 2022 (arXiv:2206.00364), for rectified flow Heun on the velocity.
    """
    t, s = times[:-1], times[1:]
    (first,) = ancestral(sde, times, 0.0, options)
    alpha_s, sigma_s = sde.alpha(s), sde.sigma(s)
    weight = 0.5 * ((alpha_s - sde.alpha(t)) - (sigma_s - sde.sigma(t)) * alpha_s / sigma_s)
    ones, zeros = torch.ones_like(weight), torch.zeros_like(weight)
    return [first._replace(remember=True), Stage(ones, weight, zeros, (-weight,), at_target=True)]


def no_predictor(sde: SDE, times: Tensor, stochasticity: float, options: PredictorOptions) -> list[Stage]:
    """Corrector-only sampling: the sample is carried from level to level unchanged."""
    return []


PREDICTORS: dict[str, Predictor] = {
    "euler_maruyama": Predictor(euler_maruyama, finite_at_zero_snr=False),
    "reverse_diffusion": Predictor(reverse_diffusion),
    "ancestral": Predictor(ancestral),
    "exponential": Predictor(exponential),
    "heun": Predictor(heun, calls=2, deterministic=True),
    "none": Predictor(no_predictor, calls=0),
}


def get_predictor(name: str) -> Predictor:
    """Look a predictor up by name.

    Raises:
        ValueError: Unknown name.
    """
    if name not in PREDICTORS:
        raise ValueError(f"predictor must be one of {', '.join(PREDICTORS)}, got {name!r}.")
    return PREDICTORS[name]
