"""Adaptive reverse-SDE sampling: every sample with its own steps, on a Brownian path that survives rejection.

In y = x/alpha and lambda = log(alpha/sigma) the reverse SDE of stochasticity eta is, for every SDE of the family,

    dy = q (x0_hat - y) d lambda + eta sqrt(2) exp(-lambda) dW,    q = 1 + eta^2,

and over a step from lambda to lambda' = lambda + h it is solved by

    y' = exp(-q h) y + q int exp(-q (lambda' - l)) x0_hat(l) dl + exp(-q lambda') (B(c') - B(c)),

with a Brownian motion B of the clock c = exp(2 eta^2 lambda): the noise is exact for any step. A step that is
rejected has looked at B(c'). Drawing anew would favour paths that are easy to integrate, so the value is kept, and
the shorter step draws B between the two known values (a Brownian bridge).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..basics.checks import (
    check_conditioning,
    check_generators,
    check_integer,
    check_number,
    check_state,
    check_tolerances,
)
from ..basics.noise import Generators, standard_normal_like
from ..basics.precision import finest_dtype, on_device
from ..networks.denoisers import Denoiser
from ..sdes import SDE, expand_like
from .exponential import kernel_moment
from .solution import Solution, SolverError
from .time_grids import MIN_LOG_SNR

LONGEST_LAMBDA_STEP = 1.0  # a rise of x0_hat is about two wide, and a longer step may jump over it unseen


class _BrownianPath:
    """Increments of Brownian motion from the current point of each sample, with known points in its future.

    Known points form a stack, with the nearest on top. A step may end on the top. If it ends before the top, a point of
    the bridge to the top is drawn and pushed; if there is no known point, a fresh increment is drawn and pushed.
    Accepting a step moves the current point. Clock times live on the device ``numbers_on``, points on that of ``y``.
    """

    def __init__(self, y: Tensor, numbers_on: torch.device) -> None:
        self.depth = torch.zeros(len(y), dtype=torch.int64, device=numbers_on)
        self.clock: list[Tensor] = []  # of each place in the stack: clock time, shape (B,)
        self.value: list[Tensor] = []  # B there minus B at the current point, shape (B, ...)
        self.origin = torch.zeros_like(y)

    def top(self) -> Tensor:
        """Clock time of the nearest known point, infinite where there is none, shape (B,)."""
        result = torch.full(self.depth.shape, math.inf, dtype=torch.float64, device=self.depth.device)
        for k, clock in enumerate(self.clock):
            result = torch.where(self.depth == k + 1, clock, result)
        return result

    def _top_value(self) -> Tensor:
        result = self.origin
        for k, value in enumerate(self.value):
            result = torch.where(_mask_of(self.depth == k + 1, result), value, result)
        return result

    def increment(self, now: Tensor, end: Tensor, active: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """B(end) - B(now), known from then on; ``end`` is at most ``top()``; shapes (B,)."""
        top, value = self.top(), self._top_value()
        known = end == top
        fresh = torch.isinf(top)
        share = torch.where(fresh, torch.zeros_like(end), (end - now) / (top - now).clamp(min=1e-300))
        std = torch.where(fresh, end - now, (1.0 - share) * (end - now)).clamp(min=0.0).sqrt()
        z = draw(active & ~known)
        new = expand_like(share.to(value), value) * value + expand_like(std.to(value), value) * z
        new = torch.where(_mask_of(known, value), value, new)
        push = active & ~known
        if bool(push.any()) and int(self.depth[push].max()) == len(self.clock):
            self.clock.append(torch.zeros_like(end))
            self.value.append(torch.zeros_like(value))
        for k in range(len(self.clock)):
            here = push & (self.depth == k)
            self.clock[k] = torch.where(here, end, self.clock[k])
            self.value[k] = torch.where(_mask_of(here, value), new, self.value[k])
        self.depth = self.depth + push.long()
        return new

    def accept(self, accepted: Tensor, increment: Tensor) -> None:
        """Move to the nearest known point."""
        self.depth = self.depth - accepted.long()
        shift = torch.where(_mask_of(accepted, increment), increment, self.origin)
        self.value = [value - shift for value in self.value]


def _mask_of(samples: Tensor, x: Tensor) -> Tensor:
    """What is true of samples, broadcastable against ``x`` and where it is."""
    return expand_like(samples.to(x.device), x)


@dataclass(frozen=True)
class SDEOptions:
    """Settings of ``sample_adaptive``.

    A step is accepted when the root mean square over a sample's entries of error / (atol + rtol |x0_hat|) is at most 1,
    where the error is one of the data.

    Args:
        rtol: Relative tolerance.
        atol: Absolute tolerance, in units of the data.
        max_calls: Network calls per sample after which the sampler gives up.
        stochasticity: 1 for the reverse SDE, 0 for the probability-flow ODE; every value has the same marginals.
    """

    rtol: float = 0.02
    atol: float = 0.01
    max_calls: int = 10_000
    stochasticity: float = 1.0

    def __post_init__(self) -> None:
        rtol, atol = check_tolerances(self.rtol, self.atol)
        object.__setattr__(self, "rtol", rtol)
        object.__setattr__(self, "atol", atol)
        object.__setattr__(self, "max_calls", check_integer("max_calls", self.max_calls, at_least=1))
        stochasticity = check_number("stochasticity", self.stochasticity, at_least=0.0)
        object.__setattr__(self, "stochasticity", stochasticity)


@torch.no_grad()
def sample_adaptive(
    denoiser: Denoiser,
    sde: SDE,
    x: Tensor,
    options: SDEOptions | None = None,
    t_min: float | None = None,
    denoise_final: bool = True,
    conditioning: Mapping[str, Tensor] | None = None,
    generator: Generators = None,
    progress: Callable[[int], object] | None = None,
) -> Solution:
    """Sample the reverse SDE with steps that each sample chooses by its own error.

    It takes the same start as ``sample`` and ends with x0_hat like it. ``sample`` executes a plan, in which all samples
    take the same steps. ``flow.sample_flow`` has the same arguments as this function, the generator left out, and
    integrates the probability-flow ODE.

    A step costs one call. x0_hat is extrapolated in lambda from the last two estimates, it is evaluated at the point
    reached, and the step is done again with this value. (This is the solver of ``exponential`` with ``solver_order=2,
    solver_correction=True``; it is weakly of order two.) The error is the change that the second version makes. It is
    measured against x0_hat, since the state is nearly all noise. The judgement of each sample by its own error follows
    Jolicoeur-Martineau et al. 2021 (arXiv:2105.14080), whose solver takes two calls a step and draws new noise after a
    rejection; the Brownian path follows Rackauckas & Nie 2017 (Discrete Contin. Dyn. Syst. B 22).

    Args:
        denoiser: (x_t of shape (B, ...), t of shape (B,), **conditioning) -> x0_hat. It is called on the samples
            that are on their way.
        sde: The SDE.
        x: Start at t_max, drawn from the prior, shape (B, ...).
        options: Tolerances, limit of calls and stochasticity.
        t_min: Last time; the SDE's own t_min if None.
        denoise_final: Whether to end with x0_hat at ``t_min`` (Tweedie's formula) instead of the state there. The last
            step has evaluated it already.
        conditioning: Arguments of the denoiser with one row per sample, such as ``class_labels``.
        generator: One generator, or a list with one for each sample, with which a sample depends on nothing but its
            own.
        progress: Called with the number of samples that have just arrived.

    Returns:
        Samples and calls.

    Raises:
        ValueError: An argument is out of range, or a start is not finite.
        SolverError: An estimate is not finite, the step size vanishes, or a sample is not finished after
            ``options.max_calls`` calls.
    """
    options = SDEOptions() if options is None else options
    rtol, atol, max_calls, stochasticity = options.rtol, options.atol, options.max_calls, options.stochasticity
    t_min = check_number("t_min", sde.t_min if t_min is None else t_min, above=0.0, below=sde.t_max)
    x = check_state(x)
    check_generators(generator, len(x))
    conditioning = check_conditioning(conditioning, len(x))
    eta2, q, batch = stochasticity**2, 1.0 + stochasticity**2, len(x)
    # What is one number for each sample, such as its place on the path, is float64, and lives where that exists.
    numbers_on = x.device if finest_dtype(x.device) == torch.float64 else torch.device("cpu")
    start_lam = 0.5 * max(float(sde.log_snr(sde.t_max)), MIN_LOG_SNR)
    end_lam = 0.5 * float(sde.log_snr(t_min))

    def evaluate(y: Tensor, lam: Tensor, active: Tensor, before: Tensor | None) -> Tensor:
        t = sde.time_of(2.0 * lam[active]).clamp(max=sde.t_max)
        rows = {name: value[active.to(value.device)] for name, value in conditioning.items()}
        here = active.to(y.device)
        state = y[here] * expand_like(sde.alpha(t), y[here]).to(y)
        t = on_device(t, y.device)
        estimate = denoiser(state, t, **rows)
        if estimate.shape != state.shape:
            raise ValueError(
                f"the denoiser returned shape {tuple(estimate.shape)} for a state of {tuple(state.shape)}."
            )
        finite = torch.isfinite(estimate).flatten(1).all(1)
        if not bool(finite.all()):
            where = float(t[int(finite.to(torch.int64).argmin())])
            raise SolverError(f"the denoiser is not finite at t = {where:g}, in {int((~finite).sum())} samples.")
        result = torch.zeros_like(y) if before is None else before.clone()
        result[here] = estimate.to(y)
        return result

    def draw(wanted: Tensor) -> Tensor:
        z = torch.zeros_like(y)
        if bool(wanted.any()):
            chosen: Generators = generator
            if generator is not None and not isinstance(generator, torch.Generator):
                chosen = [g for g, w in zip(generator, wanted.tolist(), strict=True) if w]
            here = wanted.to(y.device)
            z[here] = standard_normal_like(y[here], chosen).to(y)
        return z

    lam = torch.full((batch,), start_lam, dtype=torch.float64, device=numbers_on)
    # x/alpha at the start; where alpha(t_max) = 0 the state is noise, at sigma/alpha = 1000 as at t_max.
    first = float(sde.log_snr(sde.t_max))
    y = x / float(sde.alpha(sde.t_max)) if first >= MIN_LOG_SNR else x * (math.exp(-start_lam) / sde.prior_std)
    path = _BrownianPath(y, numbers_on)
    active = torch.ones(batch, dtype=torch.bool, device=numbers_on)
    estimate = evaluate(y, lam, active, None)
    previous, back = estimate, torch.full_like(lam, math.inf)  # the estimate before, and its distance in lambda
    step = torch.full_like(lam, 0.1)
    calls, rejected = torch.ones(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)

    while bool(active.any()):
        if int(calls.max()) >= max_calls:
            raise SolverError(f"{int(active.sum())} samples are not finished after max_calls={max_calls} calls.")
        target = torch.minimum(lam + step.clamp(max=LONGEST_LAMBDA_STEP), torch.full_like(lam, end_lam))
        target = torch.where(end_lam - target < 1e-3 * step, torch.full_like(lam, end_lam), target)
        if eta2 > 0:
            now, top = torch.exp(2 * eta2 * lam), path.top()
            clock = torch.exp(2 * eta2 * target)
            lands = clock >= top * (1 - 1e-9)  # on the nearest known point of the path, at the latest
            clock = torch.where(lands, top, clock)
            target = torch.where(lands, torch.log(torch.where(lands, top, clock)) / (2 * eta2), target)
            noise = path.increment(now, clock, active, draw) * expand_like(torch.exp(-q * target), y).to(y)
        else:
            noise = torch.zeros_like(y)
        h = target - lam
        # Exact weights of a constant and of a slope: q int_0^h exp(q (w - h)) (1, w) dw.
        constant, slope = (kernel_moment(h, torch.full_like(h, q), power) for power in (0, 1))
        c0, c1, ahead = (expand_like(v, y).to(y) for v in (constant, slope / back, slope / h))
        base = y * (1 - c0) + noise + c0 * estimate
        predicted = base + c1 * (estimate - previous)
        new = evaluate(predicted, target, active, estimate)
        corrected = base + ahead * (new - estimate)
        tolerance = atol + rtol * torch.maximum(estimate.abs(), new.abs())
        error = ((corrected - predicted) / tolerance).flatten(1).square().mean(1).sqrt().to(numbers_on).double()
        calls += active.cpu()
        fine = active & (error <= 1.0)
        rejected += (active & ~fine).cpu()

        if eta2 > 0:
            path.accept(fine, noise / expand_like(torch.exp(-q * target), y).to(y))
        chosen = _mask_of(fine, y)
        done = fine & (target >= end_lam * (1 - 1e-12) if end_lam > 0 else target >= end_lam)
        y = torch.where(chosen, corrected, y)
        previous, estimate = torch.where(chosen, estimate, previous), torch.where(chosen, new, estimate)
        lam, back = torch.where(fine, target, lam), torch.where(fine, h, back)
        # The error of a step grows like h^(3/2): the noise in x0_hat decides.
        factor = (0.9 * error.clamp(min=1e-10) ** (-2.0 / 3.0)).clamp(0.2, 3.0)
        step = torch.where(active, h * factor, step)
        active = active & ~done
        if bool((active & (step < 1e-9 * lam.abs().clamp(min=1.0))).any()):
            raise SolverError(
                f"the step size vanished: the denoiser is not smooth, or its round-off exceeds the tolerance (rtol "
                f"{rtol:g}, atol {atol:g})."
            )
        if progress is not None:
            progress(int(done.sum()))

    alpha = float(sde.alpha(t_min))
    return Solution(estimate if denoise_final else y * alpha, calls, rejected)
