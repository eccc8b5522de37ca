"""Samples, latent codes and interpolation by the probability flow."""

import inspect
import math

import pytest
import torch
from analytic import GaussianMixture
from flow_models import ALL_SDES, mixture, name

from diffusers_sde.flow.codes import decode, encode, interpolate, sample_flow, slerp, solve_flow
from diffusers_sde.flow.solver import ODEOptions
from diffusers_sde.sampling.adaptive import SDEOptions, sample_adaptive
from diffusers_sde.sampling.exponential import Exponential
from diffusers_sde.sampling.loop import sample
from diffusers_sde.sampling.planning import make_plan
from diffusers_sde.sampling.time_grids import get_time_grid
from diffusers_sde.sdes import EDMSDE, VESDE, VPSDE, RectifiedFlowSDE

TIGHT = ODEOptions(rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sde", ALL_SDES, ids=name)
def test_decode_inverts_encode(sde):
    model = mixture()
    x = model.sample(6, torch.Generator().manual_seed(1))
    codes = encode(model.denoiser(sde), sde, x, ODEOptions(rtol=1e-6, atol=1e-6))
    back = decode(model.denoiser(sde), sde, codes.sample, ODEOptions(rtol=1e-6, atol=1e-6))
    assert (back.sample - x).square().mean().sqrt() < 1e-3
    # In between and back.
    middle = solve_flow(model.denoiser(sde), sde, x, sde.t_min, 0.3 * sde.t_max, TIGHT).sample
    again = solve_flow(model.denoiser(sde), sde, middle, 0.3 * sde.t_max, sde.t_min, TIGHT).sample
    assert (again - x).square().mean().sqrt() < 1e-5


@pytest.mark.parametrize("sde", [VESDE(), VPSDE(), RectifiedFlowSDE()], ids=name)
def test_samples_have_the_moments_of_the_data(sde):
    """Exact up to Monte Carlo: z-scores below 4.9 (false-alarm rate 1e-6 each)."""
    model, n = mixture(), 2500
    start = sde.prior_sample((n, 3), torch.Generator().manual_seed(7), dtype=torch.float64)
    options = ODEOptions(batch_size=n, rtol=1e-3, atol=1e-3)
    x = sample_flow(model.denoiser(sde), sde, start, options, denoise_final=False).sample
    reference = model.sample(200_000, torch.Generator().manual_seed(8))
    z = (x.mean(0) - reference.mean(0)) / (reference.std(0) / math.sqrt(n))
    assert z.abs().max() < 4.9
    fourth = (reference - reference.mean(0)).pow(4).mean(0)
    spread = ((fourth - reference.var(0) ** 2) / n).sqrt()
    assert ((x.var(0) - reference.var(0)) / spread).abs().max() < 4.9
    shares = model.responsibilities(x).mean(0)
    assert ((shares - model.weights).abs() < 4.9 * (model.weights / n).sqrt()).all()


def test_samplers_with_steps_of_their_own_take_the_same_arguments():
    arguments = inspect.signature(sample_adaptive).parameters
    shared = {name: parameter.default for name, parameter in arguments.items() if name != "generator"}
    of_flow = {name: parameter.default for name, parameter in inspect.signature(sample_flow).parameters.items()}
    assert list(shared.items()) == list(of_flow.items())


@pytest.mark.parametrize("denoise_final", [True, False])
@pytest.mark.parametrize("sde", [VESDE(), VPSDE(), EDMSDE(), RectifiedFlowSDE()], ids=name)
def test_all_samplers_follow_one_flow_from_one_start(sde, denoise_final):
    """Without noise, ``sample``, ``sample_adaptive`` and ``sample_flow`` solve the same equation, each by a method of
    its own."""
    denoiser, t_min = mixture().denoiser(sde), float(sde.time_of(6.0))
    x = sde.prior_sample((6, 3), torch.Generator().manual_seed(0), dtype=torch.float64)
    by_flow = sample_flow(denoiser, sde, x, TIGHT, t_min, denoise_final)
    by_steps = sample_adaptive(denoiser, sde, x, SDEOptions(1e-4, 1e-4, stochasticity=0.0), t_min, denoise_final)
    plan = make_plan(
        sde,
        get_time_grid("log_snr", sde, 400, sde.t_max, t_min),
        Exponential(2),
        stochasticity=0.0,
        denoise_final=denoise_final,
    )
    assert (by_steps.sample - by_flow.sample).abs().max() < 5e-3
    assert (sample(plan, denoiser, x) - by_flow.sample).abs().max() < 5e-3
    assert by_flow.sample.std() > 0.3


def test_slerp_keeps_norms_and_ends():
    a, b = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1))[:, None, None, None]
    path = slerp(a, b, [0.0, 0.25, 1.0])
    assert path.shape == (3, 3, 1, 4, 4)
    assert torch.allclose(path[:, 0], a) and torch.allclose(path[:, 2], b)
    assert torch.allclose(path.flatten(2).norm(dim=2), a.flatten(1).norm(dim=1)[:, None].expand(3, 3))
    assert torch.allclose(slerp(a, a, [0.5])[:, 0], a)


def test_interpolation_ends_at_the_data_and_stays_among_it():
    sde, model = VPSDE(), mixture()
    x = model.sample(4, torch.Generator().manual_seed(0))
    options = ODEOptions(1e-7, 1e-7)
    strip = interpolate(model.denoiser(sde), sde, x[:2], x[2:], 5, options).sample
    assert strip.shape == (2, 5, 3)
    assert torch.allclose(strip[:, 0], x[:2], atol=1e-3) and torch.allclose(strip[:, -1], x[2:], atol=1e-3)
    density = model.log_prob(sde, strip.flatten(0, 1), sde.t_min)
    typical = model.log_prob(sde, model.sample(1000, torch.Generator().manual_seed(1)), sde.t_min)
    assert density.min() > typical.min() - 5


def test_temperature_shrinks_the_spread():
    sde, model = VPSDE(), GaussianMixture.gaussian(torch.zeros(2), torch.full((2,), 0.25))
    latents = torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    warm = decode(model.denoiser(sde), sde, latents).sample
    cool = decode(model.denoiser(sde), sde, latents, temperature=0.5).sample
    assert torch.allclose(cool, 0.5 * warm, atol=1e-3)


def test_bad_numbers_are_refused():
    sde, model, x = VPSDE(), mixture(), torch.zeros(2, 3)
    for bad in (0.0, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            decode(model.denoiser(sde), sde, x, temperature=bad)
    with pytest.raises(ValueError, match="num must be"):
        interpolate(model.denoiser(sde), sde, x, x, 1)
