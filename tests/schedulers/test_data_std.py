"""``data_std``: a sampler treats data c x_0 as it treats x_0, on a path that is scaled with them."""

import math

import diffusers
import pytest
import torch
from analytic import GaussianMixture

from diffusers_sde import FlowSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.schedulers import SCHEDULERS

SAMPLERS = {
    "reverse SDE": {},
    "probability flow": {"probability_flow": True},
    "order 2": {"solver_order": 2, "solver_type": "midpoint"},
    "singlestep": {"predictor": "singlestep"},
    "Langevin": {"corrector": "langevin", "snr": 0.1},
    "Ornstein-Uhlenbeck": {"probability_flow": True, "corrector": "ornstein_uhlenbeck", "snr": 0.2},
    "cooler": {"temperature": 0.8},
    "blended": {"time_grid": "blended"},
    "knots": {"time_grid": "knots"},
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
STD = 0.6  # of the data below about their mean


def mixture(scale):
    """Two dimensions, in which the data have a standard deviation of ``STD`` times ``scale`` on average."""
    means = torch.tensor([[0.8, -0.3], [-0.4, 0.5], [-0.4, -0.2]], dtype=torch.float64)
    means, variances = means - means.mean(0), torch.tensor([[0.01, 0.1], [0.05, 0.002], [0.03, 0.03]])
    size = STD / math.sqrt(float((variances.double().mean(0) + means.square().mean(0)).mean()))
    return GaussianMixture([1.0, 1.0, 1.0], scale * size * means, (scale * size) ** 2 * variances.double())


def samples(scheduler, data, n=200, levels=7):
    """From noise that does not depend on the scheduler, float64."""
    scheduler.set_timesteps(levels)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = z * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        x0_hat = data.denoiser(scheduler.sde)(x, scheduler.rows[i].t)
        x = scheduler.step(x0_hat, t, x, generator=generator, return_dict=False)[0]
    return x


def on_scaled_path(path, scale, sampler, **options):
    """A scheduler whose path passes the noise-to-signal ratios of the usual one times ``scale``."""
    if sampler.get("time_grid") == "knots":
        sampler = {**sampler, "time_grid": [lam - math.log(scale) for lam in (-3.0, -1.0, 0.0, 2.0)]}
    options = {"prediction_type": "sample", "sampling_sigma": 0.02 * scale, **sampler, **options}
    if path == "ve":
        return VESDEScheduler(sigma_min=0.01 * scale, sigma_max=50.0 * scale, **options)
    if path == "flow":
        return FlowSDEScheduler(shift=3.0 * scale, **options)
    # sigma/alpha at the end of a VP path is sqrt(exp((beta_start + beta_end)/2) - 1), in the paper's units.
    betas = 2.0 * math.log1p((150.0 * scale) ** 2) - 0.1
    return VPSDEScheduler(continuous=True, beta_end=betas / 1000.0, **options)


@every_sampler
@pytest.mark.parametrize("scale", [0.1, 5.0])
@pytest.mark.parametrize("path", ["ve", "flow"])
def test_samples_of_scaled_data_are_scaled_samples(path, scale, sampler):
    """To rounding: x -> c x carries the SDE of one path into that of the other, and so it does every step."""
    if path == "flow" and sampler.get("corrector") == "langevin":
        pytest.skip("the paper's step has a factor alpha, which is not that of the scaled path at the same level")
    ends = [samples(on_scaled_path(path, c, sampler, data_std=c * STD), mixture(c)) / c for c in (1.0, scale)]
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("scale", [0.1, 5.0])
@pytest.mark.parametrize("path", ["ve", "flow"])
def test_samples_differ_where_the_constants_stay(path, scale):
    ends = [samples(on_scaled_path(path, c, {}), mixture(c)) / c for c in (1.0, scale)]
    assert float((ends[1] - ends[0]).abs().mean()) > 1e-3


@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_vp_scales_up_to_what_is_left_of_the_data_at_its_start(scale, flow):
    """VP starts from unit noise and not from alpha x_0 + sigma z, which differ by the square of alpha/sigma there."""
    ends = [
        samples(on_scaled_path("vp", c, {"probability_flow": flow}, data_std=c * STD), mixture(c)) / c
        for c in (1.0, scale)
    ]
    assert float((ends[1] - ends[0]).abs().mean()) < 1e-3
    still = samples(on_scaled_path("vp", scale, {"probability_flow": flow}), mixture(scale)) / scale
    assert float((still - ends[0]).abs().mean()) > 1e-2


@pytest.mark.parametrize("levels", [8, 10, 20])
@pytest.mark.parametrize("cls", [VPSDEScheduler, FlowSDEScheduler])
def test_it_makes_the_flow_of_finer_data_more_exact(cls, levels):
    """On the same path at the same number of calls: the distance to what 150 levels lead to from the same noise."""
    options = {"prediction_type": "sample", "probability_flow": True, "sampling_sigma": 0.002}
    data = mixture(0.1)
    fine = samples(cls(**options, data_std=0.1 * STD), data, levels=150)
    told, untold = (
        float((samples(cls(**options, data_std=std), data, levels=levels) - fine).square().mean().sqrt())
        for std in (0.1 * STD, None)
    )
    assert told < 0.5 * untold


@pytest.mark.parametrize("cls", SCHEDULERS.values())
def test_none_is_a_half_and_gaussian_std_follows(cls, tmp_path):
    plans = []
    for given in (
        {},
        {"data_std": 0.5},
        {"gaussian_std": 0.05},
        {"data_std": 1.0},
        {"data_std": 1.0, "gaussian_std": 0.1},
    ):
        scheduler = cls(prediction_type="sample", **given)
        scheduler.set_timesteps(9)
        plans.append(scheduler.rows)
    assert plans[1] == plans[0] and plans[2] == plans[0] and plans[4] == plans[3] != plans[0]
    scheduler.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert (again.config.data_std, again.config.gaussian_std) == (1.0, 0.1)
    assert cls.from_config(again.config, data_std=None, gaussian_std=None).config.data_std is None


def test_a_scheduler_swapped_for_a_stock_one_and_back_keeps_it():
    ours = VPSDEScheduler(data_std=0.8)
    stock = diffusers.DDPMScheduler.from_config(ours.config)
    assert VPSDEScheduler.from_config(stock.config).config.data_std == 0.8


def test_the_densest_part_of_the_grid_moves_by_the_logarithm():
    middles = []
    for std in (0.5, 1.0):
        scheduler = VESDEScheduler(sigma_min=1e-4, sigma_max=1e4, data_std=std)
        lam = 0.5 * scheduler.sde.log_snr(scheduler.sampling_times(4001))
        middles.append(float(lam[lam.diff().argmin()]))
    assert middles[0] == pytest.approx(0.5, abs=0.01)
    assert middles[1] == pytest.approx(0.5 - math.log(2.0), abs=0.01)


def test_temperature_takes_it():
    """Gaussian data of this standard deviation get T times the variance (closed form)."""
    std, temperature = 2.0, 0.7
    data = GaussianMixture.gaussian([0.0, 0.0], [std**2, std**2])
    scheduler = VESDEScheduler(
        prediction_type="sample", probability_flow=True, data_std=std, temperature=temperature, sigma_max=500.0
    )
    x = samples(scheduler, data, 3, 60)
    z = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert float((x / z).mean()) == pytest.approx(std * math.sqrt(temperature), rel=5e-3)
