"""The density of a step: mean, standard deviation and log-probability of every stochastic row.

A row without a Langevin step draws x_s from N(mean, std^2 I), where the mean is the row's linear form without its noise
and the standard deviation is the coefficient of the noise. Policy gradients need exactly that of a sampler.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..basics.checks import check_choice
from ..basics.noise import Generators, standard_normal_like
from ..sdes import expand_like
from .rows import Row, input_of, mean

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Transition:
    """p(x_s | x_t) = N(mean, std^2 I), the law of one stochastic step; gradients reach what it was made of.

    Attributes:
        mean: Shape (B, ...), float32 or float64.
        std: A number, or one for each sample, shape (B,).
        memory: What later rows look back on, the last stored first: the ``memory`` of the next transition. Empty for
            samplers that store nothing.
    """

    mean: Tensor
    std: float | Tensor
    memory: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def sample(self, generator: Generators = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw x_s, shape of ``mean``, without gradients: what ``log_prob`` is to score; see ``rsample``.

        Args:
            generator: One generator, or one for each sample.
            dtype: In which the sample is to be stored; that of ``mean`` if None. A sample that is scored later must
                be scored as it was stored, or ratios of probabilities are not 1 where nothing has changed.
        """
        return self.rsample(generator, dtype)

    def rsample(self, generator: Generators = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw what ``sample`` draws, with the gradient of mean + std z; the log-probability of it has none."""
        z = standard_normal_like(self.mean, generator).to(self.mean)
        if isinstance(self.std, float):
            drawn = torch.add(self.mean, z, alpha=self.std)
        else:  # each sample by the arithmetic of a step with its own row, bit for bit
            pairs = zip(self.mean, z, self.std.tolist(), strict=True)
            drawn = torch.stack([torch.add(m, e, alpha=s) for m, e, s in pairs])
        return drawn if dtype is None else drawn.to(dtype)

    def log_prob(self, x: Tensor, reduction: str = "mean") -> Tensor:
        """log N(x; mean, std^2) in nats.

        Args:
            x: x_s, shape of ``mean``, such as ``sample`` returns.
            reduction: ``mean`` over the entries of a sample, which does not depend on the resolution; ``sum``, the
                log-density; or ``none``, entry by entry.

        Returns:
            Shape (B,), or that of ``mean``.

        Raises:
            ValueError: An unknown reduction, or another shape.
        """
        if x.shape != self.mean.shape:
            raise ValueError(f"x must have shape {tuple(self.mean.shape)}, got {tuple(x.shape)}.")
        std = self._std()
        z = (x.to(self.mean) - self.mean) / std
        return _reduced(-0.5 * z.square() - torch.log(std) - 0.5 * math.log(2.0 * math.pi), reduction)

    def kl(self, other: Transition, reduction: str = "mean") -> Tensor:
        """KL(self || other) in nats: log(std'/std) + (std^2 + (mean - mean')^2) / (2 std'^2) - 1/2 for each entry.

        Args:
            other: The transition of the reference, at the same x_t and step.
            reduction: As in ``log_prob``.
        """
        own, its = self._std(), other._std()
        squares = own.square() + (self.mean - other.mean).square()
        return _reduced(torch.log(its / own) + squares / (2.0 * its.square()) - 0.5, reduction)

    def entropy(self, reduction: str = "mean") -> Tensor:
        """log(std sqrt(2 pi e)) in nats for each entry; see ``log_prob`` for ``reduction``."""
        each = torch.log(self._std()) + 0.5 * math.log(2.0 * math.pi * math.e)
        return _reduced(each.expand_as(self.mean), reduction)

    def _std(self) -> Tensor:
        std = torch.as_tensor(self.std, dtype=self.mean.dtype, device=self.mean.device)
        return expand_like(std, self.mean)


def transition(
    row: Row, x: Tensor, model_output: Tensor, stored: Sequence[Tensor] = (), estimate: Tensor | None = None
) -> Transition:
    """The law of the step that a row of a plan makes.

    Args:
        row: A row with noise.
        x: x_t, shape (B, ...). Half precision is computed in float32.
        model_output: What the plan's model returned there, same shape.
        stored: What earlier rows have stored, the last first.
        estimate: The bounded x0_hat, for rows that take it; see ``Row.needs_estimate``.

    Raises:
        ValueError: A row whose result is not Gaussian, has no noise, or needs what is not given.
    """
    if (reason := why_not_gaussian(row)) is not None:
        raise ValueError(f"this row has no density: {reason}.")
    looks_back = max(len(row.history), len(row.keep.history) if row.keep is not None else 0)
    if len(stored) < looks_back:
        raise ValueError(
            f"this row looks back on {looks_back} stored quantities, and {len(stored)} were given: pass the memory of "
            "the transition before as memory, or use a sampler without memory (solver_order=1, "
            "solver_correction=False)."
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, model_output = x.to(dtype), model_output.to(dtype)
    moved = mean(row, x, input_of(model_output, estimate, row.of_estimate), stored)
    kept: tuple[Tensor, ...] = tuple(stored)
    if row.keep is not None:
        kept = (mean(row.keep, x, input_of(model_output, estimate, row.keeps_estimate), stored), *kept)
    return Transition(moved, float(row.noise), kept)


def why_not_gaussian(row: Row) -> str | None:
    """Why a row has no density; None if it has one."""
    if row.langevin is not None:
        return "the step size of a Langevin corrector depends on the norm of its own noise (use 'ornstein_uhlenbeck')"
    if row.noise == 0.0:
        return "it draws no noise (the last row, and every row of the probability flow)"
    if row.keep is not None and row.keep.noise != 0.0:
        return "it stores its own noise for a later row"
    return None


def _reduced(values: Tensor, reduction: str) -> Tensor:
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        return values
    flat = values.flatten(1)
    return flat.mean(1) if reduction == "mean" else flat.sum(1)
