"""A swap advisor: what a pipeline's network is, which schedulers fit it, and what looks wrong."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ModularPipeline

from ..basics.networks import traits_of
from ..networks.parametrizations import PREDICTION_TYPES
from ..schedulers import SCHEDULERS, FlowSDEScheduler, SDEScheduler
from ..schedulers.conversion import FAR_OUT
from ..schedulers.families import config_family, family_description
from ..schedulers.fitted_plans import is_same_network
from ..schedulers.stock_configs import config_of
from .plain_networks import PlainNetwork
from .probability_flow import scheduler_of
from .runs import FOREIGN_FIT

# Pipelines that start at N(0, I) whatever the scheduler says, and never scale the network's input.
_NO_INITIAL_SCALE = ("DDPMPipeline", "DDIMPipeline")
# What is wrong with a stock pipeline of this name whatever scheduler it has.
_OF_PIPELINES = {
    **dict.fromkeys(
        ("DDIMPipeline", "PNDMPipeline"),
        "{name} converts a scheduler given at construction (or loaded with it) to its own kind: assign pipe.scheduler "
        "afterwards, every time.",
    ),
    "ScoreSdeVePipeline": "{name} runs no scheduler but its own (it calls step_pred): use SDEPipeline.",
    "StableDiffusionLatentUpscalePipeline": "{name} adds noise and scales its input for variance-exploding samplers of "
    "k-diffusion (Euler, LMS) only: leave its scheduler as it is.",
}
_NETWORKS = ("unet", "transformer", "prior")
_AUTOENCODERS = ("vae", "vqvae")
_PIXEL_PIPELINES = ("DDPMPipeline", "DDIMPipeline")  # whose data are in [-1, 1]


@dataclass
class Diagnosis:
    """What ``diagnose`` found; ``print`` it.

    Attributes:
        pipeline: Name of the pipeline's class.
        scheduler: Name of its scheduler's class.
        network: Name of its network's class, or None.
        family: ``vp``, ``sub_vp``, ``ve``, ``edm`` or ``flow``; None if the scheduler's config does not say.
        prediction_type: What the network predicts.
        conditioning: What it is fed, in words.
        data: What it works on, in words.
        suggestions: Lines of Python that swap in a scheduler that fits, the first one first to try.
        reasons: Class name to reason, of our schedulers that do not fit.
        warnings: What is suspicious, each with what to do about it.
    """

    pipeline: str
    scheduler: str
    network: str | None = None
    family: str | None = None
    prediction_type: str | None = None
    conditioning: str | None = None
    data: str | None = None
    suggestions: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        what = family_description(self.family) or "of a kind that its scheduler's config does not tell"
        if self.family is None and self.suggestions:
            what = "of an SDE of its own"
        predicts = PREDICTION_TYPES[self.prediction_type].meaning if self.prediction_type in PREDICTION_TYPES else None
        lines = [
            f"{self.pipeline} with {self.scheduler}",
            f"  network:      {self.network or 'none found'}, {what}",
            f"  predicts:     {predicts or self.prediction_type or 'unknown'}",
            f"  is fed:       {self.conditioning or 'unknown'}",
            f"  works on:     {self.data or 'unknown'}",
        ]
        if self.suggestions:
            lines += ["  schedulers that fit:", *(f"    {line}" for line in self.suggestions)]
        else:
            lines += ["  no scheduler here fits:", *(f"    {name}: {why}" for name, why in self.reasons.items())]
        lines.append("  suspicious:" if self.warnings else "  nothing suspicious")
        return "\n".join([*lines, *(f"    - {w}" for w in self.warnings)])


@dataclass(frozen=True)
class _Case:
    """A pipeline as the checks see it.

    Attributes:
        pipe: The pipeline.
        network: Its network, or None.
        scheduler: Its scheduler.
        fitting: Our scheduler that fits: its own or one made from its config; None if there is none.
        family: The kind of path, or None.
        latent: Whether it works on the latents of an autoencoder.
    """

    pipe: Any
    network: Any
    scheduler: Any
    fitting: SDEScheduler | None
    family: str | None
    latent: bool

    @property
    def name(self) -> str:
        """Name of the pipeline's class."""
        return type(self.pipe).__name__

    @property
    def guider(self) -> Any:
        """The guider of a modular pipeline, None where there is none."""
        return getattr(self.pipe, "guider", None) if isinstance(self.pipe, ModularPipeline) else None

    @property
    def ignores_scales(self) -> bool:
        """Whether the pipeline starts at N(0, 1) and feeds the state as it is, and the scheduler needs otherwise."""
        if self.name not in _NO_INITIAL_SCALE:
            return False
        return abs(self.initial_scale - 1.0) > 1e-6 or (self.fitting is not None and _scales_input(self.fitting))

    @property
    def initial_scale(self) -> float:
        """Standard deviation at which the scheduler has sampling start."""
        scheduler = self.scheduler if self.fitting is None else self.fitting
        return float(getattr(scheduler, "init_noise_sigma", 1.0))

    @property
    def returns_unused_variance(self) -> bool:
        """Whether the network returns a variance that neither the pipeline nor the scheduler takes off."""
        if self.network is None or self.fitting is None:
            return False
        taken_off = self.fitting.config.variance_type in ("learned", "learned_range")
        returned = traits_of(self.network).returns_variance
        return returned and not taken_off and not self.name.startswith(("DiT", "PixArt"))


def diagnose(pipe: Any) -> Diagnosis:
    """Say what a pipeline's network is, which of our schedulers fit it and how, and what is suspicious.

    Nothing is run or changed: it reads the configs, so it knows what they say and no more.

    Args:
        pipe: Any diffusers pipeline with a scheduler, modular ones included.

    Returns:
        The findings; ``print(diagnose(pipe))`` for a report.

    Raises:
        ValueError: ``pipe`` has no scheduler.
    """
    scheduler = scheduler_of(pipe)
    network = next((m for m in (getattr(pipe, name, None) for name in _NETWORKS) if m is not None), None)
    config = config_of(scheduler)
    family = config_family(config)
    fitting, reasons = _fitting(scheduler, config, family)
    latent = any(getattr(pipe, name, None) is not None for name in _AUTOENCODERS)
    case = _Case(pipe, network, scheduler, fitting, family, latent)
    module = network.network if isinstance(network, PlainNetwork) else network
    return Diagnosis(
        case.name,
        type(scheduler).__name__,
        None if module is None else type(module).__name__,
        family,
        config.get("prediction_type") if fitting is None else fitting.config.prediction_type,
        None if fitting is None else fitting.conditioning.meaning,
        _data(case),
        _suggestions(case),
        reasons,
        [warning for check in _CHECKS if (warning := check(case)) is not None],
    )


def _fitting(scheduler: Any, config: dict[str, Any], family: str | None) -> tuple[SDEScheduler | None, dict[str, str]]:
    """Our scheduler that fits, if any, and for each of our classes that refuses the config, why."""
    # A user's own scheduler is of an SDE of its own, which no class of ours stands for.
    is_users = isinstance(scheduler, SDEScheduler) and not isinstance(scheduler, tuple(SCHEDULERS.values()))
    fitting, reasons = scheduler if is_users else None, {}
    for name, cls in SCHEDULERS.items():
        try:
            candidate = scheduler if isinstance(scheduler, cls) else cls.from_config(config)
        except ValueError as error:
            reasons[name] = str(error)
            continue
        if family is not None or isinstance(scheduler, cls):
            fitting = fitting or candidate
    return fitting, reasons


def _data(case: _Case) -> str:
    if case.latent:
        return "latents of an autoencoder"
    config = case.pipe.config
    if config.get("data_min") is not None:
        return f"images in [{config['data_min']:g}, {config['data_max']:g}]"
    if case.name == "ScoreSdeVePipeline":
        return "images in [0, 1]"
    return "images, in [-1, 1] as this pipeline takes them"


# ---------------------------------------------------------------------- what to try


def _suggestions(case: _Case) -> list[str]:
    if case.fitting is None:
        return []
    needed = _needed_arguments(case)
    return [
        _assignment(case, f"{type(case.fitting).__name__}.from_config({', '.join(['pipe.scheduler.config', *given])})")
        for given in ([*filter(None, [choice]), *needed] for choice in _choices(case))
    ]


def _choices(case: _Case) -> list[str]:
    """Samplers to try, as arguments, the one that measurements say is best first: nothing set.

    Predictor-corrector comes second, with the default predictor. At 40 calls with an exact score it has a sixth of the
    Frechet distance that the ancestral predictor has with a corrector, and 0.1 is the ``snr`` whose samples are neither
    too clean nor too noisy; docs/results.md has the table.
    """
    choices = ["", 'corrector="langevin", snr=0.1', "probability_flow=True", 'predictor="ancestral"']
    if case.name == "ScoreSdeVePipeline":
        choices = ['langevin_norm="batch"', 'predictor="ancestral"']
    return [choice for choice in choices if case.guider is None or "corrector" not in choice]


def _needed_arguments(case: _Case) -> list[str]:
    """Arguments without which no sampler is right for this network."""
    assert case.fitting is not None
    config = case.fitting.config
    needed = {
        "clip_sample=False": case.latent and config.clip_sample,
        "thresholding=False": case.latent and config.get("thresholding"),
        "bound_above_sigma=1.0, data_range=[-1.0, 1.0]": _is_unbounded(case),
        'variance_type="learned_range"': case.returns_unused_variance,
    }
    return [argument for argument, is_needed in needed.items() if is_needed]


def _assignment(case: _Case, scheduler: str) -> str:
    """The line that puts a scheduler in place."""
    if isinstance(case.pipe, ModularPipeline):
        return f"pipe.update_components(scheduler={scheduler})"
    if type(case.scheduler).__name__ == "ScoreSdeVeScheduler":  # its networks are for data in [0, 1]
        return f"pipe = SDEPipeline(pipe.unet, {scheduler}, data_min=0.0)"
    if case.ignores_scales:
        return f"pipe = SDEPipeline(pipe.unet, {scheduler})"
    return f"pipe.scheduler = {scheduler}"


# ---------------------------------------------------------------------- what looks wrong: one function a warning


def _check_initial_scale(case: _Case) -> str | None:
    if not case.ignores_scales:
        return None
    return (
        f"{case.name} starts at N(0, 1) and ignores init_noise_sigma = {case.initial_scale:g} and scale_model_input: "
        "use SDEPipeline(pipe.unet, scheduler)."
    )


def _check_pipeline(case: _Case) -> str | None:
    known = _OF_PIPELINES.get(case.name)
    return None if known is None else known.format(name=case.name)


def _check_guider(case: _Case) -> str | None:
    order = int(getattr(case.scheduler, "order", 1))
    if case.guider is None or order == 1:
        return None
    levels = "pipe.scheduler.set_timesteps(n), then timesteps=pipe.scheduler.timesteps[::pipe.scheduler.order].tolist()"
    if isinstance(case.fitting, FlowSDEScheduler):
        levels = "sigmas=[1 - i / n for i in range(n)]"
    return (
        f"The scheduler calls the network {order} times per level, and a guider counts calls against "
        "num_inference_steps: guidance ends early, and the next run of the pipeline fails for want of a negative "
        "prompt (pipe.update_components(guider=pipe.guider.new()) renews the guider). Pass the levels in place of "
        f"num_inference_steps: {levels}. Pipelines that choose sigmas themselves (Flux, Qwen-Image, Z-Image) are right."
    )


def _check_generator(case: _Case) -> str | None:
    if not _drops_generator(case.pipe):
        return None
    return (
        f"{case.name} does not hand its generator to step(): stochastic sampling is reproducible by torch.manual_seed "
        "only."
    )


def _scales_input(scheduler: SDEScheduler) -> bool:
    t = 0.5 * scheduler.sde.t_max
    scale = scheduler.parametrization.input_scale(scheduler.sde.alpha(t), scheduler.sde.sigma(t))
    return bool((scale != 1).any())


def _drops_generator(pipe: Any) -> bool:
    """Whether every call of ``scheduler.step`` in the pipeline's ``__call__`` leaves the generator out."""
    try:
        where: Any = type(pipe).__call__
        if isinstance(pipe, ModularPipeline):  # its steps are blocks, in a module of that name
            where = sys.modules[f"{type(pipe).__module__.rpartition('.')[0]}.denoise"]
        tree = ast.parse(textwrap.dedent(inspect.getsource(where)))
    except (KeyError, OSError, TypeError, SyntaxError):
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    steps = [call for call in calls if ast.unparse(call.func).endswith("scheduler.step")]
    return bool(steps) and not any(_hands_generator_over(call) for call in steps)


def _hands_generator_over(call: ast.Call) -> bool:
    """Whether a call has an argument of that name, or passes on the keyword arguments that hold it in pipelines."""
    given = [keyword.value if keyword.arg is None else keyword.arg for keyword in call.keywords]
    words = [each if isinstance(each, str) else ast.unparse(each) for each in [*given, *call.args]]
    names = {word.rpartition(".")[2] for word in words}
    return not names.isdisjoint({"generator", "extra_step_kwargs", "step_arguments"})


def _check_clipping(case: _Case) -> str | None:
    config = case.scheduler.config
    if not case.latent or not (config.get("clip_sample") or config.get("thresholding")):
        return None
    return (
        "clip_sample or thresholding is on, but latents are not bounded: pass clip_sample=False and thresholding=False."
    )


def _check_bound(case: _Case) -> str | None:
    config = case.scheduler.config
    if not case.latent or config.get("bound_above_sigma") is None or config.get("data_range") is not None:
        return None
    return (
        "bound_above_sigma is on without a data_range, and these are latents, whose range is not that of pixels: pass "
        "data_range, their mean minus and plus a few of their standard deviations, or bound_above_sigma=None."
    )


def _is_unbounded(case: _Case) -> bool:
    """Whether pixels are predicted by way of the noise, and nothing keeps the estimate of them in their range."""
    if case.name not in _PIXEL_PIPELINES or case.fitting is None or case.fitting.config.prediction_type != "epsilon":
        return False
    config = case.fitting.config
    is_close = config.bound_above_sigma is not None and config.data_range != FAR_OUT["data_range"]
    return not (config.clip_sample or config.get("thresholding") or is_close)


def _check_unbounded(case: _Case) -> str | None:
    if not _is_unbounded(case):
        return None
    return (
        "the network predicts noise, so that at high noise its errors take x0_hat far out of the range of pixels, and "
        "nothing bounds it to theirs: pass bound_above_sigma=1.0 and data_range=[-1.0, 1.0]."
    )


def _check_fit(case: _Case) -> str | None:
    entry = case.scheduler.config.get("fitted_plan")
    if (
        entry is None
        or not isinstance(case.network, torch.nn.Module)
        or is_same_network(entry["network"], case.network)
    ):
        return None
    return FOREIGN_FIT


def _check_offset(case: _Case) -> str | None:
    config = case.scheduler.config
    if not case.latent or config.get("steps_offset") != 0 or config.get("set_alpha_to_one") is not False:
        return None
    return (
        "steps_offset=0 with set_alpha_to_one=False: the last step ends where it starts; Stable Diffusion models take "
        "steps_offset=1."
    )


def _check_zero_snr_prediction(case: _Case) -> str | None:
    config = case.scheduler.config
    if not config.get("rescale_betas_zero_snr") or config.get("prediction_type") not in ("epsilon", "score"):
        return None
    return (
        f"rescale_betas_zero_snr with prediction_type={config['prediction_type']!r}: at the first timestep the output "
        "says nothing about the data; use v_prediction."
    )


def _check_zero_snr_spacing(case: _Case) -> str | None:
    config = case.scheduler.config
    if not config.get("rescale_betas_zero_snr") or config.get("timestep_spacing") == "trailing":
        return None
    return "rescale_betas_zero_snr without timestep_spacing='trailing': sampling may skip the last timestep."


def _embedding(case: _Case) -> str | None:
    """How a network embeds its timestep; None for one of unknown class, or where no scheduler fits."""
    if case.fitting is not None and type(case.network).__name__ == "DiTTransformer2DModel":
        return "positional"
    if case.fitting is None or type(case.network).__name__ != "UNet2DModel":
        return None
    embedding: str | None = case.network.config.get("time_embedding_type")
    return embedding


def _check_fourier_input(case: _Case) -> str | None:
    if _embedding(case) != "fourier" or case.fitting is None or case.fitting.conditioning.name == "sigma":
        return None
    return (
        "The network has a Fourier embedding, which takes the noise level sigma, but is fed "
        f"{case.fitting.conditioning.meaning}: pass time_conditioning='sigma'."
    )


def _check_fourier_output(case: _Case) -> str | None:
    if _embedding(case) != "fourier" or case.fitting is None or case.fitting.config.prediction_type == "score":
        return None
    return (
        "The network has a Fourier embedding and divides its output by the noise level itself, so it returns the "
        f"score, but prediction_type is {case.fitting.config.prediction_type!r}: pass prediction_type='score'."
    )


def _check_positional_input(case: _Case) -> str | None:
    if _embedding(case) != "positional" or case.fitting is None:
        return None
    sde, conditioning = case.fitting.sde, case.fitting.conditioning
    low, high = (float(conditioning.timestep(sde, t)) for t in (sde.t_min, sde.t_max))
    if not conditioning.is_of_noise and high - low >= 10.0:
        return None
    return (
        "The network has a positional embedding, made for timesteps up to about 1000, but is fed values from "
        f"{low:.3g} to {high:.3g}, which it can hardly tell apart or was not trained on: check time_conditioning and "
        "num_train_timesteps."
    )


def _check_flow_network(case: _Case) -> str | None:
    is_ours = isinstance(case.scheduler, SDEScheduler)
    if is_ours or type(case.fitting) is not FlowSDEScheduler or type(case.network).__name__ != "UNet2DModel":
        return None
    return "A flow scheduler with a UNet2DModel is unusual: make sure that the network predicts eps - x0."


def _check_variance(case: _Case) -> str | None:
    if not case.returns_unused_variance:
        return None
    config = case.network.config
    return (
        f"The network returns {config['out_channels']} channels for {config['in_channels']}, half of them a variance: "
        "pass variance_type='learned_range', so that they are dropped."
    )


_CHECKS: tuple[Callable[[_Case], str | None], ...] = (
    _check_initial_scale,
    _check_pipeline,
    _check_guider,
    _check_generator,
    _check_clipping,
    _check_bound,
    _check_unbounded,
    _check_fit,
    _check_offset,
    _check_zero_snr_prediction,
    _check_zero_snr_spacing,
    _check_fourier_input,
    _check_fourier_output,
    _check_positional_input,
    _check_flow_network,
    _check_variance,
)
