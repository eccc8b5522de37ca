"""Samples at another temperature, against Gaussians and mixtures, for which the law is known.

The data N(m, c^2) at temperature T are N(m, T c^2). Schedulers with ``prediction_type="sample"`` have rows that are
linear in x_t and E[x_0 | x_t], so that their law is pushed through them without Monte Carlo.
"""

import math

import pytest
import torch
from analytic import GaussianMixture, PointwiseGaussian, push_gaussian
from diffusers import DDPMScheduler
from exact_networks import ExactUNet, quiet
from tiny_networks import tiny_unet

from diffusers_sde import (
    ClassConditionalSDEPipeline,
    FlowSDEScheduler,
    RestorationSDEPipeline,
    SDEPipeline,
    SubVPSDEScheduler,
    VESDEScheduler,
    VPSDEScheduler,
    make_plan,
    sample,
)
from diffusers_sde.guidance import Downsampling, rescale_temperature
from diffusers_sde.pipelines import ProbabilityFlow
from diffusers_sde.sampling.time_grids import get_time_grid
from diffusers_sde.sdes import SDES

MEAN, STD = 0.3, 0.6
CLASSES = {"vp": VPSDEScheduler, "ve": VESDEScheduler, "sub_vp": SubVPSDEScheduler, "flow": FlowSDEScheduler}
SAMPLERS = {
    "default": {},
    "ode": {"probability_flow": True},
    "heun": {"probability_flow": True, "predictor": "heun"},
    "ancestral": {"predictor": "ancestral", "time_grid": "log_snr"},
    "corrected": {"corrector": "ornstein_uhlenbeck", "snr": 0.1},
    "clipped": {"clip_sample": True, "clip_sample_range": 1e5},  # an executor that forms x0_hat and never bounds it
}


def law(scheduler, levels):
    """Mean and variance of the samples for exact networks of N(MEAN, STD^2), from the scheduler's own start."""
    scheduler.set_timesteps(levels)
    sde, start = scheduler.sde, scheduler.rows[0].t
    # The law of x_t at the start, not of the prior: what VE's prior lacks is no matter of temperature.
    t = scheduler.config.temperature
    variance = float(sde.alpha(start)) ** 2 * t * STD**2 + float(sde.sigma(start)) ** 2
    return push_gaussian(scheduler._plan, sde, MEAN, STD, float(sde.alpha(start)) * MEAN, variance)


@pytest.mark.parametrize("temperature", [0.5, 1.8])
@pytest.mark.parametrize("sampler", ["default", "ode", "heun", "ancestral", "corrected"])
@pytest.mark.parametrize("name", CLASSES)
def test_the_variance_of_gaussian_data_is_scaled_by_the_temperature(name, sampler, temperature):
    options = {"prediction_type": "sample", "temperature_std": STD, "sampling_eps": 1e-4, **SAMPLERS[sampler]}
    mean, variance = law(CLASSES[name](temperature=temperature, **options), 800)
    # What is left is the error of the rules, which is of first order in the length of the steps for ``ancestral`` and
    # the corrector, and the end at sampling_eps.
    bound = 0.03 if sampler in ("ancestral", "corrected") else 2e-3
    assert abs(variance / (temperature * STD**2) - 1.0) < bound
    assert abs(mean - MEAN) < 1e-3


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow_prediction", "score", "edm"])
@pytest.mark.parametrize("sampler", [*SAMPLERS, "langevin"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_sampler_at_a_temperature_is_that_of_the_cooled_data(name, sampler, prediction):
    """Row by row: the network of N(m, c^2) at T gives what the network of N(m, T c^2) gives at 1, noise included."""
    temperature = 0.4
    options = {"prediction_type": prediction, **SAMPLERS.get(sampler, {"corrector": "langevin", "snr": 0.1})}
    if name == "flow" and prediction in ("epsilon", "score"):
        pytest.skip("the path starts without signal, which these do not determine")

    def run(std, **more):
        scheduler = CLASSES[name](**options, **more)
        scheduler.set_timesteps(6)
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x, generator, estimates = x * scheduler.init_noise_sigma, torch.Generator().manual_seed(1), []
        for row, t in zip(scheduler.rows, scheduler.timesteps, strict=True):
            alpha, sigma = scheduler.sde.alpha(row.t), scheduler.sde.sigma(row.t)
            x0_hat = PointwiseGaussian(MEAN, std).denoise(x, alpha, sigma)
            output = scheduler.parametrization.from_x0(x0_hat, x, alpha, sigma)
            x, estimate = scheduler.step(output, t, x, generator=generator, return_dict=False)
            estimates.append(estimate)
        return torch.stack([x, *estimates])

    cooled = run(STD, temperature=temperature, temperature_std=STD)
    torch.testing.assert_close(cooled, run(math.sqrt(temperature) * STD), rtol=1e-6, atol=1e-6)


def test_the_denoiser_is_that_of_the_cooled_data_also_where_there_is_no_signal():
    for name, cls in SDES.items():
        if name == "discrete_vp":
            continue
        sde = cls()
        t = torch.tensor([1e-4, 0.01, 0.3, 0.7, 1.0], dtype=torch.float64) * sde.t_max
        x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * sde.prior_std
        for temperature in (0.1, 3.0):
            got = rescale_temperature(PointwiseGaussian(MEAN, STD).denoiser(sde), sde, temperature, STD)(x, t)
            want = PointwiseGaussian(MEAN, math.sqrt(temperature) * STD).denoiser(sde)(x, t)
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


def test_temperature_one_is_the_same_sampler_and_the_same_denoiser():
    scheduler, plain = VPSDEScheduler(temperature=1.0, temperature_std=7.0), VPSDEScheduler()
    scheduler.set_timesteps(9)
    plain.set_timesteps(9)
    assert scheduler.rows == plain.rows

    def denoiser(x, t):
        return x

    assert scheduler.tempered(denoiser) is denoiser


def test_data_of_another_spread_follow_the_formula():
    """The flow gives Gaussian data of variance v the variance v^b (T c^2)^(1 - b), b = (v - c^2) / (v - T c^2)."""
    sde, temperature, c = SDES["rectified_flow"](), 0.7, 0.5
    for std in (0.1, 0.3, 2.0):
        options = {"prediction_type": "sample", "temperature": temperature, "temperature_std": c, "sampling_eps": 1e-5}
        scheduler = FlowSDEScheduler(probability_flow=True, time_grid="log_snr", **options)
        scheduler.set_timesteps(1500)
        _, variance = push_gaussian(scheduler._plan, sde, 0.0, std, 0.0, 1.0)
        v, cooled = std**2, temperature * c**2
        b = (v - c**2) / (v - cooled)
        assert variance == pytest.approx(v**b * cooled ** (1.0 - b), rel=2e-3)


@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
def test_components_far_apart_keep_their_weights_and_are_scaled(stochasticity):
    """p^(1/T) would give the larger component 0.8^2 / (0.8^2 + 0.2^2) = 0.94 of the samples; this keeps 0.8.

    20000 samples: five standard errors are 0.0142 for the weight, 4 % for the variance of the larger component.
    """
    sde, std, temperature, n = SDES["ve"](), 0.1, 0.5, 20000
    data = GaussianMixture([0.8, 0.2], [[-1.0], [1.0]], [[std**2], [std**2]])
    denoiser = rescale_temperature(data.denoiser(sde), sde, temperature, std)
    times = get_time_grid("log_snr", sde, 150, sde.t_max, 1e-5)
    plan = make_plan(sde, times, "singlestep" if stochasticity else "exponential", stochasticity=stochasticity)
    start = torch.randn(n, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * sde.prior_std
    x = sample(plan, denoiser, start, torch.Generator().manual_seed(6))
    larger = x[x < 0.0]
    assert len(larger) / n == pytest.approx(0.8, abs=0.0142 + 0.01)
    assert float(larger.mean()) == pytest.approx(-1.0, abs=0.01)
    assert float(larger.var()) == pytest.approx(temperature * std**2, rel=0.05)


# ---------------------------------------------------------------------- pipelines


def pipeline(cls=SDEPipeline, **options):
    unet = ExactUNet()
    unet.data = GaussianMixture.gaussian([MEAN] * 4, [STD**2] * 4)
    pipe = quiet(cls(unet, VPSDEScheduler(prediction_type="v_prediction", sampling_eps=1e-5, **options)))
    unet.scheduler = pipe.scheduler
    return pipe


def test_the_adaptive_flow_samples_at_the_temperature_and_codes_stay_at_one():
    pipe = pipeline(temperature=0.5, temperature_std=STD)
    z = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    alpha, sigma = float(pipe.scheduler.sde.alpha(1.0)), float(pipe.scheduler.sde.sigma(1.0))

    def transported(variance):  # the flow of a Gaussian is affine
        return MEAN + math.sqrt(variance) * (z - alpha * MEAN) / math.sqrt(alpha**2 * variance + sigma**2)

    x = pipe(latents=z, method="ode", rtol=1e-5, atol=1e-5, output_type="latent").images
    torch.testing.assert_close(x, transported(0.5 * STD**2), rtol=1e-3, atol=1e-3)
    decoded = pipe.decode(z, output_type="latent")
    torch.testing.assert_close(decoded, transported(STD**2), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pipe.encode(decoded), z, rtol=1e-3, atol=1e-3)
    exact = torch.distributions.Normal(MEAN, STD).log_prob(decoded).flatten(1).sum(1)
    got = pipe.log_prob(decoded, trace="exact", rtol=1e-5, atol=1e-5).value
    torch.testing.assert_close(got.float(), exact, rtol=1e-3, atol=3e-3)


def test_the_adaptive_sde_samples_at_the_temperature():
    """4000 numbers: five standard errors of the variance are 11 %, and temperature 1 would be 100 % off."""
    pipe = pipeline(temperature=0.5, temperature_std=STD)
    generator = torch.Generator().manual_seed(0)
    x = pipe(1000, method="sde", rtol=0.01, atol=0.005, generator=generator, output_type="latent").images
    assert float(x.var()) == pytest.approx(0.5 * STD**2, rel=0.11)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.035)


def test_the_spread_of_the_data_is_sigma_data_unless_it_is_given():
    cooler = [
        VPSDEScheduler(temperature=0.5, sigma_data=0.8),
        VPSDEScheduler(temperature=0.5, temperature_std=0.8),
        VPSDEScheduler.from_config(VPSDEScheduler(temperature=0.5, temperature_std=0.8).config),
    ]
    for scheduler in cooler:
        scheduler.set_timesteps(5)
    assert cooler[0].rows == cooler[1].rows == cooler[2].rows
    other = VPSDEScheduler(temperature=0.5)
    other.set_timesteps(5)
    assert other.rows != cooler[0].rows


def test_bad_values_and_what_cannot_be_cooled_are_refused():
    for value in (0.0, -1.0, math.inf, "cold", 1e4):
        with pytest.raises(ValueError, match="temperature must be"):
            VPSDEScheduler(temperature=value)
        with pytest.raises(ValueError, match="temperature must be"):
            rescale_temperature(lambda x, t: x, SDES["vp"](), value, 0.5)
    with pytest.raises(ValueError, match="temperature_std must be"):
        VPSDEScheduler(temperature_std=0.0)
    with pytest.raises(ValueError, match="data_std must be"):
        rescale_temperature(lambda x, t: x, SDES["vp"](), 0.5, 0.0)
    with pytest.raises(ValueError, match=r"prediction_type of Epsilon"):
        FlowSDEScheduler(prediction_type="epsilon", temperature=0.5).set_timesteps(5)
    pipe = pipeline(RestorationSDEPipeline, temperature=0.5)
    with pytest.raises(ValueError, match="temperature 0.5"):
        pipe(torch.zeros(1, 1, 1, 1), Downsampling(2, (1, 2, 2)), 0.1, posterior="smc")
    assert ProbabilityFlow(pipe).scheduler.config.temperature == 0.5


@pytest.mark.parametrize("method", ["scheduler", "sde"])
def test_the_argument_of_a_call_is_that_of_the_scheduler(method):
    by_class = ClassConditionalSDEPipeline(tiny_unet(1.0, num_class_embeds=3), VPSDEScheduler(temperature_std=STD))
    for pipe, given in (
        (SDEPipeline(tiny_unet(1.0), FlowSDEScheduler(temperature_std=STD)), {"batch_size": 2}),
        (by_class, {"class_labels": [0, 1]}),
    ):
        quiet(pipe)
        given |= {"num_inference_steps": 4, "output_type": "latent", "return_dict": False, "method": method}
        given |= {"rtol": 0.3, "atol": 0.3} if method == "sde" else {}
        own = pipe.scheduler

        def draw(**more):
            return pipe(**given, **more, generator=torch.Generator().manual_seed(0))[0]  # noqa: B023

        as_it_is, cooled = draw(), draw(temperature=0.4)
        assert pipe.scheduler is own and not torch.allclose(as_it_is, cooled)
        assert torch.equal(draw(), as_it_is) and torch.equal(draw(temperature=1.0), as_it_is)
        pipe.scheduler = type(own).from_config(own.config, temperature=0.4)
        assert torch.equal(draw(), cooled)
        generator = torch.Generator().manual_seed(0)
        with pytest.raises(ValueError, match="temperature must be"):
            pipe(**given, temperature=-1.0, generator=generator)
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())
        assert pipe.scheduler.config.temperature == 0.4
    stock = quiet(SDEPipeline(tiny_unet(), DDPMScheduler()))
    with pytest.raises(ValueError, match="scheduler must be one of this package's, got DDPMScheduler"):
        stock(temperature=0.5, num_inference_steps=2)
