"""Pipelines."""

from .pipeline_sde import SDEPipeline

__all__ = ["SDEPipeline"]
