"""Samplers: time grids, predictors, correctors, and the plans that they make."""

from .adaptive import SDEOptions, sample_adaptive
from .classical import Ancestral, EulerMaruyama, Heun, NoPredictor, ReverseDiffusion
from .correctors import CORRECTORS
from .editing import edit
from .exponential import Exponential, Singlestep
from .loop import sample
from .observation import posterior_mean, posterior_samples
from .planning import make_plan
from .policies import POLICIES
from .predictors import PREDICTORS
from .restart import restart_plan
from .rows import Form, Plan, Row, advance, mean
from .solution import Solution, SolverError
from .stages import Predictor, Stage
from .time_grids import TIME_GRIDS, get_time_grid
from .transitions import Transition, transition

__all__ = [
    "CORRECTORS",
    "POLICIES",
    "PREDICTORS",
    "TIME_GRIDS",
    "Ancestral",
    "EulerMaruyama",
    "Exponential",
    "Form",
    "Heun",
    "NoPredictor",
    "Plan",
    "Predictor",
    "ReverseDiffusion",
    "Row",
    "SDEOptions",
    "Singlestep",
    "Solution",
    "SolverError",
    "Stage",
    "Transition",
    "advance",
    "edit",
    "get_time_grid",
    "make_plan",
    "mean",
    "posterior_mean",
    "posterior_samples",
    "restart_plan",
    "sample",
    "sample_adaptive",
    "transition",
]
