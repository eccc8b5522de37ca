"""Particles in the plane: a Gaussian mixture, whose score is known exactly, under the three samplers of the paper."""

from __future__ import annotations

import base64
import math
from typing import Any

import torch
from torch import Tensor

from ..schedulers import VPSDEScheduler
from .runs import SAMPLERS, checked_seed, generators_of, trace

PARTICLES = 240
LEVELS = 60
SCALE = 2**13  # positions are sent as 16-bit integers in units of 1/SCALE; states lie within +-4


def _ring() -> Tensor:
    angles = torch.arange(8) * (math.pi / 4.0)
    return 1.25 * torch.stack([angles.cos(), angles.sin()], dim=1)


def _spiral() -> Tensor:
    angles = torch.linspace(0.6, 3.4 * math.pi, 36)
    return (angles / (2.4 * math.pi))[:, None] * torch.stack([angles.cos(), angles.sin()], dim=1)


def _islands() -> Tensor:
    return torch.tensor([[-1.1, -0.7], [1.2, -0.4], [-0.1, 1.2]])


# The step of ``langevin`` comes from the norms of one sample. In two dimensions they vary so much that it has no mean.
CLOUDS = {**SAMPLERS, "pc": {"corrector": "ornstein_uhlenbeck", "snr": 0.3}}

# Centres of the components, shape (K, 2), and the standard deviation of each.
MIXTURES: dict[str, tuple[Tensor, float]] = {
    "islands": (_islands(), 0.22),
    "ring": (_ring(), 0.12),
    "spiral": (_spiral(), 0.08),
}


def denoiser(centres: Tensor, std: float, scheduler: VPSDEScheduler) -> Any:
    """E[x_0 | x_t] of the mixture, by Bayes' rule for each of its components.

    A component N(m, s^2) has the marginal N(alpha m, v), v = alpha^2 s^2 + sigma^2, and the posterior mean
    m + (alpha s^2/v) (x - alpha m).
    """

    def estimate(x: Tensor, timestep: Tensor) -> Tensor:
        time = scheduler.sde_time(timestep)
        alpha, sigma = float(scheduler.sde.alpha(time)), float(scheduler.sde.sigma(time))
        variance = (alpha * std) ** 2 + sigma**2
        offsets = x[:, None] - alpha * centres
        weights = torch.softmax(-offsets.square().sum(-1) / (2.0 * variance), dim=1)
        means = centres + (alpha * std**2 / variance) * offsets
        return (weights[..., None] * means).sum(1)

    return estimate


def particles(mixture: str = "islands", seed: int = 0) -> dict[str, Any]:
    """Paths of the same start under each sampler.

    Raises:
        ValueError: ``mixture`` or ``seed`` is not allowed.
    """
    if mixture not in MIXTURES:
        raise ValueError(f"mixture must be one of {', '.join(MIXTURES)}, got {mixture!r}.")
    centres, std = MIXTURES[mixture]
    seed = checked_seed(seed)
    start = torch.randn(PARTICLES, 2, generator=torch.Generator().manual_seed(seed))
    paths, levels = {}, []
    for name, options in CLOUDS.items():
        scheduler = VPSDEScheduler(prediction_type="sample", data_range=None, **options)
        scheduler.set_timesteps(LEVELS)
        generators = generators_of(range(seed, seed + PARTICLES))
        moments = list(trace(scheduler, denoiser(centres, std, scheduler), start, generators))
        whole = (torch.stack([m.sample for m in moments]) * SCALE).round().clamp(-32768, 32767).to(torch.int16)
        paths[name] = base64.b64encode(whole.numpy().astype("<i2").tobytes()).decode()
        levels = [(round(m.alpha, 6), round(m.sigma * m.alpha, 6)) for m in moments]
    return {
        "particles": PARTICLES,
        "scale": SCALE,
        "levels": levels,
        "centres": [[round(v, 5) for v in row] for row in centres.tolist()],
        "std": std,
        "paths": paths,
    }
