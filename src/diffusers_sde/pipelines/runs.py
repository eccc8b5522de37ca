"""What the pipelines share: arguments, inputs, the network as a denoiser, and the ways to run it.

The file is long because every function of it serves several pipelines. ``posterior_runs`` builds on it.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from diffusers import ImagePipelineOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..basics.checks import check_choice, check_generators, check_integer, check_tensor
from ..basics.networks import traits_of
from ..basics.noise import Generators
from ..basics.precision import on_device
from ..guidance.posteriors import POSTERIOR_METHODS
from ..guidance.replacement import REPLACEMENT_METHODS, Replacement, resampled
from ..images.arrays import as_batch, from_network, in_network_range
from ..networks.denoisers import Denoiser, call_network, with_timestep
from ..sampling.adaptive import SDEOptions, sample_adaptive
from ..sampling.solution import SolverError
from ..schedulers import SDEScheduler
from ..schedulers.families import fitting_class
from ..schedulers.fitted_plans import is_same_network
from ..schedulers.stock_configs import config_of
from .base import SharedPipeline
from .probability_flow import ProbabilityFlow, Progress, check_sides

FOREIGN_FIT = (
    "The scheduler was fitted to another network than this one, or to other weights of it: fit it again, or take "
    "from_config(pipe.scheduler.config, fitted_plan=None)."
)
logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
METHODS = ("scheduler", "ode", "sde")  # ways to integrate
DEFAULT_TOLERANCE = 1e-2  # of the adaptive ones
# What other pipelines and programs call the arguments of ours.
_OTHER_NAMES = {
    "num_images": "batch_size",
    "num_images_per_prompt": "batch_size",
    "n": "batch_size",
    "steps": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "seed": "generator",
    "labels": "class_labels",
    "label": "class_labels",
    "cfg_scale": "guidance_scale",
    "mask": "mask_image",
    "callback": "callback_on_step_end",
}
Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]
Model = Callable[[Tensor, int, Tensor], Tensor]
"""(x_t, index of the row, timestep) -> network output."""
_Call = TypeVar("_Call", bound=Callable[..., Any])


def names_near_arguments(call: _Call) -> _Call:
    """Let the call of a pipeline answer an argument that it does not have with the name of the one that was meant.

    The signature stays as it is.
    """
    known = [name for name in inspect.signature(call).parameters if name != "self"]

    @functools.wraps(call)
    def checked_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            hints = []
            for name in unknown:
                other = _OTHER_NAMES.get(name)
                near = [other] if other in known else difflib.get_close_matches(name, known, 1)
                hints.append(repr(name) + (f" (did you mean {near[0]!r}?)" if near else ""))
            raise TypeError(f"{type(self).__name__} takes no argument {', '.join(hints)}. It takes {', '.join(known)}.")
        return call(self, *args, **kwargs)

    return cast(_Call, checked_call)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The arguments that the calls of all pipelines share, checked.

    Attributes:
        num_inference_steps: Noise levels.
        generator: One generator, a list with one for each image, or None.
        output_type: One of ``OUTPUT_TYPES``.
        latents: Unit noise to start from, or None to draw it.
        callback_on_step_end: Called as ``f(pipe, index, timestep, {"latents": x})`` after every network call, or None.
        return_dict: Whether an ``ImagePipelineOutput`` is returned instead of a tuple.
        method: One of ``METHODS``, the way to integrate.
        rtol: Relative tolerance of ``ode`` and ``sde``; None means ``DEFAULT_TOLERANCE``, which takes its place.
        atol: Absolute tolerance of ``ode`` and ``sde``; likewise.

    Raises:
        ValueError: An unknown output type or method, a callback that does not fit, no positive number of levels, or
            tolerances where no step is adaptive.
    """

    num_inference_steps: int
    generator: Any
    output_type: str
    latents: Any
    callback_on_step_end: Callback | None
    return_dict: bool
    method: str
    rtol: Any
    atol: Any

    def __post_init__(self) -> None:
        check_choice("output_type", self.output_type, OUTPUT_TYPES)
        check_method(self.method)
        check_callback(self.callback_on_step_end, self.method)
        check_needs_tolerances(self.method, {"rtol": self.rtol, "atol": self.atol})
        for name in ("rtol", "atol"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, DEFAULT_TOLERANCE)
        steps = check_integer("num_inference_steps", self.num_inference_steps, at_least=1)
        object.__setattr__(self, "num_inference_steps", steps)
        if isinstance(self.generator, tuple):
            object.__setattr__(self, "generator", list(self.generator))


def check_method(method: str) -> None:
    """Raise a ValueError unless this is a way to integrate."""
    if isinstance(method, str) and method in (*POSTERIOR_METHODS, *REPLACEMENT_METHODS):
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, got {method!r}, which says how to condition and not how to "
            f"integrate: pass posterior={method!r} to RestorationSDEPipeline or InpaintSDEPipeline."
        )
    check_choice("method", method, METHODS)


def check_needs_tolerances(method: str, tolerances: Mapping[str, Any]) -> None:
    """Raise a ValueError where a tolerance is given and the method has no adaptive steps that would follow it."""
    given = [name for name, value in tolerances.items() if value is not None]
    if given and method == "scheduler":
        values = ", ".join(repr(tolerances[name]) for name in given)
        raise ValueError(
            f"{' and '.join(given)} must be None for method 'scheduler', whose steps num_inference_steps fixes, got "
            f"{values}: pass method='ode' or method='sde' for adaptive steps."
        )


def samples_of_each(num_samples: Any, batch_size: Any, inputs: int, name: str) -> int:
    """How many images to draw for each of some inputs.

    Args:
        num_samples: Images for each input.
        batch_size: Images for all of them together, or None.
        inputs: How many inputs there are.
        name: What they are called, for messages.

    Raises:
        ValueError: A number that is no positive integer, a batch that the inputs do not share evenly, or both numbers.
    """
    num_samples = check_integer("num_samples", num_samples, at_least=1)
    if batch_size is None:
        return num_samples
    batch_size = check_integer("batch_size", batch_size, at_least=1)
    if num_samples not in (1, batch_size // inputs) or batch_size % inputs:
        raise ValueError(
            f"batch_size must be num_samples for each {name}, got {batch_size} for {inputs} of them and num_samples = "
            f"{num_samples}: leave one of the two out."
        )
    return batch_size // inputs


def own_scheduler(pipe: SharedPipeline) -> SDEScheduler:
    """Return the pipeline's scheduler, which must be one of this package.

    Raises:
        ValueError: It is a foreign one.
    """
    if not isinstance(pipe.scheduler, SDEScheduler):
        raise ValueError(
            f"scheduler must be one of this package's, got {type(pipe.scheduler).__name__}: convert it by "
            f"{fitting_class(config_of(pipe.scheduler))}.from_config(pipe.scheduler.config)."
        )
    return pipe.scheduler


@contextmanager
def at_temperature(pipe: SharedPipeline, temperature: float | None) -> Iterator[None]:
    """Let a pipeline draw samples at a temperature that its scheduler's config does not say, for a while.

    Args:
        pipe: The pipeline, which gets another scheduler for that while.
        temperature: That of the scheduler of this name; None for that of the config.

    Raises:
        ValueError: The scheduler is a foreign one, or the number is out of range.
    """
    if temperature is None:
        yield
        return
    with sampling_with(pipe, temperature=temperature):
        yield


@contextmanager
def sampling_with(pipe: SharedPipeline, **settings: Any) -> Iterator[None]:
    """Give a pipeline its scheduler with other settings for a while."""
    own = own_scheduler(pipe)
    pipe.scheduler = type(own).from_config(own.config, **settings)
    try:
        yield
    finally:
        pipe.scheduler = own


def warn_of_foreign_fit(pipe: SharedPipeline) -> None:
    """Log, once for each pair of scheduler and network, that the sampler was fitted to another network."""
    entry, pair = pipe.scheduler.config.get("fitted_plan"), (id(pipe.scheduler), id(pipe.unet))
    if entry is None or getattr(pipe, "_fit_of", None) == pair:
        return
    pipe._fit_of = pair
    if not is_same_network(entry["network"], pipe.unet):
        logger.warning(FOREIGN_FIT)


def arguments_of_step(scheduler: Any, generator: Generators) -> dict[str, Any]:
    """Return what ``scheduler.step`` takes beside output, timestep and sample; stock schedulers differ in it.

    Raises:
        ValueError: A scheduler that steps in another way, or needs what this pipeline does not have.
    """
    name = type(scheduler).__name__
    parameters = inspect.signature(scheduler.step).parameters if hasattr(scheduler, "step") else {}
    needed = [key for key, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if needed != ["model_output", "timestep", "sample"]:
        what = f"its step() needs {', '.join(needed[3:])}" if len(needed) > 3 else "it has no step() of the usual kind"
        raise ValueError(
            f"scheduler is a {name}, which this pipeline cannot run: {what}. Convert it by "
            f"{fitting_class(config_of(scheduler))}.from_config(pipe.scheduler.config)."
        )
    return {"generator": generator} if "generator" in parameters else {}


def check_callback(callback: Callback | None, method: str) -> None:
    """Raise a ValueError unless the callback can be called, and the method has steps that all images share."""
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end must be a function or None, got {callback!r}.")
    if callback is not None and method != "scheduler":
        raise ValueError(f"callback_on_step_end does not exist for {method!r}: images have steps of their own.")


def after_step(callback: Callback | None, pipe: SharedPipeline, index: int, timestep: Tensor, x: Tensor) -> Tensor:
    """Call the callback, and return the sample or what the callback puts in its place.

    Raises:
        ValueError: A replacement of another shape.
    """
    if callback is None:
        return x
    replaced = (callback(pipe, index, timestep, {"latents": x}) or {}).get("latents", x)
    if not isinstance(replaced, Tensor) or replaced.shape != x.shape:
        shape = tuple(replaced.shape) if isinstance(replaced, Tensor) else type(replaced).__name__
        raise ValueError(f"callback_on_step_end must return latents of shape {tuple(x.shape)}, got {shape}.")
    return replaced


def latents_shape(pipe: SharedPipeline, latents: Any) -> tuple[int, ...]:
    """Return the shape of latents, which say how many and how large the images are.

    Raises:
        ValueError: No tensor, or one of another number of axes or channels.
    """
    return tuple(check_tensor("latents", latents, (None, traits_of(pipe.unet).channels, None, None)).shape)


def starting_noise(pipe: SharedPipeline, run: RunOptions, shape: tuple[int, ...]) -> Tensor:
    """Return the run's latents, or unit noise where they are None: float32, on the pipeline's device.

    Args:
        pipe: The pipeline.
        run: The latents and the generators.
        shape: (B, C, H, W).

    Raises:
        ValueError: Something does not fit; nothing has been drawn then.
    """
    generator = check_generators(run.generator, shape[0])
    check_sides(pipe.unet, shape, "latents")
    if run.latents is None:
        return randn_tensor(shape, generator=generator, device=pipe._execution_device)
    return check_tensor("latents", run.latents, shape).to(device=pipe._execution_device, dtype=torch.float32)


def image_data(pipe: SharedPipeline, images: Any, name: str) -> Tensor:
    """Return images in the network's range, or in [-1, 1] for an autoencoder: float32 (B, C, H, W), on the device.

    Args:
        pipe: The pipeline.
        images: PIL images, arrays or tensors: integers 0..255, or floating-point data in the network's range.
        name: Name of the argument, for messages.

    Raises:
        ValueError: Something else.
    """
    x = as_batch(images, name)
    x = check_tensor(name, x[None] if x.ndim == 3 else x, (None,) * 4, finite=False)
    # An autoencoder sees images in [-1, 1], whatever its latents are.
    low, high = (-1.0, 1.0) if pipe.vae is not None else (pipe.config.data_min, pipe.config.data_max)
    x = in_network_range(x, low, high, name)
    return x.to(device=pipe._execution_device, dtype=torch.float32)


def network_output(pipe: SharedPipeline, scheduler: SDEScheduler) -> Model:
    """Return a function that calls the network as ``SDEPipeline`` does."""

    def model(x: Tensor, index: int, timestep: Tensor) -> Tensor:
        fed = scheduler.scale_model_input(x, timestep).to(pipe.unet.dtype)
        times = timestep.to(x.device).expand(len(x))
        output: Tensor = with_timestep(pipe.unet, fed, times, **pipe.unconditional(len(x)), return_dict=False)[0]
        return output.to(x.dtype)

    return model


def unet_denoiser(pipe: SharedPipeline, scheduler: SDEScheduler, **arguments: Any) -> Denoiser:
    """Return (x_t, SDE time) -> x0_hat of the network, in x_t's precision, unconditional without ``arguments``."""

    def network(x: Tensor, timestep: Tensor, **arguments: Any) -> Tensor:
        arguments = arguments or pipe.unconditional(len(x))
        return call_network(pipe.unet, x.to(pipe.unet.dtype), timestep.float(), **arguments).to(x.dtype)

    return scheduler.denoiser(network, **arguments)


def guided_output(scheduler: SDEScheduler, denoiser: Denoiser) -> Model:
    """Return a function that gives the network output for which x0_hat is what the denoiser returns."""

    def model(x: Tensor, index: int, timestep: Tensor) -> Tensor:
        t = on_device(scheduler.rows[index].t, x.device)
        x0_hat = denoiser(x, t)
        return scheduler.parametrization.from_x0(x0_hat, x, scheduler.sde.alpha(t), scheduler.sde.sigma(t))

    return model


def execute_adaptive(
    pipe: SharedPipeline,
    run: RunOptions,
    latents: Tensor,
    denoiser: Denoiser | None = None,
    conditioning: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Integrate the probability-flow ODE or the reverse SDE from unit noise, each image with adaptive steps of its own.

    Args:
        pipe: The pipeline; its ``calls`` tell what each image cost.
        run: The method, ``ode`` or ``sde``, its tolerances and the noise. Both take the scheduler's
            ``temperature``; ``sde`` takes its ``stochasticity`` (None is 1) and ``sampling_eps``.
        latents: Unit noise, shape (B, C, H, W).
        denoiser: (x_t, t, **conditioning) -> x0_hat, instead of the network.
        conditioning: Its arguments with one row per image.

    Returns:
        The sample in the data's range.

    Raises:
        SolverError: The solver gives up; the message says what to do.
    """
    flow = ProbabilityFlow(pipe, denoiser=denoiser)
    config = flow.scheduler.config
    try:
        if run.method == "ode":
            solution = flow.sample(
                latents,
                options=flow.options(run.rtol, run.atol),
                denoise_final=config.denoise_final,
                conditioning=conditioning,
                progress_bar=pipe._shows_progress,
            )
        else:
            with Progress(pipe._shows_progress, len(latents), "reverse SDE") as progress:
                stochasticity = 1.0 if config.stochasticity is None else config.stochasticity
                if isinstance(stochasticity, list) or config.policy or config.stochastic_indices:
                    raise ValueError(
                        "method 'sde' chooses its own steps: it takes one stochasticity, and no list of them, policy "
                        "or window of steps."
                    )
                solution = sample_adaptive(
                    flow.sampling_denoiser,
                    flow.sde,
                    latents * flow.sde.prior_std,
                    SDEOptions(run.rtol, run.atol, stochasticity=stochasticity),
                    t_min=flow.scheduler.last_time(),
                    denoise_final=config.denoise_final,
                    conditioning=conditioning,
                    generator=run.generator,
                    progress=progress,
                )
    except SolverError as error:
        raise SolverError(
            f"{error} If the network itself is sound, take larger tolerances than rtol={run.rtol:g} and "
            f"atol={run.atol:g}, or the scheduler's own steps, which always end. A network that is hardly trained may "
            "need either."
        ) from error
    pipe._calls, pipe._num_timesteps = solution.calls, int(solution.calls.max())
    return solution.sample


def execute(
    pipe: SharedPipeline,
    run: RunOptions,
    scheduler: SDEScheduler,
    model: Model,
    latents: Tensor,
    replacement: Replacement | None = None,
    resamplings: int = 1,
    jump_length: int = 1,
) -> Tensor:
    """Run the scheduler's rows from unit noise, as ``SDEPipeline`` does.

    Args:
        pipe: The pipeline, for its progress bar and as the callback's first argument.
        run: The noise levels, the noise of the rows, and the callback.
        scheduler: The scheduler whose rows are run.
        model: The function that is called once for each row.
        latents: Unit noise, shape (B, C, H, W).
        replacement: Known entries, which are put in after each row.
        resamplings: See ``guidance.resampled``; needs ``replacement``.
        jump_length: See ``guidance.resampled``.

    Returns:
        The sample in the data's range.
    """
    warn_of_foreign_fit(pipe)
    scheduler.set_timesteps(run.num_inference_steps, device=latents.device)
    scheduler.set_begin_index(0)
    rows, timesteps = scheduler.rows, scheduler.timesteps
    order = list(resampled(rows, resamplings, jump_length))
    x = latents * scheduler.init_noise_sigma
    if replacement is not None:
        x = replacement(x, rows[0].t)
    pipe._num_timesteps = len(order)
    with pipe.progress_bar(total=len(order)) as progress_bar:
        for call, (i, back_to) in enumerate(order):
            if call and i != order[call - 1][0] + 1:
                scheduler.jump_to(i)
            output = model(x, i, timesteps[i])
            x = scheduler.step(output, timesteps[i], x, generator=run.generator, return_dict=False)[0]
            if replacement is not None:
                x = replacement.after(x, rows[i].s, back_to)
            x = after_step(run.callback_on_step_end, pipe, call, timesteps[i], x)
            progress_bar.update()
    return x


def execute_guided(
    pipe: SharedPipeline, run: RunOptions, latents: Tensor, denoiser_of: Callable[[Tensor], Denoiser]
) -> Tensor:
    """Draw with guided denoisers by the run's method: the scheduler's rows, or adaptive steps.

    Args:
        pipe: The pipeline.
        run: The method and its arguments.
        latents: Unit noise, shape (B, C, H, W).
        denoiser_of: It maps an index of images, int64 (n,), to their denoiser. Adaptive steps call the network for some
            of the images only.

    Returns:
        The sample in the data's range.
    """
    everything = torch.arange(len(latents), device=latents.device)
    if run.method == "scheduler":
        scheduler = own_scheduler(pipe)
        return execute(pipe, run, scheduler, guided_output(scheduler, denoiser_of(everything)), latents)

    def denoiser(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        return denoiser_of(index)(x, t)

    return execute_adaptive(pipe, run, latents, denoiser, {"index": everything})


def finished(
    pipe: Any, run: RunOptions, x: Tensor, known: tuple[Tensor, Tensor] | None = None
) -> ImagePipelineOutput | tuple[Any]:
    """Return what a call returns for a sample in the data's range, and move models back that the run has moved.

    Args:
        pipe: The pipeline.
        run: The form of the output.
        x: The sample.
        known: Pixels in [-1, 1] and where they are known, to be put into the images that an autoencoder decodes.
    """
    if known is None or run.output_type == "latent":
        images = pipe.postprocess(x, run.output_type)
    else:
        pixels, mask = known
        images = pipe._as_output(
            torch.where(mask, from_network(pixels, -1.0, 1.0), pipe.encoder.decode(x)), run.output_type
        )
    pipe.maybe_free_model_hooks()
    return ImagePipelineOutput(images=images) if run.return_dict else (images,)
