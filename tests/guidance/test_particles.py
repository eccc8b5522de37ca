"""Sequential Monte Carlo against the posterior and the evidence of a mixture, which are known in closed form."""

import math

import pytest
import torch
from labelled import SDES
from posteriors import GAUSSIAN, MIXTURE, NOISE_STD, OPERATOR, A, Y, errors, log_snr_plan, posterior

from diffusers_sde.guidance.operators import Mask
from diffusers_sde.guidance.particles import SMC
from diffusers_sde.sampling.exponential import Exponential

MIXTURE_TRUTH, MIXTURE_EVIDENCE = posterior(MIXTURE, A, Y, NOISE_STD)


def smc(data, problems, particles, steps=100, seed=0, sde=SDES["vp"], **options):
    generator = torch.Generator().manual_seed(seed)
    y = Y.expand(problems, 2)
    method = SMC(particles, **options)
    return method.sample(log_snr_plan(sde, steps), data.denoiser(sde), sde, OPERATOR, y, NOISE_STD, generator)


def test_error_shrinks_with_particles():
    rms = []
    for particles, problems in ((4, 120), (16, 60), (64, 30)):
        result = smc(MIXTURE, problems, particles, data_std=0.5)
        each = [
            errors(s, MIXTURE_TRUTH, w)["mean"] for s, w in zip(result.samples, result.log_weights.exp(), strict=True)
        ]
        rms.append(float(torch.tensor(each).square().mean().sqrt()))
    assert rms[1] < 0.75 * rms[0] and rms[2] < 0.75 * rms[1], rms


def test_particles_are_right_where_guidance_is_not():
    # data_std far from the data's: the guided law is wrong, and the weights make up for it.
    result = smc(MIXTURE, 4, 1000, steps=160, data_std=0.8)
    weights = result.log_weights.exp().flatten() / 4
    measured = errors(result.samples.flatten(0, 1), MIXTURE_TRUTH, weights)
    assert measured["mean"] < 0.2 and measured["covariance"] < 0.35 and measured["weights"] < 0.06, measured
    evidence = float(torch.logsumexp(result.log_evidence, 0)) - math.log(4)
    assert abs(evidence - MIXTURE_EVIDENCE) < 0.15
    torch.testing.assert_close(result.log_weights.exp().sum(1), torch.ones(4, dtype=torch.float64))
    assert result.draw(torch.Generator().manual_seed(0)).shape == (4, 4) == result.mean().shape


def test_problems_of_a_batch_are_separate():
    """A problem without information next to one with much keeps equal weights, and every problem has its own mask."""
    sde = SDES["vp"]
    masks = Mask(torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]), (4,))
    y = torch.tensor([[9.0] * 4, [0.3, -0.2, 0.5, 0.1]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    plan = log_snr_plan(sde, 60)
    result = SMC(32, data_std=0.5).sample(plan, GAUSSIAN.denoiser(sde), sde, masks, y, 0.05, generator)
    torch.testing.assert_close(result.log_weights[0].exp(), torch.full((32,), 1 / 32, dtype=torch.float64))
    assert abs(float(result.log_evidence[0])) < 1e-9 and float(result.effective[0]) == pytest.approx(32)
    assert float((result.mean()[1] - y[1]).abs().max()) < 0.1


def test_errors():
    sde = SDES["vp"]
    prior, y, plan = GAUSSIAN.denoiser(sde), Y.expand(1, 2), log_snr_plan(sde, 4)
    with pytest.raises(ValueError, match="noise_std must be positive"):
        SMC().sample(plan, prior, sde, OPERATOR, y, 0.0)
    with pytest.raises(ValueError, match="particles"):
        SMC(particles=0)
    for bad in (log_snr_plan(sde, 4, 0.0), log_snr_plan(sde, 4, predictor=Exponential(2))):
        with pytest.raises(ValueError, match="stochasticity 1"):
            SMC().sample(bad, prior, sde, OPERATOR, y, 0.1)
