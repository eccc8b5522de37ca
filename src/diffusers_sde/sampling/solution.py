"""What samplers that choose their own steps return, and how they give up."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class SolverError(RuntimeError):
    """An adaptive solver gives up, because it needs too many calls or too small steps at these tolerances."""


@dataclass(frozen=True)
class Solution:
    """The result of a sampler that chooses its own steps, for the probability-flow ODE or the reverse SDE.

    Attributes:
        sample: The state at the end, shape (B, ...).
        calls: Network calls that each sample took part in, rejected steps included, shape (B,), int64.
        rejected: Rejected steps of each sample, shape (B,), int64.
    """

    sample: Tensor
    calls: Tensor
    rejected: Tensor
