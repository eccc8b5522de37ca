"""The levels that pipelines bring: ``timesteps``, ``sigmas``, both, and what the scheduler lists before any of them."""

import diffusers
import numpy as np
import pytest
import torch

from diffusers_sde import FlowSDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.sampling.rows import is_finite
from diffusers_sde.sampling.time_grids import get_time_grid, whole_timesteps

PC = {"predictor": "ancestral", "corrector": "langevin", "snr": 0.1}
HEUN = {"predictor": "heun", "probability_flow": True}
SAMPLERS = {"reverse SDE": {}, "pc": PC, "pc, two corrections": {**PC, "correct_steps": 2}, "heun": HEUN}
STABLE_DIFFUSION = diffusers.DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
    set_alpha_to_one=False,
).config  # fmt: skip


# ---------------------------------------------------------------------- sigmas of a flow


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_sigmas_of_a_flow_are_its_times(sampler):
    scheduler = FlowSDEScheduler(**sampler)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert len(scheduler.sigmas) == len(scheduler.timesteps) + 1 and scheduler.sigmas[-1] == 0.0
    torch.testing.assert_close(scheduler.sigmas[:-1] * 1000, scheduler.timesteps)
    velocity, x = torch.randn(2, 3), torch.randn(2, 3)
    for i, t in enumerate(scheduler.timesteps):  # the conversion that LTX-2 and reinforcement learning compute
        clean = x - velocity * scheduler.sigmas[i]
        torch.testing.assert_close(scheduler.denoiser(lambda *_: velocity)(x, float(t) / 1000), clean)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_new_flow_scheduler_lists_what_a_new_stock_one_lists(shift, dynamic):
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic)
    ours = FlowSDEScheduler.from_config(stock.config)
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=1e-5, atol=2e-4)
    torch.testing.assert_close(ours.sigmas[:-1], stock.sigmas, rtol=1e-5, atol=2e-7)
    assert ours.sigmas[-1] == 0.0
    index = torch.randint(0, 1000, (5,))  # as diffusers' training scripts look noise levels up
    assert [ours.sigmas[(ours.timesteps == t).nonzero().item()] for t in ours.timesteps[index]]


@pytest.mark.parametrize("cls", [VPSDEScheduler, SubVPSDEScheduler, VESDEScheduler])
def test_a_new_scheduler_lists_a_sigma_for_each_timestep(cls):
    scheduler = cls()
    t = scheduler.sde_time(scheduler.timesteps).double()
    expected = scheduler.sde.sigma(t) / scheduler.sde.alpha(t)
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), expected.double(), rtol=1e-4, atol=1e-6)
    assert len(scheduler.sigmas) == len(scheduler.timesteps) + 1 == scheduler.config.num_train_timesteps + 1


# ---------------------------------------------------------------------- lists count calls


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_with_levels_of_a_pipeline_each_call_counts_as_one(sampler):
    """``retrieve_timesteps`` then takes the number of calls for that of levels, and pipelines multiply by order."""
    scheduler = FlowSDEScheduler(**sampler)
    own = scheduler.order
    scheduler.set_timesteps(5)
    assert scheduler.order == own
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
    assert scheduler.order == 1
    scheduler.set_timesteps(timesteps=[1000.0, 800.0, 600.0, 400.0, 200.0])
    assert scheduler.order == 1
    scheduler.set_timesteps(5)
    assert scheduler.order == own


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("strength", [0.9, 0.7, 0.6, 0.5, 0.1])
def test_a_strength_is_a_noise_level_whatever_the_order(sampler, strength):
    """The arithmetic of Flux, QwenImage and Z-Image for image-to-image, and the noise that they add."""
    n = 10
    scheduler = FlowSDEScheduler(**sampler)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / n, n))
    calls = len(scheduler.timesteps)
    begin = int(max(calls - min(calls * strength, calls), 0))
    timesteps = scheduler.timesteps[begin * scheduler.order :]
    scheduler.set_begin_index(begin * scheduler.order)
    assert float(timesteps[0]) / 1000 == pytest.approx(strength, abs=0.06)  # half a level, where calls are odd
    x = torch.randn(1, 2, 3, 3)
    noised = float(timesteps[0]) / 1000
    for t in timesteps:
        x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
    assert scheduler.rows[scheduler._first_row].t == pytest.approx(noised)  # sampling acts from where the noise is
    assert scheduler.step_index == calls


# ---------------------------------------------------------------------- both lists


def test_both_lists_as_cogview4_passes_them():
    stock = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    arguments = {"timesteps": np.linspace(1000, 1, 4).astype(np.int64), "mu": 0.7}
    arguments["sigmas"] = arguments["timesteps"] / 1000
    first_order = {"solver_order": 1, "solver_correction": False, "gaussian_std": 0.0, "probability_flow": True}
    ours = FlowSDEScheduler.from_config(stock.config, **first_order)
    results = []
    for scheduler in (stock, ours):
        scheduler.set_timesteps(**arguments)
        x = torch.linspace(-1.0, 1.0, 12).reshape(1, 3, 2, 2)
        for given, t in zip(arguments["timesteps"], scheduler.timesteps, strict=True):
            x = scheduler.step(torch.sin(3.0 * x) + 0.001 * float(given), t, x, return_dict=False)[0]
        results.append(x)
    # Diffusers below 0.42 puts the shifted levels in their place.
    torch.testing.assert_close(ours.timesteps, torch.from_numpy(arguments["timesteps"]).float())
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", [PC, HEUN], ids=["pc", "heun"])
def test_both_lists_with_more_calls_a_level(sampler):
    scheduler = FlowSDEScheduler(**sampler, shift=3.0)
    levels = torch.tensor([1000.0, 667.0, 334.0, 1.0])
    scheduler.set_timesteps(timesteps=levels, sigmas=levels / 1000)
    times = torch.tensor([row.t for row in scheduler.rows])
    shifted = 3.0 * levels / 1000 / (1.0 + 2.0 * levels / 1000)
    for fed, level in zip(levels, shifted, strict=True):
        assert bool((scheduler.timesteps[(times - level).abs() < 1e-6] == fed).all())


def test_both_lists_of_different_lengths():
    with pytest.raises(ValueError, match="one length, got 2 and 3"):
        FlowSDEScheduler().set_timesteps(timesteps=[1000.0, 500.0], sigmas=[1.0, 0.5, 0.2])
    with pytest.raises(ValueError, match="only flows have pipelines that pass both"):
        VPSDEScheduler().set_timesteps(timesteps=[900, 500], sigmas=[5.0, 1.0])


# ---------------------------------------------------------------------- the ends of a path


def test_predictors_that_need_a_finite_drift_start_just_below_pure_noise():
    for n in (2, 4, 50, 1000):
        scheduler = FlowSDEScheduler(predictor="euler_maruyama")
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / n, n))
        assert scheduler.sigmas[1] < scheduler.sigmas[0] < 1.0
        assert scheduler.sigmas[0] > 0.9 and is_finite(scheduler._plan.table)
        scheduler.set_timesteps(timesteps=np.linspace(1000.0, 1000.0 / n, n))
        assert scheduler.timesteps[1] < scheduler.timesteps[0] < 1000.0
    kept = FlowSDEScheduler(predictor="euler_maruyama")
    kept.set_timesteps(sigmas=[0.9, 0.5])
    assert kept.sigmas.tolist() == pytest.approx([0.9, 0.5, 0.0])


@pytest.mark.parametrize("levels", [{"num_inference_steps": 1}, {"sigmas": [1.0]}])
@pytest.mark.parametrize("grid", [None, "uniform", "blended", "sech"])
def test_a_single_level_of_a_stretched_grid_is_pure_noise(grid, levels):
    scheduler = FlowSDEScheduler(shift_terminal=0.1, time_grid=grid)
    scheduler.set_timesteps(**levels)
    assert scheduler.timesteps.tolist() == [1000.0]


@pytest.mark.parametrize("cls", [VPSDEScheduler, SubVPSDEScheduler, VESDEScheduler, FlowSDEScheduler])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_a_single_level_stands_where_sampling_starts(cls, spacing):
    scheduler = cls(time_grid=None, timestep_spacing=spacing)
    scheduler.set_timesteps(1)
    assert scheduler.rows[0].t == pytest.approx(scheduler.sde.t_max, rel=1e-3)


# ---------------------------------------------------------------------- the grid of a swapped config


def strengths(scheduler, n=50):
    """SDE times at which image-to-image starts with strengths 0.8, 0.5 and 0.3."""
    scheduler.set_timesteps(n)
    return [scheduler.rows[round(n * (1.0 - strength))].t for strength in (0.8, 0.5, 0.3)]


@pytest.mark.parametrize("n", [1, 2, 10, 50, 333, 1000])
def test_blended_timesteps_of_a_table_are_whole_and_go_from_end_to_end(n):
    scheduler = VPSDEScheduler.from_config(STABLE_DIFFUSION)
    assert scheduler.config.time_grid == "blended"
    scheduler.set_timesteps(n)
    assert scheduler.timesteps.dtype == torch.int64 and len(scheduler.timesteps) == n
    assert scheduler.timesteps[0] == 999 and (n == 1 or scheduler.timesteps[-1] == 0)
    assert bool((scheduler.timesteps.diff() < 0).all())


def test_whole_timesteps_are_the_nearest_that_keep_their_order():
    assert whole_timesteps(torch.tensor([9.4, 5.5, 2.1]), 10).tolist() == [9.0, 6.0, 2.0]
    assert whole_timesteps(torch.tensor([3.0, 0.4, 0.2, 0.0]), 4).tolist() == [3.0, 2.0, 1.0, 0.0]
    assert whole_timesteps(torch.tensor([9.0, 9.0, 8.9]), 10).tolist() == [9.0, 8.0, 7.0]
    with pytest.raises(ValueError, match="at most 4"):
        whole_timesteps(torch.arange(5.0), 4)


def test_blended_is_the_mean_of_the_uniform_and_the_sech_distribution():
    scheduler, n = VPSDEScheduler(), 101
    sde = scheduler.sde
    grids = {name: get_time_grid(name, sde, 2001, 1.0, 1e-3) for name in ("uniform", "sech")}
    for i, t in enumerate(get_time_grid("blended", sde, n, 1.0, 1e-3)):
        below = [float((grid >= t).double().mean()) for grid in grids.values()]
        assert sum(below) / 2 == pytest.approx(i / (n - 1), abs=2e-3)


def test_blended_keeps_strengths_near_those_of_the_config():
    """The tenth of image-to-image that ``sech`` would leave of strength 0.3 is why swapped configs do not get it."""
    own, blended, sech = (
        strengths(VPSDEScheduler.from_config(STABLE_DIFFUSION, time_grid=grid)) for grid in (None, "blended", "sech")
    )
    assert own == pytest.approx([0.782, 0.482, 0.282], abs=0.01)
    assert all(abs(b - o) < 0.16 for b, o in zip(blended, own, strict=True))
    assert sech[1] < 0.25 and sech[2] < 0.05


def test_the_shift_of_a_flow_moves_uniform_times_only():
    stock = diffusers.FlowMatchEulerDiscreteScheduler
    grids = {}
    for grid in ("uniform", "blended", "sech"):
        for shift in (1.0, 3.0):
            scheduler = FlowSDEScheduler.from_config(stock(shift=shift).config, time_grid=grid)
            scheduler.set_timesteps(9)
            grids[grid, shift] = float(scheduler.sigmas[4])
    assert grids["sech", 1.0] == grids["sech", 3.0]
    assert grids["uniform", 3.0] > grids["blended", 3.0] > grids["blended", 1.0]


@pytest.mark.parametrize("own", [{"time_grid": None}, {"timestep_spacing": "leading"}, {"steps_offset": 1}])
def test_the_grid_of_the_config_is_one_argument_away(own):
    stock = diffusers.DDIMScheduler.from_config(STABLE_DIFFUSION)
    ours = VPSDEScheduler.from_config(STABLE_DIFFUSION, **own)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(7)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = FlowSDEScheduler.from_config(flow.config, time_grid=None)
    for scheduler in (flow, ours):
        scheduler.set_timesteps(7)
    torch.testing.assert_close(ours.timesteps, flow.timesteps, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("named", [{"use_karras_sigmas": True}, {"use_lu_lambdas": True}])
def test_a_grid_that_the_config_names_stays(named):
    ours = VPSDEScheduler.from_config(diffusers.DPMSolverMultistepScheduler(**named).config)
    assert ours.config.time_grid == ("karras" if "use_karras_sigmas" in named else "log_snr")
    assert VESDEScheduler.from_config(diffusers.EDMEulerScheduler().config).config.time_grid == "karras"
    assert VPSDEScheduler().config.time_grid == "sech"


@pytest.mark.parametrize("argument", [{"timestep_spacing": "trailing"}, {"steps_offset": 1}])
def test_a_spacing_beside_a_grid_that_the_config_has_keeps_that_grid(argument):
    flow = FlowSDEScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config, **argument)
    karras = VPSDEScheduler.from_config(diffusers.EulerDiscreteScheduler(use_karras_sigmas=True).config, **argument)
    assert (flow.config.time_grid, karras.config.time_grid) == ("uniform", "karras")
    edm = VESDEScheduler.from_config(diffusers.EDMEulerScheduler().config, **argument)
    assert edm.config.time_grid == "karras"
