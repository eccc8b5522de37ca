"""The one list of sampler arguments: what every scheduler takes, and what the decorator refuses."""

import inspect
import pickle
import typing

import pytest

from diffusers_sde import FlowSDEScheduler, SDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.schedulers import SCHEDULERS
from diffusers_sde.schedulers.arguments import SAMPLER_ARGUMENTS, sampler_arguments
from diffusers_sde.sdes import VPSDE

# Signatures as they were when each class spelled them: saved configs rely on every name and default.
SHARED = {
    "predictor": "exponential",
    "corrector": None,
    "probability_flow": False,
    "stochasticity": None,
    "stochastic_indices": None,
    "stochastic_sigmas": None,
    "policy": None,
    "solver_order": None,
    "solver_type": "heun",
    "solver_correction": True,
    "gaussian_std": None,  # 0.05 where data_std is None: what it was
    "data_std": None,
    "correct_steps": 1,
    "snr": 0.01,
    "langevin_norm": "sample",
    "temperature": 1.0,
    "temperature_std": None,
    "time_grid": "sech",
    "rho": 7.0,
    "sampling_eps": 1e-3,
    "sampling_sigma": None,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "denoise_final": True,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "bound_above_sigma": None,
    "data_range": None,
    "variance_type": "fixed_small",
    "time_conditioning": None,
    "sigma_data": 0.5,
    "fitted_plan": None,
}
SIGNATURES = {
    VPSDEScheduler: {
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "trained_betas": None,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "continuous": False,
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "final_sigmas_type": "zero",
        "t_max": 1.0,
        **SHARED,
    },
    SubVPSDEScheduler: {
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "prediction_type": "epsilon",
        "t_max": 1.0,
        **SHARED,
        "sampling_eps": 0.027,
        "time_conditioning": "continuous",
    },
    VESDEScheduler: {
        "num_train_timesteps": 2000,
        "sigma_min": 0.01,
        "sigma_max": 50.0,
        "prediction_type": "score",
        "preconditioning": None,
        **SHARED,
        "snr": 0.15,
        "sampling_eps": 1e-5,
        "timestep_spacing": "linspace",
        "time_conditioning": "sigma",
    },
    FlowSDEScheduler: {
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "time_shift_type": "exponential",
        "shift_terminal": None,
        "prediction_type": "flow_prediction",
        **SHARED,
        "snr": 0.05,
        "sampling_eps": 0.01,
        "timestep_spacing": "linspace",
        "time_conditioning": "continuous",
    },
}
every_class = pytest.mark.parametrize("cls", SIGNATURES, ids=lambda cls: cls.__name__)


def parameters(cls):
    return list(inspect.signature(cls.__init__).parameters.values())[1:]


def test_every_scheduler_is_recorded_here():
    assert set(SIGNATURES) == set(SCHEDULERS.values())


@every_class
def test_names_order_and_defaults_are_those_of_before(cls):
    found = [(p.name, p.default, type(p.default)) for p in parameters(cls)]
    assert found == [(name, value, type(value)) for name, value in SIGNATURES[cls].items()]
    assert cls._get_init_keys(cls) == {"self", *SIGNATURES[cls]}
    config = {k: v for k, v in cls().config.items() if not k.startswith("_")}
    expected = SIGNATURES[cls] | ({"time_conditioning": "discrete"} if cls is VPSDEScheduler else {})
    assert list(config.items()) == list(expected.items())


@every_class
def test_every_argument_is_typed_and_documented(cls):
    assert set(typing.get_type_hints(cls.__init__)) == {*SIGNATURES[cls], "return"}
    for name in SIGNATURES[cls]:
        assert cls.__doc__.count(f"\n    {name}: ") == 1
    assert "{common}" not in cls.__doc__ and max(map(len, cls.__doc__.splitlines())) <= 120


@every_class
def test_unknown_names_and_positions_are_refused(cls):
    with pytest.raises(TypeError, match=rf"{cls.__name__}.__init__\(\) got an unexpected keyword argument 'snrr'"):
        cls(snrr=0.1)
    with pytest.raises(TypeError, match="too many positional"):
        cls(*SIGNATURES[cls].values())
    with pytest.raises(TypeError, match="multiple values for argument 'num_train_timesteps'"):
        cls(1000, num_train_timesteps=1000)


@every_class
def test_own_arguments_are_also_taken_by_position(cls):
    assert cls(500).config.num_train_timesteps == 500
    assert pickle.loads(pickle.dumps(cls(500, snr=0.2))).config == cls(500, snr=0.2).config
    assert cls.from_config(cls(500, snr=0.2).config).config == cls(500, snr=0.2).config


def test_a_bare_class_has_the_defaults_of_the_list():
    class Bare(SDEScheduler):
        @sampler_arguments
        def __init__(self, rate, **sampler):
            assert sampler == {a.name: a.default for a in SAMPLER_ARGUMENTS} | {"snr": 0.5}
            self.setup(VPSDE(rate, 2.0 * rate))

    scheduler = Bare(2.0, snr=0.5)
    assert (scheduler.config.rate, scheduler.config.snr, scheduler.sde.beta_min) == (2.0, 0.5, 2.0)
    assert "sampling_eps: This is the last SDE time" in Bare.__doc__
    with pytest.raises(TypeError, match="missing a required argument: 'rate'"):
        Bare()
    with pytest.raises(ValueError, match="snr must be"):
        Bare(1.0, snr=-1.0)


def test_a_wrong_use_of_the_decorator_is_refused():
    with pytest.raises(TypeError, match=r"must be \*\*sampler, got rate"):

        @sampler_arguments
        def __init__(self, rate): ...

    with pytest.raises(TypeError, match="takes defaults of .*, got snrr"):
        sampler_arguments(snrr=1.0)(lambda self, **sampler: None)
    with pytest.raises(TypeError, match=r"takes defaults of .*, got snr\."):  # it is spelled already
        sampler_arguments(snr=1.0)(lambda self, snr=0.1, **sampler: None)
