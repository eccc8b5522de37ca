"""Reading the configs of diffusers' own schedulers: which path a network was trained on, and its constants.

A stock config mixes three kinds of keys. Those that describe the *network* (betas, sigmas, prediction type, shift) must
be honoured exactly or refused. Those that choose a *time grid* by name (Karras and its kin, shift) are honoured, and a
grid uniform in t gives way to ours unless the caller asks for it (``on_our_grid``). Those of the old
*sampler* (solver type, corrector switches, s_churn) are what the user is replacing; they are kept in the config, so
that swapping back loses nothing.

Two names, ``SAMPLER_KEYS``, mean a sampler's setting here and there. Under them a config holds the values of the class
that it belongs to, and under ``KEPT_KEY`` those of the other side, which ``exchanged`` puts back.
"""

from __future__ import annotations

import functools
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

SAMPLER_KEYS = ("solver_order", "solver_type")
KEPT_KEY = "_kept_sampler"
ORIGIN_KEY = "_sde_class"  # our class whose arguments a config holds, also when it has passed through a stock class
# Where the config has it, its grid spreads one point more than it has levels, and leaves out the last, at this time.
LEFT_OUT_KEY = "_left_out_time"

_DISTILLED = (
    "a distilled model, whose network jumps to the data and is no score. If the network in use is not distilled (its "
    "LoRA was unloaded), pass the config of the scheduler that it came with, or "
    "{stock}.from_config(pipe.scheduler.config).config"
)
_INVERTS = (
    "going from data to noise, which SDEPipeline.encode does; for a sampler of the same network, pass "
    "{stock}.from_config(pipe.scheduler.config).config"
)
# Schedulers of networks that are no score, or of something else than sampling, by name and by a key of their own.
_REFUSED_CLASSES = {
    "LCMScheduler": _DISTILLED.format(stock="DDIMScheduler"),
    "TCDScheduler": _DISTILLED.format(stock="DDIMScheduler"),
    "FlowMatchLCMScheduler": _DISTILLED.format(stock="FlowMatchEulerDiscreteScheduler"),
    "FlowMapEulerDiscreteScheduler": "a flow map, whose network takes two times and jumps from one to the other",
    "PiflowScheduler": "a network that returns n_grid velocities at once",
    "MiniMaxH3Scheduler": "a network that is fed 1 - sigma and predicts x0 - eps, with both signs turned round",
    "DDIMInverseScheduler": _INVERTS.format(stock="DDIMScheduler"),
    "DPMSolverMultistepInverseScheduler": _INVERTS.format(stock="DPMSolverMultistepScheduler"),
    "ConsistencyDecoderScheduler": "a consistency decoder",
    "CosineDPMSolverMultistepScheduler": "a network that is fed atan(sigma), which no class here does",
    "SCMScheduler": "a TrigFlow consistency model",
    "HeliosScheduler": "stage-wise generation",
    "HeliosDMDScheduler": "stage-wise generation",
}
_REFUSED_KEYS = {
    "clip_denoised": "a consistency model",
    "stages": "stage-wise generation (Helios)",
    "scale_factors": "scale-wise generation (FlowMatchLCM)",
    "n_grid": "a network that returns several velocities at once (Piflow)",
}
# Their linspace and leading spread n + 1 points and leave out the last, so that the last call is not at the data.
_LEAVE_OUT_LAST = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)
# Classes that have one grid, and no argument that names it.
_FIXED_SPACING = {"UnCLIPScheduler": "linspace", "DPMSolverSinglestepScheduler": "linspace"}


# ---------------------------------------------------------------------- whose config it is


def _is_stock(name: Any) -> bool:
    """Whether diffusers itself has a class of this name (ours are attributes of it as well)."""
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    return inspect.isclass(cls) and cls.__module__.split(".")[0] == "diffusers"


@functools.cache
def stock_arguments() -> dict[str, dict[str, Any]]:
    """Name of each of diffusers' own schedulers to its arguments and their defaults, in order."""
    found = {}
    for module in (diffusers, diffusers.schedulers):
        for name in dir(module):
            cls = getattr(module, name) if name.endswith("Scheduler") else None
            if inspect.isclass(cls) and cls.__module__.split(".")[0] == "diffusers":
                parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
                named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
                found[name] = {p.name: p.default for p in named}
    return {name: arguments for name, arguments in found.items() if arguments}  # none: a library is missing


def stock_class(config: dict[str, Any]) -> str | None:
    """Name of the stock class that a config belongs to; None where that cannot be told.

    A config from JSON names it. One in memory may not, but it begins with the arguments of its class, in their order,
    before what it keeps for others. Two classes of the same arguments cannot be told apart: one that is not refused is
    named then.
    """
    name = config.get("_class_name")
    if name is not None:
        return name if _is_stock(name) else None
    keys = [key for key in config if not key.startswith("_")]
    matches = {name: list(args) for name, args in stock_arguments().items() if keys[: len(args)] == list(args)}
    longest = max(map(len, matches.values()), default=0)
    return min(
        (name for name, args in matches.items() if len(args) == longest),
        key=lambda name: (name in _REFUSED_CLASSES, name),
        default=None,
    )


def origin_class(config: dict[str, Any], target: str) -> str | None:
    """Name of the class of ours whose arguments a config holds, perhaps beside those of a stock class; None if none."""
    name = config.get("_class_name")
    return name if name == target or name in _OWN else config.get(ORIGIN_KEY)


def is_stock_config(config: dict[str, Any], target: str) -> bool:
    """Whether the values of a config under names that both sides have are those of a stock class."""
    origin = origin_class(config, target)
    return origin is None or config.get("_class_name") != origin


def exchanged(config: dict[str, Any]) -> dict[str, Any]:
    """The config for the other side: ``SAMPLER_KEYS`` hold the values that it had, if any, and ours are kept."""
    rest = {k: v for k, v in config.items() if k not in SAMPLER_KEYS}
    kept = {k: config[k] for k in SAMPLER_KEYS if k in config}
    return {**rest, **config.get(KEPT_KEY, {}), KEPT_KEY: kept}


def for_stock(config: dict[str, Any]) -> dict[str, Any]:
    """A config as one of diffusers' own schedulers is to read it: one of ours gives back what the old sampler had."""
    if config.get(ORIGIN_KEY) is None or config.get("_class_name") != config[ORIGIN_KEY]:
        return config
    return {k: v for k, v in exchanged(config).items() if k != "_use_default_values"}


def with_stock_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the defaults of the stock class that wrote it filled in.

    A config read from JSON may be older than some arguments of its class; there the class's own default holds (Euler's
    spacing, Heun's betas, DDPM's clipping), not ours.
    """
    name = config.get("_class_name")
    defaults = stock_arguments().get(name, {}) if isinstance(name, str) and _is_stock(name) else {}
    return {**{k: v for k, v in defaults.items() if v is not inspect.Parameter.empty}, **config}


def stock_keys() -> frozenset[str]:
    """Arguments of diffusers' own schedulers, which a swapped config may hold."""
    return frozenset(key for arguments in stock_arguments().values() for key in arguments)


def config_family(config: dict[str, Any]) -> str | None:
    """The kind of path a scheduler config describes: ``vp``, ``sub_vp``, ``ve``, ``edm``, ``flow``, or None if unknown.

    Decided by the class where it is one of ours, and by characteristic keys of the stock class otherwise.
    """
    for name in (config.get("_class_name"), config.get(ORIGIN_KEY)):
        if name in _OWN:
            return _OWN[name]
    if config.get(ORIGIN_KEY) is not None:  # a user's scheduler, whatever its arguments are called
        return None
    name = stock_class(config)
    if name == "LTXEulerAncestralRFScheduler":
        return "flow"
    own = stock_arguments().get(name or "", config)
    return _family_of_keys({k: v for k, v in config.items() if k in own})


def config_of(scheduler: Any) -> dict[str, Any]:
    """The config of a scheduler with the name of its class, which one in memory may lack."""
    return with_stock_defaults({**scheduler.config, "_class_name": type(scheduler).__name__})


def fitting_class(config: dict[str, Any]) -> str:
    """Name of the scheduler here for the kind of path that a config describes.

    Raises:
        ValueError: It describes none that is known.
    """
    family = config_family(config)
    if family is None:
        raise ValueError(f"{config.get('_class_name') or 'This config'} describes no SDE that is known here.")
    return FITTING_SCHEDULER[family]


def _family_of_keys(config: dict[str, Any]) -> str | None:
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


# ---------------------------------------------------------------------- what it says


def translate_config(
    config: dict[str, Any], target: str, lineage: Collection[str], families: tuple[str, ...], known: Collection[str]
) -> dict[str, Any]:
    """What a config implies for our scheduler ``target`` beyond the keys both share by name.

    Args:
        config: The config.
        target: Name of our scheduler.
        lineage: The names of its class and of those it derives from.
        families: The paths it is about.
        known: Its arguments.

    Returns:
        Arguments of ``target``, and ``LEFT_OUT_KEY`` where the grid is one.

    Raises:
        ValueError: The config describes a path that ``target`` is not about, naming the class that is; or it holds a
            setting that would change the result and cannot be honoured.
    """
    origin = origin_class(config, target)
    if origin is not None:
        # Its values are ours: there is nothing to translate, but they may be those of another SDE.
        if origin not in lineage:
            what = FAMILY_NAMES.get(_OWN.get(origin, ""), "an SDE of its own")
            raise ValueError(
                f"{origin} describes {what}, which {target} cannot represent. Use {origin}.from_config(...)."
            )
        if is_stock_config(config, target):
            if config.get("use_flow_sigmas") and "flow" not in families:
                raise ValueError(
                    f"use_flow_sigmas=True cannot be honoured by {target}, whose config this was: it makes a flow of "
                    "the model. Remove it, or start from the config of the scheduler that the model came with."
                )
            _refuse(config, families[0] if families else "")
        return {}
    source = stock_class(config) or config.get("_class_name") or "This config"
    family = config_family(config)
    _refuse_kind(config, source)
    if family is None:
        foreign = sorted(key for key in config if key not in known and not key.startswith("_"))
        if foreign or source != "This config":
            raise ValueError(
                f"{source} describes no SDE that is known here"
                + (f" (keys {', '.join(foreign)})" if foreign else "")
                + ". If you know the network's SDE and what it predicts, construct the class that fits with them."
            )
        return {}
    _refuse_leftovers(config, source, family)
    _refuse(config, family)
    implied = {"vp": _from_vp, "ve": _from_ve, "edm": _from_edm, "flow": _from_flow}[family](config)
    if family not in families:  # only now, so that the class named does accept the config
        raise ValueError(
            f"{source} describes {FAMILY_NAMES[family]}, which {target} cannot represent. Use "
            f"{FITTING_SCHEDULER[family]}.from_config(...)."
        )
    return implied


def on_our_grid(implied: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What ``translate_config`` found, with our grid for the config's own where that is one uniform in t.

    The grid is part of the sampler, not of the model. Uniform times have their last interval, or their first, far too
    long in log-SNR: stock schedulers beat any sampler of ours there, and none does on ours (benchmarks/swapped.py). A
    grid that is named in the config (Karras and its kin) stays, and so does the paper's own.
    """
    uniform = implied.get("time_grid", "") in (None, "uniform") and "continuous" not in implied
    if not uniform or "corrector" in implied:
        return implied
    n = config.get("num_train_timesteps", 1000)
    rest = {k: v for k, v in implied.items() if k != LEFT_OUT_KEY}
    return {"sampling_eps": 1.0 / n, **rest, "time_grid": "blended"}


def _refuse_kind(config: dict[str, Any], source: str) -> None:
    """Refuse the configs of schedulers that sample no SDE."""
    if source in _REFUSED_CLASSES:
        raise ValueError(f"{source} cannot be honoured: it means {_REFUSED_CLASSES[source]}.")
    for key, meaning in _REFUSED_KEYS.items():
        if config.get(key) is not None:
            raise ValueError(f"{source} cannot be honoured: {key} belongs to {meaning}.")
    twin = stock_arguments().get("FlowMapEulerDiscreteScheduler")
    if "_class_name" not in config and twin and {key for key in config if not key.startswith("_")} == set(twin):
        meaning = _REFUSED_CLASSES["FlowMapEulerDiscreteScheduler"]
        raise ValueError(
            f"{source} cannot be honoured: its keys, {', '.join(twin)}, are those of FlowMatchHeunDiscreteScheduler "
            f"and of FlowMapEulerDiscreteScheduler, and the latter means {meaning}. If it is of the former, pass "
            "{**scheduler.config, '_class_name': 'FlowMatchHeunDiscreteScheduler'}."
        )
    if "shift" in config and "num_train_timesteps" not in config:
        meaning = _REFUSED_CLASSES["MiniMaxH3Scheduler"]
        raise ValueError(
            f"{source} cannot be honoured: shift without num_train_timesteps is MiniMaxH3Scheduler's, of {meaning}."
        )
    if (
        "sigma_data" in config
        and "lower_order_final" in config
        and "algorithm_type" not in config
        and "beta_start" not in config
    ):
        meaning = _REFUSED_CLASSES["CosineDPMSolverMultistepScheduler"]
        raise ValueError(f"{source} cannot be honoured: it means {meaning}.")


def _refuse_leftovers(config: dict[str, Any], source: str, family: str) -> None:
    """Refuse a config in which a scheduler of another path has left keys: one of the two is not the network's."""
    own = stock_arguments().get(source)
    if own is None:
        return
    left = {k: v for k, v in config.items() if k not in own and not k.startswith("_")}
    other = _family_of_keys(left)
    if other is not None and other != family:
        raise ValueError(
            f"{source} describes {FAMILY_NAMES[family]}, but its config also holds keys that a scheduler of "
            f"{FAMILY_NAMES[other]} has left ({', '.join(sorted(left))}): pass the config of the scheduler that the "
            "model came with."
        )


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


def _left_out(config: dict[str, Any], time: float = 0.0) -> dict[str, Any]:
    """``LEFT_OUT_KEY`` for the grids of DPM-Solver's kin; ``lower_order_final`` is an argument of all of them."""
    name = stock_class(config)
    leaves_out = name in _LEAVE_OUT_LAST or (name is None and "lower_order_final" in config)
    return {LEFT_OUT_KEY: time} if leaves_out else {}


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
    # Where a class has no such argument, the key was left by the one before it.
    owner = stock_arguments().get(stock_class(config) or "", config)
    if config.get("set_alpha_to_one") is False and "set_alpha_to_one" in owner:
        ours["final_sigmas_type"] = "sigma_min"
    spacing = _FIXED_SPACING.get(stock_class(config) or "")
    if spacing is not None:
        ours["timestep_spacing"] = spacing
    return {**ours, **_left_out(config)}


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
    # Where the network is fed t itself, N = 1, the stock grid is one point: its pipelines bring their own.
    n = config.get("num_train_timesteps", 1000)
    ours: dict[str, Any] = {"time_grid": "uniform", "sampling_eps": 1.0 / n if n > 1 else 1e-3}
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
    # UniPC's grid ends at 1/N before the shift, that of the others at 0.
    end = ours["sampling_eps"] if stock_class(config) == "UniPCMultistepScheduler" else 0.0
    return {**ours, **_left_out(config, end)}


# ---------------------------------------------------------------------- arguments of other schedulers' methods

_CHURN = "is the noise of EDM's sampler: set stochasticity, or a corrector, in the scheduler's config instead"
_LCM = "belongs to distilled models (LCM, TCD), whose networks are no scores"
_FLOW_MAP = "belongs to flow maps, whose networks take two times"
_OWN_PIPELINE = "belongs to a sampler of its own kind, which no scheduler here is"
# Method and argument to the values that ask for nothing, and why no other is taken.
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
