r"""The probability-flow ODE: sampling, encoding, decoding and interpolation by an adaptive solver.

Every Gaussian path has a deterministic flow with its marginals (Song et al. 2021, eq. 13). It is integrated here in

    z = (x - alpha m) / s,   s^2 = alpha^2 c^2 + sigma^2,      tau = asinh(c alpha / sigma),

with m and c the mean and standard deviation of the data, in which it becomes, for every SDE alike,

    dz / dtau = (x0_hat - m) / c - tanh(tau) z.

z keeps unit variance along the whole path, and the linear part is exact: for Gaussian data with this mean and variance
the right-hand side is zero. Where noise dominates, tau is proportional to alpha/sigma, so that alpha = 0 (rectified
flow and cosine at t = 1) is an ordinary point. Where the data dominate, tau is half the log-SNR plus a constant, which
spreads out the fine structure evenly. m and c need not be right, because they only decide how straight the flow is. The
density follows from

    d log p(z) / dtau = d tanh(tau) - (s / c) tr(d x0_hat / d x).

The solver is a variable-step, variable-order Adams method of predict-evaluate-correct type: **one network call per
step**, where a Runge-Kutta pair of comparable order needs six. Each step takes the order, 1 to 5, that promises the
longest next step. Every sample has its own time, step size and accept or reject decision, so a result does not depend
on its batch mates. A sample that has arrived gives its place in the batch to the next one that waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..basics.checks import check_conditioning, check_integer, check_number, check_state, check_tolerances
from ..networks.denoisers import Denoiser
from ..sampling.solution import FlowSolution, SolverError
from ..sdes import SDE, expand_like
from .adams import ORDER, _best_order, adams_weights
from .coordinates import FlowCoordinates, check_flow_times

SAFETY, SHRINK, GROW = 0.8, 0.2, 2.0
PROPORTIONAL, INTEGRAL = 0.7, 0.4


@dataclass(frozen=True)
class ODEOptions:
    """Settings of the solver.

    A step is accepted when the root mean square over a sample's entries of error / (atol + rtol |z|) is at most 1. z
    has unit variance whatever the SDE and the noise level, so tolerances mean the same for every model.

    Args:
        rtol: Relative tolerance.
        atol: Absolute tolerance, in standard deviations of the current marginal.
        max_calls: Network calls per sample after which the solver gives up.
        batch_size: Samples in one network call.
        data_mean: Approximate mean of the data, in the network's range.
        data_std: Approximate standard deviation of the data.
    """

    rtol: float = 1e-4
    atol: float = 1e-4
    max_calls: int = 5000
    batch_size: int = 64
    data_mean: float = 0.0
    data_std: float = 0.5

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol, largest_atol=1.0)
        # Whole numbers such as 64.0 become integers, since the batch size is used in slices.
        for name in ("max_calls", "batch_size"):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), at_least=1))
        check_number("data_mean", self.data_mean)
        check_number("data_std", self.data_std, above=0.0)


class TraceFunction(Protocol):
    """The function by which ``integrate`` learns tr(d x0_hat / dx) along the way; see ``trace``."""

    @property
    def replicates(self) -> int:
        """Independent estimates per point."""

    @property
    def resampled(self) -> bool:
        """Whether the noise of different points is independent."""

    def __call__(
        self, denoise: Callable[[Tensor], Tensor], x: Tensor, samples: Sequence[int], gain: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x0_hat, shape of ``x``, and estimates of the trace, shape (B, replicates), float64.

        ``samples`` says which of all samples the rows of ``x`` are. ``gain``, shape (B,), is the derivative that x0_hat
        has for isotropic Gaussian data; it serves as a control variate.
        """


@dataclass
class Integral:
    """A ``FlowSolution`` and the change of log-density.

    Attributes:
        solution: The solution for the state.
        log_density_change: log p(z_start) - log p(z_end) in nats, one column per replicate, shape (B, R), float64.
        variance: Variance that the noise of resampled probes causes in the mean of ``log_density_change`` over the
            replicates, shape (B,).
    """

    solution: FlowSolution
    log_density_change: Tensor
    variance: Tensor


@dataclass
class _Slots:
    """The samples that are on their way, one row each. Control is on the host in float64, states are on the device."""

    index: np.ndarray  # the sample's number among all samples
    tau: np.ndarray
    step: np.ndarray  # size of the next step
    count: np.ndarray  # points in the history; 0 before the first call
    order: np.ndarray  # points of the history that the predictor uses
    error: np.ndarray  # error norm of the last accepted step
    calls: np.ndarray
    rejected: np.ndarray
    tau_history: np.ndarray  # (S, ORDER), latest first
    rate_history: np.ndarray  # (S, ORDER, R) of d log p / dtau
    integral: np.ndarray  # (S, R)
    variance: np.ndarray  # (S,)
    z: Tensor = field(repr=False)
    field_history: Tensor = field(repr=False)  # (S, ORDER, ...)

    @classmethod
    def begin(cls, index: np.ndarray, z: Tensor, tau: float, step: float, replicates: int) -> _Slots:
        n = len(index)
        return cls(
            index=index,
            tau=np.full(n, tau),
            step=np.full(n, step),
            count=np.zeros(n, dtype=np.int64),
            order=np.zeros(n, dtype=np.int64),
            error=np.ones(n),
            calls=np.zeros(n, dtype=np.int64),
            rejected=np.zeros(n, dtype=np.int64),
            tau_history=np.full((n, ORDER), tau),
            rate_history=np.zeros((n, ORDER, replicates)),
            integral=np.zeros((n, replicates)),
            variance=np.zeros(n),
            z=z,
            field_history=z.new_zeros((n, ORDER, *z.shape[1:])),
        )

    def keep(self, rows: np.ndarray, new: _Slots | None) -> _Slots:
        """The chosen rows, followed by new ones."""
        chosen = torch.from_numpy(rows).to(self.z.device)
        values = {}
        for name, value in vars(self).items():
            part = value[rows] if isinstance(value, np.ndarray) else value[chosen]
            if new is not None:
                other = getattr(new, name)
                part = np.concatenate([part, other]) if isinstance(part, np.ndarray) else torch.cat([part, other])
            values[name] = part
        return _Slots(**values)


def _host(z: Tensor, values: np.ndarray | Tensor) -> Tensor:
    """Numbers of the host as a tensor of the same shape, with z's dtype and on z's device."""
    tensor = (torch.from_numpy(values) if isinstance(values, np.ndarray) else values).to(dtype=z.dtype)
    return tensor.to(z.device)


def _combine(weights: np.ndarray, values: Tensor) -> Tensor:
    """Sum over the points of a history: (S, P) x (S, P, ...) -> (S, ...)."""
    flat = torch.bmm(_host(values, weights)[:, None, :], values.flatten(2)) if values.ndim > 2 else None
    return (
        flat.reshape(values.shape[:1] + values.shape[2:])
        if flat is not None
        else (_host(values, weights) * values).sum(1)
    )


@torch.inference_mode(False)
def integrate(
    denoiser: Denoiser,
    sde: SDE,
    x: Tensor,
    t_start: float,
    t_end: float,
    options: ODEOptions,
    trace: TraceFunction | None = None,
    conditioning: Mapping[str, Tensor] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Integral:
    """Carry samples along the probability flow, with the log-density if ``trace`` is given.

    Args:
        denoiser: (x_t, t, **conditioning) -> x0_hat; t has shape (B,).
        sde: The SDE.
        x: State at ``t_start``, shape (B, ...).
        t_start: SDE time of the state.
        t_end: SDE time to carry it to, earlier or later than ``t_start``.
        options: Settings of the solver.
        trace: Estimates the divergence. It only caps the step size and never enters the error estimate.
        conditioning: Arguments of the denoiser with one row per sample.
        progress: Called with the number of samples that have just arrived.

    Raises:
        ValueError: Bad arguments.
        RuntimeError: The solver gives up, because of too many calls or a denoiser that is not finite or not smooth.
    """
    check_flow_times(sde, t_start, t_end)
    x = check_state(x)
    conditioning = check_conditioning(conditioning, len(x))
    on_host = torch.float32 if x.device.type == "mps" else torch.float64
    coordinates = FlowCoordinates(sde, min(t_start, t_end), max(t_start, t_end), options.data_mean, options.data_std)
    start, end = coordinates.tau_of(t_start), coordinates.tau_of(t_end)
    sign, distance = math.copysign(1.0, end - start), abs(end - start)
    dims, replicates = x[0].numel(), 1 if trace is None else trace.replicates
    mean, std = options.data_mean, options.data_std

    result = torch.empty_like(x)
    total = len(x)
    calls, rejected = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
    change, variance = np.zeros((total, replicates)), np.zeros(total)

    def begin(first: int, last: int) -> _Slots:
        z = coordinates.to_z(x[first:last], t_start)
        return _Slots.begin(np.arange(first, last), z, start, 0.05 * distance, replicates)

    waiting = min(options.batch_size, total)
    slots = begin(0, waiting)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        while len(slots.index):
            s = slots
            is_first = s.count == 0
            # A rest shorter than two steps is divided into two equal steps: the last step must not be a tiny one.
            rest = np.abs(end - s.tau)
            step = np.where(s.step >= rest * (1 - 1e-9), rest, np.where(s.step > 0.5 * rest, 0.5 * rest, s.step))
            signed = sign * np.where(is_first, 1.0, step)
            nodes = (s.tau_history - s.tau[:, None]) / signed[:, None]
            with_new = np.concatenate([np.ones((len(nodes), 1)), nodes], 1)
            predict = adams_weights(nodes, s.order)
            # These are the Adams-Moulton weights through the new point and the last 0, 1, ... points of the history.
            moulton = np.stack([adams_weights(with_new, np.minimum(s.count, k) + 1) for k in range(ORDER + 1)], 1)
            signed = np.where(is_first, 0.0, signed)
            target = np.where(is_first | (step < rest), s.tau + signed, end)

            z = s.z + _combine(predict * signed[:, None], s.field_history)
            t, alpha, scale = coordinates.at(target)
            column = tuple(expand_like(_host(z, v), z) for v in (alpha * mean, scale, np.tanh(target)))
            state = torch.addcmul(column[0], column[1], z)
            rows = torch.from_numpy(s.index).to(x.device)
            extra = {name: value[rows.to(value.device)] for name, value in conditioning.items()}
            time = t.to(dtype=on_host).to(x.device)

            def denoise(x: Tensor, time: Tensor = time, extra: dict[str, Tensor] = extra) -> Tensor:
                return denoiser(x, time, **extra)

            if trace is None:
                x0 = denoise(state)
                rate = np.zeros((len(target), replicates))
            else:
                gain = np.tanh(target) * std / scale.numpy()
                x0, estimates = trace(denoise, state, s.index.tolist(), torch.from_numpy(gain))
                jacobian = estimates.to("cpu", torch.float64).numpy() * (scale.numpy() / std)[:, None]
                rate = dims * np.tanh(target)[:, None] - jacobian
            if x0.shape != state.shape:
                raise ValueError(f"the denoiser returned shape {tuple(x0.shape)} for a state of {tuple(state.shape)}.")
            slope = (x0.to(state.dtype) - mean) / std - column[2] * z

            history = torch.cat([slope[:, None], s.field_history], 1)
            # The error of order k is what one more point of the history changes, shape (S, ORDER, ...).
            change_of_order = (moulton[:, 1:] - moulton[:, :-1]) * signed[:, None, None]
            errors = torch.bmm(_host(z, change_of_order), history.flatten(2))
            highest = _combine(moulton[:, -1] * signed[:, None], history)
            allowed = options.atol + options.rtol * torch.maximum(s.z.abs(), (s.z + highest).abs())
            sizes = (errors / allowed.flatten(1)[:, None]).square().mean(2).sqrt()
            slopes = slope.flatten(1).square().mean(1, keepdim=True).sqrt()
            finite = torch.isfinite(x0).flatten(1).all(1, keepdim=True).to(slopes)
            on_arrival = torch.cat([sizes, slopes, finite], 1).to("cpu", torch.float64).numpy()
            sizes_of_orders, steepness, is_finite = on_arrival[:, :-2], on_arrival[:, -2], on_arrival[:, -1] == 1.0
            best = _best_order(sizes_of_orders, s.count)
            size = np.where(is_first, 0.0, sizes_of_orders[np.arange(len(best)), best - 1])
            correct = moulton[np.arange(len(best)), best]
            corrected = s.z + _combine(correct * signed[:, None], history)
            is_finite &= np.isfinite(rate).all(1) & np.isfinite(np.where(is_first, steepness, 0.0))
            if not is_finite.all():
                where = float(t[int(np.argmin(is_finite))])
                raise SolverError(
                    f"the denoiser is not finite at t = {where:g}. (An epsilon or score prediction does not determine "
                    "the data where alpha = 0; and a network is only good for times that it was trained on.)"
                )
            size = np.where(np.isfinite(size), size, 1e10)
            accept = is_first | (size <= 1.0)

            s.calls += 1
            s.rejected += ~accept
            taken = np.where(accept, signed, 0.0)
            rates = np.concatenate([rate[:, None], s.rate_history], 1)
            # The trace is integrated at full order, whatever order was chosen for the state.
            s.integral += np.einsum("sp,spr->sr", moulton[:, -1] * taken[:, None], rates)
            if trace is not None and trace.resampled:
                s.variance += np.where(accept & ~is_first, _noise(target, rates.mean(2), s), 0.0)
            on_device = rows.new_tensor(accept).bool()
            s.z = torch.where(expand_like(on_device, z), corrected, s.z)
            s.field_history = torch.where(expand_like(on_device, history), history[:, :ORDER], s.field_history)
            s.rate_history = np.where(accept[:, None, None], rates[:, :ORDER], s.rate_history)
            s.tau = np.where(accept, target, s.tau)
            times = np.concatenate([target[:, None], s.tau_history], 1)
            s.tau_history = np.where(accept[:, None], times[:, :ORDER], s.tau_history)

            bounded, power = np.maximum(size, 1e-8), 1.0 / (best + 1.0)
            smooth = SAFETY * bounded ** (-PROPORTIONAL * power) * s.error ** (INTEGRAL * power)
            factor = np.where(accept, np.clip(smooth, SHRINK, GROW), np.clip(SAFETY * bounded**-power, SHRINK, 0.9))
            # The first step changes z by no more than a tenth of its standard deviation.
            first_step = np.minimum(s.step, 0.1 / np.maximum(steepness, 1e-12))
            s.step = np.where(is_first, first_step, step * factor)
            if trace is not None:
                s.step = np.minimum(s.step, _largest_step(s.rate_history[:, 0], dims, options))
            s.error = np.where(accept & ~is_first, bounded, s.error)
            grown = np.minimum(s.count + 1, ORDER)
            s.order = np.where(accept, np.where(best >= s.count, grown, best), np.minimum(best, s.count))
            s.count = np.where(accept, grown, s.count)

            arrived = accept & (s.tau == end)
            if (s.step < 1e-9 * np.maximum(1.0, np.abs(s.tau)))[~arrived].any():
                raise SolverError(
                    f"the step size vanished at t = {float(t[int(np.argmin(s.step))]):g}: the denoiser is not smooth "
                    f"there, or its round-off exceeds the tolerance (rtol {options.rtol:g}, atol {options.atol:g})."
                )
            if (s.calls >= options.max_calls)[~arrived].any():
                raise SolverError(
                    f"a sample has not arrived after max_calls = {options.max_calls} network calls (at t = "
                    f"{float(t[int(np.argmax(s.calls * ~arrived))]):g}); raise max_calls or the tolerances."
                )
            if arrived.any():
                done = s.index[arrived]
                chosen = torch.from_numpy(np.flatnonzero(arrived)).to(x.device)
                result[torch.from_numpy(done).to(x.device)] = coordinates.to_x(s.z[chosen], t_end)
                calls[done], rejected[done] = s.calls[arrived], s.rejected[arrived]
                change[done], variance[done] = -s.integral[arrived], s.variance[arrived]
                following = min(waiting + len(done), total)
                new = begin(waiting, following) if following > waiting else None
                waiting = following
                slots = s.keep(np.flatnonzero(~arrived), new)
                if progress is not None:
                    progress(len(done))
    solution = FlowSolution(result, torch.from_numpy(calls), torch.from_numpy(rejected))
    return Integral(solution, torch.from_numpy(change), torch.from_numpy(variance))


def _largest_step(rate: np.ndarray, dims: int, options: ODEOptions) -> np.ndarray:
    """Upper bound of the next step for the sake of the trace.

    The error norm of the state gives little weight to directions in which the data barely vary, but the trace counts
    every direction alike. Each direction with standard deviation c_i makes the trace rise within a width of one in tau,
    at tau = log(c / c_i), and the solver must not jump over this rise. A step of 0.8 resolves it to about 1e-3 of its
    height, and the method is of fifth order. Before the first such rise the rate is still growing from zero like
    exp(-2 tau), and a longer step is allowed if the integral over it is below ten tolerances.
    """
    tolerance = max(options.atol, options.rtol)
    ordinary = 0.8 * min(1.0, (tolerance / 1e-4) ** 0.2)
    per_dimension = np.maximum(np.abs(rate.mean(1)) / dims, 1e-300)
    return np.maximum(ordinary, 0.5 * np.log1p(20.0 * tolerance / per_dimension))


def _noise(target: np.ndarray, rates: np.ndarray, slots: _Slots) -> np.ndarray:
    """Contribution of the last accepted point to the variance of the integral of independently noisy rates.

    The distance of a rate from the straight line between its two neighbours estimates its noise. The curvature of the
    true rate adds to this distance, so that the noise is rather overestimated. The weight of a rate is that of the
    trapezoidal rule.
    """
    left, here = slots.tau_history[:, 1], slots.tau_history[:, 0]
    width = target - left
    usable = slots.count >= 2
    share = np.where(usable, (target - here) / np.where(usable, width, 1.0), 0.5)
    residual = rates[:, 1] - (share * rates[:, 2] + (1.0 - share) * rates[:, 0])
    noise = residual**2 / (1.0 + share**2 + (1.0 - share) ** 2)
    return np.where(usable, 0.25 * width**2 * noise, 0.0)
