"""What a network predicts and what it is fed.

Every parametrisation is one affine map from network output F to the denoised estimate, x0_hat = skip x_t + out F, with
coefficients that depend on alpha and sigma only. Its inverse, (x0 - skip x_t) / out, is the training target. The score
follows by Tweedie's formula, score = (alpha x0_hat - x_t) / sigma^2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..basics.checks import check_choice, check_integer, check_number
from ..sdes import SDE, as_time, expand_like


class Parametrization(ABC):
    """An affine map between network output F and x0_hat, and the scale of the network's input."""

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

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(0, 1)."""
        return torch.zeros_like(sigma), torch.ones_like(sigma)


class Epsilon(Parametrization):
    """F = eps_hat, the noise in x_t (Ho et al. 2020)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(1/alpha, -sigma/alpha)."""
        return 1.0 / alpha, -sigma / alpha


class Score(Parametrization):
    """F = grad log p_t(x_t)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(1/alpha, sigma^2/alpha)."""
        return 1.0 / alpha, sigma.square() / alpha


class Velocity(Parametrization):
    """F = alpha eps - sigma x0 (Salimans & Ho 2022, arXiv:2202.00512)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, -sigma) / (alpha^2 + sigma^2)."""
        norm = alpha.square() + sigma.square()
        return alpha / norm, -sigma / norm


class Flow(Parametrization):
    """F = eps - x0, the velocity of the straight path (Liu et al. 2022, arXiv:2209.03003)."""

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

    sigma_data: float = 0.5
    sign: float = 1.0

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(sd^2 alpha, sigma sd sqrt(v)) / v with v = alpha^2 sd^2 + sigma^2 and sd = sigma_data."""
        variance = (alpha * self.sigma_data).square() + sigma.square()
        return alpha * self.sigma_data**2 / variance, self.sign * sigma * self.sigma_data / variance.sqrt()

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """1 / sqrt(alpha^2 sd^2 + sigma^2)."""
        return torch.rsqrt((alpha * self.sigma_data).square() + sigma.square())


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction", "score", "edm")


def get_parametrization(
    prediction_type: str, sigma_data: float = 0.5, preconditioning: str | None = None
) -> Parametrization:
    """The parametrisation behind a ``prediction_type``.

    Args:
        prediction_type: One of ``PREDICTION_TYPES``; the first four are diffusers' own names.
        sigma_data: Standard deviation of the data, used by EDM's preconditioning only.
        preconditioning: None, or ``edm`` for configs of diffusers' EDM schedulers, in which ``epsilon`` and
            ``v_prediction`` mean a preconditioned network and differ in sign.

    Raises:
        ValueError: Unknown name or combination.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    check_choice("preconditioning", preconditioning, (None, "edm"))
    if preconditioning == "edm" or prediction_type == "edm":
        check_number("sigma_data", sigma_data, above=0.0)
        signs = {"edm": 1.0, "epsilon": 1.0, "v_prediction": -1.0}
        if prediction_type not in signs:
            raise ValueError(
                f"preconditioning='edm' takes prediction_type {', '.join(signs)}, got {prediction_type!r}."
            )
        return EDMPreconditioning(sigma_data, signs[prediction_type])
    plain: dict[str, type[Parametrization]] = {
        "epsilon": Epsilon,
        "sample": Sample,
        "v_prediction": Velocity,
        "flow_prediction": Flow,
        "score": Score,
    }
    return plain[prediction_type]()


TIME_CONDITIONINGS = ("discrete", "continuous", "score_sde", "time", "sigma", "log_sigma", "edm")


@dataclass(frozen=True)
class TimeConditioning:
    """What the network is fed for SDE time t, and the way back.

    Maps that differ by a fraction of a step are in use, and a checkpoint works only with its own:

    * ``discrete``: t N - 1, the index into a DDPM table of N entries (diffusers' timesteps);
    * ``continuous``: t N (networks trained by this package; flow-matching models);
    * ``score_sde``: t (N - 1) (the paper's official VP and sub-VP networks, 999 t);
    * ``time``: t itself;
    * ``sigma``: sigma(t)/alpha(t) (the paper's VE networks and diffusers' ``google/ncsnpp-*``);
    * ``log_sigma``: its logarithm; ``edm``: a quarter of that (c_noise of Karras et al. 2022).

    Args:
        name: One of the above.
        num_train_timesteps: N.
    """

    name: str
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        check_choice("time_conditioning", self.name, TIME_CONDITIONINGS)
        # A flow may be fed t itself; a table of one entry is none.
        check_integer(
            "num_train_timesteps", self.num_train_timesteps, at_least=1 if self.name in ("continuous", "time") else 2
        )

    def timestep(self, sde: SDE, t: Tensor | float) -> Tensor:
        """The network's input for SDE time ``t``, same shape."""
        t, n = as_time(t), self.num_train_timesteps
        if self.name in ("sigma", "log_sigma", "edm"):
            log_sigma = -0.5 * sde.log_snr(t)
            return {"sigma": log_sigma.exp(), "log_sigma": log_sigma, "edm": 0.25 * log_sigma}[self.name]
        if self.name == "time":
            return t
        u = t / sde.t_max
        return {"discrete": u * n - 1.0, "continuous": u * n, "score_sde": u * (n - 1)}[self.name]

    def time(self, sde: SDE, timestep: Tensor | float) -> Tensor:
        """The SDE time at which the network is fed ``timestep``: the inverse of ``timestep``."""
        c, n = as_time(timestep), self.num_train_timesteps
        if self.name in ("sigma", "log_sigma", "edm"):
            log_sigma = {"sigma": c.log(), "log_sigma": c, "edm": 4.0 * c}[self.name]
            return sde.time_of(-2.0 * log_sigma)
        if self.name == "time":
            return c
        u = {"discrete": (c + 1.0) / n, "continuous": c / n, "score_sde": c / (n - 1)}[self.name]
        return u * sde.t_max

    def lies_on(self, sde: SDE, timestep: Tensor | float) -> Tensor:
        """Whether the path has a time at which the network is fed ``timestep``, up to round-off; same shape.

        Counts may be rounded to the precision of ``timestep``, and sigmas to a thousandth: lists of sigmas that go
        around are rounded to a few digits.
        """
        c = as_time(timestep)
        rounded = isinstance(timestep, Tensor) and timestep.dtype in (torch.float16, torch.bfloat16)
        slack = 2.0 * torch.finfo(timestep.dtype).eps if rounded else 0.0  # type: ignore[union-attr]
        if self.name in ("sigma", "log_sigma", "edm"):
            log_sigma = {"sigma": c.log(), "log_sigma": c, "edm": 4.0 * c}[self.name]
            low, high = (-0.5 * float(sde.log_snr(t)) for t in (0.0, sde.t_max))
            slack = max(slack, 1e-3)
            return (log_sigma >= low - slack) & (log_sigma <= high + slack)
        u = self.time(sde, c) / sde.t_max
        return (u >= -1e-9) & (u <= 1.0 + max(slack, 1e-6))
