"""Measurements through a decoder: exact for linear ones, and the true derivatives of others."""

import pytest
import torch

from diffusers_sde.guidance import SMC, DecodedOperator, Downsampling, LinearMap, Mask, posterior_denoiser
from diffusers_sde.sdes import VPSDE

SDE, LATENT, IMAGE = VPSDE(), (2, 2, 2), (1, 4, 4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear_decoder():
    """A decoder and its pseudo-inverse as functions and as a matrix (16, 8)."""
    matrix = torch.randn(16, 8, generator=generator(), dtype=torch.float64) / 3.0
    inverse = torch.linalg.pinv(matrix)
    decode = lambda z: (z.flatten(1) @ matrix.T.to(z)).reshape(-1, *IMAGE)  # noqa: E731
    encode = lambda x: (x.flatten(1) @ inverse.T.to(x)).reshape(-1, *LATENT)  # noqa: E731
    return decode, encode, matrix


def curved(z):
    """A decoder that is not linear: every pixel is a function of all latents of its sample."""
    weight = torch.randn(16, 8, generator=generator(1)).to(z)
    return torch.tanh(z.flatten(1) @ weight.T / 2).reshape(-1, *IMAGE) * 1.5


def shrink(x, t):
    """The denoiser of unit Gaussian data under a variance-preserving SDE, bent a little so that J varies."""
    alpha = SDE.alpha(t).to(x).reshape(-1, *[1] * (x.ndim - 1))
    return alpha * x + 0.1 * torch.sin(x)


def downsampling():
    return Downsampling(2, IMAGE)


def composed(operator, matrix):
    """A D as one linear map."""
    a = operator.matrix() @ matrix
    shape = operator.measurement_shape
    return LinearMap(
        lambda x: (x.flatten(1) @ a.T.to(x)).reshape(-1, *shape),
        LATENT,
        lambda y: (y.flatten(1) @ a.to(y)).reshape(-1, *LATENT),
    )


@pytest.mark.parametrize(("method", "options"), [("dps", {}), ("pigdm", {}), ("mmps", {"iterations": 4, "rtol": 1e-9})])
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_linear_decoder_makes_another_linear_measurement(method, options, chunk):
    decode, encode, matrix = linear_decoder()
    x = torch.randn(3, *LATENT, generator=generator(2), dtype=torch.float64)
    y, t = torch.randn(3, 1, 2, 2, generator=generator(3), dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    through = DecodedOperator(downsampling(), LATENT, decode, encode, chunk)
    plain = composed(downsampling(), matrix)
    guided = [posterior_denoiser(shrink, SDE, each, y, 0.3, method, **options)(x, t) for each in (through, plain)]
    torch.testing.assert_close(*guided, rtol=1e-4, atol=1e-6)
    assert (guided[0] - shrink(x, t)).abs().max() > 1e-2


@pytest.mark.parametrize("gluing", [0.0, 0.7])
def test_the_gradients_are_those_of_the_misfit(gluing):
    encode = lambda x: torch.sin(x.flatten(1)[:, :8] * 2 + x.flatten(1)[:, 8:]).reshape(-1, *LATENT)  # noqa: E731
    operator = Mask((torch.arange(16) % 3 > 0).reshape(1, *IMAGE), IMAGE)
    x = torch.randn(3, *LATENT, generator=generator(2), dtype=torch.float64).requires_grad_()
    y, t = torch.randn(3, *IMAGE, generator=generator(3), dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    x0_hat = shrink(x, t)
    image, known = curved(x0_hat), operator.apply(torch.ones_like(y))
    misfit = ((y - image) * known).flatten(1).norm(dim=1)
    m = float(known[0].sum())
    glue = (x0_hat - encode(torch.where(known > 0, y, image))).flatten(1).norm(dim=1)
    (gradient,) = torch.autograd.grad((misfit + gluing * (8 / m) ** 0.5 * glue).sum(), x)
    expected = x0_hat - 1.3 * m**0.5 * float(SDE.sigma(t)) * gradient
    through = DecodedOperator(operator, LATENT, curved, encode, 2)
    psld = posterior_denoiser(shrink, SDE, through, y, method="psld", scale=1.3, gluing=gluing)
    torch.testing.assert_close(psld(x.detach(), t), expected.detach(), rtol=1e-6, atol=1e-8)
    if not gluing:
        dps = posterior_denoiser(shrink, SDE, through, y, method="dps", scale=1.3)
        torch.testing.assert_close(dps(x.detach(), t), expected.detach(), rtol=1e-6, atol=1e-8)


def test_the_linearisation_is_the_derivative():
    center, direction = (torch.randn(3, *LATENT, generator=generator(seed), dtype=torch.float64) for seed in (1, 2))
    through = DecodedOperator(downsampling(), LATENT, curved, curved, 2)
    around = through.at(center)
    step = 1e-5
    difference = (through.apply(center + step * direction) - through.apply(center - step * direction)) / (2 * step)
    torch.testing.assert_close(around.apply(direction), difference, rtol=1e-6, atol=1e-8)
    y = torch.randn(3, 1, 2, 2, generator=generator(3), dtype=torch.float64)
    left, right = (around.apply(direction) * y).sum(), (direction * around.adjoint(y)).sum()
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(around.residual(y, center), y - through.apply(center))
    torch.testing.assert_close(
        around.residual(y, center + direction), y - through.apply(center) - around.apply(direction)
    )
    picked = around.select(torch.tensor([2, 0]))
    torch.testing.assert_close(picked.adjoint(y[[2, 0]]), around.adjoint(y)[[2, 0]])


def test_particles_draw_from_the_posterior_of_a_curved_decoder():
    """One latent with a unit Gaussian prior, measured through exp: the posterior is integrated on a grid."""
    from diffusers_sde.sampling.exponential import Exponential
    from diffusers_sde.sampling.planning import make_plan

    noise_std, y = 0.5, torch.full((1, 1, 1, 1), 2.0)
    decode = lambda z: torch.exp(0.7 * z)  # noqa: E731
    through = DecodedOperator(LinearMap(lambda x: x, (1, 1, 1), lambda v: v), (1, 1, 1), decode, torch.log)
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    log_density = -0.5 * grid**2 - 0.5 * ((2.0 - torch.exp(0.7 * grid)) / noise_std) ** 2
    weight = torch.softmax(log_density, 0)
    mean = (weight * grid).sum()
    std = ((weight * grid**2).sum() - mean**2).sqrt()
    exact = lambda x, t: SDE.alpha(t).to(x) * x  # noqa: E731
    times = torch.linspace(1.0, 1e-4, 240, dtype=torch.float64)
    plan = make_plan(SDE, times.tolist(), Exponential(1))
    drawn = SMC(particles=4000).sample(plan, exact, SDE, through, y, noise_std, generator())
    w, z = drawn.log_weights.exp()[0], drawn.samples[0].flatten().double()
    found = (w * z).sum()
    # 4000 particles: the mean is off by more than 0.05 standard deviations with probability below 1e-2.
    assert abs(found - mean) < 0.08 * std
    assert ((w * z**2).sum() - found**2).sqrt() == pytest.approx(float(std), rel=0.08)


def test_what_cannot_be_is_refused():
    decode, encode, matrix = linear_decoder()
    through, y = DecodedOperator(downsampling(), LATENT, decode, encode), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="around an estimate only"):
        through.adjoint(y)
    with pytest.raises(ValueError, match="posterior 'gaussian' is for linear measurements"):
        posterior_denoiser(shrink, SDE, through, y, method="gaussian")
    with pytest.raises(ValueError, match="posterior 'psld' is for measurements of images whose latents are drawn"):
        posterior_denoiser(shrink, SDE, composed(downsampling(), matrix), y, method="psld")
    with pytest.raises(ValueError, match="gluing must be"):
        posterior_denoiser(shrink, SDE, through, y, method="psld", gluing=-1.0)
