"""What a predictor is: a choice of coefficients for every interval of a grid.

A predictor maps a grid of times t_0 > t_1 > ... > t_n to *stages*, one per model call of an interval: coefficients of
x_t, of x0_hat, of fresh unit noise z and of what earlier calls have stored, for every interval at once, in float64:

    x_s = x * x_t + x0 * x0_hat(x_t, t) + noise * z + sum_k history[k] * stored[k].

``stochasticity`` (eta) interpolates between the probability-flow ODE, 0, and Anderson's reverse SDE, 1, through
dx = [f x - (1 + eta^2)/2 g^2 score] dt + eta g dw; every value has the same marginals, and so has one that changes with
t.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..sdes import SDE
from .rows import Form

ESTIMATE = Form(model=1.0)  # a stage that keeps this stores its estimate


class Stage(NamedTuple):
    """Coefficients of one model call for each of n intervals, each of shape (n,), float64.

    Attributes:
        x: Coefficient of the sample.
        x0: Coefficient of the estimate at this call.
        noise: Coefficient of fresh unit noise.
        history: Coefficients of what was stored before, the last first. They are 0 where nothing was stored yet.
        keep: The linear form that is stored for later calls, in terms of the sample, the estimate (``model``), the
            noise and what was stored before; None if nothing is. Two stages that share a draw store it in this way.
        estimate: The estimate that ``x0``, ``keep`` and ``completion`` speak of, as a x_t + b x0_hat, given as (a, b).
            None means x0_hat itself.
        completion: Weights of the estimate at the start of this interval, and of what was stored before, with which
            they complete the *previous* step, before this one begins.
        t: Time of the call; None for the start of the interval.
        s: Time of the result; None for the end of the interval.
    """

    x: Tensor
    x0: Tensor
    noise: Tensor
    history: tuple[Tensor, ...] = ()
    keep: Form | None = None
    estimate: tuple[Tensor, Tensor] | None = None
    completion: tuple[Tensor, ...] = ()
    t: Tensor | None = None
    s: Tensor | None = None


@dataclass(frozen=True)
class Predictor(ABC):
    """A rule that leads from one noise level to the next.

    A subclass states its options as fields, under the names that they have in the schedulers' configs, and what kind of
    rule it is as class attributes. ``PREDICTORS`` lists the classes by name.
    """

    calls: ClassVar[int] = 1
    """Model calls per interval, which is the number of stages."""

    finite_at_zero_snr: ClassVar[bool] = True
    """Whether it can start where alpha(t) = 0; f and g^2 are infinite there."""

    deterministic: ClassVar[bool] = False
    """Whether it integrates the probability-flow ODE only."""

    @property
    def order(self) -> int:
        """Order of convergence of the law of the samples in the length of the intervals."""
        return 1

    @abstractmethod
    def stages(self, sde: SDE, times: Tensor, stochasticity: Tensor | float) -> list[Stage]:
        """The coefficients for every interval of a grid.

        Args:
            sde: The SDE.
            times: Decreasing times, shape (n + 1,), float64.
            stochasticity: One number for all intervals, or a tensor with one number for each.
        """

    def default_stochasticity(self, sde: SDE, times: Tensor) -> Tensor:
        """Stochasticity of each interval where none is asked for, shape (n,): that of Anderson's reverse SDE."""
        return torch.ones_like(times[1:])

    @classmethod
    def from_config(cls, config: Any) -> Predictor:
        """The predictor with the options that a scheduler's config (or any mapping) has for its fields."""
        return cls(**{f.name: config[f.name] for f in fields(cls)})
