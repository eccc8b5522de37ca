"""The diffusers interface: the scheduler is the reference loop, whatever the options, dtypes, shapes and batches."""

import copy
import itertools
import json
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from analytic import PointwiseGaussian
from diffusers import DDIMScheduler, DDPMScheduler
from paths import UserSDE

from diffusers_sde.networks.parametrizations import PREDICTION_TYPES
from diffusers_sde.sampling.correctors import CORRECTORS
from diffusers_sde.sampling.loop import sample
from diffusers_sde.sampling.planning import make_plan
from diffusers_sde.sampling.predictors import PREDICTORS, get_predictor
from diffusers_sde.sampling.time_grids import TIME_GRIDS, get_time_grid
from diffusers_sde.schedulers import (
    FlowSDEScheduler,
    SubVPSDEScheduler,
    VESDEScheduler,
    VPSDEScheduler,
    planned,
)
from diffusers_sde.sdes import SDE, CosineSDE


def user_scheduler(sde):
    """A scheduler for an SDE from outside: the arguments of a shipped one, and another path."""

    class UserSDEScheduler(SubVPSDEScheduler):
        def setup(self, _, **kwargs):
            super().setup(sde, **kwargs)

    return UserSDEScheduler


SCHEDULERS = {
    "ve": VESDEScheduler,
    "vp": VPSDEScheduler,
    "vp_continuous": lambda **kwargs: VPSDEScheduler(**{"continuous": True, **kwargs}),
    "sub_vp": SubVPSDEScheduler,
    "flow": FlowSDEScheduler,
    "user": user_scheduler(UserSDE()),
    "cosine": user_scheduler(CosineSDE()),
}
SHIPPED = {name: SCHEDULERS[name] for name in ("ve", "vp", "sub_vp", "flow")}
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)
every_shipped = pytest.mark.parametrize("name", SHIPPED)

SAMPLERS = [
    (predictor, corrector)
    for predictor, corrector in itertools.product(PREDICTORS, [None, *CORRECTORS])
    if PREDICTORS[predictor].calls or corrector
]
every_sampler = pytest.mark.parametrize("predictor, corrector", SAMPLERS)


def build(name, predictor="exponential", corrector=None, **kwargs):
    kwargs.setdefault("time_grid", "uniform")
    # A plain solver unless a test asks for more: what it then does is easy to write down.
    for key, plain in {"solver_order": 1, "solver_correction": False, "gaussian_std": 0.0}.items():
        kwargs.setdefault(key, plain)
    if name == "vp":
        kwargs.setdefault("num_train_timesteps", 100)  # a short table keeps the tests short
        kwargs.setdefault("beta_end", 0.2)
    if PREDICTORS[predictor].deterministic:
        kwargs.setdefault("probability_flow", True)
    return SCHEDULERS[name](predictor=predictor, corrector=corrector, **kwargs)


def start_times(scheduler, n):
    """Levels that leave out the point without signal, where epsilon and score say nothing."""
    if torch.isneginf(scheduler.sde.log_snr(scheduler.sde.t_max)):
        return {"timesteps": torch.linspace(950, 10, n, dtype=torch.float64)}
    return {"num_inference_steps": n}


def loop(scheduler, network, x, generator=None, **set_timesteps):
    """What every pipeline does; ``network`` is called with (input, index of the call)."""
    scheduler.set_timesteps(**set_timesteps)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(scheduler.scale_model_input(x, t), i), t, x, generator=generator).prev_sample
    return x


def any_network(x, i):
    """Elementwise, and another function at each call, so that calls in the wrong order show."""
    return torch.sin(3.0 * x + 0.1 * i) * 0.7


MODEL = PointwiseGaussian()


def exact_network(scheduler, model=MODEL):
    """The output that a perfect network would have; elementwise."""
    ts = [float(t) for t in scheduler.sde_time(scheduler.timesteps.double())]

    def network(x, i):
        alpha, sigma = scheduler.sde.alpha(ts[i]), scheduler.sde.sigma(ts[i])
        x = x / float(scheduler.parametrization.input_scale(alpha, sigma))
        output = scheduler.parametrization.from_x0(model.denoise(x.double(), alpha, sigma), x.double(), alpha, sigma)
        return output.to(x.dtype)

    return network


# ---------------------------------------------------------------------- the scheduler is the reference loop


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@every_scheduler
def test_bit_for_bit_the_reference_loop(name, prediction_type):
    """``sample`` on the folded plan, for every predictor, corrector, and solver order."""
    for (predictor, corrector), order in itertools.product(SAMPLERS, (1, 3)):
        if order > 1 and predictor != "exponential":
            continue
        n = 4 if order == 1 else 14  # of few levels the order is 2
        scheduler = build(name, predictor, corrector, prediction_type=prediction_type, solver_order=order, snr=0.1,
                          correct_steps=2)  # fmt: skip
        sde, kwargs = scheduler.sde, start_times(scheduler, n)
        if "timesteps" in kwargs:
            times = scheduler.sde_time(kwargs["timesteps"])
        else:
            times = get_time_grid("uniform", sde, n, sde.t_max, scheduler.config.sampling_eps)
        plan = make_plan(
            sde,
            times,
            get_predictor(predictor).from_config(scheduler.config),
            corrector,
            2,
            0.1,
            scheduler.stochasticity,
        ).fold(scheduler.parametrization, sde)
        t = torch.tensor([row.t for row in plan.rows], dtype=torch.float64)
        scales = scheduler.parametrization.input_scale(sde.alpha(t), sde.sigma(t)).tolist()
        calls = itertools.count()

        def network(x, t):
            i = next(calls)  # noqa: B023
            return any_network(x * scales[i] if scales[i] != 1 else x, i)  # noqa: B023

        x = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0)) * sde.prior_std
        expected = sample(plan, network, x, torch.Generator().manual_seed(1))
        got = loop(scheduler, any_network, x, torch.Generator().manual_seed(1), **kwargs)
        assert torch.equal(got, expected), (predictor, corrector, order)
        assert torch.isfinite(got).all() and len(scheduler.timesteps) == len(plan.rows)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@every_scheduler
def test_pred_original_sample_is_the_denoised_estimate(name, prediction_type):
    scheduler, model = build(name, prediction_type=prediction_type), PointwiseGaussian()
    scheduler.set_timesteps(**start_times(scheduler, 5))
    network, x = exact_network(scheduler), torch.randn(2, 3, dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        time = scheduler.sde_time(t.double())
        exact = model.denoise(x, scheduler.sde.alpha(time), scheduler.sde.sigma(time))
        out = scheduler.step(network(scheduler.scale_model_input(x, t), i), t, x)
        # timesteps are float32, whatever the sample
        torch.testing.assert_close(out.pred_original_sample, exact, rtol=1e-3, atol=1e-3)
        x = out.prev_sample
    torch.testing.assert_close(x, out.pred_original_sample)


@every_scheduler
def test_a_tuple_on_request(name):
    scheduler = build(name, prediction_type="v_prediction")
    for i in range(2):
        scheduler.set_timesteps(3)
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
        t, output = scheduler.timesteps[0], any_network(x, 0)
        result = scheduler.step(output, t, x, torch.Generator().manual_seed(1), return_dict=i == 0)
        if i == 0:
            expected = (result.prev_sample, result.pred_original_sample)
        else:
            prev, x0_hat = result
            assert isinstance(result, tuple) and len(result) == 2
            assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])
            assert torch.equal(prev, expected[0]) and torch.equal(x0_hat, expected[1])


@every_sampler
@pytest.mark.parametrize("name", ["ve", "vp", "flow"])
def test_clipping_reaches_the_predictor_and_not_the_corrector(name, predictor, corrector):
    """With bounds that nothing reaches it changes rounding only; with tight ones the final sample keeps them."""
    kwargs = {"prediction_type": "v_prediction", "correct_steps": 1, "solver_order": 2, "snr": 0.1}
    x = torch.randn(2, 3, dtype=torch.float64)
    results = []
    for clip in ({}, {"clip_sample": True, "clip_sample_range": 1e6}, {"clip_sample": True, "clip_sample_range": 0.25}):
        scheduler = build(name, predictor, corrector, **kwargs, **clip)
        y = x * scheduler.init_noise_sigma
        results.append(loop(scheduler, any_network, y, torch.Generator().manual_seed(1), num_inference_steps=4))
    torch.testing.assert_close(results[0], results[1], rtol=1e-7, atol=1e-7)
    assert (results[2].abs() <= 0.25).all()


# ---------------------------------------------------------------------- batches, shapes, dtypes


@pytest.mark.parametrize("name", ["ve", "vp", "sub_vp", "flow"])
@every_sampler
def test_a_sample_does_not_depend_on_its_batch_mates(name, predictor, corrector):
    """Bit for bit, with one generator for each sample: alone, in a batch of three, and in another order."""
    scheduler = build(name, predictor, corrector, prediction_type="v_prediction", snr=0.1, solver_order=2)
    shape = (3, 4, 4)
    starts = [torch.randn(shape, generator=torch.Generator().manual_seed(10 + i)) for i in range(4)]

    def run(members):
        generators = [torch.Generator().manual_seed(100 + i) for i in members]
        x = torch.stack([starts[i] for i in members]) * scheduler.init_noise_sigma
        return dict(zip(members, loop(scheduler, any_network, x, generators, num_inference_steps=4), strict=True))

    alone = {i: run([i])[i] for i in range(4)}
    for members in ([0, 1, 2, 3], [3, 1], [2, 0, 1]):
        for i, value in run(members).items():
            assert torch.equal(value, alone[i])


def test_batch_norms_do_depend_on_the_batch():
    """langevin_norm="batch" is the official behaviour, and the reason for the default."""
    results = []
    for norm in ("sample", "batch"):
        scheduler = build("ve", "reverse_diffusion", "langevin", langevin_norm=norm)
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([50.0, 5.0])[:, None, None]
        runs = []
        for members in ([0], [0, 1]):
            generators = [torch.Generator().manual_seed(i) for i in members]
            runs.append(loop(scheduler, any_network, x[members], generators, num_inference_steps=4)[0])
        results.append(torch.equal(*runs))
    assert results == [True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@every_sampler
@every_shipped
def test_dtype_in_is_dtype_out(name, predictor, corrector, dtype):
    scheduler = build(name, predictor, corrector, prediction_type="v_prediction", solver_order=2)
    scheduler.set_timesteps(3)
    x = (torch.randn(2, 3) * scheduler.init_noise_sigma).to(dtype)
    for i, t in enumerate(scheduler.timesteps):
        out = scheduler.step(any_network(x, i), t, x)
        assert out.prev_sample.dtype == out.pred_original_sample.dtype == dtype
        x = out.prev_sample
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 4), (2, 3, 4, 4), (2, 3, 2, 4, 4), (1, 2, 1, 2, 1, 2)])
@pytest.mark.parametrize("predictor, corrector", [("exponential", "langevin"), ("heun", "annealed_langevin")])
def test_any_number_of_dimensions(shape, predictor, corrector):
    scheduler = build("vp", predictor, corrector, prediction_type="edm")
    x = torch.randn(shape)
    out = loop(scheduler, any_network, x, torch.Generator().manual_seed(0), num_inference_steps=3)
    assert out.shape == shape and torch.isfinite(out).all()


@pytest.mark.parametrize("predictor, corrector", [("exponential", "langevin"), ("heun", None)])
def test_a_scheduler_is_used_again_and_again(predictor, corrector):
    """No state survives set_timesteps: not the history, not the index, not the begin index, not a half-finished run."""
    scheduler = build("vp", predictor, corrector, solver_order=3)

    def run(n, shape):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return loop(scheduler, any_network, x, torch.Generator().manual_seed(1), num_inference_steps=n)

    first = run(6, (2, 3))
    run(3, (4, 1, 2))
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2 * scheduler.order)
    x = torch.randn(7)
    for t in scheduler.timesteps[2 * scheduler.order : -1]:
        x = scheduler.step(any_network(x, 0), t, x).prev_sample
    assert torch.equal(run(6, (2, 3)), first)
    assert scheduler.begin_index is None


# ---------------------------------------------------------------------- timesteps


@every_sampler
@every_scheduler
def test_timesteps_say_where_the_network_is_called(name, predictor, corrector):
    n, m = 5, 2
    scheduler = build(name, predictor, corrector, correct_steps=m, prediction_type="v_prediction")
    scheduler.set_timesteps(n)
    calls, corrections = PREDICTORS[predictor].calls, m if corrector else 0
    assert scheduler.order == calls + corrections
    assert len(scheduler.timesteps) == (n - 1) * scheduler.order + corrections + 1
    assert scheduler.num_inference_steps == n and len(scheduler) == scheduler.config.num_train_timesteps
    t = scheduler.sde_time(scheduler.timesteps)
    level = t[:: scheduler.order][:n] if calls < 2 else t[:: scheduler.order]
    end = scheduler.config.sampling_eps
    assert float(level[-1]) == pytest.approx(end, rel=1e-4 if name != "ve" else 1e-1)
    if corrections:
        for k in range(n - 1):
            group = scheduler.timesteps[k * scheduler.order :][: corrections + min(calls, 1)]
            assert (group == group[0]).all()
    assert (scheduler.timesteps.double().diff() <= 0).all()


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("n", [2, 10, 333, 1000])
def test_default_timesteps_are_those_of_ddpm(spacing, n):
    ours, theirs = VPSDEScheduler(time_grid=None, timestep_spacing=spacing), DDPMScheduler(timestep_spacing=spacing)
    ours.set_timesteps(n)
    theirs.set_timesteps(n)
    assert ours.timesteps.dtype == torch.int64 and torch.equal(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize("grid", TIME_GRIDS)
@every_shipped
def test_every_grid(name, grid):
    scheduler = build(name, time_grid=grid, prediction_type="v_prediction")
    x = torch.randn(2, 3) * scheduler.init_noise_sigma
    assert torch.isfinite(loop(scheduler, any_network, x, num_inference_steps=7)).all()
    assert len(scheduler.timesteps) == 7 and len(scheduler.sigmas) == 8 and float(scheduler.sigmas[-1]) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("steps", [50, 1000])
def test_timesteps_cast_by_a_pipeline_find_their_rows(steps, dtype):
    """1000 timesteps are 506 different numbers in bfloat16: a look-up by equality would repeat or skip steps."""
    results = []
    for cast in (torch.int64, dtype):
        scheduler = VPSDEScheduler(predictor="exponential", solver_order=2)
        scheduler.set_timesteps(steps)
        x, generator = torch.randn(1, 2, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
        for i, t in enumerate(scheduler.timesteps.to(cast)):
            x = scheduler.step(any_network(x, i), t, x, generator=generator).prev_sample
        results.append(x)
    assert torch.equal(*results)


def test_a_timestep_knows_its_index():
    scheduler = build("vp", "exponential", "langevin")
    scheduler.set_timesteps(6)
    assert [scheduler.index_for_timestep(t) for t in scheduler.timesteps] == list(range(12))
    assert scheduler.index_for_timestep(float(scheduler.timesteps[4])) == 4
    assert scheduler.index_for_timestep(scheduler.timesteps[4].clone() + 0.2) == 4


@pytest.mark.parametrize("n", [4, 9])
def test_custom_timesteps_and_sigmas(n):
    """The same levels by number, by timestep and by sigma/alpha."""
    scheduler = VPSDEScheduler(prediction_type="epsilon", time_grid=None)  # whose timesteps are integers
    x = torch.randn(2, 3)
    results = [loop(scheduler, any_network, x, torch.Generator().manual_seed(0), num_inference_steps=n)]
    timesteps, sigmas = scheduler.timesteps.tolist(), scheduler.sigmas.double()
    results.append(loop(scheduler, any_network, x, torch.Generator().manual_seed(0), timesteps=timesteps))
    results.append(loop(scheduler, any_network, x, torch.Generator().manual_seed(0), sigmas=sigmas))
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("conditioning", ["discrete", "continuous", "score_sde", "sigma", "log_sigma", "edm"])
@every_shipped
def test_sde_time_inverts_the_timesteps(name, conditioning):
    scheduler = build(name, time_conditioning=conditioning, prediction_type="v_prediction")
    scheduler.set_timesteps(timesteps=scheduler.conditioning.timestep(scheduler.sde, [0.9, 0.5, 0.1]))
    t = scheduler.sde_time(scheduler.timesteps)
    torch.testing.assert_close(t.double(), torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64), rtol=1e-4, atol=1e-5)
    assert scheduler.sde_time(scheduler.timesteps[0]).shape == ()


# ---------------------------------------------------------------------- a start in the middle


def plan_from(scheduler, times):
    """The reference loop over the given levels with this scheduler's options."""
    config = scheduler.config
    predictor = get_predictor(config.predictor).from_config(config)
    eta = scheduler.stochasticity
    plan = make_plan(scheduler.sde, times, predictor, config.corrector, config.correct_steps, config.snr, eta)
    return plan.fold(scheduler.parametrization, scheduler.sde)


@pytest.mark.parametrize("how", ["begin_index", "element", "value"])
@pytest.mark.parametrize("level", [1, 3, 5])
@every_sampler
def test_image_to_image_starts_at_any_level(predictor, corrector, level, how):
    """The rest of the run is the plan laid out from that level: a multistep history starts anew."""
    n = 20
    scheduler = build("vp", predictor, corrector, solver_order=3, correct_steps=2, snr=0.1)
    scheduler.set_timesteps(n)
    sde = scheduler.sde
    times = get_time_grid("uniform", sde, n, 1.0, scheduler.config.sampling_eps)[level:]
    begin = level * scheduler.order
    if how == "begin_index":
        scheduler.set_begin_index(begin)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    calls = itertools.count()
    expected = sample(
        plan_from(scheduler, times), lambda x, t: any_network(x, next(calls)), x, torch.Generator().manual_seed(1)
    )
    generator = torch.Generator().manual_seed(1)
    for i, t in enumerate(scheduler.timesteps[begin:]):
        t = float(t) if how == "value" else t
        x = scheduler.step(any_network(x, i), t, x, generator=generator).prev_sample
    assert torch.equal(x, expected)
    assert scheduler.step_index == len(scheduler.timesteps)


@pytest.mark.parametrize("correct_steps, by_index", [(1, False), (2, False), (2, True)])
def test_a_start_between_corrector_and_predictor_predicts_from_that_level(correct_steps, by_index):
    """The sample was noised to this timestep, so its own predictor row is what comes next."""
    scheduler = build("vp", "ancestral", "langevin", correct_steps=correct_steps)
    scheduler.set_timesteps(6)
    index = 3 * scheduler.order - 1  # the predictor of level 2
    if by_index:
        scheduler.set_begin_index(index)
    x = torch.randn(2, 3)
    times = get_time_grid("uniform", scheduler.sde, 6, 1.0, scheduler.config.sampling_eps)
    row = plan_from(scheduler, times).rows[index]
    assert not row.is_corrector and row.t == float(times[2])
    z = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    t = scheduler.timesteps[index]
    out = scheduler.step(any_network(x, 0), t, x, torch.Generator().manual_seed(1)).prev_sample
    torch.testing.assert_close(out, row.x * x + row.model * any_network(x, 0) + row.noise * z)


def test_an_odd_begin_index_of_a_scheduler_of_order_two_waits_for_the_next_level():
    """SDXL's denoising_start takes order 2 for Heun and starts one call early, with a sample at the next level."""
    scheduler = build("vp", "ancestral", "langevin")
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(5)
    x = torch.randn(2, 3)
    assert torch.equal(scheduler.step(any_network(x, 0), scheduler.timesteps[5], x).prev_sample, x)
    assert not torch.equal(scheduler.step(any_network(x, 0), scheduler.timesteps[6], x).prev_sample, x)


def test_a_start_at_heuns_second_call_waits_for_the_next_level():
    """Its timestep is the next level's, where the sample stands: the level begins with its own first call."""
    scheduler = build("vp", "heun")
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(5)
    x = torch.randn(2, 3)
    assert torch.equal(scheduler.step(any_network(x, 0), scheduler.timesteps[5], x).prev_sample, x)
    out = scheduler.step(any_network(x, 0), scheduler.timesteps[6], x).prev_sample
    times = get_time_grid("uniform", scheduler.sde, 6, 1.0, scheduler.config.sampling_eps)
    row = plan_from(scheduler, times).rows[6]
    torch.testing.assert_close(out, row.x * x + row.model * any_network(x, 0))


# ---------------------------------------------------------------------- add_noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@every_scheduler
def test_add_noise_is_the_marginal(name, dtype):
    scheduler = build(name, prediction_type="v_prediction")
    sde = scheduler.sde
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64) * sde.t_max
    x0, noise = torch.randn(2, 3, 2, 4).to(dtype)
    noisy = scheduler.add_noise(x0, noise, scheduler.conditioning.timestep(sde, t))
    assert noisy.dtype == dtype
    for i in range(3):
        expected = float(sde.alpha(t[i])) * x0[i].double() + float(sde.sigma(t[i])) * noise[i].double()
        torch.testing.assert_close(noisy[i].double(), expected, rtol=2e-3, atol=2e-3 * sde.prior_std)
    one = scheduler.add_noise(x0, noise, scheduler.conditioning.timestep(sde, t[1]))
    torch.testing.assert_close(one[1], noisy[1])
    again = scheduler.scale_noise(x0, scheduler.conditioning.timestep(sde, t), noise)
    assert torch.equal(again, noisy)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_add_noise_equals_ddpm(schedule):
    ours, theirs = VPSDEScheduler(beta_schedule=schedule), DDPMScheduler(beta_schedule=schedule)
    x0, noise, timesteps = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0, 500, 999])
    torch.testing.assert_close(
        ours.add_noise(x0, noise, timesteps), theirs.add_noise(x0, noise, timesteps), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ancestral_on_the_full_table_is_ddpm(variance_type):
    """Step by step, with the same noise; DDPMScheduler computes its coefficients in float32."""
    table = {"num_train_timesteps": 50, "beta_end": 0.2}
    ours = VPSDEScheduler(**table, predictor="ancestral", variance_type=variance_type, time_grid=None)
    theirs = DDPMScheduler(num_train_timesteps=50, beta_end=0.2, variance_type=variance_type, clip_sample=False)
    x = y = torch.randn(2, 3, dtype=torch.float64)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(50)
    for i, t in enumerate(ours.timesteps):
        x = ours.step(any_network(x, i), t, x, generators[0]).prev_sample
        y = theirs.step(any_network(y, i), t, y, generators[1]).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_probability_flow_of_exponential_is_ddim():
    first_order = {"solver_order": 1, "solver_correction": False, "gaussian_std": 0.0, "time_grid": None}
    ours = VPSDEScheduler(probability_flow=True, **first_order)
    theirs = DDIMScheduler(clip_sample=False)
    x = y = torch.randn(2, 3, dtype=torch.float64)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(20)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    for i, t in enumerate(ours.timesteps):
        x = ours.step(any_network(x, i), t, x).prev_sample
        y = theirs.step(any_network(y, i), t, y).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- step: no host reads, nothing built


@pytest.mark.parametrize("prediction_type", ["epsilon", "edm"])
@every_sampler
@pytest.mark.parametrize("name", ["ve", "vp"])
def test_step_reads_no_tensor_back(name, predictor, corrector, prediction_type):
    """On the meta device a tensor has no values: .item(), .cpu(), .nonzero(), bool() and float() of one raise."""
    with pytest.raises(RuntimeError):
        torch.zeros(1, device="meta").item()
    scheduler = build(name, predictor, corrector, prediction_type=prediction_type, solver_order=2)
    scheduler.set_timesteps(4, device="meta")
    x = torch.empty(2, 3, 4, device="meta")
    for t in scheduler.timesteps:
        assert t.device.type == "meta"
        output = torch.empty_like(scheduler.scale_model_input(x, t))
        x = scheduler.step(output, t, x, return_dict=False)[0]
    assert x.device.type == "meta"


@every_sampler
def test_step_builds_no_table(monkeypatch, predictor, corrector):
    scheduler = build("vp", predictor, corrector, solver_order=3)
    scheduler.set_timesteps(5)

    def refuse(*args, **kwargs):
        raise AssertionError("step() computed a schedule")

    monkeypatch.setattr(planned, "make_plan", refuse)
    monkeypatch.setattr(type(scheduler.sde), "_log_snr", refuse)
    monkeypatch.setattr(SDE, "f", refuse)
    x = torch.randn(2, 3)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(any_network(x, i), t, x).prev_sample


# ---------------------------------------------------------------------- saving, copying


CONFIGS = {
    "ve": {"sigma_max": 30.0, "corrector": "langevin", "snr": 0.17, "correct_steps": 2, "predictor": "ancestral"},
    "vp": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "solver_order": 3},
    "sub_vp": {"time_grid": "karras", "rho": 5.0, "prediction_type": "v_prediction", "sampling_eps": 1e-4},
    "flow": {"shift": 3.0, "probability_flow": True, "predictor": "heun", "denoise_final": False},
}


@every_shipped
def test_save_load_copy(name, tmp_path):
    scheduler = SHIPPED[name](**CONFIGS[name])
    scheduler.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert all(stored[key] == value for key, value in CONFIGS[name].items())
    scheduler.set_timesteps(4)
    twins = [
        SHIPPED[name].from_pretrained(tmp_path),
        SHIPPED[name].from_config(scheduler.config),
        SHIPPED[name].from_config(json.loads(json.dumps(dict(scheduler.config)))),
        copy.deepcopy(scheduler),
        pickle.loads(pickle.dumps(scheduler)),
    ]
    x = torch.randn(2, 3) * scheduler.init_noise_sigma
    expected = loop(scheduler, any_network, x, torch.Generator().manual_seed(0), num_inference_steps=4)
    for twin in twins:
        assert type(twin) is type(scheduler) and twin.sde == scheduler.sde
        public = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
        assert {k: v for k, v in twin.config.items() if not k.startswith("_")} == public
        assert torch.equal(
            loop(twin, any_network, x, torch.Generator().manual_seed(0), num_inference_steps=4), expected
        )


def test_a_copy_in_the_middle_of_a_run_goes_on():
    scheduler = build("vp", "exponential", solver_order=3)
    scheduler.set_timesteps(6)
    x, generator = torch.randn(2, 3), torch.Generator().manual_seed(0)
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(any_network(x, 0), t, x, generator).prev_sample
    twins = [scheduler, copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))]
    results = []
    for twin in twins:
        y, g = x, torch.Generator().manual_seed(5)
        for t in twin.timesteps[3:]:
            y = twin.step(any_network(y, 0), t, y, g).prev_sample
        results.append(y)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("theirs", [DDPMScheduler, DDIMScheduler])
def test_the_betas_of_a_loaded_config_survive_a_swap(theirs, tmp_path):
    """A config that was read from disk once silently became beta 0.1/20."""
    stock = theirs(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction")
    stock.save_pretrained(tmp_path)
    loaded = theirs.from_pretrained(tmp_path)
    ours = VPSDEScheduler.from_config(loaded.config)
    torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert ours.config.prediction_type == "v_prediction"
    back = theirs.from_config(ours.config)
    assert torch.equal(back.alphas_cumprod, stock.alphas_cumprod) and back.config.prediction_type == "v_prediction"


# ---------------------------------------------------------------------- bad input

CONSTRUCTION = [
    ({"predictor": "euler"}, ["predictor", "ancestral", "euler"]),
    ({"corrector": "mala"}, ["corrector", "langevin", "mala"]),
    ({"prediction_type": "eps"}, ["prediction_type", "epsilon", "eps"]),
    ({"time_grid": "quadratic"}, ["time_grid", "karras", "quadratic"]),
    ({"time_conditioning": "t"}, ["time_conditioning", "continuous"]),
    ({"langevin_norm": "mean"}, ["langevin_norm", "sample", "batch", "mean"]),
    ({"variance_type": "huge"}, ["variance_type", "fixed_small", "huge"]),
    ({"solver_order": 4}, ["solver_order", "4"]),
    ({"corrector": "langevin", "snr": -0.1}, ["snr", "-0.1"]),
    ({"corrector": "langevin", "correct_steps": 0}, ["correct_steps", "0"]),
    ({"predictor": "heun"}, ["heun", "probability_flow"]),
    ({"predictor": "none"}, ["none", "corrector"]),
    ({"stochasticity": -1.0}, ["stochasticity"]),
    ({"sampling_eps": 0.0}, ["sampling_eps"]),
    ({"sampling_eps": 1.0}, ["sampling_eps"]),
    ({"time_grid": "karras", "rho": -1.0}, ["rho"]),
    ({"clip_sample": True, "clip_sample_range": 0.0}, ["clip_sample_range"]),
    ({"prediction_type": "edm", "sigma_data": -1.0}, ["sigma_data"]),
    ({"num_train_timesteps": 0}, ["num_train_timesteps"]),
]


@pytest.mark.parametrize("arguments, words", CONSTRUCTION, ids=lambda v: str(v) if isinstance(v, dict) else "")
@every_shipped
def test_bad_construction_names_the_argument(name, arguments, words):
    with pytest.raises(ValueError) as error:
        SHIPPED[name](**arguments)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: VPSDEScheduler(beta_schedule="cosine"), ["beta_schedule", "squaredcos_cap_v2"]),
        (lambda: VPSDEScheduler(trained_betas=[0.1, 0.2]), ["trained_betas", "num_train_timesteps"]),
        (lambda: VPSDEScheduler(continuous=True, beta_schedule="scaled_linear"), ["continuous", "beta_schedule"]),
        (lambda: VPSDEScheduler(continuous=True, num_train_timesteps=0), ["num_train_timesteps"]),
        (lambda: VPSDEScheduler(beta_end=-1.0), ["beta_end"]),
        (lambda: VESDEScheduler(sigma_min=2.0, sigma_max=1.0), ["sigma_min", "sigma_max"]),
        (lambda: FlowSDEScheduler(shift=0.0), ["shift"]),
    ],
)
def test_bad_paths_name_the_argument(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words)


def test_a_misspelt_argument_is_not_swallowed():
    with pytest.raises(TypeError, match="probabilty_flow"):
        VPSDEScheduler(probabilty_flow=True)


@pytest.mark.parametrize("steps", [0, -3, 2.5, "10", True, float("nan"), float("inf")])
@every_shipped
def test_bad_number_of_steps(name, steps):
    scheduler = SHIPPED[name]()
    with pytest.raises(ValueError, match="num_inference_steps"):
        scheduler.set_timesteps(steps)


def test_numpy_and_tensor_counts_are_counts():
    scheduler = VPSDEScheduler()
    for steps in (np.int64(5), 5.0, torch.tensor(5)):
        scheduler.set_timesteps(steps)
        assert scheduler.num_inference_steps == 5 and isinstance(scheduler.num_inference_steps, int)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_more_steps_than_the_table_has(spacing):
    with pytest.raises(ValueError, match=r"num_inference_steps must lie in 1\.\.1000"):
        VPSDEScheduler(time_grid=None, timestep_spacing=spacing).set_timesteps(1001)


def test_unknown_spacing():
    with pytest.raises(ValueError, match="timestep_spacing must be one of leading, linspace, trailing"):
        VPSDEScheduler(time_grid=None, timestep_spacing="even").set_timesteps(10)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({}, ["num_inference_steps", "timesteps", "sigmas"]),
        ({"timesteps": [500, 100], "sigmas": [1.0, 0.5]}, ["timesteps", "sigmas"]),
        ({"timesteps": [100, 500]}, ["times", "decreasing"]),
        ({"timesteps": [1500, 500]}, ["timesteps", "999"]),
        ({"timesteps": [-5, -6]}, ["timesteps"]),
        ({"sigmas": [-1.0]}, ["sigmas"]),
        ({"sigmas": [1.0, 0.5], "num_inference_steps": 5}, ["num_inference_steps", "5"]),
    ],
)
def test_bad_custom_levels(kwargs, words):
    with pytest.raises(ValueError) as error:
        VPSDEScheduler().set_timesteps(**kwargs)
    assert all(word in str(error.value) for word in words)


def test_step_before_set_timesteps_and_beyond_the_end():
    scheduler, x = VPSDEScheduler(), torch.randn(2, 3)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 999, x)
    loop(scheduler, any_network, x, num_inference_steps=3)
    with pytest.raises(ValueError, match="All 3 steps are done"):
        scheduler.step(x, scheduler.timesteps[-1], x)


def test_generators_must_be_one_for_each_sample():
    scheduler, x = VPSDEScheduler(), torch.randn(3, 2)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="list of 2, but there are 3"):
        scheduler.step(x, scheduler.timesteps[0], x, generator=[torch.Generator(), torch.Generator()])


def test_epsilon_cannot_start_from_pure_noise():
    """The error says what can."""
    with pytest.raises(ValueError, match="v_prediction"):
        VPSDEScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler = VPSDEScheduler(rescale_betas_zero_snr=True, timestep_spacing="leading")
    with pytest.raises(ValueError, match="v_prediction"):
        scheduler.set_timesteps(timesteps=[999, 500])
    VPSDEScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    ).set_timesteps(10)


@dataclass(frozen=True)
class OffsetSDE(SDE):
    """A path whose time does not end at 1."""

    t_max: float = 3.0

    def _log_alpha(self, t):
        return -0.2 * t

    def _log_sigma(self, t):
        return torch.log(t)


def test_a_path_of_ones_own_samples_its_data():
    """Two functions are enough for the whole stack: data N(0.3, 0.6^2) come back through a scheduler, to 3 %."""
    for sde in (UserSDE(), OffsetSDE()):
        scheduler = user_scheduler(sde)(time_grid="log_snr", solver_order=2, prediction_type="epsilon")
        scheduler.set_timesteps(60)
        n, model = 20_000, PointwiseGaussian()
        mean = float(sde.alpha(sde.t_max)) * model.mean
        std = (float(sde.alpha(sde.t_max)) ** 2 * model.std**2 + sde.prior_std**2) ** 0.5
        x = mean + std * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        network, generator = exact_network(scheduler), torch.Generator().manual_seed(1)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(network(scheduler.scale_model_input(x, t), i), t, x, generator).prev_sample
        # 5 standard errors of the mean and of the standard deviation: false-alarm rate below 1e-6 each.
        assert abs(float(x.mean()) - 0.3) < 5 * 0.6 / n**0.5
        assert abs(float(x.std()) / 0.6 - 1) < 5 / (2 * n) ** 0.5 + 0.005
