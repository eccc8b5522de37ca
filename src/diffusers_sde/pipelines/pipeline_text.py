"""Generation by caption, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin
from torch import Tensor

from ..basics.checks import check_integer
from ..basics.networks import traits_of
from ..guidance.classes import check_interval, classifier_free_guidance, guide_within
from ..guidance.common import check_scale
from .captions import CaptionEncoder, EmbeddedCaptions, caption_width_of, checked_captions
from .pipeline_sde import SDEPipeline
from .probability_flow import ProbabilityFlow
from .runs import (
    Callback,
    RunOptions,
    at_temperature,
    execute_guided,
    finished,
    latents_shape,
    names_near_arguments,
    own_scheduler,
    starting_noise,
    unet_denoiser,
)


class TextSDEPipeline(SDEPipeline):
    """Draw images of captions, from a network that is told their embeddings.

    A network trained with caption dropout also knows the empty caption, which stands for "any". With it,
    classifier-free guidance (Ho & Salimans 2022) sharpens what the caption says; both halves are one batched call.
    Methods that take no prompt, such as ``encode`` and ``log_prob``, are those of the empty caption.

    Args:
        unet: A ``UNet2DConditionModel`` or a ``PixArtTransformer2DModel``, called with ``encoder_hidden_states``,
            shape (B, L, D), and with ``encoder_attention_mask``, boolean (B, L), which hides the padding.
        scheduler: One of this package's schedulers.
        text_encoder: A text encoder of transformers, such as ``CLIPTextModel``, ``T5EncoderModel`` or ``BertModel``, of
            width D.
        tokenizer: Its tokenizer.
        data_min: As in ``SDEPipeline``.
        data_max: As in ``SDEPipeline``.
        max_caption_length: L, the number of tokens to which captions are cut and padded.
        null_caption: The caption that stands for "any"; None for a network without one, which is guided by a negative
            prompt only.
        sample_shape: As in ``SDEPipeline``.
        vae: As in ``SDEPipeline``.
        latents_mean: As in ``SDEPipeline``.
        latents_std: As in ``SDEPipeline``.
        shows_padding: Whether the padding of a caption is encoded and attended to like the caption itself. Networks of
            Stable Diffusion have been trained so.

    Raises:
        ValueError: An argument of the wrong kind, or arguments that do not fit together.

    Example:
        ```py
        from diffusers_sde import TextSDEPipeline

        pipe = TextSDEPipeline.from_pretrained("outputs/captions")
        images = pipe("a three", guidance_scale=3.0, num_inference_steps=25).images
        images = pipe(["a three", "a seven"], negative_prompt="a one", guidance_scale=3.0).images
        ```
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _has_null_class = False

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: SchedulerMixin,
        text_encoder: torch.nn.Module,
        tokenizer: object,  # of transformers, which the other pipelines can do without
        data_min: float = -1.0,
        data_max: float = 1.0,
        max_caption_length: int = 77,
        null_caption: str | None = "",
        sample_shape: Sequence[int] | None = None,
        vae: ModelMixin | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        shows_padding: bool = False,
    ) -> None:
        super().__init__(unet, scheduler, data_min, data_max, None, sample_shape, vae, latents_mean, latents_std)
        traits, width = traits_of(self.unet), caption_width_of(text_encoder)
        takes = traits.caption_width
        if takes != width:
            takes_what = "no captions" if takes is None else f"embeddings of width {takes}"
            raise ValueError(f"unet takes {takes_what}, but text_encoder returns embeddings of width {width}.")
        if traits.also_needs is not None:
            raise ValueError(
                f"unet must be called with images, timesteps and captions alone, but this {type(self.unet).__name__} "
                f"also needs {traits.also_needs}."
            )
        if not callable(tokenizer):
            raise ValueError(f"tokenizer must be a tokenizer of transformers, got {tokenizer!r}.")
        if not (null_caption is None or isinstance(null_caption, str)):
            raise ValueError(f"null_caption must be a string or None, got {null_caption!r}.")
        if not isinstance(shows_padding, bool):
            raise ValueError(f"shows_padding must be True or False, got {shows_padding!r}.")
        length = check_integer("max_caption_length", max_caption_length, at_least=1)
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(max_caption_length=length, null_caption=null_caption)
        if shows_padding:  # most do not, and earlier versions do not know it
            self.register_to_config(shows_padding=True)

    @property
    def captions(self) -> CaptionEncoder:
        """What embeds captions."""
        shows_padding = bool(self.config.get("shows_padding", False))
        return CaptionEncoder(self.tokenizer, self.text_encoder, self.config.max_caption_length, shows_padding)

    def embed(self, captions: str | Sequence[str]) -> EmbeddedCaptions:
        """Return the embeddings of captions on the pipeline's device, one row for each.

        Raises:
            ValueError: Something else than strings.
        """
        return self.captions(checked_captions("captions", captions)).to(self._execution_device)

    def unconditional(self, batch_size: int) -> dict[str, Tensor]:
        """Return the arguments that make the network unconditional: embeddings of the null caption.

        Raises:
            ValueError: A network without a null caption.
        """
        if self.config.null_caption is None:
            raise ValueError(
                "unet knows no caption that stands for any (null_caption is None): pass a prompt, or train with "
                "caption dropout."
            )
        known = getattr(self, "_null", None)  # the network is called many times, the text encoder once
        if known is None or known[0] is not self.text_encoder:
            self._null = known = (self.text_encoder, self.embed(self.config.null_caption))
        device = self._execution_device
        null = known[1].to(device)
        return null.arguments(torch.zeros(batch_size, dtype=torch.int64, device=device), self.unet.dtype)

    @names_near_arguments
    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        num_inference_steps: int = 100,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        latents: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        return_dict: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        method: str = "scheduler",
        rtol: float | None = None,
        atol: float | None = None,
        batch_size: int | None = None,
        temperature: float | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one image for each prompt.

        Args:
            prompt: What the images show. None is the null caption, which draws any images.
            guidance_scale: Strength of classifier-free guidance. 1 is the caption as the network knows it, larger
                values sharpen it at the expense of variety, 0 ignores it. Other values than 0 and 1 double the batch.
            guidance_interval: Noise-to-signal ratios sigma/alpha between which to guide. Outside, ``guidance_scale``
                is 1. None guides everywhere.
            num_inference_steps: Noise levels; each costs ``scheduler.order`` network calls.
            generator: One generator, or a list with one for each image.
            output_type: As in ``SDEPipeline``.
            latents: Unit noise to start from, shape (B, C, H, W).
            callback_on_step_end: As in ``SDEPipeline``.
            return_dict: Whether to return an ``ImagePipelineOutput`` instead of a tuple.
            negative_prompt: What guidance leads away from, instead of the null caption: one, or one for each image.
            method: As in ``SDEPipeline``.
            rtol: As in ``SDEPipeline``.
            atol: As in ``SDEPipeline``.
            batch_size: How many images. It may be left out where prompts or ``latents`` say it, and else is 1. One
                prompt is repeated for all images.
            temperature: As in ``SDEPipeline``.

        Returns:
            The images.

        Raises:
            ValueError: An argument is out of range or does not fit the others; nothing has been computed then.
            TypeError: An argument that this pipeline does not have; the message names the nearest one.
        """
        run = RunOptions(
            num_inference_steps=num_inference_steps,
            generator=generator,
            output_type=output_type,
            latents=latents,
            callback_on_step_end=callback_on_step_end,
            return_dict=return_dict,
            method=method,
            rtol=rtol,
            atol=atol,
        )
        own_scheduler(self)
        if prompt is None and self.config.null_caption is None:
            self.unconditional(1)  # says that there is none
        prompts = checked_captions("prompt", self.config.null_caption if prompt is None else prompt)
        negatives = None if negative_prompt is None else checked_captions("negative_prompt", negative_prompt)
        if latents is not None:
            shape = latents_shape(self, latents)
        elif batch_size is not None:
            shape = (check_integer("batch_size", batch_size, at_least=1), *self.sample_shape)
        else:
            shape = (max(len(prompts), len(negatives or ())), *self.sample_shape)
        if batch_size not in (None, shape[0]):
            raise ValueError(f"batch_size must be that of latents, {shape[0]}, or None, got {batch_size!r}.")
        for name, given in (("prompt", prompts), ("negative_prompt", negatives or [""])):
            if len(given) not in (1, shape[0]):
                raise ValueError(f"{name} must be one, or one for each of {shape[0]} images, got {len(given)}.")
        with at_temperature(self, temperature):
            denoiser = self.denoiser(prompts, guidance_scale, negatives, guidance_interval)
            noise = starting_noise(self, run, shape)
            rows = torch.arange(shape[0], device=noise.device)
            x = execute_guided(self, run, noise, lambda index: partial(denoiser, image=rows[index]))
        return finished(self, run, x)

    def denoiser(
        self,
        prompt: str | Sequence[str],
        guidance_scale: float = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> Callable[..., Tensor]:
        """The guided estimate, (x_t, t, image) -> x0_hat, where ``image``, int64 (B,), counts images by their prompts.

        It goes wherever a denoiser goes: ``sample``, ``log_prob``, ``ode``. Arguments are those of the call; one prompt
        is that of every image.

        Raises:
            ValueError: A scale that the network cannot serve, or a negative prompt that has no effect.
        """
        check_scale("guidance_scale", guidance_scale)
        check_interval(guidance_interval)
        prompts = checked_captions("prompt", prompt)
        if negative_prompt is not None and guidance_scale == 1.0:
            raise ValueError("negative_prompt must be None for guidance_scale 1, which does not guide.")
        if negative_prompt is None and guidance_scale != 1.0 and self.config.null_caption is None:
            raise ValueError(
                f"guidance_scale must be 1 for a network without a null caption, got {guidance_scale!r}: train with "
                "caption dropout, or pass a negative_prompt."
            )
        null = self.config.null_caption if negative_prompt is None else negative_prompt
        negatives = checked_captions("negative_prompt", prompts if null is None else null)
        known = tuple(dict.fromkeys([*prompts, *negatives]))
        device = self._execution_device
        numbers = [torch.tensor([known.index(each) for each in those], device=device) for those in (prompts, negatives)]
        last = getattr(self, "_last", None)  # whoever learns from samples asks for the same captions again and again
        if last is None or last[0] is not self.text_encoder or last[1] != known:
            self._last = last = (self.text_encoder, known, self.embed(known))
        embedded = last[2].to(device)
        return partial(self._denoise_captions, embedded, numbers[0], numbers[1], guidance_scale, guidance_interval)

    def _denoise_captions(
        self,
        embedded: EmbeddedCaptions,
        prompts: Tensor,
        negatives: Tensor,
        scale: float,
        interval: tuple[float, float] | None,
        x: Tensor,
        t: Tensor,
        image: Tensor,
    ) -> Tensor:
        def conditional(x: Tensor, t: Tensor, numbers: Tensor) -> Tensor:
            arguments = embedded.arguments(numbers, self.unet.dtype)
            return unet_denoiser(self, self.scheduler, **arguments)(x, t)

        condition, null = (each.expand(len(image)) if len(each) == 1 else each[image] for each in (prompts, negatives))
        guided, as_it_is = (classifier_free_guidance(conditional, condition, null, each) for each in (scale, 1.0))
        return guide_within(interval, guided, as_it_is, self.scheduler.sde)(x, t)

    def probability_flow(
        self,
        prompt: str | Sequence[str],
        guidance_scale: float = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> ProbabilityFlow:
        """The guided flow, for the likelihoods and codes of images given their captions.

        Pass ``conditioning={"image": torch.arange(n)}`` for n images to its methods. At scale 1 it is that of
        log p(x | caption). Arguments are those of the call.

        Example:
            ```py
            flow = pipe.probability_flow(["a three", "a seven"])
            flow.bits_per_dim(images, conditioning={"image": torch.arange(2)}).mean
            ```
        """
        denoiser = self.denoiser(prompt, guidance_scale, negative_prompt, guidance_interval)
        return ProbabilityFlow(self, denoiser=denoiser)
