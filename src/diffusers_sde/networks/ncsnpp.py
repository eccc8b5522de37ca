"""NCSN++ and DDPM++, the networks of the paper, as models of diffusers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from ..basics.checks import check_choice, check_flag, check_integer, check_number, check_ordered, check_shape
from ..shipping.component import ShipsItsCode
from .ncsnpp_blocks import (
    AttentionBlock,
    CombinedImage,
    FourierFeatures,
    NormalizedConv,
    ResidualBlock,
    positional_embedding,
    rescaled_sum,
)
from .resampling import Doubled, DoubledConv, Halved, HalvedConv, conv3x3, fir_filter, set_initial

RESBLOCK_TYPES = ("biggan", "ddpm")
EMBEDDING_TYPES = ("fourier", "positional")
PROGRESSIVE_INPUTS = ("none", "input_skip", "residual")
PROGRESSIVE_OUTPUTS = ("none", "output_skip", "residual")
PROGRESSIVE_COMBINES = ("sum", "cat")
MOST_CHANNELS, MOST_LEVELS, MOST_LAYERS = 16_384, 16, 1024  # a config of a few bytes must not cost gigabytes


class NCSNpp(ShipsItsCode, ModelMixin, ConfigMixin):
    """The paper's U-Net: NCSN++, DDPM++ and all between them, called like a ``UNet2DModel``.

    What the network is fed as its timestep has a name in ``TimeConditioning``, and a scheduler with that
    ``time_conditioning`` feeds it:

    * ``fourier``: the noise level sigma itself, of which the network takes the logarithm (``sigma``);
    * ``positional``: a number up to about a thousand; the paper's VP and sub-VP networks are fed 999 t
      (``score_sde``), which is not rounded;
    * ``positional`` with ``sigma_levels``: sigma (``sigma``), from which the network finds the index of the noise level
      that the paper's VE networks for discrete times are told, 0 for the largest. Between two levels the index is a
      fraction, so that the network is smooth in time; the official code rounds it.

    With ``scale_by_sigma`` the output is divided by sigma. The paper's VE networks do so, and return the score
    (``prediction_type="score"``); those for VP and sub-VP return the noise (``"epsilon"``).

    Args:
        sample_size: Side of the images in pixels, a multiple of 2^(levels - 1).
        in_channels: Channels of the images, going in and coming out.
        block_out_channels: Channels of each resolution, the highest resolution first; each has half the side of the one
            before. The embedding has four times the channels of the first.
        layers_per_block: Residual blocks per resolution on the way down; there is one more on the way up.
        attention_resolutions: Sides at which there is attention, beside the lowest resolution, which always has it.
        dropout: Probability of dropout in the residual blocks.
        resblock_type: ``biggan``, whose blocks resample, or ``ddpm``, with convolutions that resample.
        time_embedding_type: ``fourier`` or ``positional``; see above.
        fourier_scale: Standard deviation of the frequencies of ``fourier``.
        sigma_levels: (sigma_min, sigma_max, N) of the geometric noise levels of a network for discrete times; None for
            any other.
        conditional: Whether the network is told the noise level at all.
        scale_by_sigma: Whether the output is divided by sigma.
        center_input_sample: Whether the images lie in [0, 1], and are mapped to [-1, 1] by the network.
        fir_kernel: Taps of the filter that resamples, of any sum; None for means of 2 x 2 pixels on the way down, and
            for repeated pixels on the way up.
        skip_rescale: Whether sums of two branches are divided by sqrt(2).
        progressive_input: ``input_skip`` shows each resolution the image, shrunk; ``residual`` carries it down along a
            branch of learned convolutions; or ``none``.
        progressive_output: ``output_skip`` adds up the images that all resolutions draw; ``residual`` carries features
            up along a branch of learned convolutions; or ``none``.
        progressive_combine: How ``input_skip`` joins image and features: ``sum`` or ``cat``.
        norm_num_groups: Groups of every normalisation; None for groups of 4 channels, but 32 groups at most.
        num_class_embeds: Number of classes that the network may be told; None for an unconditional network.

    Raises:
        ValueError: An option out of range, or options that exclude each other.

    Reference:
        Song et al. 2021, section 4.3 and appendix H.
    """

    _source_entries = ("networks.ncsnpp",)
    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["fourier"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 256, 256, 256),
        layers_per_block: int = 4,
        attention_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.1,
        resblock_type: str = "biggan",
        time_embedding_type: str = "fourier",
        fourier_scale: float = 16.0,
        sigma_levels: tuple[float, float, int] | None = None,
        conditional: bool = True,
        scale_by_sigma: bool = True,
        center_input_sample: bool = True,
        fir_kernel: tuple[float, ...] | None = (1, 3, 3, 1),
        skip_rescale: bool = True,
        progressive_input: str = "residual",
        progressive_output: str = "none",
        progressive_combine: str = "sum",
        norm_num_groups: int | None = None,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        sample_size = check_integer("sample_size", sample_size, at_least=1, at_most=MOST_CHANNELS)
        in_channels = check_integer("in_channels", in_channels, at_least=1, at_most=MOST_CHANNELS)
        channels = check_shape("block_out_channels", block_out_channels)
        for width in channels:
            check_integer("block_out_channels", width, at_least=4, at_most=MOST_CHANNELS)
        check_integer("number of block_out_channels", len(channels), at_least=1, at_most=MOST_LEVELS)
        layers = check_integer("layers_per_block", layers_per_block, at_least=1, at_most=MOST_LAYERS)
        sides = [sample_size // 2**level for level in range(len(channels))]
        if sample_size % 2 ** (len(channels) - 1):
            raise ValueError(
                f"sample_size must be a multiple of {2 ** (len(channels) - 1)}, because {len(channels)} "
                f"block_out_channels halve the image {len(channels) - 1} times, got {sample_size!r}."
            )
        attended = check_shape("attention_resolutions", attention_resolutions) if len(attention_resolutions) else ()
        dropout = check_number("dropout", dropout, at_least=0.0, below=1.0)
        check_choice("resblock_type", resblock_type, RESBLOCK_TYPES)
        check_choice("time_embedding_type", time_embedding_type, EMBEDDING_TYPES)
        check_choice("progressive_input", progressive_input, PROGRESSIVE_INPUTS)
        check_choice("progressive_output", progressive_output, PROGRESSIVE_OUTPUTS)
        check_choice("progressive_combine", progressive_combine, PROGRESSIVE_COMBINES)
        fourier_scale = check_number("fourier_scale", fourier_scale, above=0.0)
        for name, flag in (("conditional", conditional), ("center_input_sample", center_input_sample)):
            check_flag(name, flag)
        for name, flag in (("scale_by_sigma", scale_by_sigma), ("skip_rescale", skip_rescale)):
            check_flag(name, flag)
        self._check_levels(time_embedding_type, sigma_levels, scale_by_sigma)
        if fir_kernel is not None:
            fir_filter(fir_kernel)
        groups = norm_num_groups
        if groups is not None:
            groups = check_integer("norm_num_groups", groups, at_least=1, at_most=MOST_CHANNELS)
        if num_class_embeds is not None:
            check_integer("num_class_embeds", num_class_embeds, at_least=1, at_most=MOST_CHANNELS)

        base = channels[0]
        embedded = 4 * base if conditional or num_class_embeds is not None else None
        biggan = resblock_type == "biggan"

        def residual(c_in: int, c_out: int, resample: Halved | Doubled | None = None) -> ResidualBlock:
            return ResidualBlock(c_in, c_out, embedded, resample, groups, dropout, skip_rescale, biggan)

        fourier = time_embedding_type == "fourier"
        features = 2 * base if fourier else base
        self.embedding_in = set_initial(nn.Linear(features, 4 * base)) if conditional else None
        self.embedding_out = set_initial(nn.Linear(4 * base, 4 * base)) if conditional else None
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, 4 * base)
        self.conv_in = conv3x3(in_channels, base)

        self.shrink = Halved(fir_kernel) if progressive_input == "input_skip" else None
        self.down_levels: Any = nn.ModuleList()  # of DownLevel, which the type of a ModuleList cannot say
        now, image, skips = base, in_channels, [base]
        for level, (width, side) in enumerate(zip(channels, sides, strict=True)):
            down = DownLevel()
            for _ in range(layers):
                down.blocks.append(residual(now, width))
                if side in attended:
                    down.attentions.append(AttentionBlock(width, groups, skip_rescale))
                now = width
                skips.append(now)
            if level < len(channels) - 1:
                down.resample = residual(now, now, Halved(fir_kernel)) if biggan else HalvedConv(now, now, fir_kernel)
                if progressive_input == "input_skip":
                    concatenate = progressive_combine == "cat"
                    down.image = CombinedImage(image, now, concatenate)
                    now = 2 * now if concatenate else now
                elif progressive_input == "residual":
                    down.image = HalvedConv(image, now, fir_kernel)
                    image = now
                skips.append(now)
            self.down_levels.append(down)

        self.mid_block_in = residual(now, now)
        self.mid_attention = AttentionBlock(now, groups, skip_rescale)
        self.mid_block_out = residual(now, now)

        self.enlarge = Doubled(fir_kernel) if progressive_output == "output_skip" else None
        self.up_levels: Any = nn.ModuleList()  # of UpLevel
        drawn = 0
        for level in reversed(range(len(channels))):
            up, width = UpLevel(), channels[level]
            for _ in range(layers + 1):
                up.blocks.append(residual(now + skips.pop(), width))
                now = width
            if sides[level] in attended:
                up.attention = AttentionBlock(now, groups, skip_rescale)
            if progressive_output == "output_skip":
                up.output = NormalizedConv(now, in_channels, groups)
            elif progressive_output == "residual":
                lowest = level == len(channels) - 1
                up.output = NormalizedConv(now, now, groups, 1.0) if lowest else DoubledConv(drawn, now, fir_kernel)
                drawn = now
            if level:
                up.resample = residual(now, now, Doubled(fir_kernel)) if biggan else DoubledConv(now, now, fir_kernel)
            self.up_levels.append(up)
        self.conv_out = None if progressive_output == "output_skip" else NormalizedConv(now, in_channels, groups)
        # It is the last, because the first parameter tells the precision of a network, and this one keeps its own.
        self.fourier = FourierFeatures(base, fourier_scale) if fourier else None

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> NCSNpp:
        """A new network, with random weights, of a configuration of the paper.

        Args:
            name: One of ``PRESETS``, such as ``ve/cifar10_ncsnpp_continuous``.
            **options: Arguments of the class that differ from the preset's.

        Raises:
            ValueError: Unknown name.
        """
        return cls(**{**PRESETS[check_choice("preset", name, PRESETS)], **options})

    @staticmethod
    def _check_levels(embedding: str, levels: Any, scale_by_sigma: bool) -> None:
        if levels is None:
            if scale_by_sigma and embedding == "positional":
                raise ValueError(
                    "scale_by_sigma must be False with time_embedding_type 'positional' and no sigma_levels: the "
                    "network is not told sigma then."
                )
            return
        if embedding == "fourier":
            raise ValueError(f"sigma_levels must be None with time_embedding_type 'fourier', got {levels!r}.")
        if not isinstance(levels, Sequence) or isinstance(levels, str) or len(levels) != 3:
            raise ValueError(f"sigma_levels must be (sigma_min, sigma_max, N), got {levels!r}.")
        check_ordered("sigma_min of sigma_levels", levels[0], "sigma_max of sigma_levels", levels[1], above=0.0)
        check_integer("N of sigma_levels", levels[2], at_least=2)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """The network's output for noisy images.

        Args:
            sample: x_t, shape (B, C, H, W).
            timestep: What the network is fed for the time, shape () or (B,); see the class.
            class_labels: Classes, int64, shape (B,); for a network with ``num_class_embeds`` alone.
            return_dict: Whether to return a ``UNet2DOutput`` instead of a tuple.

        Raises:
            ValueError: ``class_labels`` are missing, or the network has no classes.
        """
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(
                "class_labels must be given for a network with num_class_embeds, and only for one; num_class_embeds is "
                f"{self.config.num_class_embeds}, class_labels {'None' if class_labels is None else 'are given'}."
            )
        given = torch.as_tensor(timestep, device=sample.device).float().reshape(-1).expand(len(sample))
        embedding = self._embedding(given, class_labels, sample.dtype)
        x = 2.0 * sample - 1.0 if self.config.center_input_sample else sample

        h, image = self.conv_in(x), x
        skips = [h]
        for down in self.down_levels:
            for number, block in enumerate(down.blocks):
                h = self._run(block, h, embedding)
                if len(down.attentions):
                    h = self._run(down.attentions[number], h)
                skips.append(h)
            if down.resample is not None:
                h = self._resampled(down.resample, h, embedding)
                if self.shrink is not None:
                    image = self.shrink(image)
                    h = down.image(image, h)
                elif down.image is not None:
                    h = image = rescaled_sum(down.image(image), h, self.config.skip_rescale)
                skips.append(h)

        h = self._run(self.mid_block_in, h, embedding)
        h = self._run(self.mid_attention, h)
        h = self._run(self.mid_block_out, h, embedding)

        drawn: Any = None  # nothing is drawn yet at the lowest resolution
        for up in self.up_levels:
            for block in up.blocks:
                h = self._run(block, torch.cat([h, skips.pop()], 1), embedding)
            if up.attention is not None:
                h = self._run(up.attention, h)
            if self.enlarge is not None:
                drawn = up.output(h) if drawn is None else self.enlarge(drawn) + up.output(h)
            elif isinstance(up.output, NormalizedConv):
                drawn = up.output(h)
            elif up.output is not None:
                h = drawn = rescaled_sum(up.output(drawn), h, self.config.skip_rescale)
            if up.resample is not None:
                h = self._resampled(up.resample, h, embedding)
        output = drawn if self.conv_out is None else self.conv_out(h)
        if self.config.scale_by_sigma:
            output = output / given.to(output.dtype)[:, None, None, None]
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _embedding(self, given: Tensor, class_labels: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The embedding of noise level and class, shape (B, E); None for a network that is told neither."""
        embedding = None
        if self.embedding_in is not None and self.embedding_out is not None:
            if self.fourier is not None:
                features = self.fourier(given.log())
            else:
                features = positional_embedding(self._position(given), self.config.block_out_channels[0])
            embedding = self.embedding_out(nn.functional.silu(self.embedding_in(features.to(dtype))))
        if self.class_embedding is not None:
            of_class = self.class_embedding(class_labels)
            embedding = of_class if embedding is None else embedding + of_class
        return embedding

    def _position(self, given: Tensor) -> Tensor:
        """The timestep, or the index of the noise level: 0 for sigma_max and N - 1 for sigma_min, geometric between."""
        if self.config.sigma_levels is None:
            return given
        low, high, count = self.config.sigma_levels
        return ((count - 1) / math.log(high / low) * (math.log(high) - given.log())).clamp(0.0, count - 1.0)

    def _run(self, module: nn.Module, *inputs: Tensor | None) -> Tensor:
        """The module's output, whose inner activations are not kept where gradient checkpointing is enabled."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *inputs)
        return module(*inputs)

    def _resampled(self, module: nn.Module, h: Tensor, embedding: Tensor | None) -> Tensor:
        return self._run(module, h, embedding) if isinstance(module, ResidualBlock) else module(h)


class DownLevel(nn.Module):
    """One resolution on the way down: residual blocks, attention behind each or none, and what leads further down."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.attentions = nn.ModuleList(), nn.ModuleList()
        self.resample: ResidualBlock | HalvedConv | None = None
        self.image: CombinedImage | HalvedConv | None = None


class UpLevel(nn.Module):
    """One resolution on the way up: residual blocks, attention behind the last or none, and what leads further up."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.attention: AttentionBlock | None = None
        self.output: NormalizedConv | DoubledConv | None = None
        self.resample: ResidualBlock | DoubledConv | None = None


_CIFAR10: Mapping[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 4,
    "attention_resolutions": (16,),
    "dropout": 0.1,
    "resblock_type": "biggan",
    "fir_kernel": (1, 3, 3, 1),
    "skip_rescale": True,
    "progressive_input": "residual",
    "progressive_output": "none",
    "norm_num_groups": None,
}
_VE: Mapping[str, Any] = {
    **_CIFAR10,
    "time_embedding_type": "fourier",
    "sigma_levels": None,
    "scale_by_sigma": True,
    "center_input_sample": True,
}
_VE_DISCRETE: Mapping[str, Any] = {**_VE, "time_embedding_type": "positional", "sigma_levels": (0.01, 50.0, 1000)}
_VE_SKIPS: Mapping[str, Any] = {
    **_VE,
    "dropout": 0.0,
    "progressive_input": "input_skip",
    "progressive_output": "output_skip",
}
_VE_256: Mapping[str, Any] = {
    **_VE_SKIPS,
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 256, 256, 256),
    "layers_per_block": 2,
}
_VE_1024: Mapping[str, Any] = {
    **_VE_SKIPS,
    "sample_size": 1024,
    "block_out_channels": (16, 32, 64, 128, 256, 512, 512, 512),
    "layers_per_block": 1,
}
_VP: Mapping[str, Any] = {
    **_CIFAR10,
    "time_embedding_type": "positional",
    "sigma_levels": None,
    "scale_by_sigma": False,
    "center_input_sample": False,
}
_PLAIN: Mapping[str, Any] = {"fir_kernel": None, "progressive_input": "none"}
_DDPM: Mapping[str, Any] = {
    **_PLAIN,
    "resblock_type": "ddpm",
    "skip_rescale": False,
    "norm_num_groups": 32,
    "layers_per_block": 2,
}
_DEEP: Mapping[str, Any] = {"layers_per_block": 8}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "ve/cifar10_ncsnpp_continuous": _VE,
    "ve/cifar10_ncsnpp_deep_continuous": {**_VE, **_DEEP},
    "ve/cifar10_ncsnpp": _VE_DISCRETE,
    "ve/cifar10_ddpm": {**_VE_DISCRETE, **_DDPM},
    "ve/celeba_ncsnpp": {**_VE_DISCRETE, "sample_size": 64, "sigma_levels": (0.01, 90.0, 1000)},
    "ve/bedroom_ncsnpp_continuous": _VE_256,
    "ve/church_ncsnpp_continuous": _VE_256,
    "ve/celebahq_256_ncsnpp_continuous": _VE_256,
    "ve/ffhq_256_ncsnpp_continuous": _VE_256,
    "ve/celebahq_ncsnpp_continuous": _VE_1024,
    "ve/ffhq_ncsnpp_continuous": _VE_1024,
    "vp/cifar10_ncsnpp": _VP,
    "vp/cifar10_ncsnpp_continuous": _VP,
    "vp/cifar10_ncsnpp_deep_continuous": {**_VP, **_DEEP},
    "vp/cifar10_ddpmpp": {**_VP, **_PLAIN},
    "vp/cifar10_ddpmpp_continuous": {**_VP, **_PLAIN},
    "vp/cifar10_ddpmpp_deep_continuous": {**_VP, **_PLAIN, **_DEEP},
    "subvp/cifar10_ncsnpp_continuous": _VP,
    "subvp/cifar10_ncsnpp_deep_continuous": {**_VP, **_DEEP},
    "subvp/cifar10_ddpmpp_continuous": {**_VP, **_PLAIN},
    "subvp/cifar10_ddpmpp_deep_continuous": {**_VP, **_PLAIN, **_DEEP},
}
"""Arguments of ``NCSNpp`` by the names of the official configurations, folder and file."""
