"""The objective of group-relative policy optimisation: advantages within groups, and the clipped ratio."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_STD = 1e-6  # of the rewards of a group: equal ones say nothing, and are not to be amplified


def group_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """(r - mean)/std within each group (Shao et al. 2024, arXiv:2402.03300, section 4.1), shape (n,).

    Args:
        rewards: Shape (n,).
        groups: Number of each reward's group, int64, shape (n,).
    """
    advantages = torch.zeros_like(rewards)
    for group in groups.unique().tolist():
        own = groups == group
        centred = rewards[own] - rewards[own].mean()
        advantages[own] = centred / (centred.square().mean().sqrt() + SMALLEST_STD)
    return advantages


def clipped_objective(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """min(rho A, clip(rho, 1 - c, 1 + c) A), to be maximised (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    Args:
        ratio: rho = p(x_s | x_t) / p_old(x_s | x_t), shape (n,).
        advantages: A, shape (n,).
        clip_range: c.
    """
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return torch.minimum(ratio * advantages, clipped * advantages)
