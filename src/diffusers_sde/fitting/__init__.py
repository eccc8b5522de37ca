"""Samplers fitted to a network: where it has to be called, and what its estimates are weighed by."""

from .families import PARTS, PlanFamily
from .fit import Fit, FitOptions, fit_parameters
from .grids import profile_grid
from .simulation import simulate
from .targets import EnergyTarget, PairedTarget

__all__ = [
    "PARTS",
    "EnergyTarget",
    "Fit",
    "FitOptions",
    "PairedTarget",
    "PlanFamily",
    "fit_parameters",
    "profile_grid",
    "simulate",
]
