"""What all SDE schedulers share: a plan, and diffusers' ``step()`` that executes one row of it.

The file is long because diffusers' interface is one class: construction and configs, the time grid, the position in the
plan, the step and its density, and the path for training. What can stand alone stands beside it.
"""

from __future__ import annotations

import difflib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import BaseOutput
from torch import Tensor

from ..basics.checks import check_number, check_numbers
from ..basics.noise import standard_normal_like
from ..guidance.temperature import Tempered, rescale_temperature
from ..networks.conditioning import TimeConditioning, TimeMaps
from ..networks.denoisers import Denoiser, network_denoiser
from ..networks.parametrizations import Parametrization, get_parametrization
from ..sampling.planning import make_plan
from ..sampling.policies import Policy, get_policy, windowed
from ..sampling.predictors import get_predictor
from ..sampling.rows import Plan, Row, advance, concatenated, estimate_of, row_of
from ..sampling.stages import Predictor
from ..sampling.time_grids import MIN_LOG_SNR, WARPED, discrete_timesteps, get_time_grid, whole_timesteps
from ..sampling.transitions import Transition, transition, why_not_gaussian
from ..sdes import SDE, expand_like
from ..shipping.component import ShipsItsCode, refuse_newer, written_before
from .arguments import SAMPLER_ARGUMENTS, SMALLEST_TIME, document_arguments
from .config_checks import check_stock_numbers
from .conversion import KEPT_KEY, SAMPLER_KEYS, exchanged, is_stock_config, on_our_grid, translate_config
from .families import ORIGIN_KEY, Family, origin_class, register_families
from .fitted_plans import NETWORK_SETTINGS, changed_settings, check_fitted_plan, plan_entry, stored_plan, why_not_of
from .refusals import refuse_foreign
from .stock_configs import LEFT_OUT_KEY, stock_keys, with_stock_defaults

OLD_SOLVER_TYPES = ("bh1", "bh2", "logrho")  # stock solvers' names, which configs of ours once held in place of our own


@dataclass
class SDESchedulerOutput(BaseOutput):
    """Output of ``step``.

    Attributes:
        prev_sample: The sample after this model call, the next model input before ``scale_model_input``.
        pred_original_sample: The denoised estimate x0_hat = E[x_0 | x_t] that this model call implies. At another
            ``temperature`` than 1 it is that of the samples, not of the data: the estimate that the step itself takes.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class SDEScheduler(ShipsItsCode, SchedulerMixin, ConfigMixin):
    """Base of the SDE schedulers. It is not constructed itself: a subclass names an SDE and its config arguments.

        class MyScheduler(SDEScheduler):
            @sampler_arguments
            def __init__(self, rate: float = 1.0, **sampler):
                self.setup(MySDE(rate))

    ``set_timesteps`` lays the sampler out as a plan, one row of numbers per model call; ``step`` executes the next row.
    Predictor-corrector sampling and Heun repeat timesteps, ``order`` of them per noise level, so a pipeline that calls
    the network once per timestep runs them unchanged. ``num_inference_steps`` counts noise levels; the number of model
    calls is ``len(scheduler.timesteps)``.

    Attributes:
        prediction_types: Parametrisations of a subclass by name, which ``prediction_type`` may name beside the built-in
            ones.
        time_conditionings: Pairs of functions of a subclass by name, which ``time_conditioning`` may name beside the
            built-in ones.
    """

    prediction_types: Mapping[str, type[Parametrization]] = {}
    time_conditionings: Mapping[str, TimeMaps] = {}
    _compatibles: list[str] = []  # stock classes that, made from this one's config, fit the same networks
    _families: Mapping[str, Family] = {}  # the kinds of stock models that it is about, by name
    _source_entries = ("schedulers",)
    order = 1

    sde: SDE
    parametrization: Parametrization
    conditioning: TimeConditioning
    timesteps: Tensor

    # ------------------------------------------------------------------ construction

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        document_arguments(cls)
        if "_families" in cls.__dict__:
            register_families(cls.__name__, cls._families)

    def setup(self, sde: SDE, final_time: float | None = None) -> None:
        """Finish construction: the last line of the ``__init__`` of a subclass.

        Args:
            sde: The SDE, made of the subclass's arguments.
            final_time: SDE time to which a noise-free step leads behind the last level of diffusers' grids; None to end
                with x0_hat.

        Raises:
            ValueError: Arguments that do not fit together, or not this SDE; nothing has been trained or sampled yet.
        """
        # If timestep_spacing or steps_offset is given and time_grid is not, diffusers' grid is used.
        left_out = set(self.config.get("_use_default_values", ()))
        if "time_grid" in left_out and not {"timestep_spacing", "steps_offset"} <= left_out:
            self.register_to_config(time_grid=None)
        # Every value is recorded as given. Otherwise diffusers would replace ours by the defaults of the class that is
        # swapped in, and would not know whose config it is.
        name = type(self).__name__
        self.register_to_config(_use_default_values=[], _class_name=name, **{ORIGIN_KEY: name})
        config = self.config
        self.sde = sde
        self._final_time = final_time
        self.parametrization = get_parametrization(
            config.prediction_type, config.sigma_data, config.get("preconditioning"), self.prediction_types
        )
        self.conditioning = TimeConditioning(
            config.time_conditioning,
            config.num_train_timesteps,
            self.time_conditionings.get(config.time_conditioning),
        )
        self._sampled = self.parametrization  # of what is sampled, which may be cooler or hotter than the data
        if config.temperature != 1.0:
            self._sampled = Tempered(self.parametrization, config.temperature, self._temperature_std)
        self._policy: Policy | None = None if config.policy is None else get_policy(config.policy)
        if self._policy is not None and config.predictor != "exponential":
            raise ValueError(
                f"policy {config.policy!r} brings its own predictor: leave predictor at 'exponential', got "
                f"{config.predictor!r}."
            )
        self._clips = config.clip_sample or config.get("thresholding", False)
        self._data_range = config.data_range or [-config.clip_sample_range, config.clip_sample_range]
        self._learns_variance = config.variance_type in ("learned", "learned_range")
        self._batch_norms = config.langevin_norm == "batch"
        check_number("sampling_eps", config.sampling_eps, at_least=SMALLEST_TIME, below=sde.t_max)
        self._check_sampling_sigma()
        if config.time_grid is not None:
            get_time_grid(
                config.time_grid, sde, 2, sde.t_max, self.stated_last_time(), config.rho, data_std=config.data_std
            )
        self.init_noise_sigma = sde.prior_std
        self.num_inference_steps: int | None = None
        self._fitted: Plan | None = None
        if config.fitted_plan is not None:
            self._fitted = self._checked_fit(config.fitted_plan)
        # This is a trial plan: what make_plan refuses on every grid is refused here, before anything is trained.
        self._set_plan(torch.tensor([0.5, 0.4], dtype=torch.float64) * sde.t_max, "cpu", first=None)
        self.order = self._rows_per_level
        every = self._training_times()
        self.timesteps = self._fed(every)
        self.sigmas = torch.cat([self._sigmas(every), every.new_zeros(1)]).to(torch.float32)

    @classmethod
    def from_config(
        cls, config: dict[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Construct from the config of this class or of any diffusers scheduler of a model on the same path.

        Args:
            config: ``scheduler.config``, in memory or read from JSON.
            return_unused_kwargs: Whether to return the pair (scheduler, keys that are not arguments of this class).
            **kwargs: Arguments of this class that override the config. The grid of a stock config that is uniform in t
                gives way to ``blended``, which is more exact at every number of levels; ``time_grid=None`` keeps it.

        Raises:
            ValueError: The config describes another kind of path (the message names the class for it), holds a setting
                that would change the result and cannot be honoured, or an argument is unknown.
        """
        if not isinstance(config, dict):
            raise ValueError(f"config must be a dictionary such as scheduler.config, got {type(config).__name__}.")
        if not isinstance(config.get("_class_name", ""), str):
            raise ValueError(f"_class_name in the config must be a string, got {config['_class_name']!r}.")
        known = cls._get_init_keys(cls) - {"self"}
        unknown = {k: kwargs.pop(k) for k in list(kwargs) if k not in known}
        if unknown and not return_unused_kwargs:
            close = {name: difflib.get_close_matches(name, known, 1) for name in unknown}
            hints = "; ".join(f"{name!r}" + (f" (did you mean {c[0]!r}?)" if c else "") for name, c in close.items())
            raise ValueError(f"{cls.__name__} has no argument {hints}. It takes {', '.join(sorted(known))}.")
        refuse_newer(config, lambda: known | stock_keys(), cls.__name__)
        config = with_stock_defaults(config)
        # An argument of a user's class may have a name that means something else in a stock config.
        own_keys = known if origin_class(config, cls.__name__) is not None else ()
        check_stock_numbers({k: v for k, v in config.items() if k not in own_keys})
        if config.get("solver_order") == 3 and written_before(config, "0.2.0.dev0"):
            # 3 was the default then, and meant 2 up to 12 levels: the order was left to the sampler.
            config = {**config, "solver_order": None}
        lineage = [base.__name__ for base in cls.__mro__]
        implied = translate_config(config, cls.__name__, lineage, cls._families, known)
        if is_stock_config(config, cls.__name__) or config.get("solver_type") in OLD_SOLVER_TYPES:
            config = exchanged(config)
        kept_keys = (KEPT_KEY, LEFT_OUT_KEY)
        given = {k: v for k, v in config.items() if k in known}
        hidden = {k: v for k, v in config.items() if k not in known and (not k.startswith("_") or k in kept_keys)}
        if "predictor" not in config:
            # The config comes straight from diffusers. One that has been ours before already has these keys.
            if not {"time_grid", "timestep_spacing", "steps_offset"} & kwargs.keys():
                implied = on_our_grid(implied, config)
            elif kwargs.get("time_grid") is None:
                kwargs.pop("time_grid", None)  # the config's own grid, whichever that is
            elif kwargs["time_grid"] != implied.get("time_grid"):
                implied = {**on_our_grid(implied, config), "time_grid": kwargs["time_grid"]}
            given |= {k: v for k, v in implied.items() if k in known}
            hidden |= {k: v for k, v in implied.items() if k not in known}
        if kwargs.get("time_grid") not in (None, given.get("time_grid")) or "timestep_spacing" in kwargs:
            hidden.pop(LEFT_OUT_KEY, None)  # it belongs to the grid of the config
        arguments = {**given, **kwargs}
        if arguments.get("fitted_plan") is not None:
            arguments = cls._without_foreign_fit(arguments)
        scheduler = cls(**arguments)
        # These are keys of the scheduler that was swapped out. They are kept so that swapping back loses nothing.
        scheduler.register_to_config(**hidden)
        if "_diffusers_version" in config:  # read from a file, which holds no such list
            scheduler._internal_dict = FrozenDict(
                {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
            )
        hidden = {k: v for k, v in hidden.items() if not k.startswith("_")}
        return (scheduler, {**unknown, **hidden}) if return_unused_kwargs else scheduler

    def to_json_string(self) -> str:
        """The config as it is written; a stock class that reads it without this package takes no sampler setting."""
        config = {**json.loads(super().to_json_string()), "_use_default_values": list(SAMPLER_KEYS)}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _without_foreign_fit(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments, without a fitted plan where they ask for another sampler than the one that was fitted."""
        entry = check_fitted_plan("fitted_plan", arguments["fitted_plan"])
        changed = [key for key in changed_settings(entry, arguments) if key not in NETWORK_SETTINGS]
        if not changed:
            return arguments
        fitted, asked = (", ".join(f"{k}={of[k]!r}" for k in changed) for of in (entry["settings"], arguments))
        warnings.warn(
            f"the fitted plan of this {cls.__name__} is dropped: it was fitted with {fitted}, and {asked} was asked "
            "for.",
            stacklevel=3,
        )
        return {**arguments, "fitted_plan": None}

    def _fit_settings(self) -> dict[str, Any]:
        """The arguments that a fitted plan depends on."""
        names = [a.name for a in SAMPLER_ARGUMENTS if a.name != "fitted_plan"]
        names += [name for name in NETWORK_SETTINGS if name in self.config and name not in names]
        return {name: self.config[name] for name in names}

    def _checked_fit(self, entry: Mapping[str, Any]) -> Plan:
        """The fitted plan of the config.

        Raises:
            ValueError: It is one of another SDE, network or sampler.
        """
        reason, changed = why_not_of(entry, self.sde, self._fit_settings())
        if reason is None and changed:
            was = ", ".join(f"{key}={entry['settings'][key]!r}" for key in changed)
            reason = f"it was fitted with {was}, not with " + ", ".join(f"{k}={self.config[k]!r}" for k in changed)
        if reason is not None:
            raise ValueError(f"fitted_plan does not belong to this {type(self).__name__}: {reason}. Pass None.")
        return stored_plan(entry)

    def with_plan(
        self,
        plan: Plan,
        times: Tensor,
        network: Mapping[str, Any] | None = None,
        report: Mapping[str, Any] | None = None,
    ) -> Any:
        """A scheduler like this one whose sampler is a plan, for as many levels as the plan has.

        Args:
            plan: A plan on x0_hat, on this scheduler's SDE.
            times: SDE times of its levels.
            network: Some weights of the network that it was fitted to; see ``sampled_weights``.
            report: What is known about it, as plain numbers and words.
        """
        levels = len(times) if self.config.denoise_final else len(times) - 1
        entry = plan_entry(plan, times, levels, self.sde, self._fit_settings(), network, report)
        return type(self).from_config(self.config, fitted_plan=entry)

    @property
    def stochasticity(self) -> float | list[float] | None:
        """``eta`` of the reverse SDE: 0 is the probability-flow ODE, 1 the reverse SDE, None is up to the predictor."""
        return 0.0 if self.config.probability_flow else self.config.stochasticity

    @property
    def _temperature_std(self) -> float:
        known = (self.config.temperature_std, self.config.data_std, self.config.sigma_data)
        return float(next(std for std in known if std is not None))

    @property
    def _predictor(self) -> Predictor:
        config = self.config
        return get_predictor(config.predictor).from_config(config) if self._policy is None else self._policy.predictor

    @property
    def _starts_from_pure_noise(self) -> bool:
        """Whether the first step can start where alpha(t) = 0."""
        return self._predictor.finite_at_zero_snr and (self._policy is None or self._policy.finite_at_zero_snr)

    def _stochasticity_of(self, times: Tensor, first: int | None) -> Tensor | float | None:
        """Eta of the intervals of a grid, of which the first has number ``first``; None for a grid of any length."""
        config, value, intervals = self.config, self.stochasticity, len(times) - 1
        if config.probability_flow:
            return 0.0
        eta: Tensor | float | None
        if self._policy is not None:
            if isinstance(value, list):
                raise ValueError(f"stochasticity of the policy {config.policy!r} must be one number, got {value!r}.")
            eta = self._policy.stochasticity(self.sde, times, self._policy.level if value is None else value)
        elif isinstance(value, list):
            if first is not None and len(value) != first + intervals:
                raise ValueError(
                    f"stochasticity must have one number for each step but the last, {first + intervals} here, got "
                    f"{len(value)}."
                )
            eta = times.new_tensor(value[first:] if first is not None else max(value, default=0.0)).expand(intervals)
        else:
            eta = value
        windows = (config.stochastic_indices, config.stochastic_sigmas)
        if windows == (None, None):
            return eta
        if eta is None:
            eta = self._predictor.default_stochasticity(self.sde, times)
        each = torch.as_tensor(eta, dtype=times.dtype).expand(intervals)
        return windowed(self.sde, times, each, *windows, first=first or 0)

    def _make_plan(self, times: Tensor, first: int | None = None) -> Plan:
        """Lay out the sampler over levels, of which the first has number ``first`` on its grid; None to try it out."""
        plan = self._fitted
        if plan is None or first is None:
            plan = self._own_plan(times, first)
        elif first:
            raise ValueError(
                "a fitted plan starts at its first level, because its steps look back on those before: pass a "
                f"scheduler without it, {type(self).__name__}.from_config(scheduler.config, fitted_plan=None)."
            )
        # Where x0_hat is clipped it has to be formed; otherwise the parametrisation disappears in the coefficients.
        first_free = self._first_free(plan)
        bounds = [self._clips or i < first_free for i in range(len(plan))]
        return plan.fold(self._sampled, self.sde, bounds_estimate=bounds)

    def _own_plan(self, times: Tensor, first: int | None = None) -> Plan:
        """The sampler on x0_hat, as the config describes it."""
        config = self.config
        return make_plan(
            self.sde,
            times,
            predictor=self._predictor,
            corrector=config.corrector,
            correct_steps=config.correct_steps,
            snr=config.snr,
            stochasticity=self._stochasticity_of(times, first),
            denoise_final=config.denoise_final or len(times) == 1,
            final_time=self.own_final_time,
        )

    def _first_free(self, plan: Plan) -> int:
        """The index of the first row at so little noise that ``bound_above_sigma`` does not act from there on."""
        if self.config.bound_above_sigma is None:
            return 0
        is_bounded = self._noise_to_signal(plan.column("t")) > self.config.bound_above_sigma
        return int(is_bounded.long().cumprod(0).sum())

    @property
    def own_predictor(self) -> Predictor:
        """The predictor that the config describes."""
        return self._predictor

    @property
    def own_final_time(self) -> float | None:
        """SDE time to which a noise-free step leads behind the last level; None to end with x0_hat."""
        # Grids of ours end where final_sigmas_type="sigma_min" would lead: a step there would be a call for nothing.
        return self._final_time if self.config.time_grid is None else None

    def own_stochasticity(self, times: Tensor) -> Tensor | float | None:
        """Eta of each interval of a whole grid, as the config describes it; None is up to the predictor."""
        return self._stochasticity_of(times, 0)

    # ------------------------------------------------------------------ the time grid

    def sampling_times(self, num_inference_steps: int) -> Tensor:
        """The SDE times that ``set_timesteps(num_inference_steps)`` lays the sampler out over, decreasing, float64."""
        return self._finite_start(self.level_times(num_inference_steps))

    def level_times(self, num_inference_steps: int) -> Tensor:
        """The SDE times of ``num_inference_steps`` noise levels on the configured grid, decreasing, float64."""
        config, sde = self.config, self.sde
        if config.fitted_plan is not None:
            self._check_fitted_levels(num_inference_steps)
            return torch.tensor(config.fitted_plan["times"], dtype=torch.float64)
        points = num_inference_steps + (0 if config.denoise_final else 1)
        left_out = config.get(LEFT_OUT_KEY)  # of a swapped config
        if config.time_grid is None:
            timesteps = discrete_timesteps(
                config.timestep_spacing, points, config.num_train_timesteps, config.steps_offset, left_out is not None
            )
            return TimeConditioning("discrete", config.num_train_timesteps).time(
                sde, torch.from_numpy(timesteps.astype(np.float64))
            )
        start = sde.t_max
        if not self._starts_from_pure_noise and math.isinf(float(sde.log_snr(start))):
            start = float(sde.time_of(MIN_LOG_SNR))
        if left_out is not None and config.time_grid == "uniform" and config.sampling_sigma is None:
            return get_time_grid("uniform", sde, points + 1, start, left_out, warp=self._warp)[:-1]
        end = self.last_time()
        if config.sampling_sigma is not None and config.time_grid in WARPED:
            end = self._unwarped(end)
        times = get_time_grid(config.time_grid, sde, points, start, end, config.rho, self._warp, config.data_std)
        if config.time_grid == "blended" and self.conditioning.name == "discrete":
            # Pipelines of stock schedulers may look tables up by timestep, and networks were trained on whole ones.
            whole = whole_timesteps(self.conditioning.timestep(sde, times), config.num_train_timesteps)
            return self.conditioning.time(sde, whole)
        return times

    def _check_fitted_levels(self, num_inference_steps: int | None) -> None:
        """Refuse other levels than those that the plan was fitted for."""
        levels = self.config.fitted_plan["levels"]
        if num_inference_steps != levels:
            asked = "a list of levels" if num_inference_steps is None else f"{num_inference_steps}"
            raise ValueError(
                f"num_inference_steps must be {levels}, for which this scheduler was fitted, got {asked}: fit another, "
                f"or take {type(self).__name__}.from_config(scheduler.config, fitted_plan=None)."
            )

    def _warp(self, times: Tensor) -> Tensor:
        """The times to which uniform times are moved; here they stay."""
        return times

    def _unwarped(self, time: float) -> float:
        """The uniform time that ``_warp`` takes to ``time``."""
        return time

    def _training_times(self) -> Tensor:
        """The SDE times of ``timesteps`` before ``set_timesteps``: one for each that the network was trained on."""
        entries = self.config.num_train_timesteps
        return torch.arange(entries, 0, -1, dtype=torch.float64) / entries * self.sde.t_max

    def _sigmas(self, t: Tensor) -> Tensor:
        """sigma(t)/alpha(t), which pipelines and training scripts call sigma."""
        return self._noise_to_signal(t)

    def _noise_to_signal(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.sde.log_snr(t))

    def last_time(self) -> float:
        """SDE time at which sampling ends."""
        return self.stated_last_time()

    def stated_last_time(self) -> float:
        """The SDE time that ``sampling_sigma`` states, or else ``sampling_eps``."""
        sigma = self.config.sampling_sigma
        if sigma is None:
            return float(self.config.sampling_eps)
        return max(float(self.sde.time_of(-2.0 * math.log(sigma))), SMALLEST_TIME)

    def _check_sampling_sigma(self) -> None:
        """Refuse a ``sampling_sigma`` that the path does not pass, or that the grid cannot end at."""
        sigma = self.config.sampling_sigma
        if sigma is None:
            return
        if self.config.time_grid is None:
            raise ValueError(
                f"sampling_sigma ends a time_grid, but diffusers' grids end where they end: pass time_grid='sech' with "
                f"sampling_sigma={sigma!r}, or leave it out."
            )
        low, high = (math.exp(-0.5 * float(self.sde.log_snr(t))) for t in (SMALLEST_TIME, self.sde.t_max))
        # A path may begin with noise, which then is its smallest ratio, and is reached up to round-off.
        check_number("sampling_sigma", sigma, at_least=low * (1.0 - 1e-7), below=high)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        **foreign: Any,
    ) -> None:
        """Lay out the sampler; resets all state of an earlier run.

        Args:
            num_inference_steps: Noise levels. Each costs ``order`` model calls (the last one may cost fewer).
            device: Where ``timesteps`` live. All coefficients stay on the host.
            timesteps: Decreasing network timesteps to use instead of the configured grid, one per noise level.
            sigmas: Decreasing noise-to-signal ratios sigma/alpha instead; a final 0 is allowed and means the data.
            **foreign: Arguments of other schedulers, refused with the reason unless they ask for nothing.

        Raises:
            ValueError: None or several of the three given, or values out of range.
            TypeError: An argument that no scheduler has.
        """
        if foreign:
            refuse_foreign(type(self).__name__, "set_timesteps", foreign)
        fed = None
        if self._fitted is not None and (timesteps is not None or sigmas is not None):
            self._check_fitted_levels(None)
        if timesteps is not None and sigmas is not None:
            times, fed = self._levels_of_lists(timesteps, sigmas)
        elif timesteps is not None:
            times = self._times_of_timesteps(timesteps)
        elif sigmas is not None:
            times = self._times_of_sigmas(sigmas)
        elif num_inference_steps is not None:
            if not _is_whole(num_inference_steps):
                raise ValueError(f"num_inference_steps must be an integer, got {num_inference_steps!r}.")
            if num_inference_steps < 1:
                raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps!r}.")
            times = self.level_times(int(num_inference_steps))
        else:
            raise ValueError("Pass num_inference_steps, timesteps or sigmas.")
        levels = len(times) if self.config.denoise_final else len(times) - 1
        if num_inference_steps is not None and num_inference_steps != levels:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}, but {levels} levels were passed; leave it out."
            )
        self.num_inference_steps = levels
        self._set_plan(self._finite_start(times), "cpu" if device is None else device, fed)
        # A pipeline that passes a list takes the number of calls, len(timesteps), for that of levels.
        self.order = self._rows_per_level if timesteps is None and sigmas is None else 1

    def _levels_of_lists(self, timesteps: Any, sigmas: Any) -> tuple[Tensor, Tensor]:
        """The SDE times of levels that are given by both lists, and what the network is fed there."""
        raise ValueError("Pass either timesteps or sigmas, not both: only flows have pipelines that pass both.")

    def _finite_start(self, times: Tensor) -> Tensor:
        """The times, the first of them a little later where the predictor needs finite f(t) and g(t), and it has not.

        Pipelines of flows choose their own levels, and start at t = 1.
        """
        if self._starts_from_pure_noise or not len(times) or not math.isinf(float(self.sde.log_snr(times[0]))):
            return times
        first = self.sde.time_of(MIN_LOG_SNR).to(times)
        if len(times) > 1 and not float(first) > float(times[1]):
            first = 0.5 * (times[0] + times[1])
        return torch.cat([first.reshape(1), times[1:]])

    def _times_of_timesteps(self, timesteps: Sequence[float] | Tensor) -> Tensor:
        values = check_numbers("timesteps", timesteps)
        times = self.conditioning.time(self.sde, values)
        if not bool(((times > 0) & self.conditioning.lies_on(self.sde, values)).all()):
            low, high = (float(self.conditioning.timestep(self.sde, t)) for t in (self.sde.t_min, self.sde.t_max))
            raise ValueError(f"timesteps must lie between {low:g} and {high:g}, got {values.tolist()}.")
        return times.clamp(max=self.sde.t_max)

    def _times_of_sigmas(self, sigmas: Sequence[float] | Tensor) -> Tensor:
        values = check_numbers("sigmas", sigmas)
        if len(values) > 1 and float(values[-1]) == 0.0:
            values = values[:-1]
        by_sigma = TimeConditioning("sigma")
        if not bool((torch.isfinite(values) & (values > 0) & by_sigma.lies_on(self.sde, values)).all()):
            low, high = (float(by_sigma.timestep(self.sde, t)) for t in (0.0, self.sde.t_max))
            raise ValueError(
                f"sigmas must be positive numbers from {low:g} to {high:g}, the ends of the path (a final 0 is "
                f"allowed), got {values.tolist()}."
            )
        return by_sigma.time(self.sde, values).clamp(0.0, self.sde.t_max)

    def _set_plan(
        self, times: Tensor, device: str | torch.device, fed: Tensor | None = None, first: int | None = 0
    ) -> None:
        self._table_device = torch.device(device)
        self._lay_out(self._make_plan(times, first))
        plan = self._plan
        self._level_times = times
        self._stored: list[Tensor] = []
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._first_row = 0
        t = plan.column("t")
        scale = self.parametrization.input_scale(self.sde.alpha(t), self.sde.sigma(t))
        self._input_scale: list[float] | None = None if bool((scale == 1).all()) else scale.tolist()
        timesteps = self._fed(t) if fed is None else self._at_levels(t, times, fed)
        self._timestep_values: list[float] = timesteps.tolist()
        self.timesteps = timesteps.to(device)
        self.sigmas = torch.cat([self._sigmas(t), t.new_zeros(1)]).to(torch.float32)

    @staticmethod
    def _at_levels(t: Tensor, times: Tensor, fed: Tensor) -> Tensor:
        """What the network is fed in rows at times ``t``, each of them one of ``times``, where it is fed ``fed``."""
        of = dict(zip(times.tolist(), fed.tolist(), strict=True))
        if not of.keys() >= set(t.tolist()):
            raise ValueError(
                "Pass timesteps or sigmas, not both: this predictor calls the network between the levels too, where "
                "the two lists do not say what it is fed."
            )
        return torch.tensor([of[time] for time in t.tolist()], dtype=torch.float32)

    def _lay_out(self, plan: Plan) -> None:
        """Take a plan: its rows for eager steps, its table on the device for compiled ones, see ``_traced_row``."""
        self._plan, self._rows, self._rows_per_level = plan, plan.rows, plan.rows_per_level
        self._bounded_rows = self._first_free(plan)
        self._table = plan.table.to(device=self._table_device, dtype=torch.float32)
        # The first level has every kind of row; whether a kind draws noise is what most of its rows do, and the others
        # (above all the last row) are listed.
        draws = [row.draws_noise for row in plan.rows]
        self._draws = [
            2 * sum(draws[k :: plan.rows_per_level]) > len(draws[k :: plan.rows_per_level])
            for k in range(plan.rows_per_level)
        ]
        self._otherwise = tuple(i for i, d in enumerate(draws) if d != self._draws[i % plan.rows_per_level])

    def _fed(self, t: Tensor) -> Tensor:
        """Timesteps of SDE times: int64 where they are entries of a DDPM table, as in diffusers, float32 otherwise."""
        fed = self.conditioning.timestep(self.sde, t)
        if self.conditioning.name == "discrete" and bool(((fed - fed.round()).abs() < 1e-6).all()):
            return fed.round().to(torch.int64)
        return fed.to(torch.float32)

    # ------------------------------------------------------------------ position in the plan

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of the plan, one for each entry of ``timesteps``: SDE times and coefficients."""
        return self._rows

    @property
    def step_index(self) -> int | None:
        """Index of the next row; None before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first row, where a pipeline set one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this index of ``timesteps`` (image-to-image starts in the middle)."""
        self._begin_index = int(begin_index)

    def jump_to(self, index: int) -> None:
        """Let ``step`` go on with row ``index``, forgetting earlier estimates: for samplers that go back and forth."""
        if not 0 <= index < len(self._rows):
            raise ValueError(f"index must lie in [0, {len(self._rows)}), the rows of the plan, got {index!r}.")
        self._step_index, self._stored = index, []

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """First index whose timestep is nearest to ``timestep`` and at which sampling can start.

        An element of ``self.timesteps`` knows its own index, without waiting for the device. Any other value is looked
        up by distance, not equality: a pipeline may have cast it to bfloat16.
        """
        if isinstance(timestep, Tensor):
            if timestep.numel() == 1 and (
                timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr()
            ):
                return int(timestep.storage_offset())
            timestep = timestep.reshape(-1)[0]
        value = float(timestep)
        # Heun's second call has the timestep of the level that follows, and comes before it.
        return min(
            range(len(self._timestep_values)),
            key=lambda i: (abs(self._timestep_values[i] - value), self._rows[i].continues),
        )

    def _start(self, timestep: float | Tensor) -> int:
        """Set the step index at the first call, and adapt the plan to a start in the middle."""
        if self._begin_index is not None:
            index = self._begin_index
        elif torch.compiler.is_compiling():
            index = 0  # a traced function cannot look at the timestep's value: set_begin_index says where else to start
        else:
            index = self.index_for_timestep(timestep)
        self._step_index = index
        self._stored = []
        # A level can be entered at any call that stands at its own time: a corrector or the predictor's first. At two
        # starts the sample stands at the next level already, and is passed through until that begins: Heun's second
        # call; and, where order is 2, an odd index given by set_begin_index, because the SDXL family then starts one
        # call early: it takes every scheduler of order 2 for Heun.
        level = min(index // self._rows_per_level, len(self._level_times) - 1)
        self._first_row = index
        early = self._begin_index is not None and self.order == 2 and index % 2 == 1
        if index < len(self._rows) and (early or self._rows[index].continues):
            level += 1
            self._first_row = level * self._rows_per_level
        if self._plan.memory and 0 < level < len(self._level_times) - 1:
            # Multistep rows here look back on estimates that do not exist: lay the rest of the plan out anew.
            rest = self._make_plan(self._level_times[level:], level)
            self._lay_out(concatenated([self._plan.until(level * self._rows_per_level), rest]))
        return index

    # ------------------------------------------------------------------ sampling

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the network is to be called with: ``sample`` itself, unless the parametrisation preconditions it."""
        if self._input_scale is None:
            return sample
        index = self._step_index
        if index is None:
            if timestep is None:
                raise ValueError("scale_model_input needs the timestep before the first step.")
            index = self._start(timestep)
        return sample * self._input_scale[index]

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        prev_timestep: int | Tensor | None = None,
        **foreign: Any,
    ) -> SDESchedulerOutput | tuple[Tensor, Tensor]:
        """Execute the next row of the plan: one predictor or corrector update after one model call.

        Args:
            model_output: What the network returned, shape (B, ...).
            timestep: The entry of ``timesteps`` it was called with; it only matters at the first step.
            sample: The current sample x_t, shape (B, ...), any floating dtype.
            generator: One generator, or one for each sample.
            return_dict: Whether to return an ``SDESchedulerOutput`` instead of a tuple.
            eta: Pipelines written for DDIM always pass their own default, 0, which must not turn a reverse SDE into an
                ODE. So 0 means nothing here: stochasticity is set in the config, and any other value is refused.
            use_clipped_model_output: Accepted for the same pipelines; only False or None.
            prev_timestep: Accepted for UnCLIP's pipelines, which pass the entry of ``timesteps`` that follows; the plan
                knows it.
            **foreign: Arguments of other schedulers' steps, such as ``s_churn``: refused with what to set instead,
                unless they ask for nothing.

        Returns:
            The new sample and x0_hat, in the dtype of ``sample``.

        Raises:
            ValueError: ``set_timesteps`` was not called, the plan has come to its end, or an argument of another
                scheduler asks for something.
            TypeError: An argument that no scheduler has.
        """
        if eta or use_clipped_model_output:
            raise ValueError(
                f"eta={eta!r} and use_clipped_model_output={use_clipped_model_output!r} are DDIM's: set stochasticity "
                "(or probability_flow) and clip_sample in the scheduler's config instead."
            )
        if foreign:
            refuse_foreign(type(self).__name__, "step", foreign)
        index = self._step_index
        if index is None:
            if self.num_inference_steps is None:
                raise ValueError("Call set_timesteps before step.")
            index = self._start(timestep)
        if index >= len(self._rows):
            raise ValueError(f"All {len(self._rows)} steps are done: call set_timesteps to sample again.")
        dtype = sample.dtype
        if self._learns_variance and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        if dtype in (torch.float16, torch.bfloat16):
            sample = sample.float()
        model_output = model_output.to(sample.dtype)
        if torch.compiler.is_compiling():
            row = self._traced_row(index)
            # The memory is as long from the first step on as it will be, so that its length makes no graph of its own.
            # Rows that look back on nothing have weights of 0.
            missing = self._plan.memory - len(self._stored)
            self._stored = [*self._stored, *[torch.zeros_like(sample) for _ in range(missing)]]
        else:
            row = self._rows[index]
        x0_hat = self._clip(estimate_of(row, sample, model_output), index)
        prev_sample = sample
        if index >= self._first_row:
            draw = partial(standard_normal_like, sample, generator)
            prev_sample, kept = advance(row, sample, model_output, self._stored, draw, x0_hat, self._batch_norms)
            if kept is not None:
                self._stored = [kept, *self._stored][: self._plan.memory]
        self._step_index = index + 1
        prev_sample, x0_hat = prev_sample.to(dtype), x0_hat.to(dtype)
        return SDESchedulerOutput(prev_sample, x0_hat) if return_dict else (prev_sample, x0_hat)

    @property
    def stochastic_steps(self) -> tuple[int, ...]:
        """The rows of the plan, as indices of ``timesteps``, for which ``transition`` is defined."""
        return tuple(i for i, row in enumerate(self._rows) if why_not_gaussian(row) is None)

    def transition(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        memory: Sequence[Tensor] = (),
        index: int | Sequence[int] | Tensor | None = None,
    ) -> Transition:
        """The law p(x_s | x_t) = N(mean, std^2 I) of a step, without taking it.

        It depends on nothing that ``step`` has done, and changes nothing. Gradients reach ``model_output`` and
        ``sample``. Half precision is computed in float32. ``step`` draws what ``transition(...).sample(generator)``
        draws, bit for bit.

        Args:
            model_output: What the network returned, shape (B, ...).
            timestep: The entry of ``timesteps`` that it was called with, or one for each sample, shape (B,).
            sample: x_t, shape (B, ...).
            memory: For samplers that look back, the ``memory`` of the transition before: tensors of shape (B, ...). A
                batch of different steps hands none on.
            index: Index in ``timesteps``, or one for each sample, in place of the timestep. It is needed where several
                rows share a timestep, as with correctors.

        Raises:
            ValueError: The step has no density (``stochastic_steps`` lists those that have one), several rows have this
                timestep, or the step looks back on what is not given.
        """
        if self.num_inference_steps is None:
            raise ValueError("Call set_timesteps before transition.")
        indices = self._rows_of(timestep, index, len(sample))
        if self._learns_variance and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        sample, model_output = sample.to(dtype), model_output.to(dtype)

        def of_row(i: int, samples: slice) -> Transition:
            row, x, output = self._rows[i], sample[samples], model_output[samples]
            estimate = self._clip(estimate_of(row, x, output), i) if row.needs_estimate else None
            law = transition(row, x, output, [stored[samples] for stored in memory], estimate)
            return replace(law, memory=law.memory[: self._plan.memory])

        if len(set(indices)) == 1:
            return of_row(indices[0], slice(None))
        # Every sample by the numbers of its own row, so that it does not depend on its batch mates.
        each = [of_row(i, slice(k, k + 1)) for k, i in enumerate(indices)]
        std = torch.tensor([one.std for one in each], dtype=torch.float64, device=sample.device)
        return Transition(torch.cat([one.mean for one in each]), std)

    def _rows_of(self, timestep: float | Tensor, index: int | Sequence[int] | Tensor | None, samples: int) -> list[int]:
        """The row of each sample."""
        if index is not None:
            given = torch.as_tensor(index).reshape(-1).tolist()
        else:
            values = torch.as_tensor(timestep).reshape(-1).tolist()
            nearest = [min(self._timestep_values, key=lambda t: abs(t - value)) for value in values]
            shared = next((t for t in nearest if self._timestep_values.count(t) > 1), None)
            if shared is not None:
                raise ValueError(
                    f"{self._timestep_values.count(shared)} rows have the timestep {shared:g}: pass index, the place "
                    "in scheduler.timesteps, instead."
                )
            given = [self._timestep_values.index(t) for t in nearest]
        if len(given) not in (1, samples) or not all(0 <= i < len(self._rows) for i in given):
            raise ValueError(
                f"timestep and index must be one, or one for each of the {samples} samples, within the "
                f"{len(self._rows)} rows of the plan; got {len(given)}: {given}."
            )
        return given if len(given) == samples else given * samples

    def _traced_row(self, index: int) -> Row:
        """A row with coefficients from a tensor, for ``torch.compile``.

        Python numbers, which the eager step uses, would be constants of the graph and cost a compilation per step. Here
        the graph depends on the place in a level only. Noise is drawn where the eager step draws it and nowhere else,
        so that the next draw is the same too.
        """
        place = index % self._rows_per_level
        draws = self._draws[place]
        for i in self._otherwise:  # compared one by one: ``in`` of a traced number is no guard
            if index == i:
                draws = not draws
        kind = self._plan.kinds[place]
        if not (self._clips or index < self._bounded_rows):  # of one place, the rows at less noise take F itself
            kind = kind._replace(of_estimate=False, keeps_estimate=False)
        return row_of(self._table[index], kind, self._plan.memory, draws)

    def _clip(self, x0_hat: Tensor, index: int) -> Tensor:
        """x0_hat of row ``index`` within the bounds that the config states."""
        return self._clipped(x0_hat, index < self._bounded_rows)

    def bounded(self, x0_hat: Tensor, t: Tensor | float) -> Tensor:
        """x0_hat at an SDE time as predictors take it: within the bounds that the config states."""
        threshold = self.config.bound_above_sigma
        ratio = self._noise_to_signal(torch.as_tensor(t).detach())
        return self._clipped(x0_hat, threshold is not None and float(ratio) > threshold)

    @property
    def bounds_estimates(self) -> bool:
        """Whether the config states any bounds of x0_hat."""
        return bool(self._clips) or self.config.bound_above_sigma is not None

    def _clipped(self, x0_hat: Tensor, at_high_noise: bool) -> Tensor:
        config = self.config
        if config.get("thresholding", False):
            # Per sample, in the order of Saharia et al. 2022, section 2.3: clip at the quantile, then divide by it.
            quantile = torch.quantile(x0_hat.abs().flatten(1), config.dynamic_thresholding_ratio, dim=1)
            limit = expand_like(quantile.clamp(1.0, config.sample_max_value), x0_hat)
            x0_hat = torch.clamp(x0_hat, -limit, limit) / limit
        elif config.clip_sample:
            x0_hat = x0_hat.clamp(-config.clip_sample_range, config.clip_sample_range)
        return x0_hat.clamp(*self._data_range) if at_high_noise else x0_hat

    # ------------------------------------------------------------------ the path, for training and editing

    def sde_time(self, timestep: float | Tensor) -> Tensor:
        """SDE time at which the network is fed ``timestep``, same shape.

        With it an exact score can stand in for a network: at ``timestep`` it is grad log p_t, t = sde_time(timestep).
        """
        return self.conditioning.time(self.sde, timestep)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: float | Sequence[float] | Tensor) -> Tensor:
        """Draw from the marginal: alpha(t) x_0 + sigma(t) noise.

        Args:
            original_samples: x_0, shape (B, ...).
            noise: Unit noise of the same shape.
            timesteps: Network timesteps, shape (B,) or ().

        Raises:
            ValueError: A timestep at which the path does not exist.
        """
        alpha, sigma = self._marginal(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: float | Sequence[float] | Tensor, noise: Tensor) -> Tensor:
        """``add_noise`` under the name and argument order that flow-matching pipelines use."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: float | Sequence[float] | Tensor) -> Tensor:
        """The target of a network with ``v_prediction``: alpha(t) noise - sigma(t) x_0, on any path.

        Args:
            sample: x_0, shape (B, ...).
            noise: Unit noise of the same shape.
            timesteps: Network timesteps, shape (B,) or ().

        Raises:
            ValueError: A timestep at which the path does not exist.
        """
        alpha, sigma = self._marginal(timesteps, sample)
        return alpha * noise - sigma * sample

    def _marginal(self, timesteps: float | Sequence[float] | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha`` and ``sigma`` at network timesteps, shaped to be multiplied with ``like``."""
        fed = timesteps if isinstance(timesteps, Tensor) else torch.as_tensor(timesteps, dtype=torch.float32)
        t = self.sde_time(fed.to(like.device))
        # Entries of ``timesteps`` are right. Others are checked, for which the host waits if they are on a device.
        own = fed.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr()
        if not own and not torch.compiler.is_compiling():
            t_max, seen = self.sde.t_max, self.sde_time(fed)
            # A pipeline may have cast them to half precision; index -1 of a table would be the data.
            slack = 5e-3 if fed.dtype in (torch.float16, torch.bfloat16) else 1e-5
            first = 1.0 / self.config.num_train_timesteps if self.conditioning.name == "discrete" else 0.0
            if not bool(((seen >= (first - slack) * t_max) & (seen <= (1.0 + slack) * t_max)).all()):
                low, high = (float(self.conditioning.timestep(self.sde, u * t_max)) for u in (first, 1.0))
                raise ValueError(f"timesteps must lie between {low:g} and {high:g}, got {fed.tolist()}.")
            t = t.clamp(first * t_max, t_max)
        alpha, sigma = (expand_like(v, like).to(like) for v in (self.sde.alpha(t), self.sde.sigma(t)))
        return alpha, sigma

    def denoiser(self, network: Callable[..., Any], **kwargs: Any) -> Callable[[Tensor, Tensor | float], Tensor]:
        """(x_t, SDE time) -> x0_hat for a network that this scheduler describes; see ``network_denoiser``."""
        return network_denoiser(network, self.sde, self.parametrization, self.conditioning, **kwargs)

    def tempered(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser whose samples have the config's ``temperature``; at 1, ``denoiser`` itself.

        ``step`` does the same with what the network returns. ``denoiser`` of this class is at temperature 1.
        """
        return rescale_temperature(denoiser, self.sde, self.config.temperature, self._temperature_std)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


def _is_whole(number: Any) -> bool:
    try:
        return not isinstance(number, bool) and int(number) == number
    except (TypeError, ValueError, OverflowError):
        return False
