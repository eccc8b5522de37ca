"""What can be said about a network without knowing its class."""

from __future__ import annotations

import inspect
from typing import Any


def describe_network(network: Any) -> str:
    """A network in words, for messages and cards: its class, its size, and its channels where its config names them."""
    parameters = sum(p.numel() for p in network.parameters())
    words = f"{type(network).__name__}, {parameters / 1e6:.2f} million parameters"
    channels = network.config.get("block_out_channels")
    return words if channels is None else f"{words}, channels {tuple(channels)}"


def denoises_images(network: Any) -> bool:
    """Whether a network is called as (images, timestep) with nothing else, and its config tells the images' shape."""
    config = getattr(network, "config", None) or {}
    try:
        inspect.signature(network.forward).bind(None, None, return_dict=False)
    except (AttributeError, TypeError):
        return False
    return "in_channels" in config and "sample_size" in config
