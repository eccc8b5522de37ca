"""Stochastic policies by name: the steps that reinforcement learning of diffusion and flow models has published.

Each is a predictor and a stochasticity for every interval. On rectified flow, where sigma = t and x_t = (1 - t) x_0 +
t eps, they are the formulas that the papers state; here they hold for every SDE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..basics.checks import check_choice
from ..sdes import SDE
from .classical import Ancestral, EulerMaruyama
from .exponential import Exponential
from .stages import Predictor


@dataclass(frozen=True)
class Policy:
    """A predictor of order 1, and its stochasticity as a function of one number.

    Attributes:
        predictor: The predictor.
        stochasticity: (sde, times of shape (n + 1,), level) -> eta of each interval, shape (n,).
        level: The published number: a, eta or the like.
        finite_at_zero_snr: Whether it can start where alpha(t) = 0.
    """

    predictor: Predictor
    stochasticity: Callable[[SDE, Tensor, float], Tensor]
    level: float
    finite_at_zero_snr: bool = True


def _constant(sde: SDE, times: Tensor, level: float) -> Tensor:
    """eta = level."""
    return torch.full_like(times[1:], level)


def _flow_grpo(sde: SDE, times: Tensor, level: float) -> Tensor:
    """sigma_t = a sqrt(t/(1 - t)) is g(t) a / sqrt(2), since g^2 = 2 t/(1 - t) on rectified flow."""
    return torch.full_like(times[1:], level / math.sqrt(2.0))


def _dance_grpo(sde: SDE, times: Tensor, level: float) -> Tensor:
    """The noise has the standard deviation eta sqrt(t - s), which is eta g sqrt(t - s) with eta/g in place of eta."""
    return level / sde.g2(times[:-1]).sqrt()


def _flow_cps(sde: SDE, times: Tensor, level: float) -> Tensor:
    """std = sigma_s sin(pi a/2) = sigma_s sqrt(1 - exp(-2 eta^2 h)), so that eta^2 h = -log cos(pi a/2)."""
    lam = 0.5 * sde.log_snr(times)
    if not 0.0 <= level < 1.0:
        raise ValueError(f"stochasticity of the policy 'flow_cps' must lie in [0, 1), got {level!r}.")
    return (-math.log(math.cos(0.5 * math.pi * level)) / (lam[1:] - lam[:-1])).sqrt()


POLICIES: dict[str, Policy] = {
    # x0_hat is frozen over the step, and the linear part and the noise are exact: no excess noise at any step length.
    "exact": Policy(Exponential(1), _constant, 1.0),
    # DDIM's eta (Black et al. 2024, arXiv:2305.13301).
    "ddpo": Policy(Ancestral(), _constant, 1.0),
    # Liu et al. 2025, arXiv:2505.05470, with a = 0.7.
    "flow_grpo": Policy(EulerMaruyama(), _flow_grpo, 0.7, finite_at_zero_snr=False),
    # Xue et al. 2025, arXiv:2505.07818, with eta = 0.3.
    "dance_grpo": Policy(EulerMaruyama(), _dance_grpo, 0.3, finite_at_zero_snr=False),
    # Wang & Yu 2025, arXiv:2509.05952, with a = 0.7.
    "flow_cps": Policy(Exponential(1), _flow_cps, 0.7, finite_at_zero_snr=False),
}


def get_policy(name: str) -> Policy:
    """Look a policy up by name.

    Raises:
        ValueError: Unknown name.
    """
    return POLICIES[check_choice("policy", name, (None, *POLICIES))]


def windowed(
    sde: SDE,
    times: Tensor,
    stochasticity: Tensor,
    indices: tuple[int, int] | None = None,
    sigmas: tuple[float, float] | None = None,
    first: int = 0,
) -> Tensor:
    """The stochasticity of each interval inside a window, and 0, the probability flow, outside.

    Args:
        sde: The SDE.
        times: The grid, shape (n + 1,).
        stochasticity: Of each interval, shape (n,).
        indices: First interval of the window, and the first one behind it.
        sigmas: Smallest and largest noise-to-signal ratio sigma/alpha at the start of an interval of the window. Such
            a window means the same noise on every grid and under every shift.
        first: Number of the first interval of the grid.
    """
    inside = torch.ones_like(stochasticity, dtype=torch.bool)
    if indices is not None:
        number = first + torch.arange(len(stochasticity), device=inside.device)
        inside &= (number >= indices[0]) & (number < indices[1])
    if sigmas is not None:
        ratio = torch.exp(-0.5 * sde.log_snr(times[:-1]))
        inside &= (ratio >= sigmas[0] * (1.0 - 1e-9)) & (ratio <= sigmas[1] * (1.0 + 1e-9))
    return torch.where(inside, stochasticity, torch.zeros_like(stochasticity))
