"""What a network predicts and what it is fed: definitions, inverses, and the habits of diffusers' UNet."""

import math

import pytest
import torch
from tiny_networks import tiny_unet

from diffusers_sde.networks.denoisers import call_network, network_denoiser
from diffusers_sde.networks.parametrizations import (
    PREDICTION_TYPES,
    TIME_CONDITIONINGS,
    EDMPreconditioning,
    TimeConditioning,
    get_parametrization,
)
from diffusers_sde.sdes import EDMSDE, SDES, VESDE, VPSDE, CosineSDE, RectifiedFlowSDE

every_prediction_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
every_sde = pytest.mark.parametrize("sde", [cls() for cls in SDES.values()], ids=SDES.keys())

# What each network is trained to return, given x_0 and eps of x_t = alpha x_0 + sigma eps.
DEFINITIONS = {
    "sample": lambda x0, eps, alpha, sigma: x0,
    "epsilon": lambda x0, eps, alpha, sigma: eps,
    "score": lambda x0, eps, alpha, sigma: -eps / sigma,
    "v_prediction": lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
    "flow_prediction": lambda x0, eps, alpha, sigma: eps - x0,
}


def draw(sde, shape=(4, 2, 3)):
    x0, eps = torch.randn(2, *shape, dtype=torch.float64)
    t = torch.linspace(0.15, 0.85, shape[0], dtype=torch.float64) * sde.t_max
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    a, s = (v.reshape(-1, 1, 1) for v in (alpha, sigma))
    return x0, eps, a * x0 + s * eps, alpha, sigma, a, s


@pytest.mark.parametrize("prediction_type", DEFINITIONS)
@every_sde
def test_definitions(sde, prediction_type):
    x0, eps, x, alpha, sigma, a, s = draw(sde)
    output = DEFINITIONS[prediction_type](x0, eps, a, s)
    parametrization = get_parametrization(prediction_type)
    torch.testing.assert_close(parametrization.to_x0(output, x, alpha, sigma), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parametrization.from_x0(x0, x, alpha, sigma), output, rtol=1e-6, atol=1e-6)


@every_prediction_type
@every_sde
def test_round_trip(sde, prediction_type):
    _, output, x, alpha, sigma, _, _ = draw(sde)
    parametrization = get_parametrization(prediction_type)
    x0_hat = parametrization.to_x0(output, x, alpha, sigma)
    # The trip through x0_hat is as well conditioned as |skip x / (out F)| allows: bad only for a score at alpha/sigma
    # -> 0.
    torch.testing.assert_close(parametrization.from_x0(x0_hat, x, alpha, sigma), output, rtol=1e-7, atol=1e-7)


@every_prediction_type
def test_one_time_or_one_for_each_sample(prediction_type):
    sde, parametrization = VPSDE(), get_parametrization(prediction_type)
    _, output, x, alpha, sigma, _, _ = draw(sde)
    together = parametrization.to_x0(output, x, alpha, sigma)
    for i in range(len(x)):
        torch.testing.assert_close(parametrization.to_x0(output[i], x[i], alpha[i], sigma[i]), together[i])
    half = parametrization.to_x0(output.half(), x.half(), alpha, sigma)
    assert half.dtype == torch.float16


def test_edm_is_karras_table_1():
    sd = 0.7
    sigma = torch.tensor([0.01, 0.5, 3.0, 80.0], dtype=torch.float64)
    edm, ones = EDMPreconditioning(sd), torch.ones_like(sigma)
    c_skip = sd**2 / (sigma**2 + sd**2)
    c_out = sigma * sd / (sigma**2 + sd**2).sqrt()
    c_in = 1 / (sigma**2 + sd**2).sqrt()
    skip, out = edm.coefficients(ones, sigma)
    torch.testing.assert_close(skip, c_skip)
    torch.testing.assert_close(out, c_out)
    torch.testing.assert_close(edm.input_scale(ones, sigma), c_in)


@every_sde
def test_edm_is_the_same_on_any_path(sde):
    """The denoiser at (x, t) is EDM's own at (x/alpha, sigma/alpha); network input and target have unit variance."""
    sd, edm = 0.4, EDMPreconditioning(0.4)
    _, output, x, alpha, sigma, a, _ = draw(sde)
    on_ve = edm.to_x0(output, x / a, torch.ones_like(alpha), sigma / alpha)
    torch.testing.assert_close(edm.to_x0(output, x, alpha, sigma), on_ve)
    ones = torch.ones_like(alpha)
    scale = edm.input_scale(alpha, sigma) * (alpha**2 * sd**2 + sigma**2).sqrt()
    torch.testing.assert_close(scale, ones)
    skip, out = edm.coefficients(alpha, sigma)
    target_variance = (((1 - skip * alpha) * sd) ** 2 + (skip * sigma) ** 2) / out**2
    torch.testing.assert_close(target_variance, ones)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow_prediction", "edm"])
@pytest.mark.parametrize("sde", [CosineSDE(), RectifiedFlowSDE()])
def test_pure_noise_has_a_finite_estimate(sde, prediction_type):
    """Where alpha = 0: all but epsilon and score still determine x0_hat."""
    skip, out = get_parametrization(prediction_type, 0.5).coefficients(sde.alpha(1.0), sde.sigma(1.0))
    assert math.isfinite(float(skip)) and math.isfinite(float(out)) and float(out) != 0


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_noise_and_the_score_in_pure_noise_say_nothing_of_the_data(prediction_type):
    parametrization, sde = get_parametrization(prediction_type, 0.5), RectifiedFlowSDE()
    for times, signal in ((0.5, True), ([0.5, 0.999], True), (1.0, False), ([0.5, 1.0], False)):
        alpha, sigma = sde.alpha(torch.tensor(times)), sde.sigma(torch.tensor(times))
        known = signal or prediction_type not in ("epsilon", "score")
        assert parametrization.determines_data(alpha, sigma) is known


@pytest.mark.parametrize("prediction_type", ["eps", "velocity", "", None])
def test_unknown_prediction_type(prediction_type):
    with pytest.raises(ValueError, match="prediction_type must be one of epsilon, sample, v_prediction"):
        get_parametrization(prediction_type)


def test_sigma_data_must_be_positive():
    with pytest.raises(ValueError, match="sigma_data"):
        get_parametrization("edm", 0.0)


# ---------------------------------------------------------------------- what the network is fed


@pytest.mark.parametrize("name", TIME_CONDITIONINGS)
@every_sde
def test_time_inverts_timestep(sde, name):
    conditioning = TimeConditioning(name, 1000)
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64) * sde.t_max
    fed = conditioning.timestep(sde, t)
    assert (fed.diff() > 0).all()
    torch.testing.assert_close(conditioning.time(sde, fed), t, rtol=1e-9, atol=1e-12)
    assert conditioning.time(sde, fed.reshape(5, 5)).shape == (5, 5)


def test_conditionings_are_what_they_are_named():
    vp, ve, t = VPSDE(), VESDE(), 0.25
    assert float(TimeConditioning("discrete", 1000).timestep(vp, t)) == 249.0  # entry n of a table sits at (n + 1)/N
    assert float(TimeConditioning("continuous", 1000).timestep(vp, t)) == 250.0
    assert float(TimeConditioning("score_sde", 1000).timestep(vp, t)) == 249.75  # 999 t
    assert float(TimeConditioning("continuous", 1000).timestep(EDMSDE(), 20.0)) == 250.0  # relative to t_max
    sigma = 0.01 * 5000**0.25
    assert float(TimeConditioning("sigma").timestep(ve, t)) == pytest.approx(sigma, rel=1e-12)
    assert float(TimeConditioning("log_sigma").timestep(ve, t)) == pytest.approx(math.log(sigma), rel=1e-12)
    assert float(TimeConditioning("edm").timestep(ve, t)) == pytest.approx(math.log(sigma) / 4, rel=1e-12)
    ratio = float(vp.sigma(t) / vp.alpha(t))
    assert float(TimeConditioning("sigma").timestep(vp, t)) == pytest.approx(ratio, rel=1e-12)


def test_a_table_of_2000_is_reached_at_every_index():
    """t (N - 1) cut to an integer misses half the indices of N = 2000; the exact inverse misses none."""
    conditioning, n = TimeConditioning("discrete", 2000), 2000
    t = conditioning.time(VPSDE(), torch.arange(n))
    assert torch.equal(conditioning.timestep(VPSDE(), t).round().long(), torch.arange(n))


@pytest.mark.parametrize(
    "name, n, word", [("timestep", 1000, "time_conditioning"), ("sigma", 1, "num_train_timesteps")]
)
def test_bad_conditioning(name, n, word):
    with pytest.raises(ValueError, match=word):
        TimeConditioning(name, n)


# ---------------------------------------------------------------------- diffusers' UNet


@torch.no_grad()
def test_a_fractional_timestep_reaches_the_network():
    """UNet2DModel cuts a Python float to an integer; a tensor passes."""
    unet, x = tiny_unet(1.0, time_embedding_type="positional"), torch.randn(2, 1, 8, 8)
    assert torch.equal(unet(x, 10.2).sample, unet(x, 10.9).sample)
    at = [call_network(unet, x, torch.tensor(v, dtype=torch.float64)) for v in (10.2, 10.9, 10.0)]
    assert not torch.allclose(at[0], at[1], atol=1e-6)
    torch.testing.assert_close(at[2], unet(x, 10).sample)
    both = call_network(unet, x, torch.tensor([10.2, 10.9]))
    torch.testing.assert_close(both, torch.stack([at[0][0], at[1][1]]))


@torch.no_grad()
def test_the_fourier_unet_wants_sigma_and_returns_a_score():
    """It divides its output by what it is fed: with sigma that is -eps/sigma, the score; dividing again would be
    wrong."""
    unet, x = tiny_unet(1.0, time_embedding_type="fourier"), torch.randn(2, 1, 8, 8)
    undivided = []
    unet.conv_out.register_forward_hook(lambda module, args, output: undivided.append(output))
    sde, t = VESDE(), 0.3
    sigma = float(sde.sigma(t))
    conditioning = TimeConditioning("sigma")
    score = call_network(unet, x, conditioning.timestep(sde, t))
    torch.testing.assert_close(score, undivided[0] / sigma)

    denoise = network_denoiser(unet, sde, get_parametrization("score"), conditioning)
    minus_eps = undivided[0]
    torch.testing.assert_close(denoise(x, t), x + sigma * minus_eps, rtol=1e-4, atol=1e-5)


def test_network_denoiser_scales_the_input_and_undoes_the_parametrisation():
    sde, t, sd = VPSDE(), torch.tensor([0.2, 0.6], dtype=torch.float64), 0.5
    seen = []

    def network(x, timestep, offset=0.0):
        seen.append((x, timestep))
        return torch.tanh(x) + offset

    x = torch.randn(2, 3, dtype=torch.float64)
    edm = get_parametrization("edm", sd)
    got = network_denoiser(network, sde, edm, TimeConditioning("edm"), offset=0.1)(x, t)
    ((fed, timestep),) = seen
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    variance = alpha**2 * sd**2 + sigma**2
    torch.testing.assert_close(fed, x / variance.sqrt())
    torch.testing.assert_close(timestep, torch.log(sigma / alpha)[:, 0] / 4)
    expected = sd**2 * alpha / variance * x + sigma * sd / variance.sqrt() * (torch.tanh(fed) + 0.1)
    torch.testing.assert_close(got, expected)


def test_a_network_may_be_fed_the_time_itself():
    edm = EDMSDE()
    conditioning = TimeConditioning("time", 1)
    assert float(conditioning.timestep(edm, 20.0)) == 20.0 == float(conditioning.time(edm, 20.0))
    assert bool(conditioning.lies_on(edm, edm.t_max)) and not bool(conditioning.lies_on(edm, 1.01 * edm.t_max))
