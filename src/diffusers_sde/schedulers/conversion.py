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

from collections.abc import Collection, Mapping
from typing import Any

from .families import (
    FAMILIES,
    FAMILY_OF_CLASS,
    FITTING_SCHEDULER,
    ORIGIN_KEY,
    Family,
    config_family,
    family_description,
    origin_class,
)
from .refusals import refuse_kind, refuse_leftovers, refuse_settings
from .stock_configs import LEFT_OUT_KEY, stock_class

SAMPLER_KEYS = ("solver_order", "solver_type")
KEPT_KEY = "_kept_sampler"

# No image or latent of a model that was trained on standardised data lies outside this range. sigma/alpha = 5 is where
# an error of epsilon becomes one of x0_hat that is five times as large.
FAR_OUT = {"bound_above_sigma": 5.0, "data_range": [-10.0, 10.0]}


# ---------------------------------------------------------------------- there and back


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


# ---------------------------------------------------------------------- what a config says


def translate_config(
    config: dict[str, Any],
    target: str,
    lineage: Collection[str],
    families: Mapping[str, Family],
    known: Collection[str],
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
            what = family_description(FAMILY_OF_CLASS.get(origin)) or "an SDE of its own"
            raise ValueError(
                f"{origin} describes {what}, which {target} cannot represent. Use {origin}.from_config(...)."
            )
        if is_stock_config(config, target):
            if config.get("use_flow_sigmas") and "flow" not in families:
                raise ValueError(
                    f"use_flow_sigmas=True cannot be honoured by {target}, whose config this was: it makes a flow of "
                    "the model. Remove it, or start from the config of the scheduler that the model came with."
                )
            refuse_settings(config, next(iter(families.values()), None))
        return {}
    source = stock_class(config) or config.get("_class_name") or "This config"
    family = config_family(config)
    refuse_kind(config, source)
    if family is None:
        foreign = sorted(key for key in config if key not in known and not key.startswith("_"))
        if foreign or source != "This config":
            raise ValueError(
                f"{source} describes no SDE that is known here"
                + (f" (keys {', '.join(foreign)})" if foreign else "")
                + ". If you know the network's SDE and what it predicts, construct the class that fits with them."
            )
        return {}
    refuse_leftovers(config, source, family)
    refuse_settings(config, FAMILIES[family])
    read = FAMILIES[family].arguments
    implied = {} if read is None else read(config)
    if family not in families:  # only now, so that the class named does accept the config
        raise ValueError(
            f"{source} describes {FAMILIES[family].description}, which {target} cannot represent. Use "
            f"{FITTING_SCHEDULER[family]}.from_config(...)."
        )
    return implied


def bounds_of_unbounded(config: dict[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A wide bound of x0_hat at high noise, for a VP model of epsilon whose config has no bound; else nothing.

    x0_hat = (x_t - sigma epsilon)/alpha divides the error of the network by alpha, which is 5e-5 at the start of the
    cosine schedule. Whether the data are pixels or latents, and so their range, is not in a config. But an estimate in
    the hundreds is no mean of any of them, and the multistep rules carry it on.
    """
    if config_family(config) != "vp" or arguments.get("prediction_type") != "epsilon":
        return {}
    if arguments.get("clip_sample") or arguments.get("thresholding") or FAR_OUT.keys() & arguments.keys():
        return {}
    return FAR_OUT


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
