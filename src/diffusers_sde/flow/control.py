"""The control of the flow's solver: which step each sample tries, whether it counts, and what the sample tries next.

Everything here is numpy on the host, in float64 with one row per sample, whatever the precision and device of states.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .adams import HIGHEST_ORDER, adams_weights

# The next step is this factor times the one whose error would be just acceptable.
STEP_SAFETY = 0.8
# Limits of the factor from one step to the next, and the upper one after a rejection.
SMALLEST_GROWTH, LARGEST_GROWTH, LARGEST_RETRY = 0.2, 2.0, 0.9
# Exponents, times order + 1, of the errors of this step and of the one before (a PI controller, Gustafsson 1991).
PROPORTIONAL_GAIN, INTEGRAL_GAIN = 0.7, 0.4
# The first step is at most this share of the way, and changes z by no more than this many standard deviations.
FIRST_SHARE, FIRST_CHANGE = 0.05, 0.1
# Errors are kept within these limits, so that their powers are finite.
SMALLEST_ERROR, LARGEST_ERROR = 1e-8, 1e10
# The longest step that resolves a rise of the trace at a tolerance of 1e-4, in tau.
TRACE_STEP = 0.8


@dataclass(frozen=True)
class TrialStep:
    """The step that each row tries.

    Attributes:
        is_first: Whether the row has no history yet. Its step has length 0 and only evaluates the field, shape (S,).
        length: Signed length in tau, shape (S,).
        target: tau at the end, shape (S,).
        predictor: Adams-Bashforth weights of the history for a unit step, shape (S, P) with P = HIGHEST_ORDER.
        correctors: Adams-Moulton weights for a unit step, shape (S, P + 1, P + 1). Entry k of the middle axis goes
            through the new point and the last k points of the history.
    """

    is_first: np.ndarray
    length: np.ndarray
    target: np.ndarray
    predictor: np.ndarray
    correctors: np.ndarray


@dataclass(frozen=True)
class StepVerdict:
    """What is made of a tried step.

    Attributes:
        accepted: Whether the step counts, shape (S,).
        order: The order that the corrector uses, shape (S,).
        error: Error norm of this order, at most 1 where the step counts, shape (S,).
        steepness: Root mean square of dz/dtau at the end of the step, shape (S,).
    """

    accepted: np.ndarray
    order: np.ndarray
    error: np.ndarray
    steepness: np.ndarray


@dataclass
class StepControl:
    """Where each row stands. Every attribute is an array with one row per sample that is on its way.

    Attributes:
        sample: The sample's number among all samples, shape (S,).
        tau: Where the sample is, shape (S,).
        step: Length of the next step, positive, shape (S,).
        points: Number of points in the history, 0 before the first call, shape (S,).
        order: Points of the history that the predictor uses, shape (S,).
        error: Error norm of the last accepted step, shape (S,).
        calls: Network calls so far, shape (S,).
        rejected: Rejected steps so far, shape (S,).
        tau_history: tau of the last points, the latest first, shape (S, P) with P = HIGHEST_ORDER.
        rate_history: d log p / dtau at these points, one column per replicate, shape (S, P, R).
        integral: Integral of the rate so far, shape (S, R).
        variance: Variance that the noise of independent probes causes in the mean of ``integral``, shape (S,).
    """

    sample: np.ndarray
    tau: np.ndarray
    step: np.ndarray
    points: np.ndarray
    order: np.ndarray
    error: np.ndarray
    calls: np.ndarray
    rejected: np.ndarray
    tau_history: np.ndarray
    rate_history: np.ndarray
    integral: np.ndarray
    variance: np.ndarray

    @classmethod
    def begin(cls, sample: np.ndarray, tau: float, distance: float, replicates: int) -> StepControl:
        """Rows at the start of a way of length ``distance``."""
        n = len(sample)
        return cls(
            sample=sample,
            tau=np.full(n, tau),
            step=np.full(n, FIRST_SHARE * distance),
            points=np.zeros(n, dtype=np.int64),
            order=np.zeros(n, dtype=np.int64),
            error=np.ones(n),
            calls=np.zeros(n, dtype=np.int64),
            rejected=np.zeros(n, dtype=np.int64),
            tau_history=np.full((n, HIGHEST_ORDER), tau),
            rate_history=np.zeros((n, HIGHEST_ORDER, replicates)),
            integral=np.zeros((n, replicates)),
            variance=np.zeros(n),
        )

    def rows(self, chosen: np.ndarray) -> StepControl:
        """The chosen rows."""
        return StepControl(**{name: value[chosen] for name, value in vars(self).items()})

    def followed_by(self, other: StepControl) -> StepControl:
        """These rows and then those of ``other``."""
        return StepControl(**{name: np.concatenate([value, vars(other)[name]]) for name, value in vars(self).items()})

    def propose(self, end: float) -> TrialStep:
        """The next step of each row on its way to ``end``."""
        is_first, rest = self.points == 0, np.abs(end - self.tau)
        # A rest shorter than two steps is divided into two equal steps: the last step must not be a tiny one.
        halved = np.where(self.step > 0.5 * rest, 0.5 * rest, self.step)
        step = np.where(self.step >= rest * (1 - 1e-9), rest, halved)
        length = np.where(is_first, 0.0, np.copysign(step, end - self.tau))
        target = np.where(is_first | (step < rest), self.tau + length, end)
        nodes = (self.tau_history - self.tau[:, None]) / np.where(is_first, 1.0, length)[:, None]
        with_new = np.concatenate([np.ones((len(nodes), 1)), nodes], 1)
        correctors = [adams_weights(with_new, np.minimum(self.points, k) + 1) for k in range(HIGHEST_ORDER + 1)]
        return TrialStep(is_first, length, target, adams_weights(nodes, self.order), np.stack(correctors, 1))

    def judge(self, trial: TrialStep, errors: np.ndarray, steepness: np.ndarray) -> StepVerdict:
        """The order to take, and whether its error is small enough.

        Args:
            trial: The step.
            errors: Error norms of the orders 1 .. P, shape (S, P).
            steepness: See ``StepVerdict``.
        """
        order = _best_order(errors, self.points)
        error = np.where(trial.is_first, 0.0, errors[np.arange(len(order)), order - 1])
        # A norm that overflows, or is NaN because of it, is an error like any other that is too large.
        error = np.where(np.isfinite(error), error, LARGEST_ERROR)
        return StepVerdict(trial.is_first | (error <= 1.0), order, error, steepness)

    def accept(self, trial: TrialStep, verdict: StepVerdict, rate: np.ndarray, rate_is_noisy: bool) -> None:
        """Move the rows whose step counts, and choose the next step and order of all rows.

        Args:
            trial: The step.
            verdict: What has been made of it.
            rate: d log p / dtau at the end of the step, shape (S, R).
            rate_is_noisy: Whether the rate has noise that is independent from point to point.
        """
        accepted = verdict.accepted
        self.calls += 1
        self.rejected += ~accepted

        rates = np.concatenate([rate[:, None], self.rate_history], 1)
        # The rate is integrated at full order, whatever order was chosen for the state.
        weights = trial.correctors[:, -1] * np.where(accepted, trial.length, 0.0)[:, None]
        self.integral += np.einsum("sp,spr->sr", weights, rates)
        if rate_is_noisy:
            variance = self._variance_of_last_point(trial.target, rates.mean(2))
            self.variance += np.where(accepted & ~trial.is_first, variance, 0.0)

        self._choose_next_step(trial, verdict)

        taus = np.concatenate([trial.target[:, None], self.tau_history], 1)
        self.tau = np.where(accepted, trial.target, self.tau)
        self.tau_history = np.where(accepted[:, None], taus[:, :HIGHEST_ORDER], self.tau_history)
        self.rate_history = np.where(accepted[:, None, None], rates[:, :HIGHEST_ORDER], self.rate_history)

    def _choose_next_step(self, trial: TrialStep, verdict: StepVerdict) -> None:
        accepted, order = verdict.accepted, verdict.order
        error, power = np.maximum(verdict.error, SMALLEST_ERROR), 1.0 / (order + 1.0)
        smooth = STEP_SAFETY * error ** (-PROPORTIONAL_GAIN * power) * self.error ** (INTEGRAL_GAIN * power)
        onward = np.clip(smooth, SMALLEST_GROWTH, LARGEST_GROWTH)
        again = np.clip(STEP_SAFETY * error**-power, SMALLEST_GROWTH, LARGEST_RETRY)
        first_step = np.minimum(self.step, FIRST_CHANGE / np.maximum(verdict.steepness, 1e-12))
        self.step = np.where(trial.is_first, first_step, np.abs(trial.length) * np.where(accepted, onward, again))
        self.error = np.where(accepted & ~trial.is_first, error, self.error)
        more = np.minimum(self.points + 1, HIGHEST_ORDER)
        # Where all points that there are did best, the point that has just been added may do better still.
        self.order = np.where(accepted, np.where(order >= self.points, more, order), np.minimum(order, self.points))
        self.points = np.where(accepted, more, self.points)

    def limit_step(self, dims: int, tolerance: float) -> None:
        """Bound the next step for the sake of the trace.

        The error norm of the state gives little weight to directions in which the data barely vary, but the trace
        counts every direction alike. Each direction with standard deviation c_i makes the trace rise within a width of
        one in tau, at tau = log(c / c_i), and the solver must not jump over this rise. A step of 0.8 resolves it to
        about 1e-3 of its height, and the method is of fifth order. Before the first such rise the rate is still growing
        from zero like exp(-2 tau), and a longer step is allowed if the integral over it is below ten tolerances.
        """
        ordinary = TRACE_STEP * min(1.0, (tolerance / 1e-4) ** 0.2)
        per_dimension = np.maximum(np.abs(self.rate_history[:, 0].mean(1)) / dims, 1e-300)
        longest = np.maximum(ordinary, 0.5 * np.log1p(20.0 * tolerance / per_dimension))
        self.step = np.minimum(self.step, longest)

    def _variance_of_last_point(self, target: np.ndarray, rates: np.ndarray) -> np.ndarray:
        """What the last accepted point contributes to the variance of the integral of independently noisy rates.

        The distance of a rate from the straight line between its two neighbours estimates its noise. The curvature of
        the true rate adds to this distance, so that the noise is rather overestimated. The weight of a rate is that of
        the trapezoidal rule.

        Args:
            target: tau of the point after it, shape (S,).
            rates: Rates at that point and at those of the history, shape (S, P + 1).
        """
        left, here = self.tau_history[:, 1], self.tau_history[:, 0]
        width, usable = target - left, self.points >= 2
        share = np.where(usable, (target - here) / np.where(usable, width, 1.0), 0.5)
        residual = rates[:, 1] - (share * rates[:, 2] + (1.0 - share) * rates[:, 0])
        variance_of_rate = residual**2 / (1.0 + share**2 + (1.0 - share) ** 2)
        return np.where(usable, 0.25 * width**2 * variance_of_rate, 0.0)


def _best_order(errors: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The order, 1 .. ``points``, that promises the longest next step.

    High orders are best where the flow is smooth. A network's output is rough in time below some scale (a sinusoidal
    embedding of 1000 t oscillates). There low orders are best, because high differences multiply the roughness.
    """
    orders = np.arange(1, errors.shape[1] + 1)
    usable = orders[None, :] <= np.maximum(points, 1)[:, None]
    bounded = np.where(usable & np.isfinite(errors), np.maximum(errors, SMALLEST_ERROR), 1e30)
    return orders[np.argmax(bounded ** (-1.0 / (orders[None, :] + 1.0)), 1)]
