"""The reference loop: what it means to execute a plan. Schedulers must equal it bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..basics.checks import check_generators, check_tensor
from ..basics.noise import Generators, standard_normal_like
from ..networks.denoisers import Denoiser
from .rows import Plan, advance, estimate_of


@torch.no_grad()
def sample(
    plan: Plan,
    denoiser: Denoiser,
    x: Tensor,
    generator: Generators = None,
    batch_norms: bool = False,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Execute a plan, in which all samples take the same steps.

    ``sample_adaptive`` and ``flow.sample_flow`` take the same start and let each sample choose its own steps.

    Args:
        plan: From ``make_plan``.
        denoiser: (x, t) -> x0_hat; for a folded plan the network itself, called with SDE time.
        x: Start, drawn from the prior, shape (B, ...).
        generator: One generator, or a list with one for each sample.
        batch_norms: See ``advance``.
        callback: Called with the row's index and the sample after each row.

    Returns:
        The sample, shape of ``x``.

    Raises:
        ValueError: ``x`` or ``generator`` do not fit, or the denoiser returns another shape.
    """
    check_tensor("x", x, finite=False)
    check_generators(generator, len(x))
    stored: list[Tensor] = []
    for i, row in enumerate(plan.rows):
        output = denoiser(x, torch.tensor(row.t, dtype=torch.float64, device=x.device))
        if output.shape != x.shape:
            raise ValueError(f"the denoiser returned shape {tuple(output.shape)} for a state of {tuple(x.shape)}.")
        draw = partial(standard_normal_like, output, generator)
        estimate = estimate_of(row, x, output) if row.needs_estimate else None
        x, kept = advance(row, x, output, stored, draw, estimate, batch_norms)
        if kept is not None:
            stored = [kept, *stored][: plan.memory]
        if callback is not None:
            callback(i, x)
    return x
