"""Inpainting by unconditional networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from torch import Tensor

from ..basics.checks import check_choice, check_generators, check_integer
from ..basics.noise import fork
from ..guidance.operators import LinearOperator, Mask, check_noise_std
from ..guidance.posteriors import POSTERIOR_METHODS
from ..guidance.replacement import REPLACEMENT_METHODS, Replacement
from ..images.arrays import as_hole
from .encoders import latents_of
from .pipeline_sde import SDEPipeline
from .posterior_runs import draw_posterior, latents_of_images, posterior_of, through_decoder
from .probability_flow import check_sides
from .runs import (
    Callback,
    RunOptions,
    execute,
    finished,
    image_data,
    names_near_arguments,
    network_output,
    own_scheduler,
    samples_of_each,
    starting_noise,
)


class InpaintSDEPipeline(SDEPipeline):
    """Fill holes in images with an unconditional network, by any scheduler of this package.

    ``pigdm``, the default, and ``dps`` follow the gradient of the misfit, at about three times the cost per step, and
    ``mmps`` with its 3 iterations costs about seven times as much. The memory is that of a training step, and
    ``chunk_size`` bounds it. ``replacement`` is the paper's method (Song et al. 2021, appendix I.2): it is fast and
    needs no gradients, but is blind to what the hole and its surroundings have to agree on. ``repaint`` goes back and
    forth between noise levels until they agree, at ``resamplings`` times the cost (Lugmayr et al. 2022).

    A pipeline with an autoencoder compares the known pixels with what it decodes, or, with ``space="latents"``, which
    is cheaper and coarser, keeps those latents whose pixels are all known.

    Example:
        ```py
        from diffusers_sde import InpaintSDEPipeline

        pipe = InpaintSDEPipeline.from_pretrained("outputs/demo")
        completions = pipe(image, mask_image, num_samples=4, generator=torch.manual_seed(0)).images
        ```
    """

    @names_near_arguments
    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: Any,
        mask_image: Any,
        posterior: str = "pigdm",
        num_samples: int = 1,
        num_inference_steps: int = 100,
        generator: torch.Generator | list[torch.Generator] | None = None,
        resamplings: int = 5,
        jump_length: int = 1,
        keep_known: bool = True,
        posterior_options: Mapping[str, Any] | None = None,
        output_type: str = "pil",
        latents: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        return_dict: bool = True,
        method: str = "scheduler",
        rtol: float | None = None,
        atol: float | None = None,
        noise_std: float = 0.0,
        batch_size: int | None = None,
        space: str | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Fill the holes.

        Args:
            image: PIL images, uint8 arrays (B, H, W, C) or tensors (B, C, H, W), or floating-point data in the
                network's range. What is in the hole does not matter.
            mask_image: White (255, 1 or True) where to paint and black where the image is known, as in diffusers'
                inpainting pipelines; one for all images or one for each. Grey is cut at one half.
            posterior: The way to condition on the known pixels: ``replacement``, ``repaint``, or a name in
                ``guidance.POSTERIOR_METHODS``, such as ``pigdm``, ``mmps``, ``dps``, ``gaussian`` or ``smc``, which
                needs ``noise_std`` > 0.
            num_samples: Completions for each image; the output has those of the first image first.
            num_inference_steps: Noise levels.
            generator: One generator, or a list with one for each output image. The hole of an image that is all hole
                gets what ``SDEPipeline`` draws with the same generator, unless the posterior is ``smc``; for those
                that guide, by a scheduler with ``solver_order=1``, which they take where it is None.
            resamplings: How often ``repaint`` does each stretch of levels. It runs the scheduler at
                ``solver_order=1``, since a jump breaks the path that multistep solvers look back on.
            jump_length: How many levels a stretch of ``repaint`` has.
            keep_known: Whether the known pixels are put into the result exactly, which no ``output_type`` of latents
                shows. False leaves them as the posterior
                method has them, which differs from the image for all but ``replacement`` and ``repaint``.
            posterior_options: As in ``RestorationSDEPipeline``; ``replacement`` and ``repaint`` have none.
            output_type: As in ``SDEPipeline``.
            latents: Unit noise to start from, shape (B * num_samples, C, H, W).
            callback_on_step_end: As in ``SDEPipeline``.
            return_dict: Whether to return an ``ImagePipelineOutput`` instead of a tuple.
            method: The way to integrate, as in ``SDEPipeline``; ``replacement`` and ``repaint`` need ``scheduler``.
            rtol: As in ``SDEPipeline``.
            atol: As in ``SDEPipeline``.
            noise_std: Standard deviation of the noise in the known pixels, in the units of the network's range. Where
                it is positive, ``keep_known=False`` lets the method take the noise out of them.
            batch_size: How many images to draw for all images together, instead of ``num_samples`` for each.
            space: Where a pipeline with an autoencoder looks at what is known: ``pixels``, through the decoder, at the
                cost that ``RestorationSDEPipeline`` tells, or ``latents``. None is ``latents`` for ``replacement`` and
                ``repaint``, which know no other, and ``pixels`` else. Without an autoencoder there are pixels only.

        Returns:
            The images.

        Raises:
            ValueError: An argument is out of range or shapes do not fit; nothing has been computed then.
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
        check_choice("posterior", posterior, (*REPLACEMENT_METHODS, *POSTERIOR_METHODS))
        resamplings = check_integer("resamplings", resamplings, at_least=1)
        jump_length = check_integer("jump_length", jump_length, at_least=1)
        check_noise_std(noise_std)
        space = self._checked_space(space, posterior)
        known, hole = self._known_and_hole(image, mask_image)
        num_samples = samples_of_each(num_samples, batch_size, len(known), "image")
        known, hole = known.repeat_interleave(num_samples, 0), hole.repeat_interleave(num_samples, 0)
        mask, pixels = ~hole, (known, ~hole)
        if space == "latents":
            known, mask = self._known_latents(known, mask)
        if posterior in REPLACEMENT_METHODS:
            _check_replacement(posterior, posterior_options, noise_std, method)
            resamplings = resamplings if posterior == "repaint" and bool(mask.any()) else 1
            x = self._by_replacement(known, mask, run, resamplings, jump_length)
        else:
            how = posterior_of(self, posterior, posterior_options)
            one_for_all = bool((mask == mask[:1]).all())
            operator: LinearOperator = Mask(mask[:1] if one_for_all else mask, tuple(known.shape[1:]))
            if self.vae is not None and space == "pixels":
                operator = through_decoder(self, operator, how)
            x = draw_posterior(self, run, how, operator, known, noise_std)
        if self.vae is None:
            return finished(self, run, torch.where(mask, known, x) if keep_known else x)
        return finished(self, run, x, pixels if keep_known else None)

    def _checked_space(self, space: str | None, posterior: str) -> str:
        """Return where what is known is looked at.

        Raises:
            ValueError: An unknown space, latents without an autoencoder, or pixels where a method takes latents only.
        """
        only_latents = self.vae is not None and posterior in REPLACEMENT_METHODS
        if space is None:
            return "latents" if only_latents else "pixels"
        check_choice("space", space, ("pixels", "latents"))
        if space == "latents" and self.vae is None:
            raise ValueError("space 'latents' needs a pipeline with a vae, this one works on pixels.")
        if space == "pixels" and only_latents:
            raise ValueError(f"space must be 'latents' for posterior {posterior!r} and a pipeline with a vae.")
        return space

    def _known_latents(self, known: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents of images with grey holes, and which of them are known: those of known pixels alone."""
        encoder = latents_of(self.vae, self.config.latents_mean, self.config.latents_std)
        latents = torch.cat([encoder.encoded(part) for part in known.split(encoder.chunk)])
        holes = (~mask).any(1, keepdim=True).float()
        touched = torch.nn.functional.adaptive_max_pool2d(holes, latents.shape[2:]) > 0
        return latents, (~touched).expand_as(latents)

    def _known_and_hole(self, image: Any, mask_image: Any) -> tuple[Tensor, Tensor]:
        """Return the image, 0 in its hole, and the hole as booleans, both of shape (B, C, H, W).

        Raises:
            ValueError: They do not fit each other or the network, or the image is not finite where it is known.
        """
        known = image_data(self, image, "image")
        if self.vae is None:
            check_sides(self.unet, tuple(known.shape), "image")
        else:
            latents_of_images(self, tuple(known.shape[1:]), "image")
        hole = as_hole(mask_image).to(known.device)
        if hole.shape[2:] != known.shape[2:]:
            sizes = [" x ".join(map(str, v.shape[2:])) for v in (hole, known)]
            raise ValueError(f"mask_image must have the size of image, got {sizes[0]} for an image of {sizes[1]}.")
        if hole.shape[1] not in (1, known.shape[1]):
            raise ValueError(f"mask_image must have 1 or {known.shape[1]} channels, got {hole.shape[1]}.")
        images = max(len(known), len(hole))
        if not {len(known), len(hole)} <= {1, images}:
            raise ValueError(f"mask_image must be one, or one for each image: got {len(hole)} for {len(known)} images.")
        known, hole = (v.expand(images, *known.shape[1:]) for v in (known, hole))
        if not bool(torch.isfinite(known[~hole]).all()):
            raise ValueError("image must be finite where it is known.")
        return torch.where(hole, 0.0, known), hole

    def _by_replacement(
        self, known: Tensor, mask: Tensor, run: RunOptions, resamplings: int, jump_length: int
    ) -> Tensor:
        """Draw by rows after each of which the known entries are put back, shape (B, C, H, W)."""
        scheduler = own_scheduler(self)
        if resamplings > 1:  # a jump breaks the path that multistep solvers look back on
            scheduler = type(scheduler).from_config(scheduler.config, solver_order=1, solver_correction=False)
        # Replacement has a generator of its own, so that the rows draw the same noise as without it.
        own = fork(check_generators(run.generator, len(known)), known.device)
        replacement = Replacement(scheduler.sde, known, mask, own)
        latents = starting_noise(self, run, tuple(known.shape))
        model = network_output(self, scheduler)
        return execute(self, run, scheduler, model, latents, replacement, resamplings, jump_length)


def _check_replacement(posterior: str, options: Mapping[str, Any] | None, noise_std: float, method: str) -> None:
    """Raise a ValueError for what only a posterior method can follow and replacement cannot."""
    others = ", ".join(POSTERIOR_METHODS)
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"posterior_options must be a dictionary or None, got {options!r}.")
    if options:
        raise ValueError(f"posterior {posterior!r} takes no posterior_options, got {sorted(map(str, options))}.")
    if noise_std != 0.0:
        raise ValueError(f"noise_std must be 0 for posterior {posterior!r}, got {noise_std!r}: use one of {others}.")
    if method != "scheduler":
        raise ValueError(
            f"method {method!r} needs one of the posteriors {others}, got {posterior!r}: adaptive steps have no levels "
            "at which known pixels could be put in."
        )
