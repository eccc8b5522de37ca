"""Inpainting by unconditional networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import ImagePipelineOutput
from torch import Tensor

from ..basics.checks import check_choice, check_generators, check_integer, check_tensor
from ..basics.noise import fork
from ..guidance.operators import Mask
from ..guidance.replacement import Replacement
from ..schedulers import SDEScheduler
from .pipeline_restoration import RestorationSDEPipeline
from .pipeline_sde import METHODS
from .probability_flow import check_sides
from .runs import Callback, check_run, data_tensor, execute, network_output, starting_noise

DARKEST_WHITE = 64  # a mask of bytes below this is no dark mask but one of labels
INPAINTING_METHODS = ("replacement", "repaint", "mmps", "pigdm", "dps")


class InpaintSDEPipeline(RestorationSDEPipeline):
    """Fill holes in images with an unconditional network, by any scheduler of this package.

    ``pigdm``, the default, and ``dps`` follow the gradient of the misfit, at about three times the cost per step,
    ``mmps`` with its 3 iterations at about seven times; the memory is that of a training step, and ``chunk_size``
    bounds it. ``replacement`` is the paper's method (Song et al. 2021, appendix I.2): fast, without gradients, and
    blind to what the hole and its surroundings have to agree on. ``repaint`` goes back and forth between noise levels
    until they agree, at ``resamplings`` times the cost (Lugmayr et al. 2022).

    Example:
        ```py
        from diffusers_sde import InpaintSDEPipeline

        pipe = InpaintSDEPipeline.from_pretrained("outputs/demo")
        completions = pipe(image, mask_image, num_samples=4, generator=torch.manual_seed(0)).images
        ```
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: Any,
        mask_image: Any,
        method: str = "pigdm",
        num_samples: int = 1,
        num_inference_steps: int = 100,
        generator: torch.Generator | list[torch.Generator] | None = None,
        resamplings: int = 5,
        jump_length: int = 1,
        keep_known: bool = True,
        method_options: Mapping[str, Any] | None = None,
        output_type: str = "pil",
        latents: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        return_dict: bool = True,
        sampler: str = "scheduler",
        rtol: float = 1e-2,
        atol: float = 1e-2,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Inpaint.

        Args:
            image: PIL images, uint8 arrays (B, H, W, C) or tensors (B, C, H, W), or floating-point data in the
                network's range. What is in the hole does not matter.
            mask_image: White (255, 1 or True) where to paint and black where the image is known, as in diffusers'
                inpainting pipelines; one for all images or one for each. Grey is cut at one half.
            method: ``replacement``, ``repaint``, ``mmps``, ``pigdm`` or ``dps``.
            num_samples: Completions for each image; the output has those of the first image first.
            num_inference_steps: Noise levels.
            generator: One generator, or a list with one for each output image. The hole of an image that is all hole
                gets what ``SDEPipeline`` draws with the same generator.
            resamplings: Of ``repaint``: how often each stretch of levels is done. It runs the scheduler at
                ``solver_order=1``, since a jump breaks the path that multistep solvers look back on.
            jump_length: Of ``repaint``: levels per stretch.
            keep_known: Put the known pixels into the result exactly; False leaves them as the method has them, which
                makes a difference for ``mmps``, ``pigdm`` and ``dps``.
            method_options: As in ``RestorationSDEPipeline``, for the same methods.
            output_type: As in ``SDEPipeline``.
            latents: Unit noise to start from, shape (B * num_samples, C, H, W).
            callback_on_step_end: As in ``SDEPipeline``.
            return_dict: Whether to return an ``ImagePipelineOutput`` instead of a tuple.
            sampler: As in ``RestorationSDEPipeline``, for the same methods.
            rtol: Likewise.
            atol: Likewise.

        Returns:
            The images.

        Raises:
            ValueError: An argument is out of range or shapes do not fit; nothing has been computed then.
        """
        check_choice("method", method, INPAINTING_METHODS)
        check_choice("sampler", sampler, METHODS)
        scheduler = check_run(self, output_type, sampler, callback_on_step_end)
        num_samples = check_integer("num_samples", num_samples, at_least=1)
        resamplings = check_integer("resamplings", resamplings, at_least=1)
        jump_length = check_integer("jump_length", jump_length, at_least=1)
        num_inference_steps = check_integer("num_inference_steps", num_inference_steps, at_least=1)
        known = data_tensor(self, image, "image")
        check_sides(self.unet, tuple(known.shape), "image")
        hole = _hole(mask_image).to(known.device)
        if hole.shape[2:] != known.shape[2:]:
            sizes = [" x ".join(map(str, v.shape[2:])) for v in (hole, known)]
            raise ValueError(f"mask_image must have the size of image, got {sizes[0]} for an image of {sizes[1]}.")
        if hole.shape[1] not in (1, known.shape[1]):
            raise ValueError(f"mask_image must have 1 or {known.shape[1]} channels, got {hole.shape[1]}.")
        images = max(len(known), len(hole))
        if not {len(known), len(hole)} <= {1, images}:
            raise ValueError(f"mask_image must be one, or one for each image: got {len(hole)} for {len(known)} images.")
        is_posterior = method not in ("replacement", "repaint")
        if sampler != "scheduler" and not is_posterior:
            raise ValueError(f"sampler {sampler!r} needs method mmps, pigdm or dps, got {method!r}: it has no levels.")
        if method_options is not None and not isinstance(method_options, Mapping):
            raise ValueError(f"method_options must be a dictionary or None, got {method_options!r}.")
        if method_options and not is_posterior:
            raise ValueError(f"method {method!r} takes no method_options, got {sorted(method_options)}.")
        options = self._method_options(method, method_options) if is_posterior else {}
        known, hole = (v.expand(images, *v.shape[1:]).repeat_interleave(num_samples, 0) for v in (known, hole))
        mask = ~hole.expand_as(known)
        if not bool(torch.isfinite(known[mask]).all()):
            raise ValueError("image must be finite where it is known.")
        known = torch.where(mask, known, 0.0)

        generator = check_generators(generator, len(known))
        own = fork(generator, known.device)
        latents = starting_noise(self, tuple(known.shape), generator, latents)
        replacement = Replacement(scheduler.sde, known, mask, own)
        if is_posterior:
            operator = Mask(mask, tuple(known.shape[1:]))
            run = (num_inference_steps, generator, callback_on_step_end)
            adaptive = None if sampler == "scheduler" else (sampler, rtol, atol)
            x = self._posterior_sample(operator, known, 0.0, method, options, latents, run, adaptive)
        else:
            repeats = resamplings if method == "repaint" and bool(mask.any()) else 1
            scheduler = _without_memory(scheduler) if repeats > 1 else scheduler
            x = execute(
                self,
                scheduler,
                network_output(self, scheduler),
                latents,
                num_inference_steps,
                generator,
                replacement,
                repeats,
                jump_length,
                callback_on_step_end,
            )
        if keep_known:
            x = replacement(x, None)
        result = self.postprocess(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)


def _without_memory(scheduler: SDEScheduler) -> SDEScheduler:
    first_order: SDEScheduler = type(scheduler).from_config(scheduler.config, solver_order=1, solver_correction=False)
    return first_order


def _hole(mask: Any) -> Tensor:
    """True where to paint, shape (B, 1 or C, H, W)."""
    if hasattr(mask, "getbands"):
        mask = [mask]
    if isinstance(mask, (list, tuple)) and len(mask) and all(hasattr(m, "getbands") for m in mask):
        if len({m.size for m in mask}) > 1:
            raise ValueError(f"mask_image must all have one size, got {sorted({m.size for m in mask})}.")
        mask = np.stack([_grey_mask(m) for m in mask])
    if isinstance(mask, np.ndarray):
        if mask.dtype.kind not in "biuf":
            raise ValueError(f"mask_image must hold booleans or numbers, got an array of {mask.dtype}.")
        mask = mask[..., 0] if mask.ndim == 3 and mask.shape[2] == 1 else mask
        mask = mask[None] if mask.ndim == 2 else mask
        mask = mask[..., None] if mask.ndim == 3 else mask
        if mask.ndim != 4:
            raise ValueError(f"mask_image must have shape (H, W), (B, H, W) or (B, H, W, C), got {mask.shape}.")
        mask = torch.from_numpy(mask.transpose(0, 3, 1, 2).copy())
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask_image must be PIL images, an array or a tensor, got {type(mask).__name__}.")
    mask = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    check_tensor("mask_image", mask, (None,) * 4)
    if mask.dtype == torch.bool:
        return mask
    largest = mask.max()
    if mask.dtype == torch.uint8 and largest > 1:
        if largest < DARKEST_WHITE:
            raise ValueError(
                f"mask_image must be white (255) where to paint, got nothing above {int(largest)}: were these labels, "
                "pass such as mask_image == 2."
            )
        return mask >= 128
    if not bool((mask >= 0).all()) or largest > 1:
        raise ValueError("mask_image must be boolean, uint8, or numbers in [0, 1].")
    return mask >= 0.5


def _grey_mask(mask: Any) -> np.ndarray:
    """A PIL image as grey bytes."""
    grey = np.asarray(mask.convert("L"))
    alpha = np.asarray(mask.convert("RGBA"))[..., 3]
    if alpha.min() < alpha.max() and grey.min() == grey.max():
        raise ValueError(
            f"mask_image ({mask.mode}) must be white where to paint, but only its alpha channel has a shape: pass "
            "mask_image.getchannel('A'), or its inverse."
        )
    return grey
