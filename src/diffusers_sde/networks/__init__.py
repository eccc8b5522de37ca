"""From networks to denoisers: parametrisations, time conditioning, losses, and classifiers of noisy data."""

from .conditioning import TimeConditioning, TimeMaps
from .denoisers import Denoiser, call_network, network_denoiser
from .losses import denoising_loss, sample_times
from .parametrizations import Parametrization, get_parametrization

__all__ = [
    "Denoiser",
    "Parametrization",
    "TimeConditioning",
    "TimeMaps",
    "call_network",
    "denoising_loss",
    "get_parametrization",
    "network_denoiser",
    "sample_times",
]
