"""What a posterior method is: a set of options that draws samples of x_0 given y = A x_0 + noise.

``PosteriorMethod`` is the base of all methods. Most of them are a ``GuidingMethod``: they turn the denoiser into
another denoiser, which any sampler then runs. A method that is no denoiser, such as ``SMC``, moves samples by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from ..basics.noise import Generators
from ..networks.denoisers import Denoiser
from ..sampling.rows import Plan
from ..sdes import SDE
from .operators import LinearOperator


@dataclass(frozen=True, eq=False)
class PosteriorProblem:
    """A prior and a measurement: x_0 is to be drawn from p(x_0) given y = A x_0 + noise_std z.

    Attributes:
        denoiser: The prior's, (x_t, t) -> x0_hat.
        sde: The prior's SDE.
        operator: A, for the B samples of ``y``.
        y: Measurements, shape (B, *measurement_shape).
        noise_std: Standard deviation of the measurement noise, in units of the data.
    """

    denoiser: Denoiser
    sde: SDE
    operator: LinearOperator
    y: Tensor
    noise_std: float = 0.0

    def select(self, index: Tensor) -> PosteriorProblem:
        """Return the problem of the samples ``index``, int64 (n,), which may repeat."""
        return replace(self, operator=self.operator.select(index), y=self.y[index.to(self.y.device)])


class PosteriorRun(Protocol):
    """A sampler with its arguments, as a posterior method sees it; the pipelines implement it."""

    @property
    def generator(self) -> Generators:
        """The source of all noise."""

    def guided(self, denoiser_of: Callable[[Tensor], Denoiser]) -> Tensor:
        """Draw with the sampler that the user has chosen.

        Args:
            denoiser_of: It maps an index of samples, int64 (n,), to the guided denoiser of these samples.

        Returns:
            The samples, shape (B, ...).
        """

    def own_plan(self) -> Plan:
        """Lay out a plan for a method that moves samples by itself.

        Its steps are of the reverse SDE and of first order, and it ends with the data.

        Raises:
            ValueError: The user has passed an argument that only the chosen sampler could follow, such as a callback.
        """


@dataclass(frozen=True)
class PosteriorMethod(ABC):
    """A way to draw x_0 given y = A x_0 + noise_std z.

    A method is a frozen dataclass. Its fields are its options, each with a default, and ``__post_init__`` checks them.
    A new method is one such class and one line in ``POSTERIOR_METHODS``.
    """

    @classmethod
    def for_data(cls, std: float) -> PosteriorMethod:
        """Return the method with default options for data of the standard deviation ``std``.

        A method whose defaults depend on the spread of the data overrides this.
        """
        return cls()

    @abstractmethod
    def draw(self, problem: PosteriorProblem, run: PosteriorRun) -> Tensor:
        """Draw one sample of x_0 for each measurement, shape (B, *data_shape).

        Raises:
            ValueError: The problem or the run does not fit the method; nothing has been drawn then.
        """


class GuidingMethod(PosteriorMethod):
    """A method that approximates E[x_0 | x_t, y], and so works with every sampler of denoisers."""

    @abstractmethod
    def __call__(
        self, denoiser: Denoiser, sde: SDE, operator: LinearOperator, y: Tensor, noise_std: float = 0.0
    ) -> Denoiser:
        """Return the guided denoiser (x_t, t) -> E[x_0 | x_t, y].

        Args:
            denoiser: The unconditional one.
            sde: Its SDE.
            operator: A.
            y: Measurements, shape (B, *measurement_shape).
            noise_std: Standard deviation of the measurement noise.

        Raises:
            ValueError: Values out of range, or an operator that the method cannot serve.
        """

    def draw(self, problem: PosteriorProblem, run: PosteriorRun) -> Tensor:
        """Draw with the chosen sampler and the guided denoiser, shape (B, *data_shape)."""

        def denoiser_of(index: Tensor) -> Denoiser:
            part = problem.select(index)
            return self(part.denoiser, part.sde, part.operator, part.y, part.noise_std)

        return run.guided(denoiser_of)
