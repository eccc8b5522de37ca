"""Fresh noise that is reproducible, per sample if asked, and never drawn in half precision."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_generators

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for a batch, one for each of its samples, or None for torch's global state."""


def standard_normal_like(x: Tensor, generator: Generators = None) -> Tensor:
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


def sample_generators(x: Tensor, generator: Generators, purpose: str) -> list[torch.Generator]:
    """One generator per sample, whose numbers do not depend on the sample's place or batch mates.

    Args:
        x: Samples, shape (B, ...).
        generator: A list with one for each sample is returned as it is. One generator, or None for torch's global
            state, gives a seed; each sample's own generator is then seeded by it and by the sample's content.
        purpose: A word that keeps the numbers drawn for different uses apart.

    Raises:
        ValueError: A list whose length is not the batch size.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        check_generators(generator, len(x))
        return list(generator)
    device = torch.device("cpu") if generator is None else generator.device
    seed = int(torch.randint(0, 2**62, (), generator=generator, device=device))
    content = x.detach().to("cpu").contiguous()
    content = content if content.dtype in (torch.uint8, torch.float64) else content.float()
    generators = []
    for row in content:
        digest = hashlib.blake2b(f"{purpose} {seed} ".encode() + row.numpy().tobytes(), digest_size=7).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest, "big")))
    return generators


def fork(generator: Generators, device: torch.device) -> Generators:
    """Generators of independent streams that depend on the state of the given ones and leave them untouched."""
    if isinstance(generator, Sequence):
        return [g for each in generator if isinstance(g := fork(each, device), torch.Generator)]
    if generator is None:
        cuda = device.type == "cuda"
        generator = torch.cuda.default_generators[device.index or 0] if cuda else torch.default_generator
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    seed = torch.randint(0, 2**63 - 1, (1,), generator=copy, device=copy.device)
    return torch.Generator(generator.device).manual_seed(int(seed))
