"""Guidance against closed forms: with exact scores and a linear measurement the true posterior is known.

E[x_0 | x_t, y] is the denoiser of the posterior, which for Gaussian and mixture data is a Gaussian or a mixture itself,
so exact guidance is compared with it point by point, at round-off. The law of whole runs is pushed through the plan
without Monte Carlo where the denoiser is affine. What is approximate by design is measured on the mixture.
"""

import math

import pytest
import torch
from analytic import GaussianMixture
from labelled import CLASS, COMPONENT, SDES, log_classifier
from posteriors import (
    COVARIANCE,
    GAUSSIAN,
    MIXTURE,
    NOISE_STD,
    OPERATOR,
    A,
    Y,
    errors,
    log_snr_plan,
    moments,
    posterior,
)

from diffusers_sde import make_plan, sample
from diffusers_sde.guidance.classes import classifier_free_guidance, classifier_guidance, guidance_interval
from diffusers_sde.guidance.operators import Mask
from diffusers_sde.guidance.particles import smc_sample
from diffusers_sde.guidance.posteriors import POSTERIOR_METHODS, denoise_with_vjp, posterior_denoiser
from diffusers_sde.guidance.replacement import Replacement, renoise, resampled, sample_inpainting
from diffusers_sde.sampling.exponential import Exponential

EXACT = {"gaussian": {"covariance": COVARIANCE}, "mmps": {"iterations": 4, "rtol": 1e-12}}
TRUTH, EVIDENCE = posterior(GAUSSIAN, A, Y, NOISE_STD)
MIXTURE_TRUTH, MIXTURE_EVIDENCE = posterior(MIXTURE, A, Y, NOISE_STD)


def guided(sde, method, data=GAUSSIAN, n=1, **options):
    return posterior_denoiser(data.denoiser(sde), sde, OPERATOR, Y.expand(n, 2), NOISE_STD, method, **options)


def noisy(sde, t, n=7, data=GAUSSIAN):
    return data.sample_marginal(sde, t, n, torch.Generator().manual_seed(4))


# ---------------------------------------------------------------------- linear measurements, exactly


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("name", SDES)
def test_exact_methods_give_the_denoiser_of_the_posterior(name, method):
    sde = SDES[name]
    for t in (0.003, 0.05, 0.3, 0.7, 0.95):
        x = noisy(sde, t)
        estimate = guided(sde, method, n=7, **EXACT[method])(x, torch.tensor(t, dtype=torch.float64))
        torch.testing.assert_close(estimate, TRUTH.denoiser(sde)(x, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", EXACT)
def test_every_sample_can_have_its_own_time_and_precision(method):
    sde = SDES["vp"]
    t = torch.tensor([0.01, 0.1, 0.5, 0.9], dtype=torch.float64)
    x = torch.randn(4, 4, dtype=torch.float64)
    denoiser = guided(sde, method, n=4, **EXACT[method])
    torch.testing.assert_close(denoiser(x, t), TRUTH.denoiser(sde)(x, t), rtol=1e-5, atol=1e-5)
    single = guided(sde, method, n=4, **EXACT[method])(x.float(), t)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), TRUTH.denoiser(sde)(x, t), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("name", ["flow", "cosine"])
def test_guidance_where_no_signal_is_left(name):
    # At alpha = 0 the estimate is the posterior mean, up to the ratio 1000 at which alpha is cut off.
    estimate = guided(SDES[name], "mmps", **EXACT["mmps"])(torch.zeros(1, 4).double(), torch.tensor(1.0).double())
    torch.testing.assert_close(estimate[0], moments(TRUTH)[0], rtol=1e-4, atol=1e-4)


def push(plan, denoiser, std):
    """Mean and covariance after a plan without memory, exactly, for an affine denoiser."""
    d = 4
    eye = torch.eye(d, dtype=torch.float64)
    mean, covariance = torch.zeros(d, dtype=torch.float64), eye * std**2
    probes = torch.cat([torch.zeros(1, d, dtype=torch.float64), eye])
    for row in plan.rows:
        assert not row.history and row.langevin is None
        values = denoiser(probes, torch.tensor(row.t, dtype=torch.float64))
        matrix = row.x * eye + row.model * (values[1:] - values[0]).T
        mean = matrix @ mean + row.model * values[0]
        covariance = matrix @ covariance @ matrix.T + row.noise**2 * eye
    return mean, covariance


@pytest.mark.parametrize("stochasticity", [1.0, 0.0])
@pytest.mark.parametrize("name", ["ve", "vp", "flow"])
def test_exact_guidance_reproduces_mean_and_covariance(name, stochasticity):
    sde = SDES[name]
    denoiser = guided(sde, "gaussian", n=5, covariance=COVARIANCE)
    runs = [push(log_snr_plan(sde, n, stochasticity), denoiser, sde.prior_std) for n in (100, 200)]
    mean, covariance = moments(TRUTH)
    # First order: the error halves, and one Richardson step leaves the second order. An ODE never forgets that it began
    # in N(0, prior_std^2), which is not quite p_T.
    prior = 0.0 if stochasticity else {"ve": 1e-2, "vp": 2e-3, "flow": 0.0}[name]
    for of_run, true in zip(zip(*runs, strict=True), (mean, covariance), strict=True):
        coarse, fine = ((v - true).abs().max() for v in of_run)
        assert fine < 0.6 * coarse or fine < 2e-4 + prior
        assert (2 * of_run[1] - of_run[0] - true).abs().max() < 1e-3 + prior


@pytest.mark.parametrize("sampler", ["ode", "pc"])
def test_mmps_through_multistep_and_corrector(sampler):
    sde, n = SDES["vp"], 4000
    denoiser = guided(sde, "mmps", n=n, iterations=2, rtol=1e-6)
    generator = torch.Generator().manual_seed(0)
    if sampler == "ode":
        plan = log_snr_plan(sde, 60, 0.0, predictor=Exponential(3))
    else:
        plan = log_snr_plan(sde, 80, predictor=Exponential(2), corrector="ornstein_uhlenbeck", snr=0.1)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    measured = errors(sample(plan, denoiser, x, generator), TRUTH)
    # 4000 exact samples: 0.03 +- 0.01 and 0.06 +- 0.015.
    assert measured["mean"] < 0.08 and measured["covariance"] < 0.15


def test_pigdm_is_exact_for_isotropic_data():
    sde = SDES["sub_vp"]
    data = GaussianMixture.gaussian([0.3, -0.2, 0.5, 0.1], 0.16 * torch.eye(4))
    truth, _ = posterior(data, A, Y, NOISE_STD)
    for t in (0.01, 0.3, 0.9):
        x = noisy(sde, t)
        estimate = guided(sde, "pigdm", data, 7, data_std=0.4)(x, torch.tensor(t, dtype=torch.float64))
        torch.testing.assert_close(estimate, truth.denoiser(sde)(x, t), rtol=1e-6, atol=1e-6)


def test_dps_moves_by_the_noise_in_measured_directions():
    # For data without structure J = I / alpha, and A a mask: each known entry moves by scale sigma / alpha.
    sde, t = SDES["vp"], torch.tensor(0.02, dtype=torch.float64)
    mask = Mask(torch.tensor([1, 1, 0, 0]), (4,))
    x = torch.zeros(1, 4, dtype=torch.float64)

    def prior(x, t):
        return x / sde.alpha(t)

    y = torch.tensor([[3.0, 3.0, 7.0, 7.0]], dtype=torch.float64)
    shift = posterior_denoiser(prior, sde, mask, y, method="dps", scale=0.7)(x, t)
    ratio = float(sde.sigma(t) / sde.alpha(t))
    torch.testing.assert_close(shift, 0.7 * ratio * torch.tensor([[1.0, 1, 0, 0]], dtype=torch.float64))


@pytest.mark.parametrize("method", ["mmps", "pigdm", "dps"])
def test_noise_free_masks_are_met(method):
    sde, n = SDES["vp"], 64
    mask = Mask(torch.tensor([1, 0, 1, 0]), (4,))
    y = mask.apply(MIXTURE.sample(n, torch.Generator().manual_seed(0)))
    denoiser = posterior_denoiser(MIXTURE.denoiser(sde), sde, mask, y, method=method)
    out = sample(log_snr_plan(sde, 60), denoiser, torch.randn(n, 4, dtype=torch.float64))
    assert float(mask.residual(y, out).abs().mean()) < (0.2 if method == "dps" else 0.05)


# name, options -> upper bounds of mean, covariance, weights on the mixture; measured values are about two thirds.
BOUNDS = {
    "mmps": ({"iterations": 2}, 0.6, 2.5, 0.1),
    "pigdm": ({"data_std": 0.5}, 0.35, 0.8, 0.1),
    "dps": ({"scale": 3.0}, 1.2, 1.6, 0.1),
}


@pytest.mark.parametrize("method", BOUNDS)
def test_error_of_approximate_methods_on_the_mixture(method):
    sde, n = SDES["vp"], 3000
    options, *bounds = BOUNDS[method]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    plan = log_snr_plan(sde, 80, predictor=Exponential(2))
    unguided = errors(sample(plan, MIXTURE.denoiser(sde), x, generator), MIXTURE_TRUTH)
    measured = errors(sample(plan, guided(sde, method, MIXTURE, n, **options), x, generator), MIXTURE_TRUTH)
    assert all(measured[k] < bound for k, bound in zip(("mean", "covariance", "weights"), bounds, strict=True)), (
        measured
    )
    assert measured["covariance"] < 0.1 * unguided["covariance"]


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("method", ["dps", "pigdm", "mmps"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_chunks_change_nothing_but_memory(method, context):
    sde = SDES["vp"]
    largest = []

    def prior(x, t):
        largest.append(len(x))
        return MIXTURE.denoiser(sde)(x, t)

    t = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    with context():
        x, y = torch.randn(5, 4, dtype=torch.float64), Y.expand(5, 2).clone()
        whole = posterior_denoiser(prior, sde, OPERATOR, y, NOISE_STD, method)(x, t)
        largest.clear()
        parts = posterior_denoiser(prior, sde, OPERATOR, y, NOISE_STD, method, chunk_size=2)(x, t)
    assert max(largest) == 2 and not parts.requires_grad and not x.requires_grad
    torch.testing.assert_close(whole, parts)


def test_vjp_of_a_network_leaves_its_parameters_alone():
    network = torch.nn.Linear(4, 4)
    x0_hat, vjp = denoise_with_vjp(lambda x, t: network(x), torch.ones(2, 4), torch.tensor(0.5))
    v = torch.randn(2, 4)
    torch.testing.assert_close(vjp(v), (v @ network.weight).detach())
    assert network.weight.grad is None and network.weight.requires_grad and not x0_hat.requires_grad


# ---------------------------------------------------------------------- classes


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
        x = noisy(sde, t, 6, MIXTURE)
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


def test_guidance_interval():
    sde = SDES["vp"]
    called = []

    def named(name, value):
        def denoise(x, t):
            called.append(name)
            return torch.full_like(x, value)

        return denoise

    inside, outside = named("in", 1.0), named("out", 0.0)
    denoiser = guidance_interval(inside, outside, sde, (0.5, 2.0))
    times = sde.time_of(-2.0 * torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64).log())
    assert [float(denoiser(torch.zeros(1, 1), t)) for t in times] == [0.0, 1.0, 0.0]
    assert called == ["out", "in", "out"]
    assert denoiser(torch.zeros(3, 1), times).flatten().tolist() == [0.0, 1.0, 0.0]
    assert guidance_interval(inside, outside, sde, None) is inside


# ---------------------------------------------------------------------- replacement and resampling


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
    rows = make_plan(sde, times, corrector="langevin").rows
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
    with pytest.raises(ValueError, match="without memory"):
        list(resampled(heun, 2))


# ---------------------------------------------------------------------- particles


def smc(data, problems, particles, steps=100, seed=0, sde=SDES["vp"], **options):
    generator = torch.Generator().manual_seed(seed)
    y = Y.expand(problems, 2)
    return smc_sample(
        log_snr_plan(sde, steps), data.denoiser(sde), sde, OPERATOR, y, NOISE_STD, particles, generator, **options
    )


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
    result = smc_sample(plan, GAUSSIAN.denoiser(sde), sde, masks, y, 0.05, 32, generator, data_std=0.5)
    torch.testing.assert_close(result.log_weights[0].exp(), torch.full((32,), 1 / 32, dtype=torch.float64))
    assert abs(float(result.log_evidence[0])) < 1e-9 and float(result.effective[0]) == pytest.approx(32)
    assert float((result.mean()[1] - y[1]).abs().max()) < 0.1


# ---------------------------------------------------------------------- errors


def test_errors():
    sde = SDES["vp"]
    prior = GAUSSIAN.denoiser(sde)
    y = Y.expand(1, 2)
    for options, message in (
        ({"method": "ddrm"}, "method must be one of dps, pigdm, mmps, gaussian, got 'ddrm'"),
        ({"noise_std": -1.0}, "noise_std"),
        ({"method": "pigdm", "data_std": 0.0}, "data_std"),
        ({"method": "mmps", "iterations": 0}, "iterations"),
        ({"method": "dps", "scale": -1.0}, "scale"),
        ({"method": "gaussian", "covariance": torch.eye(3)}, "covariance"),
    ):
        with pytest.raises(ValueError, match=message):
            posterior_denoiser(prior, sde, OPERATOR, y, **options)
    with pytest.raises(ValueError, match="chunk_size"):
        guided(sde, "pigdm", chunk_size=0)(torch.zeros(1, 4).double(), torch.tensor(0.5))
    with pytest.raises(ValueError, match="guidance_interval"):
        guidance_interval(prior, prior, sde, (2.0, 1.0))
    with pytest.raises(ValueError, match="rows"):
        free = classifier_free_guidance(lambda x, t, c: x, torch.tensor([1, 2]), torch.tensor(0), 2.0)
        free(torch.zeros(3, 4), torch.tensor(0.5))
    with pytest.raises(ValueError, match="resamplings"):
        list(resampled(log_snr_plan(sde, 4).rows, 0))
    plan = log_snr_plan(sde, 4)
    with pytest.raises(ValueError, match="noise_std must be positive"):
        smc_sample(plan, prior, sde, OPERATOR, y, 0.0)
    with pytest.raises(ValueError, match="particles"):
        smc_sample(plan, prior, sde, OPERATOR, y, 0.1, particles=0)
    for bad in (log_snr_plan(sde, 4, 0.0), log_snr_plan(sde, 4, predictor=Exponential(2))):
        with pytest.raises(ValueError, match="stochasticity 1"):
            smc_sample(bad, prior, sde, OPERATOR, y, 0.1)


def test_every_method_is_tested():
    assert set(BOUNDS) | set(EXACT) == set(POSTERIOR_METHODS)
