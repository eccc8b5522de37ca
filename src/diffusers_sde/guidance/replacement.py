"""Inpainting by replacement: known entries are set to noised data, and levels may be visited again.

The loop of ``sample`` executes it, with the known entries drawn anew in its callback:

    visits = list(resampled(plan.rows, resamplings))

    def put_back(k, x):
        i, back_to = visits[k]
        return replacement.after(x, plan.rows[i].s, back_to)

    x = replacement(x, plan.rows[0].t)
    x = sample(plan, denoiser, x, generator, callback=put_back, visits=[i for i, _ in visits])
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..basics.checks import check_integer
from ..basics.noise import Generators, standard_normal_like
from ..sampling.rows import Row
from ..sdes import SDE

REPLACEMENT_METHODS = ("replacement", "repaint")


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
        """Return x with its known entries drawn for the time ``s``; None stands for the data."""
        return torch.where(self.mask, self.at(s).to(x), x)

    def after(self, x: Tensor, s: float | None, back_to: float | None = None) -> Tensor:
        """Return x with its known entries drawn for the time ``s``, then noised back to ``back_to`` if given."""
        x = self(x, s)
        return x if back_to is None or s is None else renoise(self.sde, x, s, back_to, self.generator)

    def at(self, s: float | None) -> Tensor:
        """Draw alpha_s known + sigma_s z, shape (B, ...)."""
        if s is None:
            return self.known
        z = standard_normal_like(self.known, self.generator).to(self.known)
        return self.known * float(self.sde.alpha(s)) + z * float(self.sde.sigma(s))


def resampled(rows: Sequence[Row], resamplings: int, jump_length: int = 1) -> Iterator[tuple[int, float | None]]:
    """Yield the order in which RePaint visits a plan's rows: it goes back every ``jump_length`` levels.

    Replacement draws the known pixels and the hole independently. They come to agree when the whole image is noised
    back to the earlier time and denoised again.

    Args:
        rows: Rows that look back no further than their own interval, because a jump breaks the path that multistep
            rows look back on.
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
    # A second stage may look back on the first one of its interval, which is made again with it.
    if resamplings > 1 and any(row.history and not row.continues for row in rows):
        raise ValueError(
            "resampling needs a sampler without memory of earlier levels: set solver_order=1 and "
            "solver_correction=False, or another predictor, such as 'singlestep'."
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
