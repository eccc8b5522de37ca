"""The configs of diffusers' own schedulers: whose a config is, its defaults, its kind of path and its grid."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import diffusers

# Where a config has this key, its grid spreads one point more than it has levels and leaves out the last, at this time.
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
# These schedulers are for networks that are no score, or for something else than sampling. They are known by their
# name and by a key of their own.
REFUSED_CLASSES = {
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
REFUSED_KEYS = {
    "clip_denoised": "a consistency model",
    "stages": "stage-wise generation (Helios)",
    "scale_factors": "scale-wise generation (FlowMatchLCM)",
    "n_grid": "a network that returns several velocities at once (Piflow)",
}
# The grids linspace and leading of these classes spread n + 1 points and leave out the last, so that the last call is
# not at the data.
LEAVE_OUT_LAST = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)
# These classes have one grid, and no argument that names it.
FIXED_SPACING = {"UnCLIPScheduler": "linspace", "DPMSolverSinglestepScheduler": "linspace"}


def is_stock_class(name: Any) -> bool:
    """Whether diffusers itself has a class of this name (ours are attributes of it as well)."""
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    return inspect.isclass(cls) and cls.__module__.split(".")[0] == "diffusers"


@functools.cache
def stock_arguments() -> dict[str, dict[str, Any]]:
    """Name of each of diffusers' own schedulers to its arguments and their defaults, in order."""
    found = {}
    for module in (diffusers, diffusers.schedulers):
        for name in dir(module):
            cls = getattr(module, name, None) if name.endswith("Scheduler") else None  # None: it needs a library
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
        return name if is_stock_class(name) else None
    keys = [key for key in config if not key.startswith("_")]
    matches = {name: list(args) for name, args in stock_arguments().items() if keys[: len(args)] == list(args)}
    longest = max(map(len, matches.values()), default=0)
    return min(
        (name for name, args in matches.items() if len(args) == longest),
        key=lambda name: (name in REFUSED_CLASSES, name),
        default=None,
    )


def with_stock_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the defaults of the stock class that wrote it filled in.

    A config read from JSON may be older than some arguments of its class; there the class's own default holds (Euler's
    spacing, Heun's betas, DDPM's clipping), not ours.
    """
    name = config.get("_class_name")
    defaults = stock_arguments().get(name, {}) if isinstance(name, str) and is_stock_class(name) else {}
    return {**{k: v for k, v in defaults.items() if v is not inspect.Parameter.empty}, **config}


def stock_keys() -> frozenset[str]:
    """Arguments of diffusers' own schedulers, which a swapped config may hold."""
    return frozenset(key for arguments in stock_arguments().values() for key in arguments)


def config_of(scheduler: Any) -> dict[str, Any]:
    """The config of a scheduler with the name of its class, which one in memory may lack."""
    return with_stock_defaults({**scheduler.config, "_class_name": type(scheduler).__name__})


def family_of_keys(config: dict[str, Any]) -> str | None:
    """The kind of path that the characteristic keys of a stock config describe, or None."""
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


def named_grid(config: dict[str, Any]) -> dict[str, Any]:
    """The ``time_grid`` that a stock config asks for by a flag of its own; None for its ``timestep_spacing``."""
    if config.get("use_karras_sigmas"):
        return {"time_grid": "karras"}
    if config.get("use_exponential_sigmas") or config.get("use_lu_lambdas"):
        return {"time_grid": "log_snr"}
    return {"time_grid": None}


def left_out_of(config: dict[str, Any], time: float = 0.0) -> dict[str, Any]:
    """``LEFT_OUT_KEY`` for the grids of DPM-Solver's kin; ``lower_order_final`` is an argument of all of them."""
    name = stock_class(config)
    leaves_out = name in LEAVE_OUT_LAST or (name is None and "lower_order_final" in config)
    return {LEFT_OUT_KEY: time} if leaves_out else {}
