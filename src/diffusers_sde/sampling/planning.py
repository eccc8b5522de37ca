"""From a grid, a predictor and a corrector to a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..basics.checks import check_flag, check_integer, check_number, check_numbers
from ..sdes import SDE
from .correctors import get_corrector
from .predictors import get_predictor, name_of
from .rows import Kind, Plan, is_finite, substitute_estimate, substitute_x, without_unused_memory
from .stages import Predictor, Stage


def make_plan(
    sde: SDE,
    times: Tensor,
    predictor: str | Predictor = "exponential",
    corrector: str | None = None,
    correct_steps: int = 1,
    snr: Tensor | float = 0.16,
    stochasticity: Tensor | float | None = 1.0,
    denoise_final: bool = True,
    final_time: float | None = None,
) -> Plan:
    """Lay out predictor and corrector calls over a grid.

    At every level the correctors come first and the predictor then leads to the next level, as in Algorithms 2 and 3 of
    Song et al. 2021; the final sample is never corrected.

    Args:
        sde: The SDE.
        times: Decreasing times, shape (n,), n >= 1 (n >= 2 without ``denoise_final``). Gradients reach them.
        predictor: A predictor, such as ``Exponential(solver_order=2)``, or a name in ``PREDICTORS`` for one without
            options.
        corrector: A name in ``CORRECTORS``, or None.
        correct_steps: Corrector calls per level.
        snr: Signal-to-noise ratio r of the corrector's step size; one number, or one for each level that is corrected,
            shape (n,), or (n - 1,) without ``denoise_final``. Gradients reach it.
        stochasticity: 1 for the reverse SDE, 0 for the probability-flow ODE; one number, or one for each interval,
            shape (n - 1,). None leaves it to the predictor; see ``Predictor.default_stochasticity``.
        denoise_final: Whether the plan ends with x0_hat at the last time (Tweedie's formula: the mean without the
            noise). Otherwise the result stands at the last time and still has the noise of that time.
        final_time: With ``denoise_final``, the plan ends with a noise-free step to this time instead of the data, as
            diffusers does for ``final_sigmas_type="sigma_min"``.

    Raises:
        ValueError: Unknown names, a grid that does not decrease, or a combination without meaning.
    """
    rule = get_predictor(predictor)() if isinstance(predictor, str) else predictor
    if not isinstance(rule, Predictor):
        raise ValueError(f"predictor must be a name or a Predictor, got {type(predictor).__name__}.")
    check_flag("denoise_final", denoise_final)
    times = check_times(sde, times, 1 if denoise_final else 2)
    intervals = len(times) - 1
    eta = _check_stochasticity(stochasticity, intervals)
    if corrector is not None:
        correct_steps = check_integer("correct_steps", correct_steps, at_least=1)
        snr = _check_snr(snr, len(times) if denoise_final else intervals)
    _check_predictor(rule, sde, times, eta, corrector)
    if eta is None:
        eta = rule.default_stochasticity(sde, times)

    stages = rule.stages(sde, times, eta) if intervals else []
    corrections: list[_Block] = []
    if corrector is not None:
        levels = times if denoise_final else times[:-1]
        corrections = [_correction(sde, times, len(levels), corrector, snr)] * correct_steps
    tail = [block.part(slice(intervals, None)) for block in corrections] if denoise_final else []
    corrections = [block.part(slice(intervals)) for block in corrections]
    if corrections and len(stages) == 1 and stages[0].keep is not None:
        corrections[0], stages[0] = _across_corrections(corrections[0], stages[0])
    predictions = [_prediction(stage, times, continues=k > 0) for k, stage in enumerate(stages)]
    if denoise_final:
        tail.append(_final(sde, times[-1:], final_time))
    plan = _assemble([*corrections, *predictions], tail, intervals, rule.calls + len(corrections))
    if not is_finite(plan.table):
        raise ValueError(
            f"predictor {name_of(rule)!r} with stochasticity {stochasticity!r} has infinite or undefined coefficients "
            f"on this grid of {type(sde).__name__}."
        )
    return plan


def check_times(sde: SDE, times: Any, at_least: int) -> Tensor:
    """A grid as float64, checked to hold at least ``at_least`` times of the path, strictly decreasing.

    Raises:
        ValueError: It is not.
    """
    grid = check_numbers("times", times, at_least)
    if not bool((grid[1:] < grid[:-1]).all() & (grid >= 0.0).all() & (grid <= sde.t_max * (1.0 + 1e-9)).all()):
        raise ValueError(f"times must be a strictly decreasing sequence in [0, {sde.t_max:g}], got {grid.tolist()}.")
    return grid


def _check_stochasticity(value: Any, intervals: int) -> Tensor | float | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.ndim == 0:
        return check_number("stochasticity", value, at_least=0.0)
    each = check_numbers("stochasticity", value, intervals)
    if each.shape != (intervals,) or not bool((each >= 0.0).all()):
        raise ValueError(
            f"stochasticity must be a number >= 0 or one for each of the {intervals} intervals, got {value.tolist()}."
        )
    return each


def _check_snr(value: Any, levels: int) -> Tensor | float:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return check_number("snr", value, above=0.0)
    each = check_numbers("snr", value, levels)
    if each.shape != (levels,) or not bool((each > 0.0).all()):
        raise ValueError(f"snr must be a number > 0 or one for each of the {levels} levels, got {value.tolist()}.")
    return each


def _check_predictor(
    rule: Predictor, sde: SDE, times: Tensor, stochasticity: Tensor | float | None, corrector: str | None
) -> None:
    """Check that a predictor suits the grid, the stochasticity and the corrector."""
    name = name_of(rule)
    if rule.deterministic and (stochasticity is None or bool(torch.as_tensor(stochasticity != 0.0).any())):
        raise ValueError(
            f"predictor {name!r} integrates the probability-flow ODE only: set probability_flow=True (stochasticity 0)."
        )
    if corrector is None and rule.calls == 0:
        raise ValueError(f"predictor {name!r} needs a corrector, such as 'langevin'.")
    if not rule.finite_at_zero_snr and bool(torch.isneginf(sde.log_snr(times[0]))):
        raise ValueError(
            f"predictor {name!r} needs finite f(t) and g(t), but alpha({float(times[0])}) = 0: start at a smaller t."
        )


# ---------------------------------------------------------------------- rows of one kind


class _Block(NamedTuple):
    """The rows that have the same place in every level, each tensor of shape (n, ...)."""

    t: Tensor
    s: Tensor
    move: Tensor  # columns x, F, z and what is stored; forms may differ in how many stored quantities they look back on
    kind: Kind
    keep: Tensor | None = None
    langevin: Tensor | None = None

    def part(self, rows: slice) -> _Block:
        """Some of the rows."""
        keep = None if self.keep is None else self.keep[rows]
        langevin = None if self.langevin is None else self.langevin[rows]
        return _Block(self.t[rows], self.s[rows], self.move[rows], self.kind, keep, langevin)


def _form(like: Tensor, *coefficients: Tensor | float) -> Tensor:
    """Linear forms of n rows: columns x, F, z and what is stored, shape (n, columns)."""
    return torch.stack(
        [torch.as_tensor(c, dtype=like.dtype, device=like.device).expand_as(like) for c in coefficients], 1
    )


def _widened(form: Tensor, columns: int) -> Tensor:
    return torch.cat([form, form.new_zeros(len(form), columns - form.shape[1])], dim=1)


def _substituted(form: Tensor, completion: Tensor | None, estimate: tuple[Tensor, Tensor] | None) -> Tensor:
    """A form in terms of the sample as it stands and of x0_hat itself."""
    if completion is not None:
        columns = max(form.shape[1], completion.shape[1])
        form = substitute_x(_widened(form, columns), _widened(completion, columns))
    return form if estimate is None else substitute_estimate(form, *estimate)


def _prediction(stage: Stage, times: Tensor, continues: bool) -> _Block:
    t = times[:-1] if stage.t is None else stage.t
    s = times[1:] if stage.s is None else stage.s
    completion = _form(t, 1.0, stage.completion[0], 0.0, *stage.completion[1:]) if stage.completion else None
    move = _substituted(_form(t, stage.x, stage.x0, stage.noise, *stage.history), completion, stage.estimate)
    keep = None
    if stage.keep is not None:
        form = stage.keep
        keep = _substituted(_form(t, form.x, form.model, form.noise, *form.history), completion, stage.estimate)
    return _Block(t, s, move, Kind(continues=continues, keeps=keep is not None), keep)


def _correction(sde: SDE, times: Tensor, levels: int, corrector: str, snr: Tensor | float) -> _Block:
    t = times[:levels]
    s = torch.cat([times[1:], times.new_tensor([math.nan])])[:levels]
    c = get_corrector(corrector)(sde, t, s, snr)
    kind = Kind(is_corrector=True, is_langevin=c.langevin is not None)
    return _Block(t, t, _form(t, c.x, c.x0, c.noise), kind, langevin=c.langevin)


def _final(sde: SDE, t: Tensor, final_time: float | None) -> _Block:
    if final_time is None:
        return _Block(t, torch.full_like(t, math.nan), _form(t, 0.0, 1.0, 0.0), Kind())
    s = torch.full_like(t, check_number("final_time", final_time, above=0.0, at_most=float(t)))
    x = sde.sigma(s) / sde.sigma(t)
    return _Block(t, s, _form(t, x, sde.alpha(s) - sde.alpha(t) * x, 0.0), Kind())


# ---------------------------------------------------------------------- multistep rules and correctors together


def _slopes(weights: Sequence[Tensor]) -> list[Tensor]:
    """Coefficients of the differences E_0 - E_1, E_1 - E_2, ... if sum_k weights_k E_k is written by them and E_0."""
    return [-sum(weights[k:], torch.zeros_like(weights[0])) for k in range(1, len(weights))]


def _across_corrections(correction: _Block, stage: Stage) -> tuple[_Block, Stage]:
    """The first corrector call of each level, and a multistep stage that calls the model at the same time after it.

    A difference of two estimates should tell how the estimate changes along the path, not how far the corrector moved
    the sample. Each difference is therefore taken over one interval, between the call after the corrector at its start
    and the call before the corrector at its end. In memory these are numbers 1 and 0 for the last interval, numbers 3
    and 2 for the interval before it, and so on. The first corrector call is thus used twice: it stores its estimate,
    and it completes the previous step with it, before it corrects.
    """
    move, t = correction.move, correction.t
    slopes = _slopes(stage.completion) if stage.completion else []
    if slopes and not correction.kind.is_langevin:
        # First x <- x + sum_k slope_k difference_k. The newest difference is this call minus the last in memory.
        older = [c for slope in slopes[1:] for c in (slope, -slope)]
        completion = _form(t, 1.0, slopes[0], 0.0, -slopes[0], *older)
        move = _substituted(move, _substituted(completion, None, stage.estimate), None)
    keep = _substituted(_form(t, 0.0, 1.0, 0.0), None, stage.estimate)
    correction = correction._replace(move=move, keep=keep, kind=correction.kind._replace(keeps=True))
    weights = [stage.x0, *stage.history]
    history = tuple(c for slope in _slopes(weights) for c in (slope, -slope))
    return correction, stage._replace(x0=sum(weights[1:], weights[0]), history=history, completion=())


# ---------------------------------------------------------------------- the table


def _assemble(blocks: Sequence[_Block], tail: Sequence[_Block], levels: int, rows_per_level: int) -> Plan:
    """The rows of every level one after another, and behind them those of the last level, ``tail``."""
    forms = [form for block in (*blocks, *tail) for form in (block.move, block.keep) if form is not None]
    columns = max(form.shape[1] for form in forms)

    def table(block: _Block) -> Tensor:
        ones, zeros = torch.ones_like(block.t), torch.zeros_like(block.t)
        langevin = zeros if block.langevin is None else block.langevin
        places = torch.stack([block.t, block.s, langevin, zeros, ones], dim=1)
        keep = zeros[:, None] if block.keep is None else block.keep
        return torch.cat([places, _widened(block.move, columns), _widened(keep, columns)], dim=1)

    rows = [torch.stack([table(block) for block in blocks], dim=1).flatten(0, 1)] if blocks and levels else []
    whole = torch.cat([*rows, *(table(block) for block in tail)])
    kinds = tuple(block.kind for block in blocks) * levels + tuple(block.kind for block in tail)
    return without_unused_memory(Plan(whole, kinds, rows_per_level))
