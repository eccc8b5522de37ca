"""Denoising score matching in continuous time.

    E_t lambda(t) E || score_hat(x_t, t) - grad log p(x_t | x_0) ||^2   (Song et al. 2021, eq. 7)

written as a weight on the error of the network's own output, in which it is numerically harmless: with
x0_hat = skip x_t + out F the score error is (alpha out / sigma^2) (F - F_target).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..basics.precision import uniform_numbers
from ..sdes import SDE, expand_like
from .parametrizations import Parametrization

WEIGHTINGS = ("paper", "likelihood", "output", "min_snr")
TIME_SAMPLINGS = ("uniform", "importance", "log_normal", "logit_normal")


def sample_times(
    sde: SDE,
    n: int,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    discrete_steps: int | None = None,
) -> Tensor:
    """Training times, shape (n,), float64 (float32 on mps).

    Args:
        sde: Times lie in its [t_min, t_max].
        n: How many.
        generator: Must live on ``device``.
        device: Where.
        discrete_steps: None for times uniform in [t_min, t_max]; N for the N times t_max (1..N)/N of a DDPM table, or
            the N geometric scales of SMLD for a VE path.
    """
    return times_from_uniform(sde, uniform_numbers(n, generator, device), discrete_steps)


def times_from_uniform(
    sde: SDE,
    u: Tensor,
    discrete_steps: int | None = None,
    sampling: str = "uniform",
    log_normal: tuple[float, float] = (-1.2, 1.2),
    logit_normal: tuple[float, float] = (0.0, 1.0),
    shift: float = 1.0,
) -> Tensor:
    """The training times that numbers ``u``, uniform in [0, 1), stand for, decreasing in ``u``.

    ``uniform``: in t. ``importance``: density p(t) proportional to g^2/sigma^2 = -d log_snr/dt, that is, uniform in
    log-SNR, with which the likelihood weighting has the least variance (Song et al. 2021, arXiv:2101.09258, section
    3.2); multiply the loss by ``importance_ratio``. ``log_normal``: log(sigma/alpha) normal, cut to the SDE's times
    (Karras et al. 2022, Table 1); this changes the effective weighting on purpose, without a correction.
    ``logit_normal``: log(r/(1 - r)) normal, with r = t / t_max, cut likewise (Esser et al. 2024, arXiv:2403.03206,
    equation 19); on the straight path, where r/(1 - r) is sigma/alpha, that is ``log_normal``.

    A ``shift`` s then moves the times towards the noise, r -> s r / (1 + (s - 1) r), which on the straight path
    multiplies sigma/alpha by s (equation 23).

    Args:
        sde: Times lie in its [t_min, t_max].
        u: Any shape; however it was drawn (per sample, stratified), its marginal is to be uniform.
        discrete_steps: See ``sample_times``; only with ``uniform``.
        sampling: One of ``TIME_SAMPLINGS``.
        log_normal: Mean and standard deviation of log(sigma/alpha).
        logit_normal: Mean and standard deviation of log(r/(1 - r)).
        shift: The factor s; other than 1 only without ``discrete_steps`` and ``importance``.

    Returns:
        Times, shape and dtype of ``u``.

    Raises:
        ValueError: Unknown ``sampling``, one that needs continuous time, or no finite log-SNR at an end of the SDE.
    """
    if sampling not in TIME_SAMPLINGS:
        raise ValueError(f"sampling must be one of {', '.join(TIME_SAMPLINGS)}, got {sampling!r}.")
    if sampling != "uniform" and discrete_steps is not None:
        raise ValueError(f"sampling {sampling!r} needs continuous time, got discrete_steps={discrete_steps!r}.")
    if shift != 1.0:
        if discrete_steps is not None or sampling == "importance":
            raise ValueError(
                f"shift must be 1 with discrete_steps and with sampling 'importance', got {shift!r}, discrete_steps="
                f"{discrete_steps!r} and sampling={sampling!r}."
            )
        t = times_from_uniform(sde, u, None, sampling, log_normal, logit_normal)
        return (shift * t / (1.0 + (shift - 1.0) * t / sde.t_max)).clamp(sde.t_min, sde.t_max)
    if sampling == "importance":
        low, high = _log_snr_ends(sde)
        return sde.time_of(low + u * (high - low)).clamp(sde.t_min, sde.t_max)
    if sampling == "log_normal":
        mean, std = log_normal
        # log_snr = -2 log(sigma/alpha); u counts from the noisy end.
        ends = (torch.as_tensor(0.5 * (2.0 * mean + sde.log_snr(t)) / std).to(u) for t in (sde.t_max, sde.t_min))
        low, high = (torch.special.ndtr(end) for end in ends)
        normal = torch.special.ndtri(low + u * (high - low))
        return sde.time_of(2.0 * (std * normal - mean)).clamp(sde.t_min, sde.t_max)
    if sampling == "logit_normal":
        mean, std = logit_normal
        logits = torch.special.logit(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64) / sde.t_max)
        high, low = torch.special.ndtr((logits - mean) / std).to(u)
        normal = torch.special.ndtri(high - u * (high - low))
        return (sde.t_max * torch.sigmoid(mean + std * normal)).clamp(sde.t_min, sde.t_max)
    if discrete_steps is None:
        return sde.t_max - u * (sde.t_max - sde.t_min)
    index = (u * discrete_steps).long().clamp(max=discrete_steps - 1)
    return discrete_times(sde, discrete_steps).to(u)[index]


def importance_ratio(sde: SDE, t: Tensor) -> Tensor:
    """Uniform density over that of ``importance`` sampling at ``t``, the factor that keeps the loss unbiased.

    Z sigma^2 / (g^2 (t_max - t_min)) with Z the log-SNR between the ends; same shape as ``t``.
    """
    low, high = _log_snr_ends(sde)
    return (high - low) / (sde.t_max - sde.t_min) * sde.sigma(t).square() / sde.g2(t)


def _log_snr_ends(sde: SDE) -> tuple[float, float]:
    """Log-SNR at t_max and t_min."""
    low, high = float(sde.log_snr(sde.t_max)), float(sde.log_snr(sde.t_min))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"sampling 'importance' needs a finite log-SNR at both ends of the SDE, {type(sde).__name__} has {low:g} "
            f"and {high:g}."
        )
    return low, high


def discrete_times(sde: SDE, discrete_steps: int) -> Tensor:
    """The times of the paper's discrete models, increasing, float64, shape (N,).

    DDPM's table has its entry n at (n + 1)/N; SMLD's scales sigma_1..sigma_N = sigma_min..sigma_max sit at
    (i - 1)/(N - 1) (they carry noise at t = 0, which no variance-preserving path does).
    """
    if discrete_steps < 2:
        raise ValueError(f"discrete_steps must be at least 2, got {discrete_steps!r}.")
    noisy_at_zero = bool(torch.isfinite(sde.log_snr(0.0)))
    first = 0.0 if noisy_at_zero else sde.t_max / discrete_steps
    return torch.linspace(first, sde.t_max, discrete_steps, dtype=torch.float64)


def output_weight(
    sde: SDE, parametrization: Parametrization, t: Tensor, weighting: str, min_snr_gamma: float = 5.0
) -> Tensor:
    """Weight on the squared error of the network's output at times ``t``, same shape.

    ``paper``: lambda = sigma^2, so that the noise estimate has weight 1 (Song et al. 2021, section 3.3).
    ``likelihood``: lambda = g^2, with which the loss bounds the negative log-likelihood in nats (Song et al. 2021,
    arXiv:2101.09258). ``output``: weight 1 on the output itself, which is what v-prediction, flow matching and EDM
    train with. ``min_snr``: min(SNR, ``min_snr_gamma``) on the error of x0_hat (Hang et al. 2023, arXiv:2303.09556).

    Raises:
        ValueError: Unknown weighting.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}.")
    if weighting == "output":
        return torch.ones_like(t)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    _, out = parametrization.coefficients(alpha, sigma)
    if weighting == "min_snr":
        return out.square() * sde.log_snr(t).exp().clamp(max=min_snr_gamma)
    noise_error = (alpha * out / sigma).square()  # of eps_hat, per unit of output error
    return noise_error if weighting == "paper" else noise_error * sde.g2(t) / sigma.square()


def denoising_loss(
    sde: SDE,
    parametrization: Parametrization,
    network: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    weighting: str = "paper",
    min_snr_gamma: float = 5.0,
) -> Tensor:
    """Denoising score-matching loss of each sample, averaged over its dimensions, shape (B,).

    Args:
        sde: The SDE.
        parametrization: What the network predicts.
        network: (scaled input, t) -> output, with t the SDE time of shape (B,); time conditioning is the caller's.
        x0: Data, shape (B, ...).
        t: Times, shape (B,).
        eps: Unit noise, shape of ``x0``.
        weighting: See ``output_weight``.
        min_snr_gamma: See ``output_weight``.
    """
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    x_t = expand_like(alpha, x0).to(x0) * x0 + expand_like(sigma, x0).to(x0) * eps
    scale = expand_like(parametrization.input_scale(alpha, sigma), x0).to(x0)
    output = network(x_t * scale, t)
    target = _target(parametrization, x0, eps, alpha, sigma)
    error = (output.to(target.dtype) - target).square().flatten(1).mean(1)
    return output_weight(sde, parametrization, t, weighting, min_snr_gamma).to(error) * error


def _target(parametrization: Parametrization, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """(x0 - skip x_t)/out with x_t = alpha x0 + sigma eps, as coefficients of x0 and eps.

    They are formed in float64: from a float32 x_t the noise would be recovered with an error of 1e-7 alpha/sigma.
    """
    skip, out = parametrization.coefficients(alpha, sigma)
    of_x0, of_eps = (1.0 - skip * alpha) / out, -skip * sigma / out
    return expand_like(of_x0, x0).to(x0) * x0 + expand_like(of_eps, x0).to(x0) * eps
