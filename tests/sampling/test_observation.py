"""Data observed in noise: the posterior of a Gaussian and of a mixture is known, and so is the law of the samples."""

import math

import pytest
import torch
from analytic import GaussianMixture, push_gaussian
from exact_networks import ExactUNet, quiet
from PIL import Image

from diffusers_sde import (
    FlowSDEScheduler,
    ProbabilityFlow,
    SDEPipeline,
    SubVPSDEScheduler,
    VESDEScheduler,
    VPSDEScheduler,
)
from diffusers_sde.sampling import posterior_mean, posterior_samples
from diffusers_sde.sampling.observation import HIGH_ORDER, time_of_noise
from diffusers_sde.sampling.planning import make_plan
from diffusers_sde.sdes import SDES, VPSDE

PATHS = {name: cls() for name, cls in SDES.items() if name != "discrete_vp"}
COVARIANCE = torch.tensor([[0.5, 0.2, 0.0], [0.2, 0.3, -0.1], [0.0, -0.1, 0.2]], dtype=torch.float64)
GAUSSIAN = GaussianMixture.gaussian([0.3, -0.2, 0.5], COVARIANCE)
MIXTURE = GaussianMixture([0.7, 0.3], [[-0.5, 0.2], [0.6, -0.1]], [[0.04, 0.01], [0.02, 0.05]])


def posterior(data, y, noise_std):
    """The law of x_0 given y = x_0 + noise_std n, by the formulas for Gaussians, as another mixture."""
    weights, means, covariances = [], [], []
    for weight, mean, covariance in zip(data.weights, data.means, data.covariances, strict=True):
        marginal = covariance + noise_std**2 * torch.eye(len(y), dtype=torch.float64)
        gain = torch.linalg.solve(marginal, covariance).T
        density = torch.distributions.MultivariateNormal(mean, marginal).log_prob(y)
        weights.append(weight * density.exp())
        means.append(mean + gain @ (y - mean))
        covariances.append(covariance - gain @ covariance)
    return GaussianMixture(torch.stack(weights), torch.stack(means), torch.stack(covariances))


def moments(data):
    """Mean and covariance of a mixture."""
    mean = data.weights @ data.means
    centred = data.means - mean
    within = torch.einsum("k,kde->de", data.weights, data.covariances)
    return mean, within + torch.einsum("k,kd,ke->de", data.weights, centred, centred)


@pytest.mark.parametrize("noise_std", [0.02, 0.3, 5.0])
@pytest.mark.parametrize("name", PATHS)
def test_the_mean_is_that_of_the_posterior_on_every_path(name, noise_std):
    sde = PATHS[name]
    for data in (GAUSSIAN, MIXTURE):
        y = data.sample(3, torch.Generator().manual_seed(0)) + 0.1
        got = posterior_mean(data.denoiser(sde), sde, y, noise_std)
        want = torch.stack([moments(posterior(data, each, noise_std))[0] for each in y])
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_the_mean_costs_one_call_and_samples_one_for_each_level():
    sde, calls = VPSDE(), []

    def denoiser(x, t):
        calls.append(len(x))
        return GAUSSIAN.denoiser(sde)(x, t)

    posterior_mean(denoiser, sde, torch.zeros(2, 3), 0.3)
    assert calls == [2]
    x = posterior_samples(denoiser, sde, torch.zeros(2, 3), 0.3, num_samples=4, num_steps=7)
    assert (calls, x.shape) == ([2] + [8] * 7, (8, 3))


@pytest.mark.parametrize("noise_std", [0.05, 0.4, 3.0])
@pytest.mark.parametrize("name", ["vp", "ve", "sub_vp", "rectified_flow", "cosine", "edm"])
def test_samples_of_gaussian_data_have_the_posterior_s_law(name, noise_std):
    """Without Monte Carlo: the run is laid out here as it is there, from a state of variance 0."""
    sde, mean0, std0, y = PATHS[name], 0.3, 0.6, 1.1
    gain = std0**2 / (std0**2 + noise_std**2)
    variance = gain * noise_std**2
    start = time_of_noise(sde, noise_std)
    assert math.exp(-0.5 * float(sde.log_snr(start))) == pytest.approx(noise_std)
    seen = []

    def denoiser(x, t):
        seen.append(float(t))
        return x

    posterior_samples(denoiser, sde, torch.zeros(1, 1), noise_std)
    assert seen[0] == start
    plan = make_plan(sde, torch.tensor(seen, dtype=torch.float64), HIGH_ORDER, stochasticity=1.0)
    got_mean, got_variance = push_gaussian(plan, sde, mean0, std0, float(sde.alpha(start)) * y, 0.0)
    assert abs(got_mean - mean0 - gain * (y - mean0)) < 1e-3 * math.sqrt(variance)
    rest = math.exp(-float(sde.log_snr(seen[-1])))  # the variance of the noise at which the run ends with the mean
    assert -0.01 < got_variance / variance - 1.0 + rest / variance < 0.01
    # Twice Anderson's noise, or none, would have another mean: what is checked above tells them apart.
    for eta in (0.0, math.sqrt(2.0)):
        plan = make_plan(sde, torch.tensor(seen, dtype=torch.float64), HIGH_ORDER, stochasticity=eta)
        wrong, _ = push_gaussian(plan, sde, mean0, std0, float(sde.alpha(start)) * y, 0.0)
        assert abs(wrong - mean0 - gain * (y - mean0)) > 2e-3 * math.sqrt(variance)


@pytest.mark.parametrize("name", ["vp", "ve", "sub_vp", "rectified_flow"])
def test_samples_of_a_mixture_have_its_posterior_s_moments_and_weights(name):
    """20000 samples of one observation: a false alarm at five standard errors, and 1 % for the steps."""
    sde, noise_std, n = PATHS[name], 0.5, 20000
    y = torch.tensor([[0.1, 0.1]], dtype=torch.float64)
    truth = posterior(MIXTURE, y[0], noise_std)
    generator = torch.Generator().manual_seed(4)
    x = posterior_samples(MIXTURE.denoiser(sde), sde, y, noise_std, n, 60, generator=generator)
    mean, covariance = moments(truth)
    std = covariance.diagonal().sqrt()
    assert ((x.mean(0) - mean).abs() < 5.0 * std / math.sqrt(n) + 0.01 * std).all()
    error = (torch.cov(x.T) - covariance) / torch.outer(std, std)
    assert (error.abs() < 5.0 * math.sqrt(2.0 / n) + 0.01).all()
    first = float(truth.responsibilities(x)[:, 0].mean())
    assert first == pytest.approx(float(truth.weights[0]), abs=5.0 * 0.5 / math.sqrt(n) + 0.005)


def test_noise_outside_the_path_is_refused_with_its_ends():
    for sde in PATHS.values():
        for bad in (0.0, -1.0, 1e-9, 1e9, math.nan, "loud"):
            with pytest.raises(ValueError, match="sigma, the standard deviation of the noise, must be"):
                posterior_mean(lambda x, t: x, sde, torch.zeros(1, 2), bad)
    with pytest.raises(ValueError, match="num_samples"):
        posterior_samples(lambda x, t: x, VPSDE(), torch.zeros(1, 2), 0.3, num_samples=0)
    with pytest.raises(ValueError, match="generator"):
        posterior_samples(lambda x, t: x, VPSDE(), torch.zeros(1, 2), 0.3, 3, generator=[torch.Generator()] * 2)


def test_the_least_noise_of_the_path_gives_a_single_level():
    sde = VPSDE()
    least = math.exp(-0.5 * float(sde.log_snr(1e-3))) * (1.0 + 1e-9)
    y = torch.zeros(2, 3, dtype=torch.float64)
    arguments = (GAUSSIAN.denoiser(sde), sde, y, least)
    x, mean = posterior_samples(*arguments, num_steps=5, t_min=1e-3), posterior_mean(*arguments, t_min=1e-3)
    assert ((x - mean).abs() < 6.0 * least).all()


# ---------------------------------------------------------------------- pipelines

IMAGES = GaussianMixture.gaussian([0.2] * 4, 0.1 * torch.eye(4) + 0.1)
SCHEDULERS = {
    "vp": lambda **k: VPSDEScheduler(**k),
    "discrete": lambda **k: VPSDEScheduler(time_conditioning="discrete", **k),
    "ve": lambda **k: VESDEScheduler(**{"prediction_type": "edm", **k}),
    "sub_vp": lambda **k: SubVPSDEScheduler(**k),
    "flow": lambda **k: FlowSDEScheduler(**k),
    # What keeps the law of x_t and would lose y, and what is not at temperature 1.
    "ode": lambda **k: VPSDEScheduler(predictor="heun", probability_flow=True, temperature=0.5, **k),
    "corrected": lambda **k: VPSDEScheduler(predictor="none", corrector="langevin", snr=0.1, **k),
}


def pipeline(scheduler, **options):
    unet = ExactUNet()
    unet.data, unet.scheduler = IMAGES, scheduler
    return quiet(SDEPipeline(unet, scheduler, **options))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_pipeline_denoises_whatever_its_sampler(name):
    """4000 samples: five standard errors are 8 % of a standard deviation, and 11 % of a variance."""
    pipe = pipeline(SCHEDULERS[name]())
    y = torch.tensor([[[[0.9, -0.4], [0.1, 0.3]]], [[[0.0, 0.1], [0.2, -0.9]]]])
    mean = pipe.denoise(y, 0.25, output_type="latent")
    n = 4000
    x = pipe.denoise(y, 0.25, n, generator=torch.Generator().manual_seed(0), output_type="latent")
    assert x.shape == (2 * n, 1, 2, 2)
    for k in range(2):
        true_mean, covariance = moments(posterior(IMAGES, y[k].flatten().double(), 0.25))
        torch.testing.assert_close(mean[k].flatten().double(), true_mean, rtol=1e-3, atol=1e-3)
        own, std = x[k * n : (k + 1) * n].flatten(1).double(), covariance.diagonal().sqrt()
        assert ((own.mean(0) - true_mean).abs() < 0.08 * std).all()
        assert (((torch.cov(own.T) - covariance) / torch.outer(std, std)).abs() < 0.12).all()


def test_bytes_and_their_noise_are_scaled_to_the_networks_range():
    """A noise of 25 grey levels is 25/255 of the range, whatever the range is."""
    grey = torch.tensor([[200, 40], [100, 130]], dtype=torch.uint8)
    for low, high in ((-1.0, 1.0), (0.0, 1.0)):
        pipe = pipeline(VPSDEScheduler(), data_min=low, data_max=high)
        sigma = 25.0 * (high - low) / 255.0
        y = low + (high - low) * grey.double() / 255.0
        want, _ = moments(posterior(IMAGES, y.flatten(), sigma))
        for image in (grey[None, None], Image.fromarray(grey.numpy()), y[None, None].float()):
            got = pipe.denoise(image, sigma, output_type="latent")
            torch.testing.assert_close(got.flatten().double(), want, rtol=1e-4, atol=1e-4)
    assert pipe.denoise(grey[None, None], sigma)[0].size == (2, 2)


def test_a_sample_depends_on_its_own_generator_only():
    pipe = pipeline(VPSDEScheduler())
    y = torch.rand(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def drawn(y, *seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe.denoise(y, 0.3, len(seeds) // len(y), 5, generators, "latent")

    together = drawn(y, 1, 2, 3, 4)
    torch.testing.assert_close(drawn(y[1:], 3, 4), together[2:])


def test_pipelines_refuse_what_they_cannot_denoise():
    pipe = pipeline(VPSDEScheduler())
    for arguments, name in (((0.0,), "sigma"), ((1e9,), "sigma"), ((0.3, 0), "num_samples"), ((0.3, 1, 0), "num_inf")):
        with pytest.raises(ValueError, match=name):
            pipe.denoise(torch.zeros(1, 1, 2, 2), *arguments)
    with pytest.raises(ValueError, match="image"):
        pipe.denoise("image.png", 0.3)
    with pytest.raises(ValueError, match="output_type"):
        pipe.denoise(torch.zeros(1, 1, 2, 2), 0.3, output_type="jpg")
    # A network that knows only the times of a table has no smaller noise than its first entry's.
    discrete = ProbabilityFlow(pipeline(VPSDEScheduler(time_conditioning="discrete")))
    with pytest.raises(ValueError, match=r"sigma.* got 0\.001"):
        discrete.denoise(torch.zeros(1, 1, 2, 2), 0.001)


def test_conditioning_is_repeated_with_the_observations():
    seen = []

    def denoiser(x, t, shift):
        seen.append(shift.tolist())
        return x + shift[:, None, None, None]

    flow = ProbabilityFlow(pipeline(VPSDEScheduler()), denoiser=denoiser)
    y, rows = torch.zeros(2, 1, 2, 2), {"shift": torch.tensor([1.0, 2.0])}
    flow.denoise(y, 0.3, conditioning=rows)
    flow.denoise(y, 0.3, 2, 3, conditioning=rows)
    assert seen == [[1.0, 2.0]] + [[1.0, 1.0, 2.0, 2.0]] * 3
    with pytest.raises(ValueError, match="shift"):
        flow.denoise(y, 0.3, conditioning={"shift": torch.zeros(3)})
