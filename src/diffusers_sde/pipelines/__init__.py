"""Pipelines."""

from .pipeline_class_conditional import ClassConditionalSDEPipeline
from .pipeline_inpaint import InpaintSDEPipeline
from .pipeline_restoration import RestorationSDEPipeline
from .pipeline_sde import SDEPipeline
from .pipeline_text import TextSDEPipeline
from .probability_flow import ProbabilityFlow
from .rollouts import Rollout, RolloutSteps, collect_rollout, rollout_model

PIPELINES: dict[str, type[SDEPipeline]] = {
    cls.__name__: cls
    for cls in (
        SDEPipeline,
        ClassConditionalSDEPipeline,
        TextSDEPipeline,
        InpaintSDEPipeline,
        RestorationSDEPipeline,
    )
}

__all__ = [
    "PIPELINES",
    "ClassConditionalSDEPipeline",
    "InpaintSDEPipeline",
    "ProbabilityFlow",
    "RestorationSDEPipeline",
    "Rollout",
    "RolloutSteps",
    "SDEPipeline",
    "TextSDEPipeline",
    "collect_rollout",
    "rollout_model",
]
