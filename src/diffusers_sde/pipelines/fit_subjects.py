"""A pipeline's sampler with parameters, and the two ways to draw with it: its network alone, or its own loop."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..basics.checks import check_number
from ..basics.networks import traits_of
from ..fitting.families import PlanFamily
from ..fitting.features import MiddleFeatures, middle_of
from ..fitting.simulation import simulate
from ..fitting.targets import Batch
from ..images.arrays import as_batch, in_network_range
from ..networks.denoisers import Denoiser
from ..sampling.rows import Plan
from ..sampling.time_grids import whole_timesteps
from ..schedulers import SDEScheduler
from .pipeline_class_conditional import ClassConditionalSDEPipeline
from .pipeline_text import TextSDEPipeline
from .probability_flow import ProbabilityFlow, network_of

FEWEST_IMAGES = 50
FEATURE_NOISE = 0.4  # sigma/alpha that the network is told where its features are read, in units of the data's spread
TOLD = ("prompt", "negative_prompt", "guidance_scale", "guidance_interval")  # of a text pipeline of this package


def is_told_captions(pipe: Any) -> bool:
    """Whether a pipeline's call takes prompts."""
    return hasattr(pipe, "text_encoder") or hasattr(pipe, "prompt_encoder")


class FitSubject(ABC):
    """A pipeline's sampler with parameters, and a way to draw with it.

    Attributes:
        network: The network.
        family: The plans.
        shape: Of one sample.
        evaluations: Images that the network was called for, so far.
        in_bf16: Whether the network computes in bfloat16 where gradients pass through it.
    """

    in_bf16 = False

    def __init__(
        self,
        pipe: Any,
        scheduler: SDEScheduler,
        levels: int,
        guidance_scale: float,
        class_labels: Any,
        call: Mapping[str, Any] | None,
        parts: tuple[str, ...],
        checkpointing: bool,
        batch_size: int,
    ) -> None:
        self.pipe, self.scheduler, self.levels, self.call = pipe, scheduler, levels, dict(call or {})
        self.checkpointing, self.batch_size = checkpointing, batch_size
        self.evaluations = 0
        self.network: Any = network_of(pipe)
        self.device = getattr(pipe, "_execution_device", getattr(pipe, "device", torch.device("cpu")))
        self.shape = self._sample_shape()
        self.is_latent = any(getattr(pipe, name, None) is not None for name in ("vae", "vqvae", "movq"))
        self.data_range = (
            float(getattr(pipe.config, "data_min", -1.0)),
            float(getattr(pipe.config, "data_max", 1.0)),
        )
        low, high = self.data_range
        usual = 1.0 if self.is_latent else 0.25 * (high - low)
        self.family = self._family(parts, scheduler.config.data_std or usual)
        self.labels = self._prepare(guidance_scale, class_labels)

    @abstractmethod
    def _prepare(self, guidance_scale: float, class_labels: Any) -> Tensor | None:
        """Make ready to draw; return the classes to draw from."""

    def features(self, images: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What the network makes of images, (B, ...) -> (B, C), where that can be asked; ``images`` are examples."""
        return None

    @abstractmethod
    def draw(self, plan: Plan, times: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """Samples of a plan, shape of ``batch.noise``."""

    def _sample_shape(self) -> tuple[int, ...]:
        if hasattr(self.pipe, "sample_shape"):
            return tuple(self.pipe.sample_shape)
        traits = traits_of(self.network)
        if traits.channels is None or traits.sides is None:
            raise ValueError("pipe must have a network whose config states in_channels and sample_size.")
        return (traits.channels, *traits.sides)

    def _family(self, parts: tuple[str, ...], data_std: float) -> PlanFamily:
        scheduler, config = self.scheduler, self.scheduler.config
        times = scheduler.sampling_times(self.levels)
        snap, sde, conditioning = None, scheduler.sde, scheduler.conditioning
        if conditioning.name == "discrete":
            parts = tuple(part for part in parts if part != "inputs")
            fed = conditioning.timestep(sde, times)
            if config.time_grid in (None, "blended") and bool(((fed - fed.round()).abs() < 1e-6).all()):
                entries = config.num_train_timesteps
                snap = lambda t: conditioning.time(sde, whole_timesteps(conditioning.timestep(sde, t), entries))  # noqa: E731
        return PlanFamily(
            sde,
            times,
            scheduler.own_predictor,
            config.corrector,
            config.correct_steps,
            config.snr,
            scheduler.own_stochasticity,
            config.denoise_final,
            scheduler.own_final_time,
            data_std,
            snap,
            parts,
        )

    def simulator(self, parameters: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """See ``fitting.fit.Simulator``."""
        family = self.family
        return self.draw(family.plan(parameters), family.level_times(parameters).detach(), batch, generator)

    def references(self, data: Any) -> Tensor:
        """Images as the network's data, float32, shape (N, ...)."""
        images = as_batch(data, "data")
        if self.is_latent:
            encoder = getattr(self.pipe, "encoder", None)
            if encoder is None or images.is_floating_point():
                raise ValueError("data must be None, or integers in 0..255 for an SDEPipeline, where there is a vae.")
            x = torch.cat([encoder.encode(part.to(self.device)) for part in images.split(self.batch_size)])
        else:
            x = in_network_range(images, *self.data_range, name="data").to(self.device, torch.float32)
        if tuple(x.shape[1:]) != self.shape or not bool(torch.isfinite(x).all()) or len(x) < FEWEST_IMAGES:
            raise ValueError(
                f"data must hold at least {FEWEST_IMAGES} finite images that give shape {self.shape}, got "
                f"{tuple(x.shape)}."
            )
        return x


class DenoisedSubject(FitSubject):
    """A network that is called as its pipeline calls it."""

    def _prepare(self, guidance_scale: float, class_labels: Any) -> Tensor | None:
        pipe = self.pipe
        if isinstance(pipe, TextSDEPipeline) and self.call:
            _check_left_out(guidance_scale, class_labels)
            if "prompt" not in self.call or self.call.keys() - set(TOLD):
                raise ValueError(f"call must hold prompt and otherwise {', '.join(TOLD[1:])}, got {sorted(self.call)}.")
            of_caption = pipe.denoiser(**self.call)
            prompts = self.call["prompt"]
            # Captions take the place of classes: each sample has one, by its number.
            self._denoiser = self.scheduler.tempered(lambda x, t, class_labels: of_caption(x, t, class_labels))
            return torch.arange(1 if isinstance(prompts, str) else len(prompts))
        if isinstance(pipe, ClassConditionalSDEPipeline):
            denoiser: Denoiser = pipe.denoiser(guidance_scale)
            null = pipe.config.null_class
            every = [number for number in range(pipe.num_classes) if number != null]
            numbers = every if class_labels is None else pipe.class_numbers(class_labels)
            self._denoiser = self.scheduler.tempered(denoiser)
            return torch.tensor(numbers, dtype=torch.int64)
        check_number("guidance_scale", guidance_scale, at_least=1.0, at_most=1.0)
        if class_labels is not None:
            raise ValueError("class_labels must be None for a pipeline without classes.")
        if is_told_captions(pipe):
            raise ValueError(f"call must be given for a {type(pipe).__name__}, such as call={{'prompt': ...}}.")
        self._denoiser = self.scheduler.tempered(ProbabilityFlow(pipe).denoiser)
        return None

    def draw(self, plan: Plan, times: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """See ``FitSubject``."""
        x = batch.noise * self.scheduler.init_noise_sigma
        whole = plan.table.requires_grad and torch.is_grad_enabled()
        size = len(x) if whole else self.batch_size
        self.evaluations += len(x) * len(plan)
        results = []
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            with torch.autocast(x.device.type, torch.bfloat16) if self.in_bf16 and whole else nullcontext():
                samples = simulate(
                    plan,
                    self._denoiser,
                    x[rows],
                    generator,
                    self.scheduler.bounded if self.scheduler.bounds_estimates else None,
                    self.checkpointing,
                    self.scheduler.config.langevin_norm == "batch",
                    {name: value[rows] for name, value in batch.conditioning.items()},
                )
            results.append(samples)
        return torch.cat(results)

    def features(self, images: Tensor) -> Callable[[Tensor], Tensor] | None:
        """See ``FitSubject``: those of the middle of the network, told nothing of classes or captions."""
        middle = middle_of(self.network)
        if middle is None:
            return None
        try:
            read = MiddleFeatures(middle, ProbabilityFlow(self.pipe).denoiser, self.scheduler.sde, self._feature_time())
            with torch.no_grad():
                read(images[:1])
        except ValueError:  # a network that must be told a class, or one with another kind of middle
            return None

        def features(x: Tensor) -> Tensor:
            self.evaluations += len(x)
            parts = [x] if x.requires_grad else x.split(self.batch_size)
            return torch.cat([read(part) for part in parts])

        return features

    def _feature_time(self) -> Tensor:
        """The time at which features are read, one that the network knows."""
        family = self.family
        t = family.sde.time_of(family.times.new_tensor(-2.0 * math.log(FEATURE_NOISE * family.data_std)).reshape(1))
        t = t.clamp(family.times.min(), family.times.max())
        return (t if family.snap is None else family.snap(t))[0]


class CalledSubject(FitSubject):
    """A pipeline that is run through its own loop."""

    def _prepare(self, guidance_scale: float, class_labels: Any) -> Tensor | None:
        _check_left_out(guidance_scale, class_labels)
        taken = {"latents", "num_inference_steps", "output_type", "generator"} & self.call.keys()
        if taken:
            raise ValueError(f"call must not hold {', '.join(sorted(taken))}, which the fit chooses.")
        return None

    def draw(self, plan: Plan, times: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """See ``FitSubject``."""
        return self.run(self.scheduler.with_plan(plan, times), len(times), batch, generator)

    def run(self, scheduler: SDEScheduler, levels: int, batch: Batch, generator: torch.Generator) -> Tensor:
        """Latents that the pipeline draws with a scheduler."""
        results = []
        with _scheduler_of(self.pipe, scheduler):
            for start in range(0, len(batch.noise), self.batch_size):
                noise = batch.noise[start : start + self.batch_size]
                output = self.pipe(
                    latents=noise.to(self.network.dtype),
                    num_inference_steps=levels,
                    output_type="latent",
                    generator=generator,
                    **self._arguments(start, len(noise)),
                )
                results.append(torch.as_tensor(output[0] if isinstance(output, tuple) else output.images).float())
                self.evaluations += len(noise) * len(scheduler.timesteps)
        return torch.cat(results)

    def _arguments(self, start: int, count: int) -> dict[str, Any]:
        """The call's arguments for images ``start`` to ``start + count``, of which each takes the next prompt."""
        arguments = {}
        for name, value in self.call.items():
            each = [value] if isinstance(value, str) else value
            takes_turns = name.startswith(("prompt", "negative_prompt")) and isinstance(each, (list, tuple))
            arguments[name] = [each[(start + i) % len(each)] for i in range(count)] if takes_turns else value
        return arguments


def _check_left_out(guidance_scale: float, class_labels: Any) -> None:
    if guidance_scale != 1.0 or class_labels is not None:
        raise ValueError("guidance_scale and class_labels must be left out with call: put them into it.")


@contextmanager
def _scheduler_of(pipe: Any, scheduler: SDEScheduler) -> Iterator[None]:
    """A pipeline with another scheduler and without its bar."""
    before, bar = pipe.scheduler, dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(**{**bar, "disable": True})
    try:
        yield
    finally:
        pipe.scheduler = before
        pipe.set_progress_bar_config(**bar)
