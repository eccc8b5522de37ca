"""Generation by class, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..guidance import classifier_free_guidance, guidance_interval
from .execution import Callback, check_latents, check_run, execute, guided_output, unet_denoiser
from .pipeline_sde import SDEPipeline


class ClassConditionalSDEPipeline(SDEPipeline):
    """Draw images of given classes from a network with ``num_class_embeds``.

    A network trained with label dropout has one more class, the null class, which stands for "any". With it,
    classifier-free guidance (Ho & Salimans 2022) sharpens the class; both halves are one batched call. Correctors take
    the guided score, which for a scale other than 1 is not the score of any marginal.

    Args:
        unet: The network, called as ``unet(sample, timestep, class_labels)``.
        scheduler: One of this package's schedulers.
        data_min: As in ``SDEPipeline``.
        data_max: Likewise.
        id2label: Name of each class, by its number. JSON turns the numbers into strings; both are understood.
        null_class: Number of the null class; None for a network without one, which allows ``guidance_scale`` 1 only.

    Example:
        ```py
        from diffusers_sde import ClassConditionalSDEPipeline

        pipe = ClassConditionalSDEPipeline.from_pretrained("outputs/digits")
        images = pipe(class_labels=[3, "seven"], guidance_scale=2.0).images
        ```
    """

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        data_min: float = -1.0,
        data_max: float = 1.0,
        id2label: Mapping | None = None,  # bare: diffusers compares types, and JSON makes its keys strings
        null_class: int | None = None,
    ) -> None:
        super().__init__(unet, scheduler, data_min, data_max)
        embeds = unet.config.num_class_embeds
        if embeds is None:
            raise ValueError("unet has no num_class_embeds: it knows no classes. Use SDEPipeline.")
        if null_class is not None and not 0 <= null_class < embeds:
            raise ValueError(f"null_class must lie in [0, {embeds}), the classes of the network, got {null_class!r}.")
        names = {str(number): str(name) for number, name in (id2label or {}).items()}
        bad = [number for number in names if not number.isdecimal() or int(number) >= embeds]
        if bad:
            raise ValueError(f"id2label must name classes in [0, {embeds}), got {bad}.")
        if len(set(names.values())) < len(names):
            raise ValueError("id2label must give every class a name of its own.")
        self.register_to_config(id2label=names or None, null_class=null_class)

    @property
    def labels(self) -> dict[str, int]:
        """Number of each class by its name; empty where the classes have no names."""
        return {name: int(number) for number, name in (self.config.id2label or {}).items()}

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        class_labels: int | str | Sequence[int | str] | Tensor,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        num_inference_steps: int = 100,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        latents: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one image for each label.

        Args:
            class_labels: Numbers or names.
            guidance_scale: 1 is the class as it is, larger values sharpen it at the expense of variety, 0 ignores it.
                Other values than 0 and 1 double the batch.
            guidance_interval: Noise-to-signal ratios sigma/alpha between which to guide; outside the scale is 1, at the
                cost of one half. None guides everywhere. (0.2, 3.0) is a common choice.
            num_inference_steps: Noise levels; each costs ``scheduler.order`` network calls.
            generator: One generator, or a list with one for each image.
            output_type: As in ``SDEPipeline``.
            latents: Unit noise to start from, shape (B, C, H, W).
            callback_on_step_end: As in ``SDEPipeline``.
            return_dict: Whether to return an ``ImagePipelineOutput`` instead of a tuple.

        Returns:
            The images.

        Raises:
            ValueError: A label out of range or unknown, or another bad argument; nothing has been computed then.
        """
        scheduler = check_run(self, output_type, "class", ("class",))
        device = self._execution_device
        labels = torch.tensor(self._numbers(class_labels), dtype=torch.int64, device=device)
        null_class = self.config.null_class
        if null_class is None and guidance_scale != 1.0:
            raise ValueError(
                f"guidance_scale must be 1 for a network without a null class, got {guidance_scale!r}: train with "
                "label dropout, and name the class that stood for dropped labels in null_class."
            )
        shape = (len(labels), *self.sample_shape)
        denoiser = self._denoiser(labels, guidance_scale, guidance_interval)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device)
        check_latents(latents, (len(labels), self.unet.config.in_channels, *latents.shape[2:]))
        x = execute(
            self,
            scheduler,
            guided_output(scheduler, denoiser),
            latents.to(device=device, dtype=torch.float32),
            num_inference_steps,
            generator,
            callback=callback_on_step_end,
        )
        images = self.postprocess(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoiser(self, labels: Tensor, scale: float, interval: tuple[float, float] | None) -> Any:
        scheduler = self.scheduler

        def conditional(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return unet_denoiser(self, scheduler, class_labels=condition)(x, t)

        null = labels if self.config.null_class is None else torch.full_like(labels, self.config.null_class)
        inside = classifier_free_guidance(conditional, labels, null, scale)
        outside = classifier_free_guidance(conditional, labels, null, 1.0)
        return guidance_interval(inside, outside, scheduler.sde, interval)

    def _numbers(self, class_labels: Any) -> list[int]:
        if isinstance(class_labels, Tensor):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        if not isinstance(class_labels, Sequence) or not class_labels:
            raise ValueError(f"class_labels must be numbers or names, at least one, got {class_labels!r}.")
        names, embeds = self.labels, self.unet.config.num_class_embeds
        numbers = []
        for label in class_labels:
            if isinstance(label, str):
                if label not in names:
                    known = ", ".join(names) if names else "none: this pipeline's classes have no names"
                    raise ValueError(f"class_labels holds {label!r}, but the names are {known}.")
                label = names[label]
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < embeds:
                raise ValueError(f"class_labels must be integers in [0, {embeds}) or names, got {label!r}.")
            numbers.append(label)
        return numbers
