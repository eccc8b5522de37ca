"""The solver of the probability-flow ODE: an Adams method with steps that every sample chooses for itself.

It is a variable-step, variable-order Adams method of predict-evaluate-correct type, in the variables of
``coordinates``: **one network call per step**, where a Runge-Kutta pair of comparable order needs six. Adams-Bashforth
weights of the last k slopes predict z at the end of the step, the network is called there, and Adams-Moulton weights
correct z with the slope found. What the k-th point of the history changes in the corrected z is the error of order k.
Each step takes the order, 1 to 5, that promises the longest next step.

Every sample has its own time, step size and accept or reject decision, so a result does not depend on its batch mates.
A sample that has arrived gives its place in the batch to the next one that waits. The control of the steps is numpy on
the host (``control``), the states are tensors on the device, and one transfer per step brings the error norms over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..basics.checks import check_conditioning, check_integer, check_number, check_state, check_tolerances
from ..basics.precision import on_device
from ..networks.denoisers import Denoiser
from ..sampling.solution import Solution, SolverError
from ..sdes import SDE, expand_like
from .adams import HIGHEST_ORDER
from .control import StepControl, StepVerdict, TrialStep
from .coordinates import FlowCoordinates, check_flow_times
from .trace import TraceEstimator

# A step has vanished that is shorter than this share of tau, or of 1 where tau is smaller.
VANISHED_STEP = 1e-9


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


@dataclass
class Integral:
    """A ``Solution`` and the change of log-density.

    Attributes:
        solution: The solution for the state.
        log_density_change: log p(z_start) - log p(z_end) in nats, one column per replicate, shape (B, R), float64.
        variance: Variance that the noise of resampled probes causes in the mean of ``log_density_change`` over the
            replicates, shape (B,).
    """

    solution: Solution
    log_density_change: Tensor
    variance: Tensor


@dataclass(frozen=True)
class FieldValue:
    """The right-hand side of the flow at one point per row.

    Attributes:
        t: SDE time of the points, shape (S,), float64 on the host.
        slope: dz/dtau, shape (S, ...), on the device.
        estimate_is_finite: Whether x0_hat is finite, shape (S,), on the device.
        rate: d log p / dtau, one column per replicate, shape (S, R), float64 on the host; 0 without a trace.
    """

    t: Tensor
    slope: Tensor
    estimate_is_finite: Tensor
    rate: np.ndarray


@dataclass(frozen=True)
class FlowField:
    """The right-hand side of the flow in the variables (z, tau).

    Args:
        denoiser: (x_t, t, **conditioning) -> x0_hat.
        coordinates: The variables.
        conditioning: Arguments of the denoiser with one row per sample.
        trace: Estimates the divergence; None to go without the density.
    """

    denoiser: Denoiser
    coordinates: FlowCoordinates
    conditioning: Mapping[str, Tensor]
    trace: TraceEstimator | None

    def __call__(self, z: Tensor, tau: np.ndarray, samples: np.ndarray) -> FieldValue:
        """Evaluate the field by one network call.

        Args:
            z: The points, shape (S, ...).
            tau: Their tau, shape (S,).
            samples: Which of all samples they belong to, shape (S,).

        Raises:
            ValueError: The denoiser returns another shape.
        """
        mean, std = self.coordinates.mean, self.coordinates.std
        t, alpha, scale = self.coordinates.at(tau)
        shift, width, pull = (expand_like(_moved_to(z, v), z) for v in (alpha * mean, scale, np.tanh(tau)))
        x = torch.addcmul(shift, width, z)
        time = on_device(t, z.device)
        rows = torch.from_numpy(samples).to(z.device)
        conditioning = {name: value[rows.to(value.device)] for name, value in self.conditioning.items()}

        def denoise(x: Tensor) -> Tensor:
            return self.denoiser(x, time, **conditioning)

        if self.trace is None:
            x0, rate = denoise(x), np.zeros((len(tau), 1))
        else:
            gain = np.tanh(tau) * std / scale.numpy()
            x0, estimates = self.trace(denoise, x, samples.tolist(), torch.from_numpy(gain))
            divergence = estimates.numpy() * (scale.numpy() / std)[:, None]
            rate = x[0].numel() * np.tanh(tau)[:, None] - divergence
        if x0.shape != x.shape:
            raise ValueError(f"the denoiser returned shape {tuple(x0.shape)} for a state of {tuple(x.shape)}.")
        slope = (x0.to(x.dtype) - mean) / std - pull * z
        return FieldValue(t, slope, torch.isfinite(x0).flatten(1).all(1), rate)


@dataclass
class FlowBatch:
    """The samples that are on their way, one row each, and the parts of a step.

    Attributes:
        control: Where each row stands, on the host.
        z: State of each row, shape (S, ...), on the device.
        slopes: dz/dtau at the last points of each row, the latest first, shape (S, HIGHEST_ORDER, ...), on the device.
    """

    control: StepControl
    z: Tensor
    slopes: Tensor

    @classmethod
    def begin(cls, control: StepControl, z: Tensor) -> FlowBatch:
        """Rows without a history."""
        return cls(control, z, z.new_zeros((len(z), HIGHEST_ORDER, *z.shape[1:])))

    def __len__(self) -> int:
        return len(self.z)

    def propose(self, end: float) -> tuple[TrialStep, Tensor]:
        """The next step of each row towards ``end``, and the z that the predictor expects there, shape (S, ...)."""
        trial = self.control.propose(end)
        return trial, self.z + _weighted_sum(trial.predictor * trial.length[:, None], self.slopes)

    def evaluate(self, field: FlowField, trial: TrialStep, z: Tensor) -> FieldValue:
        """The field at the predicted ends of the steps."""
        return field(z, trial.target, self.control.sample)

    def judge(self, trial: TrialStep, value: FieldValue, options: ODEOptions) -> tuple[StepVerdict, Tensor]:
        """The verdict on the steps, and the corrected z of the order that it takes, shape (S, ...).

        Raises:
            SolverError: The field is not finite.
        """
        length, every_row = trial.length[:, None], np.arange(len(self))
        history = torch.cat([value.slope[:, None], self.slopes], 1)
        # The error of order k is what one more point of the history changes.
        one_more_point = (trial.correctors[:, 1:] - trial.correctors[:, :-1]) * length[:, None]
        errors = torch.bmm(_moved_to(self.z, one_more_point), history.flatten(2))
        full_order = self.z + _weighted_sum(trial.correctors[:, -1] * length, history)
        allowed = options.atol + options.rtol * torch.maximum(self.z.abs(), full_order.abs())
        norms = (errors / allowed.flatten(1)[:, None]).square().mean(2).sqrt()
        steepness = value.slope.flatten(1).square().mean(1).sqrt()
        # This is the one transfer from the device to the host in a step.
        columns = [norms, steepness[:, None], value.estimate_is_finite[:, None].to(norms)]
        on_host = torch.cat(columns, 1).cpu().double().numpy()

        verdict = self.control.judge(trial, on_host[:, :-2], on_host[:, -2])
        finite = (on_host[:, -1] == 1.0) & np.isfinite(value.rate).all(1)
        # The first step is chosen by the first slope, which may overflow where x0_hat does not.
        finite &= ~trial.is_first | np.isfinite(verdict.steepness)
        if not finite.all():
            raise SolverError(
                f"the denoiser is not finite at t = {float(value.t[int(np.argmin(finite))]):g}. (An epsilon or score "
                "prediction does not determine the data where alpha = 0; and a network is only good for times that it "
                "was trained on.)"
            )
        return verdict, self.z + _weighted_sum(trial.correctors[every_row, verdict.order] * length, history)

    def accept(
        self, trial: TrialStep, value: FieldValue, verdict: StepVerdict, corrected: Tensor, rate_is_noisy: bool
    ) -> None:
        """Move the rows whose step counts to its end, and choose the next step of all rows."""
        accepted = torch.from_numpy(verdict.accepted).to(self.z.device)
        history = torch.cat([value.slope[:, None], self.slopes[:, :-1]], 1)
        self.z = torch.where(expand_like(accepted, corrected), corrected, self.z)
        self.slopes = torch.where(expand_like(accepted, history), history, self.slopes)
        self.control.accept(trial, verdict, value.rate, rate_is_noisy)

    def check_progress(self, end: float, value: FieldValue, options: ODEOptions) -> None:
        """Check that the rows that have not arrived can go on.

        Raises:
            SolverError: They cannot.
        """
        control, underway = self.control, self.control.tau != end
        if (control.step < VANISHED_STEP * np.maximum(1.0, np.abs(control.tau)))[underway].any():
            raise SolverError(
                f"the step size vanished at t = {float(value.t[int(np.argmin(control.step))]):g}: the denoiser is not "
                f"smooth there, or its round-off exceeds the tolerance (rtol {options.rtol:g}, atol {options.atol:g})."
            )
        if (control.calls >= options.max_calls)[underway].any():
            raise SolverError(
                f"a sample has not arrived after max_calls = {options.max_calls} network calls (at t = "
                f"{float(value.t[int(np.argmax(control.calls * underway))]):g}); raise max_calls or the tolerances."
            )

    def retire(self, end: float) -> FlowBatch | None:
        """Take out the rows that have arrived at ``end``, and return them; None if there are none."""
        arrived = self.control.tau == end
        if not arrived.any():
            return None
        gone, left = self._rows(np.flatnonzero(arrived)), self._rows(np.flatnonzero(~arrived))
        self.control, self.z, self.slopes = left.control, left.z, left.slopes
        return gone

    def join(self, other: FlowBatch) -> None:
        """Add the rows of another batch at the end."""
        self.control = self.control.followed_by(other.control)
        self.z, self.slopes = torch.cat([self.z, other.z]), torch.cat([self.slopes, other.slopes])

    def _rows(self, chosen: np.ndarray) -> FlowBatch:
        on_device = torch.from_numpy(chosen).to(self.z.device)
        return FlowBatch(self.control.rows(chosen), self.z[on_device], self.slopes[on_device])


def _moved_to(z: Tensor, values: np.ndarray | Tensor) -> Tensor:
    """Numbers of the host as a tensor of the same shape, with z's dtype and on z's device."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    return tensor.to(dtype=z.dtype).to(z.device)


def _weighted_sum(weights: np.ndarray, history: Tensor) -> Tensor:
    """Sum over the points of a history: (S, P) x (S, P, ...) -> (S, ...)."""
    total = torch.bmm(_moved_to(history, weights)[:, None], history.flatten(2))
    return total.reshape(history.shape[:1] + history.shape[2:])


@torch.inference_mode(False)
def integrate(
    denoiser: Denoiser,
    sde: SDE,
    x: Tensor,
    t_start: float,
    t_end: float,
    options: ODEOptions,
    trace: TraceEstimator | None = None,
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

    Returns:
        The state at ``t_end``, the calls, and the change of the log-density, which is 0 without ``trace``.

    Raises:
        ValueError: Bad arguments.
        SolverError: The solver gives up, because of too many calls or a denoiser that is not finite or not smooth.
    """
    check_flow_times(sde, t_start, t_end)
    x = check_state(x)
    total, dims = len(x), x[0].numel()
    coordinates = FlowCoordinates(sde, min(t_start, t_end), max(t_start, t_end), options.data_mean, options.data_std)
    field = FlowField(denoiser, coordinates, check_conditioning(conditioning, total), trace)
    start, end = coordinates.tau_of(t_start), coordinates.tau_of(t_end)
    replicates = 1 if trace is None else trace.replicates

    def begin(first: int, last: int) -> FlowBatch:
        control = StepControl.begin(np.arange(first, last), start, abs(end - start), replicates)
        return FlowBatch.begin(control, coordinates.to_z(x[first:last], t_start))

    result = torch.empty_like(x)
    calls, rejected = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
    change, variance = np.zeros((total, replicates)), np.zeros(total)

    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        begun = min(options.batch_size, total)
        batch = begin(0, begun)
        while len(batch):
            trial, predicted = batch.propose(end)
            value = batch.evaluate(field, trial, predicted)
            verdict, corrected = batch.judge(trial, value, options)
            batch.accept(trial, value, verdict, corrected, rate_is_noisy=trace is not None and trace.resampled)
            if trace is not None:
                batch.control.limit_step(dims, max(options.atol, options.rtol))
            batch.check_progress(end, value, options)

            gone = batch.retire(end)
            if gone is None:
                continue
            done = gone.control.sample
            result[torch.from_numpy(done).to(x.device)] = coordinates.to_x(gone.z, t_end)
            calls[done], rejected[done] = gone.control.calls, gone.control.rejected
            change[done], variance[done] = -gone.control.integral, gone.control.variance
            following = min(begun + len(done), total)
            if following > begun:
                batch.join(begin(begun, following))
                begun = following
            if progress is not None:
                progress(len(done))
    solution = Solution(result, torch.from_numpy(calls), torch.from_numpy(rejected))
    return Integral(solution, torch.from_numpy(change), torch.from_numpy(variance))
