"""The kinds of paths that schedulers here are about: each class states its own in ``_families``, and this is the list.

A class of this package, or of a user's module, that states no families is about an SDE of its own: no stock config
describes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .stock_configs import family_of_keys, stock_arguments, stock_class

ORIGIN_KEY = "_sde_class"  # our class whose arguments a config holds, also when it has passed through a stock class


@dataclass(frozen=True)
class Family:
    """One kind of path.

    Attributes:
        description: What its models are, in words that follow "describes".
        arguments: What a stock config of this kind implies beyond the keys that both sides share by name, as arguments
            of the scheduler. It raises a ValueError for what cannot be honoured. None where diffusers has no such
            scheduler.
        has_thresholding: Whether the scheduler can do dynamic thresholding.
        fixes_noise: Whether betas, or the path itself, say how much noise there is, so that ``sigma_min`` and
            ``sigma_max`` of a stock config contradict them.
    """

    description: str
    arguments: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    has_thresholding: bool = False
    fixes_noise: bool = False


FAMILIES: dict[str, Family] = {}
FITTING_SCHEDULER: dict[str, str] = {}  # name of each family to that of its class
FAMILY_OF_CLASS: dict[str, str] = {}  # name of each class to that of its first family


def register_families(scheduler: str, families: Mapping[str, Family]) -> None:
    """Note the families of a class by its name; ``SDEScheduler`` does so for each class that states them."""
    for name, family in families.items():
        FAMILIES[name], FITTING_SCHEDULER[name] = family, scheduler
        FAMILY_OF_CLASS.setdefault(scheduler, name)


def family_description(family: str | None) -> str | None:
    """What the models of a family are, in words; None for None or an unknown family."""
    return FAMILIES[family].description if family in FAMILIES else None


def origin_class(config: dict[str, Any], target: str) -> str | None:
    """Name of the class of ours whose arguments a config holds, perhaps beside those of a stock class; None if none."""
    name = config.get("_class_name")
    return name if name == target or name in FAMILY_OF_CLASS else config.get(ORIGIN_KEY)


def config_family(config: dict[str, Any]) -> str | None:
    """The kind of path a scheduler config describes: ``vp``, ``sub_vp``, ``ve``, ``edm``, ``flow``, or None if unknown.

    Decided by the class where it is one of ours, and by characteristic keys of the stock class otherwise.
    """
    for name in (config.get("_class_name"), config.get(ORIGIN_KEY)):
        if name in FAMILY_OF_CLASS:
            return FAMILY_OF_CLASS[name]
    if config.get(ORIGIN_KEY) is not None:  # a user's scheduler, whatever its arguments are called
        return None
    name = stock_class(config)
    if name == "LTXEulerAncestralRFScheduler":
        return "flow"
    own = stock_arguments().get(name or "", config)
    return family_of_keys({k: v for k, v in config.items() if k in own})


def fitting_class(config: dict[str, Any]) -> str:
    """Name of the scheduler here for the kind of path that a config describes.

    Raises:
        ValueError: It describes none that is known.
    """
    family = config_family(config)
    if family is None:
        raise ValueError(f"{config.get('_class_name') or 'This config'} describes no SDE that is known here.")
    return FITTING_SCHEDULER[family]
