"""Whole runs through the schedulers: with the exact score of a mixture they return the mixture.

Each run draws from the prior, calls ``scale_model_input``, the exact network and ``step`` for every timestep as a
pipeline does, and asks for component weights, means and covariances. A threshold has two parts. The statistical one:
six standard errors or so, from the sample size, with a false-alarm rate of 1e-6 for all comparisons of a run together.
The other is what the sampler may be off by at this number of steps, 0.5 % of a standard deviation (1 % with a
corrector, whose stationary law is off by its step size). An error of 2 % in any scale fails.
"""

import math

import pytest
import torch
from analytic import GaussianMixture, z_threshold

from diffusers_sde.schedulers import FlowSDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler

# A sample is an "image" of 2500 independent points. Langevin's step size is made from the norms of a sample, which
# correlates it with the state and the noise and inflates the stationary variance by 4/d, d the dimension of a sample.
POINTS, BATCH = 2500, 16
N = POINTS * BATCH
MIXTURE = GaussianMixture(
    [0.5, 0.3, 0.2],
    [[0.0, 1.0], [-1.5, -0.8], [1.4, -0.9]],
    [[[0.05, 0.02], [0.02, 0.04]], [[0.03, -0.01], [-0.01, 0.06]], [[0.04, 0.0], [0.0, 0.02]]],
)

MODELS = {
    "ve": (VESDEScheduler, {"sigma_max": 20.0, "sampling_eps": 1e-5}),
    "vp": (VPSDEScheduler, {"continuous": True, "sampling_eps": 1e-4, "prediction_type": "v_prediction"}),
    "sub_vp": (SubVPSDEScheduler, {"sampling_eps": 1e-3}),
    "discrete_vp": (VPSDEScheduler, {"sampling_eps": 1e-4}),
    "flow": (FlowSDEScheduler, {"sampling_eps": 1e-3}),
}
SAMPLERS = {
    "reverse_sde": (160, {"predictor": "exponential", "solver_order": 2}),
    "pc": (140, {"predictor": "exponential", "corrector": "langevin", "snr": 0.08}),
    "ode": (80, {"predictor": "exponential", "solver_order": 3, "probability_flow": True}),
}


def exact_network(scheduler):
    """(scaled input, timestep) -> the output that a perfectly trained network of this prediction type would have."""

    def network(x, timestep):
        t = scheduler.sde_time(timestep.double())
        alpha, sigma = scheduler.sde.alpha(t), scheduler.sde.sigma(t)
        x = x / scheduler.parametrization.input_scale(alpha, sigma)
        x0_hat = MIXTURE.denoise(x.reshape(-1, 2), alpha, sigma).reshape(x.shape)
        return scheduler.parametrization.from_x0(x0_hat, x, alpha, sigma)

    return network


def run(scheduler, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, POINTS, 2, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
    scheduler.set_timesteps(steps)
    network = exact_network(scheduler)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, generator=generator).prev_sample
    return x.reshape(N, 2)


def check(x, relative_slack):
    """Weights, means and covariances; every deviation in units of its own standard error plus the slack."""
    n, k = len(x), MIXTURE.responsibilities(x).argmax(1)
    z = z_threshold(1e-4, 3 * (1 + 2 + 3) + 3)
    pooled = []
    for j, weight in enumerate(MIXTURE.weights.tolist()):
        own = x[k == j]
        assert abs(len(own) / n - weight) < z * math.sqrt(weight * (1 - weight) / n) + 0.3 * relative_slack
        # In the component's own coordinates it is a standard Gaussian.
        white = torch.linalg.solve_triangular(
            torch.linalg.cholesky(MIXTURE.covariances[j]), (own - MIXTURE.means[j]).T, upper=False
        ).T
        assert (white.mean(0).abs() < z / math.sqrt(len(own)) + relative_slack).all()
        second = white.T @ white / len(own) - torch.eye(2, dtype=x.dtype)
        assert (second.diagonal().abs() < z * math.sqrt(2 / len(own)) + 2 * relative_slack).all()
        assert abs(float(second[0, 1])) < z / math.sqrt(len(own)) + 2 * relative_slack
        pooled.append(white)
    pooled = torch.cat(pooled).flatten()
    assert abs(float(pooled.square().mean()) - 1) < z * math.sqrt(2 / len(pooled)) + 2 * relative_slack
    assert abs(float(pooled.pow(4).mean()) - 3) < z * math.sqrt(96 / len(pooled)) + 12 * relative_slack
    assert abs(float(pooled.mean())) < z / math.sqrt(len(pooled)) + relative_slack


def test_the_check_passes_exact_samples_and_sees_errors_of_two_percent():
    x = MIXTURE.sample(N, torch.Generator().manual_seed(0))
    check(x, 0.0)
    k = MIXTURE.responsibilities(x).argmax(1)
    wider = MIXTURE.means[k] + 1.02 * (x - MIXTURE.means[k])
    shifted = x + 0.01
    reweighted = torch.cat([x, x[k == 0][: int(0.04 * N)]])
    for wrong in (wider, shifted, reweighted):
        with pytest.raises(AssertionError):
            check(wrong, 0.005)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("model", MODELS)
def test_the_mixture_comes_back(model, sampler):
    cls, arguments = MODELS[model]
    steps, options = SAMPLERS[sampler]
    scheduler = cls(**{"time_grid": "log_snr", **arguments, **options})
    x = run(scheduler, steps, seed=11)
    check(x, 0.01 if sampler == "pc" else 0.005)
