"""Training on the latents of an autoencoder: its options, its scale, and data whose x_0 are latents."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoModel
from huggingface_hub import constants
from torch import Tensor

from ..basics.options import CheckedOptions, option
from ..images.samples import TrainingSamples, TrainingSource
from ..images.source import ImageSource
from ..pipelines.encoders import Latents, downsampling_of, latent_channels_of, latents_of
from .latent_cache import CachedSamples, LatentCache

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEASURED = 512  # images, spread evenly over the data, whose latents have the measured mean and deviation


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(CheckedOptions):
    """Whether the network sees pixels, or the latents of an autoencoder."""

    vae: str | None = option(
        None,
        "Train on the latents of this autoencoder (AutoencoderKL, AutoencoderTiny, AutoencoderDC, VQModel), a folder "
        "or Hub name, of itself or of a pipeline that has one. It is frozen, and saved with the pipeline. Default: "
        "train on pixels.",
    )
    latent_scaling: str = option(
        "measured",
        "Scale of the latents: 'measured' (mean 0 and standard deviation 1 per channel, on 512 images) or 'config' "
        "(scaling_factor and shift_factor of the autoencoder).",
        choices=("measured", "config"),
    )
    latent_sampling: str = option(
        "sample",
        "Latents of an autoencoder that returns a distribution: 'sample' (drawn from it anew every time, as in latent "
        "diffusion) or 'mode'. Others have one latent for each image.",
        choices=("sample", "mode"),
    )
    cache_latents: bool = option(
        False,
        "Encode all images once before training, mirrored ones too with random_flip, and read their latents from files "
        "from then on. Crops must be the same every time.",
    )
    latent_cache_dir: str | None = option(
        None,
        "Folder for these files, in which every autoencoder, resolution and data set has its own. Default: in the "
        "cache of Hugging Face.",
    )
    vae_dtype: str = option(
        "fp32", "Precision of the autoencoder, in which it is saved and its latents are kept.", choices=DTYPES
    )
    vae_batch_size: int = option(
        16, "Images that the autoencoder encodes or decodes at a time, which bounds its memory.", least=1
    )
    vae_tiling: bool = option(
        False, "Encode and decode large images in overlapping tiles, by the autoencoder's enable_tiling."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        changed = [f.name for f in fields(EncoderOptions) if getattr(self, f.name) != f.default]
        if self.vae is None and changed:
            raise ValueError(f"{changed[0]} {getattr(self, changed[0])!r} has no effect without vae.")
        if self.latent_cache_dir is not None and not self.cache_latents:
            raise ValueError(f"latent_cache_dir {self.latent_cache_dir!r} has no effect without cache_latents.")


def load_autoencoder(options: EncoderOptions, device: torch.device) -> Any:
    """A frozen autoencoder, from its own folder or repository, or from that of a pipeline.

    Raises:
        ValueError: There is none, or it has no tiling and is asked for it.
    """
    path = options.vae
    assert path is not None, "whoever trains on pixels needs no autoencoder"
    subfolder = {"subfolder": "vae"} if not Path(path, "config.json").is_file() else {}
    try:
        try:
            vae = AutoModel.from_pretrained(path, **subfolder)
        except OSError:
            vae = AutoModel.from_pretrained(path)
    except Exception as error:  # files that do not belong to an autoencoder may raise anything
        raise ValueError(f"vae {path!r} cannot be loaded: {type(error).__name__}: {error}") from error
    latents_of(vae, None, None)  # refuses what is none
    if options.vae_tiling:
        try:
            vae.enable_tiling()
        except (AttributeError, NotImplementedError) as error:
            raise ValueError(f"vae_tiling: {type(vae).__name__} has no tiling.") from error
    return vae.requires_grad_(False).eval().to(device, DTYPES[options.vae_dtype])


class LatentSource:
    """Images as training data whose x_0 are latents: channels and resolution are those of the latents.

    Args:
        images: The images.
        options: How the latents are scaled, drawn and kept.
        vae: The autoencoder, which is where the latents are computed.
        random_flip: Whether samples may be mirrored.

    Attributes:
        encoder: Turns images into x_0 and back.
        channels: Channels of the latents.
        resolution: Side of the latents.
        class_names: Names of the classes of the images.
        labels: Classes of the images.
        is_sampled: Whether latents are drawn from their distribution.
        cache: The latents in files; None where they are computed on the way.

    Raises:
        ValueError: The autoencoder does not take the images, or they cannot be cached.
    """

    def __init__(self, images: TrainingSource, options: EncoderOptions, vae: Any, random_flip: bool = False) -> None:
        if vae.config.in_channels != images.channels:
            raise ValueError(
                f"vae {options.vae!r} takes images of {vae.config.in_channels} channels, the images have "
                f"{images.channels}: pass channels={vae.config.in_channels}."
            )
        factor = downsampling_of(vae)
        if images.resolution % factor:
            raise ValueError(
                f"resolution must be a multiple of {factor} for vae {options.vae!r}, got {images.resolution}."
            )
        self._images, self._tiling = images, options.vae_tiling
        self._device = vae.device
        self.channels, self.resolution = latent_channels_of(vae), images.resolution // factor
        self.class_names, self.labels = images.class_names, images.labels
        self.encoder = latents_of(vae, None, None, options.vae_batch_size)
        mean, std = self._raw(MEASURED if options.latent_scaling == "measured" else 1)
        self.is_sampled = options.latent_sampling == "sample" and std is not None
        if options.latent_scaling == "measured":
            self.encoder = self._measured(mean, std if self.is_sampled else None)
        self.cache = self._cache_of(options, random_flip) if options.cache_latents else None

    def _measured(self, mean: Tensor, std: Tensor | None) -> Latents:
        """The latents with mean 0 and standard deviation 1 per channel; ``std`` is that of their distributions."""
        variance = mean.var((0, 2, 3), correction=0)
        if std is not None:  # the law of total variance
            variance += std.square().mean((0, 2, 3))
        moments = (mean.mean((0, 2, 3)), variance.sqrt().clamp(min=1e-6))
        # Four digits are precise enough, and a person can read them in the config.
        means, stds = ([float(f"{value:.4g}") for value in each.tolist()] for each in moments)
        return latents_of(self.encoder.vae, means, stds, self.encoder.chunk)

    @torch.no_grad()
    def _raw(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Modes and standard deviations of the latents of some images, on the host."""
        images = self._images.spread(count)[0].to(self._device)
        parts = [
            [None if each is None else each.float().cpu() for each in part] for part in self.encoder.moments(images)
        ]
        means, stds = ([each for each in column if each is not None] for column in zip(*parts, strict=True))
        return torch.cat(means), torch.cat(stds) if stds else None

    def _cache_of(self, options: EncoderOptions, random_flip: bool) -> LatentCache:
        images = self._images
        if not isinstance(images, ImageSource):
            raise ValueError("cache_latents needs data that are not streamed.")
        if not images.has_fixed_crops:
            raise ValueError("cache_latents needs the same crops every time: pass center_crop=True.")
        # The scale is not among what counts: latents are kept as the autoencoder returns them.
        of = {
            "vae": self._hash(),
            "dtype": options.vae_dtype,
            "tiling": options.vae_tiling,
            "data": images.content_key(),
        }
        of |= {"mirrored": random_flip, "sampled": self.is_sampled, "class": type(self.encoder.vae).__name__}
        key = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:32]
        root = options.latent_cache_dir or Path(constants.HF_HOME, "diffusers_sde", "latents")
        shape = (self.channels, self.resolution, self.resolution)
        return LatentCache(Path(root) / key, key, self.encoder, images, random_flip, self.is_sampled, shape)

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for name, value in sorted(self.encoder.vae.state_dict().items()):
            digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that continues it."""
        own = {"vae": self._hash(), "latents_mean": list(self.encoder.mean), "latents_std": list(self.encoder.std)}
        own |= {"latent_sampling": "sample"} if self.is_sampled else {}
        return own | ({"vae_tiling": True} if self._tiling else {})

    def prepare(self, process: PartialState) -> None:
        """Fill the cache, if there is one; to be called on all processes, before ``samples``."""
        if self.cache is not None:
            written = self.cache.build(process)
            logger.info(
                "Latents: %.1f MiB in %s, %s.",
                self.cache.size / 2**20,
                self.cache.folder,
                "new" if written else "found",
            )
            self.rest()

    def rest(self) -> None:
        """Let the autoencoder wait on the host where training reads latents from files, and frees its memory so."""
        if self.cache is not None:
            self.encoder.vae.to("cpu")

    def wake(self) -> None:
        """Bring the autoencoder back to its device."""
        self.encoder.vae.to(self._device)

    @torch.no_grad()
    def x0(self, batch: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """The network's data of a batch from ``samples``, float32 on the device."""
        if self.cache is None:
            parts = list(self.encoder.moments(batch["images"].to(device, non_blocking=True), fixed=True))
            mean = torch.cat([part[0] for part in parts]).float()
            std = torch.cat([part[1].float() for part in parts if part[1] is not None]) if self.is_sampled else None
        else:
            mean = batch["latent_mean"].to(device, non_blocking=True)
            std = batch["latent_std"].to(device, non_blocking=True) if self.is_sampled else None
        z = mean if std is None else mean + std * batch["latent_noise"].to(device, non_blocking=True)
        # Convolutions of another layout in memory are other ones, down to the last bit.
        return self.encoder.normalized(z).contiguous()

    # ------------------------------------------------------------------ see TrainingSource

    @property
    def num_images(self) -> int | None:
        """Images in one pass through the data; None where that is not known."""
        return self._images.num_images

    def epoch(self, samples_seen: int) -> float:
        """Passes through the data when so many samples have been seen."""
        return self._images.epoch(samples_seen)

    def spread(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Up to ``count`` images, not latents, evenly spread over those known beforehand, and their classes."""
        return self._images.spread(count)

    def statistics(self, data_min: float) -> tuple[float, float]:
        """Standard deviation of the latents and the largest distance between those of two images."""
        x = self.encoder.encode(self._images.spread(MEASURED)[0].to(self._device)).cpu().flatten(1)
        return float(x.std(correction=0)), float(torch.cdist(x, x).max())

    def fingerprint(self, with_classes: bool) -> str:
        """A hash of some images, and perhaps of all classes."""
        return self._images.fingerprint(with_classes)

    def samples(self, seed: int, random_flip: bool, strata: int) -> TrainingSamples:
        """The training samples by number: images, or moments of their latents, and noise in the shape of these."""
        shape = (self.channels, self.resolution, self.resolution)
        if self.cache is None:
            samples = self._images.samples(seed, random_flip, strata)
        else:
            assert isinstance(self._images, ImageSource), "_cache_of has refused others"
            samples = CachedSamples(self.cache, self._images, shape, seed, random_flip, strata)
        samples.noise_shape, samples.draws_latents = shape, self.is_sampled
        return samples

    def state(self, samples_seen: int) -> dict[str, Any]:
        """What a checkpoint must hold, so that ``resume`` goes on after so many samples."""
        return self._images.state(samples_seen)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self._images.resume(state)
