"""``defaults``: what the arguments are that nobody has set, by name."""

import diffusers
import pytest

from diffusers_sde import FlowSDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.schedulers.arguments import DEFAULTS, SAMPLER_ARGUMENTS

CLASSES = (VPSDEScheduler, VESDEScheduler, SubVPSDEScheduler, FlowSDEScheduler)
NAMES = tuple(DEFAULTS["exact"])


def chosen(scheduler):
    return {name: scheduler.config[name] for name in NAMES}


def test_exact_is_what_the_arguments_are_by_themselves():
    stated = {a.name: a.default for a in SAMPLER_ARGUMENTS}
    assert DEFAULTS["exact"] == {name: stated[name] for name in NAMES}
    assert DEFAULTS["robust"].keys() == DEFAULTS["exact"].keys()


@pytest.mark.parametrize("cls", CLASSES)
def test_a_choice_fills_in_what_is_left_out_and_nothing_else(cls, tmp_path):
    assert chosen(cls()) == DEFAULTS["exact"]
    robust = cls(defaults="robust", gaussian_std=0.1)
    assert chosen(robust) == {**DEFAULTS["robust"], "gaussian_std": 0.1}
    robust.set_timesteps(7)
    spelled = cls(**{**DEFAULTS["robust"], "gaussian_std": 0.1})
    spelled.set_timesteps(7)
    assert robust.rows == spelled.rows
    robust.save_pretrained(tmp_path)
    for again in (cls.from_pretrained(tmp_path), cls.from_config(robust.config)):
        assert chosen(again) == chosen(robust) and again.config.defaults == "robust"


@pytest.mark.parametrize("cls", CLASSES)
def test_another_choice_replaces_what_the_first_one_filled_in(cls, tmp_path):
    cls(defaults="robust", gaussian_std=0.1).save_pretrained(tmp_path)
    exact = cls.from_pretrained(tmp_path, defaults="exact")
    assert chosen(exact) == {**DEFAULTS["exact"], "gaussian_std": 0.1}
    assert chosen(cls.from_config(exact.config, defaults="robust")) == {**DEFAULTS["robust"], "gaussian_std": 0.1}
    explicit = cls.from_config(exact.config, defaults="robust", solver_order=1, time_grid="log_snr")
    assert (explicit.config.solver_order, explicit.config.time_grid) == (1, "log_snr")


def test_an_old_config_is_sampled_as_before():
    config = {k: v for k, v in VPSDEScheduler().config.items() if k != "defaults"}
    assert chosen(VPSDEScheduler.from_config(config)) == DEFAULTS["exact"]
    only_the_grid = VPSDEScheduler(timestep_spacing="trailing", defaults="robust")
    assert only_the_grid.config.time_grid is None, "diffusers' grid was asked for"


def test_a_stock_config_takes_it_and_keeps_a_grid_that_it_names():
    config = diffusers.DDPMScheduler().config
    assert chosen(VPSDEScheduler.from_config(config, defaults="robust")) == DEFAULTS["robust"]
    config = diffusers.DPMSolverMultistepScheduler(use_lu_lambdas=True).config
    swapped = VPSDEScheduler.from_config(config, defaults="robust")
    assert chosen(swapped) == {**DEFAULTS["robust"], "time_grid": "log_snr"}
    back = VPSDEScheduler.from_config(diffusers.DPMSolverMultistepScheduler.from_config(swapped.config).config)
    assert chosen(back) == chosen(swapped) and back.config.defaults == "robust"


@pytest.mark.parametrize("wrong", ["rough", None, 1])
def test_an_unknown_choice_is_refused_by_name(wrong):
    for make in (lambda: VPSDEScheduler(defaults=wrong), lambda: VPSDEScheduler.from_config({}, defaults=wrong)):
        with pytest.raises(ValueError, match="defaults"):
            make()
