"""The VP SDE that passes through a discrete DDPM table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..basics.checks import check_choice, check_integer, check_number, check_numbers
from .base import SDE

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp", "laplace")


def ddpm_betas(
    beta_schedule: str = "linear",
    num_train_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    trained_betas: Sequence[float] | None = None,
) -> Tensor:
    """The noise variances beta_1..beta_N of a DDPM, float64, for diffusers' schedule names.

    Args:
        beta_schedule: ``linear`` in beta, ``scaled_linear`` in sqrt(beta) (latent diffusion), ``squaredcos_cap_v2``
            (Nichol & Dhariwal 2021), ``sigmoid`` (GeoDiff), ``exp`` or ``laplace``; those given by alpha_bar are capped
            at beta = 0.999.
        num_train_timesteps: N.
        beta_start: beta_1, where the schedule uses it.
        beta_end: beta_N, where the schedule uses it.
        trained_betas: Use these values instead; all other arguments are then ignored.

    Raises:
        ValueError: Unknown schedule, N below 2 or a beta outside (0, 1].
    """
    num_train_timesteps = check_integer("num_train_timesteps", num_train_timesteps, at_least=2)
    check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
    check_number("beta_start", beta_start, at_least=0.0)
    check_number("beta_end", beta_end, at_least=0.0)
    if trained_betas is not None:
        betas = check_numbers("trained_betas", trained_betas, at_least=2)
    elif beta_schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    elif beta_schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64).square()
    elif beta_schedule == "squaredcos_cap_v2":
        betas = _betas_of_alpha_bar(
            num_train_timesteps, lambda t: torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
        )
    elif beta_schedule == "exp":
        betas = _betas_of_alpha_bar(num_train_timesteps, lambda t: torch.exp(-12.0 * t))
    elif beta_schedule == "laplace":
        betas = _betas_of_alpha_bar(num_train_timesteps, _laplace_alpha_bar)
    else:  # sigmoid
        ramp = torch.sigmoid(torch.linspace(-6.0, 6.0, num_train_timesteps, dtype=torch.float64))
        betas = ramp * (beta_end - beta_start) + beta_start
    if not bool(((betas > 0) & (betas <= 1)).all()):
        name = "trained_betas" if trained_betas is not None else "beta_start and beta_end"
        raise ValueError(f"{name} must give at least two variances in (0, 1], got {betas.tolist()[:3]}...")
    return betas


def _betas_of_alpha_bar(n: int, alpha_bar: Callable[[Tensor], Tensor]) -> Tensor:
    values = alpha_bar(torch.linspace(0.0, 1.0, n + 1, dtype=torch.float64))
    return (1.0 - values[1:] / values[:-1]).clamp(max=0.999)


def _laplace_alpha_bar(t: Tensor) -> Tensor:
    """log-SNR with a Laplace density (Hang et al. 2024, arXiv:2407.03297), with diffusers' guard of 1e-6."""
    log_root = -0.5 * torch.where(t > 0.5, -1.0, 1.0) * torch.log(1.0 - 2.0 * (0.5 - t).abs() + 1e-6)
    snr = torch.exp(log_root)
    return torch.sqrt(snr / (1.0 + snr))


def rescale_to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that the last one is 0 and the first stays (Lin et al. 2023, Algorithm 1)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()


@dataclass(frozen=True)
class DiscreteVPSDE(SDE):
    """VP SDE through the values alpha_bar_0..alpha_bar_{N-1} of a DDPM table; timestep n sits at t = (n + 1) / N.

    At those times alpha^2 = alpha_bar_n and sigma^2 = 1 - alpha_bar_n exactly; between them the log-SNR is linear.
    Before the first entry sigma^2/alpha^2 grows linearly from 0 at t = 0, the data, as for any SDE with finite g; after
    the last but one entry of a zero-terminal-SNR table alpha/sigma falls linearly to 0.

    Args:
        alphas_cumprod: The products of 1 - beta, strictly decreasing, in [0, 1). The default is DDPM's own table.
    """

    alphas_cumprod: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        values = self.alphas_cumprod
        if len(values) == 0:
            values = tuple(torch.cumprod(1.0 - ddpm_betas(), 0).tolist())
        values = tuple(check_numbers("alphas_cumprod", values, at_least=2).tolist())
        object.__setattr__(self, "alphas_cumprod", values)
        decreasing = all(a > b for a, b in zip(values, values[1:], strict=False))
        if not decreasing or not (0.0 <= values[-1] and values[0] < 1.0):
            raise ValueError(
                "alphas_cumprod must be at least two strictly decreasing numbers in [0, 1), got "
                f"{len(values)} values from {values[0]!r} to {values[-1]!r}."
            )

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float], rescale_betas_zero_snr: bool = False) -> DiscreteVPSDE:
        """From the variances beta_1..beta_N (see ``ddpm_betas``), optionally with zero terminal SNR."""
        alphas_cumprod = torch.cumprod(1.0 - torch.as_tensor(betas, dtype=torch.float64), 0)
        signal = [1.0, *alphas_cumprod.tolist()]
        stuck = next((n for n, (a, b) in enumerate(zip(signal, signal[1:], strict=False)) if not b < a), None)
        if stuck is not None:
            raise ValueError(
                "each of the betas must take away some of the signal and leave some: beta_start, beta_end or an entry "
                f"of trained_betas is too large or too small (alpha_bar stays {signal[stuck]:g} in step {stuck + 1})."
            )
        if rescale_betas_zero_snr:
            alphas_cumprod = rescale_to_zero_terminal_snr(alphas_cumprod)
        return cls(tuple(alphas_cumprod.tolist()))

    @property
    def prior_std(self) -> float:
        """1: the prior is N(0, I)."""
        return 1.0

    def _table(self, t: Tensor) -> Tensor:
        return _log_snr_table(self.alphas_cumprod, t.dtype, t.device)

    def _log_snr(self, t: Tensor) -> Tensor:
        table, n = self._table(t), len(self.alphas_cumprod)
        position = t * n - 1.0
        index = position.detach().floor().clamp(0, n - 2).long()
        weight = position - index
        left, right = table[index], table[index + 1]
        ends_in_zero = torch.isneginf(right)
        inside = left + weight * (torch.where(ends_in_zero, left, right) - left)
        to_zero_snr = left + 2.0 * torch.log1p(-torch.where(ends_in_zero, weight, torch.zeros_like(weight)))
        from_data = table[0] - torch.log(torch.where(position < 0, position + 1.0, torch.ones_like(position)))
        return torch.where(position < 0, from_data, torch.where(ends_in_zero, to_zero_snr, inside))

    def _log_alpha(self, t: Tensor) -> Tensor:
        return 0.5 * torch.nn.functional.logsigmoid(self._log_snr(t))

    def _log_sigma(self, t: Tensor) -> Tensor:
        return 0.5 * torch.nn.functional.logsigmoid(-self._log_snr(t))

    def _time_of(self, log_snr: Tensor) -> Tensor:
        table, n = self._table(log_snr), len(self.alphas_cumprod)
        index = (torch.searchsorted(-table, -log_snr.detach(), right=True) - 1).clamp(0, n - 2)
        left, right = table[index], table[index + 1]
        weight = torch.where(
            torch.isneginf(right), -torch.expm1(0.5 * (log_snr - left)), (log_snr - left) / (right - left)
        )
        before_first = torch.exp(table[0] - log_snr)
        return torch.where(log_snr > table[0], before_first, index + 1.0 + weight.clamp(0.0, 1.0)) / n


@lru_cache(maxsize=32)
def _log_snr_table(alphas_cumprod: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    values = torch.tensor(alphas_cumprod, dtype=torch.float64)
    return torch.logit(values).to(device=device, dtype=dtype)
