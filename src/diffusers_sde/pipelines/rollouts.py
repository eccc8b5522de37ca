"""Rollouts: samples with the states and log-probabilities on their way, and their replay with gradients.

A policy gradient needs three things of a sampler: the states x_t and x_s of every stochastic step, log p(x_s | x_t)
under the weights that have drawn them, and the same log-probability under other weights. States may be stored in half
precision. They are rounded *before* they are scored and before sampling goes on, so that the ratio of probabilities is
exactly 1 as long as nothing has changed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..basics.checks import check_choice
from ..basics.noise import Generators
from ..basics.precision import on_device
from ..networks.denoisers import Denoiser, with_timestep
from ..sampling.rows import Row
from ..sampling.transitions import REDUCTIONS, Transition
from ..schedulers import SDEScheduler
from ..sdes import expand_like
from .pipeline_class_conditional import ClassConditionalSDEPipeline
from .pipeline_sde import SDEPipeline
from .pipeline_text import TextSDEPipeline

GUIDANCE_ARGUMENTS = ("guidance_scale", "classifier_guidance_scale", "guidance_interval", "negative_prompt")
STORAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class RolloutSteps:
    """Steps of a rollout, one for each of n rows.

    Attributes:
        x_t: States in front of the steps, shape (n, ...), in the precision in which the network saw them.
        x_s: States behind them, same shape.
        timestep: The entries of ``scheduler.timesteps`` that the network was called with, shape (n,).
        index: Their places in ``scheduler.timesteps``, of length n.
        samples: Number of the sample that each row belongs to, int64, shape (n,).
        log_prob: log p(x_s | x_t) under the weights that have drawn the rollout, shape (n,).
    """

    x_t: Tensor
    x_s: Tensor
    timestep: Tensor
    index: tuple[int, ...]
    samples: Tensor
    log_prob: Tensor


RolloutModel = Callable[[RolloutSteps], Tensor]
"""Network output for ``x_t`` of these steps, shape (n, ...): what the pipeline hands to ``scheduler.step``."""


@dataclass(frozen=True)
class Rollout:
    """Samples, and what a policy gradient needs of the way to them.

    Attributes:
        output: What the pipeline returned.
        x_t: States in front of each of K stochastic steps, of shape (B, ...), as they are stored. The state that the
            pipeline starts from is kept in its own precision, because the network has seen it so.
        x_s: States behind each of them, in the storage precision.
        log_probs: log p(x_s | x_t), shape (K, B), float32 or float64.
        indices: Places of the steps in ``scheduler.timesteps``, of length K.
        scheduler: The scheduler with the plan of this rollout, a copy that other runs of the pipeline do not change.
        dtype: Precision in which the pipeline holds its states.
        reduction: That of ``log_probs``; see ``Transition.log_prob``.
        arguments: What the pipeline was called with.
    """

    output: Any
    x_t: tuple[Tensor, ...]
    x_s: tuple[Tensor, ...]
    log_probs: Tensor
    indices: tuple[int, ...]
    scheduler: SDEScheduler
    dtype: torch.dtype
    reduction: str
    arguments: Mapping[str, Any]

    def __len__(self) -> int:
        """K, the number of stochastic steps."""
        return len(self.indices)

    @property
    def batch_size(self) -> int:
        """B, the number of samples."""
        return len(self.x_t[0])

    def steps(
        self, numbers: int | Sequence[int] | Tensor, samples: Sequence[int] | Tensor | None = None
    ) -> RolloutSteps:
        """Gather steps, for trainers that shuffle them.

        Args:
            numbers: Which of the K steps: one number, or one for each row.
            samples: Which of the B samples, one for each row; None for all of them in their order.

        Raises:
            ValueError: A number out of range, or lists of different lengths.
        """
        rows = torch.arange(self.batch_size) if samples is None else torch.as_tensor(samples).cpu().reshape(-1)
        k = torch.as_tensor(numbers).cpu().reshape(-1)
        if len(k) not in (1, len(rows)) or not _within(k, len(self)) or not _within(rows, self.batch_size):
            raise ValueError(
                f"numbers and samples must be integers below {len(self)}, the steps, and {self.batch_size}, the "
                f"samples, and equally many; got {k.tolist()} and {rows.tolist()}."
            )
        k = k.expand(len(rows))
        index = tuple(self.indices[i] for i in k.tolist())
        device = self.log_probs.device
        return RolloutSteps(
            x_t=self._gathered(self.x_t, k, rows),
            x_s=self._gathered(self.x_s, k, rows),
            timestep=self.scheduler.timesteps[list(index)],
            index=index,
            samples=rows.to(device=device, dtype=torch.int64),
            log_prob=self.log_probs[k.to(device), rows.to(device)],
        )

    def _gathered(self, states: Sequence[Tensor], k: Tensor, rows: Tensor) -> Tensor:
        """States of steps k of samples ``rows``, both of shape (n,)."""
        device = states[0].device
        gathered = torch.empty((len(rows), *states[0].shape[1:]), dtype=self.dtype, device=device)
        for i in k.unique().tolist():
            own = (k == i).nonzero()[:, 0]
            gathered[own.to(device)] = states[i][rows[own].to(device)].to(self.dtype)
        return gathered

    def transition(self, steps: RolloutSteps, model_output: Tensor) -> Transition:
        """The law p(x_s | x_t) of these steps for a network output, with gradients; see ``SDEScheduler.transition``."""
        return self.scheduler.transition(model_output, steps.timestep, steps.x_t, index=steps.index)

    def replay(
        self,
        model: RolloutModel,
        numbers: int | Sequence[int] | Tensor,
        samples: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities of steps under the weights that ``model`` has now, shape (n,), with gradients.

        With unchanged weights they are those of the rollout: bit for bit for the whole batch at one step, and for
        other batches as far as the network's arithmetic does not depend on a sample's batch mates.

        Args:
            model: It calls the network; for pipelines of this package ``rollout_model`` gives it.
            numbers: See ``steps``.
            samples: See ``steps``.
        """
        steps = self.steps(numbers, samples)
        return self.transition(steps, model(steps)).log_prob(steps.x_s, self.reduction)


def collect_rollout(
    pipe: Any, storage: torch.dtype = torch.float32, reduction: str = "mean", **arguments: Any
) -> Rollout:
    """Call a pipeline and record its stochastic steps.

    Args:
        pipe: A pipeline of this package, or of diffusers, with one of this package's schedulers, whose steps look back
            on nothing, such as ``policy="exact"``. Its ``scheduler.step`` is wrapped while the call lasts.
        storage: Precision in which states are stored. Every state behind a step is rounded to it before it is scored
            and before sampling goes on, so that images depend on it.
        reduction: See ``Transition.log_prob``.
        **arguments: They are passed on to the pipeline, which refuses what it does not know.

    Raises:
        ValueError: The scheduler is a foreign one, it has no step with a density, or its steps look back on earlier
            ones, so that a state alone does not say what comes next.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if not isinstance(scheduler, SDEScheduler):
        raise ValueError(
            f"pipe.scheduler must be one of this package's, got {type(scheduler).__name__}: only they know the density "
            "of a step."
        )
    check_choice("reduction", reduction, REDUCTIONS[:2])
    if storage not in STORAGE_DTYPES:
        raise ValueError(f"storage must be one of {', '.join(map(str, STORAGE_DTYPES))}, got {storage!r}.")
    recorder = _Recorder(scheduler, storage, reduction)
    attributes = scheduler.__dict__
    step_of_before = attributes.get("step")
    attributes["step"] = recorder.wrapped()
    try:
        with torch.no_grad():
            output = pipe(**arguments)
    finally:
        if step_of_before is None:
            del attributes["step"]
        else:
            attributes["step"] = step_of_before
    if not recorder.indices:
        raise ValueError("the pipeline has taken no step that has a density: see scheduler.stochastic_steps.")
    kept = copy.copy(scheduler)
    kept.jump_to(0)  # forgets what the sampler has stored
    return Rollout(
        output=output,
        x_t=tuple(recorder.x_t),
        x_s=tuple(recorder.x_s),
        log_probs=torch.stack(recorder.log_probs),
        indices=tuple(recorder.indices),
        scheduler=kept,
        dtype=recorder.dtype,
        reduction=reduction,
        arguments=dict(arguments),
    )


class _Recorder:
    """What a scheduler's ``step`` does while a rollout is recorded."""

    def __init__(self, scheduler: SDEScheduler, storage: torch.dtype, reduction: str) -> None:
        self._scheduler, self._storage, self._reduction = scheduler, storage, reduction
        self._stochastic: frozenset[int] = frozenset()
        # The last state that the pipeline was given, and how it is stored.
        self._given: Tensor | None = None
        self._stored: Tensor | None = None
        self.dtype = torch.float32
        self.x_t: list[Tensor] = []
        self.x_s: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        self.indices: list[int] = []

    def wrapped(self) -> Callable[..., Any]:
        """The ``step`` that takes the place of the scheduler's; pipelines look at its arguments."""
        step: Callable[..., Any] = self._scheduler.step

        @functools.wraps(step)
        def recorded(
            model_output: Tensor,
            timestep: Any,
            sample: Tensor,
            generator: Generators = None,
            return_dict: bool = True,
            **further: Any,
        ) -> Any:
            if self._given is None:
                self._check_plan()
                self.dtype = sample.dtype
            result = step(model_output, timestep, sample, generator=generator, **further)
            index = int(self._scheduler.step_index or 0) - 1
            stored = result.prev_sample.to(self._storage)
            moved = stored.to(sample.dtype)
            # A scheduler that is entered between two levels passes the sample through until the next one begins.
            if index in self._stochastic and not torch.equal(result.prev_sample, sample):
                law = self._scheduler.transition(model_output, timestep, sample, index=index)
                self.x_t.append(self._stored if sample is self._given and self._stored is not None else sample)
                self.x_s.append(stored)
                self.log_probs.append(law.log_prob(moved, self._reduction))
                self.indices.append(index)
            self._given, self._stored = moved, stored
            result.prev_sample = moved
            return result if return_dict else (moved, result.pred_original_sample)

        return recorded

    def _check_plan(self) -> None:
        """Refuse a plan whose steps are no Markov chain."""
        scheduler = self._scheduler
        self._stochastic = frozenset(scheduler.stochastic_steps)
        name = type(scheduler).__name__
        if not self._stochastic:
            raise ValueError(
                f"this {name} has no step with a density: pass a policy, such as policy='exact', and no Langevin "
                "corrector."
            )
        if any(_looks_back(scheduler.rows[i]) for i in self._stochastic):
            raise ValueError(
                f"the steps of this {name} look back on earlier estimates, so that x_t alone does not say what x_s "
                "may be: make it by from_config(pipe.scheduler.config, policy='exact'), or with solver_order=1 and "
                "solver_correction=False."
            )


def rollout_model(pipe: SDEPipeline, rollout: Rollout) -> RolloutModel:
    """The network call of a pipeline of this package, for ``Rollout.replay``, with what the rollout was asked for.

    It calls ``pipe.unet`` as it is at the time of the call.

    Args:
        pipe: The pipeline that has drawn the rollout, or one like it, such as that of a reference network.
        rollout: The rollout, with its classes or prompts, and its guidance.

    Raises:
        ValueError: ``pipe`` is no ``SDEPipeline``, ``ClassConditionalSDEPipeline`` or ``TextSDEPipeline``: others have
            to say themselves how they call their network.
    """
    if type(pipe) is ClassConditionalSDEPipeline or type(pipe) is TextSDEPipeline:
        return _guided_model(pipe, rollout)
    if type(pipe) is not SDEPipeline:
        raise ValueError(
            "pipe must be an SDEPipeline, a ClassConditionalSDEPipeline or a TextSDEPipeline, got "
            f"{type(pipe).__name__}: pass a function of RolloutSteps to replay, which calls the network as that "
            "pipeline does."
        )
    scheduler = rollout.scheduler

    def model(steps: RolloutSteps) -> Tensor:
        t = _times(scheduler, steps)
        scale = scheduler.parametrization.input_scale(scheduler.sde.alpha(t), scheduler.sde.sigma(t))
        fed = steps.x_t * expand_like(scale, steps.x_t).to(steps.x_t)
        told = {**pipe.unconditional(len(fed)), "return_dict": False}
        output: Tensor = with_timestep(pipe.unet, fed.to(pipe.unet.dtype), steps.timestep, **told)[0]
        return output.to(steps.x_t.dtype)

    return model


def _guided_model(pipe: ClassConditionalSDEPipeline | TextSDEPipeline, rollout: Rollout) -> RolloutModel:
    scheduler, denoiser = rollout.scheduler, _guided_denoiser(pipe, rollout.arguments)

    def model(steps: RolloutSteps) -> Tensor:
        t, x = _times(scheduler, steps), steps.x_t
        x0_hat = denoiser(x, t, steps.samples)
        output = torch.empty_like(x0_hat)
        # The pipeline has one time for all samples, and its arithmetic is that of numbers.
        for index in set(steps.index):
            rows = torch.tensor([i == index for i in steps.index], device=x.device)
            at = t[rows][0]
            alpha, sigma = scheduler.sde.alpha(at), scheduler.sde.sigma(at)
            output[rows] = scheduler.parametrization.from_x0(x0_hat[rows], x[rows], alpha, sigma)
        return output

    return model


def _guided_denoiser(
    pipe: ClassConditionalSDEPipeline | TextSDEPipeline, given: Mapping[str, Any]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x_t, t, numbers of samples) -> x0_hat, as a call of the pipeline with these arguments has it."""
    scales = {name: given[name] for name in GUIDANCE_ARGUMENTS if name in given}
    if isinstance(pipe, TextSDEPipeline):
        prompt = given.get("prompt")
        told = pipe.denoiser(pipe.config.null_caption if prompt is None else prompt, **scales)
        return lambda x, t, samples: told(x, t, image=samples)
    denoiser: Denoiser = pipe.denoiser(**scales)
    labels = torch.tensor(pipe.class_numbers(given["class_labels"]), device=pipe.device)
    return lambda x, t, samples: denoiser(x, t, class_labels=labels[samples.to(labels.device)])


def _looks_back(row: Row) -> bool:
    return bool(row.history or (row.keep is not None and row.keep.history))


def _times(scheduler: SDEScheduler, steps: RolloutSteps) -> Tensor:
    """The SDE times of steps, shape (n,)."""
    return on_device([scheduler.rows[i].t for i in steps.index], steps.x_t.device)


def _within(numbers: Tensor, count: int) -> bool:
    integral = not numbers.is_floating_point() and numbers.dtype != torch.bool
    return integral and len(numbers) > 0 and bool(((numbers >= 0) & (numbers < count)).all())
