"""Gradients through a denoiser: products with the transpose of its Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..networks.denoisers import Denoiser
from .common import check_chunk_size


def denoise_with_vjp(
    denoiser: Denoiser, x: Tensor, t: Tensor, chunk_size: int | None = None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return x0_hat and v -> J^T v with J = d x0_hat / d x_t, sample by sample; works under no_grad and inference_mode.

    Args:
        denoiser: (x_t, t) -> x0_hat; with ``chunk_size`` it is called with parts of the batch.
        x: State, shape (B, ...).
        t: Time, shape () or (B,).
        chunk_size: Samples whose activations are kept at a time. None keeps those of the whole batch for as long as the
            returned function exists.

    Returns:
        x0_hat and the function, both without a graph.
    """
    chunk_size = check_chunk_size(chunk_size)

    def graph(part: slice) -> tuple[Tensor, Tensor]:
        at = x[part].detach().clone().requires_grad_()
        return at, denoiser(at, t[part] if t.ndim else t)

    if chunk_size is None or chunk_size >= len(x):
        with torch.inference_mode(False), torch.enable_grad():
            at, output = graph(slice(None))

        def whole(v: Tensor) -> Tensor:
            with torch.inference_mode(False):
                return torch.autograd.grad(output, at, v.detach().clone(), retain_graph=True)[0]

        return output.detach(), whole

    parts = [slice(i, i + chunk_size) for i in range(0, len(x), chunk_size)]

    def in_parts(v: Tensor) -> Tensor:
        gradients = []
        with torch.inference_mode(False), torch.enable_grad():
            for part in parts:
                at, output = graph(part)
                gradients.append(torch.autograd.grad(output, at, v[part].detach().clone())[0])
        return torch.cat(gradients)

    with torch.no_grad():
        return torch.cat([denoiser(x[part], t[part] if t.ndim else t) for part in parts]), in_parts
