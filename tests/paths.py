"""SDEs that tests share, and how far a sampler's error falls on them."""

import math
from dataclasses import dataclass

import torch
from analytic import convergence_order, exact_reverse_gain, marginal_moments, push_gaussian

from diffusers_sde.sdes import (
    SDE,
    SDES,
    VPSDE,
    DiscreteVPSDE,
)


@dataclass(frozen=True)
class UserSDE(SDE):
    """What a user writes: two functions. alpha = 1/(1 + t), sigma = t exp(t), no closed-form inverse."""

    def _log_alpha(self, t):
        return -torch.log1p(t)

    def _log_sigma(self, t):
        return torch.log(t) + t


# A table of ten entries, so that the grids below can have its kinks among their points.
SHORT_TABLE = DiscreteVPSDE(tuple((VPSDE().alpha(torch.arange(1, 11, dtype=torch.float64) / 10) ** 2).tolist()))


INSTANCES = {name: cls() for name, cls in SDES.items()} | {"discrete_vp": SHORT_TABLE, "user": UserSDE()}


MEAN0, STD0 = 0.7, 0.6


NS = [192, 384, 768]


def interval(sde):
    """From log-SNR -4 down to log-SNR 4; whole entries of a table."""
    return (0.8, 0.2) if isinstance(sde, DiscreteVPSDE) else (float(sde.time_of(-4.0)), float(sde.time_of(4.0)))


def law_errors(sde, times, plan, eta, offset=1.3):
    """Relative error of mean and variance at the end of a plan that ends at the last of ``times``."""
    start, end = float(times[0]), float(times[-1])
    mean, variance = marginal_moments(sde, start, MEAN0, STD0)
    exact_mean, exact_variance = marginal_moments(sde, end, MEAN0, STD0)
    offset = offset * math.sqrt(variance)
    got_mean, got_variance = push_gaussian(plan, sde, MEAN0, STD0, mean + offset, variance)
    exact_mean += offset * exact_reverse_gain(sde, start, end, STD0, eta)
    return (got_mean - exact_mean) / math.sqrt(exact_variance), got_variance / exact_variance - 1.0


def measured_order(sde, make):
    """Order of |error of the mean| + |error of the variance| for plans ``make(times)`` on grids uniform in t."""
    start, end = interval(sde)
    errors = []
    for n in NS:
        # Ten entries in [0, 1]: n is a multiple of the six in between.
        times = torch.linspace(start, end, n + 1, dtype=torch.float64)
        plan, eta = make(times)
        errors.append(sum(map(abs, law_errors(sde, times, plan, eta))))
    return convergence_order(errors, NS), errors[-1]
