"""What cannot be honoured of diffusers' schedulers: their configs, and the arguments of their methods."""

from __future__ import annotations

import math
from typing import Any

from .families import FAMILIES, Family
from .stock_configs import REFUSED_CLASSES, REFUSED_KEYS, family_of_keys, stock_arguments


def refuse_kind(config: dict[str, Any], source: str) -> None:
    """Refuse the configs of schedulers that sample no SDE."""
    if source in REFUSED_CLASSES:
        raise ValueError(f"{source} cannot be honoured: it means {REFUSED_CLASSES[source]}.")
    for key, meaning in REFUSED_KEYS.items():
        if config.get(key) is not None:
            raise ValueError(f"{source} cannot be honoured: {key} belongs to {meaning}.")
    twin = stock_arguments().get("FlowMapEulerDiscreteScheduler")
    if "_class_name" not in config and twin and {key for key in config if not key.startswith("_")} == set(twin):
        meaning = REFUSED_CLASSES["FlowMapEulerDiscreteScheduler"]
        raise ValueError(
            f"{source} cannot be honoured: its keys, {', '.join(twin)}, are those of FlowMatchHeunDiscreteScheduler "
            f"and of FlowMapEulerDiscreteScheduler, and the latter means {meaning}. If it is of the former, pass "
            "{**scheduler.config, '_class_name': 'FlowMatchHeunDiscreteScheduler'}."
        )
    if "shift" in config and "num_train_timesteps" not in config:
        meaning = REFUSED_CLASSES["MiniMaxH3Scheduler"]
        raise ValueError(
            f"{source} cannot be honoured: shift without num_train_timesteps is MiniMaxH3Scheduler's, of {meaning}."
        )
    if (
        "sigma_data" in config
        and "lower_order_final" in config
        and "algorithm_type" not in config
        and "beta_start" not in config
    ):
        meaning = REFUSED_CLASSES["CosineDPMSolverMultistepScheduler"]
        raise ValueError(f"{source} cannot be honoured: it means {meaning}.")


def refuse_leftovers(config: dict[str, Any], source: str, family: str) -> None:
    """Refuse a config in which a scheduler of another path has left keys: one of the two is not the network's."""
    own = stock_arguments().get(source)
    if own is None:
        return
    left = {k: v for k, v in config.items() if k not in own and not k.startswith("_")}
    other = family_of_keys(left)
    if other is not None and other != family:
        raise ValueError(
            f"{source} describes {FAMILIES[family].description}, but its config also holds keys that a scheduler of "
            f"{FAMILIES[other].description} has left ({', '.join(sorted(left))}): pass the config of the scheduler "
            "that the model came with."
        )


def refuse_settings(config: dict[str, Any], family: Family | None) -> None:
    """Refuse settings of a stock config that would change the result and have no counterpart on this kind of path."""
    reasons = {
        "use_beta_sigmas": "a grid of beta quantiles; pass time_grid='log_snr', 'karras' or 'uniform' instead",
        "invert_sigmas": "a model that counts noise backwards (Mochi)",
        "snr_shift_scale": "a table shifted in SNR (CogVideoX)",
    }
    neutral = {"snr_shift_scale": (None, 1.0)}
    for key, meaning in reasons.items():
        if config.get(key) and config[key] not in neutral.get(key, ()):
            raise ValueError(f"{key}={config[key]!r} cannot be honoured: it means {meaning}.")
    clipped = config.get("lambda_min_clipped")
    if clipped is not None and math.isfinite(float(clipped)):
        raise ValueError(
            f"lambda_min_clipped={clipped!r} cannot be honoured: this grid starts at the SDE's own end, which needs no "
            "clipping. Set it to -inf in the config."
        )
    if config.get("thresholding") and not (family is not None and family.has_thresholding):
        raise ValueError("thresholding=True cannot be honoured outside VP models; use clip_sample instead.")
    fixes_noise = family is not None and family.fixes_noise and "sampling_eps" not in config
    for key in ("sigma_min", "sigma_max"):
        if fixes_noise and config.get(key) is not None:
            raise ValueError(f"{key}={config[key]!r} cannot be honoured next to a table of betas or a flow.")


# ---------------------------------------------------------------------- arguments of other schedulers' methods

_CHURN = "is the noise of EDM's sampler: set stochasticity, or a corrector, in the scheduler's config instead"
_LCM = "belongs to distilled models (LCM, TCD), whose networks are no scores"
_FLOW_MAP = "belongs to flow maps, whose networks take two times"
_OWN_PIPELINE = "belongs to a sampler of its own kind, which no scheduler here is"
# For each method and argument: the values that ask for nothing, and why no other is taken.
_FOREIGN_ARGUMENTS: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "step": {
        **dict.fromkeys(("s_churn", "s_tmin"), ((None, 0, 0.0), _CHURN)),
        "s_tmax": ((None, math.inf), _CHURN),
        "s_noise": ((None, 1, 1.0), _CHURN),
        "per_token_timesteps": (
            (None,),
            "gives each token a time of its own (LTX conditioned on frames), and a plan has one time for all of them",
        ),
        "variance_noise": ((None,), "is noise drawn by the caller: pass a generator instead"),
        "pred_original_sample": ((None,), "is x0_hat in place of the network's output, which is asked for here"),
        "r_timestep": ((None,), _FLOW_MAP),
        "order": ((None,), "is LMS's: set solver_order in the scheduler's config instead"),
        **dict.fromkeys(("old_pred_original_sample", "timestep_back"), ((None,), "is CogVideoX's own sampler's")),
        **dict.fromkeys(("original_image", "mask"), ((None,), "is RePaint's: use InpaintSDEPipeline")),
    },
    "set_timesteps": {
        "mu": ((None,), "shifts the grid of a flow: use FlowSDEScheduler"),
        **dict.fromkeys(("original_inference_steps", "strength"), ((None, 1.0), _LCM)),
        **dict.fromkeys(("jump_length", "jump_n_sample"), ((None, 1), "is RePaint's: use InpaintSDEPipeline")),
        "num_train_timesteps": ((None,), "is set in the scheduler's config"),
        "sampling_eps": ((None,), "is set in the scheduler's config"),
        **dict.fromkeys(("max_timesteps", "intermediate_timesteps"), ((None,), _LCM)),
        **dict.fromkeys(("stage_index", "is_amplify_first_chunk"), ((None,), _OWN_PIPELINE)),
        **dict.fromkeys(("start_time", "temperature", "block_length"), ((None,), _OWN_PIPELINE)),
    },
}


def refuse_foreign(scheduler: str, method: str, arguments: dict[str, Any]) -> None:
    """Refuse arguments of a method that other schedulers have, unless their value asks for nothing.

    Raises:
        ValueError: One that would change the result, with the reason.
        TypeError: One that no scheduler has.
    """
    for name, value in arguments.items():
        if name not in _FOREIGN_ARGUMENTS[method]:
            raise TypeError(f"{scheduler}.{method}() got an unexpected keyword argument {name!r}")
        neutral, reason = _FOREIGN_ARGUMENTS[method][name]
        if not any(value is known or (isinstance(value, (int, float)) and value == known) for known in neutral):
            raise ValueError(f"{scheduler}.{method} takes no {name}: it {reason}.")
