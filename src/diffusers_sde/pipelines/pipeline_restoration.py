"""Posterior samples for any linear measurement of an image."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from torch import Tensor

from ..basics.checks import check_choice, check_generators, check_integer, check_tensor
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
from ..guidance.particles import smc_sample
from ..guidance.posteriors import POSTERIOR_METHODS, posterior_denoiser
from ..sampling.exponential import Exponential
from ..sampling.planning import make_plan
from ..sampling.rows import Plan
from ..schedulers import SDEScheduler
from .pipeline_sde import METHODS, SDEPipeline
from .runs import (
    Callback,
    check_run,
    data_tensor,
    execute,
    execute_adaptive,
    guided_output,
    starting_noise,
    unet_denoiser,
)

SMC_OPTIONS = ("particles", "data_std", "resample_below", "chunk_size")


class RestorationSDEPipeline(SDEPipeline):
    """Draw images given y = A x + noise: super-resolution, colourisation, deblurring, inpainting or any linear map.

    The network is an unconditional one and needs no training for the task. Every scheduler of this package works:
    reverse SDE, predictor-corrector, ODE. See ``diffusers_sde.guidance`` for the methods. ``smc`` is the one that is
    right rather than fast: each image is drawn from weighted particles, and with enough of them it is a sample of the
    posterior.

    Example:
        ```py
        from diffusers_sde import RestorationSDEPipeline
        from diffusers_sde.operators import Downsampling

        pipe = RestorationSDEPipeline.from_pretrained("outputs/demo")
        operator = Downsampling(4, pipe.sample_shape)
        images = pipe(small_image, operator, noise_std=0.05, num_samples=4).images
        ```

    Attributes:
        operators: The operators by name, for where the pipeline was loaded without the package.
    """

    operators = {cls.__name__: cls for cls in (ChannelMixture, Downsampling, GaussianBlur, Grayscale, LinearMap, Mask)}

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        measurement: Any,
        operator: LinearOperator,
        noise_std: float = 0.0,
        method: str = "mmps",
        num_samples: int = 1,
        num_inference_steps: int = 100,
        generator: torch.Generator | list[torch.Generator] | None = None,
        method_options: Mapping[str, Any] | None = None,
        output_type: str = "pil",
        latents: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        return_dict: bool = True,
        sampler: str = "scheduler",
        rtol: float = 1e-2,
        atol: float = 1e-2,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Restore images.

        Args:
            measurement: y, shape (B, *operator.measurement_shape), in the network's range; PIL images and uint8 arrays
                are scaled to it, for operators that measure pictures.
            operator: A, for data of shape (C, H, W).
            noise_std: Standard deviation of the noise, in the units of the network's range.
            method: ``mmps``, ``pigdm``, ``dps``, ``gaussian`` or ``smc``. The last runs a reverse SDE of its own, of
                first order, on the scheduler's grid, and needs ``noise_std`` > 0.
            num_samples: Samples for each measurement; the output has those of the first measurement first.
            num_inference_steps: Noise levels; each costs ``scheduler.order`` calls and backward passes.
            generator: One generator, or, except for ``smc``, a list with one for each output image.
            method_options: Arguments of the method, such as ``{"iterations": 5}``, ``{"particles": 64}`` (16 for each
                image by default), or ``{"chunk_size": 4}``, which limits memory to that of four images.
            output_type: As in ``SDEPipeline``.
            latents: Unit noise to start from, shape (B * num_samples, C, H, W).
            callback_on_step_end: As in ``SDEPipeline``.
            return_dict: Whether to return an ``ImagePipelineOutput`` instead of a tuple.
            sampler: ``scheduler``, or ``ode`` or ``sde`` for the probability flow or the reverse SDE of the posterior
                with adaptive steps: what ``method`` says in ``SDEPipeline``. Not with ``smc``.
            rtol: Relative tolerance of ``ode`` and ``sde``, as in ``SDEPipeline``.
            atol: Absolute tolerance, likewise.

        Returns:
            The images.

        Raises:
            ValueError: An argument is out of range or shapes do not fit; nothing has been computed then.
        """
        check_choice("method", method, (*POSTERIOR_METHODS, "smc"))
        check_choice("sampler", sampler, METHODS)
        scheduler = check_run(self, output_type, sampler, callback_on_step_end)
        num_samples = check_integer("num_samples", num_samples, at_least=1)
        num_inference_steps = check_integer("num_inference_steps", num_inference_steps, at_least=1)
        check_noise_std(noise_std)
        y = self._measurement(measurement, operator)
        options = self._method_options(method, method_options)
        index = torch.arange(len(y)).repeat_interleave(num_samples)
        shape = (len(index), *operator.data_shape)
        operator, y = operator.select(index), y[index.to(y.device)]
        if method == "smc":
            given = (latents, callback_on_step_end, None if sampler == "scheduler" else sampler)
            if any(v is not None for v in given) or isinstance(generator, (list, tuple)):
                raise ValueError(
                    "method 'smc' takes no latents, no callback_on_step_end, no list of generators, no other sampler."
                )
            check_generators(generator, len(index))
            plan = _particle_plan(scheduler, num_inference_steps)
            self._num_timesteps = len(plan.rows)
            prior = unet_denoiser(self, scheduler)
            particles = smc_sample(plan, prior, scheduler.sde, operator, y, noise_std, generator=generator, **options)
            x = particles.draw(generator)
        else:
            latents = starting_noise(self, shape, generator, latents)
            run = (num_inference_steps, generator, callback_on_step_end)
            adaptive = None if sampler == "scheduler" else (sampler, rtol, atol)
            x = self._posterior_sample(operator, y, noise_std, method, options, latents, run, adaptive)
        images = self.postprocess(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _posterior_sample(
        self,
        operator: LinearOperator,
        y: Tensor,
        noise_std: float,
        method: str,
        options: Mapping[str, Any],
        latents: Tensor,
        run: tuple[int, Any, Callback | None],
        adaptive: tuple[str, float, float] | None,
    ) -> Tensor:
        """By the scheduler, or with adaptive steps by (method, rtol, atol) where they are given."""
        scheduler, prior = self.scheduler, unet_denoiser(self, self.scheduler)

        def denoiser(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
            own = operator.select(index)
            return posterior_denoiser(prior, scheduler.sde, own, y[index], noise_std, method, **options)(x, t)

        steps, generator, callback = run
        if adaptive is not None:
            (sampler, rtol, atol), index = adaptive, torch.arange(len(y), device=y.device)
            return execute_adaptive(self, sampler, latents, rtol, atol, generator, denoiser, {"index": index})
        guided = posterior_denoiser(prior, scheduler.sde, operator, y, noise_std, method, **options)
        return execute(self, scheduler, guided_output(scheduler, guided), latents, steps, generator, callback=callback)

    def _measurement(self, measurement: Any, operator: LinearOperator) -> Tensor:
        channels = self.unet.config.in_channels
        if not all(hasattr(operator, name) for name in ("apply", "adjoint", "data_shape")):
            raise ValueError(f"operator must be a LinearOperator, such as Downsampling(2, ...), got {operator!r}.")
        if len(operator.data_shape) != 3 or operator.data_shape[0] != channels:
            raise ValueError(f"operator must be one for data ({channels}, H, W), got {operator.data_shape}.")
        if isinstance(measurement, Tensor) and measurement.is_floating_point():
            y = measurement.to(device=self._execution_device, dtype=torch.float32)
        else:
            y = data_tensor(self, measurement, "measurement")
        expected = operator.measurement_shape
        check_tensor("measurement", y, (None, *expected), finite=not isinstance(operator, Mask))
        if operator.batch_size not in (None, len(y)):
            raise ValueError(f"operator is for {operator.batch_size} images, got {len(y)} measurements.")
        return y

    def _method_options(self, method: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
        """Checked options, with the scale of this pipeline's data: a standard deviation of a quarter of its range."""
        is_smc = method == "smc"
        names = SMC_OPTIONS if is_smc else tuple(inspect.signature(POSTERIOR_METHODS[method]).parameters)[5:]
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(f"method_options must be a dictionary of {', '.join(names)}, got {options!r}.")
        unknown = set(options or {}) - set(names)
        if unknown:
            raise ValueError(f"method_options of {method!r} may hold {', '.join(names)}, got {sorted(unknown)}.")
        std = 0.25 * (self.config.data_max - self.config.data_min)
        defaults = {"pigdm": {"data_std": std}, "smc": {"data_std": std}, "gaussian": {"covariance": std**2}}
        return {**defaults.get(method, {}), **(options or {})}


def _particle_plan(scheduler: SDEScheduler, num_inference_steps: int) -> Plan:
    """The reverse SDE by first-order exponential steps, on the scheduler's grid and ending with the data."""
    times = scheduler.level_times(num_inference_steps)
    return make_plan(scheduler.sde, times, Exponential(1))
