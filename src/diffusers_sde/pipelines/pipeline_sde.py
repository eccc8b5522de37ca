"""Unconditional generation by any SDE scheduler.

The file is long because a pipeline is one class, whose docstrings are the manual of its calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from torch import Tensor

from ..basics.checks import check_choice, check_integer, check_ordered, check_shape
from ..basics.networks import traits_of
from ..basics.noise import Generators
from ..flow.likelihood import LogProb
from ..flow.quantized import BitsPerDim
from ..flow.trace import TraceOptions
from ..networks.denoisers import with_timestep
from ..schedulers import SCHEDULERS
from .base import SharedPipeline
from .encoders import ImageEncoder, LatentPreview, Latents, PixelRange, latents_of
from .plain_networks import PlainNetwork
from .probability_flow import ProbabilityFlow
from .runs import (
    OUTPUT_TYPES,
    RunOptions,
    after_step,
    arguments_of_step,
    at_temperature,
    execute_adaptive,
    finished,
    latents_shape,
    names_near_arguments,
    starting_noise,
    warn_of_foreign_fit,
)

logger = logging.get_logger(__name__)


def _adopted(scheduler: Any) -> Any:
    """Return the scheduler, or its equal of this copy of the code where it is of another copy.

    Without the package, the file of a repository's scheduler and that of its pipeline are two modules.
    """
    ours = SCHEDULERS.get(type(scheduler).__name__)
    return scheduler if ours is None or isinstance(scheduler, ours) else ours.from_config(scheduler.config)


def _checked_sample_shape(value: Any) -> tuple[int, int, int]:
    """The shape of one sample as a tuple of three positive integers, or a ValueError."""
    shape = check_shape("sample_shape", value)
    if len(shape) != 3:
        raise ValueError(f"sample_shape must be (channels, height, width), got {value!r}.")
    return shape


class SDEPipeline(SharedPipeline):
    """Draw images from a score model: start from the prior of the scheduler's SDE and execute its sampler.

    Unlike diffusers' ``DDPMPipeline`` it starts at ``scheduler.init_noise_sigma`` and scales the model input, so that
    VE and preconditioned models work; it knows the range of the data; and it keeps the state in float32 whatever the
    network's precision.

    Args:
        unet: The network: any diffusers model that is called as ``unet(sample, timestep, return_dict=False)``, with
            timesteps of shape (B,), and with ``class_labels`` where it knows classes, as ``UNet2DModel`` and
            ``DiTTransformer2DModel`` do; or a torch module that is called as ``unet(sample, timestep)``, which can do
            everything but be saved.
        scheduler: One of this package's schedulers, or a stock one that fits the network.
        data_min: Value of black in the data the network was trained on: -1, or 0 for the paper's VE models.
        data_max: Value of white.
        null_class: For a network with classes: the number of the class that stands for "any", which makes it an
            unconditional one.
        sample_shape: Shape of one sample, (channels, height, width), for a network whose config does not say it.
        vae: Autoencoder of diffusers, for a network whose data are its latents: images come out decoded. The range of
            the data is left aside then.
        latents_mean: Mean of each channel of the latents, which the network sees as (z - mean) / std; None for the
            ``shift_factor`` of the autoencoder's config.
        latents_std: Standard deviation of each channel, likewise; None for 1 / ``scaling_factor``.

    Raises:
        ValueError: An argument of the wrong kind, or arguments that do not fit together.

    Example:
        ```py
        from diffusers_sde import SDEPipeline, VPSDEScheduler

        pipe = SDEPipeline.from_pretrained("outputs/demo")
        pipe.scheduler = VPSDEScheduler.from_config(pipe.scheduler.config, corrector="langevin", snr=0.1)
        images = pipe(batch_size=16, num_inference_steps=100, generator=torch.manual_seed(0)).images
        ```
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]
    _has_null_class = True  # whether ``null_class`` is among the arguments, which diffusers compares with the config

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: SchedulerMixin,
        data_min: float = -1.0,
        data_max: float = 1.0,
        null_class: int | None = None,
        sample_shape: Sequence[int] | None = None,
        vae: ModelMixin | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        if not hasattr(scheduler, "config"):
            raise ValueError(f"scheduler must be one of diffusers' or of this package's, got {scheduler!r}.")
        shape = None if sample_shape is None else _checked_sample_shape(sample_shape)
        network: Any = unet
        if not isinstance(getattr(unet, "config", None), Mapping):
            if not isinstance(unet, torch.nn.Module):
                raise ValueError(f"unet must be a diffusers model or a torch module, got {unet!r}.")
            network = PlainNetwork.around(unet, shape)
        traits = traits_of(network)
        channels = traits.channels
        if shape is not None and channels not in (None, shape[0]):
            raise ValueError(f"sample_shape must have {channels} channels, those of the network, got {sample_shape!r}.")
        data_min, data_max = check_ordered("data_min", data_min, "data_max", data_max)
        classes = traits.num_classes or 0
        if null_class is not None and not classes:
            raise ValueError(f"null_class must be None for a network without classes, got {null_class!r}.")
        if null_class is not None:
            null_class = check_integer("null_class", null_class, at_least=0, at_most=classes - 1)
        moments = {"latents_mean": latents_mean, "latents_std": latents_std}
        if vae is not None:
            latents = latents_of(vae, latents_mean, latents_std)
            if channels not in (None, len(latents.mean)):
                raise ValueError(f"vae has {len(latents.mean)} channels of latents, the network {channels}.")
            self.register_to_config(latents_mean=list(latents.mean), latents_std=list(latents.std))
        elif any(value is not None for value in moments.values()):
            raise ValueError(f"latents_mean and latents_std must be None without a vae, got {moments}.")
        self.register_modules(unet=network, scheduler=_adopted(scheduler), vae=vae)
        self.register_to_config(data_min=data_min, data_max=data_max)
        if self._has_null_class:
            self.register_to_config(null_class=null_class)
        if shape is not None:
            self.register_to_config(sample_shape=list(shape))
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, (channels, height, width): the pipeline's own, or else that of the network's config.

        Raises:
            ValueError: Neither says it.
        """
        if self.config.get("sample_shape") is not None:
            return tuple(self.config.sample_shape)
        traits = traits_of(self.unet)
        if traits.channels is None or traits.sides is None:
            raise ValueError(
                "The network's config has no sample_size or no in_channels: pass sample_shape=(channels, height, "
                "width) to the pipeline, or latents of the shape you want to the call."
            )
        return (traits.channels, *traits.sides)

    @property
    def encoder(self) -> ImageEncoder:
        """What turns images into the network's data and back."""
        if self.vae is None:
            return PixelRange(self.config.data_min, self.config.data_max)
        return latents_of(self.vae, self.config.latents_mean, self.config.latents_std)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image, (channels, height, width): ``sample_shape``, or what the autoencoder makes of it."""
        return self.encoder.image_shape(self.sample_shape)

    def unconditional(self, batch_size: int) -> dict[str, Tensor]:
        """Return the arguments that make the network unconditional: none, or labels of its null or only class.

        Raises:
            ValueError: A network with classes and no null class.
        """
        traits = traits_of(self.unet)
        if traits.num_classes is None:
            return traits.constant_labels(batch_size, self._execution_device)
        if self.config.null_class is None:
            raise ValueError(
                "unet knows classes and has no null_class: use ClassConditionalSDEPipeline, or name the class that "
                f"stands for any, which is {traits.num_classes - 1} where it is the last of {traits.num_classes}."
            )
        labels = torch.full((batch_size,), self.config.null_class, device=self._execution_device)
        return {"class_labels": labels}

    @property
    def num_timesteps(self) -> int:
        """Model calls of the last run: noise levels, correctors and second stages together."""
        return self._num_timesteps

    @property
    def calls(self) -> Tensor:
        """Network calls of each image of the last run by ``method="ode"`` or ``"sde"``, shape (B,)."""
        return self._calls

    @names_near_arguments
    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 100,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        latents: Tensor | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        method: str = "scheduler",
        rtol: float | None = None,
        atol: float | None = None,
        temperature: float | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            batch_size: How many; ignored where ``latents`` are given.
            num_inference_steps: Noise levels; each costs ``scheduler.order`` network calls.
            generator: One generator, or a list with one for each image; with a list an image does not depend on its
                batch mates.
            output_type: ``pil``, ``np`` (B, H, W, C in [0, 1]), ``pt`` (B, C, H, W in [0, 1]) or ``latent`` (the
                state itself, in the range of the data, not clamped).
            latents: Unit noise to start from, shape (B, C, H, W), instead of drawing it.
            callback_on_step_end: Called as ``f(pipe, index, timestep, {"latents": x})`` after every network call; may
                return replacements.
            callback_on_step_end_tensor_inputs: What the callback gets; only ``latents`` exists.
            return_dict: Whether to return an ``ImagePipelineOutput`` instead of a tuple.
            method: ``scheduler`` executes the scheduler's sampler; ``ode`` integrates the probability-flow ODE and
                ``sde`` the reverse SDE with adaptive steps, each image with its own, and ``num_inference_steps`` is
                left aside.
            rtol: Relative tolerance of ``ode`` and ``sde``; None is 1e-2. It must be None for ``scheduler``.
            atol: Absolute tolerance, of ``ode`` in standard deviations of the state, of ``sde`` in units of the data;
                likewise.
            temperature: Below 1 images are more typical and less diverse, above 1 the other way round; see the
                scheduler's argument of this name, which None takes.

        Returns:
            The images.

        Raises:
            ValueError: An argument is out of range; nothing has been computed then.
            TypeError: An argument that this pipeline does not have; the message names the nearest one.
        """
        if isinstance(batch_size, str):
            raise ValueError(
                f"batch_size must be an integer >= 1, got {batch_size!r}: {type(self).__name__} draws images without a "
                "prompt."
            )
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
        inputs = callback_on_step_end_tensor_inputs
        if not isinstance(inputs, (list, tuple)) or not set(map(str, inputs)) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may hold {self._callback_tensor_inputs}, got {inputs!r}."
            )
        if latents is None:
            shape: tuple[int, ...] = (check_integer("batch_size", batch_size, at_least=1), *self.sample_shape)
        else:
            shape = latents_shape(self, latents)
        unconditional = self.unconditional(shape[0])
        with at_temperature(self, temperature):
            latents = starting_noise(self, run, shape)
            if method == "scheduler":
                return finished(self, run, self._execute(run, latents, unconditional))
            return finished(self, run, execute_adaptive(self, run, latents))

    def _execute(self, run: RunOptions, latents: Tensor, unconditional: Mapping[str, Tensor]) -> Tensor:
        """Execute the scheduler's sampler from unit noise; returns the sample in the data's range."""
        step_arguments = arguments_of_step(self.scheduler, run.generator)
        needs_next = type(self.scheduler).__name__ == "UnCLIPScheduler"  # which takes t - 1 for it otherwise
        warn_of_foreign_fit(self)
        self.scheduler.set_timesteps(run.num_inference_steps, device=latents.device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        # Stock schedulers of flows start at unit variance and scale nothing, and have no names for that.
        x = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scale_input = getattr(self.scheduler, "scale_model_input", lambda sample, timestep: sample)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                model_input = scale_input(x, t).to(self.unet.dtype)
                fed = t.to(x.device).expand(len(x))
                told = {**unconditional, "return_dict": False}
                output = with_timestep(self.unet, model_input, fed, **told)[0].to(x.dtype)
                if needs_next:
                    step_arguments["prev_timestep"] = timesteps[i + 1] if i + 1 < len(timesteps) else None
                x = self.scheduler.step(output, t, x, **step_arguments, return_dict=False)[0]
                x = after_step(run.callback_on_step_end, self, i, t, x)
                progress_bar.update()
        return x

    def postprocess(self, x: Tensor, output_type: str = "pil") -> Any:
        """Turn data in the network's range into images; see ``output_type`` of the call."""
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if output_type == "latent":
            return x
        return self._as_output(self.encoder.decode(x), output_type)

    def _as_output(self, images: Tensor, output_type: str) -> Any:
        """Return images in [0, 1], shape (B, C, H, W), in the form asked for."""
        if not bool(torch.isfinite(images).all()):
            logger.warning("Some images are not finite: does the scheduler fit this network?")
        return self.image_processor.postprocess(images, output_type, do_denormalize=[False] * len(images))

    @torch.no_grad()
    def previewer(self, latents: Tensor) -> LatentPreview:
        """Return a function that turns latents into small pictures without the decoder, such as those of a callback.

        Args:
            latents: Some samples with ``output_type="latent"``, or encoded images, shape (B, C, H, W), to which it is
                fitted by one call of the decoder.

        Raises:
            ValueError: The pipeline has no autoencoder.

        Example:
            ```py
            preview = pipe.previewer(pipe(batch_size=4, num_inference_steps=10, output_type="latent").images)
            pipe(callback_on_step_end=lambda pipe, i, t, kwargs: show(preview(kwargs["latents"])) or {})
            ```
        """
        if not isinstance(self.encoder, Latents):
            raise ValueError("previewer needs a pipeline with a vae: this one works on pixels, which can be seen.")
        return LatentPreview.fit(self.encoder, latents.to(self._execution_device))

    # ------------------------------------------------------------------ the probability flow; see ProbabilityFlow

    @property
    def _shows_progress(self) -> bool:
        return not getattr(self, "_progress_bar_config", {}).get("disable", False)

    def encode(self, images: Any, rtol: float = 1e-5, atol: float = 1e-5) -> Tensor:
        """Latent codes of images by the probability-flow ODE: unit noise, shape (B, C, H, W).

        This costs many network calls. How many depends on the network and on the tolerances: hundreds at the default
        ones, which ``decode`` needs to give the images back closely. A line of the log says how many there were.

        Args:
            images: PIL images, uint8 arrays or tensors, which an autoencoder encodes first where there is one; or
                floating-point tensors in the network's range, which are latents for such a network.
            rtol: Relative tolerance.
            atol: Absolute tolerance, in standard deviations of the state.
        """
        flow = ProbabilityFlow(self)
        return flow.encode(images, options=flow.options(rtol, atol), progress_bar=self._shows_progress).sample

    def decode(
        self,
        latents: Tensor,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        temperature: float = 1.0,
        output_type: str = "pil",
    ) -> Any:
        """Images of latent codes, the inverse of ``encode``, at the same cost.

        Args:
            latents: Codes, shape (B, C, H, W).
            rtol: Relative tolerance.
            atol: Absolute tolerance, in standard deviations of the state.
            temperature: Factor on the codes; below 1 it gives images that are more typical and less diverse.
            output_type: As in the call.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        flow = ProbabilityFlow(self)
        solution = flow.decode(
            latents, options=flow.options(rtol, atol), temperature=temperature, progress_bar=self._shows_progress
        )
        return self.postprocess(solution.sample, output_type)

    def interpolate(
        self, a: Any, b: Any, num: int = 8, rtol: float = 1e-3, atol: float = 1e-3, output_type: str = "pil"
    ) -> list[Any]:
        """From image ``a`` to image ``b`` in ``num`` pictures, by spherical interpolation of their codes.

        Returns:
            One entry per pair of images: a list of PIL images, or an array or tensor with ``num`` pictures.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        flow = ProbabilityFlow(self)
        solution = flow.interpolate(a, b, num=num, options=flow.options(rtol, atol), progress_bar=self._shows_progress)
        return [self.postprocess(strip, output_type) for strip in solution.sample]

    def denoise(
        self,
        image: Any,
        sigma: float,
        num_samples: int | None = None,
        num_inference_steps: int = 50,
        generator: Generators = None,
        output_type: str = "pil",
    ) -> Any:
        """Remove Gaussian noise from images: y = x_0 + sigma n gives E[x_0 | y], or samples of p(x_0 | y).

        The mean is the estimate of least squared error, and costs one network call. The samples look like data, and
        their spread says what the noise has hidden. They come from the scheduler's SDE and predictor, with
        stochasticity 1, temperature 1 and no corrector, whatever its config says: with others they were no samples
        of p(x_0 | y).

        Args:
            image: The noisy images: PIL images, arrays or tensors of bytes, which are scaled to the network's range, or
                floating-point tensors (B, C, H, W) in that range. Bytes cut off the noise beyond black and white.
            sigma: Standard deviation of the noise in units of the network's range, from ``data_min`` to ``data_max``.
                For noise of s grey levels of 0..255 it is ``s * (data_max - data_min) / 255``.
            num_samples: Samples for each image; None for the mean.
            num_inference_steps: Noise levels of the samples, below that of the image.
            generator: One generator for the samples, or a list with one for each.
            output_type: As in the call.

        Returns:
            One image for each of the B given ones, or ``num_samples`` for each, those of the first one first.

        Raises:
            ValueError: A ``sigma`` that the scheduler's SDE does not pass, or another bad argument.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        steps = check_integer("num_inference_steps", num_inference_steps, at_least=1)
        x = ProbabilityFlow(self).denoise(image, sigma, num_samples, num_steps=steps, generator=generator)
        return self.postprocess(x, output_type)

    def log_prob(
        self,
        x: Any,
        num_probes: int = 1,
        rtol: float = 3e-4,
        atol: float = 3e-4,
        trace: str = "resampled",
        generator: Generators = None,
    ) -> LogProb:
        """Log-density in nats of continuous data in the network's range; see ``ProbabilityFlow.log_prob``.

        ``trace`` and ``num_probes`` are those of ``TraceOptions``.
        """
        flow = ProbabilityFlow(self)
        return flow.log_prob(
            x,
            trace=TraceOptions(trace, num_probes),
            options=flow.options(rtol, atol),
            generator=generator,
            progress_bar=self._shows_progress,
        )

    def bits_per_dim(
        self,
        images: Any,
        value_range: tuple[float, float] | None = None,
        dequantization: str = "uniform",
        importance_samples: int = 1,
        num_probes: int = 1,
        rtol: float = 3e-4,
        atol: float = 3e-4,
        trace: str = "resampled",
        generator: Generators = None,
    ) -> BitsPerDim:
        """Bits per dimension of images; see ``ProbabilityFlow.bits_per_dim``, which has further options.

        A network on latents has no such number: ``latent_bits_per_dim`` is that of the density of its latents.

        At the default tolerances an image costs 20 to 30 network calls with derivatives, each as long as three without,
        for each of ``importance_samples``. A line of the log says how many there were.
        """
        flow = ProbabilityFlow(self)
        return flow.bits_per_dim(
            images,
            value_range=value_range,
            dequantization=dequantization,
            importance_samples=importance_samples,
            trace=TraceOptions(trace, num_probes),
            options=flow.options(rtol, atol),
            generator=generator,
            progress_bar=self._shows_progress,
        )

    def latent_bits_per_dim(
        self,
        images: Any,
        num_probes: int = 1,
        rtol: float = 3e-4,
        atol: float = 3e-4,
        trace: str = "resampled",
        generator: Generators = None,
    ) -> Tensor:
        """Return -log2 p(x_0) / d of the d latents x_0 of each image, shape (B,); see ``ProbabilityFlow``.

        This is a density of latents in the scale in which the network sees them. It compares networks on the same
        autoencoder, may be negative, and says nothing of bits per pixel.
        """
        flow = ProbabilityFlow(self)
        return flow.latent_bits_per_dim(
            images,
            trace=TraceOptions(trace, num_probes),
            options=flow.options(rtol, atol),
            generator=generator,
            progress_bar=self._shows_progress,
        )
