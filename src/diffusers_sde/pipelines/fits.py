"""Samplers fitted to the network of a pipeline, for one number of network calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..basics.checks import check_choice, check_flag, check_integer
from ..basics.networks import computes_in_bf16
from ..fitting.families import PARTS
from ..fitting.fit import Fit, FitOptions, fit_parameters, frozen
from ..fitting.targets import SETS, Batch, EnergyTarget, PairedTarget, Target, stream
from ..sampling.planning import make_plan
from ..schedulers import SDEScheduler
from ..schedulers.fitted_plans import sampled_weights
from .fit_subjects import CalledSubject, DenoisedSubject, FitSubject
from .pipeline_text import TextSDEPipeline
from .probability_flow import own_or_fitting_scheduler

OBJECTIVES = ("paired", "energy")
FIT_PRECISIONS = ("no", "bf16")
PARTS_OF_DATA = (0.6, 0.2, 0.2)  # of the images, for fit, choice and report
TEACHER_STEPS = {"paired": 60, "energy": 50}
DRAWN_PER_HELD_OUT = 2  # end points to fit to, for each of the report
# Values are those of pixels if so many of them lie in the pipeline's range, or outside by so much of its length.
MOSTLY, NEAR_THE_RANGE = 0.99, 0.1
_FOR_THE_TEACHER = 9  # purpose of a random stream, apart from those of the fit


@dataclass(frozen=True)
class SchedulerFit:
    """A sampler fitted to a network, and what the fit found. ``print`` shows the report.

    Attributes:
        scheduler: The fitted scheduler, for ``num_inference_steps`` of the fit; the unfitted one where the fit did not
            beat it beyond the noise.
        report: Plain numbers and words: which sampler was fitted to what, and on noise and images that the fit has not
            seen its distance (``fitted``), that of the unfitted sampler (``unfitted``), their difference (``gain``) and
            its standard error (``gain_error``), and those of each part of the distance where it has several
            (``gain_of_whole_images``, ``gain_of_patches``, ``gain_of_features``); the images that the network was
            called for (``network_evaluations``) and the time.
    """

    scheduler: SDEScheduler
    report: dict[str, Any]

    def __str__(self) -> str:
        width = max(map(len, self.report))
        return "\n".join(f"{key:{width}}  {_shown(value)}" for key, value in self.report.items())


@dataclass(frozen=True)
class _Sizes:
    """Options of a fit that depend on how it is made, where nothing else is given."""

    steps: int
    batch_size: int
    learning_rate: float
    held_out: int


_WITH_GRADIENTS = _Sizes(steps=120, batch_size=128, learning_rate=0.03, held_out=2048)
_PAIRED = _Sizes(steps=80, batch_size=256, learning_rate=0.03, held_out=512)
_WITHOUT_GRADIENTS = _Sizes(steps=60, batch_size=32, learning_rate=0.02, held_out=128)


def fit_scheduler(
    pipe: Any,
    num_inference_steps: int = 8,
    data: Any = None,
    *,
    sampler: Mapping[str, Any] | None = None,
    objective: str | None = None,
    guidance_scale: float = 1.0,
    class_labels: Any = None,
    call: Mapping[str, Any] | None = None,
    parts: Sequence[str] = PARTS,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    held_out: int | None = None,
    teacher_steps: int | None = None,
    gradients: bool | None = None,
    checkpointing: bool = False,
    mixed_precision: str | None = None,
    seed: int = 0,
    progress_bar: bool = True,
) -> SchedulerFit:
    """Fit the numbers of a sampler to the network of a pipeline, for one number of noise levels.

        fit = fit_scheduler(pipe, num_inference_steps=8, data=images)
        print(fit)
        pipe.scheduler = fit.scheduler
        images = pipe(num_inference_steps=8, batch_size=16).images

    What is fitted are the levels, the weights of the estimates, the noise of each step, the noise level that the
    network is told, and the step sizes of a corrector: some forty numbers for six levels. See ``PlanFamily``. The
    network does not change. The scheduler that comes back holds the numbers in its config; a step costs what it cost
    before.

    A pipeline of this package, or an unconditional one of diffusers, is not run itself: its network is called as the
    pipeline calls it, with gradients. Any other pipeline is run through its own loop, which takes no gradients, with
    the arguments in ``call``; the fit then needs many more images.

    Args:
        pipe: The pipeline. Neither it nor its scheduler is changed.
        num_inference_steps: Noise levels, at least 2; each costs ``scheduler.order`` network calls.
        data: Images to be like, for the ``energy`` objective: PIL images, integers in 0..255, or floating-point data in
            the network's range; disjoint parts are for fitting, choosing and reporting. None takes what a fine
            sampler draws from the same network.
        sampler: Arguments of the scheduler that make the sampler to start from, such as ``{"probability_flow": True}``
            or ``{"corrector": "langevin"}``; None is the pipeline's own.
        objective: ``paired`` is the distance to the end points of a fine solution of the probability flow from the same
            noise; ``energy`` is the energy distance, of whole images, of their patches and of what the middle of the
            network makes of them, to data or to a fine reverse SDE. None is ``paired`` for the probability flow without
            ``data``, and ``energy`` otherwise.
        guidance_scale: Of a class-conditional pipeline. A fit holds for its scale.
        class_labels: Classes to draw from, numbers or names; None for all of a class-conditional pipeline.
        call: Arguments of the pipeline's own call, such as ``prompt``, and then the pipeline is run itself. A list of
            prompts is used in turn. It must take ``latents``, ``num_inference_steps`` and ``output_type="latent"``. A
            ``TextSDEPipeline`` takes ``prompt``, ``negative_prompt``, ``guidance_scale`` and ``guidance_interval``, and
            is not run itself.
        parts: What is fitted, names of ``fitting.PARTS``.
        steps: Steps of the optimiser. None is 120, 80 for ``paired`` and 60 without gradients.
        batch_size: Images of a step; None is 128, 256 for ``paired`` and 32 without gradients. The energy distance of
            few images narrows the law of the samples.
        learning_rate: Of Adam; None is 0.03, and 0.02 without gradients.
        held_out: Images of the report; None is 2048, 512 for ``paired`` and 128 without gradients.
        teacher_steps: Levels of the fine sampler, where there is one; None is 60 for ``paired`` and 50 for ``energy``,
            but no fewer than twice ``num_inference_steps``.
        gradients: Whether gradients pass through the network; None is True unless the pipeline is run itself.
        checkpointing: Whether activations are computed again in the backward pass, which needs the memory of one
            network call instead of all of them.
        mixed_precision: ``bf16`` computes the network in bfloat16 in the steps of the optimiser, and ``no`` as it is.
            What is chosen and reported is of the network as it is. None is ``bf16`` where the hardware computes in it.
        seed: Of everything that is drawn.
        progress_bar: Whether a bar is shown.

    Returns:
        The scheduler and the report.

    Raises:
        ValueError: Arguments out of range, or that do not fit together or this pipeline; nothing was drawn then.
    """
    levels = check_integer("num_inference_steps", num_inference_steps, at_least=2)
    seed = check_integer("seed", seed, at_least=0)
    check_flag("checkpointing", checkpointing)
    if isinstance(parts, str):
        raise ValueError(f"parts must be a list of names, of {', '.join(PARTS)}, got {parts!r}.")
    if sampler is not None and not isinstance(sampler, Mapping):
        raise ValueError(f"sampler must be None or arguments of a scheduler by their names, got {sampler!r}.")
    own = own_or_fitting_scheduler(pipe)
    scheduler = type(own).from_config(own.config, **{"fitted_plan": None, **(sampler or {})})
    if scheduler.config.policy is not None:
        raise ValueError(f"policy must be None for a sampler that is fitted, got {scheduler.config.policy!r}.")
    if objective is None:
        objective = "paired" if scheduler.config.probability_flow and data is None else "energy"
    check_choice("objective", objective, OBJECTIVES)
    if objective == "paired" and (data is not None or not scheduler.config.probability_flow):
        raise ValueError(
            "objective 'paired' compares with a finer solution of the same probability flow: it needs a sampler with "
            "probability_flow=True and takes no data."
        )
    is_called = call is not None and not isinstance(pipe, TextSDEPipeline)
    with_gradients = check_flag("gradients", not is_called if gradients is None else gradients)
    if with_gradients and is_called:
        raise ValueError("gradients must be False or None with call: the loop of a pipeline takes none.")
    check_choice("mixed_precision", mixed_precision, (None, *FIT_PRECISIONS))
    sizes = (_PAIRED if objective == "paired" else _WITH_GRADIENTS) if with_gradients else _WITHOUT_GRADIENTS
    options = FitOptions(
        steps=sizes.steps if steps is None else steps,
        batch_size=sizes.batch_size if batch_size is None else batch_size,
        learning_rate=sizes.learning_rate if learning_rate is None else learning_rate,
        held_out=sizes.held_out if held_out is None else held_out,
        gradients=with_gradients,
        seed=seed,
    )
    fine = max(TEACHER_STEPS[objective], 2 * levels) if teacher_steps is None else teacher_steps
    fine = check_integer("teacher_steps", fine, at_least=levels + 1)
    subject = (CalledSubject if is_called else DenoisedSubject)(
        pipe, scheduler, levels, guidance_scale, class_labels, call, tuple(parts), checkpointing, options.batch_size
    )
    if not subject.family.size:
        raise ValueError(
            f"parts must name at least one of {', '.join(PARTS)} that this sampler has, got {tuple(parts)!r}."
        )
    subject.in_bf16 = with_gradients and (
        computes_in_bf16(subject.device) if mixed_precision is None else mixed_precision == "bf16"
    )
    network = subject.network
    with frozen(network):
        references = None if data is None else _split(subject.references(data), seed)
        target = _target(subject, objective, references, fine, options, progress_bar)
        taught = subject.evaluations
        with tqdm(total=options.steps, desc="Fitting", disable=not progress_bar) as bar:

            def progress(step: int, loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.4g}")
                bar.update()

            fit = fit_parameters(subject.family.size, subject.simulator, target, options, progress)
    report = _report(fit, subject, target, options, fine, data is not None, guidance_scale, taught)
    if not fit.is_fitted:
        return SchedulerFit(scheduler, report)
    family = subject.family
    kept = {key: report[key] for key in ("objective", "target", "guidance_scale", "fitted", "unfitted", "gain_error")}
    fitted = scheduler.with_plan(
        family.plan(fit.parameters), family.level_times(fit.parameters), sampled_weights(network), kept
    )
    return SchedulerFit(fitted, report)


# ---------------------------------------------------------------------- what it is fitted to


def _split(images: Tensor, seed: int) -> dict[str, Tensor]:
    """Disjoint parts of the images for each of ``SETS``."""
    order = torch.randperm(len(images), generator=stream(seed, _FOR_THE_TEACHER, 9)).to(images.device)
    first = int(PARTS_OF_DATA[0] * len(images))
    second = first + int(PARTS_OF_DATA[1] * len(images))
    return dict(zip(SETS, (images[order[:first]], images[order[first:second]], images[order[second:]]), strict=True))


def _target(
    subject: FitSubject,
    objective: str,
    references: dict[str, Tensor] | None,
    fine: int,
    options: FitOptions,
    progress_bar: bool,
) -> Target:
    """The objective, for which a fine sampler draws where there are no images."""
    if references is not None:
        return _energy(subject, references, None)
    counts = {
        "fit": DRAWN_PER_HELD_OUT * options.held_out,
        "choice": options.held_out // 2,
        "report": options.held_out,
    }
    noise: dict[str, Tensor] = {}
    ends: dict[str, Tensor] = {}
    classes: dict[str, Tensor] = {}
    for i, part in enumerate(SETS):
        generator = stream(options.seed, _FOR_THE_TEACHER, i)
        noise[part] = torch.randn(max(2, counts[part]), *subject.shape, generator=generator).to(subject.device)
        conditioning = {}
        if subject.labels is not None:
            drawn = torch.randint(len(subject.labels), (len(noise[part]),), generator=generator)
            classes[part] = subject.labels[drawn].to(subject.device)
            conditioning = {"class_labels": classes[part]}
        batch = Batch(noise[part], noise[part], conditioning)
        ends[part] = _finely(subject, objective, fine, batch, generator, progress_bar)
    known = classes or None
    if objective == "paired":
        return PairedTarget(noise, ends, known)
    return _energy(subject, ends, known)


def _energy(subject: FitSubject, references: dict[str, Tensor], classes: dict[str, Tensor] | None) -> EnergyTarget:
    bounds = _bounds_of_pixels(subject, references["report"])
    return EnergyTarget(references, classes, subject.labels, bounds, subject.features(references["fit"]))


def _bounds_of_pixels(subject: FitSubject, references: Tensor) -> tuple[float, float] | None:
    """The range at which images are cut off when they are saved; None for latents, and for data that are no pixels."""
    low, high = subject.data_range
    margin = NEAR_THE_RANGE * (high - low)
    inside = (references >= low - margin) & (references <= high + margin)
    return (low, high) if not subject.is_latent and float(inside.float().mean()) > MOSTLY else None


@torch.no_grad()
def _finely(
    subject: FitSubject, objective: str, fine: int, batch: Batch, generator: torch.Generator, progress_bar: bool
) -> Tensor:
    """Samples of a fine sampler of the same network: the probability flow, or the reverse SDE."""
    scheduler = subject.scheduler
    is_flow = objective == "paired"
    changes: dict[str, Any] = {
        "predictor": "exponential",
        "corrector": None,
        "probability_flow": is_flow,
        "stochasticity": None,
        "solver_order": None,
    }
    if scheduler.config.time_grid not in (None, "blended"):  # which may stand on the timesteps of a table
        changes["time_grid"] = "sech"
    teacher = type(scheduler).from_config(scheduler.config, **changes)
    times = teacher.sampling_times(fine)
    if isinstance(subject, CalledSubject):
        return subject.run(teacher, fine, batch, generator)
    plan = make_plan(scheduler.sde, times, teacher.own_predictor, stochasticity=0.0 if is_flow else None)
    ends = []
    with tqdm(total=len(batch.noise), desc="Drawing what to fit to", unit="image", disable=not progress_bar) as bar:
        for rows in torch.arange(len(batch.noise)).split(subject.batch_size):
            noise = batch.noise[rows]
            conditioning = {name: value[rows] for name, value in batch.conditioning.items()}
            ends.append(subject.draw(plan, times, Batch(noise, noise, conditioning), generator))
            bar.update(len(noise))
    return torch.cat(ends)


def _report(
    fit: Fit,
    subject: FitSubject,
    target: Target,
    options: FitOptions,
    fine: int,
    has_data: bool,
    guidance_scale: float,
    taught: int,
) -> dict[str, Any]:
    config = subject.scheduler.config
    is_flow = config.probability_flow
    return {
        "is_fitted": fit.is_fitted,
        "verdict": "the fitted sampler is nearer beyond the noise"
        if fit.is_fitted
        else "the unfitted sampler came back: the fit is not nearer beyond the noise, or images are further off",
        "scheduler": type(subject.scheduler).__name__,
        "sampler": ("probability flow" if is_flow else "reverse SDE")
        + (f" with {config.corrector} corrector" if config.corrector else ""),
        "num_inference_steps": subject.levels,
        "calls": len(subject.family.base),
        "objective": target.name,
        "target": "data"
        if has_data
        else f"{'probability flow' if target.name == 'paired' else 'reverse SDE'} at {fine} levels",
        "guidance_scale": float(subject.call.get("guidance_scale", guidance_scale)),
        "parameters": subject.family.size,
        "fitted": fit.fitted,
        "unfitted": fit.unfitted,
        "gain": fit.unfitted - fit.fitted,
        "gain_error": fit.error,
        **{f"gain_of_{name}": list(gain) for name, gain in fit.parts.items()},
        "chosen_step": fit.chosen_step,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "held_out": options.held_out,
        "gradients": options.gradients,
        "mixed_precision": "bf16" if subject.in_bf16 else "no",
        "seed": options.seed,
        "network_evaluations": subject.evaluations,
        "network_evaluations_of_teacher": taught,
        "seconds": round(fit.seconds, 1),
    }


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " +- ".join(map(_shown, value))
    return f"{value:.5g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
