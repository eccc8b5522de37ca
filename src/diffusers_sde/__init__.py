"""Score-based generative modelling through SDEs, as a plug-in for diffusers.

Schedulers (``VESDEScheduler``, ``VPSDEScheduler``, ``SubVPSDEScheduler``, ``FlowSDEScheduler``) for existing pipelines,
``SDEPipeline``, exact likelihoods and latent codes (``log_prob``, ``bits_per_dim``, ``ProbabilityFlow``), and below
them the mathematics: ``sdes``, ``predictors``, ``correctors``, ``plans``, ``ode``, ``likelihood``, ``losses``.

    import diffusers_sde
    pipe.scheduler = diffusers_sde.VPSDEScheduler.from_config(pipe.scheduler.config, corrector="langevin")

Importing the package also lets ``DiffusionPipeline.from_pretrained`` find its classes by name.
"""

import sys
from typing import Any

import diffusers
from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin

from .adaptive import sample_adaptive
from .classifiers import NoiseConditionalClassifier
from .diagnostics import Diagnosis, diagnose
from .hub.pipelines import own_index
from .likelihood import BitsPerDim, LogProb, Quantization, TraceOptions, bits_per_dim, log_prob
from .ode import ODEOptions
from .pipelines import (
    ClassConditionalSDEPipeline,
    InpaintSDEPipeline,
    ProbabilityFlow,
    RestorationSDEPipeline,
    SDEPipeline,
)
from .plans import Plan, Row, make_plan, restart_plan
from .sampling import sample
from .schedulers import FlowSDEScheduler, SDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from .schedulers.arguments import sampler_arguments
from .schedulers.conversion import for_stock
from .sdes import (
    EDMSDE,
    SDE,
    SDES,
    VESDE,
    VPSDE,
    CosineSDE,
    DiscreteVPSDE,
    RectifiedFlowSDE,
    SubVPSDE,
)
from .version import __version__

__all__ = [
    "EDMSDE",
    "SDE",
    "SDES",
    "VESDE",
    "VPSDE",
    "BitsPerDim",
    "ClassConditionalSDEPipeline",
    "CosineSDE",
    "Diagnosis",
    "DiscreteVPSDE",
    "FlowSDEScheduler",
    "InpaintSDEPipeline",
    "LogProb",
    "NoiseConditionalClassifier",
    "ODEOptions",
    "Plan",
    "ProbabilityFlow",
    "Quantization",
    "RectifiedFlowSDE",
    "RestorationSDEPipeline",
    "Row",
    "SDEPipeline",
    "SDEScheduler",
    "SubVPSDE",
    "SubVPSDEScheduler",
    "TraceOptions",
    "VESDEScheduler",
    "VPSDEScheduler",
    "__version__",
    "bits_per_dim",
    "diagnose",
    "log_prob",
    "make_plan",
    "restart_plan",
    "sample",
    "sample_adaptive",
    "sampler_arguments",
]


def _register_with_diffusers() -> None:
    """Make saved pipelines loadable by name.

    diffusers has no registry for plug-ins. It writes a component's module into model_index.json and looks it up as an
    attribute of ``diffusers.pipelines``, and it looks pipeline classes, and the class that wrote a config, up as
    attributes of ``diffusers``. So the classes name this package as their module, and both lookups are given an answer.

    A repository of ours also carries code, for those without the package, and says so in its index. Whoever has the
    package needs none of it: ``DiffusionPipeline`` reads such an index as one of installed classes.

    And where a stock scheduler is made from the config of one of ours, it gets back the sampler settings that the stock
    scheduler before ours had, in place of ours of the same names.
    """
    setattr(diffusers.pipelines, __name__, sys.modules[__name__])
    pipelines = (SDEPipeline, ClassConditionalSDEPipeline, InpaintSDEPipeline, RestorationSDEPipeline)
    schedulers = (FlowSDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler)
    for cls in (*pipelines, *schedulers, NoiseConditionalClassifier):
        cls.__module__ = __name__
        setattr(diffusers, cls.__name__, cls)

    read = DiffusionPipeline._dict_from_json_file.__func__

    def _dict_from_json_file(cls: type, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return own_index(read(cls, *args, **kwargs))

    DiffusionPipeline._dict_from_json_file = classmethod(_dict_from_json_file)

    def extract_init_dict(cls: type, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return ConfigMixin.extract_init_dict.__func__(cls, for_stock(config_dict), **kwargs)

    SchedulerMixin.extract_init_dict = classmethod(extract_init_dict)


_register_with_diffusers()
