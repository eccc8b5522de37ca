"""Correctors: Langevin MCMC at a fixed time, which leaves p_t invariant up to its step size.

    x <- x + step * score + sqrt(2 step) z

Each call of a corrector is a model call of its own. To reuse the predictor's score would be another algorithm, which is
biased.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..basics.checks import check_choice
from ..sdes import SDE


class Correction(NamedTuple):
    """One corrector call for each of n levels, each of shape (n,), float64. ``snr`` is one number, or one for each.

    Where ``langevin`` is None, ``x``, ``x0`` and ``noise`` are the coefficients of the whole update. Otherwise ``x``
    and ``x0`` give the score, and the step size is langevin (|z| / |score|)^2, which is known only when z and the score
    are.
    """

    x: Tensor
    x0: Tensor
    noise: Tensor
    langevin: Tensor | None = None


def _step_ratio(sde: SDE, t: Tensor, s: Tensor) -> Tensor:
    """(alpha_t / alpha_s)^2 to the next level s: DDPM's alpha_i = 1 - beta_i on its own grid, 1 for VE.

    Algorithm 5 of the paper writes alpha_i; the official code takes it as 1 - beta_i of a table of N steps. The ratio
    is the same number there and stays right for any number of steps. s = NaN stands for the data, where alpha = 1.
    """
    log_alpha_s = torch.where(torch.isnan(s), torch.zeros_like(t), sde.log_alpha(torch.where(torch.isnan(s), t, s)))
    return torch.exp(2.0 * (sde.log_alpha(t) - log_alpha_s))


def langevin(sde: SDE, t: Tensor, s: Tensor, snr: Tensor | float) -> Correction:
    """Langevin corrector, step = 2 alpha (snr |z| / |score|)^2 (Song et al. 2021, Algorithms 4 and 5).

    The step size comes from the same z and score that it multiplies. This widens p_t by about 4/d for a sample of d
    dimensions. For images that is negligible, but in one or two dimensions the step size has no finite mean: use
    ``annealed_langevin`` there.
    """
    precision = torch.exp(-2.0 * sde.log_sigma(t))
    return Correction(-precision, sde.alpha(t) * precision, torch.zeros_like(t), 2.0 * _step_ratio(sde, t, s) * snr**2)


def annealed_langevin(sde: SDE, t: Tensor, s: Tensor, snr: Tensor | float) -> Correction:
    """Annealed Langevin dynamics, step = 2 alpha (snr sigma_t)^2 (Song & Ermon 2019; the official ``ald``)."""
    relative = 2.0 * _step_ratio(sde, t, s) * snr**2
    sigma = sde.sigma(t)
    return Correction(1.0 - relative, sde.alpha(t) * relative, torch.sqrt(2.0 * relative) * sigma)


def ornstein_uhlenbeck(sde: SDE, t: Tensor, s: Tensor, snr: Tensor | float) -> Correction:
    """Langevin dynamics with its linear part exact: x <- e^-h x + (1 - e^-h) alpha x0_hat + sqrt(1 - e^-2h) sigma z.

    h = 2 snr^2, the step of ``annealed_langevin`` in units of sigma^2. For a fixed x0_hat the dynamics is an
    Ornstein-Uhlenbeck process around alpha x0_hat, which is solved here without error. It is stable for every h and
    exact on point data. For data of standard deviation c a call changes the variance by exactly
    -(1 - e^-h)^2 sigma^2 alpha^2 c^2 / (alpha^2 c^2 + sigma^2). It is the same as going up in noise by the exact
    transition and down again by a first-order step. It needs a much larger ``snr`` than the other two correctors: 0.3
    gives h = 0.18.
    """
    h = torch.zeros_like(t) + 2.0 * snr**2
    forget = -torch.expm1(-h)
    return Correction(1.0 - forget, sde.alpha(t) * forget, torch.sqrt(-torch.expm1(-2.0 * h)) * sde.sigma(t))


CORRECTORS: dict[str, Callable[[SDE, Tensor, Tensor, Tensor | float], Correction]] = {
    "langevin": langevin,
    "annealed_langevin": annealed_langevin,
    "ornstein_uhlenbeck": ornstein_uhlenbeck,
}


def get_corrector(name: str) -> Callable[[SDE, Tensor, Tensor, Tensor | float], Correction]:
    """Look a corrector up by name.

    Raises:
        ValueError: Unknown name.
    """
    return CORRECTORS[check_choice("corrector", name, (None, *CORRECTORS))]
