"""Variations of data by noising and denoising them."""

from __future__ import annotations

import math

from torch import Tensor

from ..basics.checks import check_generators, check_integer, check_number, check_state
from ..basics.noise import Generators, standard_normal_like
from ..networks.denoisers import Denoiser
from ..sdes import SDE
from .loop import sample
from .planning import make_plan
from .time_grids import get_time_grid


def edit(
    denoiser: Denoiser,
    sde: SDE,
    x0: Tensor,
    strength: float = 0.5,
    num_steps: int = 50,
    t_min: float | None = None,
    generator: Generators = None,
) -> Tensor:
    """Variations of data: add noise up to an intermediate time, then run the reverse SDE (SDEdit).

    This is Algorithm 1 of Meng et al. 2022 (arXiv:2108.01073). The result keeps of the data what the noise does not
    hide.

    Args:
        denoiser: (x_t, t) -> x0_hat.
        sde: The SDE.
        x0: Data, shape (B, ...).
        strength: Fraction of the noise levels, evenly spaced in log-SNR, that are added and removed; in (0, 1].
        num_steps: Noise levels of the reverse SDE, one network call each.
        t_min: Last time; the SDE's own t_min if None.
        generator: One generator, or one for each sample.

    Returns:
        New data, shape of ``x0``.

    Raises:
        ValueError: Bad arguments.
    """
    strength = check_number("strength", strength, above=0.0, at_most=1.0)
    num_steps = check_integer("num_steps", num_steps, at_least=1)
    t_min = sde.t_min if t_min is None else t_min
    levels = get_time_grid("log_snr", sde, 1001, sde.t_max, t_min)
    t = float(levels[max(0, 1000 - math.ceil(1000 * strength))])
    x0 = check_state(x0, "x0")
    check_generators(generator, len(x0))
    mean, sigma = sde.marginal(x0, t)
    noisy = mean + sigma * standard_normal_like(x0, generator)
    plan = make_plan(sde, get_time_grid("log_snr", sde, num_steps, t, t_min), "exponential")
    return sample(plan, denoiser, noisy, generator)
