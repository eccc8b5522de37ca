"""Networks that are torch modules and no diffusers models, made to look like one."""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor


class PlainNetwork(ModelMixin, ConfigMixin):
    """A torch module that is called as ``network(x, timestep)``, with the config, device and dtype that pipelines read.

    The module gets x of shape (B, C, H, W) and timesteps of shape (B,) on its device, and returns the output, a tensor
    of the shape of x, or a tuple or list that begins with it. Timesteps are floating-point, also where they are entries
    of a table.

    Args:
        sample_size: Height and width of a sample; None if they are not known.
        channels: Channels of a sample; None if they are not known.

    Attributes:
        network: The module.
    """

    config_name = "config.json"
    network: torch.nn.Module

    @register_to_config
    def __init__(self, sample_size: tuple[int, int] | None = None, channels: int | None = None) -> None:
        super().__init__()
        self.register_to_config(in_channels=channels, out_channels=channels)
        # It goes where the module goes, which may have no parameters.
        self.register_buffer("_anchor", torch.empty(0), persistent=False)

    @classmethod
    def around(cls, network: torch.nn.Module, sample_shape: tuple[int, int, int] | None) -> PlainNetwork:
        """The module as a diffusers model of samples of this shape, (C, H, W)."""
        wrapped = cls() if sample_shape is None else cls(sample_shape[1:], sample_shape[0])
        wrapped.network = network
        first = next(network.parameters(), None)
        if first is not None:
            wrapped.to(device=first.device)
        return wrapped.train(network.training)

    @property
    def device(self) -> torch.device:
        """Device of the module."""
        anchor: Tensor = self._anchor
        return anchor.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the module's parameters; float32 where it has none."""
        return next((p.dtype for p in self.network.parameters() if p.is_floating_point()), torch.float32)

    def forward(self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True) -> Any:
        """The module's output, shape (B, C, H, W), as diffusers' unconditional networks return it.

        Args:
            sample: Input, shape (B, C, H, W).
            timestep: Network timesteps, shape () or (B,).
            return_dict: Whether to return a ``UNet2DOutput`` instead of a tuple.
        """
        fed = torch.as_tensor(timestep, device=sample.device)
        fed = (fed if fed.is_floating_point() else fed.float()).expand(len(sample))
        output = self.network(sample, fed)
        output = output if isinstance(output, Tensor) else output[0]
        return UNet2DOutput(output) if return_dict else (output,)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Refuse to save: there is no config from which the module could be built again.

        Raises:
            ValueError: Always; the message says what is missing.
        """
        name = type(self.network).__name__
        raise ValueError(
            f"unet is a {name}, a plain torch module, which diffusers can neither write nor build again. Derive it "
            f"from diffusers' ModelMixin and ConfigMixin, 'class {name}(ModelMixin, ConfigMixin)', decorate its "
            "__init__ with diffusers.configuration_utils.register_to_config, let forward(sample, timestep, "
            "return_dict=True) return (output,) where return_dict is False, and construct the pipeline with that."
        )
