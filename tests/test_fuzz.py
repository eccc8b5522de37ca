"""Random configurations and random nonsense: everything either works or is refused by name.

The draws are the same in every run (``derandomize``). Cases that once went wrong stand as examples of their own.
"""

import json
import math
import re
import shlex
from functools import lru_cache

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_networks import tiny_unet

from diffusers_sde import (
    ClassConditionalSDEPipeline,
    FlowSDEScheduler,
    InpaintSDEPipeline,
    RestorationSDEPipeline,
    SDEPipeline,
    SubVPSDEScheduler,
    VESDEScheduler,
    VPSDEScheduler,
)
from diffusers_sde.guidance.operators import Downsampling
from diffusers_sde.pipelines.base import own_index
from diffusers_sde.sampling.predictors import PREDICTORS
from diffusers_sde.schedulers.config_checks import CONFIG_CHECKS
from diffusers_sde.training import TrainingConfig, parse_args

NAN, INF = math.nan, math.inf
MEAN, STD = 0.2, 0.15
SHAPE = (3, 8, 8)
CLASSES = {cls.__name__: cls for cls in (VPSDEScheduler, SubVPSDEScheduler, VESDEScheduler, FlowSDEScheduler)}


def seldom(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


# ---------------------------------------------------------------------- whole configurations, exact data

COMMON = {
    "predictor": st.sampled_from([*PREDICTORS]),
    "corrector": st.sampled_from([None, None, "langevin", "annealed_langevin", "ornstein_uhlenbeck"]),
    "correct_steps": st.sampled_from([1, 1, 2, 3]),
    "snr": st.sampled_from([0.01, 0.05, 0.1]),
    "stochasticity": st.sampled_from([None, None, 0.0, 0.3, 1.0, 2.0]),
    "probability_flow": st.booleans(),
    "time_grid": st.sampled_from(["sech", "log_snr", "karras", "uniform", None]),
    "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"]),
    "steps_offset": st.sampled_from([0, 1]),
    "solver_order": st.sampled_from([1, 2, 3]),
    "solver_type": st.sampled_from(["heun", "midpoint", "bh2"]),
    "solver_correction": st.booleans(),
    "gaussian_std": st.sampled_from([None, 0.0, 0.05, 1.0]),
    "data_std": st.sampled_from([None, 0.1, 1.0]),
    "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction", "flow_prediction", "score", "edm"]),
    "clip_sample": st.sampled_from([False, False, True]),
    "clip_sample_range": st.just(3.0),
    "denoise_final": st.booleans(),
    "langevin_norm": st.sampled_from(["sample", "batch"]),
    "rho": st.sampled_from([7.0, 3.0]),
}
OF_CLASS = {
    "VPSDEScheduler": {
        "thresholding": st.sampled_from([False, False, True]),
        "rescale_betas_zero_snr": st.booleans(),
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp", "laplace"]),
        "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
    },
    "SubVPSDEScheduler": {"time_conditioning": st.sampled_from(["continuous", "score_sde", "log_sigma"])},
    "VESDEScheduler": {"sigma_max": st.sampled_from([50.0, 10.0, 1348.0])},
    "FlowSDEScheduler": {"shift": st.sampled_from([1.0, 3.0, 0.5]), "shift_terminal": st.sampled_from([None, 0.02])},
}
CONFIGURATIONS = st.sampled_from(sorted(CLASSES)).flatmap(
    lambda name: st.tuples(
        st.just(name), st.fixed_dictionaries(COMMON | OF_CLASS[name]), st.sampled_from([1, 2, 3, 5, 20, 40])
    )
)


def network(scheduler, fed, timestep):
    """What a network that knows N(MEAN, STD^2 I) exactly returns, by formulas of its own."""
    config, t = scheduler.config, scheduler.sde_time(timestep).double()
    a, s, sd = scheduler.sde.alpha(t), scheduler.sde.sigma(t), config.sigma_data
    is_edm = config.prediction_type == "edm"
    x = fed * torch.sqrt(a**2 * sd**2 + s**2) if is_edm else fed
    x0 = MEAN + STD**2 * a / (a**2 * STD**2 + s**2) * (x - a * MEAN)
    epsilon = (x - a * x0) / s
    variance = a**2 * sd**2 + s**2
    return {
        "epsilon": epsilon,
        "sample": x0,
        "score": -epsilon / s,
        "v_prediction": a * epsilon - s * x0,
        "flow_prediction": epsilon - x0,
        "edm": (x0 - a * sd**2 / variance * x) / (s * sd / variance.sqrt()),
    }[config.prediction_type]


def run(scheduler, levels, ids):
    """Samples with a generator each, from the exact marginal at the first row."""
    scheduler.set_timesteps(levels)
    scheduler.set_begin_index(0)
    a, s = (float(f(scheduler.rows[0].t)) for f in (scheduler.sde.alpha, scheduler.sde.sigma))
    generators = [torch.Generator().manual_seed(i) for i in ids]
    z = torch.stack([torch.randn(SHAPE, generator=g, dtype=torch.float64) for g in generators])
    x = a * MEAN + math.hypot(a * STD, s) * z
    for t in scheduler.timesteps:
        output = network(scheduler, scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, generator=generators, return_dict=False)[0]
    return x


@seldom(60)
@given(CONFIGURATIONS)
@example(
    ("VPSDEScheduler", {"prediction_type": "sample", "corrector": "ornstein_uhlenbeck", "probability_flow": True}, 8)
)
def test_a_configuration_runs_or_is_refused_by_name(configuration):
    name, options, levels = configuration
    try:
        scheduler = CLASSES[name](**options)
        scheduler.set_timesteps(levels)
    except ValueError as error:
        assert any(re.search(rf"\b{key}\b", str(error)) for key in (*CONFIG_CHECKS, "num_inference_steps", "times"))
        return
    x = run(scheduler, levels, range(4))
    assert bool(torch.isfinite(x).all())
    again = CLASSES[name].from_config(json.loads(scheduler.to_json_string()))
    assert torch.equal(run(again, levels, range(4)), x), "a config read from JSON draws something else"
    if options.get("langevin_norm", "sample") == "sample" or options.get("corrector") != "langevin":
        backwards = run(scheduler, levels, range(3, -1, -1)).flip(0)
        torch.testing.assert_close(backwards, x, rtol=0, atol=1e-9)
        torch.testing.assert_close(run(scheduler, levels, [2]), x[2:3], rtol=0, atol=1e-9)


# ---------------------------------------------------------------------- nonsense

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 3, 4, 10**9, -(10**30), 0.0, 0.5, 1.5, -0.5, NAN, INF, -INF, 1e-300, 1e300, 1j]),
    st.sampled_from(["", "0.1", "1", "none", "true", "heun", "sech", "linear"]),
    st.text(max_size=3),
    st.lists(st.sampled_from([0.1, NAN, "a", None]), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from([np.float64(0.5), np.int64(2), torch.tensor(2.0), torch.zeros(2), b"a", object, ()]),
)


@seldom(400)
@given(st.sampled_from(sorted(CLASSES)), st.data())
def test_any_value_of_any_key_works_or_is_refused_by_name(name, data):
    cls = CLASSES[name]
    key = data.draw(st.sampled_from(sorted(cls._get_init_keys(cls) - {"self"})))
    value = data.draw(JUNK)
    more = {"corrector": "langevin"} if key in ("snr", "correct_steps") else {}
    more |= {"thresholding": True} if key in ("sample_max_value", "dynamic_thresholding_ratio") else {}
    try:
        scheduler = cls(**{**more, key: value})
        scheduler.set_timesteps(3, **({"mu": 0.5} if cls is FlowSDEScheduler else {}))
    except ValueError as error:
        names = f"{key}|prediction_type" if key == "rescale_betas_zero_snr" else key  # with zero SNR epsilon is wrong
        assert re.search(rf"\b({names})\b", str(error)), f"{key}={value!r}: {error}"
        return
    x = torch.randn(2, *SHAPE) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(torch.zeros_like(x), t, x, return_dict=False)[0]
    assert bool(torch.isfinite(x).all()), f"{key}={value!r}"


@lru_cache
def calls():
    def pipe(cls, classes=None, **options):
        net = tiny_unet(0.05, num_class_embeds=classes)
        made = cls(net, VPSDEScheduler(prediction_type="v_prediction"), **options)
        made.set_progress_bar_config(disable=True)
        return made

    image, mask = Image.new("L", (8, 8), 90), np.eye(8, dtype=bool)
    plain, by_class = pipe(SDEPipeline), pipe(ClassConditionalSDEPipeline, 4, null_class=3)
    inpaint, restore = pipe(InpaintSDEPipeline), pipe(RestorationSDEPipeline)
    x, run, fast = torch.zeros(2, 1, 8, 8), {"num_inference_steps": 2, "output_type": "pt"}, {"rtol": 0.1, "atol": 0.1}
    measured = {"measurement": torch.zeros(1, 1, 4, 4), "operator": Downsampling(2, (1, 8, 8))}
    return {
        "plain": (plain, {**run, "batch_size": 1, "generator": None, "latents": None, "temperature": None}),
        "adaptive": (plain, {**run, **fast, "method": "sde"}),
        "class": (by_class, {**run, "class_labels": [0], "guidance_scale": 1.0, "guidance_interval": None}),
        "inpaint": (inpaint, {**run, "image": image, "mask_image": mask, "num_samples": 1, "posterior_options": None}),
        "repaint": (inpaint, {**run, "image": image, "mask_image": mask, "posterior": "repaint", "resamplings": 1}),
        "restore": (restore, {**run, **measured, "noise_std": 0.1, "posterior": "pigdm", "method": "scheduler"}),
        "encode": (plain.encode, {**fast, "images": x}),
        "decode": (plain.decode, {**fast, "latents": x, "temperature": 1.0, "output_type": "pt"}),
        "denoise": (plain.denoise, {**run, "image": x, "sigma": 0.3, "num_samples": 1, "generator": None}),
        "log_prob": (plain.log_prob, {**fast, "x": x, "num_probes": 1, "trace": "hutchinson", "generator": None}),
        "bits": (plain.bits_per_dim, {**fast, "images": x.byte(), "importance_samples": 1, "value_range": None}),
        "interpolate": (plain.interpolate, {**fast, "a": x, "b": x, "num": 2, "output_type": "pt"}),
    }


# Names under which an argument of one function is known to the one below it.
OTHER_NAMES = {
    "a": "a|x_a",
    "b": "b|x_b",
    "trace": "method",
    "posterior_options": "posterior_options|data_std",
}
# No counts that would work if the machine were large enough, and no tolerances that would take an hour.
SMALL_JUNK = JUNK.filter(lambda v: not (isinstance(v, (int, float)) and (4 < v < 2**31 or 0 < v < 1e-3)))


@seldom(300)
@given(st.data())
def test_any_argument_of_any_method_works_or_is_refused_by_name(data):
    kind = data.draw(st.sampled_from(sorted(calls())))
    function, arguments = calls()[kind]
    key = data.draw(st.sampled_from(sorted(arguments)))
    value = data.draw(SMALL_JUNK)
    try:
        function(**{**arguments, key: value})
    except ValueError as error:
        assert re.search(rf"\b({OTHER_NAMES.get(key, key)})\b", str(error)), f"{kind}: {key}={value!r}: {error}"


# ---------------------------------------------------------------------- files of strangers

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("diffusers_sde"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
INDEX_KEYS = st.sampled_from(["_class_name", "_ignore_files", "_diffusers_sde_version", "unet", "scheduler"])


@seldom(200)
@given(JSON | st.dictionaries(INDEX_KEYS, JSON))
@example({"_class_name": []})
@example({"_ignore_files": 5, "scheduler": ["diffusers_sde", "VPSDEScheduler"]})
@example({"_class_name": ["diffusers_sde_pipeline", "SDEPipeline"], "_diffusers_sde_version": "zzz"})
def test_no_index_of_a_stranger_raises(index):
    own_index(index)


@seldom(100)
@given(
    st.dictionaries(
        st.sampled_from([*sorted(CONFIG_CHECKS), "_class_name", "beta_min", "beta_max", "flow_shift"]), JSON
    )
)
@example({"_class_name": [], "shift": 1.0})
@example({"beta_start": 1e-4, "num_train_timesteps": "1000"})
@example({"beta_start": 1e-4, "num_train_timesteps": 1_000_000_000})
@example({"beta_start": 1e-4, "lambda_min_clipped": "x"})
@example({"beta_min": 0.1})
def test_no_config_of_a_stranger_ends_in_another_error(config):
    for cls in CLASSES.values():
        try:
            cls.from_config(config)
        except ValueError as error:
            assert str(error)


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


@seldom(100)
@given(
    st.dictionaries(st.sampled_from(["dataset_name", "dataset_config_name", "image_column", "train_data_dir"]), WORDS)
)
@example({"dataset_name": "/home/me/pictures"})
@example({"train_data_dir": "my data"})
def test_every_command_of_a_card_can_be_pasted(words):
    try:
        config = TrainingConfig(**words)
    except ValueError:
        return
    command = config.command()
    again = parse_args(shlex.split(command)[3:])
    for name, word in words.items():
        shown = getattr(again, name)
        assert shown == word or shown.startswith("path/to/")
        assert not shown.startswith(("/", "~", "."))
