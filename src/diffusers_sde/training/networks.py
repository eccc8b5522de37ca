"""The networks that training builds, by name, with sizes that suit the images.

A network type is a function of the options, the images and the number of classes that the network is told, which
returns a ``ModelMixin`` of diffusers, called as ``network(x, timestep, return_dict=...)``, and with ``class_labels``
where it has classes. Its config holds ``sample_size`` and ``in_channels``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
from diffusers import ModelMixin, UNet2DModel

from ..basics.options import CheckedOptions, option
from ..images.samples import TrainingSource

TIME_EMBEDDINGS = ("positional", "fourier")
# Entries of a network's config that may differ between a checkpoint and the run that continues it.
_NO_ARCHITECTURE = ("dropout", "sample_size", "id2label", "label2id")
# Sizes that messages and old checkpoints mention by name.
_SIZES = ("block_out_channels", "layers_per_block")


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(CheckedOptions):
    """The sizes of a network, as far as denoisers and classifiers have them in common."""

    model_config_name_or_path: str | None = option(
        None, "Config of a UNet2DModel, a folder or Hub name, instead of the options below."
    )
    block_out_channels: tuple[int, ...] | None = option(
        None, "Channels per resolution level, such as 32 64. Default: chosen from the resolution.", least=1, most=65536
    )
    layers_per_block: int = option(2, "Residual blocks per resolution level.", least=1, most=256)
    attention_resolutions: tuple[int, ...] = option(
        (8, 16), "Sides of feature maps that get self-attention, below the full resolution.", least=1
    )
    dropout: float = option(0.0, "Dropout in the residual blocks.", least=0.0, most=0.999)


def unet_sizes(options: NetworkOptions, source: TrainingSource) -> dict[str, Any]:
    """The arguments of a ``UNet2DModel``, its classes and its time embedding left out, from options and images.

    Raises:
        ValueError: Sizes that do not divide.
    """
    channels = options.block_out_channels or default_channels(source.resolution)
    levels = len(channels)
    if source.resolution % 2 ** (levels - 1):
        raise ValueError(
            f"block_out_channels has {levels} levels, which halve the image {levels - 1} times, but the resolution "
            f"{source.resolution} is no multiple of {2 ** (levels - 1)}: pass fewer levels or another resolution."
        )
    if any(c % 4 for c in channels):
        raise ValueError(f"block_out_channels must be multiples of 4, got {' '.join(map(str, channels))}.")
    sides = [source.resolution // 2**level for level in range(levels)]
    attends = [level > 0 and side in options.attention_resolutions for level, side in enumerate(sides)]
    return {
        "sample_size": source.resolution,
        "in_channels": source.channels,
        "out_channels": source.channels,
        "block_out_channels": channels,
        "layers_per_block": options.layers_per_block,
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        "attention_head_dim": math.gcd(*channels, 64),
        # With fewer than four channels per group, GroupNorm would remove the scale of individual features.
        "norm_num_groups": min(32, math.gcd(*channels) // 4 if math.gcd(*channels) % 4 == 0 else 1),
        "dropout": options.dropout,
    }


def default_channels(resolution: int) -> tuple[int, ...]:
    """Channels of each level. The image is halved down to a side of 4 or an odd side, in at most 5 levels."""
    levels, side = 1, resolution
    while side % 2 == 0 and side // 2 >= 4 and levels < 5:
        levels, side = levels + 1, side // 2
    base = 32 if resolution <= 16 else 64 if resolution <= 64 else 128
    return tuple(base * min(2**level, 2 if level < 3 else 4) for level in range(levels))


def unet_from_config(path: str, source: TrainingSource, classes: int | None) -> UNet2DModel:
    """A network by its config, a folder or a name on the Hub, for these images and so many classes.

    Raises:
        ValueError: No such config, or one that does not fit the images.
    """
    config = UNet2DModel.load_config(path)
    try:
        unet = UNet2DModel.from_config({**config, "num_class_embeds": classes})
    except Exception as error:  # diffusers checks no types, so a wrong one may raise anything
        raise ValueError(f"model_config_name_or_path {path!r} is no config of a UNet2DModel: {error}") from error
    has = {"in_channels": unet.config.in_channels, "out_channels": unet.config.out_channels}
    for name, value in has.items():
        if value != source.channels:
            raise ValueError(
                f"model_config_name_or_path {path!r} has {name}={value}, but the images have {source.channels} "
                "channels: pass another config, or channels to convert the images."
            )
    if unet.config.sample_size not in (None, source.resolution, [source.resolution] * 2):
        raise ValueError(
            f"model_config_name_or_path {path!r} is for images of side {unet.config.sample_size}, but the images have "
            f"{source.resolution}: pass resolution={unet.config.sample_size}."
        )
    halvings = len(unet.config.block_out_channels) - 1
    if source.resolution % 2**halvings:
        raise ValueError(
            f"model_config_name_or_path {path!r} halves the image {halvings} times, but the resolution "
            f"{source.resolution} is no multiple of {2**halvings}."
        )
    unet.register_to_config(sample_size=source.resolution)
    return unet


def build_unet(options: DenoiserNetworkOptions, source: TrainingSource, classes: int | None) -> UNet2DModel:
    """A UNet, built from ``model_config_name_or_path``, or with a size that suits the images.

    Raises:
        ValueError: A given config that does not fit the images, or sizes that do not divide.
    """
    if options.model_config_name_or_path is not None:
        return unet_from_config(options.model_config_name_or_path, source, classes)
    sizes = unet_sizes(options, source)
    return UNet2DModel(**sizes, time_embedding_type=options.time_embedding_type, num_class_embeds=classes)


NetworkBuilder = Callable[["DenoiserNetworkOptions", TrainingSource, "int | None"], ModelMixin]

NETWORKS: dict[str, NetworkBuilder] = {"unet": build_unet}


@dataclass(frozen=True, kw_only=True)
class DenoiserNetworkOptions(NetworkOptions):
    """Which network is trained to denoise, and its sizes."""

    model_type: str = option("unet", "Kind of network.", choices=NETWORKS)
    time_embedding_type: str = option(
        "positional",
        "How the network embeds its timestep. 'fourier' is the paper's NCSN++: it divides the output by the timestep, "
        "so it needs --prediction_type score --time_conditioning sigma.",
        choices=TIME_EMBEDDINGS,
    )


def build_network(options: DenoiserNetworkOptions, source: TrainingSource, classes: int | None) -> ModelMixin:
    """The network that the options name.

    Args:
        options: Its type and sizes.
        source: The images.
        classes: Number of classes that it is told, with the null class; None for a network that is told none.

    Raises:
        ValueError: Options that do not fit together or do not fit the images.
    """
    return NETWORKS[options.model_type](options, source, classes)


def checked_classes(source: TrainingSource) -> int:
    """The number of classes of labelled images.

    Raises:
        ValueError: The images have no classes, or some are not labelled.
    """
    classes = len(source.class_names)
    if source.labels is None:
        raise ValueError("class_conditional needs images with classes: name their column with label_column.")
    low, high = int(source.labels.min()), int(source.labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"class_conditional needs labels in [0, {classes}), the data hold {low} to {high}.")
    return classes


def network_identity(network: Any) -> dict[str, Any]:
    """What a checkpoint records of a network's config: the sizes that messages name, and all of its architecture."""
    config = {k: v for k, v in network.config.items() if not k.startswith("_") and k not in _NO_ARCHITECTURE}
    return {**{name: config[name] for name in _SIZES if name in config}, "architecture": config}


def check_memory(weights: int, source: TrainingSource, batch: int) -> None:
    """Refuse a network or a batch that the machine's memory cannot hold by far: activations are not counted.

    Args:
        weights: Bytes of the network's weights.
        source: The images.
        batch: Images in a batch.

    Raises:
        ValueError: They do not fit.
    """
    side = source.resolution
    images = 5 * batch * source.channels * side**2  # bytes and noise
    available = psutil.virtual_memory().available
    if weights + images > available:
        raise ValueError(
            f"The weights of this network ({weights / 2**30:.1f} GiB) and one batch of {batch} images of side "
            f"{side} ({images / 2**30:.1f} GiB) do not fit into {available / 2**30:.1f} GiB of free memory: choose "
            "smaller block_out_channels, layers_per_block, resolution or train_batch_size."
        )
