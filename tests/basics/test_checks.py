"""What is checked in one place: types, ranges and shapes of arguments, before any work is done."""

import json
import math
import time

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from diffusers_sde import (
    ClassConditionalSDEPipeline,
    FlowSDEScheduler,
    InpaintSDEPipeline,
    ProbabilityFlow,
    RestorationSDEPipeline,
    SDEPipeline,
    SubVPSDEScheduler,
    VESDEScheduler,
    VPSDEScheduler,
    make_plan,
    restart_plan,
    sample,
)
from diffusers_sde.basics.checks import (
    check_choice,
    check_flag,
    check_generators,
    check_integer,
    check_number,
    check_numbers,
    check_ordered,
    check_pair,
    check_shape,
    check_tensor,
    check_tolerances,
)
from diffusers_sde.guidance.operators import Downsampling, GaussianBlur, Mask
from diffusers_sde.networks.parametrizations import get_parametrization
from diffusers_sde.schedulers.config_checks import CONFIG_CHECKS
from diffusers_sde.sdes import VPSDE

NAN, INF = math.nan, math.inf
NOT_NUMBERS = ("1", None, True, [1.0], 1j, NAN, INF, -INF, np.array([1.0, 2.0]), torch.zeros(2), dict)
SCHEDULERS = (VPSDEScheduler, SubVPSDEScheduler, VESDEScheduler, FlowSDEScheduler)


# ---------------------------------------------------------------------- the checks themselves


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_what_is_no_number(value):
    with pytest.raises(ValueError, match=r"^size must be a finite number > 0, got .{1,100}\.$"):
        check_number("size", value, above=0)
    with pytest.raises(ValueError, match=r"^size must be an integer >= 0, got .{1,100}\.$"):
        check_integer("size", value, at_least=0)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), torch.tensor(2), torch.tensor(2.0), np.array(2)])
def test_numbers_of_every_library_become_plain(value):
    assert type(check_number("x", value)) is float and check_number("x", value) == 2.0
    assert type(check_integer("x", value)) is int and check_integer("x", value) == 2


@pytest.mark.parametrize(
    "bounds, inside, outside, text",
    [
        ({"above": 0.0}, [1e-300], [0.0, -1.0], "> 0"),
        ({"at_least": 0.0}, [0.0], [-1e-300], ">= 0"),
        ({"below": 1.0}, [-5.0], [1.0], "< 1"),
        ({"at_most": 1.0}, [1.0], [1.1], "<= 1"),
        ({"above": 0.0, "at_most": 1.0}, [1.0], [0.0, 1.1], r"in \(0, 1\]"),
        ({"at_least": 0.0, "below": 1.0}, [0.0], [-0.1, 1.0], r"in \[0, 1\)"),
    ],
)
def test_bounds(bounds, inside, outside, text):
    for value in inside:
        assert check_number("x", value, **bounds) == value
    for value in outside:
        with pytest.raises(ValueError, match=f"^x must be a finite number {text}, got {value}.$"):
            check_number("x", value, **bounds)


def test_integers_have_no_fractions():
    for value in (1e30, 2**31):
        with pytest.raises(ValueError, match=r"^x must be an integer in \[1, 2147483647\], got"):
            check_integer("x", value, at_least=1)
    for value in (1.5, 0, 11):
        with pytest.raises(ValueError, match=rf"^x must be an integer in \[1, 10\], got {value}\.$"):
            check_integer("x", value, at_least=1, at_most=10)


def test_words_flags_and_pairs():
    assert check_choice("x", None, (None, "a")) is None and check_choice("x", "a", {"a": 1}) == "a"
    for value in ("b", 3, ["a"], True, {}):
        with pytest.raises(ValueError, match="^x must be None or one of a, c, got"):
            check_choice("x", value, (None, "a", "c"))
    assert check_flag("x", np.bool_(True)) is True
    for value in (1, "true", None):
        with pytest.raises(ValueError, match="^x must be True or False, got"):
            check_flag("x", value)
    assert check_pair("x", (0, INF)) == (0.0, INF) and check_ordered("a", 1, "b", 2) == (1.0, 2.0)
    for value in ((1.0, 0.0), (0.0,), "ab", (NAN, 1.0), 5, (0.0, 0.0), None, (1, 2, 3), ("a", "b")):
        with pytest.raises(ValueError, match="^x must be two increasing numbers, got"):
            check_pair("x", value)
    with pytest.raises(ValueError, match="^a must be less than b, got 2.0 and 1.0"):
        check_ordered("a", 2, "b", 1)


def test_lists_of_numbers_keep_their_precision():
    values = [0.1, 1 / 3]
    for given in (values, tuple(values), np.array(values), torch.tensor(values, dtype=torch.float64)):
        checked = check_numbers("x", given)
        assert checked.dtype == torch.float64 and checked.tolist() == values
    for given in ([], "abc", None, 5, [[1.0]], [1.0, "a"], [[1], [1, 2]], [True], [1j], [None], {1: 2}):
        with pytest.raises(ValueError, match="^x must be a sequence of at least 1 numbers, got"):
            check_numbers("x", given)


def test_shapes_tensors_and_generators():
    assert check_shape("x", torch.Size((1, 2))) == (1, 2)
    for given in ("188", (), None, 5, (1.0, 8), (0, 8), (-1,), (True, 2)):
        with pytest.raises(ValueError, match="^x must be a shape"):
            check_shape("x", given)
    x = torch.zeros(2, 3)
    assert check_tensor("x", x, (None, 3)) is x
    for given in (x[:0], x[None], x.T, x.to(torch.complex64), x * NAN, x.numpy(), "x", None):
        with pytest.raises(ValueError, match="^x must"):
            check_tensor("x", given, (None, 3))
    generators = (torch.Generator(), torch.Generator())
    assert check_generators(generators, 2) == list(generators) and check_generators(None, 2) is None
    for given in (5, "x", np.random.default_rng(0), [], [1, 2], generators[:1], generators * 2):
        with pytest.raises(ValueError, match="^generator"):
            check_generators(given, 2)


@pytest.mark.parametrize("rtol, atol", [(0.0, 1.0), (1.0, 1.0), (1e-30, 1e-30), ("1", 1.0), (0.1, INF), (0.1, NAN)])
def test_tolerances_without_meaning(rtol, atol):
    with pytest.raises(ValueError, match="[ra]tol"):
        check_tolerances(rtol, atol)


# ---------------------------------------------------------------------- configs of schedulers


WRONG = {
    "predictor": ["expo", 3, None, True, ["heun"]],
    "corrector": ["langevn", 1, True, "", ["langevin"]],
    "correct_steps": [0, -1, 1.5, NAN, "2", None, True, 10**9],
    "snr": [0.0, -0.1, NAN, INF, "0.1", None],
    "stochasticity": [-1.0, NAN, INF, "1", True, [0.5, -1.0], ["1"]],
    "stochastic_indices": [1, [1], [3, 1], [0.5, 2], ["0", 1], [0, NAN]],
    "stochastic_sigmas": [1.0, [1.0], [3.0, 1.0], [-1.0, 1.0], ["0", 1.0], [0.0, NAN]],
    "policy": ["grpo", 1, True],
    "solver_order": [0, 4, 1.5, "2", NAN, True],
    "solver_type": ["huen", 3, None],
    "solver_correction": ["true", 1, None],
    "gaussian_std": [-0.1, NAN, INF, "0"],
    "data_std": [0.0, -1.0, NAN, INF, 1e-10, 1e7, "wide", True],
    "time_grid": ["sehc", 3, True],
    "timestep_spacing": ["trail", None, 7],
    "steps_offset": ["1", NAN, -5, 10**7, 2000, 1.5],
    "rho": [0.0, -1.0, NAN, INF, "7", None],
    "sampling_eps": [0.0, -1.0, 1.0, 2.0, NAN, "1e-3", None],
    "sampling_sigma": [0.0, -1.0, NAN, INF, "0.01", True, 1e-12],
    "clip_sample": ["false", 1, None],
    "clip_sample_range": [0.0, -1.0, NAN, "1", None],
    "bound_above_sigma": [-1.0, NAN, INF, "1", True],
    "data_range": [1.0, [1.0], [0.0, 0.0], [1.0, 0.0], [0.0, INF], [NAN, 1.0], ["a", "b"]],
    "variance_type": ["fixed", 3],
    "langevin_norm": ["all", None],
    "temperature": [0.0, -1.0, NAN, INF, 1e4, "cold", None, True],
    "temperature_std": [0.0, -1.0, NAN, INF, 1e-10, 1e7, "wide"],
    "denoise_final": ["true", 1],
    "probability_flow": ["false", 0],
    "prediction_type": ["eps", None, 5],
    "time_conditioning": ["t", 4],
    "fitted_plan": [3, "plan", {}, {"levels": 3}, []],
    "sigma_data": [0.0, -1.0, NAN, "x", None],
    "num_train_timesteps": [0, -5, 1.5, NAN, "1000", None, 10**9, 1e30],
}
OF_CLASS = {
    VPSDEScheduler: {
        "beta_schedule": ["lin", None, 3],
        "beta_start": [-1.0, NAN, "1e-4", INF, 2.0, None],
        "beta_end": [0.0, NAN, 5.0, "0.02"],
        "trained_betas": [[], [0.1], [NAN] * 1000, [0.1, "a"], "abc", [2.0] * 1000, [[0.1] * 1000]],
        "final_sigmas_type": ["one", 0, None],
        "thresholding": ["true", None],
        "dynamic_thresholding_ratio": [-1.0, 0.0, 2.0, NAN, "x"],
        "sample_max_value": [0.0, 0.5, NAN, -2.0, "2"],
        "rescale_betas_zero_snr": ["true", None],
        "continuous": ["true", None],
        "t_max": [0.0, -1.0, NAN, INF, "10", None, 2.0],
    },
    SubVPSDEScheduler: {
        "beta_start": [-1.0, NAN, "1e-4", INF, 2.0],
        "beta_end": [0.0, NAN, "0.02", -1.0, 5.0],
        "t_max": [0.0, -1.0, NAN, INF, "10", None, 100.0],
    },
    VESDEScheduler: {
        "sigma_min": [0.0, -1.0, NAN, "a", 60.0],
        "sigma_max": [0.0, NAN, INF, "b", 1e-4],
        "preconditioning": ["e", 1],
    },
    FlowSDEScheduler: {
        "shift": [0.0, -1.0, NAN, INF, "3", None],
        "time_shift_type": ["exp", 1],
        "shift_terminal": [1.0, -0.1, NAN, "0.1"],
        "use_dynamic_shifting": ["true", 1],
        "max_shift": ["1"],
        "base_image_seq_len": [0, "256"],
    },
}


@pytest.mark.parametrize("cls", SCHEDULERS, ids=lambda cls: cls.__name__)
def test_wrong_values_of_every_key_are_named(cls, tmp_path):
    """By the constructor, from a dictionary, and from a JSON file that somebody edited by hand."""
    good = cls()
    good.save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    saved = json.loads(file.read_text())
    for key, values in (WRONG | OF_CLASS[cls]).items():
        for value in values:
            where = rf"\b{key}\b"
            with pytest.raises(ValueError, match=where):
                cls(**{key: value})
            with pytest.raises(ValueError, match=where):
                cls.from_config(good.config, **{key: value})
            file.write_text(json.dumps({**saved, key: value}))
            with pytest.raises(ValueError, match=where):
                cls.from_pretrained(tmp_path)
    tested = set(WRONG).union(*OF_CLASS.values()) | {"min_shift", "base_shift", "max_image_seq_len"}
    assert set(good.config) & set(CONFIG_CHECKS) <= tested


@pytest.mark.parametrize("cls", SCHEDULERS, ids=lambda cls: cls.__name__)
def test_every_key_has_a_check(cls):
    keys = cls._get_init_keys(cls) - {"self"}
    assert keys <= set(CONFIG_CHECKS)


def test_numbers_of_numpy_are_saved_as_plain_ones(tmp_path):
    scheduler = VPSDEScheduler(num_train_timesteps=np.int64(100), beta_start=np.float32(1e-3), beta_end=0.2, snr=1)
    scheduler.save_pretrained(tmp_path)
    again = VPSDEScheduler.from_pretrained(tmp_path)
    assert type(scheduler.config.num_train_timesteps) is int
    assert {key: again.config.get(key) for key in CONFIG_CHECKS} == {k: scheduler.config.get(k) for k in CONFIG_CHECKS}


@pytest.mark.parametrize("cls", SCHEDULERS, ids=lambda cls: cls.__name__)
def test_a_short_config_costs_no_gigabytes(cls):
    begun = time.monotonic()
    for n in (10**9, 10**12, 100_001):
        with pytest.raises(ValueError, match="num_train_timesteps must be an integer in .1, 100000"):
            cls(num_train_timesteps=n)
    assert time.monotonic() - begun < 1.0


@pytest.mark.parametrize("key", ["dynamic_thresholding_ratio", "sample_max_value"])
def test_limits_of_thresholding_in_use(key):
    with pytest.raises(ValueError, match=key):
        VPSDEScheduler(thresholding=True, **{key: 0.0})


UNDETERMINED = [
    (VPSDEScheduler, {"rescale_betas_zero_snr": True}),
    (VPSDEScheduler, {"rescale_betas_zero_snr": True, "time_grid": None, "timestep_spacing": "trailing"}),
    (VPSDEScheduler, {"rescale_betas_zero_snr": True, "prediction_type": "score", "denoise_final": False}),
]


@pytest.mark.parametrize("cls, options", UNDETERMINED)
def test_an_undetermined_start_is_refused_at_construction(cls, options):
    with pytest.raises(ValueError, match="does not determine the data where alpha"):
        cls(**options)
    cls(**{**options, "prediction_type": "v_prediction"})


def test_a_start_below_zero_snr_is_not_refused():
    """Nor a flow, which is trained at random times and can be sampled from a little less than t = 1."""
    FlowSDEScheduler(prediction_type="epsilon").set_timesteps(timesteps=[990.0, 500.0])
    with pytest.raises(ValueError, match="does not determine the data where alpha"):
        FlowSDEScheduler(prediction_type="epsilon").set_timesteps(20)
    VPSDEScheduler(rescale_betas_zero_snr=True, time_grid=None).set_timesteps(20)
    VPSDEScheduler(rescale_betas_zero_snr=True, predictor="euler_maruyama").set_timesteps(20)


# ---------------------------------------------------------------------- lists of times and sigmas


@pytest.mark.parametrize("cls", SCHEDULERS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("values", [[], [NAN], "abc", [[5, 4]], [True], None.__class__, [1.0, "a"], [-5.0], [INF, 1.0]])
def test_lists_that_are_none(cls, values):
    for name in ("timesteps", "sigmas"):
        with pytest.raises(ValueError, match=name):
            cls().set_timesteps(**{name: values})


@pytest.mark.parametrize(
    "make",
    [
        lambda: VESDEScheduler(sigma_min=0.01, sigma_max=50.0),
        lambda: VESDEScheduler(time_conditioning="log_sigma"),
        lambda: VESDEScheduler(time_conditioning="edm"),
        lambda: VPSDEScheduler(),
        lambda: VPSDEScheduler(continuous=True),
        lambda: VPSDEScheduler(time_conditioning="sigma"),
        lambda: SubVPSDEScheduler(),
    ],
)
def test_levels_beyond_the_path_are_refused_and_its_end_is_not(make):
    scheduler = make()
    scheduler.set_timesteps(8)
    sigmas = [float(torch.exp(-0.5 * scheduler.sde.log_snr(t))) for t in (1.0, 0.5, 0.1)]
    assert scheduler.sde_time(scheduler.conditioning.timestep(scheduler.sde, 1.0)) == pytest.approx(1.0)
    timesteps = [float(scheduler.conditioning.timestep(scheduler.sde, t)) for t in (1.0, 0.5, 0.1)]
    for given in ([*sigmas, 0.0], torch.tensor(sigmas), np.array(sigmas, dtype=np.float32), [round(sigmas[0], 3), 0.2]):
        scheduler.set_timesteps(sigmas=given)
        assert scheduler.rows[0].t == pytest.approx(1.0, abs=1e-3) and scheduler.rows[0].t <= 1.0
    for given in (timesteps, torch.tensor(timesteps), np.array(timesteps, dtype=np.float32)):
        scheduler.set_timesteps(timesteps=given)
        assert scheduler.rows[0].t == pytest.approx(1.0, abs=1e-6) and scheduler.rows[0].t <= 1.0
    with pytest.raises(ValueError, match="sigmas must be positive numbers from .* ends of the path"):
        scheduler.set_timesteps(sigmas=[1.1 * sigmas[0], *sigmas[1:]])
    beyond = timesteps[0] + 0.1 * abs(timesteps[0])
    with pytest.raises(ValueError, match="timesteps must lie between"):
        scheduler.set_timesteps(timesteps=[beyond, *timesteps[1:]])
    if isinstance(scheduler, VESDEScheduler):
        with pytest.raises(ValueError, match="sigmas must be positive numbers from 0.01"):
            scheduler.set_timesteps(sigmas=[1.0, 0.005])


def test_mu_is_a_number():
    scheduler = FlowSDEScheduler(use_dynamic_shifting=True)
    for mu in (NAN, "1", INF, 1e4, True):
        with pytest.raises(ValueError, match="mu"):
            scheduler.set_timesteps(5, mu=mu)


# ---------------------------------------------------------------------- plans


@pytest.mark.parametrize(
    "times", [[], [0.1, 0.5], [NAN, 0.1], [0.5, -0.1], [2.0, 0.5], "ab", None, [0.5, "a"], [[0.5]]]
)
def test_times_that_are_no_grid(times):
    with pytest.raises(ValueError, match="times must be"):
        make_plan(VPSDE(), times)
    with pytest.raises(ValueError, match="times must be"):
        restart_plan(VPSDE(), times, 0.1, 0.5)


def test_arguments_of_plans_are_named():
    grid = [1.0, 0.5, 0.1]
    for name, values in {
        "predictor": (3, None, ["heun"]),
        "stochasticity": ("1", NAN, True),
        "denoise_final": ("true", 1),
        "final_time": ("x", 0.5, -1.0),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                make_plan(VPSDE(), grid, **{name: value})
    for name, values in {"correct_steps": (NAN, "2", None), "snr": ("1", None, NAN)}.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                make_plan(VPSDE(), grid, corrector="langevin", **{name: value})
    for name, values in {"low": ("x", NAN), "high": (None,), "repeats": (NAN, "1", 1.5, -1, True)}.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                restart_plan(VPSDE(), grid, **{"low": 0.1, "high": 0.5, name: value})


def test_a_plan_is_folded_once():
    sde, epsilon = VPSDE(), get_parametrization("epsilon")
    plan = make_plan(sde, torch.linspace(1.0, 0.01, 5)).fold(epsilon, sde)
    for predictors in (True, False):
        with pytest.raises(ValueError, match="is folded"):
            plan.fold(epsilon, sde, predictors)


def test_the_reference_loop_checks_its_state():
    plan, x = make_plan(VPSDE(), torch.linspace(1.0, 0.01, 5)), torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"returned shape \(2, 2\) for a state of \(2, 3\)"):
        sample(plan, lambda x, t: x[:, :2], x)
    for name, arguments in {"x": (None, None), "generator": (x, [torch.Generator()])}.items():
        with pytest.raises(ValueError, match=name):
            sample(plan, lambda x, t: x, *arguments)


# ---------------------------------------------------------------------- pipelines


def network(channels=1, classes=None):
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        num_class_embeds=classes,
    )
    net.calls = 0
    net.register_forward_pre_hook(lambda module, _: setattr(module, "calls", module.calls + 1))
    return net.eval()


def built(cls, classes=None, **options):
    pipe = cls(network(classes=classes), VPSDEScheduler(prediction_type="v_prediction"), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipes():
    return {
        "plain": built(SDEPipeline),
        "class": built(ClassConditionalSDEPipeline, 4, null_class=3),
        "inpaint": built(InpaintSDEPipeline),
        "restore": built(RestorationSDEPipeline),
    }


IMAGE, MASK = Image.new("L", (8, 8), 90), np.eye(8, dtype=bool)
SMALL = torch.zeros(1, 1, 4, 4)
CALLS = {
    "plain": lambda pipe, **k: pipe(**{"batch_size": 2, "num_inference_steps": 2, **k}),
    "class": lambda pipe, **k: pipe(**{"class_labels": [0, 1], "num_inference_steps": 2, **k}),
    "inpaint": lambda pipe, **k: pipe(**{"image": [IMAGE] * 2, "mask_image": MASK, "num_inference_steps": 2, **k}),
    "restore": lambda pipe, **k: pipe(
        **{
            "measurement": SMALL,
            "operator": Downsampling(2, (1, 8, 8)),
            "num_inference_steps": 2,
            "num_samples": 2,
            **k,
        }
    ),
}
NOT_COUNTS = (0, -1, 1.5, NAN, INF, True, "2", None, [1])
NOT_GENERATORS = (5, "x", np.random.default_rng(0), [], [1, 2], [torch.Generator()], [torch.Generator()] * 3)
NOT_LATENTS = (
    *(torch.full((2, 1, 8, 8), v) for v in (NAN, INF)),
    *(torch.zeros(s) for s in ((1, 8, 8), (2, 3, 8, 8), (0, 1, 8, 8), (2, 1, 0, 8), (2, 1, 7, 7))),
    torch.zeros(2, 1, 8, 8, dtype=torch.complex64),
    *("x", [[1.0]], np.zeros((2, 1, 8, 8))),
)


def refused(pipes, kind, name, value, **more):
    pipe = pipes[kind]
    state, pipe.unet.calls = torch.get_rng_state(), 0
    with pytest.raises(ValueError, match=name):
        CALLS[kind](pipe, **{name: value, **more})
    assert pipe.unet.calls == 0 and torch.equal(torch.get_rng_state(), state), "something was computed or drawn"


@pytest.mark.parametrize("kind", CALLS)
def test_calls_of_pipelines_are_checked_before_anything_is_drawn(pipes, kind):
    counts = {"plain": "batch_size", "inpaint": "num_samples", "restore": "num_samples"}
    for value in NOT_COUNTS:
        refused(pipes, kind, "num_inference_steps", value)
        if kind in counts:
            refused(pipes, kind, counts[kind], value)
    for value in NOT_GENERATORS:
        for method in ("scheduler", "ode", "sde"):
            refused(pipes, kind, "generator", value, method=method)
    for value in NOT_LATENTS:
        refused(pipes, kind, "latents", value)
    for value in ("PIL", None, 3, "", ["pt"]):
        refused(pipes, kind, "output_type", value)
    refused(pipes, kind, "callback_on_step_end", 3)


@pytest.mark.parametrize("kind", CALLS)
def test_tolerances_of_pipelines(pipes, kind):
    for method in ("ode", "sde"):
        for name in ("rtol", "atol"):
            for value in (0.0, -1.0, NAN, INF, "1e-2", True):
                with pytest.raises(ValueError, match=name):
                    CALLS[kind](pipes[kind], **{"method": method, name: value})


def test_what_is_asked_of_one_kind_of_pipeline(pipes):
    for value in (("latents", "x"), ("prompt",), None, 5):
        refused(pipes, "plain", "callback_on_step_end_tensor_inputs", value)
    for name in ("guidance_scale", "classifier_guidance_scale"):
        for value in (NAN, INF, -1.0, "2", [1.0], True, 1e30):
            refused(pipes, "class", name, value)
    for value in ((3.0, 0.2), (NAN, 1.0), (0.1,), 5, "ab", (-1, 2), (1, 2, 3), ("a", "b")):
        refused(pipes, "class", "guidance_interval", value, guidance_scale=2.0)
    for name in ("resamplings", "jump_length"):
        for value in NOT_COUNTS:
            refused(pipes, "inpaint", name, value, posterior="repaint")
    for value in ([1], "chunk_size", 5, {"chunk_size": "a"}, {"chunk_size": NAN}, {"data_std": "x"}, {"data_std": NAN}):
        key = next(iter(value)) if isinstance(value, dict) else "posterior_options"
        with pytest.raises(ValueError, match=key):
            CALLS["inpaint"](pipes["inpaint"], posterior_options=value)
    for value in (None, "Downsampling"):
        refused(pipes, "restore", "operator", value)
    for value in (-0.1, NAN, INF, "0.1", None, True, [0.1]):
        refused(pipes, "restore", "noise_std", value)
    for value in (torch.zeros(0, 1, 4, 4), torch.full((1, 1, 4, 4), NAN), torch.zeros(4, 4), "y", [None]):
        refused(pipes, "restore", "measurement", value)
    for posterior, options in {
        "mmps": {"iterations": "a"},
        "smc": {"particles": NAN},
        "gaussian": {"covariance": "x"},
    }.items():
        with pytest.raises(ValueError, match=next(iter(options))):
            CALLS["restore"](pipes["restore"], posterior=posterior, noise_std=0.1, posterior_options=options)


def test_a_replacement_by_a_callback_has_the_shape_of_the_sample(pipes):
    for kind in CALLS:
        with pytest.raises(ValueError, match="callback_on_step_end must return latents"):
            CALLS[kind](pipes[kind], callback_on_step_end=lambda *_: {"latents": torch.zeros(2, 1, 4, 4)})


@pytest.mark.parametrize(
    "labels", [np.array([0, 1]), [np.int64(0), np.int32(1)], torch.tensor([0, 1]), (0, 1), range(2)], ids=repr
)
def test_labels_of_every_library(pipes, labels):
    drawn = [
        CALLS["class"](
            pipes["class"], class_labels=v, generator=torch.Generator().manual_seed(0), output_type="pt"
        ).images
        for v in (labels, [0, 1])
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    "options",
    [
        *({"data_min": v} for v in (1.0, NAN, "0", None, True)),
        *({"data_max": v} for v in (-1.0, INF, "1")),
        *({"null_class": v} for v in (4, -1, 1.5, True, "1")),
        *({"id2label": v} for v in ([1, 2], "abc", {9: "x"}, {"x": "y"}, {0: "a", 1: "a"})),
        {"unet": None},
        {"scheduler": None},
    ],
)
def test_construction_of_pipelines(options):
    arguments = {"unet": network(classes=4), "scheduler": VPSDEScheduler(), **options}
    with pytest.raises(ValueError, match=next(iter(options))):
        ClassConditionalSDEPipeline(**arguments)


# ---------------------------------------------------------------------- the probability flow


FAST = {"rtol": 0.1, "atol": 0.1}
STRANGE = [
    torch.zeros(0, 1, 8, 8),
    torch.zeros(1, 8, 8),
    torch.zeros(8, 8),
    torch.zeros(1, 3, 8, 8),
    torch.zeros(1, 1, 7, 7),
    torch.zeros(1, 1, 8, 8, dtype=torch.complex64),
    torch.full((1, 1, 8, 8), NAN),
    np.zeros((1, 8, 8), dtype=np.complex64),
    Image.new("RGB", (8, 8)),
    [Image.new("L", (9, 9))],
    Image.new("RGBA", (8, 8)),
    "x",
    None,
    [],
]


@pytest.mark.parametrize("method", ["encode", "log_prob", "bits_per_dim", "decode"])
def test_shapes_are_checked_before_the_network_is_called(pipes, method):
    pipe = pipes["plain"]
    for value in STRANGE:
        pipe.unet.calls = 0
        with pytest.raises(ValueError, match="^(images|latents|x) must"):
            getattr(pipe, method)(value, **FAST)
        assert pipe.unet.calls == 0


def test_other_arguments_of_the_flow(pipes):
    pipe, x = pipes["plain"], torch.zeros(2, 1, 8, 8)
    flow = ProbabilityFlow(pipe)
    for value in NOT_COUNTS:
        for f, name in (
            (lambda v: pipe.log_prob(x, num_probes=v), "num_probes"),
            (lambda v: pipe.bits_per_dim(x.byte(), importance_samples=v), "importance_samples"),
            (lambda v: pipe.interpolate(x, x, v), "num"),
            (lambda v: flow.edit(x, 0.5, v), "num_steps"),
            (lambda v: flow.options(max_calls=v), "max_calls"),
            (lambda v: flow.options(batch_size=v), "batch_size"),
        ):
            with pytest.raises(ValueError, match=name):
                f(value)
    for value in (-0.1, 0.0, 1.1, NAN, "a", None):
        with pytest.raises(ValueError, match="strength"):
            flow.edit(x, value, 4)
        if value != 1.1:
            with pytest.raises(ValueError, match="temperature"):
                pipe.decode(x, temperature=value)
    for value in ("x", None, "PIL"):
        with pytest.raises(ValueError, match="output_type"):
            pipe.decode(x, output_type=value)
        with pytest.raises(ValueError, match="output_type"):
            pipe.interpolate(x, x, output_type=value)
    for value in ((1.0, 0.0), (0.0,), "ab", (NAN, 1.0), 5):
        with pytest.raises(ValueError, match="value_range"):
            pipe.bits_per_dim(x.byte(), value_range=value)
    for options in ({"t_min": 0.0}, {"t_min": 1.0}, {"t_min": "a"}, {"data_min": 2.0}, {"data_max": NAN}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ProbabilityFlow(pipe, **options)
    with pytest.raises(ValueError, match="pipe must be"):
        ProbabilityFlow(None)


def test_floats_that_look_like_bytes_are_warned_about(pipes, caplog):
    pipe = pipes["plain"]
    logger = "diffusers_sde.pipelines.probability_flow"
    for x, warned in ((torch.full((1, 1, 8, 8), 200.0), True), (torch.full((1, 1, 8, 8), 1.5), False)):
        caplog.clear()
        with caplog.at_level("WARNING", logger):
            ProbabilityFlow(pipe)._state(x)
        assert ("taken as they are" in caplog.text) == warned


# ---------------------------------------------------------------------- operators and masks


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, -8), (1, 8, 0), "188", None, (1.0, 8, 8), 5])
def test_shapes_of_operators(shape):
    for make in (lambda: Downsampling(2, shape), lambda: GaussianBlur(1.0, shape)):
        with pytest.raises(ValueError, match="data_shape"):
            make()


def test_numbers_of_operators():
    for value in NOT_COUNTS:
        with pytest.raises(ValueError, match="factor"):
            Downsampling(value, (1, 8, 8))
    for value in (0.0, NAN, INF, "1", None):
        with pytest.raises(ValueError, match="std"):
            GaussianBlur(value, (1, 8, 8))
    for value in (None, "x", torch.full((1, 8, 8), NAN), ["a"]):
        with pytest.raises(ValueError, match="mask"):
            Mask(value, (1, 8, 8))


def half(mode="L", white=255):
    mask = Image.new(mode, (8, 8), 0)
    mask.paste(white, (0, 0, 4, 8))
    return mask


def test_masks_in_every_layout_paint_the_same(pipes):
    def run(mask):
        return CALLS["inpaint"](
            pipes["inpaint"], mask_image=mask, generator=torch.Generator().manual_seed(0), output_type="pt"
        ).images

    expected, array = run(half()), np.asarray(half())
    opaque = half("RGBA", (255, 255, 255, 255))
    opaque.putalpha(255)
    for mask in (
        half("1", 1),
        half("RGB", (255,) * 3),
        opaque,
        array,
        array[..., None],
        array[None],
        array > 0,
        array // 255,
    ):
        assert torch.equal(run(mask), expected)
    assert torch.equal(run(torch.from_numpy(array.copy())), expected)


def test_masks_that_would_paint_nothing_are_refused(pipes):
    only_alpha = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    only_alpha.putalpha(half())
    white = Image.new("LA", (8, 8), (255, 255))
    white.putalpha(half())
    for mask, message in (
        (only_alpha, "only its alpha channel"),
        (white, "only its alpha channel"),
        (half(white=2), "nothing above 2.*labels"),
        (np.asarray(half(white=20)), "nothing above 20"),
        (np.full((8, 8), 300), "mask_image"),
        (np.full((8, 8), NAN), "mask_image"),
        (np.array([[None] * 8] * 8), "mask_image"),
    ):
        with pytest.raises(ValueError, match=message):
            CALLS["inpaint"](pipes["inpaint"], mask_image=mask)


# ---------------------------------------------------------------------- noise for training


@pytest.mark.parametrize("cls", SCHEDULERS, ids=lambda cls: cls.__name__)
def test_add_noise_takes_numbers_and_arrays(cls):
    scheduler = cls()
    t = float(scheduler.conditioning.timestep(scheduler.sde, 0.5))
    if cls is VPSDEScheduler:
        t = 499
    x, noise = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    expected = scheduler.add_noise(x, noise, torch.tensor([t, t]))
    for timesteps in (t, np.array([t, t]), np.array(t), [t, t], torch.tensor(t)):
        torch.testing.assert_close(scheduler.add_noise(x, noise, timesteps), expected, rtol=1e-5, atol=1e-5)
    end = float(scheduler.conditioning.timestep(scheduler.sde, 1.0))
    for dtype in (torch.float32, torch.bfloat16):  # pipelines cast timesteps
        assert bool(torch.isfinite(scheduler.add_noise(x, noise, torch.tensor([end, end]).to(dtype))).all())
    for wrong in (-5.0, 1.2 * end, NAN):
        with pytest.raises(ValueError, match="timesteps must lie between"):
            scheduler.add_noise(x, noise, torch.tensor([t, wrong]))
