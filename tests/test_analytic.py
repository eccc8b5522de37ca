"""The exact models are right: their score is the gradient of their log density, which has the right moments."""

import math

import pytest
import torch
from analytic import GaussianMixture, PointwiseGaussian, convergence_order, z_threshold

from diffusers_sde.sdes import VESDE, SubVPSDE

MIXTURE = GaussianMixture(
    [0.5, 0.3, 0.2],
    [[1.0, 0.5], [-1.0, 0.0], [0.2, -1.5]],
    [[[0.2, 0.1], [0.1, 0.3]], [[0.1, 0.0], [0.0, 0.4]], [[0.3, -0.1], [-0.1, 0.1]]],
)


@pytest.mark.parametrize("t", [1e-3, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("sde", [VESDE(), SubVPSDE()], ids=lambda s: type(s).__name__)
def test_denoiser_is_tweedies_formula_on_the_exact_density(sde, t):
    x = MIXTURE.sample_marginal(sde, t, 50, torch.Generator().manual_seed(1)).requires_grad_()
    (score,) = torch.autograd.grad(MIXTURE.log_prob(sde, x, t).sum(), x)
    expected = (x.detach() + sde.sigma(t) ** 2 * score) / sde.alpha(t)
    torch.testing.assert_close(MIXTURE.denoiser(sde)(x.detach(), t), expected, rtol=1e-8, atol=1e-8)


def test_time_may_differ_between_samples():
    sde = SubVPSDE()
    x, t = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    one_by_one = torch.cat([MIXTURE.denoiser(sde)(x[i : i + 1], t[i]) for i in range(4)])
    torch.testing.assert_close(MIXTURE.denoiser(sde)(x, t), one_by_one, rtol=1e-12, atol=1e-12)


def test_density_integrates_to_one_and_samples_have_its_moments():
    sde, t, edge = SubVPSDE(), 0.2, 6.0
    axis = torch.linspace(-edge, edge, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    density = MIXTURE.log_prob(sde, grid, t).exp() * (axis[1] - axis[0]) ** 2
    assert float(density.sum()) == pytest.approx(1.0, abs=1e-6)

    n = 200_000
    x = MIXTURE.sample_marginal(sde, t, n, torch.Generator().manual_seed(2))
    mean = (density[:, None] * grid).sum(0)
    variance = (density[:, None] * (grid - mean) ** 2).sum(0)
    z = z_threshold(1e-6, 4)
    assert ((x.mean(0) - mean).abs() < z * (variance / n).sqrt()).all()
    # The fourth moment of this mixture is below the Gaussian 3 Var^2, so 2 Var^2 / n bounds the variance's error.
    assert ((x.var(0) - variance).abs() < z * variance * math.sqrt(2 / n)).all()


def test_pointwise_gaussian_is_the_diagonal_gaussian():
    sde, x = VESDE(), torch.randn(5, 3, dtype=torch.float64)
    mean, std = torch.tensor([0.1, -0.2, 0.5], dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    ours = PointwiseGaussian(mean, std).denoiser(sde)(x, 0.4)
    torch.testing.assert_close(ours, GaussianMixture.gaussian(mean, std**2).denoiser(sde)(x, 0.4))


def test_convergence_order_sees_the_order():
    ns = [50, 100, 200]
    for order in (1, 2, 3):
        assert convergence_order([3 * n**-order * (1 + 4 / n) for n in ns], ns) == pytest.approx(order, abs=0.02)
    assert abs(convergence_order([0.1 + 1 / n for n in ns], ns)) < 0.5
