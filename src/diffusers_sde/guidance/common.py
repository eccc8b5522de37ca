"""What the methods of guidance share: bounded noise levels and checks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..basics.checks import check_integer, check_number
from ..sdes import SDE, as_time, expand_like

LARGEST_RATIO = 1000.0  # sigma / alpha beyond which x_t says nothing about x_0


def bounded_path(sde: SDE, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return time, alpha and sigma, broadcastable against x.

    Where sigma/alpha is larger than ``LARGEST_RATIO``, the time is moved to where it has this value.
    """
    t = as_time(t)
    lowest = -2.0 * math.log(LARGEST_RATIO)
    # This runs at every call, so the cheap condition comes first: does alpha vanish at t_max?
    if float(sde.log_snr(sde.t_max)) < -60.0 and bool((sde.log_snr(t) < lowest).any()):
        t = torch.minimum(t, sde.time_of(torch.tensor(lowest, dtype=torch.float64)).to(t))
    alpha, sigma = (expand_like(v, x).to(x) for v in (sde.alpha(t), sde.sigma(t)))
    return t, alpha, sigma


def isotropic_variance(alpha: Tensor, sigma: Tensor, data_std: float) -> Tensor:
    """The variance of x_0 given x_t for isotropic Gaussian data, sigma^2 std^2 / (sigma^2 + alpha^2 std^2)."""
    return sigma**2 * data_std**2 / (sigma**2 + alpha**2 * data_std**2)


def check_chunk_size(chunk_size: int | None) -> int | None:
    """Check the number of samples per backward pass; None stands for the whole batch.

    Raises:
        ValueError: It is neither None nor a positive integer.
    """
    return None if chunk_size is None else check_integer("chunk_size", chunk_size, at_least=1)


LARGEST_SCALE = 1e6  # of guidance: far larger than is useful, and float32 can still hold the guided estimate


def check_scale(name: str, value: float, positive: bool = False) -> float:
    """Check a factor on a guiding term, which may be 0, or with ``positive`` a scale of the data, which may not.

    Raises:
        ValueError: It is negative, not finite, or so large that float32 would overflow.
    """
    return check_number(name, value, 0.0 if positive else None, None if positive else 0.0, at_most=LARGEST_SCALE)
