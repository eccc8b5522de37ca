"""``sampling_sigma``: the last level by its noise-to-signal ratio, on every path and grid."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_sde import FlowSDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.sampling.time_grids import TIME_GRIDS
from diffusers_sde.schedulers import SCHEDULERS

# sigma/alpha at SDE time t, written out
RATIOS = {
    "VPSDEScheduler": lambda t: math.sqrt(math.expm1(0.1 * t + 9.95 * t * t)),
    "SubVPSDEScheduler": lambda t: 2.0 * math.sinh(0.5 * (0.1 * t + 9.95 * t * t)),
    "VESDEScheduler": lambda t: 0.01 * 5000.0**t,
    "FlowSDEScheduler": lambda t: t / (1.0 - t),
}
ARGUMENTS = {"VPSDEScheduler": {"continuous": True}, "FlowSDEScheduler": {"shift": 3.0}}


def make(name, **arguments):
    return SCHEDULERS[name](**ARGUMENTS.get(name, {}) | arguments)


@pytest.mark.parametrize("grid", TIME_GRIDS)
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("sigma", [0.02, 0.3])
def test_the_last_level_has_exactly_that_ratio(name, grid, sigma):
    scheduler = make(name, time_grid=grid, sampling_sigma=sigma)
    for levels in (2, 9):
        scheduler.set_timesteps(levels)
        assert RATIOS[name](scheduler.rows[-1].t) == pytest.approx(sigma, rel=1e-9)
        times = [row.t for row in scheduler.rows]
        assert times == sorted(times, reverse=True) and len(set(times)) == levels
    assert RATIOS[name](scheduler.last_time()) == pytest.approx(sigma, rel=1e-9)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_number_means_one_level_on_all_paths(name):
    scheduler = make(name, sampling_sigma=0.05)
    scheduler.set_timesteps(5)
    assert float(scheduler.sigmas[-2]) == pytest.approx(0.05 if name != "FlowSDEScheduler" else 0.05 / 1.05, rel=1e-5)


def test_a_shift_that_comes_with_the_image_moves_no_end():
    scheduler = FlowSDEScheduler(use_dynamic_shifting=True, time_grid="uniform", sampling_sigma=0.1)
    for mu in (0.3, 1.2):
        scheduler.set_timesteps(6, mu=mu)
        assert scheduler.rows[-1].t == pytest.approx(0.1 / 1.1, rel=1e-9)


def test_none_leaves_the_level_to_sampling_eps():
    for name in SCHEDULERS:
        scheduler = make(name, sampling_eps=0.05)
        scheduler.set_timesteps(4)
        assert scheduler.rows[-1].t == 0.05 == scheduler.last_time()


def test_a_table_ends_at_the_nearest_whole_timestep_on_blended():
    scheduler = VPSDEScheduler.from_config(DDIMScheduler().config, sampling_sigma=0.1)
    assert scheduler.config.time_grid == "blended"
    scheduler.set_timesteps(20)
    ratios = torch.exp(-0.5 * scheduler.sde.log_snr(torch.arange(1, 1001, dtype=torch.float64) / 1000))
    assert int(scheduler.timesteps[-1]) == int((ratios - 0.1).abs().argmin())
    exact = VPSDEScheduler.from_config(DDIMScheduler().config, time_grid="sech", sampling_sigma=0.1)
    exact.set_timesteps(20)
    assert float(exact.sigmas[-2]) == pytest.approx(0.1, rel=1e-6)


def test_it_is_saved_and_swapped_back(tmp_path):
    scheduler = SubVPSDEScheduler(sampling_sigma=0.02)
    scheduler.save_pretrained(tmp_path)
    assert SubVPSDEScheduler.from_pretrained(tmp_path).config.sampling_sigma == 0.02
    back = VPSDEScheduler.from_config(DDIMScheduler.from_config(VPSDEScheduler(sampling_sigma=0.02).config).config)
    assert back.config.sampling_sigma == 0.02
    old = {k: v for k, v in VESDEScheduler().config.items() if k != "sampling_sigma"}
    assert VESDEScheduler.from_config(old).last_time() == 1e-5


def test_the_smallest_noise_of_a_path_that_has_one():
    scheduler = VESDEScheduler(sampling_sigma=0.01)
    scheduler.set_timesteps(3)
    assert RATIOS["VESDEScheduler"](scheduler.rows[-1].t) == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: VESDEScheduler(sampling_sigma=0.009), r"sampling_sigma must be .*\[0.01, 50\), got 0.009"),
        (lambda: VPSDEScheduler(sampling_sigma=1000.0), "sampling_sigma must be"),
        (lambda: VPSDEScheduler(sampling_sigma=0.0), "sampling_sigma must be"),
        (lambda: VPSDEScheduler(time_grid=None, sampling_sigma=0.1), "diffusers' grids end where they end"),
        (
            lambda: FlowSDEScheduler(time_grid="uniform", shift_terminal=0.02, sampling_sigma=0.1),
            "shift_terminal=0.02 already ends the 'uniform' grid",
        ),
    ],
)
def test_what_is_refused(make_it, words):
    with pytest.raises(ValueError, match=words):
        make_it()
