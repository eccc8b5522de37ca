"""From a network to a denoiser: parametrisation and time conditioning undone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..sdes import SDE, as_time, expand_like
from .conditioning import TimeConditioning
from .parametrizations import Parametrization

Denoiser = Callable[..., Tensor]
"""(x_t of shape (B, ...), t of shape () or (B,), **conditioning) -> x0_hat = E[x_0 | x_t], shape (B, ...)."""


@cache
def _names_timestep(kind: type) -> bool:
    """Whether networks of this class take something between x and the timestep, so that the timestep must be named."""
    forward = getattr(kind, "forward", None)
    names = [] if forward is None else list(inspect.signature(forward).parameters)  # self is the first
    return "timestep" in names[3:]


def with_timestep(network: Callable[..., Any], x: Tensor, timestep: Tensor, **told: Any) -> Any:
    """Call a network as its class wants to be called, and return what it returns.

    Args:
        network: A diffusers model, as it is, compiled, or wrapped by torch for several processes, or any function of
            (x, timestep). Transformers of diffusers that may be told captions have these in the second place.
        x: Input of the network, shape (B, ...).
        timestep: What it is fed for the time, shape (B,).
        **told: What it is told beside these, by name.
    """
    inner: Any = getattr(network, "_orig_mod", network)  # what torch.compile has wrapped
    inner = inner.module if isinstance(inner, DistributedDataParallel) else inner
    inner = getattr(inner, "_orig_mod", inner)
    kind: Any = type(inner)
    if _names_timestep(kind):
        return network(x, timestep=timestep, **told)
    return network(x, timestep, **told)


def call_network(network: Callable[..., Any], x: Tensor, timestep: Tensor, **kwargs: Any) -> Tensor:
    """Call a diffusers model or any function of (x, timestep); returns its output tensor, of the shape of x.

    The timestep is passed as a tensor of shape (B,): UNet2DModel truncates a Python float to an integer, and a
    transformer takes nothing else. Of a network that also returns a variance, in as many channels again, this is the
    first half: the SDE fixes the variance.
    """
    timestep = timestep.to(device=x.device, dtype=x.dtype).expand(x.shape[0])
    output = with_timestep(network, x, timestep, **kwargs)
    output = output if isinstance(output, Tensor) else output[0]
    has_variance = x.ndim > 2 and output.ndim == x.ndim and output.shape[1] == 2 * x.shape[1]
    return output[:, : x.shape[1]] if has_variance else output


def network_denoiser(
    network: Callable[..., Any],
    sde: SDE,
    parametrization: Parametrization,
    conditioning: TimeConditioning,
    **kwargs: Any,
) -> Denoiser:
    """The denoiser (x_t, t) -> x0_hat of a network.

    Args:
        network: Called as ``network(x, timestep, **kwargs)``; a diffusers model or a plain function.
        sde: The SDE that it was trained for.
        parametrization: What it predicts.
        conditioning: What it is fed.
        **kwargs: Passed on to the network, such as ``class_labels``.

    Returns:
        A function of x_t, shape (B, ...), and SDE time, shape () or (B,).
    """

    def denoise(x: Tensor, t: Tensor | float) -> Tensor:
        t = as_time(t)
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        scaled = x * expand_like(parametrization.input_scale(alpha, sigma), x).to(x)
        output = call_network(network, scaled, conditioning.timestep(sde, t), **kwargs)
        return parametrization.to_x0(output, x, alpha, sigma)

    return denoise
