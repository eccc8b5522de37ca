"""Time grids: where a sampler calls the network.

A grid maps (sde, n, t_start, t_end) to n decreasing times, float64, with the first at t_start and the last at t_end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..basics.checks import check_choice, check_integer, check_number, check_numbers
from ..sdes import SDE

Warp = Callable[[Tensor], Tensor]
"""An increasing map of decreasing times that keeps t_start: the shift of a flow."""

FINE = 1025  # number of points between which ``blended`` interpolates its distribution functions

# Where alpha vanishes at the start (rectified flow, cosine, zero terminal SNR), grids in log-SNR spread their points
# from sigma/alpha = 1000 on. The first point is the start itself.
MIN_LOG_SNR = -2.0 * math.log(1000.0)


def uniform(sde: SDE, n: int, t_start: float, t_end: float, rho: float = 7.0, warp: Warp | None = None) -> Tensor:
    """Uniform in t, the paper's grid (Song et al. 2021, Algorithms 2 and 3), or in ``warp``'s argument."""
    times = torch.linspace(t_start, t_end, n, dtype=torch.float64)
    return times if warp is None else warp(times)


def log_snr(sde: SDE, n: int, t_start: float, t_end: float, rho: float = 7.0) -> Tensor:
    """Uniform in log-SNR (Lu et al. 2022, arXiv:2206.00927)."""
    first = max(float(sde.log_snr(t_start)), MIN_LOG_SNR)
    grid = sde.time_of(torch.linspace(first, float(sde.log_snr(t_end)), n, dtype=torch.float64))
    return _with_ends(grid, t_start, t_end)


def karras(sde: SDE, n: int, t_start: float, t_end: float, rho: float = 7.0) -> Tensor:
    """Uniform in (sigma/alpha)^(1/rho) (Karras et al. 2022, arXiv:2206.00364, eq. 5)."""
    largest = math.exp(-0.5 * max(float(sde.log_snr(t_start)), MIN_LOG_SNR))
    smallest = math.exp(-0.5 * float(sde.log_snr(t_end)))
    ramp = torch.linspace(largest ** (1.0 / rho), smallest ** (1.0 / rho), n, dtype=torch.float64)
    return _with_ends(sde.time_of(-2.0 * rho * ramp.log()), t_start, t_end)


# Constants in lambda = log(alpha/sigma) hold for data whose standard deviation about their mean image is USUAL_STD. The
# mixtures on which they were measured have 0.54 (digits) and 0.67 (patches of photographs), and other small images with
# pixels in [-1, 1] 0.35 to 0.55. 0.5 is the round number, which EDM takes for sigma_data, too.
USUAL_STD = 0.5

# The middle, width and floor of the density of ``sech``, in lambda = log(alpha/sigma), were measured on the two
# mixtures of benchmarks/quality.py: digits, and patches of photographs, which show structure at far more noise.
SECH_MIDDLE, SECH_WIDTH, SECH_FLOOR = 0.5, 2.5, 0.15
SECH_START = -5.0  # sigma/alpha = 150, where the paper's VP SDE starts, for paths that start at infinity


def for_spread(lam: float, data_std: float | None) -> float:
    """A constant in lambda = log(alpha/sigma), moved to data of another standard deviation.

    c x_0 shows at lambda - log c what x_0 shows at lambda. None stands for ``USUAL_STD``.

    Raises:
        ValueError: ``data_std`` is not a positive number.
    """
    return lam if data_std is None else lam - math.log(check_number("data_std", data_std, above=0.0) / USUAL_STD)


def sech(sde: SDE, n: int, t_start: float, t_end: float, rho: float = 7.0, data_std: float | None = None) -> Tensor:
    """Points where the estimate changes: density sech((lambda - m)/2.5) + 0.15 in lambda = log(alpha/sigma).

    For Gaussian data of standard deviation c, x0_hat along the reverse process is a sigmoid of lambda + log c. A grid
    uniform in log-SNR spends most of its points before and after that rise, where any step is exact. The density of the
    rise itself is a hyperbolic secant. Here it is wider, because data have many scales, and it has a floor, because
    some of these scales lie further out. The middle m is 0.5 for data of standard deviation 0.5, and
    0.5 - log(``data_std``/0.5) in general.
    """
    first, last = (0.5 * float(sde.log_snr(t)) for t in (t_start, t_end))
    if math.isinf(first):  # above this noise level x0_hat is nearly constant, so one step covers it
        first = min(for_spread(SECH_START, data_std), last - 1.0)
    centre = for_spread(SECH_MIDDLE, data_std)

    def mass(lam: Tensor) -> Tensor:  # the density integrated; 2 atan(tanh(u/2)) is the Gudermannian
        u = (lam - centre) / SECH_WIDTH
        return SECH_FLOOR * lam + 2.0 * SECH_WIDTH * torch.atan(torch.tanh(0.5 * u))

    ends = mass(torch.tensor([first, last], dtype=torch.float64)).tolist()
    target = torch.linspace(ends[0], ends[1], n, dtype=torch.float64)
    low, high = torch.full_like(target, first), torch.full_like(target, last)
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = mass(middle) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return _with_ends(sde.time_of(low + high), t_start, t_end)


def blended(
    sde: SDE,
    n: int,
    t_start: float,
    t_end: float,
    rho: float = 7.0,
    warp: Warp | None = None,
    data_std: float | None = None,
) -> Tensor:
    """Half of the points where ``uniform`` has them, half where ``sech`` has them: the mean of both distributions.

    In a grid uniform in t the last interval is far too long in log-SNR. ``sech`` has two other faults. It ignores the
    shift of a flow, which says at how much noise its images show. And it does not suit pipelines that count levels, as
    image-to-image does: at strength 0.5 it starts at a fifth of the noise that uniform times have there. The mean of
    both is as exact as ``sech`` from ten levels on, and is near to the uniform times otherwise (benchmarks/swapped.py).
    """
    spread = uniform(sde, FINE, t_start, t_end, warp=warp)
    t_end = float(spread[-1])
    fine = sech(sde, FINE, t_start, t_end, data_std=data_std)
    lam = [0.5 * sde.log_snr(times) for times in (spread, fine)]
    start = for_spread(SECH_START, data_std)
    for v in lam:  # pure noise gets a finite place: as far again as the next interval, or SECH_START if that is lower
        v[0] = v[0] if torch.isfinite(v[0]) else min(start, float(2.0 * v[1] - v[2]))
    fraction, points = np.linspace(0.0, 1.0, FINE), np.sort(np.concatenate([v.numpy() for v in lam]))
    mean = sum(np.interp(points, v.numpy(), fraction) for v in lam) / 2.0
    grid = sde.time_of(2.0 * torch.from_numpy(np.interp(np.linspace(0.0, 1.0, n), mean, points)))
    return _with_ends(grid, t_start, t_end)


MOST_KNOTS = 1000


def check_time_grid(name: str, value: Any) -> Any:
    """A key of ``TIME_GRIDS``, None, or the knots of a grid: finite, strictly increasing numbers, as a list.

    Raises:
        ValueError: It is none of these.
    """
    if value is None or isinstance(value, str):
        return check_choice(name, value, (None, *TIME_GRIDS))
    knots = check_numbers(name, value, at_least=2)
    if not bool(torch.isfinite(knots).all() & (knots[1:] > knots[:-1]).all()) or len(knots) > MOST_KNOTS:
        raise ValueError(
            f"{name} must be a name or 2 to {MOST_KNOTS} finite, strictly increasing values of log(alpha/sigma), got "
            f"{value!r}."
        )
    return knots.tolist()


def between_knots(
    sde: SDE, n: int, t_start: float, t_end: float, knots: Sequence[float], data_std: float | None = None
) -> Tensor:
    """Points spread so that as many lie between any two neighbouring knots, values of lambda = log(alpha/sigma).

    The knots are the quantiles of the density of points, which is constant between two of them. Beyond the first and
    the last knot it is that of the interval next to them. So a grid of any number of points can be made of them, which
    starts and ends at any noise level.
    """
    lam = np.asarray(knots, dtype=np.float64)
    first, last = (0.5 * float(sde.log_snr(t)) for t in (t_start, t_end))
    if math.isinf(first):
        first = min(for_spread(SECH_START, data_std), float(lam[0]), last - 1.0)
    # One more knot beyond each end continues the outermost intervals.
    lengths = lam[1] - lam[0], lam[-1] - lam[-2]
    more = 1.0 + max(lam[0] - first, 0.0) / lengths[0], 1.0 + max(last - lam[-1], 0.0) / lengths[1]
    mass = np.array([-more[0], *range(len(lam)), len(lam) - 1 + more[1]])
    lam = np.array([lam[0] - more[0] * lengths[0], *lam, lam[-1] + more[1] * lengths[1]])
    begin, end = np.interp([first, last], lam, mass).tolist()
    grid = np.interp(np.linspace(begin, end, n), mass, lam)
    return _with_ends(sde.time_of(2.0 * torch.from_numpy(grid)), t_start, t_end)


def _with_ends(grid: Tensor, t_start: float, t_end: float) -> Tensor:
    grid[-1] = t_end
    grid[0] = t_start
    return grid


TIME_GRIDS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "log_snr": log_snr,
    "karras": karras,
    "sech": sech,
    "blended": blended,
}
WARPED = ("uniform", "blended")  # the grids that are made from uniform times
SCALED = ("sech", "blended")  # the grids that depend on the spread of the data


def get_time_grid(
    name: str | Sequence[float],
    sde: SDE,
    n: int,
    t_start: float,
    t_end: float,
    rho: float = 7.0,
    warp: Warp | None = None,
    data_std: float | None = None,
) -> Tensor:
    """n decreasing times from ``t_start`` to ``t_end`` on a named grid, or on one of knots, float64.

    Args:
        name: A key of ``TIME_GRIDS``, or the knots of ``between_knots``.
        sde: The SDE.
        n: Number of times.
        t_start: The first time.
        t_end: The last time, before ``warp`` is applied.
        rho: Exponent of ``karras``.
        warp: Map that is applied to uniform times. Grids in log-SNR have no uniform times and ignore it.
        data_std: Standard deviation of the data, which ``sech`` and ``blended`` depend on, and on every grid of knots
            the place of pure noise; None stands for 0.5.

    Raises:
        ValueError: Unknown name, n below 1, rho or data_std not positive, or ends that are not decreasing.
    """
    if isinstance(name, str):
        check_choice("time_grid", name, TIME_GRIDS)
    n = check_integer("n, the number of time points,", n, at_least=1)
    check_number("rho", rho, above=0.0)
    if not t_end < t_start:
        raise ValueError(f"sampling runs from t_max down to sampling_eps, got {t_start!r} and {t_end!r}.")
    if not isinstance(name, str):
        return between_knots(sde, n, t_start, t_end, check_time_grid("time_grid", name), data_std)
    options: dict[str, Any] = {"warp": warp} if name in WARPED else {}
    if name in SCALED:
        options["data_std"] = data_std
    return TIME_GRIDS[name](sde, n, t_start, t_end, rho, **options)


TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")


def discrete_timesteps(
    spacing: str, n: int, num_train_timesteps: int, steps_offset: int = 0, drops_last: bool = False
) -> np.ndarray:
    """diffusers' integer timesteps (Lin et al. 2023, arXiv:2305.08891, Table 2), decreasing, int64.

    Args:
        spacing: ``leading``, ``linspace`` or ``trailing``.
        n: Number of timesteps.
        num_train_timesteps: N, the length of the table.
        steps_offset: Number that is added to the timesteps of ``leading``.
        drops_last: Whether ``leading`` and ``linspace`` spread n + 1 timesteps and leave out the last, which stands at
            the data. DPM-Solver, UniPC, DEIS and SASolver do so.

    Raises:
        ValueError: Unknown spacing, or more timesteps than the table has.
    """
    check_choice("timestep_spacing", spacing, TIMESTEP_SPACINGS)
    dropped = int(drops_last and spacing != "trailing")
    if not 1 <= n <= num_train_timesteps - dropped:
        raise ValueError(
            f"num_inference_steps must lie in 1..{num_train_timesteps - dropped} (num_train_timesteps"
            f"{' - 1' if dropped else ''}) on the {spacing!r} spacing, got {n!r}."
        )
    if spacing == "linspace":
        # A single level stands at the noise that sampling starts from, not at the data.
        first = num_train_timesteps - 1 if n + dropped == 1 else 0
        timesteps = np.linspace(first, num_train_timesteps - 1, n + dropped).round()[::-1].astype(np.int64)
    elif spacing == "leading":
        ratio = num_train_timesteps // (n + dropped)
        timesteps = (np.arange(n + dropped) * ratio)[::-1].astype(np.int64) + steps_offset
        timesteps = np.minimum(timesteps, num_train_timesteps - 1)
    else:
        timesteps = np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / n)).astype(np.int64) - 1
    return timesteps[:n]


def whole_timesteps(timesteps: Tensor, num_train_timesteps: int) -> Tensor:
    """Round decreasing timesteps to the entries 0, ..., N - 1 of a table, so that their order is kept and none repeats.

    Raises:
        ValueError: More timesteps than the table has entries.
    """
    if len(timesteps) > num_train_timesteps:
        raise ValueError(
            f"num_inference_steps must be at most {num_train_timesteps} (num_train_timesteps) on whole timesteps, got "
            f"{len(timesteps)}."
        )
    rank = torch.arange(len(timesteps), 0, -1, dtype=torch.float64) - 1.0
    # Whole numbers are strictly decreasing if, and only if, they do not increase after each one's rank is subtracted.
    level = torch.flip(torch.cummax(torch.flip(timesteps.round() - rank, (0,)), 0).values, (0,))
    return level.clamp(0.0, float(num_train_timesteps - len(timesteps))) + rank
