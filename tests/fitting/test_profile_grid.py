"""``profile_grid``: the closed form for Gaussian data, and grids of knots in schedulers."""

import json
import math

import pytest
import torch
from analytic import GaussianMixture, PointwiseGaussian

from diffusers_sde import FlowSDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.fitting import profile_grid
from diffusers_sde.sampling import get_time_grid, make_plan, sample
from diffusers_sde.sampling.exponential import Exponential
from diffusers_sde.sdes import SDES, VESDE, VPSDE, RectifiedFlowSDE

NOISE = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("std", [0.1, 0.5])
@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), RectifiedFlowSDE()], ids=lambda sde: type(sde).__name__)
def test_for_gaussian_data_the_first_order_grid_is_uniform_in_the_arc_tangent(sde, std):
    """theta = atan(sigma/(alpha c)), the optimum in closed form."""
    knots = profile_grid(PointwiseGaussian(0.0, std).denoiser(sde), sde, NOISE, 0.01, levels=128, order=1, floor=0.0)
    assert knots[-1] == pytest.approx(-math.log(0.01))
    theta = torch.atan(torch.exp(-torch.tensor(knots, dtype=torch.float64)) / std)
    torch.testing.assert_close(theta, torch.linspace(theta[0], theta[-1], 33, dtype=torch.float64), atol=5e-3, rtol=0)


def test_the_second_order_density_is_that_of_the_second_derivative():
    """For Gaussian data k = u (1 - u) |1 - 3 u|, written out: the derivative of sqrt(u) (1 - u) once more, times P."""
    sde, std = VPSDE(), 0.3
    knots = profile_grid(PointwiseGaussian(0.0, std).denoiser(sde), sde, NOISE, 0.01, levels=400, order=2, floor=0.0)
    lam = torch.linspace(knots[0], knots[-1], 20_001, dtype=torch.float64)
    u = std**2 / (std**2 + torch.exp(-2.0 * lam))
    mass = torch.cumsum((u * (1.0 - u) * (1.0 - 3.0 * u).abs()) ** (1.0 / 3.0), 0)
    at = torch.searchsorted(lam, torch.tensor(knots, dtype=torch.float64)).clamp(max=20_000)
    torch.testing.assert_close(mass[at] / mass[-1], torch.linspace(0, 1, 33, dtype=torch.float64), atol=5e-3, rtol=0)


def test_the_floor_is_spread_evenly():
    sde = VESDE()
    knots = profile_grid(PointwiseGaussian().denoiser(sde), sde, NOISE[:64], floor=1.0, knots=5)
    even = torch.linspace(0.5 * float(sde.log_snr(1.0)), -math.log(0.01), 5, dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(knots, dtype=torch.float64), even)


def test_a_path_that_begins_with_noise_is_profiled_down_to_that():
    """The smallest noise of this SDE, 0.02, is above the default ``last_sigma``."""
    sde = VESDE(sigma_min=0.02, sigma_max=8.0)
    knots = profile_grid(PointwiseGaussian().denoiser(sde), sde, NOISE[:64])
    assert knots[-1] == pytest.approx(-math.log(0.02))


def test_a_profiled_grid_brings_a_mixture_nearer_than_tuned_constants_where_its_scale_is_another():
    """Structure at a hundredth of the scale that the constants of ``sech`` were measured for."""
    sde = VESDE(sigma_min=1e-5, sigma_max=50.0)
    data = GaussianMixture([0.5, 0.5], [[0.01], [-0.01]], [[[1e-6]], [[1e-6]]])
    denoise, last = data.denoiser(sde), 1e-4
    noise = torch.randn(512, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    end = float(sde.time_of(-2.0 * math.log(last)))

    def finish(grid, levels):
        times = get_time_grid(grid, sde, levels, sde.t_max, end)
        return sample(make_plan(sde, times, Exponential(2), stochasticity=0.0), denoise, noise * sde.prior_std)

    knots, truth = profile_grid(denoise, sde, noise[:128], last), finish("log_snr", 400)
    error = {grid: (finish(g, 10) - truth).square().mean().sqrt() for grid, g in (("own", knots), ("sech", "sech"))}
    assert error["own"] < 0.5 * error["sech"]


# ---------------------------------------------------------------------- grids of knots


@pytest.mark.parametrize("name", SDES)
def test_as_many_points_lie_between_neighbouring_knots(name):
    sde, knots = SDES[name](), [-2.0, -1.0, 1.5, 2.0]
    start, end = (float(sde.time_of(2.0 * lam)) for lam in (knots[0], knots[-1]))
    times = get_time_grid(knots, sde, 7, start, end)
    expected = torch.tensor([-2.0, -1.5, -1.0, 0.25, 1.5, 1.75, 2.0], dtype=torch.float64)
    torch.testing.assert_close(0.5 * sde.log_snr(times), expected, atol=1e-6, rtol=0)


def test_a_grid_of_knots_starts_and_ends_where_it_is_told_to():
    """Beyond the outermost knots the density is that of the interval next to them: here points are 0.5 apart."""
    sde, knots = VESDE(), [-1.0, 0.0, 1.0]
    start, end = (float(sde.time_of(2.0 * lam)) for lam in (-3.5, 4.5))
    lam = 0.5 * sde.log_snr(get_time_grid(knots, sde, 17, start, end))
    torch.testing.assert_close(lam, torch.linspace(-3.5, 4.5, 17, dtype=torch.float64), atol=1e-6, rtol=0)
    inner = 0.5 * sde.log_snr(get_time_grid([-5.0, 0.0, 5.0], sde, 5, start, end))
    torch.testing.assert_close(inner, torch.linspace(-3.5, 4.5, 5, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("cls", [VPSDEScheduler, VESDEScheduler, SubVPSDEScheduler, FlowSDEScheduler])
def test_knots_are_saved_and_loaded(cls, tmp_path):
    scheduler = cls(time_grid=(-2, 0.5, 1.0, 4.0), sampling_sigma=0.02)
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["time_grid"] == [-2.0, 0.5, 1.0, 4.0]
    again = cls.from_pretrained(tmp_path)
    for each in (scheduler, again, cls.from_config(scheduler.config)):
        each.set_timesteps(9)
        torch.testing.assert_close(each.timesteps, scheduler.timesteps)
        assert len(each.timesteps) == 9
    ratio = torch.exp(-0.5 * again.sde.log_snr(again._level_times[-1]))
    assert float(ratio) == pytest.approx(0.02, rel=1e-6)


@pytest.mark.parametrize(
    "knots", [[], [1.0], [0.0, 0.0], [1.0, 0.0], [0.0, math.inf], [math.nan, 1.0], "sceh", 3, True]
)
def test_other_knots_are_refused(knots):
    with pytest.raises(ValueError, match="time_grid"):
        VPSDEScheduler(time_grid=knots)


@pytest.mark.parametrize(
    "given",
    [
        {"levels": 3},
        {"order": 0},
        {"order": 4},
        {"floor": 1.5},
        {"knots": 1},
        {"last_sigma": 0.0},
        {"last_sigma": 1e4},
        {"noise": "x"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_other_arguments_are_refused(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        profile_grid(**{"denoiser": lambda x, t: x, "sde": VPSDE(), "noise": NOISE, **given})


def test_a_denoiser_that_says_nothing_is_refused():
    with pytest.raises(ValueError, match="denoiser"):
        profile_grid(lambda x, t: torch.zeros_like(x), VPSDE(), NOISE[:8])
