"""Pipelines."""

from .pipeline_class_conditional import ClassConditionalSDEPipeline
from .pipeline_inpaint import InpaintSDEPipeline
from .pipeline_restoration import RestorationSDEPipeline
from .pipeline_sde import SDEPipeline
from .probability_flow import ProbabilityFlow

__all__ = [
    "ClassConditionalSDEPipeline",
    "InpaintSDEPipeline",
    "ProbabilityFlow",
    "RestorationSDEPipeline",
    "SDEPipeline",
]
