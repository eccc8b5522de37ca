"""What the conditional pipelines share: inputs, the network as a denoiser, and a run of the scheduler's rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..basics.checks import check_choice, check_generators, check_tensor
from ..basics.noise import Generators
from ..guidance.replacement import Replacement, renoise, resampled
from ..networks.denoisers import Denoiser, call_network
from ..sampling.adaptive import SDEOptions, sample_adaptive
from ..sampling.solution import SolverError
from ..schedulers import SDEScheduler
from ..schedulers.conversion import config_of, fitting_class
from .base import SharedPipeline
from .probability_flow import ProbabilityFlow, Progress, as_tensor, check_sides

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]
Model = Callable[[Tensor, int, Tensor], Tensor]
"""(x_t, index of the row, timestep) -> network output."""


def check_run(pipe: SharedPipeline, output_type: str, sampler: str, callback: Callback | None) -> SDEScheduler:
    """The pipeline's scheduler, after a look at what every call takes.

    Raises:
        ValueError: An unknown output type, a callback for an adaptive method, or a foreign scheduler.
    """
    check_choice("output_type", output_type, OUTPUT_TYPES)
    check_callback(callback, sampler)
    if not isinstance(pipe.scheduler, SDEScheduler):
        raise ValueError(
            f"scheduler must be one of this package's, got {type(pipe.scheduler).__name__}: convert it by "
            f"{fitting_class(config_of(pipe.scheduler))}.from_config(pipe.scheduler.config)."
        )
    return pipe.scheduler


def arguments_of_step(scheduler: Any, generator: Generators) -> dict[str, Any]:
    """What ``scheduler.step`` takes beside output, timestep and sample; stock schedulers differ in it.

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
    """Raise a ValueError unless the callback can be called, by a method that has common steps."""
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end must be a function or None, got {callback!r}.")
    if callback is not None and method != "scheduler":
        raise ValueError(f"callback_on_step_end does not exist for {method!r}: images have steps of their own.")


def after_step(callback: Callback | None, pipe: SharedPipeline, index: int, timestep: Tensor, x: Tensor) -> Tensor:
    """The sample, or what the callback puts in its place.

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
    """Shape of latents that say themselves how many and how large the images are.

    Raises:
        ValueError: No tensor, or one of another number of axes or channels.
    """
    return tuple(check_tensor("latents", latents, (None, pipe.unet.config.in_channels, None, None)).shape)


def starting_noise(pipe: SharedPipeline, shape: tuple[int, ...], generator: Any, latents: Tensor | None) -> Tensor:
    """The latents, or unit noise where they are None: float32, on the pipeline's device.

    Args:
        pipe: The pipeline.
        shape: (B, C, H, W).
        generator: One generator, or one for each image.
        latents: Of that shape.

    Raises:
        ValueError: Something does not fit; nothing has been drawn then.
    """
    generator = check_generators(generator, shape[0])
    check_sides(pipe.unet, shape, "latents")
    if latents is None:
        return randn_tensor(shape, generator=generator, device=pipe._execution_device)
    return check_tensor("latents", latents, shape).to(device=pipe._execution_device, dtype=torch.float32)


def data_tensor(pipe: SharedPipeline, images: Any, name: str) -> Tensor:
    """Images in the network's range, float32, shape (B, C, H, W), on the pipeline's device.

    PIL images and uint8 data are scaled, floating-point data are in the network's range already.
    """
    x = as_tensor(images, name)
    if x.ndim == 3:
        x = x[None]
    check_tensor(name, x, (None,) * 4, finite=False)
    if not x.is_floating_point():
        if x.dtype != torch.uint8:
            raise ValueError(f"{name} must be uint8 or floating-point, got {x.dtype}.")
        low, high = pipe.config.data_min, pipe.config.data_max
        x = low + (high - low) * (x.to(torch.float64) / 255.0)
    return x.to(device=pipe._execution_device, dtype=torch.float32)


def network_output(pipe: SharedPipeline, scheduler: SDEScheduler) -> Model:
    """The network as ``SDEPipeline`` calls it."""

    def model(x: Tensor, index: int, timestep: Tensor) -> Tensor:
        fed = scheduler.scale_model_input(x, timestep).to(pipe.unet.dtype)
        output: Tensor = pipe.unet(fed, timestep, **pipe.unconditional(len(x)), return_dict=False)[0]
        return output.to(x.dtype)

    return model


def unet_denoiser(pipe: SharedPipeline, scheduler: SDEScheduler, **arguments: Any) -> Denoiser:
    """(x_t, SDE time) -> x0_hat of the network, in the precision of x_t; unconditional without ``arguments``."""

    def network(x: Tensor, timestep: Tensor, **arguments: Any) -> Tensor:
        arguments = arguments or pipe.unconditional(len(x))
        return call_network(pipe.unet, x.to(pipe.unet.dtype), timestep.float(), **arguments).to(x.dtype)

    return scheduler.denoiser(network, **arguments)


def guided_output(scheduler: SDEScheduler, denoiser: Denoiser) -> Model:
    """The network output for which x0_hat is what the denoiser returns."""

    def model(x: Tensor, index: int, timestep: Tensor) -> Tensor:
        precise = torch.float32 if x.device.type == "mps" else torch.float64
        t = torch.tensor(scheduler.rows[index].t, dtype=precise, device=x.device)
        x0_hat = denoiser(x, t)
        return scheduler.parametrization.from_x0(x0_hat, x, scheduler.sde.alpha(t), scheduler.sde.sigma(t))

    return model


def execute_adaptive(
    pipe: SharedPipeline,
    method: str,
    latents: Tensor,
    rtol: float,
    atol: float,
    generator: Generators = None,
    denoiser: Denoiser | None = None,
    conditioning: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Integrate the probability-flow ODE or the reverse SDE from unit noise, each image with adaptive steps of its own.

    Args:
        pipe: The pipeline; its ``calls`` tell what each image cost.
        method: ``ode`` or ``sde``, the latter with the scheduler's ``stochasticity`` (None is 1) and
            ``sampling_eps``.
        latents: Unit noise, shape (B, C, H, W).
        rtol: Relative tolerance.
        atol: Absolute tolerance; of ``ode`` in standard deviations of the state, of ``sde`` in units of the data.
        generator: Noise of ``sde``.
        denoiser: (x_t, t, **conditioning) -> x0_hat, instead of the network.
        conditioning: Its arguments with one row per image.

    Returns:
        The sample in the data's range.

    Raises:
        SolverError: The solver gives up; the message says what to do.
    """
    flow = ProbabilityFlow(pipe, denoiser=denoiser)
    latents, config = latents.to(device=pipe._execution_device, dtype=torch.float32), flow.scheduler.config
    try:
        if method == "ode":
            solution = flow.sample(
                latents,
                options=flow.options(rtol, atol),
                denoise_final=config.denoise_final,
                conditioning=conditioning,
                progress_bar=pipe._shows_progress,
            )
        else:
            with Progress(pipe._shows_progress, len(latents), "reverse SDE") as progress:
                stochasticity = 1.0 if config.stochasticity is None else config.stochasticity
                solution = sample_adaptive(
                    flow.denoiser,
                    flow.sde,
                    latents * flow.sde.prior_std,
                    SDEOptions(rtol, atol, stochasticity=stochasticity),
                    t_min=flow.scheduler.last_time(),
                    denoise_final=config.denoise_final,
                    conditioning=conditioning,
                    generator=generator,
                    progress=progress,
                )
    except SolverError as error:
        raise SolverError(
            f"{error} If the network itself is sound, take larger tolerances than rtol={rtol:g} and atol={atol:g}, or "
            "the scheduler's own steps, which always end. A network that is hardly trained may need either."
        ) from error
    pipe._calls, pipe._num_timesteps = solution.calls, int(solution.calls.max())
    return solution.sample


def execute(
    pipe: SharedPipeline,
    scheduler: SDEScheduler,
    model: Model,
    latents: Tensor,
    num_inference_steps: int,
    generator: torch.Generator | list[torch.Generator] | None,
    replacement: Replacement | None = None,
    resamplings: int = 1,
    jump_length: int = 1,
    callback: Callback | None = None,
) -> Tensor:
    """Run the scheduler's rows from unit noise, as ``SDEPipeline`` does.

    Args:
        pipe: For its progress bar, and the callback's first argument.
        scheduler: Whose rows to run.
        model: Called once for each row.
        latents: Unit noise, shape (B, C, H, W).
        num_inference_steps: Noise levels.
        generator: Noise of the rows.
        replacement: Known entries, put in after each row.
        resamplings: See ``guidance.resampled``; needs ``replacement``.
        jump_length: Likewise.
        callback: As in ``SDEPipeline``.

    Returns:
        The sample in the data's range.
    """
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
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
            x = scheduler.step(output, timesteps[i], x, generator=generator, return_dict=False)[0]
            s = rows[i].s
            if replacement is not None:
                x = replacement(x, s)
                if back_to is not None and s is not None:
                    x = renoise(scheduler.sde, x, s, back_to, replacement.generator)
            x = after_step(callback, pipe, call, timesteps[i], x)
            progress_bar.update()
    return x
