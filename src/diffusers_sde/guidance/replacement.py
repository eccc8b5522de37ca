"""Inpainting by replacement: known entries are set to noised data, and levels may be visited again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..basics.checks import check_integer
from ..basics.noise import Generators, standard_normal_like
from ..networks.denoisers import Denoiser
from ..sampling.rows import Plan, Row, advance, estimate_of
from ..sdes import SDE


class Replacement:
    """Inpainting by replacement: after each row the known entries are drawn anew from p(x_s | x_0 known).

    x_s <- mask (alpha_s known + sigma_s z) + (1 - mask) x_s, at the time s at which the row has arrived, and the known
    values themselves at the end. The paper's code adds noise for the time before the step instead, and the mean that it
    returns at the end still has noise in the hole. The method is not exact even with a perfect score, because the hole
    is drawn without knowing what its surroundings will become.

    Args:
        sde: The SDE.
        known: Data, shape (B, ...); its values where the mask is 0 do not matter.
        mask: 1 where the data are known, broadcastable to ``known``.
        generator: Source of z.

    Reference:
        Song et al. 2021, appendix I.2.
    """

    def __init__(self, sde: SDE, known: Tensor, mask: Tensor, generator: Generators = None) -> None:
        self.sde, self.known, self.generator = sde, known, generator
        self.mask = mask.to(known.device).bool().expand_as(known)

    def __call__(self, x: Tensor, s: float | None) -> Tensor:
        """x with its known entries drawn for the time ``s``; None is the data."""
        return torch.where(self.mask, self.at(s).to(x), x)

    def at(self, s: float | None) -> Tensor:
        """A draw of alpha_s known + sigma_s z, shape (B, ...)."""
        if s is None:
            return self.known
        z = standard_normal_like(self.known, self.generator).to(self.known)
        return self.known * float(self.sde.alpha(s)) + z * float(self.sde.sigma(s))


def resampled(rows: Sequence[Row], resamplings: int, jump_length: int = 1) -> Iterator[tuple[int, float | None]]:
    """The order in which RePaint visits a plan's rows: every ``jump_length`` levels it goes back and does them again.

    Replacement draws the known pixels and the hole independently. They come to agree when the whole image is noised
    back to the earlier time and denoised again.

    Args:
        rows: Rows without ``history`` or ``remember``, because a jump breaks the path that multistep rows look back on.
        resamplings: How often each stretch is done; 1 is plain replacement.
        jump_length: Levels per stretch.

    Yields:
        The index of the next row, and the SDE time to which the sample is noised after this row, or None if there is no
        jump. The noising starts from the row's ``s``.

    Raises:
        ValueError: Bad numbers, or rows that look back.

    Reference:
        Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1; jumps of several levels are its appendix's.
    """
    resamplings = check_integer("resamplings", resamplings, at_least=1)
    jump_length = check_integer("jump_length", jump_length, at_least=1)
    if resamplings > 1 and any(row.history or row.keep for row in rows):
        raise ValueError(
            "resampling needs a sampler without memory: set solver_order=1 and solver_correction=False, or another "
            "predictor."
        )
    # A level begins with the first call at its time. A second stage may be called at the time of the next level, which
    # is the time it leads to; it does not begin that level.
    starts = [0]
    for i, row in enumerate(rows):
        if row.t < rows[starts[-1]].t and not row.continues:
            starts.append(i)
    # The last stretch, which ends with the data, is made once.
    for k in range(0, len(starts), jump_length):
        begin = starts[k]
        end = starts[k + jump_length] if k + jump_length < len(starts) else len(rows)
        repeats = resamplings if end < len(rows) else 1
        for repeat in range(repeats):
            for i in range(begin, end):
                yield i, rows[begin].t if i == end - 1 and repeat < repeats - 1 else None


def renoise(sde: SDE, x: Tensor, s: float, t: float, generator: Generators = None) -> Tensor:
    """Draw from the transition kernel p(x_t | x_s), s < t, which goes back to more noise."""
    a, v = sde.transition(s, t)
    return x * float(a) + standard_normal_like(x, generator).to(x) * math.sqrt(float(v))


@torch.no_grad()
def sample_inpainting(
    plan: Plan,
    denoiser: Denoiser,
    x: Tensor,
    replacement: Replacement,
    generator: Generators = None,
    resamplings: int = 1,
    jump_length: int = 1,
) -> Tensor:
    """Execute a plan with known entries replaced after every row, and RePaint's resampling where asked for.

    Args:
        plan: From ``make_plan``.
        denoiser: (x, t) -> x0_hat.
        x: Start, drawn from the prior, shape (B, ...).
        replacement: The known entries. If it has a generator of its own, the rows draw the same noise as without it.
        generator: Source of the rows' noise.
        resamplings: See ``resampled``.
        jump_length: See ``resampled``.

    Returns:
        The sample, with the known entries exact where the plan ends with the data.
    """
    memory: list[Tensor] = []
    x = replacement(x, plan.rows[0].t)
    for i, back_to in resampled(plan.rows, resamplings, jump_length):
        row = plan.rows[i]
        output = denoiser(x, torch.tensor(row.t, dtype=torch.float64, device=x.device))
        estimate = estimate_of(row, x, output) if row.needs_estimate else None
        x, kept = advance(row, x, output, memory, lambda: standard_normal_like(output, generator), estimate)  # noqa: B023
        if kept is not None:
            memory = [kept, *memory][: plan.memory]
        x = replacement(x, row.s)
        if back_to is not None and row.s is not None:
            x = renoise(replacement.sde, x, row.s, back_to, replacement.generator)
    return x
