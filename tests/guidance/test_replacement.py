"""Inpainting by replacement: the law of the known entries, and what resampling mends."""

import math

import pytest
import torch
from analytic import GaussianMixture
from labelled import SDES
from posteriors import GAUSSIAN, errors, log_snr_plan, posterior

from diffusers_sde import make_plan, sample
from diffusers_sde.guidance.replacement import Replacement, renoise, resampled
from diffusers_sde.sampling.exponential import Exponential


def sample_inpainting(plan, denoiser, x, replacement, generator=None, **resampling):
    """The reference loop with known entries replaced after every row."""
    visits = list(resampled(plan.rows, **{"resamplings": 1, **resampling}))

    def put_back(k, x):
        i, back_to = visits[k]
        return replacement.after(x, plan.rows[i].s, back_to)

    x = replacement(x, plan.rows[0].t)
    return sample(plan, denoiser, x, generator, callback=put_back, visits=[i for i, _ in visits])


@pytest.fixture
def hole():
    """Two known entries of four, values (n, 4), and the posterior given them."""
    mask, n = torch.tensor([True, False, True, False]), 4000
    known = torch.tensor([0.7, math.nan, 0.1, math.nan], dtype=torch.float64)
    a = torch.eye(4, dtype=torch.float64)[mask]
    truth, _ = posterior(GAUSSIAN, a, known[mask], 0.0)
    rest = GaussianMixture.gaussian(truth.means[0][~mask], truth.covariances[0][~mask][:, ~mask])
    return mask, known.expand(n, 4), rest


def run_inpainting(hole, plan, sde, **options):
    mask, known, rest = hole
    generator, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    x = torch.randn(known.shape, generator=generator, dtype=torch.float64) * sde.prior_std
    replacement = Replacement(sde, known, mask, own)
    out = sample_inpainting(plan, GAUSSIAN.denoiser(sde), x, replacement, generator, **options)
    assert torch.equal(out[:, mask], known[:, mask])  # exactly
    return errors(out[:, ~mask], rest)


def test_replacement_is_wrong_and_resampling_mends_it(hole):
    sde = SDES["vp"]
    plan = log_snr_plan(sde, 60)
    plain = run_inpainting(hole, plan, sde)
    mended = run_inpainting(hole, plan, sde, resamplings=6)
    assert 0.2 < plain["mean"] < 0.9  # known and unknown entries are correlated: not exact, but not unconditional
    assert mended["mean"] < 0.5 * plain["mean"]
    assert mended["covariance"] < 0.25  # it is 0.11, and 0.56 if the sample is not noised before it goes back


@pytest.mark.parametrize("name", SDES)
def test_replacement_is_exact_for_independent_entries(name):
    sde, mask = SDES[name], torch.tensor([True, False, True, False])
    data = GaussianMixture.gaussian([0.3, -0.2, 0.5, 0.1], [0.1, 0.2, 0.3, 0.15])
    known = torch.ones(6, 4, dtype=torch.float64)
    times = torch.linspace(1.0, 1e-3, 12, dtype=torch.float64)
    plan = make_plan(sde, times, corrector="langevin" if name == "vp" else None, predictor=Exponential(2))
    x = torch.randn(6, 4, dtype=torch.float64) * sde.prior_std
    own, other = (torch.Generator().manual_seed(s) for s in (1, 2))
    a = sample_inpainting(plan, data.denoiser(sde), x, Replacement(sde, known, mask, own), torch.manual_seed(0))
    nothing = Replacement(sde, known, torch.zeros(4), other)
    b = sample_inpainting(plan, data.denoiser(sde), x, nothing, torch.manual_seed(0))
    if name != "vp":  # Langevin's step size depends on all entries
        assert torch.equal(a[:, ~mask], b[:, ~mask])
    assert torch.equal(b, sample(plan, data.denoiser(sde), x, torch.manual_seed(0)))
    everything = Replacement(sde, known, torch.ones(4), other)
    assert torch.equal(sample_inpainting(plan, data.denoiser(sde), x, everything), known)


def test_known_entries_have_the_noise_of_the_time_the_sample_is_at():
    sde, n = SDES["sub_vp"], 40000
    seen = []

    def denoiser(x, t):
        seen.append((float(t), float(x.mean()), float(x.std())))
        return torch.zeros_like(x)

    known = torch.full((n, 1), 0.8, dtype=torch.float64)
    replacement = Replacement(sde, known, torch.ones(1), torch.Generator().manual_seed(0))
    times = torch.linspace(1.0, 0.01, 6, dtype=torch.float64)
    plan = make_plan(sde, times, "heun", stochasticity=0.0)
    sample_inpainting(plan, denoiser, torch.zeros_like(known), replacement)
    assert len(seen) == len(plan.rows)
    for t, mean, std in seen:
        sigma = float(sde.sigma(t))
        assert abs(mean - 0.8 * float(sde.alpha(t))) < 0.03 * sigma and abs(std / sigma - 1.0) < 0.03


@pytest.mark.parametrize("name", ["ve", "sub_vp", "flow"])
def test_renoising_leads_from_marginal_to_marginal(name):
    sde, n = SDES[name], 100_000
    x = 0.8 * sde.alpha(0.3) + sde.sigma(0.3) * torch.randn(n, 1, dtype=torch.float64)
    x = renoise(sde, x, 0.3, 0.6, torch.Generator().manual_seed(1))
    alpha, sigma = float(sde.alpha(0.6)), float(sde.sigma(0.6))
    assert abs(float(x.mean()) - 0.8 * alpha) < 0.016 * sigma and abs(float(x.std()) / sigma - 1.0) < 0.011  # 5 s.e.


def test_order_of_resampling():
    sde = SDES["vp"]
    times = torch.linspace(1.0, 0.1, 4, dtype=torch.float64)
    rows = make_plan(sde, times, corrector="langevin", predictor=Exponential()).rows
    t = times.tolist()
    assert [i for i, _ in resampled(rows, 1)] == list(range(8))
    assert list(resampled(rows, 2)) == [
        *((0, None), (1, t[0]), (0, None), (1, None)),
        *((2, None), (3, t[1]), (2, None), (3, None)),
        *((4, None), (5, t[2]), (4, None), (5, None)),
        *((6, None), (7, None)),
    ]
    assert [i for i, _ in resampled(rows, 2, jump_length=2)] == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
    heun = make_plan(sde, times, "heun", stochasticity=0.0).rows
    assert [i for i, _ in resampled(heun, 1)] == list(range(len(heun)))
    assert [i for i, _ in resampled(heun, 2)] == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6]
    multistep = make_plan(sde, times, Exponential(2)).rows
    with pytest.raises(ValueError, match="without memory"):
        list(resampled(multistep, 2))


def test_errors():
    with pytest.raises(ValueError, match="resamplings"):
        list(resampled(log_snr_plan(SDES["vp"], 4).rows, 0))
