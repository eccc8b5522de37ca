"""Denoising score matching against its definition."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from diffusers_sde.networks.losses import (
    WEIGHTINGS,
    denoising_loss,
    discrete_times,
    importance_ratio,
    output_weight,
    sample_times,
    times_from_uniform,
)
from diffusers_sde.networks.parametrizations import PREDICTION_TYPES, get_parametrization
from diffusers_sde.sdes import SDES, VESDE, VPSDE, DiscreteVPSDE, RectifiedFlowSDE, SubVPSDE, ddpm_betas, smld_sigmas

TIMES = torch.tensor([0.02, 0.1, 0.5, 0.9], dtype=torch.float64)
all_sdes = pytest.mark.parametrize("name", SDES)
all_predictions = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
all_weightings = pytest.mark.parametrize("weighting", WEIGHTINGS)


def _draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(TIMES), 2, 3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def _column(value):
    return value.reshape(-1, 1, 1)


@all_weightings
@all_predictions
@all_sdes
def test_the_exact_denoiser_of_a_single_point_has_no_loss(name, prediction_type, weighting):
    sde, parametrization = SDES[name](), get_parametrization(prediction_type)
    _, eps, _ = _draw()
    point = torch.full_like(eps, 0.7)

    def network(scaled, t):
        # E[x0 | x_t] = point, whatever x_t; the output that says so is computed from what the network sees.
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        x = scaled / _column(parametrization.input_scale(alpha, sigma))
        return parametrization.from_x0(point, x, alpha, sigma)

    loss = denoising_loss(sde, parametrization, network, point, TIMES, eps, weighting)
    assert loss.shape == TIMES.shape
    assert loss.max() < 1e-16


@pytest.mark.parametrize("weighting", ["paper", "likelihood"])
@all_predictions
@all_sdes
def test_weightings_are_those_of_the_score_error(name, prediction_type, weighting):
    """lambda(t) |score_hat - grad log p(x_t | x0)|^2, computed literally."""
    sde, parametrization = SDES[name](), get_parametrization(prediction_type)
    x0, eps, output = _draw()
    loss = denoising_loss(sde, parametrization, lambda x, t: output, x0, TIMES, eps, weighting)

    alpha, sigma = sde.alpha(TIMES), sde.sigma(TIMES)
    x_t = _column(alpha) * x0 + _column(sigma) * eps
    x0_hat = parametrization.to_x0(output, x_t, alpha, sigma)
    score_hat = (_column(alpha) * x0_hat - x_t) / _column(sigma) ** 2
    score = -(x_t - _column(alpha) * x0) / _column(sigma) ** 2
    # g^2 from finite differences of the path: alpha^2 d(sigma^2/alpha^2)/dt.
    h = 1e-6
    ratio = [(sde.sigma(TIMES + d) / sde.alpha(TIMES + d)) ** 2 for d in (h, -h)]
    weight = sigma**2 if weighting == "paper" else alpha**2 * (ratio[0] - ratio[1]) / (2 * h)
    expected = weight * (score_hat - score).square().mean((1, 2))
    # A table's g^2 jumps at its entries; TIMES are entries of the default one, so only its size can be compared.
    rtol = 0.05 if (name, weighting) == ("discrete_vp", "likelihood") else 1e-6
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=0)


@all_sdes
def test_output_weighting_is_the_plain_error_of_the_named_target(name):
    sde = SDES[name]()
    x0, eps, output = _draw()
    a, s = _column(sde.alpha(TIMES)), _column(sde.sigma(TIMES))
    data_std = 0.5
    variance = (a * data_std) ** 2 + s**2
    x_t = a * x0 + s * eps
    targets = {
        "epsilon": eps,
        "sample": x0,
        "score": -eps / s,
        "v_prediction": a * eps - s * x0,
        "flow_prediction": eps - x0,
        # Karras et al. 2022, eq. 8 in the variables x/alpha and sigma/alpha.
        "edm": (x0 - data_std**2 / ((s / a) ** 2 + data_std**2) * x_t / a)
        / ((s / a) * data_std / torch.sqrt((s / a) ** 2 + data_std**2)),
    }
    assert set(targets) == set(PREDICTION_TYPES)
    for prediction_type, target in targets.items():
        parametrization = get_parametrization(prediction_type, data_std)
        loss = denoising_loss(sde, parametrization, lambda x, t: output, x0, TIMES, eps, "output")
        torch.testing.assert_close(loss, (output - target).square().mean((1, 2)), rtol=1e-9, atol=0)
    seen = {}
    denoising_loss(sde, get_parametrization("edm", data_std), lambda x, t: seen.setdefault("x", x) * 0, x0, TIMES, eps)
    torch.testing.assert_close(seen["x"], x_t / variance.sqrt())


@all_weightings
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "edm"])
@pytest.mark.parametrize("name", ["ve", "vp", "sub_vp", "rectified_flow"])
def test_the_posterior_mean_of_gaussian_data_is_the_minimum(name, prediction_type, weighting):
    """For data N(0, s^2) E[x0 | x_t] is linear in x_t; the expectation of the loss is exact by Gauss quadrature."""
    sde, parametrization = SDES[name](), get_parametrization(prediction_type)
    data_std, t = 0.8, torch.tensor(0.4, dtype=torch.float64)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(8))
    x0, eps = (v.reshape(-1, 1) for v in torch.meshgrid(data_std * nodes, nodes, indexing="ij"))
    probability = (weights[:, None] * weights[None, :]).flatten() / (2 * math.pi)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    best = float(alpha * data_std**2 / (alpha**2 * data_std**2 + sigma**2))

    def expected_loss(slope):
        def network(scaled, times):
            x = scaled / parametrization.input_scale(alpha, sigma)
            return parametrization.from_x0(slope * x, x, alpha, sigma)

        loss = denoising_loss(sde, parametrization, network, x0, t.expand(len(x0)), eps, weighting)
        return float((probability * loss).sum())

    step = 1e-3 * best
    below, at, above = (expected_loss(best + d) for d in (-step, 0.0, step))
    assert at < below and at < above
    assert abs(above - below) < 1e-6 * (above + below - 2 * at)  # the vertex of the parabola is at best


def test_epsilon_prediction_with_the_papers_weighting_is_the_ddpm_loss():
    x0, eps, output = _draw()
    loss = denoising_loss(VPSDE(), get_parametrization("epsilon"), lambda x, t: output, x0, TIMES, eps)
    torch.testing.assert_close(loss, (output - eps).square().mean((1, 2)), rtol=1e-12, atol=0)


@all_sdes
def test_the_target_is_exact_in_float32_at_the_smallest_time(name):
    """x_t in float32 has lost the noise at t = 1e-5; the target must not be computed from it."""
    sde = SDES[name]()
    x0, eps, _ = (v.float() for v in _draw())
    t = torch.full((len(x0),), 1e-5, dtype=torch.float64)
    loss = denoising_loss(sde, get_parametrization("epsilon"), lambda x, t: eps, x0, t, eps)
    assert loss.max() < 1e-11


def test_half_precision_outputs_are_compared_in_float32():
    x0, eps, output = (v.float() for v in _draw())
    loss = denoising_loss(
        VPSDE(), get_parametrization("epsilon"), lambda x, t: output.to(torch.bfloat16), x0, TIMES, eps
    )
    assert loss.dtype == torch.float32


def test_unknown_weighting():
    with pytest.raises(ValueError, match="weighting must be one of paper, likelihood, output, min_snr, got 'snr'"):
        output_weight(VPSDE(), get_parametrization("epsilon"), TIMES, "snr")


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("sde_type", [VESDE, VPSDE, SubVPSDE, RectifiedFlowSDE])
def test_training_times_are_uniform_between_eps_and_one(sde_type, eps):
    t = sample_times(sde_type(t_min=eps), 20000, torch.Generator().manual_seed(1))
    assert t.dtype == torch.float64
    assert eps <= t.min() and t.max() <= 1.0
    # Kolmogorov-Smirnov at a false-alarm rate of 1e-6: 2 exp(-2 n d^2).
    u = ((t - eps) / (1 - eps)).sort().values
    distance = (u - (torch.arange(20000) + 0.5) / 20000).abs().max()
    assert distance < math.sqrt(math.log(2e6) / 2 / 20000)


def test_ends_of_the_time_interval():
    u = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(times_from_uniform(VPSDE(t_min=1e-3), u), torch.tensor([1.0, 1e-3], dtype=torch.float64))


def test_discrete_times_of_vp_are_the_ddpm_table():
    betas = ddpm_betas()
    t = discrete_times(DiscreteVPSDE.from_betas(betas), 1000)
    alpha_bar = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(DiscreteVPSDE.from_betas(betas).alpha(t) ** 2, alpha_bar, rtol=1e-12, atol=0)


def test_discrete_times_of_ve_are_smlds_scales():
    scales = torch.tensor([0.01 * 5000 ** (i / 9) for i in range(10)], dtype=torch.float64)
    torch.testing.assert_close(VESDE(0.01, 50.0).sigma(discrete_times(VESDE(0.01, 50.0), 10)), scales)
    torch.testing.assert_close(smld_sigmas(10), scales)


@pytest.mark.parametrize("sde_type", [VESDE, VPSDE])
def test_discrete_times_are_drawn_evenly(sde_type):
    sde = sde_type()
    t = sample_times(sde, 50000, torch.Generator().manual_seed(2), discrete_steps=10)
    values, counts = t.unique(return_counts=True)
    torch.testing.assert_close(values, discrete_times(sde, 10))
    assert (counts - 5000).abs().max() < 6 * math.sqrt(5000 * 0.9)
    ends = times_from_uniform(sde, torch.tensor([0.0, 0.0999, 0.1, 1.0], dtype=torch.float64), 10)
    torch.testing.assert_close(ends, values[[0, 0, 1, 9]])


GRID = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000


@pytest.mark.parametrize("sde_type", [VESDE, VPSDE, SubVPSDE])
def test_importance_sampled_times_leave_the_loss_unbiased_and_take_its_variance(sde_type):
    """For a network that is wrong by one everywhere; the means over u are integrals over t."""
    sde, parametrization = sde_type(t_min=1e-3), get_parametrization("epsilon")
    eps = torch.zeros(len(GRID), 1, dtype=torch.float64)

    def loss(t):
        return denoising_loss(sde, parametrization, lambda x, t: eps + 1.0, eps, t, eps, "likelihood")

    t = times_from_uniform(sde, GRID, sampling="importance")
    sampled = loss(t) * importance_ratio(sde, t)
    # The integral of g^2/sigma^2 is the difference of the log-SNR: the loss that every sample has.
    exact = float(sde.log_snr(1e-3) - sde.log_snr(1.0)) / (1.0 - 1e-3)
    torch.testing.assert_close(sampled, torch.full_like(sampled, exact), rtol=1e-6, atol=0)
    s = torch.logspace(-3, 0, 20001, dtype=torch.float64)
    uniform = torch.trapezoid(loss((s[1:] * s[:-1]).sqrt()), (s[1:] * s[:-1]).sqrt()) / (1.0 - 1e-3)
    assert float(uniform) == pytest.approx(exact, rel=2e-3)
    # Another function of time, whose integral importance sampling was not made for.
    other = ((1.0 + 3.0 * t**2) * importance_ratio(sde, t)).mean()
    assert float(other) == pytest.approx((2.0 - 1e-3 - 1e-9) / (1.0 - 1e-3), rel=1e-4)


@pytest.mark.parametrize("sde_type", [VESDE, VPSDE, SubVPSDE, RectifiedFlowSDE])
def test_log_normal_times(sde_type):
    sde, normal = sde_type(), NormalDist(-1.0, 0.7)
    t = times_from_uniform(sde, GRID, sampling="log_normal", log_normal=(-1.0, 0.7))
    log_sigma = -0.5 * sde.log_snr(t)
    below, above = (normal.cdf(-0.5 * float(sde.log_snr(end))) for end in (sde.t_min, sde.t_max))
    # The cumulative distribution of what is drawn, cut to the times of the SDE, runs through 1 - u.
    cdf = torch.tensor([normal.cdf(v) for v in log_sigma.tolist()], dtype=torch.float64)
    torch.testing.assert_close((cdf - below) / (above - below), 1.0 - GRID, rtol=0, atol=1e-9)
    assert (t[1:] <= t[:-1]).all()


def logits(t):
    return torch.log(t / (1.0 - t))


@pytest.mark.parametrize("sde_type", [VPSDE, RectifiedFlowSDE])
def test_logit_normal_times(sde_type):
    sde, normal = sde_type(), NormalDist(0.3, 0.8)
    t = times_from_uniform(sde, GRID, sampling="logit_normal", logit_normal=(0.3, 0.8))
    # The end at t = 1 cuts nothing off.
    below = normal.cdf(float(logits(torch.tensor(sde.t_min, dtype=torch.float64))))
    cdf = torch.tensor([normal.cdf(v) for v in logits(t).tolist()], dtype=torch.float64)
    torch.testing.assert_close((cdf - below) / (1.0 - below), 1.0 - GRID, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampling", ["uniform", "log_normal", "logit_normal"])
def test_shifted_times_have_so_many_times_the_noise_on_the_straight_path(sampling):
    sde = RectifiedFlowSDE()
    plain, shifted = (times_from_uniform(sde, GRID, sampling=sampling, shift=shift) for shift in (1.0, 3.0))
    ratios = (sde.sigma(t) / sde.alpha(t) for t in (shifted, plain))
    torch.testing.assert_close(next(ratios), 3.0 * next(ratios), rtol=1e-9, atol=0)
    back = times_from_uniform(sde, GRID, sampling=sampling, shift=1 / 3)
    assert back.min() >= sde.t_min and float((back < plain).double().mean()) > 0.99
    end = times_from_uniform(sde, torch.zeros(1, dtype=torch.float64), shift=3.0)
    assert end.tolist() == [1.0]  # the data are not reached, the noise is


def test_time_samplings_that_cannot_be():
    u = torch.tensor([0.5], dtype=torch.float64)
    with pytest.raises(
        ValueError, match="sampling must be one of uniform, importance, log_normal, logit_normal, got 'snr'"
    ):
        times_from_uniform(VPSDE(), u, sampling="snr")
    with pytest.raises(ValueError, match="'log_normal' needs continuous time"):
        times_from_uniform(VPSDE(), u, 1000, "log_normal")
    for arguments in ({"discrete_steps": 1000}, {"sampling": "importance"}):
        with pytest.raises(ValueError, match="shift must be 1 with discrete_steps"):
            times_from_uniform(VPSDE(), u, **arguments, shift=2.0)
    with pytest.raises(ValueError, match="finite log-SNR at both ends.*RectifiedFlowSDE"):
        times_from_uniform(RectifiedFlowSDE(), u, sampling="importance")


@all_predictions
@all_sdes
def test_min_snr_weights_the_error_of_x0(name, prediction_type):
    sde, parametrization, gamma = SDES[name](), get_parametrization(prediction_type), 3.0
    x0, eps, output = _draw()
    loss = denoising_loss(sde, parametrization, lambda x, t: output, x0, TIMES, eps, "min_snr", gamma)
    alpha, sigma = sde.alpha(TIMES), sde.sigma(TIMES)
    x0_hat = parametrization.to_x0(output, _column(alpha) * x0 + _column(sigma) * eps, alpha, sigma)
    weight = (alpha / sigma).square().clamp(max=gamma)
    torch.testing.assert_close(loss, weight * (x0_hat - x0).square().mean((1, 2)), rtol=1e-6, atol=0)


def test_min_snr_of_its_paper():
    """Hang et al. 2023: min(SNR, 5)/SNR for noise prediction and min(SNR, 5)/(SNR + 1) for v, in VP."""
    sde = VPSDE()
    snr = sde.log_snr(TIMES).exp()
    for prediction_type, divisor in (("epsilon", snr), ("v_prediction", snr + 1.0), ("sample", torch.ones_like(snr))):
        weight = output_weight(sde, get_parametrization(prediction_type), TIMES, "min_snr")
        torch.testing.assert_close(weight, snr.clamp(max=5.0) / divisor)
