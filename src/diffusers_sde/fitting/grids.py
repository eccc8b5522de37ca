"""A time grid from one pass over a network, without optimisation, for any number of levels.

A rule of order p takes x0_hat along a path of the probability flow as a polynomial in lambda = log(alpha/sigma). Over a
step of length h it is wrong by about h^(p+1) |d^p x0_hat / dlambda^p|, and the rest of the path carries this error to
the data with a factor P(lambda). A grid of n points with the density rho takes steps of the length h = 1/(n rho), so
that the sum of all errors is about

    n^(-p) int k(lambda) rho(lambda)^(-p) dlambda,   k = P rms |d^p x0_hat / dlambda^p|,

which is least for rho proportional to k^(1/(p+1)).

For Gaussian data of standard deviation c and p = 1 all is known: with u = c^2/(c^2 + sigma^2/alpha^2) the derivative is
c sqrt(u) (1 - u), P is sqrt(u), and the density is sqrt(u (1 - u)), a hyperbolic secant around lambda = -log c. Its
points are uniform in atan(sigma/(alpha c)) (Sabour et al. 2024, arXiv:2404.14507, section 3.2).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..basics.checks import check_integer, check_number, check_tensor
from ..basics.precision import finest
from ..networks.denoisers import Denoiser
from ..sampling.exponential import Exponential
from ..sampling.loop import sample
from ..sampling.planning import make_plan
from ..sampling.time_grids import MOST_KNOTS, SECH_START
from ..sdes import SDE

BEGINNING_OF_PATH = 1e-9  # the beginning of a path, at which the log-SNR of the VP SDE is infinite


@torch.no_grad()
def profile_grid(
    denoiser: Denoiser,
    sde: SDE,
    noise: Tensor,
    last_sigma: float = 0.01,
    levels: int = 64,
    order: int = 2,
    floor: float = 0.25,
    knots: int = 33,
) -> list[float]:
    """The knots of a time grid that suits a network: more points where x0_hat changes and where errors stay.

    It runs the probability flow once over fine levels, which costs ``levels`` calls of the network with one batch, and
    measures how x0_hat changes along the paths. The result is what ``time_grid`` of every scheduler takes:

        noise = torch.randn(256, *pipe.sample_shape)
        knots = profile_grid(pipe.scheduler.denoiser(pipe.unet), pipe.scheduler.sde, noise)
        pipe.scheduler = VPSDEScheduler.from_config(pipe.scheduler.config, time_grid=knots)

    Args:
        denoiser: (x_t, SDE time) -> x0_hat. If it may leave the range of the data at high noise, clamp it.
        sde: The SDE.
        noise: Unit noise that the paths start from, shape (B, ...).
        last_sigma: Noise-to-signal ratio sigma/alpha of the last level, or that at which the path begins where it is
            larger, as on a VE SDE.
        levels: Fine levels, uniform in lambda; each is one call.
        order: The order p of the rule that the grid is for.
        floor: Part of the points that is spread evenly over lambda, from 0 to 1. The density above vanishes where the
            derivative does, but steps of very unequal length hurt the rules that look back on several.
        knots: Length of the result.

    Returns:
        Increasing values of lambda = log(alpha/sigma), which are quantiles of the density.

    Raises:
        ValueError: An argument out of range, or a denoiser whose estimates are not finite or do not change at all.
    """
    check_tensor("noise", noise)
    levels = check_integer("levels", levels, at_least=8)
    order = check_integer("order", order, at_least=1, at_most=3)
    floor = check_number("floor", floor, at_least=0.0, at_most=1.0)
    knots = check_integer("knots", knots, at_least=2, at_most=MOST_KNOTS)
    start_of_path = 0.5 * float(sde.log_snr(sde.t_max))
    last_sigma = check_number("last_sigma", last_sigma, above=0.0, below=math.exp(-start_of_path))
    last = min(-math.log(last_sigma), 0.5 * float(sde.log_snr(BEGINNING_OF_PATH)))
    first = max(start_of_path, min(SECH_START, last - 1.0))
    lam = torch.linspace(first, last, levels, dtype=torch.float64)
    times = sde.time_of(2.0 * lam).clamp(max=sde.t_max)

    recent: list[Tensor] = []
    slopes: list[float] = []

    def recorded(x: Tensor, t: Tensor) -> Tensor:
        estimate = denoiser(x, t)
        recent.insert(0, estimate)
        if len(recent) > order:
            difference = sum(((-1) ** k * math.comb(order, k) * e for k, e in enumerate(recent)), torch.zeros_like(x))
            slopes.append(float(finest(difference).square().mean().sqrt()))
            recent.pop()
        return estimate

    start = noise * float(sde.sigma(times[0]))
    data = finest(sample(make_plan(sde, times, Exponential(2), stochasticity=0.0), recorded, start))
    variance = float((data - data.mean(0)).square().mean())
    # A difference over several levels belongs to the middle between the first and the last of them.
    middle = 0.5 * (lam[order:] + lam[: levels - order])
    growth = torch.sqrt(variance / (variance + torch.exp(-2.0 * middle)))
    density = (growth * torch.tensor(slopes, dtype=torch.float64)) ** (1.0 / (order + 1))
    if not (bool(torch.isfinite(density).all()) and float(density.max()) > 0.0):
        raise ValueError("denoiser must return finite estimates that change with the noise level.")
    at_levels = np.asarray(np.interp(lam.numpy(), middle.numpy(), density.numpy()))
    return _quantiles(at_levels, lam.numpy(), floor, knots)


def _quantiles(density: np.ndarray, lam: np.ndarray, floor: float, knots: int) -> list[float]:
    """Quantiles of a density that is given at points, of which the part ``floor`` is spread evenly."""
    mass = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]) * np.diff(lam))])
    mass = (1.0 - floor) * mass / mass[-1] + floor * (lam - lam[0]) / (lam[-1] - lam[0])
    found: list[float] = np.interp(np.linspace(0.0, 1.0, knots), mass, lam).tolist()
    return found
