"""Score-based generative modelling through SDEs, as a plug-in for diffusers.

Schedulers (``VESDEScheduler``, ``VPSDEScheduler``, ``SubVPSDEScheduler``, ``FlowSDEScheduler``) for existing pipelines,
``SDEPipeline``, exact likelihoods and latent codes (``log_prob``, ``bits_per_dim``, ``ProbabilityFlow``), and below
them the mathematics, which needs no pipeline: ``sdes``, ``networks``, ``sampling``, ``flow``, ``guidance``,
``fitting``.

    import diffusers_sde
    pipe.scheduler = diffusers_sde.VPSDEScheduler.from_config(pipe.scheduler.config, corrector="langevin")

Importing the package also lets ``DiffusionPipeline.from_pretrained`` find its classes by name.
"""

from .fitting import profile_grid
from .flow import BitsPerDim, LogProb, ODEOptions, Quantization, TraceOptions, bits_per_dim, log_prob
from .networks.classifier import NoiseConditionalClassifier
from .networks.ncsnpp import NCSNpp
from .pipelines import (
    ClassConditionalSDEPipeline,
    InpaintSDEPipeline,
    ProbabilityFlow,
    RestorationSDEPipeline,
    Rollout,
    RolloutSteps,
    SDEPipeline,
    TextSDEPipeline,
    collect_rollout,
    rollout_model,
)
from .pipelines.diagnostics import Diagnosis, diagnose
from .pipelines.fits import SchedulerFit, fit_scheduler
from .registration import register_with_diffusers
from .sampling import Plan, Row, SDEOptions, make_plan, restart_plan, sample, sample_adaptive
from .schedulers import FlowSDEScheduler, SDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from .schedulers.arguments import sampler_arguments
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
from .shipping.version import __version__

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
    "NCSNpp",
    "NoiseConditionalClassifier",
    "ODEOptions",
    "Plan",
    "ProbabilityFlow",
    "Quantization",
    "RectifiedFlowSDE",
    "RestorationSDEPipeline",
    "Rollout",
    "RolloutSteps",
    "Row",
    "SDEOptions",
    "SDEPipeline",
    "SDEScheduler",
    "SchedulerFit",
    "SubVPSDE",
    "SubVPSDEScheduler",
    "TextSDEPipeline",
    "TraceOptions",
    "VESDEScheduler",
    "VPSDEScheduler",
    "__version__",
    "bits_per_dim",
    "collect_rollout",
    "diagnose",
    "fit_scheduler",
    "log_prob",
    "make_plan",
    "profile_grid",
    "restart_plan",
    "rollout_model",
    "sample",
    "sample_adaptive",
    "sampler_arguments",
]

register_with_diffusers()


def __dir__() -> list[str]:
    """What is public: the names above, and the packages whose documentation the head of this module points to."""
    packages = ("flow", "guidance", "networks", "pipelines", "sampling", "schedulers", "sdes")
    return sorted([*__all__, *packages, "__doc__", "__file__", "__name__", "__path__"])
