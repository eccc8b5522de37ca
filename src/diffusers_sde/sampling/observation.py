"""Data observed in Gaussian noise: y = x_0 + noise_std n is a point of the path itself.

At the time t where sigma(t) / alpha(t) = noise_std, x_t = alpha y has the law of alpha x_0 + sigma n. The denoiser at
(alpha y, t) therefore is E[x_0 | y], and the reverse SDE from there ends in samples of p(x_0 | y). This holds for
Anderson's reverse SDE only, whose pairs (x_0, x_t) are those of the forward SDE. The probability flow, other
stochasticities and correctors keep the law of each x_t, and lose what x_0 and y have in common.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..basics.checks import check_generators, check_integer, check_number, check_state
from ..basics.noise import Generators
from ..basics.precision import on_device
from ..networks.denoisers import Denoiser
from ..sdes import SDE
from .exponential import Exponential
from .loop import sample
from .planning import make_plan
from .stages import Predictor
from .time_grids import MIN_LOG_SNR, get_time_grid

# A run ends with the mean where the noise is this small, in units of the data and of the observation's noise, or where
# the path has no smaller noise. The variance of the noise at the end is what the samples lack.
LEAST_NOISE, LEAST_FRACTION = 0.002, 0.01
# Its samples of Gaussian data have the right variance to 0.5 % at 50 levels, where rules of order 1 lack 10 %.
HIGH_ORDER = Exponential(None, solver_correction=True, gaussian_std=0.05)


def time_of_noise(sde: SDE, noise_std: float, t_min: float | None = None) -> float:
    """Return the time at which sigma / alpha is ``noise_std``.

    Args:
        sde: The SDE.
        noise_std: Standard deviation of the noise beside data, in units of the data.
        t_min: The first time that counts; the SDE's own t_min if None.

    Raises:
        ValueError: The path has no such time; the message says what it has. Paths that end without signal are taken up
            to noise of 1000.
    """
    t_min = sde.t_min if t_min is None else t_min
    most = max(float(sde.log_snr(sde.t_max)), MIN_LOG_SNR)
    low, high = math.exp(-0.5 * float(sde.log_snr(t_min))), math.exp(-0.5 * most)
    noise_std = check_number("sigma, the standard deviation of the noise,", noise_std, at_least=low, at_most=high)
    return min(max(float(sde.time_of(-2.0 * math.log(noise_std))), t_min), sde.t_max)


@torch.no_grad()
def posterior_mean(denoiser: Denoiser, sde: SDE, y: Tensor, noise_std: float, t_min: float | None = None) -> Tensor:
    """E[x_0 | y] for y = x_0 + noise_std n, by one call of the denoiser.

    Args:
        denoiser: (x_t, t) -> x0_hat.
        sde: Its SDE.
        y: Observations in units of the data, shape (B, ...).
        noise_std: Standard deviation of their noise, likewise.
        t_min: The first time at which the denoiser is right; the SDE's own t_min if None.

    Returns:
        The means, shape of ``y``.

    Raises:
        ValueError: The noise is not one of the path, or ``y`` is no batch of finite numbers.
    """
    y = check_state(y, "y")
    t = on_device(time_of_noise(sde, noise_std, t_min), y.device)
    return denoiser(y * sde.alpha(t).to(y), t)


def posterior_samples(
    denoiser: Denoiser,
    sde: SDE,
    y: Tensor,
    noise_std: float,
    num_samples: int = 1,
    num_steps: int = 50,
    t_min: float | None = None,
    predictor: str | Predictor = HIGH_ORDER,
    generator: Generators = None,
) -> Tensor:
    """Samples of p(x_0 | y) for y = x_0 + noise_std n, by the reverse SDE from y itself.

    Args:
        denoiser: (x_t, t) -> x0_hat.
        sde: Its SDE.
        y: Observations in units of the data, shape (B, ...).
        noise_std: Standard deviation of their noise, likewise.
        num_samples: Samples for each observation.
        num_steps: Noise levels on the ``sech`` grid.
        t_min: The first time at which the denoiser is right; the SDE's own t_min if None.
        predictor: As in ``make_plan``; one that integrates an SDE. Those of order 1 need more levels than the default.
        generator: One generator, or one for each sample.

    Returns:
        The samples, those of the first observation first, shape (B * num_samples, ...).

    Raises:
        ValueError: The noise is not one of the path, or another bad argument.
    """
    y = check_state(y, "y")
    num_samples = check_integer("num_samples", num_samples, at_least=1)
    num_steps = check_integer("num_steps", num_steps, at_least=1)
    check_generators(generator, len(y) * num_samples)
    t_min = sde.t_min if t_min is None else t_min
    start = time_of_noise(sde, noise_std, t_min)
    rest = min(LEAST_FRACTION * noise_std, LEAST_NOISE)
    end = max(float(sde.time_of(-2.0 * math.log(rest))), t_min)
    times = torch.tensor([start], dtype=torch.float64)
    if end < start and num_steps > 1:
        times = get_time_grid("sech", sde, num_steps, start, end)
    x = (y * sde.alpha(start).to(y)).repeat_interleave(num_samples, dim=0)
    return sample(make_plan(sde, times, predictor, stochasticity=1.0), denoiser, x, generator)
