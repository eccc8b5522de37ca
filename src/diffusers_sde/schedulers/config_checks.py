"""What every key of a scheduler's config has to be; ``arguments`` says it of those that all schedulers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..basics.checks import check_choice, check_flag, check_integer, check_number, check_numbers, check_ordered
from ..sdes import BETA_SCHEDULES
from .arguments import MOST_CORRECTIONS, SAMPLER_ARGUMENTS, SCALE_CHECK, SMALLEST_TIME, or_none

LARGEST_BETA = 1000.0  # beta(t_max) t_max of a linear SDE, 20 in the paper; beyond it no signal is left at most times


def _check_betas(name: str, value: Any) -> Any:
    """The list as it is: a config holds no tensors."""
    if value is not None:
        check_numbers(name, value, at_least=2)
    return value


def _check_terminal(name: str, value: Any) -> float | None:
    """A time at which a grid may end, or 0 for none."""
    end = None if value is None else check_number(name, value, at_least=0.0, below=1.0)
    return check_number(name, end, at_least=SMALLEST_TIME) if end else end


_POSITIVE = partial(check_number, above=0.0)
_FACTOR = partial(check_number, at_least=1e-3, at_most=1e3)
_NUMBER_OR_NONE = or_none(check_number)
_COUNT_OR_NONE = or_none(check_integer, at_least=1)
# These are arguments of single classes of this package.
OWN_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "preconditioning": partial(check_choice, allowed=(None, "edm")),
    "beta_start": partial(check_number, at_least=0.0),
    "beta_end": _POSITIVE,
    "beta_schedule": partial(check_choice, allowed=BETA_SCHEDULES),
    "trained_betas": _check_betas,
    "rescale_betas_zero_snr": check_flag,
    "continuous": check_flag,
    "t_max": partial(check_number, at_least=1e-3, at_most=1e6),
    "sigma_min": SCALE_CHECK,
    "sigma_max": SCALE_CHECK,
    "final_sigmas_type": partial(check_choice, allowed=("zero", "sigma_min")),
    "thresholding": check_flag,
    "dynamic_thresholding_ratio": partial(check_number, above=0.0, at_most=1.0),
    "sample_max_value": partial(check_number, at_least=1.0, at_most=1e6),
    "shift": _FACTOR,
    "use_dynamic_shifting": check_flag,
    "base_shift": _NUMBER_OR_NONE,
    "max_shift": _NUMBER_OR_NONE,
    "base_image_seq_len": _COUNT_OR_NONE,
    "max_image_seq_len": _COUNT_OR_NONE,
    "time_shift_type": partial(check_choice, allowed=("exponential", "linear")),
    "shift_terminal": _check_terminal,
}
CONFIG_CHECKS = {**OWN_CHECKS, **{a.name: a.check for a in SAMPLER_ARGUMENTS}}


def checked_own(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a class of this package that are not shared, with their values as plain Python ones.

    Raises:
        ValueError: A value of the wrong type or out of range; the message names the key.
    """
    checked = {key: check(key, config[key]) for key, check in OWN_CHECKS.items() if key in config}
    is_linear = checked.get("continuous", "beta_schedule" not in checked)  # sub-VP has no other
    if is_linear and "beta_start" in checked:
        check_ordered("beta_start", checked["beta_start"], "beta_end", checked["beta_end"], may_be_equal=True)
        largest = checked["beta_end"] * config["num_train_timesteps"] * checked["t_max"]
        check_number("beta_end times num_train_timesteps times t_max", largest, at_most=LARGEST_BETA)
    return checked


# The readers of stock configs calculate with these keys.
STOCK_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "num_train_timesteps": CONFIG_CHECKS["num_train_timesteps"],
    "correct_steps": partial(check_integer, at_least=0, at_most=MOST_CORRECTIONS),
    "beta_min": partial(check_number, at_least=0.0),
    "beta_max": _POSITIVE,
    "flow_shift": or_none(check_number, above=0.0),
    "lambda_min_clipped": lambda name, value: check_numbers(name, [value]),  # -inf is what it should be
}


def check_stock_numbers(config: Mapping[str, Any]) -> None:
    """Raise a ValueError if a number with which a stock config is read is none, or is missing."""
    if "beta_min" in config and "beta_max" not in config:
        raise ValueError("beta_max is missing in this config, beside beta_min.")
    for key in STOCK_CHECKS.keys() & config.keys():
        STOCK_CHECKS[key](key, config[key])
