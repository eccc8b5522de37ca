"""What every key of a scheduler's config has to be: one line for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..checks import check_choice, check_flag, check_integer, check_number, check_numbers, check_ordered
from ..correctors import CORRECTORS
from ..parametrizations import PREDICTION_TYPES, TIME_CONDITIONINGS
from ..predictors import PREDICTORS, SOLVER_TYPES
from ..sdes import BETA_SCHEDULES
from ..time_grids import TIME_GRIDS, TIMESTEP_SPACINGS

# A table is built and a time is listed for each: a config of a few hundred bytes must not cost gigabytes.
LONGEST_TABLE = 100_000
MOST_CORRECTIONS = 1000
LARGEST_BETA = 1000.0  # beta(1) of a linear SDE, 20 in the paper; beyond it no signal is left at most times
SMALLEST_TIME = 1e-9  # nearer to the data coefficients leave the range of float32
LANGEVIN_NORMS = ("sample", "batch")
VARIANCE_TYPES = (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


def _or_none(check: Callable[..., Any], **bounds: Any) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value, **bounds)


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
_SCALE = partial(check_number, at_least=1e-9, at_most=1e6)  # its square, and one over that, are numbers of float32
_FACTOR = partial(check_number, at_least=1e-3, at_most=1e3)
_NUMBER_OR_NONE = _or_none(check_number)
_COUNT_OR_NONE = _or_none(check_integer, at_least=1)
CONFIG_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    # the network
    "num_train_timesteps": partial(check_integer, at_least=1, at_most=LONGEST_TABLE),
    "prediction_type": partial(check_choice, allowed=PREDICTION_TYPES),
    "preconditioning": partial(check_choice, allowed=(None, "edm")),
    "time_conditioning": partial(check_choice, allowed=(None, *TIME_CONDITIONINGS)),
    "sigma_data": _SCALE,
    "variance_type": partial(check_choice, allowed=VARIANCE_TYPES),
    # its path
    "beta_start": partial(check_number, at_least=0.0),
    "beta_end": _POSITIVE,
    "beta_schedule": partial(check_choice, allowed=BETA_SCHEDULES),
    "trained_betas": _check_betas,
    "rescale_betas_zero_snr": check_flag,
    "continuous": check_flag,
    "sigma_min": _SCALE,
    "sigma_max": _SCALE,
    # the sampler
    "predictor": partial(check_choice, allowed=PREDICTORS),
    "corrector": partial(check_choice, allowed=(None, *CORRECTORS)),
    "probability_flow": check_flag,
    "stochasticity": _or_none(check_number, at_least=0.0, at_most=1000.0),
    "solver_order": _or_none(check_integer, at_least=1, at_most=3),
    "solver_type": partial(check_choice, allowed=SOLVER_TYPES),
    "solver_correction": check_flag,
    "gaussian_std": partial(check_number, at_least=0.0, at_most=1e6),
    "correct_steps": partial(check_integer, at_least=1, at_most=MOST_CORRECTIONS),
    "snr": partial(check_number, above=0.0, at_most=1000.0),
    "langevin_norm": partial(check_choice, allowed=LANGEVIN_NORMS),
    "denoise_final": check_flag,
    "final_sigmas_type": partial(check_choice, allowed=("zero", "sigma_min")),
    # clipping
    "clip_sample": check_flag,
    "clip_sample_range": _SCALE,
    "thresholding": check_flag,
    "dynamic_thresholding_ratio": partial(check_number, above=0.0, at_most=1.0),
    "sample_max_value": partial(check_number, at_least=1.0, at_most=1e6),
    # the grid
    "time_grid": partial(check_choice, allowed=(None, *TIME_GRIDS)),
    "rho": partial(check_number, at_least=0.01, at_most=1000.0),
    "sampling_eps": partial(check_number, at_least=SMALLEST_TIME),
    "timestep_spacing": partial(check_choice, allowed=TIMESTEP_SPACINGS),
    "steps_offset": partial(check_integer, at_least=0, at_most=LONGEST_TABLE - 1),
    "shift": _FACTOR,
    "use_dynamic_shifting": check_flag,
    "base_shift": _NUMBER_OR_NONE,
    "max_shift": _NUMBER_OR_NONE,
    "base_image_seq_len": _COUNT_OR_NONE,
    "max_image_seq_len": _COUNT_OR_NONE,
    "time_shift_type": partial(check_choice, allowed=("exponential", "linear")),
    "shift_terminal": _check_terminal,
}


def checked_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The known keys of a config with their values as plain Python ones.

    Raises:
        ValueError: A value of the wrong type or out of range; the message names the key.
    """
    checked = {key: CONFIG_CHECKS[key](key, value) for key, value in config.items() if key in CONFIG_CHECKS}
    offset, entries = checked.get("steps_offset", 0), checked.get("num_train_timesteps", LONGEST_TABLE)
    if offset >= entries:
        raise ValueError(f"steps_offset must be less than num_train_timesteps = {entries}, got {offset!r}.")
    is_linear = checked.get("continuous", "beta_schedule" not in checked)  # sub-VP has no other
    if is_linear and "beta_start" in checked:
        check_ordered("beta_start", checked["beta_start"], "beta_end", checked["beta_end"])
        check_number("beta_end times num_train_timesteps", checked["beta_end"] * entries, at_most=LARGEST_BETA)
    return checked


# Keys of stock configs with which ``conversion`` calculates.
STOCK_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "num_train_timesteps": CONFIG_CHECKS["num_train_timesteps"],
    "correct_steps": partial(check_integer, at_least=0, at_most=MOST_CORRECTIONS),
    "beta_min": partial(check_number, at_least=0.0),
    "beta_max": _POSITIVE,
    "flow_shift": _or_none(check_number, above=0.0),
    "lambda_min_clipped": lambda name, value: check_numbers(name, [value]),  # -inf is what it should be
}


def check_stock_numbers(config: Mapping[str, Any]) -> None:
    """Raise a ValueError if a number with which a stock config is read is none, or is missing."""
    if "beta_min" in config and "beta_max" not in config:
        raise ValueError("beta_max is missing in this config, beside beta_min.")
    for key in STOCK_CHECKS.keys() & config.keys():
        STOCK_CHECKS[key](key, config[key])
