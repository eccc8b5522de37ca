"""Samplers: time grids, predictors, correctors, and the plans that they make."""

from .adaptive import SDEOptions, sample_adaptive
from .correctors import CORRECTORS
from .editing import edit
from .loop import sample
from .plans import Plan, Row, make_plan, restart_plan
from .predictors import PREDICTORS
from .solution import Solution, SolverError
from .time_grids import TIME_GRIDS, get_time_grid

__all__ = [
    "CORRECTORS",
    "PREDICTORS",
    "TIME_GRIDS",
    "Plan",
    "Row",
    "SDEOptions",
    "Solution",
    "SolverError",
    "edit",
    "get_time_grid",
    "make_plan",
    "restart_plan",
    "sample",
    "sample_adaptive",
]
