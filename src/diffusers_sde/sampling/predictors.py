"""The predictors by name. A new one is a class and one line here."""

from __future__ import annotations

from ..basics.checks import check_choice
from .classical import Ancestral, EulerMaruyama, Heun, NoPredictor, ReverseDiffusion
from .exponential import Exponential, Singlestep
from .stages import Predictor

PREDICTORS: dict[str, type[Predictor]] = {
    "euler_maruyama": EulerMaruyama,
    "reverse_diffusion": ReverseDiffusion,
    "ancestral": Ancestral,
    "exponential": Exponential,
    "singlestep": Singlestep,
    "heun": Heun,
    "none": NoPredictor,
}


def get_predictor(name: str) -> type[Predictor]:
    """Look a predictor up by name.

    Raises:
        ValueError: Unknown name.
    """
    return PREDICTORS[check_choice("predictor", name, PREDICTORS)]


def name_of(predictor: Predictor) -> str:
    """The name of a predictor, or that of its class where it is none of ours."""
    return next((name for name, cls in PREDICTORS.items() if cls is type(predictor)), type(predictor).__name__)
