"""The probability-flow ODE: adaptive sampling, latent codes, interpolation and exact likelihoods."""

from .codes import decode, encode, interpolate, sample_flow, slerp, solve_flow
from .likelihood import LogProb, log_prob
from .quantized import BitsPerDim, Quantization, bits_per_dim
from .solver import ODEOptions
from .trace import TraceOptions

__all__ = [
    "BitsPerDim",
    "LogProb",
    "ODEOptions",
    "Quantization",
    "TraceOptions",
    "bits_per_dim",
    "decode",
    "encode",
    "interpolate",
    "log_prob",
    "sample_flow",
    "slerp",
    "solve_flow",
]
