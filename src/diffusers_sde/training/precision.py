"""The precision of a network's forward and backward pass."""

from __future__ import annotations

import os

import torch
from accelerate.state import AcceleratorState


def default_precision() -> str | None:
    """The precision that accelerate was launched with; otherwise bf16 where the hardware computes in it, or no.

    It is None, which changes nothing, where accelerate was set up before.
    """
    if AcceleratorState._shared_state:
        return None
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no":
        return launched
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, name, bool)() for name in checks)
    return "bf16" if native else "no"
