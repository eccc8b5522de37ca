"""Runs that draw from posteriors: what the pipelines for inpainting and for other inverse problems share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..basics.checks import check_generators
from ..basics.noise import Generators
from ..guidance.decoding import DecodedOperator
from ..guidance.methods import PosteriorMethod, PosteriorProblem
from ..guidance.operators import LinearOperator
from ..guidance.posteriors import posterior_method
from ..networks.denoisers import Denoiser
from ..sampling.exponential import Exponential
from ..sampling.planning import make_plan
from ..sampling.rows import Plan
from .base import SharedPipeline
from .encoders import downsampling_of, latent_channels_of
from .probability_flow import check_sides
from .runs import RunOptions, execute_guided, own_scheduler, sampling_with, starting_noise, unet_denoiser

# Standard deviation, for images in [-1, 1], of what no latent decodes to. To fit measurements closer than that would
# solve a system that is nearly singular.
DECODER_ERROR = 0.05


@contextmanager
def for_guided_estimates(pipe: SharedPipeline) -> Iterator[None]:
    """Let a pipeline take steps of first order for a while, where its scheduler's config leaves the order open.

    From level to level a guided x0_hat changes by leaps, as the approximation of the posterior turns from one mode to
    another. Polynomials through several of them carry the leaps on, also where scores are exact
    (benchmarks/completions.py). The correction of a step looks at its own ends alone, and stays.
    """
    config = own_scheduler(pipe).config
    if config.solver_order is not None or config.predictor != "exponential" or config.fitted_plan is not None:
        yield
        return
    with sampling_with(pipe, solver_order=1):
        yield


@dataclass(frozen=True)
class PipelineRun:
    """A pipeline with the arguments of a run implements ``PosteriorRun``, which posterior methods draw with."""

    pipe: Any
    options: RunOptions
    shape: tuple[int, ...]

    @property
    def generator(self) -> Generators:
        """Source of all noise."""
        generator: Generators = self.options.generator
        return generator

    def guided(self, denoiser_of: Callable[[Tensor], Denoiser]) -> Tensor:
        """Draw images of ``shape`` by the method that the user has chosen."""
        latents = starting_noise(self.pipe, self.options, self.shape)
        with for_guided_estimates(self.pipe):
            return execute_guided(self.pipe, self.options, latents, denoiser_of)

    def own_plan(self) -> Plan:
        """Lay out first-order exponential steps of the reverse SDE, on the scheduler's grid, ending with the data."""
        options, scheduler = self.options, own_scheduler(self.pipe)
        refused = {
            "latents": options.latents is not None,
            "callback_on_step_end": options.callback_on_step_end is not None,
            "list of generators": isinstance(options.generator, (list, tuple)),
            f"method {options.method!r}": options.method != "scheduler",
            f"temperature {scheduler.config.temperature:g}": scheduler.config.temperature != 1.0,
        }
        if any(refused.values()):
            given = ", no ".join(name for name, is_given in refused.items() if is_given)
            raise ValueError(f"this posterior moves its samples by itself, so that it takes no {given}.")
        times = scheduler.level_times(options.num_inference_steps)
        plan = make_plan(scheduler.sde, times, Exponential(1))
        self.pipe._num_timesteps = len(plan.rows)
        return plan


def draw_posterior(
    pipe: SharedPipeline,
    run: RunOptions,
    method: PosteriorMethod,
    operator: LinearOperator,
    y: Tensor,
    noise_std: float,
) -> Tensor:
    """Draw one image for each measurement, shape (B, C, H, W), in the data's range.

    Args:
        pipe: The pipeline, whose network without a condition is the prior.
        run: The sampler and its arguments.
        method: The posterior method.
        operator: A, for all B measurements.
        y: Measurements, shape (B, *operator.measurement_shape).
        noise_std: Standard deviation of their noise; through a decoder ``DECODER_ERROR`` at least.

    Raises:
        ValueError: Something does not fit; nothing has been drawn then.
    """
    check_generators(run.generator, len(y))
    scheduler = own_scheduler(pipe)
    if isinstance(operator, DecodedOperator):
        noise_std = max(noise_std, DECODER_ERROR)
    problem = PosteriorProblem(unet_denoiser(pipe, scheduler), scheduler.sde, operator, y, noise_std)
    return method.draw(problem, PipelineRun(pipe, run, (len(y), *operator.data_shape)))


def through_decoder(pipe: Any, operator: LinearOperator, method: PosteriorMethod) -> DecodedOperator:
    """Return the measurement of the images of a latent model as one of its latents.

    Args:
        pipe: The pipeline, which has an autoencoder.
        operator: A, of images (C, H, W).
        method: The posterior method, whose ``chunk_size`` bounds the memory of the decoder too.

    Raises:
        ValueError: The images are not those of the pipeline.
    """
    encoder = pipe.encoder
    chunk = getattr(method, "chunk_size", None) or encoder.chunk
    shape = latents_of_images(pipe, tuple(operator.data_shape), "operator")
    return DecodedOperator(operator, shape, encoder.decoded, encoder.encoded, chunk)


def latents_of_images(pipe: Any, image_shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """Return the shape of the latents of images (C, H, W) of a pipeline with an autoencoder.

    Raises:
        ValueError: The images have other channels, or sides that do not fit; the message begins with ``name``.
    """
    factor, channels = downsampling_of(pipe.vae), pipe.encoder.image_shape((1, 1, 1))[0]
    if len(image_shape) != 3 or image_shape[0] != channels or any(side % factor for side in image_shape[1:]):
        raise ValueError(
            f"{name} must be for images ({channels}, H, W) whose sides are multiples of {factor}, got {image_shape}."
        )
    shape = (latent_channels_of(pipe.vae), image_shape[1] // factor, image_shape[2] // factor)
    check_sides(pipe.unet, (1, *shape), f"latents of {name}")
    return shape


def posterior_of(pipe: SharedPipeline, posterior: str, options: Mapping[str, Any] | None) -> PosteriorMethod:
    """Return the posterior method of this name, for data of standard deviation a quarter of their range.

    That of latents is 1.

    Raises:
        ValueError: An unknown name or option, or a value out of range.
    """
    std = 1.0 if pipe.vae is not None else 0.25 * (pipe.config.data_max - pipe.config.data_min)
    return posterior_method(posterior, options, std, "posterior_options")
