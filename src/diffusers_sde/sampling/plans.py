"""Plans: a sampler as a table of rows, one row per model call.

grid x predictor x corrector -> rows of a few Python floats, computed once in float64. Whoever executes a plan (the
reference loop of ``sample``, a diffusers scheduler) calls the model, calls ``advance`` and goes to the next row;
it knows nothing of SDEs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..basics.checks import check_flag, check_integer, check_number, check_numbers
from ..networks.parametrizations import Parametrization
from ..sdes import SDE
from .correctors import get_corrector
from .predictors import PredictorOptions, Stage, default_stochasticity, get_predictor

LARGEST_NUMBER = torch.finfo(torch.float32).max  # samples and their coefficients must be smaller


@dataclass(frozen=True, slots=True)
class Row:
    """One model call and the update that follows it.

    A linear row is x_new = x * x_t + model * F + noise * z + sum_k history[k] * (k-th last remembered x0_hat), where F
    is what the model returns: x0_hat, or the raw network output once the plan is folded. A Langevin row has no constant
    update: ``x`` and ``model`` give the score, and the step size is langevin (|z|/|score|)^2.

    Attributes:
        t: SDE time at which the model is called.
        s: SDE time of the result; None for the data (alpha = 1, sigma = 0).
        skip, out: The coefficients in x0_hat = skip * x_t + out * F.
        remember: Whether this call's x0_hat is kept for later rows.
        memo: If given, memo[0] * x_t + memo[1] * x0_hat is kept instead; see ``memorise``.
        is_corrector: Whether a corrector owns this call.
    """

    t: float
    s: float | None
    x: float
    model: float
    noise: float = 0.0
    history: tuple[float, ...] = ()
    langevin: float | None = None
    skip: float = 0.0
    out: float = 1.0
    remember: bool = False
    memo: tuple[float, float] | None = None
    is_corrector: bool = False

    @property
    def draws_noise(self) -> bool:
        """Whether ``advance`` draws noise."""
        return self.noise != 0.0 or self.langevin is not None


@dataclass(frozen=True)
class Plan:
    """A sampler for one SDE on one grid.

    Attributes:
        rows: One row per model call, in order; ``len(rows)`` is the number of function evaluations (nfe).
        order: Rows per noise level, those of correctors and of the predictor together. The last level may have fewer.
        memory: How many earlier estimates the rows look back on.
    """

    rows: tuple[Row, ...]
    order: int
    memory: int

    def fold(self, parametrization: Parametrization, sde: SDE, predictors: bool = True) -> Plan:
        """The same plan for a model that returns its raw output instead of x0_hat.

        Args:
            parametrization: What the model predicts.
            sde: The plan's SDE.
            predictors: False leaves the predictors' coefficients on x0_hat, for an executor that clips it first.

        Raises:
            ValueError: The parametrisation does not determine x0_hat at one of the plan's times, or the plan has been
                folded already.
        """
        if any(row.skip != 0.0 or row.out != 1.0 for row in self.rows):
            raise ValueError("this plan is folded: its rows take the network's output, not x0_hat.")
        t = torch.tensor([row.t for row in self.rows], dtype=torch.float64)
        skip, out = (c.tolist() for c in parametrization.coefficients(sde.alpha(t), sde.sigma(t)))
        rows = tuple(
            replace(row, x=row.x + row.model * a, model=row.model * b, skip=a, out=b)
            if predictors or row.is_corrector
            else replace(row, skip=a, out=b)
            for row, a, b in zip(self.rows, skip, out, strict=True)
        )
        # The coefficients are infinite where alpha = 0. Samples are float32, in which an alpha of 1e-39 acts like 0.
        if not all(abs(v) < LARGEST_NUMBER for row in rows for v in (row.x, row.model, row.skip, row.out)):
            raise ValueError(
                f"prediction_type of {type(parametrization).__name__} does not determine the data where alpha(t) = 0 "
                f"(t = {self.rows[0].t}); use 'v_prediction', 'flow_prediction', 'sample' or 'edm' there. (A "
                "beta_start or beta_end that is too large leaves as good as no signal, too.)"
            )
        return replace(self, rows=rows)


def make_plan(
    sde: SDE,
    times: Tensor,
    predictor: str = "exponential",
    corrector: str | None = None,
    correct_steps: int = 1,
    snr: float = 0.16,
    stochasticity: float | None = 1.0,
    options: PredictorOptions | None = None,
    denoise_final: bool = True,
    final_time: float | None = None,
) -> Plan:
    """Lay out predictor and corrector calls over a grid.

    At every level the correctors come first and the predictor then leads to the next level, as in Algorithms 2 and 3 of
    Song et al. 2021; the final sample is never corrected.

    Args:
        sde: The SDE.
        times: Decreasing times, shape (n,), n >= 1 (n >= 2 without ``denoise_final``).
        predictor: A name in ``PREDICTORS``.
        corrector: A name in ``CORRECTORS``, or None.
        correct_steps: Corrector calls per level.
        snr: Signal-to-noise ratio r of the corrector's step size.
        stochasticity: 1 for the reverse SDE, 0 for the probability-flow ODE. None means 1, but for ``exponential`` it
            means as much as each interval allows; see ``default_stochasticity``.
        options: Further options of the predictor.
        denoise_final: Whether the plan ends with x0_hat at the last time (Tweedie's formula: the mean without the
            noise). Otherwise the result stands at the last time and still has the noise of that time.
        final_time: With ``denoise_final``, the plan ends with a noise-free step to this time instead of the data, as
            diffusers does for ``final_sigmas_type="sigma_min"``.

    Raises:
        ValueError: Unknown names, a grid that does not decrease, or a combination without meaning.
    """
    rule = get_predictor(predictor)
    check_flag("denoise_final", denoise_final)
    times = check_times(sde, times, 1 if denoise_final else 2)
    if stochasticity is not None:
        stochasticity = check_number("stochasticity", stochasticity, at_least=0.0)
    if rule.deterministic and stochasticity != 0.0:
        raise ValueError(
            f"predictor {predictor!r} integrates the probability-flow ODE only: set probability_flow=True "
            "(stochasticity 0)."
        )
    if corrector is None and rule.calls == 0:
        raise ValueError("predictor 'none' needs a corrector, such as 'langevin'.")
    if corrector is not None:
        correct_steps = check_integer("correct_steps", correct_steps, at_least=1)
        snr = check_number("snr", snr, above=0.0)
    if not rule.finite_at_zero_snr and torch.isneginf(sde.log_snr(times[0])):
        raise ValueError(
            f"predictor {predictor!r} needs finite f(t) and g(t), but alpha({float(times[0])}) = 0: "
            "start at a smaller t."
        )

    options = options or PredictorOptions()
    intervals = len(times) - 1
    levels = len(times) if denoise_final else intervals
    eta: Tensor | float = 1.0 if stochasticity is None else stochasticity
    if stochasticity is None and predictor == "exponential":
        eta = default_stochasticity(sde, times)
    stages = rule.stages(sde, times, eta, options) if intervals else []
    corrections = _corrector_rows(sde, times, levels, corrector, correct_steps, snr) if corrector is not None else []
    if corrections and len(stages) == 1 and stages[0].remember:
        _finish_steps(corrections, stages[0])
        stages = [_across_corrections(stages[0])]
    predictions = _predictor_rows(times, [_in_sample_and_estimate(stage) for stage in stages])
    predictions += [[] for _ in range(intervals - len(predictions))]
    if denoise_final:
        predictions.append([_final_row(sde, float(times[-1]), final_time)])
    if corrections:
        rows = [row for c, p in zip(corrections, predictions, strict=True) for row in c + p]
    else:
        rows = [row for p in predictions for row in p]
    order = rule.calls + (correct_steps if corrector is not None else 0)
    if not all(abs(v) < LARGEST_NUMBER for row in rows for v in (row.x, row.model, row.noise, *row.history)):
        raise ValueError(
            f"predictor {predictor!r} with stochasticity {stochasticity!r} has infinite or undefined coefficients on "
            f"this grid of {type(sde).__name__}."
        )
    return Plan(tuple(rows), order, max(len(row.history) for row in rows))


def restart_plan(
    sde: SDE,
    times: Tensor,
    low: float,
    high: float,
    repeats: int = 1,
    **arguments: Any,
) -> Plan:
    """Restart sampling: on reaching ``low`` go back up to ``high`` in noise and down again, ``repeats`` times.

    The way up is the forward transition, which is exact and costs no call. Its noise covers a part of the errors that
    the way down has made (Xu et al. 2023, arXiv:2306.14878). It is merged into the row that arrives at ``low``, so that
    a plan still has one row per model call.
    Estimates from before a restart are not used after it.

    Args:
        sde: The SDE.
        times: Decreasing times, shape (n,).
        low: Time at which to turn. The nearest of ``times`` is taken.
        high: Time to go back to. The nearest of ``times`` is taken, and it must come before ``low``.
        repeats: How often to go back.
        **arguments: Arguments of ``make_plan``. The method is meant for the probability flow, ``stochasticity=0``.

    Raises:
        ValueError: ``high`` is not before ``low`` on the grid, ``repeats`` is negative, or see ``make_plan``.
    """
    times = check_times(sde, times, 2)
    low, high = check_number("low", low), check_number("high", high)
    bottom, top = (int((times - t).abs().argmin()) for t in (low, high))
    if not top < bottom:
        raise ValueError(f"high must be a time of the grid before low, got low={low!r} and high={high!r}.")
    repeats = check_integer("repeats", repeats, at_least=0)
    whole = make_plan(sde, times, **arguments)
    if repeats == 0:
        return whole
    parts = [make_plan(sde, times[: bottom + 1], **{**arguments, "denoise_final": False, "final_time": None})]
    loop = make_plan(sde, times[top : bottom + 1], **{**arguments, "denoise_final": False, "final_time": None})
    parts += [loop] * (repeats - 1)
    factor, variance = (float(v) for v in sde.transition(times[bottom], times[top]))
    rows: list[Row] = []
    for part in parts:
        last = part.rows[-1]
        if last.langevin is not None:
            raise ValueError("predictor 'none' with a Langevin corrector arrives nowhere; restarts need a predictor.")
        up = replace(
            last,
            s=float(times[top]),
            x=factor * last.x,
            model=factor * last.model,
            noise=math.hypot(factor * last.noise, math.sqrt(variance)),
            history=tuple(factor * weight for weight in last.history),
        )
        rows += [*part.rows[:-1], up]
    rows += make_plan(sde, times[top:], **arguments).rows
    return Plan(tuple(rows), whole.order, max(len(row.history) for row in rows))


def check_times(sde: SDE, times: Any, at_least: int) -> Tensor:
    """A grid as float64, checked to hold at least ``at_least`` times of the path, strictly decreasing.

    Raises:
        ValueError: It is not.
    """
    grid = check_numbers("times", times, at_least)
    if not bool((grid[1:] < grid[:-1]).all() & (grid >= 0.0).all() & (grid <= sde.t_max * (1.0 + 1e-9)).all()):
        raise ValueError(f"times must be a strictly decreasing sequence in [0, {sde.t_max:g}], got {grid.tolist()}.")
    return grid


def _final_row(sde: SDE, t: float, final_time: float | None) -> Row:
    if final_time is None:
        return Row(t, None, 0.0, 1.0)
    final_time = check_number("final_time", final_time, above=0.0, at_most=t)
    x = float(sde.sigma(final_time) / sde.sigma(t))
    return Row(t, final_time, x, float(sde.alpha(final_time) - sde.alpha(t) * x))


def _in_sample_and_estimate(stage: Stage) -> Stage:
    """Substitute ``late`` and ``memo``, so that the stage is expressed in x_t, x0_hat and stored estimates only."""
    weights = [stage.x0, *stage.history]
    for k, update in enumerate(stage.late):
        weights[k:] = [weights[k] + stage.x * update if k < len(weights) else stage.x * update, *weights[k + 1 :]]
    x, x0 = stage.x, weights[0]
    if stage.memo is not None:
        x, x0 = x + weights[0] * stage.memo[0], weights[0] * stage.memo[1]
    return stage._replace(x=x, x0=x0, history=tuple(weights[1:]), late=())


def _slopes(weights: Sequence[Tensor]) -> list[Tensor]:
    """Coefficients of the differences E_0 - E_1, E_1 - E_2, ... if sum_k weights_k E_k is written by them and E_0."""
    return [-sum(weights[k:], torch.zeros_like(weights[0])) for k in range(1, len(weights))]


def _across_corrections(stage: Stage) -> Stage:
    """Rewrite a multistep stage that follows a corrector, which calls the model at the same time and moves the sample.

    A difference of two estimates should tell how the estimate changes along the path, not how far the corrector moved
    the sample. Each difference is therefore taken over one interval, between the call after the corrector at its start
    and the call before the corrector at its end. In memory these are numbers 1 and 0 for the last interval, numbers 3
    and 2 for the interval before it, and so on.
    """
    weights = [stage.x0, *stage.history]
    history = [c for slope in _slopes(weights) for c in (slope, -slope)]
    return stage._replace(x0=sum(weights[1:], weights[0]), history=tuple(history), late=())


def _finish_steps(corrections: list[list[Row]], stage: Stage) -> None:
    """Use the first corrector call of each level twice: store its estimate, and complete the previous step with it."""
    slopes = [v.tolist() for v in _slopes(stage.late)] if stage.late else []
    memos = None if stage.memo is None else [m.tolist() for m in stage.memo]
    for i, rows in enumerate(corrections[: len(stage.x)]):
        row = rows[0]
        memo = None if memos is None else (memos[0][i], memos[1][i])
        if slopes and row.langevin is None:
            # First x <- x + sum_k slope_k difference_k. The newest difference is this call minus the last in memory.
            of_x, of_x0 = memo or (0.0, 1.0)
            newest = slopes[0][i]
            history = [-newest] + [c for slope in slopes[1:] for c in (slope[i], -slope[i])]
            while history and history[-1] == 0.0:
                history.pop()
            row = replace(
                row,
                model=row.model + row.x * newest * of_x0,
                history=tuple(row.x * c for c in history),
                x=row.x * (1.0 + newest * of_x),
            )
        rows[0] = replace(row, remember=True, memo=memo)


def _predictor_rows(times: Tensor, stages: list[Stage]) -> list[list[Row]]:
    """The rows of the stages, one list for each interval."""
    columns = [
        (
            s.x.tolist(),
            s.x0.tolist(),
            s.noise.tolist(),
            [h.tolist() for h in s.history],
            s.at_target,
            s.remember,
            None if s.memo is None else list(zip(s.memo[0].tolist(), s.memo[1].tolist(), strict=True)),
        )
        for s in stages
    ]
    ts = times.tolist()
    groups: list[list[Row]] = [[] for _ in ts[1:]] if columns else []
    for i, group in enumerate(groups):
        for x, x0, noise, history, at_target, remember, memos in columns:
            weights = [h[i] for h in history]
            while weights and weights[-1] == 0.0:  # no earlier estimate exists yet, or it does not count
                weights.pop()
            t = ts[i + 1] if at_target else ts[i]
            memo = None if memos is None else memos[i]
            group.append(Row(t, ts[i + 1], x[i], x0[i], noise[i], tuple(weights), remember=remember, memo=memo))
    return groups


def _corrector_rows(
    sde: SDE, times: Tensor, levels: int, corrector: str, correct_steps: int, snr: float
) -> list[list[Row]]:
    t = times[:levels]
    s = torch.cat([times[1:], times.new_tensor([math.nan])])[:levels]
    c = get_corrector(corrector)(sde, t, s, snr)
    steps = [None] * levels if c.langevin is None else c.langevin.tolist()
    columns = zip(t.tolist(), c.x.tolist(), c.x0.tolist(), c.noise.tolist(), steps, strict=True)
    return [
        [Row(t, t, x, x0, noise, langevin=langevin, is_corrector=True)] * correct_steps
        for t, x, x0, noise, langevin in columns
    ]


def advance(
    row: Row,
    x: Tensor,
    model_output: Tensor,
    memory: Sequence[Tensor],
    draw: Callable[[], Tensor],
    batch_norms: bool = False,
) -> Tensor:
    """Execute one row.

    Args:
        row: The row; its coefficients are Python floats, so nothing waits for the device.
        x: Sample, shape (B, ...).
        model_output: What the plan's model returned at (``x``, ``row.t``), same shape.
        memory: Remembered x0_hats, the most recent first, at least ``len(row.history)`` of them.
        draw: Function that returns fresh unit noise of x's shape; it is called only if the row has noise.
        batch_norms: Whether the Langevin step size follows from norms averaged over the batch, as in the official code,
            instead of from each sample's own norms. Samples then depend on their batch mates.

    Returns:
        The new sample, same shape.
    """
    # The arithmetic is done in place on tensors made here: at image sizes an allocation costs as much as the
    # arithmetic.
    update = model_output * row.model if row.x == 0.0 else (x * row.x).add_(model_output, alpha=row.model)
    if row.langevin is not None:
        z = draw()
        step = row.langevin * squared_norm_ratio(z, update, batch_norms)
        return torch.addcmul(x, step, update).addcmul_(torch.sqrt(2.0 * step), z)
    for weight, estimate in zip(row.history, memory, strict=False):
        update.add_(estimate, alpha=weight)
    if row.noise != 0.0:
        update.add_(draw(), alpha=row.noise)
    return update


def memorise(row: Row, x: Tensor, x0_hat: Tensor) -> Tensor:
    """What a row with ``remember`` stores for later rows: x0_hat, or its combination with x_t that ``memo`` gives."""
    return x0_hat if row.memo is None else (x * row.memo[0]).add_(x0_hat, alpha=row.memo[1])


def squared_norm_ratio(z: Tensor, score: Tensor, batch_norms: bool) -> Tensor:
    """(|z| / |score|)^2 of each sample, or of the batch means of both norms, broadcastable against the sample."""
    axes = tuple(range(1, score.ndim))
    score_norm, noise_norm = (
        torch.linalg.vector_norm(v, dim=axes, keepdim=True) if axes else v.abs() for v in (score, z)
    )
    if batch_norms:
        score_norm, noise_norm = score_norm.mean(0, keepdim=True), noise_norm.mean(0, keepdim=True)
    # A score of zero says nothing about the scale of p_t. The step is then zero, where the formula would be infinite.
    return torch.where(score_norm > 0, noise_norm / score_norm, torch.zeros_like(noise_norm)).square()
