"""Guidance by class against closed forms: the posterior of a component of a mixture, given its label."""

import pytest
import torch
from labelled import CLASS, COMPONENT, SDES, log_classifier
from posteriors import MIXTURE, errors, log_snr_plan

from diffusers_sde import sample
from diffusers_sde.guidance.classes import classifier_free_guidance, classifier_guidance, guide_within
from diffusers_sde.sampling.exponential import Exponential


def conditional_denoiser(sde):
    """(x, t, label) -> denoiser of the component, or of the mixture for label -1."""

    def denoise(x, t, labels):
        component = COMPONENT.denoiser(sde)(x, t)
        return torch.where((labels == CLASS)[:, None], component, MIXTURE.denoiser(sde)(x, t))

    return denoise


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_classifier_and_classifier_free_guidance_agree(name, scale):
    sde = SDES[name]
    labels = torch.full((6,), CLASS)
    free = classifier_free_guidance(conditional_denoiser(sde), labels, torch.tensor(-1), scale)
    by_classifier = classifier_guidance(MIXTURE.denoiser(sde), sde, log_classifier(sde), scale)
    for t in (0.01, 0.2, 0.6, 0.95):
        t = torch.tensor(t, dtype=torch.float64)
        x = MIXTURE.sample_marginal(sde, t, 6, torch.Generator().manual_seed(4))
        torch.testing.assert_close(by_classifier(x, t), free(x, t), rtol=1e-6, atol=1e-6)
        if scale == 1.0:
            torch.testing.assert_close(by_classifier(x, t), COMPONENT.denoiser(sde)(x, t), rtol=1e-6, atol=1e-6)
    each = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    torch.testing.assert_close(by_classifier(x, each), free(x, each), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stochasticity", [1.0, 0.0])
def test_classifier_guidance_draws_the_class(stochasticity):
    sde, n = SDES["vp"], 5000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    denoiser = classifier_guidance(MIXTURE.denoiser(sde), sde, log_classifier(sde))
    plan = log_snr_plan(sde, 100, stochasticity, predictor=Exponential(3))
    measured = errors(sample(plan, denoiser, x, generator), COMPONENT)
    assert measured["mean"] < 0.08 and measured["covariance"] < 0.12, measured


def test_both_halves_in_one_call():
    calls = []

    def denoise(x, t, labels):
        calls.append((len(x), t.shape, labels.tolist()))
        return x * (1.0 + labels[:, None])

    x, labels, t = torch.ones(2, 3), torch.tensor([3, 7]), torch.tensor(0.5)
    out = classifier_free_guidance(denoise, labels, torch.tensor(10), 2.0)(x, t)
    assert calls == [(4, (), [3, 7, 10, 10])]
    torch.testing.assert_close(out, torch.tensor([[11.0 + 2 * (4 - 11)] * 3, [11.0 + 2 * (8 - 11)] * 3]))
    classifier_free_guidance(denoise, labels, torch.tensor(10), 2.0)(x, torch.tensor([0.5, 0.6]))
    classifier_free_guidance(denoise, labels, torch.tensor(10), 1.0)(x, t)
    classifier_free_guidance(denoise, labels, torch.tensor(10), 0.0)(x, t)
    assert calls[1:] == [(4, (4,), [3, 7, 10, 10]), (2, (), [3, 7]), (2, (), [10, 10])]


def test_guidance_within_an_interval():
    sde = SDES["vp"]
    called = []

    def named(name, value):
        def denoise(x, t):
            called.append(name)
            return torch.full_like(x, value)

        return denoise

    inside, outside = named("in", 1.0), named("out", 0.0)
    denoiser = guide_within((0.5, 2.0), inside, outside, sde)
    times = sde.time_of(-2.0 * torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64).log())
    assert [float(denoiser(torch.zeros(1, 1), t)) for t in times] == [0.0, 1.0, 0.0]
    assert called == ["out", "in", "out"]
    assert denoiser(torch.zeros(3, 1), times).flatten().tolist() == [0.0, 1.0, 0.0]
    assert guide_within(None, inside, outside, sde) is inside


def test_errors():
    prior = MIXTURE.denoiser(SDES["vp"])
    with pytest.raises(ValueError, match="guidance_interval"):
        guide_within((2.0, 1.0), prior, prior, SDES["vp"])
    with pytest.raises(ValueError, match="rows"):
        free = classifier_free_guidance(lambda x, t, c: x, torch.tensor([1, 2]), torch.tensor(0), 2.0)
        free(torch.zeros(3, 4), torch.tensor(0.5))
