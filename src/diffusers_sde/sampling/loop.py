"""The reference loop: what it means to execute a plan. Schedulers must equal it bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..basics.checks import check_generators, check_tensor
from ..basics.noise import Generators, standard_normal_like
from ..basics.precision import on_device
from ..networks.denoisers import Denoiser
from .rows import Plan, advance, estimate_of


@torch.no_grad()
def sample(
    plan: Plan,
    denoiser: Denoiser,
    x: Tensor,
    generator: Generators = None,
    batch_norms: bool = False,
    callback: Callable[[int, Tensor], Tensor | None] | None = None,
    visits: Sequence[int] | None = None,
) -> Tensor:
    """Execute a plan, in which all samples take the same steps.

    ``sample_adaptive`` and ``flow.sample_flow`` take the same start and let each sample choose its own steps.

    Args:
        plan: From ``make_plan``.
        denoiser: (x, t) -> x0_hat; for a folded plan the network itself, called with SDE time.
        x: Start, drawn from the prior, shape (B, ...).
        generator: One generator, or a list with one for each sample.
        batch_norms: See ``advance``.
        callback: Called as f(k, x) with the sample after the k-th visit to a row, which is row k unless ``visits`` say
            otherwise. A tensor that it returns takes the sample's place.
        visits: Indices of the rows in the order in which they are executed; None for each once, in their own order.

    Returns:
        The sample, shape of ``x``.

    Raises:
        ValueError: ``x`` or ``generator`` do not fit, or the denoiser returns another shape.
    """
    check_tensor("x", x, finite=False)
    check_generators(generator, len(x))
    stored: list[Tensor] = []
    for k, row in enumerate(plan.rows if visits is None else [plan.rows[i] for i in visits]):
        output = denoiser(x, on_device(row.t, x.device))
        if output.shape != x.shape:
            raise ValueError(f"the denoiser returned shape {tuple(output.shape)} for a state of {tuple(x.shape)}.")
        draw = partial(standard_normal_like, output, generator)
        estimate = estimate_of(row, x, output) if row.needs_estimate else None
        x, kept = advance(row, x, output, stored, draw, estimate, batch_norms)
        if kept is not None:
            stored = [kept, *stored][: plan.memory]
        if callback is not None:
            replaced = callback(k, x)
            x = x if replaced is None else replaced
    return x
