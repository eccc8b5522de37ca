"""The abstraction everything else stands on: a Gaussian path and the SDE that it defines.

Two functions of time, log alpha(t) and log sigma(t), fix the marginals x_t | x_0 ~ N(alpha(t) x_0, sigma(t)^2 I).
The linear SDE with these marginals, dx = f(t) x dt + g(t) dw, its transition kernels, its reverse, its prior and the
inverse of its log-SNR all follow, and are derived here once.

Notation (Song et al. 2021, arXiv:2011.13456, with alpha and sigma as in Kingma et al. 2021, arXiv:2107.00630):

* ``t``: SDE time, growing from data to noise. Never what a network is fed, which is called ``timestep``.
* ``log_snr``: log(alpha^2 / sigma^2), strictly decreasing in t. DPM-Solver's lambda is half of it.
* ``f``, ``g2``: the drift is f(t) x, the diffusion coefficient squared is g2(t).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..basics.checks import check_ordered
from ..basics.precision import finest


def as_time(t: Tensor | float | Sequence[float]) -> Tensor:
    """Turn a time into a tensor precise enough for schedule arithmetic.

    Python numbers become float64; tensors keep float32 or float64; half precision and integers are promoted, since a
    schedule evaluated in bfloat16 has lost its small noise levels before anything is computed.
    """
    if not isinstance(t, Tensor):
        return torch.as_tensor(t, dtype=torch.float64)
    if t.dtype in (torch.float32, torch.float64):
        return t
    if t.is_floating_point():
        return t.to(torch.float32)
    return finest(t)


def expand_like(value: Tensor, x: Tensor) -> Tensor:
    """Append axes of length one so that ``value`` of shape () or (B,) or any leading part broadcasts against ``x``."""
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))


@dataclass(frozen=True)
class SDE(ABC):
    """dx = f(t) x dt + g(t) dw with marginals x_t | x_0 ~ N(alpha(t) x_0, sigma(t)^2 I), t in [t_min, t_max].

    A subclass gives ``_log_alpha`` and ``_log_sigma`` (and ``_time_of`` where the inverse has a closed form). Both must
    be written so that they stay accurate near the ends: ``expm1`` and ``log1p`` instead of 1 - exp.

    Every method accepts a Python number or a tensor of any shape for ``t`` and returns a tensor of that shape. Python
    numbers are evaluated in float64, tensors in their own precision (half precision is promoted to float32).

    Attributes:
        t_min: Smallest time at which the score is evaluated (the paper's epsilon).
        t_max: Time of the prior.
    """

    t_min: float = field(default=1e-5, kw_only=True)
    t_max: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        check_ordered("t_min", self.t_min, "t_max", self.t_max, at_least=0.0)

    @abstractmethod
    def _log_alpha(self, t: Tensor) -> Tensor:
        """Log alpha(t)."""

    @abstractmethod
    def _log_sigma(self, t: Tensor) -> Tensor:
        """Log sigma(t)."""

    def _log_snr(self, t: Tensor) -> Tensor:
        return 2.0 * (self._log_alpha(t) - self._log_sigma(t))

    def _time_of(self, log_snr: Tensor) -> Tensor:
        """Invert the log-SNR by bisection, to the last bit that the dtype resolves."""
        low = torch.full_like(log_snr, 0.0 if math.isfinite(self._log_snr(as_time(self.t_min))) else self.t_min)
        high = torch.full_like(log_snr, self.t_max)
        for _ in range(200):
            middle = 0.5 * (low + high)
            too_clean = self._log_snr(middle) > log_snr
            low, high = torch.where(too_clean, middle, low), torch.where(too_clean, high, middle)
        return 0.5 * (low + high)

    # ------------------------------------------------------------------ the path

    def log_alpha(self, t: Tensor | float) -> Tensor:
        """Logarithm of the signal coefficient, log alpha(t)."""
        return self._log_alpha(as_time(t))

    def log_sigma(self, t: Tensor | float) -> Tensor:
        """Logarithm of the marginal standard deviation given x_0, log sigma(t)."""
        return self._log_sigma(as_time(t))

    def alpha(self, t: Tensor | float) -> Tensor:
        """Signal coefficient alpha(t), E[x_t | x_0] = alpha(t) x_0."""
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor | float) -> Tensor:
        """Marginal standard deviation sigma(t) of x_t given x_0, in units of the data."""
        return self.log_sigma(t).exp()

    def log_snr(self, t: Tensor | float) -> Tensor:
        """log(alpha^2 / sigma^2), strictly decreasing in t; infinite where alpha or sigma vanish."""
        return self._log_snr(as_time(t))

    def time_of(self, log_snr: Tensor | float) -> Tensor:
        """The time at which the path has this log-SNR: the inverse of ``log_snr``."""
        return self._time_of(as_time(log_snr))

    def marginal(self, x0: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_t given x_0.

        Args:
            x0: Data, shape (B, ...).
            t: Time, shape () or (B,).

        Returns:
            The mean alpha(t) x_0, shape (B, ...), and sigma(t), broadcastable against it; both in x0's dtype.
        """
        alpha, sigma = (expand_like(v, x0).to(x0) for v in (self.alpha(t), self.sigma(t)))
        return alpha * x0, sigma

    # ------------------------------------------------------------------ the forward SDE

    def f(self, t: Tensor | float) -> Tensor:
        """Drift coefficient f(t) = d log alpha / dt, in 1/time: the drift is f(t) x."""
        return _derivative(self._log_alpha, as_time(t))

    def g2(self, t: Tensor | float) -> Tensor:
        """Squared diffusion g(t)^2 = -sigma^2 d log_snr / dt, in data^2/time.

        It equals alpha^2 d(sigma^2/alpha^2)/dt: the only value with which the linear SDE has these marginals.
        """
        t = as_time(t)
        return -torch.exp(2.0 * self._log_sigma(t)) * _derivative(self._log_snr, t)

    def drift(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Forward drift f(t) x, shape of ``x``."""
        return expand_like(self.f(t), x).to(x) * x

    def diffusion(self, t: Tensor | float) -> Tensor:
        """Diffusion coefficient g(t), shape of ``t``."""
        return self.g2(t).sqrt()

    def reverse_drift(self, x: Tensor, t: Tensor | float, score: Tensor, stochasticity: float = 1.0) -> Tensor:
        """Drift of the reverse-time SDE, f x - (1 + stochasticity^2)/2 g^2 score.

        ``stochasticity`` 1 is Anderson's reverse SDE (Song et al., eq. 6), 0 the probability-flow ODE (eq. 13); the
        matching diffusion coefficient is stochasticity * g(t). Every value has the same marginals.
        """
        weight = 0.5 * (1.0 + stochasticity**2)
        return self.drift(x, t) - weight * expand_like(self.g2(t), x).to(x) * score

    def transition(self, s: Tensor | float, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Transition kernel from s to t > s: x_t | x_s ~ N(a x_s, v I).

        a = alpha_t / alpha_s and v = sigma_t^2 - a^2 sigma_s^2 = -sigma_t^2 expm1(log_snr_t - log_snr_s).

        Returns:
            The factor a and the variance v, with the broadcast shape of s and t.
        """
        s, t = as_time(s), as_time(t)
        a = torch.exp(self._log_alpha(t) - self._log_alpha(s))
        v = -torch.exp(2.0 * self._log_sigma(t)) * torch.expm1(self._log_snr(t) - self._log_snr(s))
        return a, v

    # ------------------------------------------------------------------ the prior

    @property
    def prior_std(self) -> float:
        """Standard deviation of the Gaussian that sampling starts from, N(0, prior_std^2 I).

        sigma(t_max): sigma_max for VE, and 1 to within 1e-4 for VP and sub-VP, whose subclasses say exactly 1.
        """
        return float(self.sigma(self.t_max))

    def prior_sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw from the prior N(0, prior_std^2 I), shape ``shape``."""
        return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=device) * self.prior_std

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log-density of the prior in nats, summed over all axes but the first; shape (B,)."""
        d = x[0].numel()
        x = finest(x)
        square = x.reshape(x.shape[0], -1).square().sum(1)
        return -0.5 * square / self.prior_std**2 - 0.5 * d * math.log(2.0 * math.pi * self.prior_std**2)


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Exact elementwise derivative by forward-mode differentiation; works under no_grad."""
    with torch.inference_mode(False):
        t = (t.clone() if t.is_inference() else t).contiguous()  # jvp refuses expanded tensors
        # As a vector: torch promotes the tangent of a float32 tensor without axes to float64.
        flat = t.reshape(-1)
        return torch.func.jvp(function, (flat,), (torch.ones_like(flat),))[1].reshape(t.shape)
