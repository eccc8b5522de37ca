"""What can be said about a network without knowing its class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def computes_in_bf16(device: torch.device | str) -> bool:
    """Whether the hardware of a device computes in bfloat16, so that mixed precision makes it faster."""
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if kind == "cpu" else ()
    return any(getattr(torch.cpu, name, bool)() for name in checks)


@dataclass(frozen=True)
class NetworkTraits:
    """What training and pipelines need to know about a network that denoises images, whatever its class is.

    Attributes:
        channels: Channels of an image; None if they are not known.
        sides: Height and width of an image; None if they are not known.
        divisor: Sides of images must be multiples of this number; None if it is not known.
        fixed_sides: Whether the network takes images of ``sides`` alone.
        num_classes: Number of labels that the network tells apart, a null class included; None for a network that is
            told no class.
        needs_constant_label: Whether the network must be told a label, of which it knows a single one: it is
            unconditional, and the label is 0.
        returns_variance: Whether the network returns a variance in as many channels again, behind those of the image.
        prediction_type: The prediction that the form of the network fixes; None where any will do.
        time_conditioning: The time conditioning that the form of the network fixes; None where any will do.
        caption_width: Width of the embeddings of captions that the network is told; None for one that is told none.
        also_needs: The argument of the network beside x, timestep, labels and captions without which it cannot be
            called, such as the sizes that a UNet of Stable Diffusion XL is told; None where there is none.
    """

    channels: int | None
    sides: tuple[int, int] | None
    divisor: int | None
    fixed_sides: bool
    num_classes: int | None
    needs_constant_label: bool
    returns_variance: bool
    prediction_type: str | None
    time_conditioning: str | None
    caption_width: int | None
    also_needs: str | None = None

    def constant_labels(self, batch_size: int, device: torch.device | str) -> dict[str, Tensor]:
        """The arguments that a network takes beside x and timestep though it is unconditional; mostly none."""
        if not self.needs_constant_label:
            return {}
        return {"class_labels": torch.zeros(batch_size, dtype=torch.int64, device=device)}


def traits_of(network: Any) -> NetworkTraits:
    """What the config of a diffusers model tells about it.

    A ``DiTTransformer2DModel`` has one label more than ``num_embeds_ada_norm``, its null class, which is the last one.
    Other networks count their labels in ``num_class_embeds``. A network that divides its output by sigma
    (``scale_by_sigma``) returns the score, and one that takes the logarithm of its timestep is fed sigma. A
    ``UNet2DConditionModel`` is told captions, and so is a ``PixArtTransformer2DModel``, unless it was built without
    cross-attention.
    """
    config: Mapping[str, Any] = getattr(network, "config", None) or {}
    channels, size = config.get("in_channels"), config.get("sample_size")
    labels, divisor, is_transformer = config.get("num_class_embeds"), None, False
    if config.get("norm_type") == "ada_norm_zero" and config.get("num_embeds_ada_norm") is not None:
        labels, divisor, is_transformer = config["num_embeds_ada_norm"] + 1, config.get("patch_size"), True
    elif config.get("norm_type") == "ada_norm_single":
        divisor, is_transformer = config.get("patch_size"), True
    elif config.get("block_out_channels") is not None:
        divisor = 2 ** (len(config["block_out_channels"]) - 1)
    # The widths that the embeddings have before and after a projection, if there is one.
    names = next((name for name in ("encoder_hid_dim", "caption_channels") if name in config), None)
    # A PixArtTransformer2DModel for latents of side 128 is told the size of the image where its config does not say.
    asks_size = config.get("use_additional_conditions")
    asks_size = asks_size if asks_size is not None else "use_additional_conditions" in config and size == 128
    takes_sigma = config.get("time_embedding_type") == "fourier" or config.get("sigma_levels") is not None
    return NetworkTraits(
        channels=channels,
        sides=None if size is None else (size, size) if isinstance(size, int) else tuple(size),
        divisor=divisor,
        fixed_sides=is_transformer,
        num_classes=None if is_transformer and labels == 1 else labels,
        needs_constant_label=is_transformer and labels == 1,
        returns_variance=channels is not None and config.get("out_channels") == 2 * channels,
        prediction_type="score" if config.get("scale_by_sigma") else None,
        caption_width=None if names is None else config[names] or config.get("cross_attention_dim"),
        also_needs="added_cond_kwargs" if asks_size or config.get("addition_embed_type") is not None else None,
        time_conditioning="sigma" if "scale_by_sigma" in config and takes_sigma else None,
    )


def describe_network(network: Any) -> str:
    """A network in words, for messages and cards: its class, its size, and its channels where its config names them."""
    parameters = sum(p.numel() for p in network.parameters())
    words = f"{type(network).__name__}, {parameters / 1e6:.2f} million parameters"
    channels = network.config.get("block_out_channels")
    return words if channels is None else f"{words}, channels {tuple(channels)}"


def denoises_images(network: Any) -> bool:
    """Whether a network is called as (images, timestep) with nothing else, and its config tells the images' shape.

    Transformers that take captions in the second place do without them only if they were built without cross-attention.
    """
    config = getattr(network, "config", None) or {}
    try:
        signature = inspect.signature(network.forward)
        signature.bind(None, None, return_dict=False)
    except (AttributeError, TypeError):
        return False
    told_captions = "encoder_hidden_states" in signature.parameters and config.get("cross_attention_dim", 0) is not None
    return "in_channels" in config and "sample_size" in config and not told_captions
