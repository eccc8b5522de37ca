"""The SDEs that training knows by name: how options become a scheduler; and what a scheduler is trained on.

A scheduler carries the SDE, what the network predicts and what it is fed. One of a user's own is trained on in the same
way as those that the options name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..basics.networks import NetworkTraits
from ..basics.options import CheckedOptions, option
from ..images.samples import TrainingSource
from ..networks.conditioning import TIME_CONDITIONINGS
from ..networks.losses import output_weight
from ..networks.parametrizations import PREDICTION_TYPES, Parametrization
from ..sampling.time_grids import USUAL_STD
from ..schedulers import FlowSDEScheduler, SDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from ..schedulers.arguments import SAMPLER_ARGUMENTS
from ..sdes import BETA_SCHEDULES, SDE

# At a noise-to-signal ratio above this one, x0_hat of a trained network is kept in the range of its pixels; measured in
# docs/results.md.
BOUND_ABOVE_SIGMA = 1.0
# Of the arguments that all schedulers share, those that a network is trained with; the others belong to sampling.
TRAINED_ARGUMENTS = ("num_train_timesteps", "prediction_type", "variance_type", "time_conditioning", "sigma_data")


class DataStatistics:
    """The scale of the data, measured when it is first asked for.

    Args:
        source: The images.
        data_min: Value of black.
    """

    def __init__(self, source: TrainingSource, data_min: float) -> None:
        self._source, self._data_min = source, data_min
        self._values: tuple[float, float] | None = None

    @property
    def known(self) -> bool:
        """Whether it has been measured."""
        return self._values is not None

    @property
    def std(self) -> float:
        """Standard deviation of the pixels."""
        return self._measure()[0]

    @property
    def largest_distance(self) -> float:
        """Largest distance between two images."""
        return self._measure()[1]

    def _measure(self) -> tuple[float, float]:
        if self._values is None:
            self._values = self._source.statistics(self._data_min)
        return self._values


@dataclass(frozen=True)
class TrainableSDE:
    """What training knows about an SDE.

    Attributes:
        scheduler_class: Its scheduler.
        arguments: (options, statistics of the data) -> the arguments of the scheduler that belong to its SDE.
        description: The SDE in words.
        prediction_type: What a network predicts where nothing else is asked for.
        ema_max_decay: Largest decay of the exponential average of the weights where nothing else is asked for.
        has_table: Whether discrete training takes its noise levels from a table, which ``beta_schedule`` names.
    """

    scheduler_class: type[SDEScheduler]
    arguments: Callable[[SDEOptions, DataStatistics], Mapping[str, Any]]
    description: str
    prediction_type: str
    ema_max_decay: float = 0.9999
    has_table: bool = False


def _ve_arguments(options: SDEOptions, data: DataStatistics) -> dict[str, Any]:
    sigma_min = options.sigma_min or 0.01 * (1.0 - options.data_min)
    sigma_max = options.sigma_max or _rounded(max(data.largest_distance, 2.0 * sigma_min))
    return {"sigma_min": sigma_min, "sigma_max": sigma_max}


def _vp_arguments(options: SDEOptions, data: DataStatistics) -> dict[str, Any]:
    betas = _sub_vp_arguments(options, data)
    if not options.discrete:
        return {**betas, "continuous": True}
    return {
        **betas,
        "continuous": False,
        "beta_schedule": options.beta_schedule,
        "timestep_spacing": "trailing",
        "time_conditioning": "discrete",
    }


def _sub_vp_arguments(options: SDEOptions, data: DataStatistics) -> dict[str, Any]:
    return {"beta_start": options.beta_start, "beta_end": options.beta_end}


def _flow_arguments(options: SDEOptions, data: DataStatistics) -> dict[str, Any]:
    return {}


# The largest decays are those of the paper (Song et al. 2021, appendix G).
TRAINABLE: dict[str, TrainableSDE] = {
    "ve": TrainableSDE(VESDEScheduler, _ve_arguments, "variance exploding", "edm", ema_max_decay=0.999),
    "vp": TrainableSDE(VPSDEScheduler, _vp_arguments, "variance preserving", "epsilon", has_table=True),
    "sub_vp": TrainableSDE(SubVPSDEScheduler, _sub_vp_arguments, "sub-VP", "epsilon"),
    "flow": TrainableSDE(FlowSDEScheduler, _flow_arguments, "rectified flow", "flow_prediction"),
}


def by_sde(value_of: Callable[[TrainableSDE], Any]) -> str:
    """What differs from SDE to SDE, in words: "edm for ve, epsilon for vp and sub_vp"."""
    names: dict[str, list[str]] = {}
    for name, family in TRAINABLE.items():
        names.setdefault(str(value_of(family)), []).append(name)
    words = {value: ", ".join(those[:-1]) + " and " * (len(those) > 1) + those[-1] for value, those in names.items()}
    return ", ".join(f"{value} for {those}" for value, those in words.items())


@dataclass(frozen=True, kw_only=True)
class SDEOptions(CheckedOptions):
    """Which SDE a network is trained on, over which values."""

    sde: str = option(
        "vp",
        "Forward SDE: " + ", ".join(f"{name} ({family.description})" for name, family in TRAINABLE.items()) + ".",
        choices=TRAINABLE,
    )
    discrete: bool = option(
        False,
        "Train on the N noise levels of the discrete models instead of continuous time: DDPM's table for vp, SMLD's "
        "geometric scales for ve, i/N for the others.",
    )
    num_train_timesteps: int = option(
        1000,
        "N: length of the discrete table and scale of the network's timesteps.",
        least=2,
        aliases=["ddpm_num_steps"],
    )
    beta_schedule: str = option(
        "linear",
        "Table of --sde vp --discrete. Continuous time is always linear in beta.",
        choices=BETA_SCHEDULES,
        aliases=["ddpm_beta_schedule"],
    )
    beta_start: float = option(1e-4, "beta(0)/N for vp and sub_vp (the paper's beta_min is N times this).", above=0.0)
    beta_end: float = option(0.02, "beta(1)/N for vp and sub_vp (the paper's beta_max is N times this).", above=0.0)
    data_min: float = option(
        -1.0,
        "Value of black in what the network sees, white is 1: -1, or 0 for images in [0, 1], such as the paper's VE "
        "models. It is saved with the pipeline.",
        least=-1.0,
        most=0.0,
    )
    sigma_min: float | None = option(
        None, "Smallest noise of ve. Default: 0.02 for images in [-1, 1], the paper's 0.01 for [0, 1].", above=0.0
    )
    sigma_max: float | None = option(
        None,
        "Largest noise of ve (the paper's 50 is for CIFAR-10 in [0, 1]: 100 for [-1, 1]). Default: the largest "
        "distance between two training images, as Song & Ermon (2020) recommend.",
        above=0.0,
    )
    train_eps: float = option(1e-5, "Smallest training time: t lies in [train_eps, 1].", above=0.0)

    @property
    def family(self) -> TrainableSDE:
        """What training knows about the SDE."""
        return TRAINABLE[self.sde]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_eps >= 1.0:
            raise ValueError(f"train_eps must lie in (0, 1), got {self.train_eps!r}.")
        if self.beta_schedule != "linear" and not (self.family.has_table and self.discrete):
            with_table = " or ".join(repr(name) for name, family in TRAINABLE.items() if family.has_table)
            raise ValueError(f"beta_schedule {self.beta_schedule!r} needs sde {with_table} and discrete.")


@dataclass(frozen=True, kw_only=True)
class PredictionOptions(CheckedOptions):
    """What the network predicts and is fed, and where sampling with it ends."""

    prediction_type: str | None = option(
        None,
        f"What the network predicts. Default: {by_sde(lambda family: family.prediction_type)}; the score for the "
        "paper's ncsnpp on ve.",
        choices=tuple(PREDICTION_TYPES),
    )
    time_conditioning: str | None = option(
        None,
        "What the network is fed for SDE time t: t N - 1 (discrete), t N (continuous), t (N - 1) (score_sde), or a "
        "function of sigma/alpha. Default: discrete for --sde vp --discrete, sigma for the paper's ncsnpp on ve, "
        "continuous otherwise.",
        choices=tuple(TIME_CONDITIONINGS),
    )
    sampling_eps: float | None = option(
        None, "Last time of sampling with the trained model. Default: the scheduler's own.", above=0.0
    )
    sigma_data: float | None = option(
        None, "Standard deviation of the data, for edm prediction. Default: measured.", above=0.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.sampling_eps or 0.0) >= 1.0:
            raise ValueError(f"sampling_eps must lie in (0, 1), got {self.sampling_eps!r}.")


# What says how training goes on, whatever its SDE is.
OF_ANY_SDE = ("discrete", "data_min")


def build_scheduler(
    options: SDEOptions,
    source: TrainingSource,
    prediction: PredictionOptions | None = None,
    network: NetworkTraits | None = None,
    of_pixels: bool = True,
) -> SDEScheduler:
    """The scheduler that options describe, which is saved with the network.

    Args:
        options: Which SDE.
        source: The data, which are measured where a default depends on them.
        prediction: What the network predicts; None for the defaults.
        network: What the form of the network fixes, which counts where the options leave it open; None for nothing.
        of_pixels: Whether x_0 are pixels, whose range is known; that of latents is not.

    Raises:
        ValueError: Options that the SDE cannot take.
    """
    prediction, family = prediction or PredictionOptions(), options.family
    data = DataStatistics(source, options.data_min)
    fixed = (None, None) if network is None else (network.prediction_type, network.time_conditioning)
    arguments: dict[str, Any] = {
        "num_train_timesteps": options.num_train_timesteps,
        "prediction_type": prediction.prediction_type or fixed[0] or family.prediction_type,
        "time_conditioning": "continuous",
        **family.arguments(options, data),
    }
    if of_pixels:
        arguments |= {"bound_above_sigma": BOUND_ABOVE_SIGMA, "data_range": [options.data_min, 1.0]}
        if options.data_min != -1.0:  # then samplers should treat these pixels as they treat those in [-1, 1]
            arguments["data_std"] = USUAL_STD * 0.5 * (1.0 - options.data_min)
    if prediction.time_conditioning is not None or fixed[1] is not None:
        arguments["time_conditioning"] = prediction.time_conditioning or fixed[1]
    if network is not None and network.returns_variance:
        arguments["variance_type"] = "learned_range"  # so that it is dropped
    if prediction.sampling_eps is not None:
        arguments["sampling_eps"] = prediction.sampling_eps
    if arguments["prediction_type"] == "edm" or data.known:
        # Three digits are precise enough, and a person can read them in the config.
        arguments["sigma_data"] = prediction.sigma_data or _rounded(max(data.std, 1e-3))
    return family.scheduler_class(**arguments)


def check_network(network: NetworkTraits, scheduler: SDEScheduler) -> None:
    """Make sure that a network can be trained for what a scheduler says.

    Args:
        network: What its form fixes.
        scheduler: What it is to be trained for.

    Raises:
        ValueError: It predicts something else or is fed something else, or its variance would not be dropped.
    """
    for name, fixed in (("prediction_type", network.prediction_type), ("time_conditioning", network.time_conditioning)):
        if fixed not in (None, scheduler.config[name]):
            raise ValueError(f"{name} must be {fixed!r} for this network by its form, got {scheduler.config[name]!r}.")
    if network.returns_variance and scheduler.config.variance_type not in ("learned", "learned_range"):
        raise ValueError(
            "variance_type must be 'learned_range' for a network that also returns a variance, which is dropped then, "
            f"got {scheduler.config.variance_type!r}."
        )


def check_given_scheduler(scheduler: Any, config: Any) -> None:
    """Make sure that a scheduler can be trained on, and that no option describes another one.

    Args:
        scheduler: The user's scheduler.
        config: Options of a training run.

    Raises:
        ValueError: It is no ``SDEScheduler``, or an option is set that the scheduler decides.
    """
    if not isinstance(scheduler, SDEScheduler):
        raise ValueError(f"scheduler must be an SDEScheduler, such as VPSDEScheduler, got {scheduler!r}.")
    decided = [f for f in (*fields(SDEOptions), *fields(PredictionOptions)) if f.name not in OF_ANY_SDE]
    given = [f"{f.name}={value!r}" for f in decided if (value := getattr(config, f.name, f.default)) != f.default]
    if given:
        raise ValueError(
            f"{', '.join(given)} cannot be set beside a scheduler, which brings its SDE, prediction_type, "
            "time_conditioning, sampling_eps and sigma_data: pass them to the scheduler."
        )


def trained_config(scheduler: SDEScheduler) -> dict[str, Any]:
    """The class of a scheduler and the part of its config that a network is trained with, without its sampler."""
    sampling = {a.name for a in SAMPLER_ARGUMENTS} - set(TRAINED_ARGUMENTS)
    config = {k: v for k, v in scheduler.config.items() if not k.startswith("_") and k not in sampling}
    return {"class": type(scheduler).__name__, **config}


def training_sde(scheduler: SDEScheduler, options: SDEOptions) -> SDE:
    """The SDE of a scheduler that the options have made, on [train_eps, 1]."""
    return dataclasses.replace(scheduler.sde, t_min=options.train_eps)


def default_weighting(scheduler: SDEScheduler) -> str:
    """The weighting that keeps the loss of a scheduler's prediction type balanced."""
    return "paper" if scheduler.config.prediction_type in ("epsilon", "score") else "output"


def default_ema_max_decay(scheduler: SDEScheduler) -> float:
    """The largest decay of the averaged weights, by the family that the scheduler's class belongs to."""
    families = (family for family in TRAINABLE.values() if isinstance(scheduler, family.scheduler_class))
    return next((family.ema_max_decay for family in families), TrainableSDE.ema_max_decay)


def check_trainable(
    sde: SDE,
    parametrization: Parametrization,
    weighting: str,
    discrete_steps: int | None,
    times: Callable[[Tensor], Tensor],
) -> None:
    """Make sure that the loss is finite at all training times.

    Args:
        sde: The SDE at the times of training.
        parametrization: What the network predicts.
        weighting: The weighting of the loss over time.
        discrete_steps: Number of training times; None for continuous time.
        times: The training times that numbers stand for which are uniform in [0, 1).

    Raises:
        ValueError: The prediction type has no finite target at some time (such as the noise where alpha = 0), or the
            times cannot be drawn.
    """
    u = torch.linspace(0.0, 1.0 - 1e-9, discrete_steps or 1000, dtype=torch.float64)
    u = u if discrete_steps is not None else u.clamp(min=1e-9)
    t = times(u)
    skip, out = parametrization.coefficients(sde.alpha(t), sde.sigma(t))
    values = torch.stack([skip, out, 1.0 / out, output_weight(sde, parametrization, t, weighting)])
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"prediction_type of {type(parametrization).__name__} with weighting {weighting!r} is not finite at every "
            f"training time of {type(sde).__name__}: choose v_prediction, flow_prediction, sample or edm."
        )


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
