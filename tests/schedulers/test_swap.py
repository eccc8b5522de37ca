"""Swapping schedulers: every stock config into each of our classes, right or refused, and back again without loss."""

import functools
import inspect
import json
import logging
import math

import diffusers
import numpy as np
import pytest
import torch

from diffusers_sde import FlowSDEScheduler, RectifiedFlowSDE, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.schedulers.conversion import SAMPLER_KEYS
from diffusers_sde.schedulers.stock_configs import stock_arguments

OURS = {
    "vp": VPSDEScheduler,
    "sub_vp": SubVPSDEScheduler,
    "ve": VESDEScheduler,
    "flow": FlowSDEScheduler,
}
CLASS_OF = {"vp": VPSDEScheduler, "ve": VESDEScheduler, "edm": VESDEScheduler, "flow": FlowSDEScheduler}

# (stock class, arguments that are not its defaults, what its networks are). Non-default values matter: a class that
# fell back on its own defaults would otherwise pass.
TABLE = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "num_train_timesteps": 500}
STOCK = [
    ("DDPMScheduler", {}, "vp"),
    ("DDPMScheduler", {**TABLE, "variance_type": "fixed_large", "clip_sample_range": 2.0, "steps_offset": 1}, "vp"),
    ("DDPMScheduler", {"prediction_type": "sample", "beta_schedule": "sigmoid", "clip_sample": False}, "vp"),
    ("DDPMScheduler", {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0}, "vp"),
    ("DDIMScheduler", {}, "vp"),
    ("DDIMScheduler", {**TABLE, "set_alpha_to_one": False, "clip_sample": False, "timestep_spacing": "trailing"}, "vp"),
    ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", **TABLE}, "vp"),
    ("DDIMScheduler", {"trained_betas": np.linspace(2e-4, 0.03, 300).tolist(), "num_train_timesteps": 300}, "vp"),
    ("PNDMScheduler", {}, "vp"),
    ("PNDMScheduler", {**TABLE, "skip_prk_steps": True, "prediction_type": "v_prediction", "steps_offset": 1}, "vp"),
    ("EulerDiscreteScheduler", {}, "vp"),
    ("EulerDiscreteScheduler", {**TABLE, "interpolation_type": "log_linear", "use_karras_sigmas": True}, "vp"),
    ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, "vp"),
    (
        "EulerDiscreteScheduler",
        {
            "timestep_type": "continuous",
            "prediction_type": "v_prediction",
            "sigma_min": 0.002,
            "sigma_max": 700.0,
            "use_karras_sigmas": True,
        },
        "edm",
    ),
    ("EulerAncestralDiscreteScheduler", {}, "vp"),
    ("EulerAncestralDiscreteScheduler", {**TABLE, "timestep_spacing": "trailing"}, "vp"),
    ("HeunDiscreteScheduler", {}, "vp"),
    ("HeunDiscreteScheduler", {"beta_schedule": "squaredcos_cap_v2", "use_exponential_sigmas": True}, "vp"),
    ("HeunDiscreteScheduler", {"beta_schedule": "exp", "clip_sample": True}, "vp"),
    ("KDPM2DiscreteScheduler", {}, "vp"),
    ("KDPM2DiscreteScheduler", TABLE, "vp"),
    ("KDPM2AncestralDiscreteScheduler", {}, "vp"),
    ("KDPM2AncestralDiscreteScheduler", {"prediction_type": "v_prediction"}, "vp"),
    ("LMSDiscreteScheduler", {}, "vp"),
    ("LMSDiscreteScheduler", {**TABLE, "use_karras_sigmas": True}, "vp"),
    ("DPMSolverMultistepScheduler", {}, "vp"),
    ("DPMSolverMultistepScheduler", {**TABLE, "solver_order": 3, "final_sigmas_type": "sigma_min"}, "vp"),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True, "algorithm_type": "sde-dpmsolver++"}, "vp"),
    ("DPMSolverMultistepScheduler", {"variance_type": "learned_range", "thresholding": True}, "vp"),
    (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
        "flow",
    ),
    ("DPMSolverSinglestepScheduler", {}, "vp"),
    ("DPMSolverSinglestepScheduler", {**TABLE, "use_karras_sigmas": True}, "vp"),
    ("UniPCMultistepScheduler", {}, "vp"),
    ("UniPCMultistepScheduler", {**TABLE, "solver_order": 3, "disable_corrector": [0, 1]}, "vp"),
    (
        "UniPCMultistepScheduler",
        {"use_flow_sigmas": True, "flow_shift": 5.0, "prediction_type": "flow_prediction"},
        "flow",
    ),
    ("DEISMultistepScheduler", {}, "vp"),
    ("DEISMultistepScheduler", {**TABLE, "use_exponential_sigmas": True}, "vp"),
    ("SASolverScheduler", {}, "vp"),
    ("SASolverScheduler", {**TABLE, "predictor_order": 3}, "vp"),
    ("ScoreSdeVeScheduler", {}, "ve"),
    (
        "ScoreSdeVeScheduler",
        {"snr": 0.075, "sigma_max": 380.0, "sampling_eps": 1e-4, "correct_steps": 2, "num_train_timesteps": 1000},
        "ve",
    ),
    ("ScoreSdeVeScheduler", {"correct_steps": 0}, "ve"),
    ("EDMEulerScheduler", {}, "edm"),
    (
        "EDMEulerScheduler",
        {"sigma_data": 1.0, "sigma_max": 300.0, "rho": 5.0, "prediction_type": "v_prediction"},
        "edm",
    ),
    ("EDMDPMSolverMultistepScheduler", {}, "edm"),
    ("EDMDPMSolverMultistepScheduler", {"sigma_schedule": "exponential", "sigma_min": 0.01}, "edm"),
    ("FlowMatchEulerDiscreteScheduler", {}, "flow"),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "shift_terminal": 0.1}, "flow"),
    (
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.3, "time_shift_type": "linear"},
        "flow",
    ),
    ("FlowMatchHeunDiscreteScheduler", {}, "flow"),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 6.0, "num_train_timesteps": 500}, "flow"),
]
IDS = [f"{name}-{i}" for i, (name, _, _) in enumerate(STOCK)]

# DPMSolverSDEScheduler cannot be imported without torchsde: its config, as its documentation lists the arguments.
DPMSOLVER_SDE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "noise_sampler_seed": None,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}

# What the Hub's repositories hold, with the versions that wrote them: older than several arguments of today's classes.
PUBLISHED = {
    "SD1.5": (
        {
            "_class_name": "PNDMScheduler",
            "_diffusers_version": "0.6.0",
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "num_train_timesteps": 1000,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "trained_betas": None,
            "clip_sample": False,
        },
        "vp",
    ),
    "SDXL": (
        {
            "_class_name": "EulerDiscreteScheduler",
            "_diffusers_version": "0.19.0.dev0",
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "clip_sample": False,
            "interpolation_type": "linear",
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "sample_max_value": 1.0,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "trained_betas": None,
            "use_karras_sigmas": False,
        },
        "vp",
    ),
    "SD3": (
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": "0.29.0.dev0",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        },
        "flow",
    ),
    "FLUX-dev": (
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": "0.30.0.dev0",
            "base_image_seq_len": 256,
            "base_shift": 0.5,
            "max_image_seq_len": 4096,
            "max_shift": 1.15,
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
        },
        "flow",
    ),
    "PixArt": (
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "_diffusers_version": "0.22.0.dev0",
            "algorithm_type": "dpmsolver++",
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "beta_start": 0.0001,
            "dynamic_thresholding_ratio": 0.995,
            "lower_order_final": True,
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "sample_max_value": 1.0,
            "solver_order": 2,
            "solver_type": "midpoint",
            "steps_offset": 0,
            "thresholding": False,
            "timestep_spacing": "linspace",
            "trained_betas": None,
            "variance_type": None,
        },
        "vp",
    ),
    "LDM": (
        {
            "_class_name": "DDIMScheduler",
            "_diffusers_version": "0.1.1",
            "beta_end": 0.0195,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.0015,
            "clip_sample": False,
            "num_train_timesteps": 1000,
            "timestep_values": None,
            "trained_betas": None,
        },
        "vp",
    ),
    "ddpm-cifar10-32": (
        {
            "_class_name": "DDPMScheduler",
            "_diffusers_version": "0.1.1",
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "beta_start": 0.0001,
            "clip_sample": True,
            "num_train_timesteps": 1000,
            "trained_betas": None,
            "variance_type": "fixed_large",
        },
        "vp",
    ),
    "ncsnpp-church-256": (
        {
            "_class_name": "ScoreSdeVeScheduler",
            "_diffusers_version": "0.1.1",
            "num_train_timesteps": 2000,
            "correct_steps": 1,
            "sampling_eps": 1e-05,
            "sigma_max": 380.0,
            "sigma_min": 0.01,
            "snr": 0.15,
        },
        "ve",
    ),
    "SVD": (
        {
            "_class_name": "EulerDiscreteScheduler",
            "_diffusers_version": "0.24.0.dev0",
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "clip_sample": False,
            "interpolation_type": "linear",
            "num_train_timesteps": 1000,
            "prediction_type": "v_prediction",
            "set_alpha_to_one": False,
            "sigma_max": 700.0,
            "sigma_min": 0.002,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "timestep_type": "continuous",
            "trained_betas": None,
            "use_karras_sigmas": True,
        },
        "edm",
    ),
}


class DiffusersLog(logging.Handler):
    """Collects what diffusers warns about, whatever its verbosity."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def warnings():
    # diffusers' own logger does not propagate to the root, so pytest's caplog never sees it.
    logger, handler = logging.getLogger("diffusers"), DiffusersLog()
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)


@functools.cache
def _stock(index):
    # Some stock constructors take a quarter of a second.
    name, arguments, _ = STOCK[index]
    return getattr(diffusers, name)(**arguments)


def stock(name, arguments):
    for i, entry in enumerate(STOCK):
        if entry[:2] == (name, arguments):
            return _stock(i)
    return getattr(diffusers, name)(**arguments)


def from_json(scheduler, path):
    """The config after saving: plain JSON types, with the class name."""
    scheduler.save_pretrained(path)
    with open(path / "scheduler_config.json", encoding="utf-8") as f:
        return json.load(f)


def public(config):
    return {k: v for k, v in config.items() if not k.startswith("_")}


def assert_same_network(ours, theirs, family):
    """Everything that describes the network, not the sampler, is the stock scheduler's."""
    config = theirs.config
    assert ours.config.num_train_timesteps == config.num_train_timesteps
    if family == "vp":
        # float32 tables on their side, and rounding that accumulates in the product.
        if not config.get("rescale_betas_zero_snr"):
            torch.testing.assert_close(ours.betas, theirs.betas, rtol=1e-5, atol=1e-9)
        stock_table = theirs.alphas_cumprod.clone()
        if isinstance(theirs, diffusers.EulerDiscreteScheduler) and config.rescale_betas_zero_snr:
            stock_table[-1] = 0.0  # Euler keeps 2**-24 there, to have a finite sigma
        torch.testing.assert_close(ours.alphas_cumprod, stock_table, rtol=2e-4, atol=1e-8)
        assert ours.config.prediction_type == config.prediction_type
        assert ours.conditioning.name == "discrete"
        # DPMSolverSinglestep has one grid, and no name for it.
        assert ours.config.timestep_spacing == config.get("timestep_spacing", "linspace")
        assert ours.config.steps_offset == config.get("steps_offset", 0)
        assert ours.config.clip_sample == config.get("clip_sample", False)
        assert ours.config.clip_sample_range == config.get("clip_sample_range", 1.0)
        for key in ("thresholding", "dynamic_thresholding_ratio", "sample_max_value", "variance_type"):
            if key in config:
                assert ours.config[key] == config[key]
        # Configs keep keys of the scheduler before: SDXL's, of Euler, has a set_alpha_to_one that Euler does not read.
        knows_alpha = "set_alpha_to_one" in inspect.signature(type(theirs).__init__).parameters
        ends_early = knows_alpha and config.get("set_alpha_to_one") is False
        ends_early |= config.get("final_sigmas_type") == "sigma_min"
        assert ours.config.final_sigmas_type == ("sigma_min" if ends_early else "zero")
        assert ours.init_noise_sigma == 1.0
    elif family == "ve":
        assert ours.config.prediction_type == "score"
        assert ours.conditioning.name == "sigma"
        assert float(ours.sde.sigma(0.0)) == pytest.approx(config.sigma_min)
        assert ours.init_noise_sigma == pytest.approx(theirs.init_noise_sigma)
        for key in ("snr", "sampling_eps"):
            assert ours.config[key] == config[key]
        assert ours.order == 1 + config.correct_steps
    elif family == "edm":
        assert float(ours.sde.sigma(0.0)) == pytest.approx(config.sigma_min)
        assert float(ours.sde.sigma(1.0)) == pytest.approx(config.sigma_max)
        assert ours.conditioning.name == "edm"
        ours.set_timesteps(6)
        theirs.set_timesteps(6)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps.float(), rtol=1e-4, atol=1e-5)
        # The denoised estimate of the same network output, on a sample that the network would have seen scaled alike.
        x, output = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
        scaled = theirs.scale_model_input(x, theirs.timesteps[0])
        torch.testing.assert_close(ours.scale_model_input(x, ours.timesteps[0]), scaled, rtol=1e-4, atol=1e-6)
        expected = theirs.step(output, theirs.timesteps[0], x)
        if hasattr(expected, "pred_original_sample"):
            got = ours.step(output, ours.timesteps[0], x).pred_original_sample
            torch.testing.assert_close(got, expected.pred_original_sample, rtol=1e-4, atol=1e-5)
    else:
        assert ours.config.prediction_type == "flow_prediction"
        assert ours.conditioning.name == "continuous"
        assert ours.config.shift == (config.flow_shift if config.get("use_flow_sigmas") else config.shift)
        for key in ("use_dynamic_shifting", "base_shift", "max_shift", "time_shift_type", "shift_terminal"):
            if key in config:
                assert ours.config[key] == config[key]


@pytest.mark.parametrize("source", ["memory", "json"])
@pytest.mark.parametrize("target", OURS)
@pytest.mark.parametrize(("name", "arguments", "family"), STOCK, ids=IDS)
def test_matrix_right_or_refused(name, arguments, family, target, source, tmp_path, warnings):
    theirs = stock(name, arguments)
    config = in_memory(theirs) if source == "memory" else from_json(theirs, tmp_path)
    cls = OURS[target]
    if CLASS_OF[family] is not cls:
        with pytest.raises(ValueError, match=rf"{cls.__name__} cannot represent. Use {CLASS_OF[family].__name__}"):
            cls.from_config(config)
        return
    assert_same_network(cls.from_config(config), theirs, family)
    assert warnings == []


@pytest.mark.parametrize("target", OURS)
def test_dpmsolver_sde_config(target):
    assert hasattr(diffusers, "DPMSolverSDEScheduler")  # still exported, so its configs still exist
    if target != "vp":
        with pytest.raises(ValueError, match="Use VPSDEScheduler"):
            OURS[target].from_config(DPMSOLVER_SDE)
        return
    for config in (DPMSOLVER_SDE, {"_class_name": "DPMSolverSDEScheduler", **DPMSOLVER_SDE}):
        ours = VPSDEScheduler.from_config(config)
        assert float(ours.betas[0]) == pytest.approx(0.00085)
        assert float(ours.betas[-1]) == pytest.approx(0.012)
        assert ours.config.timestep_spacing == "linspace"
        assert all(ours.config[key] == value for key, value in DPMSOLVER_SDE.items())


TWINS = ("FlowMatchHeunDiscreteScheduler", "FlowMapEulerDiscreteScheduler")  # classes of the same arguments


def in_memory(theirs):
    """The config of a scheduler that was constructed, not loaded: it holds its class's name only where it has to."""
    named = {"_class_name": type(theirs).__name__} if type(theirs).__name__ in TWINS else {}
    return {**theirs.config, **named}


@pytest.mark.parametrize("through", ["memory", "json"])
@pytest.mark.parametrize(("name", "arguments", "family"), STOCK, ids=IDS)
def test_back_again_without_loss(name, arguments, family, through, tmp_path, warnings):
    theirs = stock(name, arguments)
    ours = CLASS_OF[family].from_config(in_memory(theirs), predictor="ancestral", corrector="langevin", snr=0.3)
    config = ours.config if through == "memory" else from_json(ours, tmp_path)
    back = type(theirs).from_config(config)
    sampler = {"snr", "correct_steps"}  # what we were asked to change
    original = {k: v for k, v in public(theirs.config).items() if k not in sampler or family != "ve"}
    if name == "ScoreSdeVeScheduler":
        assert back.config.snr == 0.3
    for key, value in original.items():
        assert back.config[key] == value, key
    # And ours again from theirs: what we know is still there.
    again = type(ours).from_config(back.config)
    for key, value in public(ours.config).items():
        assert again.config[key] == value, key
    assert warnings == []


@pytest.mark.parametrize("target", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("name", ["DDPMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_through_ours_to_another_stock_class(name, target, warnings):
    # A longer chain must neither lose the network's constants nor warn about our own arguments.
    theirs = stock(name, TABLE)
    other = getattr(diffusers, target).from_config(VPSDEScheduler.from_config(theirs.config, snr=0.2).config)
    torch.testing.assert_close(other.alphas_cumprod, theirs.alphas_cumprod)
    assert other.config.snr == 0.2
    assert [m for m in warnings if "snr" in m] == []


@pytest.mark.parametrize("target", [VPSDEScheduler, SubVPSDEScheduler, VESDEScheduler, FlowSDEScheduler])
def test_our_own_configs_between_our_classes(target):
    for source in (VPSDEScheduler(), SubVPSDEScheduler(), VESDEScheduler(), FlowSDEScheduler()):
        if type(source) is target:
            assert public(target.from_config(source.config).config) == public(source.config)
        else:
            with pytest.raises(ValueError, match=f"Use {type(source).__name__}.from_config"):
                target.from_config(source.config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name, warnings, tmp_path):
    config, family = PUBLISHED[name]
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    warnings.clear()  # some published configs make their own class warn
    for cls in OURS.values():
        if cls is not CLASS_OF[family]:
            with pytest.raises(ValueError, match=CLASS_OF[family].__name__):
                cls.from_config(config)
    # As a dict from JSON, from the loaded stock scheduler, and as our class reads a repository.
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    for ours in (
        CLASS_OF[family].from_config(config),
        CLASS_OF[family].from_config(theirs.config),
        CLASS_OF[family].from_pretrained(tmp_path),
    ):
        theirs.set_timesteps(5, **({"mu": 0.7} if config.get("use_dynamic_shifting") else {}))
        assert_same_network(ours, theirs, family)
    assert warnings == []


@pytest.mark.parametrize(
    ("name", "missing", "attribute", "expected"),
    [
        ("HeunDiscreteScheduler", "beta_start", "betas", 0.00085),
        ("EulerDiscreteScheduler", "timestep_spacing", "timestep_spacing", "linspace"),
        ("DDPMScheduler", "clip_sample", "clip_sample", True),
        ("PNDMScheduler", "set_alpha_to_one", "final_sigmas_type", "sigma_min"),
    ],
)
def test_a_json_config_older_than_an_argument_takes_its_own_class_default(name, missing, attribute, expected, tmp_path):
    config = from_json(stock(name, {}), tmp_path)
    del config[missing]
    ours = VPSDEScheduler.from_config(config)
    value = float(ours.betas[0]) if attribute == "betas" else ours.config[attribute]
    assert value == (pytest.approx(expected) if isinstance(expected, float) else expected)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "use_beta_sigmas"),
        ("EulerDiscreteScheduler", {"sigma_min": 0.1, "sigma_max": 10.0}, "sigma_min"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "sigma_min": 0.1, "sigma_max": 9.0}, "continuous"),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, "lambda_min_clipped"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "prediction_type"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas"),
        ("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True}, "use_beta_sigmas"),
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("FlowMatchEulerDiscreteScheduler", {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        ("EDMEulerScheduler", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
        ("EDMDPMSolverMultistepScheduler", {"thresholding": True}, "thresholding"),
        ("CogVideoXDDIMScheduler", {}, "snr_shift_scale"),
        ("IPNDMScheduler", {}, "names no betas"),
        ("CMStochasticIterativeScheduler", {}, "consistency"),
        ("DDPMWuerstchenScheduler", {}, "no SDE that is known"),
        ("KarrasVeScheduler", {}, "no SDE that is known"),
        ("SCMScheduler", {}, "TrigFlow"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_every_class(name, arguments, message):
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    if name == "EulerDiscreteScheduler" and "sigma_min" in arguments:
        pytest.importorskip("scipy")
    config = stock(name, arguments).config
    messages = []
    for cls in OURS.values():
        with pytest.raises(ValueError) as error:
            cls.from_config(config)
        messages.append(str(error.value))
    # The class that the others send the user to says why; the rest may name that class instead.
    assert any(message in m for m in messages), messages


@pytest.mark.parametrize("n", [5, 20])
def test_karras_sigmas_are_those_of_euler(n):
    theirs = diffusers.EulerDiscreteScheduler(**TABLE, use_karras_sigmas=True, timestep_spacing="linspace")
    ours = VPSDEScheduler.from_config(theirs.config)
    theirs.set_timesteps(n)
    ours.set_timesteps(n)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(ours.timesteps.float(), theirs.timesteps.float(), rtol=1e-3, atol=1e-2)


def test_exponential_sigmas_are_those_of_euler():
    theirs = diffusers.EulerDiscreteScheduler(**TABLE, use_exponential_sigmas=True)
    ours = VPSDEScheduler.from_config(theirs.config)
    theirs.set_timesteps(9)
    ours.set_timesteps(9)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-4, atol=0.0)


def test_lu_lambdas_are_uniform_in_log_snr():
    ours = VPSDEScheduler.from_config(diffusers.DPMSolverMultistepScheduler(use_lu_lambdas=True).config)
    ours.set_timesteps(8)
    steps = ours.sigmas[:-1].double().log().diff()
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("shift", "mu"), [(3.0, None), (1.0, 0.9)])
def test_flow_shift_and_mu_are_honoured(shift, mu):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=mu is not None)
    ours = FlowSDEScheduler.from_config(theirs.config, time_grid=None)
    mu_argument = {} if mu is None else {"mu": mu}
    theirs.set_timesteps(7, **mu_argument)
    ours.set_timesteps(7, **mu_argument)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-4)
    if mu is not None:
        with pytest.raises(ValueError, match="mu"):
            ours.set_timesteps(7)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_set_alpha_to_one_decides_where_sampling_ends(set_alpha_to_one):
    theirs = diffusers.DDIMScheduler(**TABLE, set_alpha_to_one=set_alpha_to_one, steps_offset=1, clip_sample=False)
    ddim = {"solver_order": 1, "solver_correction": False, "gaussian_std": 0.0}
    ours = VPSDEScheduler.from_config(theirs.config, probability_flow=True, time_grid=None, **ddim)
    x, results = torch.randn(1, 2, 3, 3), []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(torch.cos(y) * 0.3, t, y).prev_sample
        results.append(y)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_score_sde_vp_config():
    from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler

    config = ScoreSdeVpScheduler(num_train_timesteps=1000).config
    ours = VPSDEScheduler.from_config(config)
    assert float(ours.sde.g2(1.0)) == pytest.approx(20.0)
    assert float(ours.sde.g2(0.5)) == pytest.approx(10.05)
    assert ours.conditioning.name == "score_sde"
    ours.set_timesteps(3)
    assert float(ours.timesteps[0]) == pytest.approx(999.0)


def test_unclip_is_the_cosine_table():
    theirs = diffusers.UnCLIPScheduler(variance_type="learned_range")
    ours = VPSDEScheduler.from_config(theirs.config)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-8)
    assert ours.config.variance_type == "learned_range"


@pytest.mark.parametrize("cls", OURS.values())
def test_a_typo_is_refused_with_a_hint(cls):
    with pytest.raises(ValueError, match="did you mean 'corrector'"):
        cls.from_config(cls().config, correctr="langevin")
    with pytest.raises(ValueError, match=f"{cls.__name__} has no argument 'bogus'"):
        cls.from_config(cls().config, bogus=1)
    scheduler, unused = cls.from_config(cls().config, return_unused_kwargs=True, bogus=1)
    assert unused["bogus"] == 1
    assert isinstance(scheduler, cls)


@pytest.mark.parametrize("config", [None, "linear", 3])
def test_what_is_no_config_is_refused(config):
    with pytest.raises(ValueError, match="config must be a dictionary"):
        VPSDEScheduler.from_config(config)


def test_an_argument_overrides_the_config():
    config = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True).config
    assert VPSDEScheduler.from_config(config).config.time_grid == "karras"
    ours = VPSDEScheduler.from_config(config, time_grid="uniform", predictor="ancestral")
    assert ours.config.time_grid == "uniform"
    # Through the stock class and back, our own choice wins over what the stock key would imply.
    assert (
        VPSDEScheduler.from_config(diffusers.EulerDiscreteScheduler.from_config(ours.config).config).config["time_grid"]
        == "uniform"
    )


def test_infinities_survive_json(tmp_path):
    # DPMSolver's lambda_min_clipped is -inf, which diffusers writes as a non-standard JSON token.
    theirs = diffusers.DPMSolverMultistepScheduler()
    ours = VPSDEScheduler.from_config(from_json(theirs, tmp_path / "a"))
    again = from_json(ours, tmp_path / "b")
    assert math.isinf(float(again["lambda_min_clipped"]))
    assert diffusers.DPMSolverMultistepScheduler.from_config(again).config.lambda_min_clipped == -math.inf


# ---------------------------------------------------------------------- every scheduler that diffusers exports

# What each becomes, and a word of the reason where none of ours takes it. Arguments that have no default are in NEEDED.
TAKEN_BY = {
    **dict.fromkeys(
        (
            "DDIMParallelScheduler",
            "DDIMScheduler",
            "DDPMParallelScheduler",
            "DDPMScheduler",
            "DEISMultistepScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSDEScheduler",
            "DPMSolverSinglestepScheduler",
            "EulerAncestralDiscreteScheduler",
            "EulerDiscreteScheduler",
            "HeunDiscreteScheduler",
            "KDPM2AncestralDiscreteScheduler",
            "KDPM2DiscreteScheduler",
            "LMSDiscreteScheduler",
            "PNDMScheduler",
            "RePaintScheduler",
            "SASolverScheduler",
            "ScoreSdeVpScheduler",
            "UnCLIPScheduler",
            "UniPCMultistepScheduler",
        ),
        VPSDEScheduler,
    ),
    **dict.fromkeys(
        ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "ScoreSdeVeScheduler"),
        VESDEScheduler,
    ),
    **dict.fromkeys(
        ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "LTXEulerAncestralRFScheduler"),
        FlowSDEScheduler,
    ),
    "AmusedScheduler": "no SDE that is known",
    "BlockRefinementScheduler": "no SDE that is known",
    "CMStochasticIterativeScheduler": "consistency model",
    "CogVideoXDDIMScheduler": "snr_shift_scale",
    "CogVideoXDPMScheduler": "snr_shift_scale",
    "ConsistencyDecoderScheduler": "consistency decoder",
    "CosineDPMSolverMultistepScheduler": "atan",
    "DDIMInverseScheduler": "from data to noise",
    "DDPMWuerstchenScheduler": "no SDE that is known",
    "DPMSolverMultistepInverseScheduler": "from data to noise",
    "DiscreteDDIMScheduler": "no SDE that is known",
    "EntropyBoundScheduler": "no SDE that is known",
    "FlowMapEulerDiscreteScheduler": "flow map",
    "FlowMatchLCMScheduler": "distilled",
    "HeliosDMDScheduler": "stage-wise",
    "HeliosScheduler": "stage-wise",
    "IPNDMScheduler": "names no betas",
    "KarrasVeScheduler": "no SDE that is known",
    "LCMScheduler": "distilled",
    "MiniMaxH3Scheduler": "1 - sigma",
    "PiflowScheduler": "n_grid",
    "RFD4ProteinaScheduler": "no SDE that is known",
    "SCMScheduler": "TrigFlow",
    "TCDScheduler": "distilled",
    "VQDiffusionScheduler": "no SDE that is known",
}
NEEDED = {
    "AmusedScheduler": {"mask_token_id": 1},
    "VQDiffusionScheduler": {"num_vec_classes": 5},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 1.0},
}


def stock_by_name(name, **arguments):
    cls = getattr(diffusers, name, None) or getattr(diffusers.schedulers, name)
    try:
        return cls(**NEEDED.get(name, {}), **arguments)
    except ImportError as error:
        pytest.skip(str(error))


def test_no_scheduler_of_diffusers_is_forgotten():
    exported = {n for n in dir(diffusers.schedulers) if n.endswith("Scheduler")} | set(stock_arguments())
    assert exported - set(OURS_BY_NAME) <= set(TAKEN_BY), "say in TAKEN_BY what becomes of these"


OURS_BY_NAME = {cls.__name__: cls for cls in OURS.values()}


@pytest.mark.parametrize("source", ["memory", "json"])
@pytest.mark.parametrize("name", TAKEN_BY)
def test_every_scheduler_of_diffusers_is_taken_by_its_class_or_refused_with_a_reason(name, source, tmp_path):
    if not hasattr(diffusers.schedulers, name):
        pytest.skip(f"this diffusers has no {name}")
    theirs = stock_by_name(name)
    config = theirs.config if source == "memory" else from_json(theirs, tmp_path)
    taken = TAKEN_BY[name]
    if source == "memory" and name in TWINS and not hasattr(diffusers.schedulers, "FlowMapEulerDiscreteScheduler"):
        pytest.skip("this diffusers has no FlowMapEuler, which FlowMatchHeun could be mistaken for")
    if source == "memory" and name in TWINS:
        taken = "are those of FlowMatchHeunDiscreteScheduler and of FlowMapEulerDiscreteScheduler"
    for cls in OURS.values():
        if cls is taken:
            assert cls.from_config(config).config.num_train_timesteps == theirs.config.num_train_timesteps
            continue
        with pytest.raises(ValueError) as error:
            cls.from_config(config)
        message = str(error.value)
        if isinstance(taken, str):
            assert taken in message
        named = [n for n in OURS_BY_NAME if f"Use {n}" in message]
        assert named == ([] if isinstance(taken, str) else [taken.__name__])


@pytest.mark.parametrize(
    ("name", "through"),
    [
        ("LCMScheduler", "DDIMScheduler"),
        ("TCDScheduler", "DDIMScheduler"),
        ("FlowMatchLCMScheduler", "FlowMatchEulerDiscreteScheduler"),
        ("DDIMInverseScheduler", "DDIMScheduler"),
        ("DPMSolverMultistepInverseScheduler", "DPMSolverMultistepScheduler"),
    ],
)
def test_what_a_refusal_advises_is_accepted(name, through, tmp_path):
    theirs = stock_by_name(name)
    with pytest.raises(ValueError, match=rf"{through}\.from_config\(pipe\.scheduler\.config\)\.config"):
        FlowSDEScheduler.from_config(theirs.config)
    way_out = getattr(diffusers, through).from_config(theirs.config)
    for config in (way_out.config, from_json(way_out, tmp_path)):
        assert TAKEN_BY[through].from_config(config).config.num_train_timesteps == 1000


def test_a_shift_alone_is_minimax():
    # The same key, the other sign of time and of the velocity.
    with pytest.raises(ValueError, match="MiniMaxH3Scheduler"):
        FlowSDEScheduler.from_config({"shift": 12.0, "note": "a config that nobody wrote"})


def test_the_ltx_scheduler_keeps_the_shift_of_the_one_before():
    before = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs = diffusers.LTXEulerAncestralRFScheduler.from_config(before.config)
    ours = FlowSDEScheduler.from_config(theirs.config, time_grid=None)
    theirs.set_timesteps(7)
    ours.set_timesteps(7)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("first", "arguments", "second", "key"),
    [
        ("DDIMScheduler", TABLE, "EDMEulerScheduler", "beta_start"),
        ("DDIMScheduler", TABLE, "FlowMatchEulerDiscreteScheduler", "beta_start"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "DDIMScheduler", "shift"),
        ("EDMEulerScheduler", {"sigma_data": 1.0, "sigma_max": 70.0}, "DDIMScheduler", "sigma_data"),
    ],
)
def test_a_detour_through_a_scheduler_of_another_path_is_refused_with_the_keys_left(first, arguments, second, key):
    # Only values that are not a class's default are handed on by diffusers, so only those leave a trace.
    config = getattr(diffusers, second).from_config(stock_by_name(first, **arguments).config).config
    for cls in OURS.values():
        with pytest.raises(ValueError, match=rf"has left \(.*{key}.*the scheduler that the model came with"):
            cls.from_config(config)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_whose_network_is_fed_t_itself(shift):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=shift)
    ours = FlowSDEScheduler.from_config(
        theirs.config, probability_flow=True, solver_order=1, solver_correction=False, gaussian_std=0.0
    )
    sigmas = [1.0, 0.7, 0.4, 0.1]
    x, results = torch.randn(1, 2, 3, 3), []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=sigmas)
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(torch.cos(3.0 * t) * y, t, y).prev_sample
        results.append(y)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    ours.set_timesteps(5)
    assert 0 < float(ours.timesteps[-1]) < float(ours.timesteps[0]) == 1.0


def test_a_table_of_one_entry_is_refused():
    with pytest.raises(ValueError, match="num_train_timesteps must be an integer >= 2"):
        VPSDEScheduler(num_train_timesteps=1)


# ---------------------------------------------------------------------- _compatibles


@pytest.mark.parametrize("cls", OURS.values())
def test_compatibles_are_the_stock_schedulers_that_fit(cls):
    ours = cls()
    expected = {
        "VPSDEScheduler": {name for name, taken in TAKEN_BY.items() if taken is VPSDEScheduler},
        "FlowSDEScheduler": {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"},
    }.get(cls.__name__, set())
    assert set(cls._compatibles) <= expected
    assert (len(cls._compatibles) >= 2) == bool(expected)
    for name in cls._compatibles:
        if name == "DPMSolverSDEScheduler":
            continue  # needs torchsde
        back = cls.from_config(getattr(diffusers, name).from_config(ours.config).config)
        assert {k: v for k, v in back.config.items() if k in ours.config} == dict(ours.config), name


@pytest.mark.parametrize("cls", OURS.values())
def test_saving_leaves_the_config_in_memory_as_it_is(cls, tmp_path):
    ours = cls()
    before = dict(ours.config)
    ours.save_pretrained(tmp_path)
    repr(ours)
    assert dict(ours.config) == before
    again = cls.from_pretrained(tmp_path)
    assert dict(again.config) == {k: v for k, v in before.items() if k != "_use_default_values"}


# ---------------------------------------------------------------------- the sampler's settings stay on their side

SOLVERS = [
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "solver_type": "midpoint"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 2, "solver_type": "heun"}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3, "solver_type": "heun"}),
    ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh1"}),
    ("DEISMultistepScheduler", {"solver_order": 3, "solver_type": "logrho"}),
    ("SASolverScheduler", {"predictor_order": 3, "corrector_order": 2}),
]
SOLVER_IDS = [f"{name}-{i}" for i, (name, _) in enumerate(SOLVERS)]


def swapped(scheduler, cls, through, path, **arguments):
    config = scheduler.config if through == "memory" else from_json(scheduler, path / cls.__name__)
    return cls.from_config(config, **arguments)


@pytest.mark.parametrize("through", ["memory", "json"])
@pytest.mark.parametrize(("name", "arguments"), SOLVERS, ids=SOLVER_IDS)
def test_the_old_sampler_does_not_leak_and_comes_back(name, arguments, through, tmp_path):
    default = VPSDEScheduler().config
    stock_cls = getattr(diffusers, name)
    ours = swapped(stock_cls(**arguments), VPSDEScheduler, through, tmp_path / "a")
    for key in SAMPLER_KEYS:
        assert ours.config[key] == default[key]
    # Ours to ours keeps both sides, and an argument of ours is not the stock's.
    again = swapped(ours, VPSDEScheduler, through, tmp_path / "b", solver_order=1)
    assert again.config.solver_order == 1
    for scheduler in (ours, again):
        back = swapped(scheduler, stock_cls, through, tmp_path / "c")
        assert {key: back.config[key] for key in arguments} == arguments
    # And on the way out once more: ours is as it was.
    for key in SAMPLER_KEYS:
        assert swapped(back, VPSDEScheduler, through, tmp_path / "d").config[key] == again.config[key]


@pytest.mark.parametrize("through", ["memory", "json"])
@pytest.mark.parametrize("cls", OURS.values())
@pytest.mark.parametrize("name", [n for n, taken in TAKEN_BY.items() if taken in (VPSDEScheduler, FlowSDEScheduler)])
def test_a_round_trip_through_any_stock_class_loses_nothing(name, cls, through, tmp_path):
    if name in ("DPMSolverSDEScheduler", "ScoreSdeVpScheduler", "RePaintScheduler", "UnCLIPScheduler"):
        pytest.skip("cannot be made from this config here, or is deprecated")
    if TAKEN_BY[name] is FlowSDEScheduler and cls is not FlowSDEScheduler and through == "json":
        pytest.skip("a scheduler of another path: only what stays in memory is asked for")
    ours = cls(solver_type="midpoint", solver_order=2, gaussian_std=0.0, time_grid="karras", predictor="exponential")
    theirs = swapped(ours, getattr(diffusers, name), through, tmp_path / "a")
    back = swapped(theirs, cls, through, tmp_path / "b")
    for key, value in public(ours.config).items():
        assert back.config[key] == value, key
    for scheduler in (ours, back):
        scheduler.set_timesteps(9, **({"mu": 1.0} if cls is FlowSDEScheduler else {}))
    assert back.rows == ours.rows


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_a_stock_solver_made_from_ours_has_its_own_defaults(name, tmp_path):
    # None is no order that they know, and heun and midpoint are names that some of them do not have.
    cls = getattr(diffusers, name)
    for ours in (VPSDEScheduler(solver_order=1), VPSDEScheduler.from_config(diffusers.DDIMScheduler().config)):
        for through in ("memory", "json"):
            theirs = swapped(ours, cls, through, tmp_path)
            for key in SAMPLER_KEYS:
                assert theirs.config[key] == cls().config[key]


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_a_file_of_ours_is_read_by_stock_solvers_without_this_package(name, tmp_path, monkeypatch):
    monkeypatch.delattr(diffusers.SchedulerMixin, "extract_init_dict")  # what importing the package has added
    cls = getattr(diffusers, name)
    for ours in (VPSDEScheduler(solver_order=1), VPSDEScheduler.from_config(cls(solver_order=3).config)):
        ours.save_pretrained(tmp_path)
        theirs = cls.from_pretrained(tmp_path)
        assert {key: theirs.config[key] for key in SAMPLER_KEYS} == {key: cls().config[key] for key in SAMPLER_KEYS}


def test_an_explicit_argument_wins_on_both_sides():
    ours = VPSDEScheduler.from_config(diffusers.UniPCMultistepScheduler().config, solver_order=2)
    assert ours.config.solver_order == 2
    theirs = diffusers.UniPCMultistepScheduler.from_config(ours.config, solver_order=3)
    assert theirs.config.solver_order == 3
    assert VPSDEScheduler.from_config(theirs.config).config.solver_order == 2


def test_every_key_that_both_sides_know_is_thought_of():
    """A name that a new diffusers shares with us must be sorted: is it the network's, the grid's or a sampler's?"""
    shared = set()
    for cls in OURS.values():
        theirs = {key for name, keys in stock_arguments().items() if TAKEN_BY.get(name) is cls for key in keys}
        shared |= (cls._get_init_keys(cls) - {"self"}) & theirs
    network = {
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
        *("rescale_betas_zero_snr", "thresholding", "dynamic_thresholding_ratio", "sample_max_value", "clip_sample"),
        *("clip_sample_range", "variance_type", "sigma_data", "sigma_min", "sigma_max"),
    }
    grid = {
        *("timestep_spacing", "steps_offset", "final_sigmas_type", "rho", "sampling_eps", "shift", "shift_terminal"),
        *("use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
        "time_shift_type",
    }
    recipe = {"snr", "correct_steps"}  # ScoreSdeVe's, which is taken over whole
    assert shared == network | grid | recipe | set(SAMPLER_KEYS)


# ---------------------------------------------------------------------- grids of DPM-Solver's kin


@pytest.mark.parametrize(("spacing", "offset"), [("linspace", 0), ("leading", 0), ("leading", 1), ("trailing", 0)])
@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler"]
)
def test_timesteps_of_dpm_solvers_kin_are_theirs(name, spacing, offset, tmp_path):
    theirs = getattr(diffusers, name)(timestep_spacing=spacing, steps_offset=offset)
    ours = VPSDEScheduler.from_config(theirs.config, time_grid=None, predictor="ancestral")
    # The grid survives saving, ours and theirs.
    saved = VPSDEScheduler.from_config(from_json(ours, tmp_path / "ours"))
    again = VPSDEScheduler.from_config(from_json(theirs, tmp_path / "theirs"), time_grid=None, predictor="ancestral")
    through = VPSDEScheduler.from_config(diffusers.DDIMScheduler.from_config(ours.config).config)
    for n in (1, 2, 3, 5, 7, 10, 13, 20, 25, 50, 77, 100, 333, 500):
        theirs.set_timesteps(n)
        for scheduler in (ours, saved, again, through):
            scheduler.set_timesteps(n)
            assert scheduler.timesteps.tolist() == theirs.timesteps.tolist()


def test_a_spacing_that_the_user_names_is_the_documented_one():
    config = diffusers.DPMSolverMultistepScheduler().config
    for arguments in ({"timestep_spacing": "linspace", "time_grid": None}, {"time_grid": "uniform"}):
        ours, plain = (
            cls(**arguments) for cls in (functools.partial(VPSDEScheduler.from_config, config), VPSDEScheduler)
        )
        for scheduler in (ours, plain):
            scheduler.set_timesteps(5)
        assert ours.rows[-1].t == pytest.approx(plain.rows[-1].t, abs=1e-3)
    # DDIM made from DPM-Solver's config has DDIM's spacing, though the keys of the other are still there.
    theirs = diffusers.DDIMScheduler.from_config(config)
    ours = VPSDEScheduler.from_config(theirs.config, time_grid=None)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("name", ["DPMSolverSinglestepScheduler", "UnCLIPScheduler"])
def test_a_scheduler_without_a_name_for_its_grid(name):
    theirs = getattr(diffusers, name)()
    ours = VPSDEScheduler.from_config(theirs.config, time_grid=None, predictor="ancestral")
    for n in (2, 6, 10, 50):
        theirs.set_timesteps(n)
        ours.set_timesteps(n)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler"]
)
def test_flow_grids_of_dpm_solvers_kin_are_theirs(name, shift):
    theirs = getattr(diffusers, name)(use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction")
    ours = FlowSDEScheduler.from_config(theirs.config, time_grid="uniform", predictor="ancestral")
    for n in (1, 2, 5, 10, 30, 100):
        theirs.set_timesteps(n)
        ours.set_timesteps(n)
        # They cut the timesteps down to integers, and all but UniPC start at t = 0.999.
        difference = ours.timesteps.double() - theirs.timesteps.double()
        assert -1e-6 <= float(difference.min())
        assert float(difference.max()) < 2.0


# ---------------------------------------------------------------------- schedulers of a user


class UserSDEScheduler(SubVPSDEScheduler):
    """A user's scheduler: the arguments of one of ours, another SDE."""

    def setup(self, sde, final_time=None):
        super().setup(RectifiedFlowSDE(), final_time)


@pytest.mark.parametrize("through", ["memory", "json"])
def test_a_users_scheduler_reads_its_own_config(through, tmp_path):
    own = UserSDEScheduler(prediction_type="flow_prediction", predictor="ancestral", snr=0.3)
    again = swapped(own, UserSDEScheduler, through, tmp_path)
    assert type(again) is UserSDEScheduler
    assert public(again.config) == public(own.config)
    if through == "json":
        assert public(UserSDEScheduler.from_pretrained(tmp_path / "UserSDEScheduler").config) == public(own.config)


@pytest.mark.parametrize("detour", [None, "DDPMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("through", ["memory", "json"])
def test_a_users_config_is_no_other_class_s(through, detour, tmp_path):
    own = UserSDEScheduler(prediction_type="flow_prediction", predictor="ancestral", snr=0.3)
    source = own if detour is None else swapped(own, getattr(diffusers, detour), through, tmp_path / "a")
    config = source.config if through == "memory" else from_json(source, tmp_path / "b")
    for cls in OURS.values():
        with pytest.raises(ValueError, match=r"Use UserSDEScheduler\.from_config"):
            cls.from_config(config)
    assert public(UserSDEScheduler.from_config(config).config).items() >= public(own.config).items()


def test_a_users_subclass_takes_what_its_base_takes():
    config = SubVPSDEScheduler(beta_end=0.01).config
    assert UserSDEScheduler.from_config(config).config.beta_end == 0.01
    with pytest.raises(ValueError, match=r"Use VPSDEScheduler\.from_config"):
        UserSDEScheduler.from_config(diffusers.DDPMScheduler().config)


def test_a_config_written_before_classes_were_noted_is_read():
    config = {k: v for k, v in VESDEScheduler(sigma_max=20.0).config.items() if k != "_sde_class"}
    assert VESDEScheduler.from_config(config).config.sigma_max == 20.0
    with pytest.raises(ValueError, match=r"Use VESDEScheduler\.from_config"):
        VPSDEScheduler.from_config(config)


def test_a_config_written_when_solver_types_were_shared_is_read():
    theirs = diffusers.UniPCMultistepScheduler(solver_order=3)
    config = {k: v for k, v in VPSDEScheduler.from_config(theirs.config).config.items() if not k.startswith("_")}
    old = {**config, "solver_order": 3, "solver_type": "bh2", "_class_name": "VPSDEScheduler"}
    ours = VPSDEScheduler.from_config(old)
    assert (ours.config.solver_order, ours.config.solver_type) == (VPSDEScheduler().config.solver_order, "heun")
    back = diffusers.UniPCMultistepScheduler.from_config(ours.config)
    assert (back.config.solver_order, back.config.solver_type) == (3, "bh2")


def test_a_flow_made_of_a_vp_config_is_refused():
    ours = VPSDEScheduler.from_config(diffusers.UniPCMultistepScheduler().config)
    flow = diffusers.UniPCMultistepScheduler.from_config(ours.config, use_flow_sigmas=True)
    with pytest.raises(ValueError, match="use_flow_sigmas"):
        VPSDEScheduler.from_config(flow.config)


@pytest.mark.parametrize(("version", "expected"), [("0.1.0.dev0", None), ("0.2.0.dev0", 3), ("7.0", 3), ("x", 3)])
def test_the_default_order_of_before_is_read_as_the_default_of_now(version, expected, tmp_path):
    VPSDEScheduler(solver_order=3).save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_diffusers_sde_version": version}))
    assert VPSDEScheduler.from_pretrained(tmp_path).config.solver_order == expected
    file.write_text(json.dumps({**json.loads(file.read_text()), "solver_order": 2}))
    assert VPSDEScheduler.from_pretrained(tmp_path).config.solver_order == 2


def test_a_class_that_diffusers_names_and_does_not_have_is_left_out(monkeypatch):
    """Without transformers diffusers 0.35 lists ScoreSdeVpScheduler, and has no such attribute."""
    listed = [*dir(diffusers.schedulers), "AbsentScheduler"]
    monkeypatch.setattr(type(diffusers.schedulers), "__dir__", lambda module: listed)
    found = stock_arguments.__wrapped__()
    assert "AbsentScheduler" not in found and found.keys() == stock_arguments().keys()
