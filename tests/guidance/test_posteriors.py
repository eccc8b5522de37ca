"""Posterior methods against closed forms: with exact scores and a linear measurement the true posterior is known.

E[x_0 | x_t, y] is the denoiser of the posterior, which for Gaussian and mixture data is a Gaussian or a mixture itself,
so exact guidance is compared with it point by point, at round-off. The law of whole runs is pushed through the plan
without Monte Carlo where the denoiser is affine. What is approximate by design is measured on the mixture.
"""

import dataclasses

import pytest
import torch
from analytic import GaussianMixture
from labelled import SDES
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

from diffusers_sde import sample
from diffusers_sde.guidance.gradients import denoise_with_vjp
from diffusers_sde.guidance.methods import GuidingMethod, PosteriorProblem
from diffusers_sde.guidance.operators import Mask
from diffusers_sde.guidance.posteriors import POSTERIOR_METHODS, posterior_denoiser, posterior_method
from diffusers_sde.sampling.exponential import Exponential

EXACT = {"gaussian": {"covariance": COVARIANCE}, "mmps": {"iterations": 4, "rtol": 1e-12}}
TRUTH, _ = posterior(GAUSSIAN, A, Y, NOISE_STD)
MIXTURE_TRUTH, _ = posterior(MIXTURE, A, Y, NOISE_STD)


def guided(sde, method, data=GAUSSIAN, n=1, **options):
    return posterior_denoiser(data.denoiser(sde), sde, OPERATOR, Y.expand(n, 2), NOISE_STD, method, **options)


def noisy(sde, t, n=7, data=GAUSSIAN):
    return data.sample_marginal(sde, t, n, torch.Generator().manual_seed(4))


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


# ---------------------------------------------------------------------- runs


class SomeSamples:
    """A run that calls the guided denoiser once, for some samples of the batch, as adaptive steps do."""

    def __init__(self, x, t, index):
        self.x, self.t, self.index = x, t, index

    def guided(self, denoiser_of):
        return denoiser_of(self.index)(self.x[self.index], self.t)


@pytest.mark.parametrize("method", ["dps", "pigdm", "mmps"])
def test_some_samples_of_a_batch_are_guided_by_their_own_measurements(method):
    sde, index = SDES["vp"], torch.tensor([3, 0, 3])
    masks = Mask(torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]]), (4,))
    y, x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, prior = torch.tensor(0.3, dtype=torch.float64), MIXTURE.denoiser(sde)
    whole = posterior_denoiser(prior, sde, masks, y, NOISE_STD, method)(x, t)
    problem = PosteriorProblem(prior, sde, masks, y, NOISE_STD)
    part = posterior_method(method).draw(problem, SomeSamples(x, t, index))
    torch.testing.assert_close(part, whole[index])


# ---------------------------------------------------------------------- options and errors


def test_errors():
    sde = SDES["vp"]
    prior = GAUSSIAN.denoiser(sde)
    y = Y.expand(1, 2)
    for options, message in (
        ({"method": "ddrm"}, "method must be one of dps, psld, pigdm, mmps, gaussian, got 'ddrm'"),
        ({"method": "smc"}, "method must be one of dps, psld, pigdm, mmps, gaussian, got 'smc'"),
        ({"noise_std": -1.0}, "noise_std"),
        ({"method": "pigdm", "data_std": 0.0}, "data_std"),
        ({"method": "mmps", "iterations": 0}, "iterations"),
        ({"method": "mmps", "iteration": 2}, r"got 'iteration' \(did you mean 'iterations'\?\)"),
        ({"method": "dps", "data_std": 2.0}, "options of 'dps' may hold scale, chunk_size, got 'data_std'"),
        ({"method": "dps", "scale": -1.0}, "scale"),
        ({"method": "gaussian", "covariance": torch.eye(3)}, "covariance"),
        ({"method": "gaussian", "covariance": torch.zeros(3, 2)}, "covariance"),
        ({"method": "gaussian", "covariance": -1.0}, "covariance"),
    ):
        with pytest.raises(ValueError, match=message):
            posterior_denoiser(prior, sde, OPERATOR, y, **options)
    with pytest.raises(ValueError, match="chunk_size"):
        guided(sde, "pigdm", chunk_size=0)
    with pytest.raises(ValueError, match="operator must be the same for all samples"):
        masks = Mask(torch.eye(4), (4,))
        posterior_denoiser(prior, sde, masks, torch.zeros(4, 4), method="gaussian")


@pytest.mark.parametrize("name", POSTERIOR_METHODS)
def test_options_are_checked_frozen_and_follow_the_data(name):
    cls = POSTERIOR_METHODS[name]
    method = posterior_method(name, {}, data_std=0.3)
    spread = {"pigdm": ("data_std", 0.3), "smc": ("data_std", 0.3), "gaussian": ("covariance", 0.09)}
    for key, value in [spread[name]] if name in spread else []:
        assert getattr(method, key) == pytest.approx(value) and getattr(cls(), key) == 1.0
        assert getattr(posterior_method(name, {key: 0.7}, data_std=0.3), key) == 0.7
    for field in dataclasses.fields(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, 1)
        for wrong in ("a", float("nan"), -1):
            with pytest.raises(ValueError, match=field.name):
                cls(**{field.name: wrong})


def test_every_method_is_tested():
    guiding = {name for name, cls in POSTERIOR_METHODS.items() if issubclass(cls, GuidingMethod)}
    assert set(BOUNDS) | set(EXACT) | {"psld"} == guiding  # tests/guidance/test_decoding.py
    assert set(POSTERIOR_METHODS) - guiding == {"smc"}  # tests/guidance/test_particles.py
