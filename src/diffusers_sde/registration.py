"""What importing the package does to diffusers, which has no registry for plug-ins."""

from __future__ import annotations

import sys
from typing import Any

import diffusers
from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin

from .networks.classifier import NoiseConditionalClassifier
from .networks.ncsnpp import NCSNpp
from .pipelines import PIPELINES
from .pipelines.base import own_index
from .schedulers import SCHEDULERS
from .schedulers.conversion import for_stock
from .shipping.flattening import LIBRARY


def register_with_diffusers() -> None:
    """Make saved pipelines loadable by name. Calling it again changes nothing.

    diffusers writes a component's module into model_index.json and looks it up as an attribute of
    ``diffusers.pipelines``, and it looks pipeline classes, and the class that wrote a config, up as attributes of
    ``diffusers``. So the classes name this package as their module, and both lookups are given an answer.

    A repository of ours also carries code, for those without the package, and says so in its index. Whoever has the
    package needs none of it: ``DiffusionPipeline`` reads such an index as one of installed classes.

    And where a stock scheduler is made from the config of one of ours, it gets back the sampler settings that the stock
    scheduler before ours had, in place of ours of the same names.
    """
    setattr(diffusers.pipelines, LIBRARY, sys.modules[LIBRARY])
    for cls in (*PIPELINES.values(), *SCHEDULERS.values(), NoiseConditionalClassifier, NCSNpp):
        cls.__module__ = LIBRARY
        setattr(diffusers, cls.__name__, cls)

    # A second import, of a reloaded package, takes the place of the first instead of wrapping it.
    read = DiffusionPipeline._dict_from_json_file.__func__
    read = getattr(read, "_read_by_diffusers", read)

    def _dict_from_json_file(cls: type, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return own_index(read(cls, *args, **kwargs))

    _dict_from_json_file._read_by_diffusers = read  # type: ignore[attr-defined]
    DiffusionPipeline._dict_from_json_file = classmethod(_dict_from_json_file)

    def extract_init_dict(cls: type, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return ConfigMixin.extract_init_dict.__func__(cls, for_stock(config_dict), **kwargs)

    SchedulerMixin.extract_init_dict = classmethod(extract_init_dict)
