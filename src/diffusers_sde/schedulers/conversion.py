"""Reading the configs of diffusers' own schedulers: which path a network was trained on, and its constants.

A stock config mixes three kinds of keys. Those that describe the *network* (betas, sigmas, prediction type, shift) must
be honoured exactly or refused. Those that choose a *time grid* (spacing, Karras, shift) are honoured. Those of the old
*sampler* (solver type, corrector switches, s_churn) are what the user is replacing; they are kept in the config, so
that swapping back loses nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection
from typing import Any

import diffusers

FITTING_SCHEDULER = {
    "vp": "VPSDEScheduler",
    "sub_vp": "SubVPSDEScheduler",
    "ve": "VESDEScheduler",
    "edm": "VESDEScheduler",
    "flow": "FlowSDEScheduler",
}
FAMILY_NAMES = {
    "vp": "a variance-preserving (DDPM-type) model",
    "sub_vp": "a sub-VP model",
    "ve": "a variance-exploding model",
    "edm": "an EDM-preconditioned variance-exploding model",
    "flow": "a rectified-flow (flow-matching) model",
}
_OWN = {
    "VPSDEScheduler": "vp",
    "SubVPSDEScheduler": "sub_vp",
    "VESDEScheduler": "ve",
    "FlowSDEScheduler": "flow",
}


_NOT_AN_SDE = {
    "clip_denoised": "a consistency model",
    "stages": "stage-wise generation (Helios)",
    "scale_factors": "scale-wise generation (FlowMatchLCM)",
}


def config_family(config: dict[str, Any]) -> str | None:
    """The kind of path a scheduler config describes: ``vp``, ``sub_vp``, ``ve``, ``edm``, ``flow``, or None if unknown.

    Decided by the class name where it is one of ours and by characteristic keys otherwise: configs taken in memory do
    not carry the class name.
    """
    name = config.get("_class_name")
    if isinstance(name, str) and name in _OWN:
        return _OWN[name]
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return "flow"
    if config.get("timestep_type") == "continuous":  # EulerDiscrete as Stable Video Diffusion uses it
        return "edm"
    if any(key in config for key in ("beta_start", "beta_schedule", "trained_betas", "beta_min")):
        return "vp"
    if "sampling_eps" in config and "sigma_max" in config:
        return "ve"
    if "sigma_data" in config and "sigma_max" in config:
        return "edm"
    if "shift" in config or "base_shift" in config:
        return "flow"
    return None


def with_stock_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the defaults of the stock class that wrote it filled in.

    A config read from JSON may be older than some arguments of its class; there the class's own default holds (Euler's
    spacing, Heun's betas, DDPM's clipping), not ours.
    """
    name = config.get("_class_name")
    stock = getattr(diffusers, name, None) if isinstance(name, str) and name not in _OWN else None
    if not inspect.isclass(stock):
        return dict(config)
    parameters = list(inspect.signature(stock.__init__).parameters.values())[1:]
    return {**{p.name: p.default for p in parameters if p.default is not p.empty}, **config}


def stock_keys() -> frozenset[str]:
    """Arguments of diffusers' own schedulers, which a swapped config may hold."""
    classes = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler") and name not in _OWN]
    return frozenset(key for cls in classes for key in inspect.signature(cls.__init__).parameters)


def translate_config(
    config: dict[str, Any], target: str, families: tuple[str, ...], known: Collection[str]
) -> dict[str, Any]:
    """Arguments of our scheduler ``target`` that a config implies beyond the keys both share by name.

    Args:
        config: The config.
        target: Name of our scheduler.
        families: The paths it is about.
        known: Its arguments.

    Raises:
        ValueError: The config describes a path that ``target`` is not about, naming the class that is; or it holds a
            setting that would change the result and cannot be honoured.
    """
    source = config.get("_class_name") or "This config"
    for key, meaning in _NOT_AN_SDE.items():
        if config.get(key) is not None:
            raise ValueError(f"{source} cannot be honoured: {key} belongs to {meaning}.")
    if source == "CosineDPMSolverMultistepScheduler" or (
        "sigma_data" in config
        and "lower_order_final" in config
        and "algorithm_type" not in config
        and "beta_start" not in config
    ):
        raise ValueError(f"{source} cannot be honoured: it feeds the network atan(sigma), which no class here does.")
    family = config_family(config)
    if family is None:
        foreign = sorted(key for key in config if key not in known and not key.startswith("_"))
        if foreign or (config.get("_class_name") and source != target):
            raise ValueError(
                f"{source} describes no SDE that is known here"
                + (f" (keys {', '.join(foreign)})" if foreign else "")
                + f": construct {target}(...) with the arguments that fit the network."
            )
        return {}
    if family not in families:
        raise ValueError(
            f"{source} describes {FAMILY_NAMES[family]}, which {target} cannot represent. Use "
            f"{FITTING_SCHEDULER[family]}.from_config(...)."
        )
    if str(config.get("_class_name")) in _OWN:
        return {}
    _refuse(config, family)
    return {"vp": _from_vp, "ve": _from_ve, "edm": _from_edm, "flow": _from_flow}[family](config)


def _refuse(config: dict[str, Any], family: str) -> None:
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
    if family != "vp" and config.get("thresholding"):
        raise ValueError("thresholding=True cannot be honoured outside VP models; use clip_sample instead.")
    for key in ("sigma_min", "sigma_max"):
        if family in ("vp", "flow") and config.get(key) is not None and "sampling_eps" not in config:
            raise ValueError(f"{key}={config[key]!r} cannot be honoured next to a table of betas or a flow.")


def _grid(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("use_karras_sigmas"):
        return {"time_grid": "karras"}
    if config.get("use_exponential_sigmas") or config.get("use_lu_lambdas"):
        return {"time_grid": "log_snr"}
    return {"time_grid": None}


def _from_vp(config: dict[str, Any]) -> dict[str, Any]:
    if "beta_min" in config:  # ScoreSdeVp: the paper's continuous VP SDE, whose networks are fed 999 t
        n = config.get("num_train_timesteps", 2000)
        return {
            "beta_start": config["beta_min"] / n,
            "beta_end": config["beta_max"] / n,
            "continuous": True,
            "time_grid": "uniform",
            "time_conditioning": "score_sde",
        }
    if not any(config.get(key) for key in ("trained_betas", "beta_schedule", "beta_start")):
        raise ValueError("The config names no betas (IPNDMScheduler's are its own); pass trained_betas.")
    ours = _grid(config)
    if ours["time_grid"] is not None:
        # The first table entry, where diffusers' sigma grids end.
        ours["sampling_eps"] = 1.0 / config.get("num_train_timesteps", 1000)
    if config.get("set_alpha_to_one") is False:
        ours["final_sigmas_type"] = "sigma_min"
    return ours


def _from_ve(config: dict[str, Any]) -> dict[str, Any]:
    # What ScoreSdeVeScheduler runs: Algorithm 2 of the paper.
    corrects = config.get("correct_steps", 1) > 0
    return {
        "time_grid": "uniform",
        "predictor": "reverse_diffusion",
        "corrector": "langevin" if corrects else None,
        "correct_steps": max(config.get("correct_steps", 1), 1),
    }


def _from_edm(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("final_sigmas_type", "zero") != "zero":
        raise ValueError(f"final_sigmas_type={config['final_sigmas_type']!r} cannot be honoured for EDM models.")
    schedule = config.get("sigma_schedule", "karras")
    video = config.get("timestep_type") == "continuous"
    if video and config.get("prediction_type") != "v_prediction":
        raise ValueError(
            "timestep_type='continuous' means EDM's preconditioning with prediction_type='v_prediction' only, got "
            f"prediction_type={config.get('prediction_type')!r}."
        )
    if video and (config.get("sigma_min") is None or config.get("sigma_max") is None):
        raise ValueError("timestep_type='continuous' needs sigma_min and sigma_max in the config.")
    return {
        "preconditioning": "edm",
        "time_conditioning": "edm",
        "time_grid": "karras" if schedule == "karras" else "log_snr",
        **({"sigma_data": 1.0} if video else {}),
        **({"time_grid": _grid(config)["time_grid"] or "karras"} if video else {}),
    }


def _from_flow(config: dict[str, Any]) -> dict[str, Any]:
    for key in ("use_karras_sigmas", "use_exponential_sigmas"):
        if config.get(key):
            raise ValueError(f"{key}=True cannot be honoured for a flow; pass time_grid='karras' or 'log_snr'.")
    ours: dict[str, Any] = {"time_grid": "uniform", "sampling_eps": 1.0 / config.get("num_train_timesteps", 1000)}
    if "flow_shift" in config and config.get("use_flow_sigmas"):
        ours["shift"] = config["flow_shift"]
    if "beta_start" in config and config.get("prediction_type") not in (None, "flow_prediction"):
        raise ValueError(
            f"use_flow_sigmas=True with prediction_type={config['prediction_type']!r}: a DDPM network on a flow's "
            "grid is not a flow model. Use VPSDEScheduler with use_flow_sigmas removed from the config."
        )
    if config.get("final_sigmas_type", "zero") != "zero":
        raise ValueError(f"final_sigmas_type={config['final_sigmas_type']!r} cannot be honoured for flow models.")
    ours["prediction_type"] = "flow_prediction"
    return ours
