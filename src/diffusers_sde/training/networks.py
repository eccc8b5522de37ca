"""The networks that training builds, by name, with sizes that suit the images.

A network type is a function of the options, the images and the number of classes that the network is told (or, for one
that is told captions, the width of their embeddings), which returns a ``ModelMixin`` of diffusers, called as
``network(x, timestep, return_dict=...)``, with ``class_labels`` where it has classes, and with
``encoder_hidden_states`` and ``encoder_attention_mask`` where it is told captions. Its config holds ``sample_size`` and
``in_channels``; ``basics.networks.NetworkTraits`` says what else is read from it. There is a builder for each type,
which makes the file a long one.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psutil
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

from ..basics.networks import denoises_images, traits_of
from ..basics.options import CheckedOptions, option
from ..images.samples import TrainingSource
from ..networks.ncsnpp import PRESETS, NCSNpp
from ..pipelines.captions import CaptionEncoder
from .captions import STOCK_PIPELINES, saved_encoder
from .trainable import PredictionOptions, SDEOptions
from .transformers import SIZES, initialize_transformer, leave_labels, transformer_sizes

TIME_EMBEDDINGS = ("positional", "fourier")
# Entries of a network's config that may differ between a checkpoint and the run that continues it.
_NO_ARCHITECTURE = ("dropout", "sample_size", "id2label", "label2id")
# Sizes that messages and old checkpoints mention by name.
_SIZES = ("block_out_channels", "layers_per_block")


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(CheckedOptions):
    """The sizes of a network, as far as denoisers and classifiers have them in common."""

    model_config_name_or_path: str | None = option(
        None, "Config of a network of this kind, a folder or Hub name, instead of the options below."
    )
    block_out_channels: tuple[int, ...] | None = option(
        None, "Channels per resolution level, such as 32 64. Default: chosen from the resolution.", least=1, most=65536
    )
    layers_per_block: int = option(2, "Residual blocks per resolution level.", least=1, most=256)
    attention_resolutions: tuple[int, ...] = option(
        (8, 16), "Sides of feature maps that get self-attention, below the full resolution.", least=1
    )
    dropout: float | None = option(
        None, "Dropout in the residual blocks. Default: 0, or that of a preset.", least=0.0, most=0.999
    )
    gradient_checkpointing: bool = option(
        False, "Keep no activations of the blocks and compute them again on the way back: less memory, more time."
    )


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
        "dropout": options.dropout or 0.0,
    }


def default_channels(resolution: int) -> tuple[int, ...]:
    """Channels of each level. The image is halved down to a side of 4 or an odd side, in at most 5 levels."""
    levels, side = 1, resolution
    while side % 2 == 0 and side // 2 >= 4 and levels < 5:
        levels, side = levels + 1, side // 2
    base = 32 if resolution <= 16 else 64 if resolution <= 64 else 128
    return tuple(base * min(2**level, 2 if level < 3 else 4) for level in range(levels))


def network_from_config(
    network_class: type[ModelMixin], path: str, source: TrainingSource, classes: int | None
) -> ModelMixin:
    """A network by its config, a folder or a name on the Hub, for these images and so many classes.

    Args:
        network_class: What the config is one of.
        path: The folder or name.
        source: The images.
        classes: Number of classes that it is told, with the null class; None for a network that is told none.

    Raises:
        ValueError: No such config, or one that does not fit the images.
    """
    config = network_class.load_config(path)
    try:
        network = network_class.from_config({**config, **label_entries(network_class, classes)})
    except Exception as error:  # diffusers checks no types, so a wrong one may raise anything
        raise ValueError(
            f"model_config_name_or_path {path!r} is no config of a {network_class.__name__}: {error}"
        ) from error
    sides = traits_of(network).sides
    if sides not in (None, (source.resolution,) * 2):
        raise ValueError(
            f"model_config_name_or_path {path!r} is for images of side {network.config.sample_size}, but the images "
            f"have {source.resolution}: pass resolution={network.config.sample_size}."
        )
    check_images(network, source, f"model_config_name_or_path {path!r}")
    network.register_to_config(sample_size=source.resolution)
    return network


def label_entries(network_class: type[ModelMixin], classes: int | None) -> dict[str, Any]:
    """The entries of a network's config that give it so many classes, a null class included, or none.

    A ``DiTTransformer2DModel`` has one label more than its config says, which ``NetworkTraits`` counts too. A
    ``PixArtTransformer2DModel`` has no such entry.
    """
    if issubclass(network_class, PixArtTransformer2DModel):
        return {}
    if issubclass(network_class, DiTTransformer2DModel):
        return {"num_embeds_ada_norm": 0 if classes is None else classes - 1}
    return {"num_class_embeds": classes}


def check_images(network: ModelMixin, source: TrainingSource, whose: str) -> None:
    """Make sure that a network takes images of these channels and sides, and returns as many.

    Args:
        network: The network.
        source: The images.
        whose: Where the network comes from, in words.

    Raises:
        ValueError: It does not.
    """
    traits = traits_of(network)
    has = {"in_channels": network.config.get("in_channels"), "out_channels": network.config.get("out_channels")}
    for name, value in has.items():
        expected = (source.channels, None, *([2 * source.channels] if traits.returns_variance else []))
        if value not in expected:
            raise ValueError(
                f"{whose} has {name}={value}, but the images have {source.channels} channels: pass another network, or "
                "channels to convert the images."
            )
    if source.resolution % (traits.divisor or 1):
        does = f"has patches of side {traits.divisor}"
        if not traits.fixed_sides:
            does = f"halves the image {(traits.divisor or 1).bit_length() - 1} times"
        raise ValueError(f"{whose} {does}, but the resolution {source.resolution} is no multiple of {traits.divisor}.")


def build_unet(options: DenoiserOptions, source: TrainingSource, classes: int | None) -> ModelMixin:
    """A UNet, built from ``model_config_name_or_path``, or with a size that suits the images.

    Raises:
        ValueError: A given config that does not fit the images, or sizes that do not divide.
    """
    if options.model_config_name_or_path is not None:
        return network_from_config(UNet2DModel, options.model_config_name_or_path, source, classes)
    sizes = unet_sizes(options, source)
    return UNet2DModel(**sizes, time_embedding_type=options.time_embedding_type, num_class_embeds=classes)


def captioned_from_config(
    network_class: type[ModelMixin], path: str, source: TrainingSource, caption_width: int | None
) -> ModelMixin:
    """A network by its config, which is told embeddings of captions of this width; None for one that is told none.

    Raises:
        ValueError: See ``network_from_config``; or the config is for embeddings of another width.
    """
    network = network_from_config(network_class, path, source, None)
    check_captions(network, caption_width, f"model_config_name_or_path {path!r}")
    return network


def check_captions(network: ModelMixin, caption_width: int | None, whose: str) -> None:
    """Make sure that a network is told embeddings of captions of this width, and nothing that nobody would tell it.

    Args:
        network: The network.
        caption_width: Width of the embeddings; None where there are no captions.
        whose: Where the network comes from, in words.

    Raises:
        ValueError: It is told others, or something else.
    """
    traits = traits_of(network)
    if traits.caption_width != caption_width:
        takes, has = (
            "no captions" if width is None else f"embeddings of captions of width {width}"
            for width in (traits.caption_width, caption_width)
        )
        raise ValueError(f"{whose} has a network that is told {takes}, this run has {has}.")
    if traits.also_needs is not None:
        raise ValueError(
            f"{whose} has a network that must also be told {traits.also_needs}, which no pipeline here does: take one "
            "that is told images, timesteps and captions alone."
        )


def build_unet_condition(options: DenoiserOptions, source: TrainingSource, caption_width: int | None) -> ModelMixin:
    """A UNet that attends to the embeddings of a caption, from ``model_config_name_or_path`` or with sizes that suit.

    It does so at the lowest resolution, and wherever it has self-attention.

    Raises:
        ValueError: A given config that does not fit the images or the captions, or sizes that do not divide.
    """
    if options.model_config_name_or_path is not None:
        return captioned_from_config(UNet2DConditionModel, options.model_config_name_or_path, source, caption_width)
    sizes = unet_sizes(options, source)
    for name in ("down_block_types", "up_block_types"):
        sizes[name] = tuple(block.replace("Attn", "CrossAttn") for block in sizes[name])
    width_of_head = sizes.pop("attention_head_dim")
    return UNet2DConditionModel(
        **sizes,
        # What diffusers calls attention_head_dim here is the number of heads.
        attention_head_dim=tuple(channels // width_of_head for channels in sizes["block_out_channels"]),
        cross_attention_dim=caption_width,
    )


def build_dit(options: DenoiserOptions, source: TrainingSource, classes: int | None) -> ModelMixin:
    """A transformer on patches, built from ``model_config_name_or_path``, or of the named size; see ``transformers``.

    Raises:
        ValueError: A given config that does not fit the images, or patches that do not cover them.
    """
    if options.model_config_name_or_path is not None:
        network = network_from_config(DiTTransformer2DModel, options.model_config_name_or_path, source, classes)
    else:
        sizes = transformer_sizes(source, options.model_size, options.patch_size)
        labels = label_entries(DiTTransformer2DModel, classes)
        network = DiTTransformer2DModel(**sizes, **labels, dropout=options.dropout or 0.0)
    initialize_transformer(network)
    return network


def build_pixart(options: DenoiserOptions, source: TrainingSource, caption_width: int | None) -> ModelMixin:
    """A transformer on patches whose blocks attend to the embeddings of a caption, where there are captions.

    It is built from ``model_config_name_or_path``, or of the named size; see ``transformers``.

    Raises:
        ValueError: A given config that does not fit the images or the captions, or patches that do not cover them.
    """
    path = options.model_config_name_or_path
    if path is not None:
        network = captioned_from_config(PixArtTransformer2DModel, path, source, caption_width)
    else:
        sizes = transformer_sizes(source, options.model_size, options.patch_size)
        width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
        network = PixArtTransformer2DModel(
            **sizes,
            dropout=options.dropout or 0.0,
            caption_channels=caption_width,
            cross_attention_dim=None if caption_width is None else width,
            use_additional_conditions=False,  # the sizes of images, where nothing is said and these are 128
        )
    initialize_transformer(network)
    return network


def build_ncsnpp(options: DenoiserOptions, source: TrainingSource, classes: int | None) -> ModelMixin:
    """The paper's NCSN++: FIR resampling and the image shown to every resolution; see ``_build_paper``."""
    return _build_paper(options, source, classes, fir_kernel=(1, 3, 3, 1), progressive_input="residual")


def build_ddpmpp(options: DenoiserOptions, source: TrainingSource, classes: int | None) -> ModelMixin:
    """The paper's DDPM++, NCSN++ without FIR resampling and progressive input; see ``_build_paper``."""
    return _build_paper(options, source, classes, fir_kernel=None, progressive_input="none")


def _build_paper(
    options: DenoiserOptions, source: TrainingSource, classes: int | None, **resampling: Any
) -> ModelMixin:
    """A network of the paper: by its config, by the name of a preset, or with sizes that suit the images.

    Without either, NCSN++ for the VE SDE is the paper's: it embeds log sigma, and divides its output by sigma unless
    another prediction than the score is asked for. All others embed the timestep.

    Raises:
        ValueError: A config or a preset that does not fit the images, or sizes that do not divide.
    """
    path, preset = options.model_config_name_or_path, options.model_preset
    if path is not None:
        return network_from_config(NCSNpp, path, source, classes)
    of_data: dict[str, Any] = {"in_channels": source.channels, "num_class_embeds": classes}
    if options.dropout is not None:
        of_data["dropout"] = options.dropout
    if preset is not None:
        side, centers = (PRESETS[preset][name] for name in ("sample_size", "center_input_sample"))
        if side != source.resolution:
            raise ValueError(
                f"model_preset {preset!r} is for images of side {side}, but the images have {source.resolution}: pass "
                f"resolution={side}."
            )
        if centers != (options.data_min == 0.0):
            raise ValueError(
                f"model_preset {preset!r} is for images in [{-1 + centers}, 1]: pass data_min={-1 + centers}, got "
                f"{options.data_min!r}."
            )
        return NCSNpp.from_preset(preset, **of_data)
    sizes = unet_sizes(options, source)
    takes_sigma = options.model_type == "ncsnpp" and options.sde == "ve"
    return NCSNpp(
        **resampling,
        **{"dropout": 0.0, **of_data},
        sample_size=source.resolution,
        block_out_channels=tuple(sizes["block_out_channels"]),
        layers_per_block=options.layers_per_block,
        attention_resolutions=tuple(side for side in options.attention_resolutions if side < source.resolution),
        time_embedding_type="fourier" if takes_sigma else "positional",
        scale_by_sigma=takes_sigma and options.prediction_type in (None, "score"),
        # What edm prediction is fed is scaled, and lies nowhere near [0, 1].
        center_input_sample=options.data_min == 0.0 and options.prediction_type != "edm",
    )


NetworkBuilder = Callable[["DenoiserOptions", TrainingSource, "int | None"], ModelMixin]

NETWORKS: dict[str, NetworkBuilder] = {
    "unet": build_unet,
    "dit": build_dit,
    "ncsnpp": build_ncsnpp,
    "ddpmpp": build_ddpmpp,
}
CAPTIONED_NETWORKS: dict[str, NetworkBuilder] = {"unet_condition": build_unet_condition, "pixart": build_pixart}
"""Those that are told captions; their builders get the width of the embeddings in the place of the classes."""
WITHOUT_CAPTIONS = ("pixart",)
"""Those of them that are built for images without captions as well."""
_TYPES = ChainMap(NETWORKS, CAPTIONED_NETWORKS)
_PAPER = ("ncsnpp", "ddpmpp")
_OF_UNETS = ("unet", "unet_condition", *_PAPER)
# Of these options, those networks of the registry that take them; networks of a user's own may take any.
_TAKEN_BY = {
    "block_out_channels": _OF_UNETS,
    "layers_per_block": _OF_UNETS,
    "attention_resolutions": _OF_UNETS,
    "time_embedding_type": ("unet",),
    "model_size": ("dit", "pixart"),
    "patch_size": ("dit", "pixart"),
    "model_preset": _PAPER,
}
_BUILT_IN = tuple(_TYPES)


@dataclass(frozen=True, kw_only=True)
class DenoiserNetworkOptions(NetworkOptions):
    """Which network is trained to denoise, and its sizes."""

    model_type: str = option(
        "unet",
        "Kind of network: 'unet' (UNet2DModel), 'dit' (DiTTransformer2DModel on patches of the image), 'ncsnpp' or "
        "'ddpmpp' (the paper's), 'unet_condition' (UNet2DConditionModel, for captions), or 'pixart' "
        "(PixArtTransformer2DModel, a transformer for captions or for images alone).",
        choices=_TYPES,
    )
    model_size: str | None = option(
        None,
        "Size of a dit or pixart: S, B, L and XL are those of DiT's paper. Default: 4 layers of width 96 for images of "
        "up to 16 pixels, S beyond.",
        choices=SIZES,
    )
    patch_size: int | None = option(
        None,
        "Side of a patch of a dit or pixart, which is a token; it divides the resolution. Default: 2, and beyond 64 "
        "pixels a 32nd of the resolution.",
        least=1,
        most=1024,
    )
    model_preset: str | None = option(
        None,
        "Configuration of the paper for ncsnpp and ddpmpp, such as ve/cifar10_ncsnpp_continuous, instead of the sizes.",
        choices=PRESETS,
    )
    time_embedding_type: str = option(
        "positional",
        "How a unet embeds its timestep. 'fourier' is the paper's NCSN++: it divides the output by the timestep, "
        "so it needs --prediction_type score --time_conditioning sigma.",
        choices=TIME_EMBEDDINGS,
    )
    init_from: str | None = option(
        None,
        "Start from the averaged network of a saved pipeline, a folder or Hub name, or from a saved network, instead "
        "of new weights. It brings its architecture, and must fit the images and the number of classes.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [f.name for f in fields(DenoiserNetworkOptions) if getattr(self, f.name) != f.default]
        given = [name for name in given if name in (*_TAKEN_BY, "model_type", "model_config_name_or_path", "dropout")]
        for name in given:
            kinds = _TAKEN_BY.get(name, (self.model_type,))
            if self.model_type in _BUILT_IN and self.model_type not in kinds:
                raise ValueError(f"{name} is for model_type {' or '.join(kinds)}, got model_type={self.model_type!r}.")
        if self.init_from is not None and given:
            raise ValueError(f"{given[0]} cannot be set beside init_from, which brings its network.")
        sizes = [name for name in given if name in (*_SIZES, "attention_resolutions", "model_config_name_or_path")]
        if self.model_preset is not None and sizes:
            raise ValueError(f"{sizes[0]} cannot be set beside model_preset, which says all sizes.")


@dataclass(frozen=True, kw_only=True)
class DenoiserOptions(PredictionOptions, DenoiserNetworkOptions, SDEOptions):
    """What decides about the network of a denoiser: its own options, and what it predicts for which SDE."""


def build_network(
    options: DenoiserOptions, source: TrainingSource, classes: int | None, caption_width: int | None = None
) -> ModelMixin:
    """The network that the options name, with new weights.

    Args:
        options: Its type and sizes, and what it is trained for.
        source: The images.
        classes: Number of classes that it is told, with the null class; None for a network that is told none.
        caption_width: Width of the embeddings of captions that it is told; None likewise.

    Raises:
        ValueError: Options that do not fit together or do not fit the images.
    """
    told = caption_width if options.model_type in CAPTIONED_NETWORKS else classes
    network = _TYPES[options.model_type](options, source, told)
    leave_labels(network)
    return network


_TOLD_CAPTIONS = (UNet2DConditionModel, PixArtTransformer2DModel)
_SAVED_ALONE: dict[str, Any] = {
    each.__name__: each for each in (UNet2DModel, DiTTransformer2DModel, NCSNpp, *_TOLD_CAPTIONS)
}


@dataclass(frozen=True)
class SavedModel:
    """What training starts from: a trained network, and the scheduler that it was saved with.

    Attributes:
        path: The folder or the name on the Hub.
        network: The network.
        scheduler: The scheduler; None where the network was saved alone.
        captions: What embeds captions for the network; None where it is told none, or was saved alone.
    """

    path: str
    network: ModelMixin
    scheduler: Any
    captions: CaptionEncoder | None = None

    @classmethod
    def load(cls, path: str) -> SavedModel:
        """Load a pipeline, or a network that was saved alone.

        Raises:
            ValueError: There is neither, or the pipeline has no network that denoises images, or one for captions that
                are not embedded by a single text encoder.
        """
        try:
            if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
                name = UNet2DModel.load_config(path)["_class_name"]
                return cls(path, _SAVED_ALONE[name].from_pretrained(path), None)
            pipe = DiffusionPipeline.from_pretrained(path)
        except Exception as error:  # files that do not belong to a pipeline may raise anything
            raise ValueError(f"init_from {path!r} cannot be loaded: {type(error).__name__}: {error}") from error
        network = getattr(pipe, "unet", None)
        network = getattr(pipe, "transformer", None) if network is None else network
        told_captions = type(network) in _TOLD_CAPTIONS and traits_of(network).caption_width is not None
        captions = saved_encoder(pipe) if told_captions else None
        if captions is None and not denoises_images(network):
            raise ValueError(
                f"init_from {path!r} is a {type(pipe).__name__}: a pipeline is needed whose unet or transformer is "
                "called with images and timesteps, and with labels at most, or with captions as in TextSDEPipeline "
                f"and {', '.join(STOCK_PIPELINES)}."
            )
        return cls(path, network, getattr(pipe, "scheduler", None), captions)

    def network_for(self, source: TrainingSource, classes: int | None, caption_width: int | None = None) -> ModelMixin:
        """A network of this one's architecture and weights, for these images and so many classes.

        Args:
            source: The images.
            classes: Number of classes that it is told, with the null class; None for a network that is told none.
            caption_width: Width of the embeddings of captions that it is told; None likewise.

        Raises:
            ValueError: It has other channels, classes or weights.
        """
        whose = f"init_from {self.path!r}"
        knows = traits_of(self.network).num_classes
        if knows != classes:
            counts = [f"{count} classes" if count is not None else "no classes" for count in (knows, classes)]
            raise ValueError(
                f"{whose} has a network of {counts[0]}, this run one of {counts[1]}, the null class counted: the data, "
                "class_conditional and label_dropout must give as many."
            )
        check_captions(self.network, caption_width, whose)
        network: ModelMixin = type(self.network).from_config({**self.network.config, "sample_size": source.resolution})
        check_images(network, source, whose)
        weights, own = self.network.state_dict(), network.state_dict()
        for name in sorted(weights.keys() | own.keys()):
            shapes = [tuple(each[name].shape) if name in each else None for each in (weights, own)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{whose} does not fit images of side {source.resolution}: its {name} has shape {shapes[0]}, a "
                    f"network for these images {shapes[1]}."
                )
        leave_labels(network)
        if network.device.type != "meta":
            network.load_state_dict(weights)
        return network


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
