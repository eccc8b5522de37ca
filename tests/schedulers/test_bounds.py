"""``bound_above_sigma``: x0_hat kept in the data's range at high noise, and left alone at low noise."""

import json

import diffusers
import pytest
import torch
from analytic import GaussianMixture
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_sde import FlowSDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.networks.parametrizations import PREDICTION_TYPES
from diffusers_sde.sampling import make_plan, sample
from diffusers_sde.sampling.predictors import get_predictor
from diffusers_sde.schedulers.conversion import FAR_OUT

SCHEDULERS = {"vp": VPSDEScheduler, "ve": VESDEScheduler, "sub_vp": SubVPSDEScheduler, "flow": FlowSDEScheduler}
LOW, HIGH, ABOVE = -0.25, 0.75, 1.5
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def outside(x, t):
    """An estimate that leaves the range on both sides and depends on the sample and on the time."""
    return 2.0 * torch.tanh(3.0 * x + 1.0) - 0.3 * t


def run(scheduler, estimate, x, seed=1, begin=0, **levels):
    """The scheduler's loop with the network whose x0_hat is ``estimate(x, t)``, in float64."""
    scheduler.set_timesteps(**levels)
    scheduler.set_begin_index(begin)
    generator, estimates = torch.Generator().manual_seed(seed), []
    for i in range(begin, len(scheduler.timesteps)):
        time = torch.tensor(scheduler.rows[i].t, dtype=torch.float64)
        alpha, sigma = scheduler.sde.alpha(time), scheduler.sde.sigma(time)
        output = scheduler.parametrization.from_x0(estimate(x, float(time)), x, alpha, sigma)
        x, x0_hat = scheduler.step(output, scheduler.timesteps[i], x, generator=generator, return_dict=False)
        estimates.append(x0_hat)
    return x, estimates


def bounded(sde):
    """The same estimate, clipped where sigma/alpha is above the threshold: what an unbounded sampler would be given."""

    def estimate(x, t):
        value = outside(x, float(t))
        is_noisy = float(torch.exp(-0.5 * sde.log_snr(t))) > ABOVE
        return value.clamp(LOW, HIGH) if is_noisy else value

    return estimate


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "sampler",
    [
        {},
        {"probability_flow": True, "solver_order": 3},
        {"predictor": "heun", "probability_flow": True},
        {"predictor": "singlestep"},
        {"predictor": "euler_maruyama"},
    ],
    ids=["default", "multistep flow", "heun", "singlestep", "euler_maruyama"],
)
@every_scheduler
def test_it_is_the_sampler_of_a_network_that_is_bounded_there(name, sampler, prediction_type):
    """Against the reference loop of the plan on x0_hat, which knows neither bounds nor parametrisations."""
    scheduler = SCHEDULERS[name](
        prediction_type=prediction_type, bound_above_sigma=ABOVE, data_range=[LOW, HIGH], **sampler
    )
    # Half of the levels lie above the threshold; none is pure noise, of which epsilon says nothing.
    sigmas = torch.tensor([12.0, 6.0, 3.0, 1.6, 1.4, 0.7, 0.3, 0.1], dtype=torch.float64)
    times = scheduler.sde.time_of(-2.0 * torch.log(sigmas))
    plan = make_plan(
        scheduler.sde,
        times,
        get_predictor(scheduler.config.predictor).from_config(scheduler.config),
        stochasticity=scheduler.stochasticity,
    )
    x = 5.0 * torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = sample(plan, bounded(scheduler.sde), x, torch.Generator().manual_seed(1))
    levels = {"sigmas": times if name == "flow" else sigmas}
    got, estimates = run(scheduler, outside, x, **levels)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    for row, x0_hat in zip(scheduler.rows, estimates, strict=True):
        is_noisy = float(torch.exp(-0.5 * scheduler.sde.log_snr(row.t))) > ABOVE
        assert row.of_estimate == is_noisy, "rows where it does not act are folded"
        assert bool(((x0_hat >= LOW) & (x0_hat <= HIGH)).all()) == is_noisy


def test_the_range_is_clip_sample_range_where_none_is_given():
    scheduler = VPSDEScheduler(prediction_type="sample", bound_above_sigma=0.0, clip_sample_range=0.3)
    _, estimates = run(scheduler, outside, torch.randn(2, 3, dtype=torch.float64), num_inference_steps=6)
    assert all(float(x0_hat.abs().max()) <= 0.3 for x0_hat in estimates)


@every_scheduler
def test_with_an_exact_score_it_changes_nothing(name):
    """E[x_0 | x_t] of data lies in their range: here of points, and the samples are those without a bound."""
    points = GaussianMixture([0.3, 0.3, 0.4], [[LOW, HIGH], [HIGH, 0.0], [0.2, LOW]], torch.full((3, 2), 1e-9))
    x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for flow in (True, False):
        ends = []
        for given in ({}, {"bound_above_sigma": 0.5, "data_range": (LOW - 1e-6, HIGH + 1e-6)}):
            scheduler = SCHEDULERS[name](prediction_type="sample", probability_flow=flow, **given)
            denoise = points.denoiser(scheduler.sde)
            ends.append(run(scheduler, denoise, x * scheduler.init_noise_sigma, num_inference_steps=10)[0])
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-9)


def test_the_corrector_takes_what_the_network_says():
    """At all noise levels: where the predictor only repeats the sample, a bound changes nothing."""
    x, ends = torch.randn(2, 3, dtype=torch.float64), []
    for above in (None, 0.0):
        scheduler = VPSDEScheduler(
            prediction_type="sample", predictor="none", corrector="ornstein_uhlenbeck", snr=0.3, denoise_final=False,
            bound_above_sigma=above, data_range=[LOW, HIGH],
        )  # fmt: skip
        ends.append(run(scheduler, outside, x, num_inference_steps=5)[0])
    assert torch.equal(*ends)


def test_a_start_in_the_middle_is_bounded_by_its_noise():
    """The plan is laid out anew there; rows are those of the whole run at the same noise."""
    scheduler = VESDEScheduler(prediction_type="sample", bound_above_sigma=ABOVE, data_range=[LOW, HIGH])
    x = 2.0 * torch.randn(2, 3, dtype=torch.float64)
    for begin in (2, 4, 8):
        _, estimates = run(scheduler, outside, x, begin=begin, num_inference_steps=10)
        for row, x0_hat in zip(scheduler.rows[begin:], estimates, strict=True):
            is_noisy = float(scheduler.sde.sigma(row.t)) > ABOVE
            assert row.of_estimate == is_noisy
            assert bool((x0_hat == x0_hat.clamp(LOW, HIGH)).all()) == is_noisy


@pytest.mark.parametrize(
    "sampler",
    [{}, {"corrector": "ornstein_uhlenbeck", "snr": 0.3}, {"predictor": "heun", "probability_flow": True},
     {"clip_sample": True}],
    ids=["default", "predictor-corrector", "heun", "clipped"],
)  # fmt: skip
def test_a_compiled_step_is_the_eager_one_in_few_graphs(sampler):
    torch._dynamo.reset()
    scheduler = VPSDEScheduler(time_grid="log_snr", bound_above_sigma=2.0, data_range=[LOW, HIGH], **sampler)
    counter = CompileCounterWithBackend("eager")
    ends = []
    for step in (scheduler.step, torch.compile(scheduler.step, fullgraph=True, backend=counter)):
        scheduler.set_timesteps(12)
        scheduler.set_begin_index(0)
        x, generator = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), None
        torch.manual_seed(1)
        for t in scheduler.timesteps:
            x = step(torch.sin(x), t, x, generator, return_dict=False)[0]
        ends.append(x)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)
    # The first two calls, one for a last row without noise, and two per kind of row: bounded and not.
    assert counter.frame_count <= 3 + 2 * scheduler.order


def test_the_density_of_a_step_is_bounded_with_it():
    scheduler = VESDEScheduler(
        prediction_type="sample", bound_above_sigma=ABOVE, data_range=[LOW, HIGH], solver_order=1,
        solver_correction=False,
    )  # fmt: skip
    scheduler.set_timesteps(8)
    x = 5.0 * torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps[:-1]):
        output = outside(x, float(t))
        law = scheduler.transition(output, t, x)
        mean = scheduler.rows[i].x * x + scheduler.rows[i].model * (
            output.clamp(LOW, HIGH) if scheduler.rows[i].of_estimate else output
        )
        torch.testing.assert_close(law.mean, mean, rtol=1e-5, atol=1e-5)
        drawn = law.sample(torch.Generator().manual_seed(i))
        x = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(i), return_dict=False)[0]
        assert torch.equal(drawn, x)


@every_scheduler
def test_it_is_saved_and_off_unless_asked_for(name, tmp_path):
    assert SCHEDULERS[name]().config.bound_above_sigma is None
    SCHEDULERS[name](bound_above_sigma=1, data_range=(0, 1)).save_pretrained(tmp_path)
    again = SCHEDULERS[name].from_pretrained(tmp_path)
    assert (again.config.bound_above_sigma, again.config.data_range) == (1.0, [0.0, 1.0])
    file = tmp_path / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in ("bound_above_sigma", "data_range")}))
    assert SCHEDULERS[name].from_pretrained(tmp_path).config.bound_above_sigma is None


# ---------------------------------------------------------------------- swapped configs that have no bound

UNBOUNDED = [
    diffusers.DDPMScheduler(clip_sample=False),
    diffusers.DDIMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2"),
    diffusers.EulerDiscreteScheduler(),
    diffusers.DPMSolverMultistepScheduler(),
]
NOT_IN_NEED = [
    diffusers.DDPMScheduler(),  # which clips everywhere
    diffusers.DDPMScheduler(clip_sample=False, thresholding=True),
    diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    diffusers.DDPMScheduler(clip_sample=False, prediction_type="sample"),
]


@pytest.mark.parametrize("stock", UNBOUNDED, ids=lambda s: type(s).__name__)
def test_a_swapped_epsilon_model_without_a_bound_gets_a_wide_one(stock, tmp_path):
    def bounds(scheduler):
        return {key: scheduler.config[key] for key in FAR_OUT}

    scheduler = VPSDEScheduler.from_config(stock.config)
    assert bounds(scheduler) == FAR_OUT
    scheduler.save_pretrained(tmp_path)
    assert bounds(VPSDEScheduler.from_pretrained(tmp_path)) == FAR_OUT
    back = type(stock).from_config(scheduler.config)
    assert bounds(VPSDEScheduler.from_config(back.config)) == FAR_OUT
    assert dict(type(stock).from_config(back.config).config)["beta_start"] == stock.config.beta_start
    nowhere = {"bound_above_sigma": None, "data_range": None}
    assert bounds(VPSDEScheduler.from_config(stock.config, bound_above_sigma=None)) == nowhere
    assert bounds(VPSDEScheduler.from_config(scheduler.config, **nowhere)) == nowhere
    own = {"bound_above_sigma": 1.0, "data_range": [-1.0, 1.0]}
    assert bounds(VPSDEScheduler.from_config(stock.config, **own)) == own


@pytest.mark.parametrize("stock", NOT_IN_NEED, ids=["clips", "thresholds", "v", "sample"])
def test_other_swapped_models_get_none(stock):
    assert VPSDEScheduler.from_config(stock.config).config.bound_above_sigma is None


def test_flows_and_edm_get_none():
    for cls, stock in (
        (FlowSDEScheduler, diffusers.FlowMatchEulerDiscreteScheduler()),
        (VESDEScheduler, diffusers.EDMEulerScheduler()),
    ):
        assert cls.from_config(stock.config).config.bound_above_sigma is None


def test_the_wide_bound_holds_a_network_that_errs_at_the_start():
    """An error of 0.02 in epsilon is one of hundreds in x0_hat at the start of the cosine schedule."""
    data = GaussianMixture.gaussian([0.3, -0.2], [0.25, 0.25])
    stock = diffusers.DDPMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2")
    ends = {}
    for name, bounds in {"wide": {}, "none": {"bound_above_sigma": None}}.items():
        scheduler = VPSDEScheduler.from_config(stock.config, **bounds)
        denoise = data.denoiser(scheduler.sde)

        def erring(x, t, sde=scheduler.sde, denoise=denoise, error=0.02):
            ratio = float(torch.exp(-0.5 * sde.log_snr(torch.tensor(t, dtype=torch.float64))))
            return denoise(x, torch.tensor(t, dtype=torch.float64)) + error * ratio

        start = torch.randn(400, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        for what, estimate in {"erring": erring, "exact": lambda x, t, f=erring: f(x, t, error=0.0)}.items():
            ends[name, what] = run(scheduler, estimate, start, num_inference_steps=5)[0]
    torch.testing.assert_close(ends["wide", "exact"], ends["none", "exact"], rtol=1e-5, atol=1e-6)
    off = {name: abs(float(ends[name, "erring"].mean() - ends[name, "exact"].mean())) for name in ("wide", "none")}
    assert off["wide"] < 0.2
    assert off["none"] > 3.0
