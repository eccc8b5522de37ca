"""What the training of an autoencoder is told: a dataclass, from which the command line is generated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..basics.options import CheckedOptions, option
from ..images.options import ImageOptions
from .options import AveragingOptions, LoadingOptions, OptimisationOptions, OutputOptions

RECONSTRUCTIONS = ("l1", "l2")


@dataclass(frozen=True, kw_only=True)
class AutoencoderOptions(CheckedOptions):
    """The sizes of an autoencoder, and its loss."""

    latent_channels: int = option(4, "Channels of the latents.", least=1, most=1024)
    downsampling: int = option(4, "Pixels along a side for which one latent stands: a power of 2.", least=1, most=256)
    block_out_channels: tuple[int, ...] | None = option(
        None,
        "Channels of each level, the first of which has the full resolution; each further one halves it. Default: 32, "
        "64, 64 and so on, 128 at most from the fourth on.",
        least=4,
        most=65536,
    )
    layers_per_block: int = option(1, "Residual blocks per level; the decoder has one more.", least=1, most=256)
    reconstruction: str = option(
        "l1", "Reconstruction error per pixel, of images in [-1, 1]: absolute or squared.", choices=RECONSTRUCTIONS
    )
    kl_weight: float = option(
        1e-3,
        "Weight of KL(q(z | image) || N(0, 1)) per latent number beside the reconstruction error: small, so that it "
        "bounds the latents and makes them smooth, and no more.",
        least=0.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.downsampling & (self.downsampling - 1):
            raise ValueError(f"downsampling must be a power of 2, got {self.downsampling!r}.")
        levels = self.downsampling.bit_length()
        if self.block_out_channels is not None and len(self.block_out_channels) != levels:
            raise ValueError(
                f"block_out_channels must have {levels} levels for downsampling {self.downsampling}, got "
                f"{len(self.block_out_channels)}."
            )
        if any(channels % 4 for channels in self.level_channels):
            raise ValueError(
                f"block_out_channels must be multiples of 4, got {' '.join(map(str, self.level_channels))}."
            )

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        levels = self.downsampling.bit_length()
        return self.block_out_channels or tuple((32, 64, 64, 128)[min(level, 3)] for level in range(levels))


@dataclass(frozen=True, kw_only=True)
class AutoencoderTrainingConfig(
    OutputOptions, AveragingOptions, OptimisationOptions, AutoencoderOptions, LoadingOptions, ImageOptions
):
    """Everything that the training of an autoencoder is told; each field is a command-line option of the same name.

    Raises:
        ValueError: A value out of range, an unknown name, or options that contradict each other.
    """

    output_dir: str = option("outputs/autoencoder", "Where checkpoints, samples, logs and the autoencoder go.")
    num_epochs: int = option(3, "Passes through the data, where max_train_steps is not given.", least=1)
    learning_rate: float = option(1e-3, "Learning rate after warm-up.", above=0.0)
    ema_max_decay: float | None = option(0.999, "Largest decay of the averaged weights.", least=0.0, most=1.0)
    sample_every: int = option(
        1000, "Save some images beside their reconstructions every so many steps, and at the end; 0: never.", least=0
    )
    test_images: int = option(512, "Images whose reconstruction is measured at the end.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming:
            raise ValueError("streaming must be False for an autoencoder, got True.")
        for name in ("torch_compile", "channels_last"):
            if getattr(self, name):
                raise ValueError(f"{name} must be False for an autoencoder, got True.")

    def public(self) -> dict[str, Any]:
        """All options as a dictionary, for files and logs."""
        return asdict(self)
