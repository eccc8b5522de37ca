"""Sampling, encoding, decoding and interpolation by the probability flow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..basics.checks import check_integer, check_number, check_state
from ..basics.precision import finest, on_device
from ..networks.denoisers import Denoiser
from ..sampling.solution import Solution
from ..sdes import SDE
from .solver import ODEOptions, integrate


def solve_flow(
    denoiser: Denoiser,
    sde: SDE,
    x: Tensor,
    t_start: float,
    t_end: float,
    options: ODEOptions | None = None,
    conditioning: Mapping[str, Tensor] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Solution:
    """Carry samples along the probability-flow ODE from ``t_start`` to ``t_end``, in either direction.

    dx/dt = f x - g^2/2 score (Song et al. 2021, eq. 13), integrated in the variables of ``coordinates``.

    Args:
        denoiser: (x_t, t, **conditioning) -> x0_hat; it gets t of shape (B,), since every sample has its own time.
        sde: The SDE.
        x: State at ``t_start``, shape (B, ...), float32 or float64 (half precision is promoted to float32).
        t_start: SDE time of ``x``.
        t_end: SDE time of the result; sigma must be positive there.
        options: Tolerances and other settings; see ``ODEOptions``.
        conditioning: Arguments of the denoiser with one row per sample, such as ``class_labels``.
        progress: Called with the number of samples that have just arrived.

    Returns:
        The state at ``t_end`` and the calls of each sample.

    Raises:
        ValueError: Bad arguments.
        SolverError: The solver gives up; see ``integrate``.
    """
    options = ODEOptions() if options is None else options
    result = integrate(denoiser, sde, x, t_start, t_end, options=options, conditioning=conditioning, progress=progress)
    return result.solution


def sample_flow(
    denoiser: Denoiser,
    sde: SDE,
    x: Tensor,
    options: ODEOptions | None = None,
    t_min: float | None = None,
    denoise_final: bool = True,
    conditioning: Mapping[str, Tensor] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Solution:
    """Sample by the probability-flow ODE with steps that each sample chooses by its own error.

    It takes the same start as ``sample`` and as ``sample_adaptive``, a state drawn from the prior, and like them it
    ends with x0_hat. ``sample`` executes a plan, in which all samples take the same steps; ``sample_adaptive`` has the
    same arguments as this function and integrates the reverse SDE. ``decode`` starts from unit noise instead.

    Args:
        denoiser: (x_t of shape (B, ...), t of shape (B,), **conditioning) -> x0_hat. It is called on the samples that
            are on their way.
        sde: The SDE.
        x: Start at t_max, drawn from the prior, shape (B, ...).
        options: Settings of the solver.
        t_min: Last time; the SDE's own t_min if None.
        denoise_final: Whether to end with x0_hat at ``t_min``, for one more call (Tweedie's formula), instead of the
            state there.
        conditioning: Arguments of the denoiser with one row per sample, such as ``class_labels``.
        progress: Called with the number of samples that have just arrived.

    Returns:
        Samples and calls.

    Raises:
        ValueError: Bad arguments.
        SolverError: The solver gives up; see ``integrate``.
    """
    options = ODEOptions() if options is None else options
    t_min = sde.t_min if t_min is None else t_min
    solution = solve_flow(denoiser, sde, x, sde.t_max, t_min, options, conditioning, progress)
    if not denoise_final:
        return solution
    x, parts = solution.sample, []
    with torch.no_grad():
        for first in range(0, len(x), options.batch_size):
            rows = slice(first, first + options.batch_size)
            extra = {name: value[rows] for name, value in (conditioning or {}).items()}
            parts.append(denoiser(x[rows], torch.full((len(x[rows]),), t_min, device=x.device), **extra).to(x.dtype))
    return replace(solution, sample=torch.cat(parts), calls=solution.calls + 1)


def encode(
    denoiser: Denoiser,
    sde: SDE,
    x0: Tensor,
    options: ODEOptions | None = None,
    t_min: float | None = None,
    conditioning: Mapping[str, Tensor] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Solution:
    """The latent codes of data: the flow from the data to the prior, scaled to unit noise.

    The data are taken as the state at ``t_min``, as in Song et al. 2021, section 4.3. ``decode`` is the inverse.

    Args:
        denoiser: (x_t, t, **conditioning) -> x0_hat.
        sde: The SDE.
        x0: Data, shape (B, ...).
        options: Settings of the solver.
        t_min: SDE time of the data; the SDE's own t_min if None.
        conditioning: Arguments of the denoiser with one row per sample.
        progress: Called with the number of samples that have just arrived.

    Returns:
        The codes, and calls.

    Raises:
        ValueError: Bad arguments.
        SolverError: The solver gives up; see ``integrate``.
    """
    t_min = sde.t_min if t_min is None else t_min
    solution = solve_flow(denoiser, sde, x0, t_min, sde.t_max, options, conditioning, progress)
    return replace(solution, sample=solution.sample / sde.prior_std)


def decode(
    denoiser: Denoiser,
    sde: SDE,
    latents: Tensor,
    options: ODEOptions | None = None,
    t_min: float | None = None,
    temperature: float = 1.0,
    conditioning: Mapping[str, Tensor] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Solution:
    """The data of latent codes, the inverse of ``encode``: the flow from the prior to the state at ``t_min``.

    Args:
        denoiser: (x_t, t, **conditioning) -> x0_hat.
        sde: The SDE.
        latents: Codes, which are unit noise, shape (B, ...).
        options: Settings of the solver.
        t_min: SDE time of the data; the SDE's own t_min if None.
        temperature: See ``state_of_codes``.
        conditioning: Arguments of the denoiser with one row per sample.
        progress: Called with the number of samples that have just arrived.

    Returns:
        The data, and calls.

    Raises:
        ValueError: Bad arguments.
        SolverError: The solver gives up; see ``integrate``.
    """
    t_min = sde.t_min if t_min is None else t_min
    start = state_of_codes(sde, latents, temperature)
    return solve_flow(denoiser, sde, start, sde.t_max, t_min, options, conditioning, progress)


def state_of_codes(sde: SDE, latents: Tensor, temperature: float = 1.0) -> Tensor:
    """The state at t_max of latent codes: the codes times the standard deviation of the prior.

    Args:
        sde: The SDE.
        latents: Codes, which are unit noise, shape (B, ...).
        temperature: Factor on the codes. Below 1 the samples are more typical and less diverse (Song et al. 2021,
            section 4.3).

    Returns:
        The state, shape of ``latents``, float32 or float64.

    Raises:
        ValueError: ``latents`` are no batch of finite numbers, or ``temperature`` is not in (0, 1e6].
    """
    temperature = check_number("temperature", temperature, above=0.0, at_most=1e6)
    return check_state(latents, "latents") * (temperature * sde.prior_std)


def slerp(a: Tensor, b: Tensor, weights: Tensor | Sequence[float]) -> Tensor:
    """Spherical interpolation sin((1 - w) theta)/sin(theta) a + sin(w theta)/sin(theta) b, theta the angle of a and b.

    It keeps the norm that Gaussian noise has in many dimensions, which straight lines do not (Shoemake 1985).

    Args:
        a: Shape (B, ...).
        b: Same shape.
        weights: n numbers; 0 is ``a`` and 1 is ``b``.

    Returns:
        Shape (B, n, ...).

    Raises:
        ValueError: Shapes that differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}.")
    flat_a, flat_b = (finest(codes.flatten(1)) for codes in (a, b))
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1))
    theta = torch.acos(cosine.clamp(-1.0, 1.0))[:, None]
    w = on_device(weights, a.device)[None, :]
    # Codes that are nearly parallel have no arc. The straight line, its limit, is taken for them.
    arc = theta.sin().abs() > 1e-6
    safe = torch.where(arc, theta.sin(), torch.ones_like(theta))
    first = torch.where(arc, torch.sin((1.0 - w) * theta) / safe, 1.0 - w).to(a.dtype)
    second = torch.where(arc, torch.sin(w * theta) / safe, w.expand(len(a), -1)).to(a.dtype)
    shape = first.shape + (1,) * (a.ndim - 1)
    return first.reshape(shape) * a[:, None] + second.reshape(shape) * b[:, None]


def interpolate(
    denoiser: Denoiser,
    sde: SDE,
    x_a: Tensor,
    x_b: Tensor,
    num: int = 8,
    options: ODEOptions | None = None,
    t_min: float | None = None,
    progress: Callable[[int], object] | None = None,
) -> Solution:
    """Interpolate data: encode both ends, interpolate the codes spherically, decode (Song et al. 2021, section 4.3).

    Args:
        denoiser: (x_t, t) -> x0_hat.
        sde: The SDE.
        x_a: Data, shape (B, ...).
        x_b: Data, same shape.
        num: Number of points, both ends included.
        options: Settings of the solver.
        t_min: SDE time of the data; the SDE's own t_min if None.
        progress: Called with the number of samples that have just arrived.

    Returns:
        Samples of shape (B, num, ...), and the calls of the decoding, shape (B, num).

    Raises:
        ValueError: Bad arguments.
        SolverError: The solver gives up; see ``integrate``.
    """
    num = check_integer("num", num, at_least=2)
    x_a, x_b = check_state(x_a, "x_a"), check_state(x_b, "x_b")
    if x_a.shape != x_b.shape:
        raise ValueError(f"x_a and x_b must have the same shape, got {tuple(x_a.shape)} and {tuple(x_b.shape)}.")
    codes = encode(denoiser, sde, torch.cat([x_a, x_b]), options, t_min, progress=progress).sample
    path = slerp(codes[: len(x_a)], codes[len(x_a) :], torch.linspace(0.0, 1.0, num, dtype=torch.float64))
    solution = decode(denoiser, sde, path.flatten(0, 1), options, t_min, progress=progress)
    shape = (len(x_a), num)
    return Solution(
        solution.sample.reshape(*shape, *x_a.shape[1:]), solution.calls.reshape(shape), solution.rejected.reshape(shape)
    )
