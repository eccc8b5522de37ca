"""Posterior samples for any linear measurement of an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from torch import Tensor

from ..basics.checks import check_tensor
from ..basics.networks import traits_of
from ..guidance.operators import (
    ChannelMixture,
    Downsampling,
    GaussianBlur,
    Grayscale,
    LinearMap,
    LinearOperator,
    Mask,
    check_noise_std,
)
from .pipeline_sde import SDEPipeline
from .posterior_runs import draw_posterior, posterior_of, through_decoder
from .runs import (
    Callback,
    RunOptions,
    finished,
    image_data,
    names_near_arguments,
    own_scheduler,
    samples_of_each,
)


class RestorationSDEPipeline(SDEPipeline):
    """Draw images given y = A x + noise: super-resolution, colourisation, deblurring, inpainting or any linear map.

    The network is an unconditional one and needs no training for the task. Every scheduler of this package works:
    reverse SDE, predictor-corrector, ODE. ``diffusers_sde.guidance`` describes the posterior methods. ``smc`` is the
    one that is right rather than fast: each image is drawn from weighted particles, and with enough of them it is a
    sample of the posterior.

    A pipeline with an autoencoder takes operators on images, ``pipe.image_shape``, which are applied to what it decodes
    (``guidance.DecodedOperator``), and operators on latents, ``pipe.sample_shape``. Through the decoder a step costs a
    decoding and a backward pass through it beside those of the network, ``mmps`` and ``pigdm`` one for each iteration
    of their solvers. The memory is that of these passes for 16 images, or for ``chunk_size`` of them.

    Example:
        ```py
        from diffusers_sde import RestorationSDEPipeline
        from diffusers_sde.guidance import Downsampling

        pipe = RestorationSDEPipeline.from_pretrained("outputs/demo")
        operator = Downsampling(4, pipe.image_shape)
        images = pipe(small_image, operator, noise_std=0.05, num_samples=4).images
        ```

    Attributes:
        operators: The operators by name, for where the pipeline was loaded without the package.
    """

    operators = {cls.__name__: cls for cls in (ChannelMixture, Downsampling, GaussianBlur, Grayscale, LinearMap, Mask)}

    @names_near_arguments
    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        measurement: Any,
        operator: LinearOperator,
        noise_std: float = 0.0,
        posterior: str = "mmps",
        num_samples: int = 1,
        num_inference_steps: int = 100,
        generator: torch.Generator | list[torch.Generator] | None = None,
        posterior_options: Mapping[str, Any] | None = None,
        output_type: str = "pil",
        latents: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        return_dict: bool = True,
        method: str = "scheduler",
        rtol: float | None = None,
        atol: float | None = None,
        batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Restore images.

        Args:
            measurement: y, shape (B, *operator.measurement_shape), in the network's range; PIL images and uint8 arrays
                are scaled to it, for operators that measure pictures.
            operator: A, for data of shape (C, H, W): images, or the latents of a pipeline with an autoencoder.
            noise_std: Standard deviation of the noise, in the units of the network's range, which is [-1, 1] for images
                of an autoencoder. What its decoder cannot draw counts as noise of 0.05 at least.
            posterior: The way to condition on y: a name in ``guidance.POSTERIOR_METHODS``, such as ``mmps``, ``pigdm``,
                ``dps``, ``gaussian`` or ``smc``, and through a decoder ``psld``. ``smc`` runs a reverse SDE of its own,
                of first order, on the scheduler's grid. It needs ``noise_std`` > 0, and takes no latents, no callback
                and no other ``method``. The others run the scheduler, with ``solver_order=1`` where that is None.
            num_samples: Samples for each measurement; the output has those of the first measurement first.
            num_inference_steps: Noise levels; each costs ``scheduler.order`` calls and backward passes.
            generator: One generator, or, except for ``smc``, a list with one for each output image.
            posterior_options: Fields of the posterior method's class, such as ``{"iterations": 5}``, ``{"particles":
                64}`` (16 for each image by default), or ``{"chunk_size": 4}``, which limits memory to that of four
                images.
            output_type: As in ``SDEPipeline``.
            latents: Unit noise to start from, shape (B * num_samples, C, H, W).
            callback_on_step_end: As in ``SDEPipeline``.
            return_dict: Whether to return an ``ImagePipelineOutput`` instead of a tuple.
            method: The way to integrate, as in ``SDEPipeline``: ``scheduler``, or ``ode`` or ``sde`` for the
                probability flow or the reverse SDE of the posterior with adaptive steps.
            rtol: As in ``SDEPipeline``.
            atol: As in ``SDEPipeline``.
            batch_size: How many images to draw for all measurements together, instead of ``num_samples`` for each.

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
        how = posterior_of(self, posterior, posterior_options)
        check_noise_std(noise_std)
        y = self._measurement(measurement, operator)
        if self._measures_images(operator):
            operator = through_decoder(self, operator, how)
        num_samples = samples_of_each(num_samples, batch_size, len(y), "measurement")
        index = torch.arange(len(y), device=y.device).repeat_interleave(num_samples)
        return finished(self, run, draw_posterior(self, run, how, operator.select(index), y[index], noise_std))

    def _measures_images(self, operator: Any) -> bool:
        """Return whether an operator is one on images while the network works on latents."""
        if self.vae is None or not hasattr(operator, "data_shape"):
            return False
        return tuple(operator.data_shape) != tuple(self.sample_shape)

    def _measurement(self, measurement: Any, operator: LinearOperator) -> Tensor:
        """Return the checked measurement in the network's range, shape (B, *operator.measurement_shape)."""
        channels = traits_of(self.unet).channels
        if self._measures_images(operator):
            channels = self.encoder.image_shape((1, 1, 1))[0]
        if not all(hasattr(operator, name) for name in ("apply", "adjoint", "data_shape")):
            raise ValueError(f"operator must be a LinearOperator, such as Downsampling(2, ...), got {operator!r}.")
        if len(operator.data_shape) != 3 or channels not in (None, operator.data_shape[0]):
            raise ValueError(f"operator must be one for data ({channels or 'C'}, H, W), got {operator.data_shape}.")
        if isinstance(measurement, Tensor) and measurement.is_floating_point():
            y = measurement.to(device=self._execution_device, dtype=torch.float32)
        else:
            y = image_data(self, measurement, "measurement")
        expected = operator.measurement_shape
        check_tensor("measurement", y, (None, *expected), finite=not isinstance(operator, Mask))
        if operator.batch_size not in (None, len(y)):
            raise ValueError(f"operator is for {operator.batch_size} images, got {len(y)} measurements.")
        return y
