"""The precision of a network's forward and backward pass."""

from __future__ import annotations

import os

import torch
from accelerate.state import AcceleratorState

from ..basics.networks import computes_in_bf16


def default_precision() -> str | None:
    """The precision that accelerate was launched with; otherwise bf16 where the hardware computes in it, or no.

    It is None, which changes nothing, where accelerate was set up before.
    """
    if AcceleratorState._shared_state:
        return None
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no":
        return launched
    on_cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true"
    return "bf16" if computes_in_bf16("cuda" if on_cuda else "cpu") else "no"
