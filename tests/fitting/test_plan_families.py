"""Plans with parameters: what they are at zero, what they keep whatever the parameters are, and their gradients."""

import math

import pytest
import torch
from analytic import PointwiseGaussian, push_gaussian

from diffusers_sde import FlowSDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.fitting import PARTS, PlanFamily, simulate

SCHEDULERS = {"vp": VPSDEScheduler, "ve": VESDEScheduler, "sub_vp": SubVPSDEScheduler, "flow": FlowSDEScheduler}
SAMPLERS = {
    "default": {},
    "flow": {"probability_flow": True, "solver_order": 3},
    "first": {"solver_order": 1, "solver_correction": False, "gaussian_std": 0.0},
    "langevin": {"corrector": "langevin"},
    "ou": {"corrector": "ornstein_uhlenbeck", "snr": 0.3},
    "twice": {"corrector": "ornstein_uhlenbeck", "snr": 0.3, "correct_steps": 2},
    "singlestep": {"predictor": "singlestep"},
    "heun": {"predictor": "heun", "probability_flow": True},
    "noisy_end": {"denoise_final": False},
}


def family_of(scheduler, levels=5, **changes):
    config = scheduler.config
    options = {
        "corrector": config.corrector,
        "correct_steps": config.correct_steps,
        "snr": config.snr,
        "stochasticity": scheduler.own_stochasticity,
        "denoise_final": config.denoise_final,
        **changes,
    }
    return PlanFamily(scheduler.sde, scheduler.sampling_times(levels), scheduler.own_predictor, **options)


def numbers(family, scale=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(family.size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("path", SCHEDULERS)
def test_zeros_are_the_sampler_itself(path, sampler):
    family = family_of(SCHEDULERS[path](**SAMPLERS[sampler]))
    plan = family.plan(torch.zeros(family.size, dtype=torch.float64))
    assert plan.columns == family.base.columns and plan.kinds == family.base.kinds
    torch.testing.assert_close(plan.table, family.base.table, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "langevin"])
@pytest.mark.parametrize("path", SCHEDULERS)
def test_a_point_stays_a_point(path, sampler):
    """For data that are one point m, samples have the mean alpha m at every level, whatever the parameters are."""
    point, family = 0.7, family_of(SCHEDULERS[path](**SAMPLERS[sampler]))
    parameters = numbers(family)
    plan, sde = family.plan(parameters), family.sde
    moved = {part: bool(parameters[family.slices[part]].any()) for part in PARTS}
    assert moved["grid"] and moved["state"] and moved["estimate"] and moved["inputs"]
    levels = family.level_times(parameters)
    alpha = float(sde.alpha(levels[0]))
    rows = plan.rows_per_level
    for level in range(1, len(levels)):
        mean, _ = push_gaussian(plan.until(level * rows), sde, point, 0.0, alpha * point, 1.0)
        assert mean == pytest.approx(float(sde.alpha(levels[level])) * point, rel=1e-9, abs=1e-12)
    if family.denoise_final:
        mean, variance = push_gaussian(plan, sde, point, 0.0, alpha * point, 1.0)
        assert mean == pytest.approx(point, rel=1e-12) and variance == pytest.approx(0.0, abs=1e-18)


def test_the_point_moves_where_the_equation_is_broken():
    """The same check sees a weight of x0_hat that is a thousandth off."""
    family = family_of(VPSDEScheduler())
    plan = family.plan(numbers(family))
    plan.column("model")[0] *= 1.001
    mean, _ = push_gaussian(plan.until(1), family.sde, 0.7, 0.0, 0.7 * float(family.sde.alpha(family.times[0])), 1.0)
    alpha = float(family.sde.alpha(family.level_times(numbers(family))[1]))
    assert abs(mean - 0.7 * alpha) > 1e-5


@pytest.mark.parametrize("path, sampler", [("vp", "default"), ("ve", "ou"), ("flow", "default"), ("sub_vp", "flow")])
def test_gradients_are_those_of_finite_differences(path, sampler):
    scheduler = SCHEDULERS[path](**{"solver_order": 2, **SAMPLERS[sampler]})
    family, data = family_of(scheduler, 4), PointwiseGaussian(0.3, 0.6)
    start = scheduler.init_noise_sigma * torch.randn(
        64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )

    def denoiser(x, t):  # as PointwiseGaussian, but with gradients in t; not affine, so that nothing cancels
        alpha, sigma = scheduler.sde.alpha(t), scheduler.sde.sigma(t)
        gain = alpha * data.std**2 / (alpha**2 * data.std**2 + sigma**2)
        return data.mean + torch.tanh(gain * (x - alpha * data.mean))

    def loss(parameters):
        x = simulate(family.plan(parameters), denoiser, start, torch.Generator().manual_seed(2))
        return (x.square().mean() - 0.2).square() + x.mean()

    point = numbers(family, 0.1).requires_grad_(True)
    gradient = torch.autograd.grad(loss(point), point)[0]
    assert torch.isfinite(gradient).all()
    with torch.no_grad():
        step = 1e-5
        units = torch.eye(family.size, dtype=torch.float64) * step
        found = torch.stack([(loss(point + e) - loss(point - e)) / (2.0 * step) for e in units])
    end = family.slices["end"]  # cut off at 0: differences see both sides
    keep = torch.ones(family.size, dtype=torch.bool)
    keep[end] = False
    torch.testing.assert_close(gradient[keep], found[keep], rtol=2e-4, atol=2e-7)


def test_checkpointing_changes_no_gradient():
    scheduler = VPSDEScheduler()
    family = family_of(scheduler, 4)
    start = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for checkpointing in (False, True):
        point = numbers(family, 0.1).requires_grad_(True)
        denoiser = lambda x, t: torch.tanh(x * scheduler.sde.alpha(t))  # noqa: E731
        x = simulate(family.plan(point), denoiser, start, torch.Generator().manual_seed(2), checkpointing=checkpointing)
        found.append(torch.autograd.grad(x.square().sum(), point)[0])
    torch.testing.assert_close(*found)


def test_levels_keep_their_order_and_a_share():
    family = family_of(VESDEScheduler(), 8)
    for scale in (1.0, 30.0):
        parameters = numbers(family, scale)
        lam = 0.5 * family.sde.log_snr(family.level_times(parameters))
        length = float(lam[-1] - lam[0])
        assert float((lam[1:] - lam[:-1]).min()) >= 0.99e-3 * length
        assert float(lam[0]) == pytest.approx(0.5 * float(family.sde.log_snr(family.times[0])))
        assert float(lam[-1]) <= 0.5 * float(family.sde.log_snr(family.times[-1])) + 1e-9
        t = family.plan(parameters).column("t")
        assert float(t.max()) <= float(family.times[0]) * (1 + 1e-9)
        assert float(t.min()) >= float(family.times[-1]) * (1 - 1e-9)


def test_a_network_that_knows_whole_timesteps_is_called_there():
    scheduler = VPSDEScheduler(time_grid="blended", sampling_eps=1e-3)
    conditioning, sde = scheduler.conditioning, scheduler.sde
    snap = lambda t: conditioning.time(sde, conditioning.timestep(sde, t).round())  # noqa: E731
    family = family_of(scheduler, 6, snap=snap)
    assert family.slices["inputs"] == slice(family.size, family.size)
    parameters = numbers(family).requires_grad_(True)
    plan = family.plan(parameters)
    fed = conditioning.timestep(sde, plan.column("t").detach())
    torch.testing.assert_close(fed, fed.round(), rtol=0, atol=1e-6)
    gradient = torch.autograd.grad(plan.column("x")[:-1].sum(), parameters)[0]
    assert bool((gradient[family.slices["grid"]] != 0).all())


def test_other_arguments_are_refused():
    scheduler = VPSDEScheduler()
    times = scheduler.sampling_times(4)
    with pytest.raises(ValueError, match="parts"):
        PlanFamily(scheduler.sde, times, scheduler.own_predictor, parts=("gird",))
    with pytest.raises(ValueError, match="times"):
        PlanFamily(scheduler.sde, times.flip(0), scheduler.own_predictor)
    with pytest.raises(ValueError, match="data_std"):
        PlanFamily(scheduler.sde, times, scheduler.own_predictor, data_std=math.nan)
