"""Classifiers of noisy images, p_t(y | x_t), for classifier guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from torch import Tensor, nn

from ..basics.checks import check_integer, check_number, check_ordered, check_shape
from ..sdes import SDE, as_time, expand_like
from ..shipping.component import ShipsItsCode

LOG_SNR_RANGE = (-14.0, 20.0)  # beyond it an image is pure noise, or clean
POOLED_SIDE = 4
LARGEST_SIZE, LARGEST_DEPTH = 16_384, 1024  # of a config: a few hundred bytes must not cost gigabytes
EMBEDDED_PER_NAT = 25.0  # spreads the log-SNR over the frequencies of a positional embedding


class NoiseConditionalClassifier(ShipsItsCode, ModelMixin, ConfigMixin):
    r"""The encoder half of a ``UNet2DModel``, pooled to 4 x 4 cells: logits of the classes of x_t at its noise level.

    What a noisy image says about its class depends on the SDE through sigma/alpha alone. So the network sees
    x_t / sqrt(alpha^2 + sigma^2) and log(alpha^2 / sigma^2), and **one classifier serves every SDE, every time
    conditioning and every prediction type** whose noise levels it was trained on.

    Args:
        sample_size: Side of the images in pixels.
        in_channels: Their channels.
        num_classes: K.
        down_block_types: Blocks of the encoder, as in ``UNet2DModel``.
        block_out_channels: Channels of each.
        layers_per_block: Residual blocks in each.
        attention_head_dim: Channels of an attention head.
        norm_num_groups: Groups of the normalisations.
        dropout: In the residual blocks.
        data_min: Value of black in the images it was trained on.
        data_max: Value of white.
        lowest_log_snr: Of the noise levels that it was trained on, in nats.
        highest_log_snr: Likewise; cleaner images are classified as if they had this one.
        id2label: Name of each class, by its number.

    Reference:
        Song et al. 2021, section 5 and appendix I; for the network Dhariwal & Nichol 2021, arXiv:2105.05233.
    """

    _source_entries = ("networks.classifier",)

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int = 3,
        num_classes: int = 10,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D"),
        block_out_channels: tuple[int, ...] = (32, 64),
        layers_per_block: int = 2,
        attention_head_dim: int = 32,
        norm_num_groups: int = 8,
        dropout: float = 0.0,
        data_min: float = -1.0,
        data_max: float = 1.0,
        lowest_log_snr: float = LOG_SNR_RANGE[0],
        highest_log_snr: float = LOG_SNR_RANGE[1],
        id2label: Mapping | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("sample_size", sample_size), ("in_channels", in_channels), ("num_classes", num_classes)):
            check_integer(name, value, at_least=1, at_most=LARGEST_SIZE)
        for name, value in (("layers_per_block", layers_per_block), ("attention_head_dim", attention_head_dim)):
            check_integer(name, value, at_least=1, at_most=LARGEST_DEPTH)
        check_integer("norm_num_groups", norm_num_groups, at_least=1, at_most=LARGEST_SIZE)
        for channels in check_shape("block_out_channels", block_out_channels):
            check_integer("block_out_channels", channels, at_least=1, at_most=LARGEST_SIZE)
        check_number("dropout", dropout, at_least=0.0, below=1.0)
        check_ordered("data_min", data_min, "data_max", data_max)
        check_ordered("lowest_log_snr", lowest_log_snr, "highest_log_snr", highest_log_snr)
        if id2label is not None and not isinstance(id2label, Mapping):
            raise ValueError(f"id2label must map numbers of classes to their names, got {id2label!r}.")
        if len(down_block_types) != len(block_out_channels):
            raise ValueError(
                f"down_block_types must name one block for each of block_out_channels, got {len(down_block_types)} "
                f"and {len(block_out_channels)}."
            )
        first, last = block_out_channels[0], block_out_channels[-1]
        common = {"temb_channels": 4 * first, "resnet_eps": 1e-5, "attention_head_dim": attention_head_dim}
        self.time_proj = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, 4 * first)
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            get_down_block(
                kind,
                num_layers=layers_per_block,
                in_channels=block_out_channels[max(i - 1, 0)],
                out_channels=channels,
                add_downsample=i < len(block_out_channels) - 1,
                resnet_act_fn="silu",
                resnet_groups=norm_num_groups,
                downsample_padding=1,
                dropout=dropout,
                **common,
            )
            for i, (kind, channels) in enumerate(zip(down_block_types, block_out_channels, strict=True))
        )
        self.mid_block = UNetMidBlock2D(in_channels=last, resnet_groups=norm_num_groups, dropout=dropout, **common)
        self.norm_out = nn.GroupNorm(norm_num_groups, last)
        # A coarse grid, not one mean: where a feature lies tells much about small images.
        self.pool = nn.AdaptiveAvgPool2d(POOLED_SIDE)
        self.head = nn.Linear(last * POOLED_SIDE**2, num_classes)

    def forward(self, sample: Tensor, log_snr: Tensor) -> Tensor:
        """Logits, shape (B, num_classes).

        Args:
            sample: x_t / sqrt(alpha^2 + sigma^2), shape (B, C, H, W).
            log_snr: log(alpha^2 / sigma^2), shape (B,); clamped to the levels of training.
        """
        log_snr = log_snr.clamp(self.config.lowest_log_snr, self.config.highest_log_snr)
        embedding = self.time_embedding(self.time_proj(EMBEDDED_PER_NAT * log_snr.float()).to(sample.dtype))
        hidden = self.conv_in(sample)
        for block in self.down_blocks:
            hidden, _ = block(hidden_states=hidden, temb=embedding)
        hidden = nn.functional.silu(self.norm_out(self.mid_block(hidden, embedding)))
        return self.head(self.pool(hidden).flatten(1))

    def log_prob(self, sde: SDE, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """(x_t, t) -> log p_t(labels | x_t) in nats, shape (B,), differentiable: for ``classifier_guidance``.

        Args:
            sde: The SDE that t and x_t belong to.
            labels: Classes, int64, shape (B,).
        """

        def log_prob(x: Tensor, t: Tensor) -> Tensor:
            logits = classifier_logits(self, sde, x, t).to(x.dtype)
            return torch.log_softmax(logits, 1).gather(1, labels[:, None].to(x.device))[:, 0]

        return log_prob

    def check_fits(self, sde: SDE, sample_shape: tuple[int, ...], data_min: float, data_max: float) -> None:
        """Make sure that this classifier knows what a sampler will show it.

        Args:
            sde: Of the sampler.
            sample_shape: Of its images, (C, H, W).
            data_min: Their value of black.
            data_max: Their value of white.

        Raises:
            ValueError: Images of another shape or range, or noise beyond what it was trained on.
        """
        config = self.config
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if tuple(sample_shape) != expected:
            raise ValueError(f"classifier was trained on images of shape {expected}, the unet's have {sample_shape}.")
        if (data_min, data_max) != (config.data_min, config.data_max):
            raise ValueError(
                f"classifier was trained on images in [{config.data_min:g}, {config.data_max:g}], the unet's lie in "
                f"[{data_min:g}, {data_max:g}]."
            )
        least = max(float(sde.log_snr(sde.t_max)), LOG_SNR_RANGE[0])
        if least < config.lowest_log_snr - 0.5:
            ratios = [float(torch.tensor(-0.5 * v).exp()) for v in (config.lowest_log_snr, least)]
            raise ValueError(
                f"classifier was trained on noise up to sigma/alpha = {ratios[0]:.3g}, but the scheduler's SDE begins "
                f"at {ratios[1]:.3g}, where its gradient would be far too large: train it with the scheduler's SDE."
            )


def classifier_logits(network: Callable[[Tensor, Tensor], Tensor], sde: SDE, x: Tensor, t: Tensor) -> Tensor:
    """Logits of a ``NoiseConditionalClassifier``, bare or wrapped for training, for x_t at SDE time t.

    Args:
        network: The classifier.
        sde: The SDE that t and x_t belong to.
        x: x_t, shape (B, C, H, W).
        t: SDE time, shape () or (B,).
    """
    t = as_time(t)
    scale = torch.rsqrt(sde.alpha(t).square() + sde.sigma(t).square())
    dtype = getattr(network, "dtype", x.dtype)
    log_snr = sde.log_snr(t).to(device=x.device, dtype=torch.float32).expand(len(x))
    return network((x * expand_like(scale, x).to(x)).to(dtype), log_snr)


def trained_log_snr(sde: SDE) -> tuple[float, float]:
    """Lowest and highest log-SNR of training times in [t_min, t_max], as far as they differ to a classifier."""
    low, high = (float(sde.log_snr(t)) for t in (sde.t_max, sde.t_min))
    return max(low, LOG_SNR_RANGE[0]), min(high, LOG_SNR_RANGE[1])
