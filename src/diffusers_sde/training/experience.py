"""What a process has drawn in a round, and how its rows are dealt out to the optimiser steps of the round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..evaluation.samplers import generator_of
from .policy_configuration import PolicyTrainingConfig

_DEALING = 2**41  # numbers of the choice of steps, apart from those of the noise


@dataclass(frozen=True)
class Experience:
    """A part of the images of a round on one process.

    Attributes:
        drawn: What there is to learn from; see ``RewardMethod.draw``.
        advantages: Of each image, shape (B,).
        numbers: Of each image in the round.
    """

    drawn: Any
    advantages: Tensor
    numbers: range


Rows = list[tuple[int, Tensor, Tensor]]
"""Batches of rows: the number of the part, and numbers of steps and of images, int64, shape (n,)."""


def deal(experience: list[Experience], config: PolicyTrainingConfig, first: int) -> list[Rows]:
    """The rows that each update of a round is made of.

    The steps of an image are drawn and dealt out by its number, so that they do not depend on the processes.

    Args:
        experience: What this process has drawn.
        config: The options of the run.
        first: Number of the first image of the round in the run.
    """
    updates = config.updates_per_round
    dealt_out: list[Rows] = [[] for _ in range(updates)]
    for r, part in enumerate(experience):
        dealt: list[list[tuple[int, int]]] = [[] for _ in range(updates)]
        for image, number in enumerate(part.numbers):
            generator = generator_of(config.seed, _DEALING + first + number)
            chosen = torch.randperm(len(part.drawn), generator=generator)[: config.trained_steps]
            for j, step in enumerate(chosen.tolist()):
                dealt[(j + number) % updates].append((step, image))
        for update, rows in enumerate(dealt):
            pairs = torch.tensor(sorted(rows), dtype=torch.int64).reshape(-1, 2)  # of one step, one after the other
            dealt_out[update] += [(r, chunk[:, 0], chunk[:, 1]) for chunk in pairs.split(config.train_batch_size)]
    return dealt_out
