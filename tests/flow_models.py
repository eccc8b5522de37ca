"""Data with a known flow, for the tests of the probability flow."""

import torch
from analytic import GaussianMixture

from diffusers_sde.sdes import EDMSDE, VESDE, VPSDE, CosineSDE, DiscreteVPSDE, RectifiedFlowSDE, SubVPSDE

ALL_SDES = [
    VESDE(),
    VPSDE(),
    SubVPSDE(),
    DiscreteVPSDE(t_min=1e-3),
    CosineSDE(),
    EDMSDE(),
    RectifiedFlowSDE(),
]


def name(sde):
    return type(sde).__name__


def gaussian(d=4):
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(d, d, dtype=torch.float64, generator=generator) * 0.3
    return GaussianMixture.gaussian(torch.linspace(-0.5, 0.7, d), root @ root.T + 0.01 * torch.eye(d))


def mixture():
    return GaussianMixture(
        [0.5, 0.3, 0.2],
        [[-0.8, 0.2, 0.0], [0.7, 0.5, -0.3], [0.0, -0.9, 0.4]],
        [[0.04, 0.02, 0.09], [0.03, 0.05, 0.02], [0.01, 0.04, 0.02]],
    )


def generators(n, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(n)]
