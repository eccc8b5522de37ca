"""Fresh noise that is reproducible, per sample if asked, and never drawn in half precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_generators


def standard_normal_like(x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
    """Unit Gaussian noise of x's shape, on its device, float64 for float64 and float32 for everything else.

    Args:
        x: Shape (B, ...).
        generator: None for torch's global state; one generator for the whole batch; or a list with one for each
            sample, with which a sample's noise does not depend on its batch mates. A generator on another device (say
            the CPU, for results that do not depend on the GPU) draws there and the noise is moved.

    Raises:
        ValueError: Something else, or a list whose length is not the batch size.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if generator is None or isinstance(generator, torch.Generator):
        device = x.device
        if generator is None or generator.device == device:
            return torch.randn(x.shape, generator=generator, dtype=dtype, device=device)
        return torch.randn(x.shape, generator=generator, dtype=dtype, device=generator.device).to(device)
    check_generators(generator, len(x))
    draws = [torch.randn(x.shape[1:], generator=g, dtype=dtype, device=g.device).to(x.device) for g in generator]
    return torch.stack(draws)
