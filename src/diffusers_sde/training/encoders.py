"""Training on the latents of an autoencoder: its options, its scale, and data whose x_0 are latents."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel
from torch import Tensor

from ..basics.options import CheckedOptions, option
from ..images.samples import TrainingSamples, TrainingSource
from ..pipelines.encoders import Latents, downsampling_of, latent_channels_of, latents_of

MEASURED = 512  # images, spread evenly over the data, whose latents have the measured mean and deviation


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(CheckedOptions):
    """Whether the network sees pixels, or the latents of an autoencoder."""

    vae: str | None = option(
        None,
        "Train on the latents of this autoencoder (AutoencoderKL, AutoencoderTiny), a folder or Hub name, of itself or "
        "of a pipeline that has one. It is frozen, and saved with the pipeline. Default: train on pixels.",
    )
    latent_scaling: str = option(
        "measured",
        "Scale of the latents: 'measured' (mean 0 and standard deviation 1 per channel, on 512 images) or 'config' "
        "(scaling_factor and shift_factor of the autoencoder).",
        choices=("measured", "config"),
    )


def load_autoencoder(path: str, device: torch.device) -> Any:
    """A frozen autoencoder, from its own folder or repository, or from that of a pipeline.

    Raises:
        ValueError: There is none.
    """
    subfolder = {"subfolder": "vae"} if not Path(path, "config.json").is_file() else {}
    try:
        try:
            vae = AutoModel.from_pretrained(path, **subfolder)
        except OSError:
            vae = AutoModel.from_pretrained(path)
    except Exception as error:  # files that do not belong to an autoencoder may raise anything
        raise ValueError(f"vae {path!r} cannot be loaded: {type(error).__name__}: {error}") from error
    latents_of(vae, None, None)  # refuses what is none
    return vae.requires_grad_(False).eval().to(device)


class LatentSource:
    """Images as training data whose x_0 are latents: channels and resolution are those of the latents.

    Args:
        images: The images.
        options: How the latents are scaled.
        vae: The autoencoder, which is where the latents are computed.

    Attributes:
        encoder: Turns images into x_0 and back.
        channels: Channels of the latents.
        resolution: Side of the latents.
        class_names: Names of the classes of the images.
        labels: Classes of the images.

    Raises:
        ValueError: The autoencoder does not take the images.
    """

    def __init__(self, images: TrainingSource, options: EncoderOptions, vae: Any) -> None:
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
        self._images = images
        self.channels, self.resolution = latent_channels_of(vae), images.resolution // factor
        self.class_names, self.labels = images.class_names, images.labels
        self.encoder = latents_of(vae, None, None)
        if options.latent_scaling == "measured":
            self.encoder = self._measured()

    @torch.no_grad()
    def _measured(self) -> Latents:
        z = self._raw(MEASURED)
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3), correction=0).clamp(min=1e-6)
        # Four digits are precise enough, and a person can read them in the config.
        rounded = ([float(f"{value:.4g}") for value in each.tolist()] for each in (mean, std))
        return latents_of(self.encoder.vae, next(rounded), next(rounded))

    @torch.no_grad()
    def _raw(self, count: int) -> Tensor:
        images = self._images.spread(count)[0].to(self.encoder.vae.device)
        return torch.cat(list(self.encoder.raw(images))).cpu()

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that continues it."""
        digest = hashlib.sha256()
        for name, value in sorted(self.encoder.vae.state_dict().items()):
            digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
        return {
            "vae": digest.hexdigest()[:16],
            "latents_mean": list(self.encoder.mean),
            "latents_std": list(self.encoder.std),
        }

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
        x = self.encoder.encode(self._images.spread(MEASURED)[0].to(self.encoder.vae.device)).cpu().flatten(1)
        return float(x.std(correction=0)), float(torch.cdist(x, x).max())

    def fingerprint(self, with_classes: bool) -> str:
        """A hash of some images, and perhaps of all classes."""
        return self._images.fingerprint(with_classes)

    def samples(self, seed: int, random_flip: bool, strata: int) -> TrainingSamples:
        """The training samples by number: images, and noise in the shape of the latents."""
        samples = self._images.samples(seed, random_flip, strata)
        samples.noise_shape = (self.channels, self.resolution, self.resolution)
        return samples

    def state(self, samples_seen: int) -> dict[str, Any]:
        """What a checkpoint must hold, so that ``resume`` goes on after so many samples."""
        return self._images.state(samples_seen)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self._images.resume(state)
