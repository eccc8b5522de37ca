"""The one list of the arguments that all SDE schedulers share: names, types, defaults, checks and documentation.

A scheduler spells the arguments of its own path and takes the rest from here. A new option of the samplers is one more
entry of ``SAMPLER_ARGUMENTS``. The file is as long as the list.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, overload

from diffusers.configuration_utils import register_to_config

from ..basics.checks import check_choice, check_flag, check_integer, check_number, check_ordered, check_pair
from ..guidance.temperature import HOTTEST
from ..networks.conditioning import TIME_CONDITIONINGS
from ..networks.parametrizations import PREDICTION_TYPES
from ..sampling.classical import VARIANCE_TYPES
from ..sampling.correctors import CORRECTORS
from ..sampling.exponential import SOLVER_TYPES
from ..sampling.policies import POLICIES
from ..sampling.predictors import PREDICTORS
from ..sampling.time_grids import TIME_GRIDS, TIMESTEP_SPACINGS, check_time_grid
from .fitted_plans import check_fitted_plan

# A table is built and a time is listed for each entry: a config of a few hundred bytes must not cost gigabytes.
LONGEST_TABLE = 100_000
MOST_CORRECTIONS = 1000
SMALLEST_TIME = 1e-9  # nearer to the data coefficients leave the range of float32
LANGEVIN_NORMS = ("sample", "batch")


def check_stochasticity(name: str, value: Any) -> float | list[float]:
    """A number from 0 to 1000, or a list of them."""
    if isinstance(value, (list, tuple)):
        return [check_number(f"{name}[{i}]", each, at_least=0.0, at_most=1000.0) for i, each in enumerate(value)]
    return check_number(name, value, at_least=0.0, at_most=1000.0)


def check_window(name: str, value: Any, integers: bool = False) -> list[float]:
    """Two numbers of at least 0 that do not decrease."""
    low, high = check_pair(name, value, at_least=0.0)
    if integers:
        return [check_integer(f"{name}[{i}]", each, at_least=0) for i, each in enumerate(value)]
    return [low, high]


_Init = TypeVar("_Init", bound=Callable[..., None])


def or_none(check: Callable[..., Any], **bounds: Any) -> Callable[[str, Any], Any]:
    """A check that also allows None."""
    return lambda name, value: None if value is None else check(name, value, **bounds)


def one_of(*words: str | None) -> Any:
    """The type of these words alone."""
    return Literal[tuple(words)]


def check_range(name: str, value: Any) -> list[float]:
    """Two numbers in increasing order, as a list of Python floats, which is how a config holds them.

    Raises:
        ValueError: They are not.
    """
    low, high = check_pair(name, value)
    check_ordered(f"{name}[0]", low, f"{name}[1]", high)
    return [low, high]


# Its square, and one over that, are numbers of float32.
SCALE_CHECK = partial(check_number, at_least=1e-9, at_most=1e6)


@dataclass(frozen=True)
class SamplerArgument:
    """One argument of every scheduler.

    Attributes:
        name: Its name, which is also its key in the config.
        type: Its annotation: a word, or the words that it may be, which editors offer.
        default: Its default, where a class does not state another.
        check: (name, value) -> the value as a plain Python one, or a ValueError.
        documentation: What it means.
    """

    name: str
    type: Any
    default: Any
    check: Callable[[str, Any], Any]
    documentation: str


SAMPLER_ARGUMENTS = (
    # the network
    SamplerArgument(
        "num_train_timesteps",
        "int",
        1000,
        partial(check_integer, at_least=1, at_most=LONGEST_TABLE),
        "This is N, the scale of the network's timesteps.",
    ),
    SamplerArgument(
        "prediction_type",
        one_of(*PREDICTION_TYPES),
        "epsilon",
        partial(check_choice, allowed=PREDICTION_TYPES),
        "The network predicts the noise (``epsilon``), the data (``sample``), alpha eps - sigma x0 (``v_prediction``), "
        "eps - x0 (``flow_prediction``), the ``score``, or EDM's preconditioned output (``edm``).",
    ),
    # the sampler
    SamplerArgument(
        "predictor",
        one_of(*PREDICTORS),
        "exponential",
        partial(check_choice, allowed=PREDICTORS),
        "The rule that leads from one noise level to the next is ``exponential``, ``singlestep``, ``ancestral``, "
        "``reverse_diffusion``, ``euler_maruyama`` or ``heun``; ``none`` leaves the state to the corrector.",
    ),
    SamplerArgument(
        "corrector",
        one_of(None, *CORRECTORS),
        None,
        partial(check_choice, allowed=(None, *CORRECTORS)),
        "MCMC at a fixed time follows each step by ``langevin``, ``annealed_langevin`` or ``ornstein_uhlenbeck``; None "
        "leaves it out.",
    ),
    SamplerArgument(
        "probability_flow",
        "bool",
        False,
        check_flag,
        "True integrates the probability-flow ODE instead of the reverse SDE.",
    ),
    SamplerArgument(
        "stochasticity",
        "float | list[float] | None",
        None,
        or_none(check_stochasticity),
        "This is eta of the reverse SDE, dx = [f x - (1 + eta^2)/2 g^2 score] dt + eta g dw; 1 is Anderson's. A list "
        "has one number for each step but the last, which draws no noise. None is 1, and for ``exponential`` as much "
        "as each step allows: eta^2 = min(0.6/h, 2), where h is the length in log(alpha/sigma) of the step or of the "
        "next one, whichever is longer: more noise the more steps there are.",
    ),
    SamplerArgument(
        "stochastic_indices",
        "list[int] | None",
        None,
        or_none(check_window, integers=True),
        "Two numbers, the first step that draws noise and the first one that draws none again; the other steps follow "
        "the probability flow. None means all steps.",
    ),
    SamplerArgument(
        "stochastic_sigmas",
        "list[float] | None",
        None,
        or_none(check_window),
        "Two noise-to-signal ratios sigma/alpha: only steps that start between them draw noise. Such a window means "
        "the same noise on every grid and under every shift.",
    ),
    SamplerArgument(
        "policy",
        "str | None",
        None,
        partial(check_choice, allowed=(None, *POLICIES)),
        "A named stochastic policy for reinforcement learning, in place of the predictor and its options: ``exact`` "
        "(x0_hat is frozen over a step, all else is exact), ``ddpo`` (DDIM's eta), ``flow_grpo``, ``dance_grpo`` or "
        "``flow_cps``. ``stochasticity`` is its one number, eta or a; None is the published one.",
    ),
    SamplerArgument(
        "solver_order",
        "int | None",
        None,
        or_none(check_integer, at_least=1, at_most=3),
        "This is the order of the ``exponential`` predictor. None takes 3 where the steps are short and 2 where they "
        "are long, and extrapolates no estimate further than it carries, which is safe on any grid; a pipeline that "
        "guides by a measurement takes 1. 1, 2 or 3 is the classical multistep rule of that order, also where a step "
        "is much longer than those before it.",
    ),
    SamplerArgument(
        "solver_type",
        one_of(*SOLVER_TYPES),
        "heun",
        partial(check_choice, allowed=SOLVER_TYPES),
        "The weight of the slope in order 2 is that of ``heun`` or ``midpoint``, DPM-Solver++'s names; ``heun`` is "
        "exact.",
    ),
    SamplerArgument(
        "solver_correction",
        "bool",
        True,
        check_flag,
        "True redoes each step of ``exponential`` with the estimate at its end once that is known, as UniPC does. It "
        "costs no model call, draws no noise, and is no MCMC ``corrector``. It is off behind ``langevin``, whose step "
        "varies.",
    ),
    SamplerArgument(
        "gaussian_std",
        "float | None",
        None,
        or_none(check_number, at_least=0.0, at_most=1e6),
        "This is the standard deviation, in units of the data, of the Gaussian part of the data that ``exponential`` "
        "integrates exactly: 0 is data prediction, large values are noise prediction, and between the two the first "
        "holds above this noise and the second below. None is a tenth of ``data_std``, or 0.05.",
    ),
    SamplerArgument(
        "data_std",
        "float | None",
        None,
        or_none(SCALE_CHECK),
        "This is the standard deviation of the data about their mean, in units of the data. The grids ``sech`` and "
        "``blended`` move by -log(data_std/0.5) in log(alpha/sigma), and ``gaussian_std`` follows it where that is "
        "None, so that a sampler treats data c x_0 as it treats x_0. None stands for 0.5, which suits pixels in "
        "[-1, 1]; latents that are scaled to unit variance have 1. It says nothing about the network, as "
        "``sigma_data`` does.",
    ),
    SamplerArgument(
        "correct_steps",
        "int",
        1,
        partial(check_integer, at_least=1, at_most=MOST_CORRECTIONS),
        "The corrector is called this often per noise level.",
    ),
    SamplerArgument(
        "snr",
        "float",
        0.01,
        partial(check_number, above=0.0, at_most=1000.0),
        "This is the signal-to-noise ratio of the corrector's step size; the best one depends on the SDE, the data "
        "and the number of steps.",
    ),
    SamplerArgument(
        "langevin_norm",
        one_of(*LANGEVIN_NORMS),
        "sample",
        partial(check_choice, allowed=LANGEVIN_NORMS),
        "``sample`` takes each sample's own norms; ``batch`` takes the batch mean, as the official code does.",
    ),
    SamplerArgument(
        "temperature",
        "float",
        1.0,
        partial(check_number, above=0.0, at_most=HOTTEST),
        "This is T of the samples, by a factor (snr c^2 + 1)/(T snr c^2 + 1) on the score (arXiv:2510.01184), for the "
        "steps, the corrector, and the adaptive ODE and SDE. Gaussian data of standard deviation c have samples of "
        "variance T c^2, and any data samples that are more typical below 1 and more diverse above. It costs nothing. "
        "Likelihoods, codes and ``denoise`` stay at 1; the ``temperature`` of ``decode`` is another, a factor on "
        "codes.",
    ),
    SamplerArgument(
        "temperature_std",
        "float | None",
        None,
        or_none(SCALE_CHECK),
        "This is c of ``temperature``, in units of the data. Structure finer than c is cooled by more than T, coarser "
        "structure hardly. None takes ``data_std`` or, where that is None, ``sigma_data``, whose default suits pixels "
        "in [-1, 1]; latents have about 1.",
    ),
    # the grid
    SamplerArgument(
        "time_grid",
        one_of(None, *TIME_GRIDS) | list[float],
        "sech",
        check_time_grid,
        "The noise levels lie on ``sech``, ``log_snr``, ``karras``, ``uniform`` (in t, the paper's) or ``blended`` "
        "(the mean of ``uniform`` and ``sech``, for swapped configs), or, between increasing numbers, which are values "
        "of log(alpha/sigma), in equal parts: see ``profile_grid``. None means diffusers' grid, "
        "``timestep_spacing``, and so does a ``timestep_spacing`` or ``steps_offset`` that is passed alone.",
    ),
    SamplerArgument(
        "rho",
        "float",
        7.0,
        partial(check_number, at_least=0.01, at_most=1000.0),
        "This is the exponent of the ``karras`` grid.",
    ),
    SamplerArgument(
        "sampling_eps",
        "float",
        1e-3,
        partial(check_number, at_least=SMALLEST_TIME),
        "This is the last SDE time of a ``time_grid`` (the paper's epsilon).",
    ),
    SamplerArgument(
        "sampling_sigma",
        "float | None",
        None,
        or_none(check_number, above=0.0),
        "This is the noise-to-signal ratio sigma/alpha of the last level of a ``time_grid``, on every SDE, in place of "
        "``sampling_eps``, which means another ratio on each; None leaves it to ``sampling_eps``. ``blended`` on whole "
        "timesteps ends at the one nearest to it.",
    ),
    SamplerArgument(
        "timestep_spacing",
        one_of(*TIMESTEP_SPACINGS),
        "leading",
        partial(check_choice, allowed=TIMESTEP_SPACINGS),
        "diffusers' grid ``leading``, ``linspace`` or ``trailing`` is used where ``time_grid`` is None.",
    ),
    SamplerArgument(
        "steps_offset",
        "int",
        0,
        partial(check_integer, at_least=0, at_most=LONGEST_TABLE - 1),
        "This number is added to the timesteps of the ``leading`` grid.",
    ),
    # its results
    SamplerArgument(
        "denoise_final",
        "bool",
        True,
        check_flag,
        "True ends with x0_hat at the last time, which is the mean and has no noise.",
    ),
    SamplerArgument(
        "clip_sample",
        "bool",
        False,
        check_flag,
        "True clips x0_hat of predictor calls to [-clip_sample_range, clip_sample_range].",
    ),
    SamplerArgument("clip_sample_range", "float", 1.0, SCALE_CHECK, "``clip_sample`` clips to this range."),
    SamplerArgument(
        "bound_above_sigma",
        "float | None",
        None,
        or_none(check_number, at_least=0.0),
        "x0_hat of predictor calls is clipped to ``data_range`` where the noise-to-signal ratio sigma/alpha is above "
        "this number; None clips nowhere. A mean of data lies in their range, and far from the data a trained network "
        "may return what does not, which rules that extrapolate carry on.",
    ),
    SamplerArgument(
        "data_range",
        "list[float] | None",
        None,
        or_none(check_range),
        "These are the smallest and the largest value of the data, for ``bound_above_sigma``; None is "
        "[-clip_sample_range, clip_sample_range]. For latents, pass their mean minus and plus a few of their standard "
        "deviations.",
    ),
    # the network again
    SamplerArgument(
        "variance_type",
        one_of(*VARIANCE_TYPES),
        "fixed_small",
        partial(check_choice, allowed=VARIANCE_TYPES),
        "These are diffusers' names. ``fixed_large`` gives the ``ancestral`` predictor beta as variance; ``learned`` "
        "and ``learned_range`` mean that the network also returns a variance, which is dropped: the SDE fixes it.",
    ),
    SamplerArgument(
        "time_conditioning",
        one_of(None, *TIME_CONDITIONINGS),
        "continuous",
        partial(check_choice, allowed=(None, *TIME_CONDITIONINGS)),
        "For SDE time t and u = t / t_max, the network is fed u N - 1 (``discrete``), u N (``continuous``), u (N - 1) "
        "(``score_sde``), t itself (``time``), ``sigma``, ``log_sigma`` or ``edm``; see ``TimeConditioning``.",
    ),
    SamplerArgument(
        "sigma_data",
        "float",
        0.5,
        SCALE_CHECK,
        "This is the standard deviation of the data, for ``edm`` prediction and ``temperature``.",
    ),
    # a sampler that was fitted to the network
    SamplerArgument(
        "fitted_plan",
        "dict | None",
        None,
        or_none(check_fitted_plan),
        "The numbers of a sampler that ``fit_scheduler`` has fitted to one network, for one number of levels, in place "
        "of the predictor, the grid and their options; None is the sampler that these describe.",
    ),
)


def checked_sampler(
    config: Mapping[str, Any], prediction_types: Collection[str] = (), time_conditionings: Collection[str] = ()
) -> dict[str, Any]:
    """The shared arguments of a config with their values as plain Python ones.

    Args:
        config: The config.
        prediction_types: Names that the class allows beside those of ``PREDICTION_TYPES``.
        time_conditionings: Names that the class allows beside those of ``TIME_CONDITIONINGS``.

    Raises:
        ValueError: A value of the wrong type or out of range; the message names the key.
    """
    checks = {a.name: a.check for a in SAMPLER_ARGUMENTS}
    if prediction_types:
        checks["prediction_type"] = partial(check_choice, allowed=(*PREDICTION_TYPES, *prediction_types))
    if time_conditionings:
        allowed = (None, *TIME_CONDITIONINGS, *time_conditionings)
        checks["time_conditioning"] = partial(check_choice, allowed=allowed)
    checked = {name: check(name, config[name]) for name, check in checks.items()}
    if checked["steps_offset"] >= checked["num_train_timesteps"]:
        raise ValueError(
            f"steps_offset must be less than num_train_timesteps = {checked['num_train_timesteps']}, got "
            f"{checked['steps_offset']!r}."
        )
    return checked


@overload
def sampler_arguments(init: _Init, /) -> _Init: ...
@overload
def sampler_arguments(**defaults: Any) -> Callable[[_Init], _Init]: ...
def sampler_arguments(init: Any = None, /, **defaults: Any) -> Any:
    """Give the ``__init__`` of a scheduler the arguments that all of them share.

        @sampler_arguments(snr=0.15)
        def __init__(self, rate: float = 1.0, prediction_type: str = "score", **sampler):
            self.setup(MySDE(rate))

    The signature then is flat: the arguments that are spelled, as they are, and behind them the shared ones, as keyword
    arguments. All are checked, and written to the config. A shared one that is spelled keeps its place and the default
    that it is given there.

    Args:
        init: The ``__init__``; its last parameter is ``**sampler``.
        **defaults: Defaults of this class, where they differ from those of the list.

    Raises:
        TypeError: ``__init__`` has no ``**sampler``, or a default belongs to no argument of the list.
    """
    if init is None:
        return partial(_with_sampler_arguments, defaults=defaults)
    return _with_sampler_arguments(init, defaults)


def _with_sampler_arguments(init: Callable[..., None], defaults: Mapping[str, Any]) -> Callable[..., None]:
    *own, rest = inspect.signature(init).parameters.values()
    if rest.kind is not inspect.Parameter.VAR_KEYWORD:
        raise TypeError(f"The last parameter of {init.__qualname__} must be **sampler, got {rest}.")
    spelled = {parameter.name for parameter in own}
    shared = {a.name: a for a in SAMPLER_ARGUMENTS if a.name not in spelled}
    if unknown := defaults.keys() - shared.keys():
        raise TypeError(f"sampler_arguments takes defaults of {', '.join(shared)}, got {', '.join(sorted(unknown))}.")
    added = [
        inspect.Parameter(
            a.name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(a.name, a.default), annotation=a.type
        )
        for a in shared.values()
    ]
    signature = inspect.Signature([*own, *added], return_annotation=None)

    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}.__init__() {error}") from None
        bound.apply_defaults()
        checked = checked_sampler(self.config, self.prediction_types, self.time_conditionings)
        self.register_to_config(**checked)
        bound.arguments.update(checked)
        init(*bound.args, **bound.kwargs)

    checked_init.__signature__ = signature  # type: ignore[attr-defined]
    types = {p.name: p.annotation for p in signature.parameters.values() if p.annotation is not p.empty}
    checked_init.__annotations__ = {**types, "return": None}
    registered: Callable[..., None] = register_to_config(checked_init)
    return registered


def document_arguments(cls: type) -> None:
    """Put the shared arguments where the docstring of a class says ``{common}``, or else behind it.

    Those that the class documents itself are left out. The indentation of the source is taken away, as Python does
    itself from 3.13 on.
    """
    text = inspect.cleandoc(cls.__doc__ or "")
    lines = [
        textwrap.fill(f"{a.name}: {a.documentation}", 116, initial_indent=" " * 4, subsequent_indent=" " * 8)
        for a in SAMPLER_ARGUMENTS
        if f"\n    {a.name}: " not in text
    ]
    before, placed, after = text.partition("{common}")
    if placed:
        cls.__doc__ = before + "\n".join(lines).strip() + after
    elif "__init__" in cls.__dict__:
        cls.__doc__ = f"{text.rstrip()}\n\nShared by all SDE schedulers:\n" + "\n".join(lines) + "\n"
