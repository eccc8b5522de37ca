"""Pipelines."""

from .pipeline_sde import SDEPipeline
from .probability_flow import ProbabilityFlow

__all__ = ["ProbabilityFlow", "SDEPipeline"]
