"""Restart sampling: plans that go back up in noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..basics.checks import check_integer, check_number
from ..sdes import SDE
from .planning import check_times, make_plan
from .rows import Plan, concatenated


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
    if repeats == 0:
        return make_plan(sde, times, **arguments)
    down = {**arguments, "denoise_final": False, "final_time": None}
    parts = [make_plan(sde, times[first : bottom + 1], **down) for first in [0] + [top] * (repeats - 1)]
    factor, variance = sde.transition(times[bottom], times[top])
    parts = [_noised_at_the_end(part, factor, variance, times[top]) for part in parts]
    return concatenated([*parts, make_plan(sde, times[top:], **arguments)])


def _noised_at_the_end(plan: Plan, factor: Tensor, variance: Tensor, t: Tensor) -> Plan:
    """The plan whose result has gone up to time ``t`` by x <- factor x + sqrt(variance) z."""
    if plan.kinds[-1].is_langevin:
        raise ValueError("predictor 'none' with a Langevin corrector arrives nowhere; restarts need a predictor.")
    names = plan.columns
    move = names.index("x"), names.index("keep.x")
    last = plan.table[-1].clone()
    last[names.index("s")] = t
    last[move[0] : move[1]] = factor * last[move[0] : move[1]]
    last[names.index("noise")] = torch.hypot(last[names.index("noise")], variance.sqrt())
    return Plan(torch.cat([plan.table[:-1], last[None]]), plan.kinds, plan.rows_per_level)
