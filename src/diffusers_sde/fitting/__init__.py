"""Samplers fitted to a network: where it has to be called, and what its estimates are weighed by."""

from .families import PARTS, PlanFamily
from .features import MiddleFeatures, middle_of
from .fit import Fit, FitOptions, fit_parameters
from .grids import profile_grid
from .simulation import simulate
from .targets import EnergyTarget, PairedTarget

__all__ = [
    "PARTS",
    "EnergyTarget",
    "Fit",
    "FitOptions",
    "MiddleFeatures",
    "PairedTarget",
    "PlanFamily",
    "fit_parameters",
    "middle_of",
    "profile_grid",
    "simulate",
]
