"""The config of an SDE scheduler: read from ours and from stock ones, and written."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Mapping
from typing import Any

from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import FrozenDict

from ..networks.conditioning import TimeMaps
from ..networks.parametrizations import Parametrization
from ..shipping.component import ShipsItsCode, refuse_newer, written_before
from .arguments import document_arguments
from .config_checks import check_stock_numbers
from .conversion import (
    KEPT_KEY,
    SAMPLER_KEYS,
    bounds_of_unbounded,
    exchanged,
    is_stock_config,
    on_our_grid,
    translate_config,
)
from .families import Family, origin_class, register_families
from .fitted_plans import NETWORK_SETTINGS, changed_settings, check_fitted_plan
from .stock_configs import LEFT_OUT_KEY, stock_keys, with_stock_defaults

OLD_SOLVER_TYPES = ("bh1", "bh2", "logrho")  # stock solvers' names, which configs of ours once held in place of our own


class ConfiguredScheduler(ShipsItsCode, SchedulerMixin, ConfigMixin):
    """What a scheduler says about itself in a config.

    Attributes:
        prediction_types: Parametrisations of a subclass by name, which ``prediction_type`` may name beside the built-in
            ones.
        time_conditionings: Pairs of functions of a subclass by name, which ``time_conditioning`` may name beside the
            built-in ones.
    """

    prediction_types: Mapping[str, type[Parametrization]] = {}
    time_conditionings: Mapping[str, TimeMaps] = {}
    _compatibles: list[str] = []  # stock classes that, made from this one's config, fit the same networks
    _families: Mapping[str, Family] = {}  # the kinds of stock models that it is about, by name
    _source_entries = ("schedulers",)
    order = 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        document_arguments(cls)
        if "_families" in cls.__dict__:
            register_families(cls.__name__, cls._families)

    @classmethod
    def from_config(
        cls, config: dict[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Construct from the config of this class or of any diffusers scheduler of a model on the same path.

        Args:
            config: ``scheduler.config``, in memory or read from JSON.
            return_unused_kwargs: Whether to return the pair (scheduler, keys that are not arguments of this class).
            **kwargs: Arguments of this class that override the config. The grid of a stock config that is uniform in t
                gives way to ``blended``, which is more exact at every number of levels; ``time_grid=None`` keeps it.
                Where a network predicts epsilon and nothing in its config bounds x0_hat, a range from -10 to 10 does
                so at sigma/alpha > 5; ``bound_above_sigma=None`` leaves x0_hat as it is, and so does a grid of the
                stock scheduler.

        Raises:
            ValueError: The config describes another kind of path (the message names the class for it), holds a setting
                that would change the result and cannot be honoured, or an argument is unknown.
        """
        if not isinstance(config, dict):
            raise ValueError(f"config must be a dictionary such as scheduler.config, got {type(config).__name__}.")
        if not isinstance(config.get("_class_name", ""), str):
            raise ValueError(f"_class_name in the config must be a string, got {config['_class_name']!r}.")
        known = cls._get_init_keys(cls) - {"self"}
        unknown = {k: kwargs.pop(k) for k in list(kwargs) if k not in known}
        if unknown and not return_unused_kwargs:
            close = {name: difflib.get_close_matches(name, known, 1) for name in unknown}
            hints = "; ".join(f"{name!r}" + (f" (did you mean {c[0]!r}?)" if c else "") for name, c in close.items())
            raise ValueError(f"{cls.__name__} has no argument {hints}. It takes {', '.join(sorted(known))}.")
        refuse_newer(config, lambda: known | stock_keys(), cls.__name__)
        config = with_stock_defaults(config)
        # An argument of a user's class may have a name that means something else in a stock config.
        own_keys = known if origin_class(config, cls.__name__) is not None else ()
        check_stock_numbers({k: v for k, v in config.items() if k not in own_keys})
        if config.get("solver_order") == 3 and written_before(config, "0.2.0.dev0"):
            # 3 was the default then, and meant 2 up to 12 levels: the order was left to the sampler.
            config = {**config, "solver_order": None}
        lineage = [base.__name__ for base in cls.__mro__]
        implied = translate_config(config, cls.__name__, lineage, cls._families, known)
        if is_stock_config(config, cls.__name__) or config.get("solver_type") in OLD_SOLVER_TYPES:
            config = exchanged(config)
        kept_keys = (KEPT_KEY, LEFT_OUT_KEY)
        given = {k: v for k, v in config.items() if k in known}
        hidden = {k: v for k, v in config.items() if k not in known and (not k.startswith("_") or k in kept_keys)}
        if "predictor" not in config:
            # The config comes straight from diffusers. One that has been ours before already has these keys.
            as_stock = {"timestep_spacing", "steps_offset"} & kwargs.keys() or kwargs.get("time_grid", "") is None
            if not {"time_grid", "timestep_spacing", "steps_offset"} & kwargs.keys():
                implied = on_our_grid(implied, config)
            elif kwargs.get("time_grid") is None:
                kwargs.pop("time_grid", None)  # the config's own grid, whichever that is
            elif kwargs["time_grid"] != implied.get("time_grid"):
                implied = {**on_our_grid(implied, config), "time_grid": kwargs["time_grid"]}
            given |= {k: v for k, v in implied.items() if k in known}
            hidden |= {k: v for k, v in implied.items() if k not in known}
            if not as_stock:
                given |= bounds_of_unbounded(config, {**given, **kwargs})
        if kwargs.get("time_grid") not in (None, given.get("time_grid")) or "timestep_spacing" in kwargs:
            hidden.pop(LEFT_OUT_KEY, None)  # it belongs to the grid of the config
        arguments = {**given, **kwargs}
        if arguments.get("fitted_plan") is not None:
            arguments = cls._without_foreign_fit(arguments)
        scheduler = cls(**arguments)
        # These are keys of the scheduler that was swapped out. They are kept so that swapping back loses nothing.
        scheduler.register_to_config(**hidden)
        if "_diffusers_version" in config:  # read from a file, which holds no such list
            scheduler._internal_dict = FrozenDict(
                {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
            )
        hidden = {k: v for k, v in hidden.items() if not k.startswith("_")}
        return (scheduler, {**unknown, **hidden}) if return_unused_kwargs else scheduler

    def to_json_string(self) -> str:
        """The config as it is written; a stock class that reads it without this package takes no sampler setting."""
        config = {**json.loads(super().to_json_string()), "_use_default_values": list(SAMPLER_KEYS)}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _without_foreign_fit(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments, without a fitted plan where they ask for another sampler than the one that was fitted."""
        entry = check_fitted_plan("fitted_plan", arguments["fitted_plan"])
        changed = [key for key in changed_settings(entry, arguments) if key not in NETWORK_SETTINGS]
        if not changed:
            return arguments
        fitted, asked = (", ".join(f"{k}={of[k]!r}" for k in changed) for of in (entry["settings"], arguments))
        warnings.warn(
            f"the fitted plan of this {cls.__name__} is dropped: it was fitted with {fitted}, and {asked} was asked "
            "for.",
            stacklevel=3,
        )
        return {**arguments, "fitted_plan": None}
