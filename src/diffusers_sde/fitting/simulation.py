"""Plans executed with gradients: what ``sampling.sample`` does, on coefficients that carry them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..basics.noise import Generators, standard_normal_like
from ..basics.precision import on_device
from ..networks.denoisers import Denoiser
from ..sampling.rows import Plan, advance, row_of

Bound = Callable[[Tensor, Tensor], Tensor]
"""(x0_hat, SDE time) -> x0_hat as predictors take it."""


def simulate(
    plan: Plan,
    denoiser: Denoiser,
    x: Tensor,
    generator: Generators = None,
    bound: Bound | None = None,
    checkpointing: bool = False,
    batch_norms: bool = False,
    conditioning: dict[str, Any] | None = None,
) -> Tensor:
    """Execute a plan; gradients reach its table.

    Args:
        plan: A plan on x0_hat.
        denoiser: (x, t, **conditioning) -> x0_hat, called with SDE time as a tensor of shape ().
        x: Start, shape (B, ...).
        generator: Of the noise on the way.
        bound: What is done to x0_hat before predictors take it; correctors take it as it is.
        checkpointing: Whether the network's activations are computed again in the backward pass instead of kept, which
            costs one more call and keeps the memory that of one call.
        batch_norms: As in ``advance``.
        conditioning: Further arguments of the denoiser.
    """
    differentiable = plan.table.requires_grad and torch.is_grad_enabled()
    table = on_device(plan.table, x.device) if differentiable else plan.table
    draws = [row.draws_noise for row in plan.rows]
    call = partial(denoiser, **(conditioning or {}))
    stored: list[Tensor] = []
    for i, kind in enumerate(plan.kinds):
        if differentiable:
            row = row_of(table[i], kind, plan.memory, draws[i])
            t = row.t
        else:
            row = plan.rows[i]
            t = on_device(row.t, x.device)
        if differentiable and checkpointing:
            output = checkpoint(call, x, t, use_reentrant=False)
        else:
            output = call(x, t)
        estimate = output if bound is None else bound(output, t)
        if bound is not None:
            row = row._replace(of_estimate=not kind.is_corrector, keeps_estimate=kind.keeps)
        draw = partial(standard_normal_like, output, generator)
        x, kept = advance(row, x, output, stored, draw, estimate, batch_norms)
        if kept is not None:
            stored = [kept, *stored][: plan.memory]
    return x
