"""The network and the scheduler that a configuration asks for, with defaults chosen per SDE and from the data."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel

from ..images.source import ImageSource
from ..networks.losses import output_weight, times_from_uniform
from ..networks.parametrizations import Parametrization
from ..schedulers import FlowSDEScheduler, SDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from ..sdes import SDE
from .configuration import TrainingConfig

DEFAULT_PREDICTION = {"ve": "edm", "vp": "epsilon", "sub_vp": "epsilon", "flow": "flow_prediction"}


def build_scheduler(config: TrainingConfig, source: ImageSource) -> SDEScheduler:
    """The scheduler: it carries the SDE, what the network predicts and what it is fed, and is saved with the network.

    Raises:
        ValueError: Options that its SDE cannot take.
    """
    prediction_type = config.prediction_type or DEFAULT_PREDICTION[config.sde]
    common: dict[str, Any] = {
        "num_train_timesteps": config.num_train_timesteps,
        "prediction_type": prediction_type,
        "time_conditioning": config.time_conditioning or "continuous",
    }
    if config.sampling_eps is not None:
        common["sampling_eps"] = config.sampling_eps
    if prediction_type == "edm" or (config.sde == "ve" and config.sigma_max is None):
        std, largest_distance = source.statistics(config.data_min)
        # Three digits are precise enough, and a person can read them in the config.
        common["sigma_data"] = config.sigma_data or _rounded(max(std, 1e-3))
    else:
        largest_distance = 0.0
    if config.sde == "ve":
        sigma_min = config.sigma_min or 0.01 * (1.0 - config.data_min)
        sigma_max = config.sigma_max or _rounded(max(largest_distance, 2.0 * sigma_min))
        return VESDEScheduler(sigma_min=sigma_min, sigma_max=sigma_max, **common)
    if config.sde == "flow":
        return FlowSDEScheduler(**common)
    betas: dict[str, Any] = {"beta_start": config.beta_start, "beta_end": config.beta_end}
    if config.sde == "sub_vp":
        return SubVPSDEScheduler(**betas, **common)
    if config.discrete:
        common["time_conditioning"] = config.time_conditioning or "discrete"
        return VPSDEScheduler(
            **betas, beta_schedule=config.beta_schedule, continuous=False, timestep_spacing="trailing", **common
        )
    return VPSDEScheduler(**betas, continuous=True, **common)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def training_sde(scheduler: SDEScheduler, config: TrainingConfig) -> SDE:
    """The scheduler's SDE on [train_eps, 1]."""
    return dataclasses.replace(scheduler.sde, t_min=config.train_eps)


def default_weighting(config: TrainingConfig, scheduler: SDEScheduler) -> str:
    """The configured weighting, or the one that keeps the loss of this prediction type balanced."""
    if config.weighting is not None:
        return config.weighting
    return "paper" if scheduler.config.prediction_type in ("epsilon", "score") else "output"


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


def check_trainable(
    sde: SDE, parametrization: Parametrization, weighting: str, discrete_steps: int | None, time_sampling: str
) -> None:
    """Make sure that the loss is finite at all training times.

    Raises:
        ValueError: The prediction type has no finite target at some time (such as the noise where alpha = 0), or the
            times cannot be drawn by ``time_sampling``.
    """
    u = torch.linspace(0.0, 1.0 - 1e-9, discrete_steps or 1000, dtype=torch.float64)
    u = u if discrete_steps is not None else u.clamp(min=1e-9)
    t = times_from_uniform(sde, u, discrete_steps, time_sampling)
    skip, out = parametrization.coefficients(sde.alpha(t), sde.sigma(t))
    values = torch.stack([skip, out, 1.0 / out, output_weight(sde, parametrization, t, weighting)])
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"prediction_type of {type(parametrization).__name__} with weighting {weighting!r} is not finite at every "
            f"training time of {type(sde).__name__}: choose v_prediction, flow_prediction, sample or edm."
        )


def build_unet(config: TrainingConfig, source: ImageSource) -> UNet2DModel:
    """The network, built from ``model_config_name_or_path``, or with a size that suits the images.

    Raises:
        ValueError: A given config that does not fit the images, or sizes that do not divide.
    """
    if config.model_config_name_or_path is not None:
        return _unet_from_config(config.model_config_name_or_path, source, class_embeddings(config, source))
    classes = class_embeddings(config, source)
    channels = config.block_out_channels or default_channels(source.resolution)
    levels = len(channels)
    if source.resolution % 2 ** (levels - 1):
        raise ValueError(
            f"block_out_channels has {levels} levels, which halve the image {levels - 1} times, but the resolution "
            f"{source.resolution} is no multiple of {2 ** (levels - 1)}: pass fewer levels or another resolution."
        )
    if any(c % 4 for c in channels):
        raise ValueError(f"block_out_channels must be multiples of 4, got {' '.join(map(str, channels))}.")
    sides = [source.resolution // 2**level for level in range(levels)]
    attends = [level > 0 and side in config.attention_resolutions for level, side in enumerate(sides)]
    # With fewer than four channels per group, GroupNorm would remove the scale of individual features.
    groups = min(32, math.gcd(*channels) // 4 if math.gcd(*channels) % 4 == 0 else 1)
    head_dim = math.gcd(*channels, 64)
    return UNet2DModel(
        sample_size=source.resolution,
        in_channels=source.channels,
        out_channels=source.channels,
        block_out_channels=channels,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        attention_head_dim=head_dim,
        norm_num_groups=groups,
        dropout=config.dropout,
        time_embedding_type=config.time_embedding_type,
        num_class_embeds=classes,
    )


def class_embeddings(config: TrainingConfig, source: ImageSource) -> int | None:
    """Number of classes that the network knows, or None without ``class_conditional``.

    If labels are hidden in training, the last class is the null class, which stands for a hidden label.

    Raises:
        ValueError: The images have no classes, or some are not labelled.
    """
    if not config.class_conditional:
        return None
    classes = len(source.class_names)
    if source.labels is None:
        raise ValueError("class_conditional needs images with classes: name their column with label_column.")
    low, high = int(source.labels.min()), int(source.labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"class_conditional needs labels in [0, {classes}), the data hold {low} to {high}.")
    return classes + (1 if config.label_dropout > 0.0 else 0)


def default_channels(resolution: int) -> tuple[int, ...]:
    """Channels of each level. The image is halved down to a side of 4 or an odd side, in at most 5 levels."""
    levels, side = 1, resolution
    while side % 2 == 0 and side // 2 >= 4 and levels < 5:
        levels, side = levels + 1, side // 2
    base = 32 if resolution <= 16 else 64 if resolution <= 64 else 128
    return tuple(base * min(2**level, 2 if level < 3 else 4) for level in range(levels))


def _unet_from_config(path: str, source: ImageSource, classes: int | None) -> UNet2DModel:
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
