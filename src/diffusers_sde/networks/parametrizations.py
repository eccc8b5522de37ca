"""What a network predicts; ``conditioning`` says what it is fed.

Every parametrisation is one affine map from network output F to the denoised estimate, x0_hat = skip x_t + out F, with
coefficients that depend on alpha and sigma only. Its inverse, (x0 - skip x_t) / out, is the training target. The score
follows by Tweedie's formula, score = (alpha x0_hat - x_t) / sigma^2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..basics.checks import check_choice, check_number
from ..sdes import expand_like


class Parametrization(ABC):
    """An affine map between network output F and x0_hat, and the scale of the network's input.

    A new one is a subclass with ``coefficients`` and one line in ``PREDICTION_TYPES``, or, outside the package, in the
    ``prediction_types`` of a scheduler class.

    Attributes:
        meaning: What the network returns, in words, for reports.
    """

    meaning: ClassVar[str] = "a quantity of its own"

    @property
    def name(self) -> str:
        """The name of its class, for messages."""
        return type(self).__name__

    @classmethod
    def for_data(cls, sigma_data: float) -> Parametrization:
        """The parametrisation for data of standard deviation ``sigma_data``, which most do not depend on."""
        return cls()

    @abstractmethod
    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(skip, out) of x0_hat = skip x_t + out F; same shape as ``alpha`` and ``sigma``."""

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Factor on x_t before it enters the network; 1 unless the parametrisation preconditions its input."""
        return torch.ones_like(sigma)

    def determines_data(self, alpha: Tensor, sigma: Tensor) -> bool:
        """Whether the output gives x0_hat at all of these noise levels: whether the coefficients are finite there.

        Where alpha = 0, the state is noise alone, and neither the noise nor the score in it says anything of the data.
        """
        return all(bool(torch.isfinite(c).all()) for c in self.coefficients(alpha, sigma))

    def to_x0(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x0_hat from the network output, shape (B, ...); ``alpha`` and ``sigma`` of shape () or (B,)."""
        skip, out = (expand_like(c, x).to(x) for c in self.coefficients(alpha, sigma))
        return skip * x + out * output

    def from_x0(self, x0: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The network output for which x0_hat = ``x0``: the training target, shape (B, ...)."""
        skip, out = (expand_like(c, x) for c in self.coefficients(alpha, sigma))
        return ((x0 - skip * x) / out).to(x0)


class Sample(Parametrization):
    """F = x0_hat."""

    meaning = "the data (sample)"

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(0, 1)."""
        return torch.zeros_like(sigma), torch.ones_like(sigma)


class Epsilon(Parametrization):
    """F = eps_hat, the noise in x_t (Ho et al. 2020)."""

    meaning = "the noise (epsilon)"

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(1/alpha, -sigma/alpha)."""
        return 1.0 / alpha, -sigma / alpha


class Score(Parametrization):
    """F = grad log p_t(x_t)."""

    meaning = "the score"

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(1/alpha, sigma^2/alpha)."""
        return 1.0 / alpha, sigma.square() / alpha


class Velocity(Parametrization):
    """F = alpha eps - sigma x0 (Salimans & Ho 2022, arXiv:2202.00512)."""

    meaning = "the velocity v = alpha eps - sigma x0 (v_prediction)"

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, -sigma) / (alpha^2 + sigma^2)."""
        norm = alpha.square() + sigma.square()
        return alpha / norm, -sigma / norm


class Flow(Parametrization):
    """F = eps - x0, the velocity of the straight path (Liu et al. 2022, arXiv:2209.03003)."""

    meaning = "the velocity eps - x0 of the straight path (flow_prediction)"

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(1, -sigma) / (alpha + sigma)."""
        norm = alpha + sigma
        return 1.0 / norm, -sigma / norm


@dataclass(frozen=True)
class EDMPreconditioning(Parametrization):
    """EDM's preconditioning (Karras et al. 2022, arXiv:2206.00364, Table 1), for any path.

    It is EDM's in the variables x/alpha and sigma/alpha; the input scale gives the network unit variance for data of
    standard deviation ``sigma_data``. ``sign`` -1 is the v-prediction of preconditioned models (Stable Video
    Diffusion).
    """

    meaning = "EDM's preconditioned output (edm)"

    sigma_data: float = 0.5
    sign: float = 1.0

    @classmethod
    def for_data(cls, sigma_data: float) -> Parametrization:
        """The preconditioning with this ``sigma_data`` and sign 1; a ValueError unless it is positive."""
        return cls(check_number("sigma_data", sigma_data, above=0.0))

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(sd^2 alpha, sigma sd sqrt(v)) / v with v = alpha^2 sd^2 + sigma^2 and sd = sigma_data."""
        variance = (alpha * self.sigma_data).square() + sigma.square()
        return alpha * self.sigma_data**2 / variance, self.sign * sigma * self.sigma_data / variance.sqrt()

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """1 / sqrt(alpha^2 sd^2 + sigma^2)."""
        return torch.rsqrt((alpha * self.sigma_data).square() + sigma.square())


PREDICTION_TYPES: dict[str, type[Parametrization]] = {
    "epsilon": Epsilon,
    "sample": Sample,
    "v_prediction": Velocity,
    "flow_prediction": Flow,
    "score": Score,
    "edm": EDMPreconditioning,
}
EDM_SIGNS = {"edm": 1.0, "epsilon": 1.0, "v_prediction": -1.0}  # by the prediction_type of a preconditioned network


def get_parametrization(
    prediction_type: str,
    sigma_data: float = 0.5,
    preconditioning: str | None = None,
    further: Mapping[str, type[Parametrization]] | None = None,
) -> Parametrization:
    """The parametrisation behind a ``prediction_type``.

    Args:
        prediction_type: A key of ``PREDICTION_TYPES`` or of ``further``; the first four are diffusers' own names.
        sigma_data: Standard deviation of the data, used by EDM's preconditioning only.
        preconditioning: None, or ``edm`` for configs of diffusers' EDM schedulers, in which ``epsilon`` and
            ``v_prediction`` mean a preconditioned network and differ in sign.
        further: Parametrisations of a user's scheduler class, by their names.

    Raises:
        ValueError: Unknown name or combination.
    """
    known = {**PREDICTION_TYPES, **(further or {})}
    check_choice("prediction_type", prediction_type, known)
    check_choice("preconditioning", preconditioning, (None, "edm"))
    if preconditioning == "edm":
        check_number("sigma_data", sigma_data, above=0.0)
        if prediction_type not in EDM_SIGNS:
            raise ValueError(
                f"preconditioning='edm' takes prediction_type {', '.join(EDM_SIGNS)}, got {prediction_type!r}."
            )
        return EDMPreconditioning(sigma_data, EDM_SIGNS[prediction_type])
    return known[prediction_type].for_data(sigma_data)
