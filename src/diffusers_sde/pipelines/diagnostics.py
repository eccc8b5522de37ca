"""A swap advisor: what a pipeline's network is, which schedulers fit it, and what looks wrong."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass, field
from typing import Any

from diffusers import ModularPipeline

from ..schedulers import SCHEDULERS, FlowSDEScheduler, SDEScheduler
from ..schedulers.conversion import FAMILY_NAMES, config_family, config_of

PREDICTIONS = {
    "epsilon": "the noise (epsilon)",
    "sample": "the data (sample)",
    "v_prediction": "the velocity v = alpha eps - sigma x0 (v_prediction)",
    "flow_prediction": "the velocity eps - x0 of the straight path (flow_prediction)",
    "score": "the score",
    "edm": "EDM's preconditioned output (edm)",
}
CONDITIONINGS = {
    "discrete": "the index of a table of {n} timesteps",
    "continuous": "t times {n}",
    "score_sde": "t times {last}",
    "time": "t itself",
    "sigma": "the noise level sigma",
    "log_sigma": "log sigma",
    "edm": "log(sigma)/4",
}
# Pipelines that start at N(0, I) whatever the scheduler says, and never scale the network's input.
_NO_INITIAL_SCALE = ("DDPMPipeline", "DDIMPipeline")
_REPLACE_SCHEDULER = ("DDIMPipeline", "PNDMPipeline")
_NETWORKS = ("unet", "transformer", "prior")


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
        what = FAMILY_NAMES.get(self.family or "", "of a kind that its scheduler's config does not tell")
        if self.family is None and self.suggestions:
            what = "of an SDE of its own"
        lines = [
            f"{self.pipeline} with {self.scheduler}",
            f"  network:      {self.network or 'none found'}, {what}",
            f"  predicts:     {PREDICTIONS.get(self.prediction_type or '', self.prediction_type or 'unknown')}",
            f"  is fed:       {self.conditioning or 'unknown'}",
            f"  works on:     {self.data or 'unknown'}",
        ]
        if self.suggestions:
            lines += ["  schedulers that fit:", *(f"    {line}" for line in self.suggestions)]
        else:
            lines += ["  no scheduler here fits:", *(f"    {name}: {why}" for name, why in self.reasons.items())]
        lines.append("  suspicious:" if self.warnings else "  nothing suspicious")
        return "\n".join([*lines, *(f"    - {w}" for w in self.warnings)])


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
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not hasattr(scheduler, "config"):
        raise ValueError(f"diagnose needs a pipeline with a scheduler, got {type(pipe).__name__}.")
    network = next((m for m in (getattr(pipe, name, None) for name in _NETWORKS) if m is not None), None)
    diagnosis = Diagnosis(
        type(pipe).__name__, type(scheduler).__name__, None if network is None else type(network).__name__
    )
    config = config_of(scheduler)
    diagnosis.family = config_family(config)

    # A user's own scheduler is of an SDE of its own, which no class of ours stands for.
    is_users = isinstance(scheduler, SDEScheduler) and not isinstance(scheduler, tuple(SCHEDULERS.values()))
    fitting: SDEScheduler | None = scheduler if is_users else None
    for name, cls in SCHEDULERS.items():
        try:
            candidate = scheduler if isinstance(scheduler, cls) else cls.from_config(config)
        except ValueError as error:
            diagnosis.reasons[name] = str(error)
            continue
        if diagnosis.family is not None or isinstance(scheduler, cls):
            fitting = fitting or candidate
    if fitting is not None:
        n = int(fitting.config.num_train_timesteps)
        diagnosis.prediction_type = fitting.config.prediction_type
        diagnosis.conditioning = CONDITIONINGS[fitting.conditioning.name].format(n=n, last=n - 1)
    else:
        diagnosis.prediction_type = config.get("prediction_type")
    latent = getattr(pipe, "vae", None) is not None or getattr(pipe, "vqvae", None) is not None
    diagnosis.data = _data(pipe, latent, diagnosis)
    diagnosis.suggestions = _suggestions(pipe, network, fitting, latent, diagnosis.family)
    for check in (_check_pipeline, _check_scheduler, _check_network):
        diagnosis.warnings += check(pipe, network, fitting, scheduler, latent)
    return diagnosis


def _data(pipe: Any, latent: bool, diagnosis: Diagnosis) -> str:
    if latent:
        return "latents of an autoencoder"
    config = pipe.config
    if config.get("data_min") is not None:
        return f"images in [{config['data_min']:g}, {config['data_max']:g}]"
    if type(pipe).__name__ == "ScoreSdeVePipeline":
        return "images in [0, 1]"
    return "images, in [-1, 1] as this pipeline takes them"


def _suggestions(pipe: Any, network: Any, fitting: SDEScheduler | None, latent: bool, family: str | None) -> list[str]:
    if fitting is None:
        return []
    name, pipeline = type(fitting).__name__, type(pipe).__name__
    # With nothing set first: the default sampler is the one that was measured to be best.
    choices = ["", 'predictor="ancestral", corrector="langevin"', "probability_flow=True", 'predictor="ancestral"']
    if family == "flow":
        choices = ["", "probability_flow=True", 'corrector="langevin"', 'predictor="ancestral"']
    if pipeline == "ScoreSdeVePipeline":
        choices = ['langevin_norm="batch"', 'predictor="ancestral"']
    if _guider(pipe) is not None:
        choices = [choice for choice in choices if "corrector" not in choice]
    needed = []
    if latent and fitting.config.clip_sample:
        needed.append("clip_sample=False")
    if latent and fitting.config.get("thresholding"):
        needed.append("thresholding=False")
    if _returns_unused_variance(pipe, network, fitting):
        needed.append('variance_type="learned_range"')
    swaps = [
        f"{name}.from_config({', '.join(['pipe.scheduler.config', *filter(None, [choice]), *needed])})"
        for choice in choices
    ]
    if isinstance(pipe, ModularPipeline):
        return [f"pipe.update_components(scheduler={swap})" for swap in swaps]
    if type(pipe.scheduler).__name__ == "ScoreSdeVeScheduler":  # its networks are for data in [0, 1]
        return [f"pipe = SDEPipeline(pipe.unet, {swap}, data_min=0.0)" for swap in swaps]
    if pipeline in _NO_INITIAL_SCALE and (fitting.init_noise_sigma != 1.0 or _scales_input(fitting)):
        return [f"pipe = SDEPipeline(pipe.unet, {swap})" for swap in swaps]
    return [f"pipe.scheduler = {swap}" for swap in swaps]


def _check_pipeline(pipe: Any, network: Any, fitting: SDEScheduler | None, scheduler: Any, latent: bool) -> list[str]:
    found, name = [], type(pipe).__name__
    sigma = float(fitting.init_noise_sigma if fitting is not None else getattr(scheduler, "init_noise_sigma", 1.0))
    scales = fitting is not None and _scales_input(fitting)
    if name in _NO_INITIAL_SCALE and (abs(sigma - 1.0) > 1e-6 or scales):
        found.append(
            f"{name} starts at N(0, 1) and ignores init_noise_sigma = {sigma:g} and scale_model_input: use "
            "SDEPipeline(pipe.unet, scheduler)."
        )
    if name in _REPLACE_SCHEDULER:
        found.append(
            f"{name} converts a scheduler given at construction (or loaded with it) to its own kind: assign "
            "pipe.scheduler afterwards, every time."
        )
    if name == "ScoreSdeVePipeline":
        found.append("ScoreSdeVePipeline runs no scheduler but its own (it calls step_pred): use SDEPipeline.")
    if name == "StableDiffusionLatentUpscalePipeline":
        found.append(
            f"{name} adds noise and scales its input for variance-exploding samplers of k-diffusion (Euler, LMS) only: "
            "leave its scheduler as it is."
        )
    order = int(getattr(scheduler, "order", 1))
    if _guider(pipe) is not None and order > 1:
        found.append(_guider_warning(fitting, order))
    if _drops_generator(pipe):
        found.append(
            f"{name} does not hand its generator to step(): stochastic sampling is reproducible by torch.manual_seed "
            "only."
        )
    return found


def _guider(pipe: Any) -> Any:
    """The guider of a modular pipeline, None where there is none."""
    return getattr(pipe, "guider", None) if isinstance(pipe, ModularPipeline) else None


def _guider_warning(fitting: SDEScheduler | None, order: int) -> str:
    levels = "pipe.scheduler.set_timesteps(n), then timesteps=pipe.scheduler.timesteps[::pipe.scheduler.order].tolist()"
    if isinstance(fitting, FlowSDEScheduler):
        levels = "sigmas=[1 - i / n for i in range(n)]"
    return (
        f"The scheduler calls the network {order} times per level, and a guider counts calls against "
        "num_inference_steps: guidance ends early, and the next run of the pipeline fails for want of a negative "
        "prompt (pipe.update_components(guider=pipe.guider.new()) renews the guider). Pass the levels in place of "
        f"num_inference_steps: {levels}. Pipelines that choose sigmas themselves (Flux, Qwen-Image, Z-Image) are right."
    )


def _scales_input(scheduler: SDEScheduler) -> bool:
    scale = scheduler.parametrization.input_scale(scheduler.sde.alpha(0.5), scheduler.sde.sigma(0.5))
    return bool((scale != 1).any())


def _drops_generator(pipe: Any) -> bool:
    """Whether every call of ``scheduler.step`` in the pipeline's ``__call__`` leaves the generator out."""
    try:
        where: Any = type(pipe).__call__
        if isinstance(pipe, ModularPipeline):  # its steps are blocks, in a module of that name
            where = sys.modules[f"{type(pipe).__module__.rpartition('.')[0]}.denoise"]
        source = inspect.getsource(where)
    except (KeyError, OSError, TypeError):
        return False
    calls = re.findall(r"scheduler\.step\(([^)]*)\)", source)
    hands_over = re.compile(r"generator|extra_step_kwargs|step_arguments")
    return bool(calls) and not any(hands_over.search(arguments) for arguments in calls)


def _check_scheduler(pipe: Any, network: Any, fitting: SDEScheduler | None, scheduler: Any, latent: bool) -> list[str]:
    found, config = [], scheduler.config
    if latent and (config.get("clip_sample") or config.get("thresholding")):
        found.append(
            "clip_sample or thresholding is on, but latents are not bounded: pass clip_sample=False and "
            "thresholding=False."
        )
    if latent and config.get("steps_offset") == 0 and config.get("set_alpha_to_one") is False:
        found.append(
            "steps_offset=0 with set_alpha_to_one=False: the last step ends where it starts; Stable Diffusion models "
            "take steps_offset=1."
        )
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type") in ("epsilon", "score"):
        found.append(
            f"rescale_betas_zero_snr with prediction_type={config['prediction_type']!r}: at the first timestep the "
            "output says nothing about the data; use v_prediction."
        )
    if config.get("rescale_betas_zero_snr") and config.get("timestep_spacing") != "trailing":
        found.append("rescale_betas_zero_snr without timestep_spacing='trailing': sampling may skip the last timestep.")
    return found


def _check_network(pipe: Any, network: Any, fitting: SDEScheduler | None, scheduler: Any, latent: bool) -> list[str]:
    if network is None or fitting is None:
        return []
    found, config, conditioning = [], network.config, fitting.conditioning.name
    embedding = config.get("time_embedding_type")
    is_unet = type(network).__name__ == "UNet2DModel"
    if is_unet and embedding == "fourier":
        if conditioning != "sigma":
            found.append(
                f"The network has a Fourier embedding, which takes the noise level sigma, but is fed "
                f"{CONDITIONINGS[conditioning].format(n='N', last='N - 1')}: pass time_conditioning='sigma'."
            )
        if fitting.config.prediction_type != "score":
            found.append(
                "The network has a Fourier embedding and divides its output by the noise level itself, so it returns "
                f"the score, but prediction_type is {fitting.config.prediction_type!r}: pass prediction_type='score'."
            )
    elif is_unet and embedding == "positional":
        sde = fitting.sde
        low, high = (float(fitting.conditioning.timestep(sde, t)) for t in (sde.t_min, sde.t_max))
        if conditioning in ("sigma", "log_sigma", "edm") or high - low < 10.0:
            found.append(
                "The network has a positional embedding, made for timesteps up to about 1000, but is fed values from "
                f"{low:.3g} to {high:.3g}, which it can hardly tell apart or was not trained on: check "
                "time_conditioning and num_train_timesteps."
            )
    if is_unet and type(fitting) is FlowSDEScheduler and not isinstance(scheduler, SDEScheduler):
        found.append("A flow scheduler with a UNet2DModel is unusual: make sure that the network predicts eps - x0.")
    if _returns_unused_variance(pipe, network, fitting):
        found.append(
            f"The network returns {config['out_channels']} channels for {config['in_channels']}, half of them a "
            "variance: pass variance_type='learned_range', so that they are dropped."
        )
    return found


def _returns_unused_variance(pipe: Any, network: Any, fitting: SDEScheduler) -> bool:
    """Whether the network returns a variance that neither the pipeline nor the scheduler takes off."""
    if network is None or fitting.config.variance_type in ("learned", "learned_range"):
        return False
    inputs, outputs = network.config.get("in_channels"), network.config.get("out_channels")
    takes_it_off = type(pipe).__name__.startswith(("DiT", "PixArt"))
    return bool(inputs and outputs == 2 * inputs and not takes_it_off)
