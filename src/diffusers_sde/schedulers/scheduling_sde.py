"""What all SDE schedulers share: a plan, and diffusers' ``step()`` that executes one row of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from ..denoisers import network_denoiser
from ..noise import standard_normal_like
from ..parametrizations import Parametrization, TimeConditioning, get_parametrization
from ..plans import Plan, Row, advance, make_plan
from ..predictors import PredictorOptions, get_predictor
from ..sdes import SDE, expand_like
from ..time_grids import MIN_LOG_SNR, discrete_timesteps, get_time_grid

LANGEVIN_NORMS = ("sample", "batch")

COMMON_ARGUMENTS = """
        predictor: ``exponential``, ``ancestral``, ``reverse_diffusion``, ``euler_maruyama``, ``heun`` or ``none``.
        corrector: None, ``langevin`` or ``annealed_langevin``.
        probability_flow: Integrate the probability-flow ODE instead of the reverse SDE.
        stochasticity: eta of the reverse SDE, dx = [f x - (1 + eta^2)/2 g^2 score] dt + eta g dw; 1 is Anderson's.
        solver_order: 1, 2 or 3, of the ``exponential`` predictor.
        correct_steps: Corrector calls per noise level.
        snr: Signal-to-noise ratio of the corrector's step size; the best depends on SDE, data and number of steps.
        langevin_norm: ``sample`` takes each sample's own norms, ``batch`` the batch mean, as the official code.
        time_grid: ``uniform`` (in t, the paper's), ``log_snr`` or ``karras``; None for ``timestep_spacing``.
        rho: Exponent of the Karras grid.
        sampling_eps: Last SDE time of a ``time_grid`` (the paper's epsilon).
        timestep_spacing: ``leading``, ``linspace`` or ``trailing``: diffusers' grids, used where ``time_grid`` is None.
        steps_offset: Added to the timesteps of the ``leading`` grid.
        denoise_final: End with x0_hat at the last time, the mean without noise.
        clip_sample: Clip x0_hat of predictor calls to [-clip_sample_range, clip_sample_range].
        clip_sample_range: See ``clip_sample``.
        variance_type: ``fixed_small`` or ``fixed_large``, the noise of the ``ancestral`` predictor.
        time_conditioning: What the network is fed for SDE time t: ``discrete`` (t N - 1), ``continuous`` (t N),
            ``score_sde`` (t (N - 1)), ``sigma``, ``log_sigma`` or ``edm``; see ``TimeConditioning``.
        sigma_data: Standard deviation of the data, for ``edm`` prediction.
""".strip()


def document_common_arguments(cls: type) -> type:
    """Put the arguments that all SDE schedulers share where the class docstring says ``{common}``."""
    cls.__doc__ = (cls.__doc__ or "").replace("{common}", COMMON_ARGUMENTS)
    return cls


@dataclass
class SDESchedulerOutput(BaseOutput):
    """Output of ``step``.

    Attributes:
        prev_sample: The sample after this model call, the next model input before ``scale_model_input``.
        pred_original_sample: The denoised estimate x0_hat = E[x_0 | x_t] that this model call implies.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class SDEScheduler(SchedulerMixin, ConfigMixin):
    """Base of the SDE schedulers. Not constructed itself: a subclass names an SDE and its config arguments.

    ``set_timesteps`` lays the sampler out as a plan, one row of numbers per model call; ``step`` executes the next row.
    Predictor-corrector sampling and Heun repeat timesteps, ``order`` of them per noise level, so a pipeline that calls
    the network once per timestep runs them unchanged. ``num_inference_steps`` counts noise levels; the number of model
    calls is ``len(scheduler.timesteps)``.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    sde: SDE
    parametrization: Parametrization
    conditioning: TimeConditioning
    timesteps: Tensor

    # ------------------------------------------------------------------ construction

    def _setup(self, sde: SDE) -> None:
        """Finish construction: check the config and put the scheduler in its initial state."""
        config = self.config
        self.sde = sde
        self.parametrization = get_parametrization(config.prediction_type, config.sigma_data)
        self.conditioning = TimeConditioning(config.time_conditioning, config.num_train_timesteps)
        if config.langevin_norm not in LANGEVIN_NORMS:
            raise ValueError(f"langevin_norm must be one of {', '.join(LANGEVIN_NORMS)}, got {config.langevin_norm!r}.")
        if config.clip_sample and not config.clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be positive, got {config.clip_sample_range!r}.")
        if not 0 < config.sampling_eps < sde.t_max:
            raise ValueError(f"sampling_eps must lie in (0, {sde.t_max}), got {config.sampling_eps!r}.")
        if config.time_grid is not None:
            get_time_grid(config.time_grid, sde, 2, sde.t_max, config.sampling_eps, config.rho)
        self.init_noise_sigma = sde.prior_std
        self.num_inference_steps: int | None = None
        # A trial plan: whatever combination make_plan refuses is refused here, before anything is trained.
        self._set_plan(torch.tensor([0.5, 0.4], dtype=torch.float64) * sde.t_max, "cpu")
        self.order = self._order
        every = torch.arange(config.num_train_timesteps, 0, -1, dtype=torch.float64) / config.num_train_timesteps
        self.timesteps = self._fed(every * sde.t_max)

    @property
    def stochasticity(self) -> float:
        """Eta of the reverse SDE: 0 for the probability-flow ODE, 1 for the reverse SDE."""
        return 0.0 if self.config.probability_flow else self.config.stochasticity

    def _make_plan(self, times: Tensor) -> Plan:
        config = self.config
        plan = make_plan(
            self.sde,
            times,
            predictor=config.predictor,
            corrector=config.corrector,
            correct_steps=config.correct_steps,
            snr=config.snr,
            stochasticity=self.stochasticity,
            options=PredictorOptions(config.solver_order, config.get("variance_type", "fixed_small")),
            denoise_final=config.denoise_final or len(times) == 1,
        )
        # Where x0_hat is clipped it has to be formed; otherwise the parametrisation disappears in the coefficients.
        return plan.fold(self.parametrization, self.sde, predictors=not config.clip_sample)

    # ------------------------------------------------------------------ the time grid

    def _times(self, num_inference_steps: int) -> Tensor:
        """The SDE times of ``num_inference_steps`` noise levels, decreasing, float64."""
        config, sde = self.config, self.sde
        points = num_inference_steps + (0 if config.denoise_final else 1)
        if config.time_grid is None:
            timesteps = discrete_timesteps(
                config.timestep_spacing, points, config.num_train_timesteps, config.steps_offset
            )
            return TimeConditioning("discrete", config.num_train_timesteps).time(
                sde, torch.from_numpy(timesteps.astype(np.float64))
            )
        start = sde.t_max
        if not get_predictor(config.predictor).finite_at_zero_snr and math.isinf(float(sde.log_snr(start))):
            start = float(sde.time_of(MIN_LOG_SNR))
        return get_time_grid(config.time_grid, sde, points, start, config.sampling_eps, config.rho)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Lay out the sampler; resets all state of an earlier run.

        Args:
            num_inference_steps: Noise levels. Each costs ``order`` model calls (the last one may cost fewer).
            device: Where ``timesteps`` live. All coefficients stay on the host.
            timesteps: Decreasing network timesteps to use instead of the configured grid, one per noise level.
            sigmas: Decreasing noise-to-signal ratios sigma/alpha instead; a final 0 is allowed and means the data.

        Raises:
            ValueError: None or several of the three given, or values out of range.
        """
        if timesteps is not None and sigmas is not None:
            raise ValueError("Pass either timesteps or sigmas, not both.")
        if timesteps is not None:
            times = self._times_of_timesteps(timesteps)
        elif sigmas is not None:
            times = self._times_of_sigmas(sigmas)
        elif num_inference_steps is not None:
            if isinstance(num_inference_steps, bool) or int(num_inference_steps) != num_inference_steps:
                raise ValueError(f"num_inference_steps must be an integer, got {num_inference_steps!r}.")
            if num_inference_steps < 1:
                raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps!r}.")
            times = self._times(int(num_inference_steps))
        else:
            raise ValueError("Pass num_inference_steps, timesteps or sigmas.")
        levels = len(times) if self.config.denoise_final else len(times) - 1
        if num_inference_steps is not None and num_inference_steps != levels:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}, but {levels} levels were passed; leave it out."
            )
        self.num_inference_steps = levels
        self._set_plan(times, "cpu" if device is None else device)

    def _times_of_timesteps(self, timesteps: Sequence[float] | Tensor) -> Tensor:
        values = torch.as_tensor(timesteps, dtype=torch.float64).cpu()
        times = self.conditioning.time(self.sde, values)
        if not bool(((times > 0) & (times <= self.sde.t_max * (1 + 1e-9))).all()):
            low, high = (float(self.conditioning.timestep(self.sde, t)) for t in (self.sde.t_min, self.sde.t_max))
            raise ValueError(f"timesteps must lie between {low:g} and {high:g}, got {values.tolist()}.")
        return times.clamp(max=self.sde.t_max)

    def _times_of_sigmas(self, sigmas: Sequence[float] | Tensor) -> Tensor:
        values = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
        if len(values) > 1 and float(values[-1]) == 0.0:
            values = values[:-1]
        if not bool((values > 0).all()):
            raise ValueError(f"sigmas must be positive (a final 0 is allowed), got {values.tolist()}.")
        return self.sde.time_of(-2.0 * values.log()).clamp(max=self.sde.t_max)

    def _set_plan(self, times: Tensor, device: str | torch.device) -> None:
        plan = self._make_plan(times)
        self._level_times = times
        self._rows: tuple[Row, ...] = plan.rows
        self._order = plan.order
        self._memory_length = plan.memory
        self._memory: list[Tensor] = []
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._first_row = 0
        t = torch.tensor([row.t for row in plan.rows], dtype=torch.float64)
        scale = self.parametrization.input_scale(self.sde.alpha(t), self.sde.sigma(t))
        self._input_scale: list[float] | None = None if bool((scale == 1).all()) else scale.tolist()
        timesteps = self._fed(t)
        self._timestep_values: list[float] = timesteps.tolist()
        self.timesteps = timesteps.to(device)
        self.sigmas = torch.cat([torch.exp(-0.5 * self.sde.log_snr(t)), t.new_zeros(1)]).to(torch.float32)

    def _fed(self, t: Tensor) -> Tensor:
        """Timesteps of SDE times: int64 where they are entries of a DDPM table, as in diffusers, float32 otherwise."""
        fed = self.conditioning.timestep(self.sde, t)
        if self.conditioning.name == "discrete" and bool(((fed - fed.round()).abs() < 1e-6).all()):
            return fed.round().to(torch.int64)
        return fed.to(torch.float32)

    # ------------------------------------------------------------------ position in the plan

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

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """First index whose timestep is nearest to ``timestep``.

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
        return min(range(len(self._timestep_values)), key=lambda i: abs(self._timestep_values[i] - value))

    def _start(self, timestep: float | Tensor) -> int:
        """Set the step index at the first call, and adapt the plan to a start in the middle."""
        index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        self._step_index = index
        self._memory = []
        # A start inside a level (SDXL image-to-image rounds an odd index up when order is 2) would apply a predictor to
        # the wrong level: the sample is passed through until the next level begins.
        level = -(-index // self.order)
        self._first_row = level * self.order
        if self._memory_length and 0 < level < len(self._level_times) - 1:
            # Multistep rows here look back on estimates that do not exist: lay the rest of the plan out anew.
            self._rows = self._rows[: self._first_row] + self._make_plan(self._level_times[level:]).rows
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
    ) -> SDESchedulerOutput | tuple[Tensor, Tensor]:
        """Execute the next row of the plan: one predictor or corrector update after one model call.

        Args:
            model_output: What the network returned, shape (B, ...).
            timestep: The entry of ``timesteps`` it was called with; it only matters at the first step.
            sample: The current sample x_t, shape (B, ...), any floating dtype.
            generator: One generator, or one for each sample.
            return_dict: Whether to return an ``SDESchedulerOutput`` instead of a tuple.

        Returns:
            The new sample and x0_hat, in the dtype of ``sample``.

        Raises:
            ValueError: ``set_timesteps`` was not called, or the plan has come to its end.
        """
        index = self._step_index
        if index is None:
            if self.num_inference_steps is None:
                raise ValueError("Call set_timesteps before step.")
            index = self._start(timestep)
        if index >= len(self._rows):
            raise ValueError(f"All {len(self._rows)} steps are done: call set_timesteps to sample again.")
        row = self._rows[index]

        dtype = sample.dtype
        if dtype in (torch.float16, torch.bfloat16):
            sample = sample.float()
        model_output = model_output.to(sample.dtype)
        x0_hat = self._x0_hat(row, model_output, sample)

        if index < self._first_row:
            prev_sample = sample
        else:
            like = sample
            prev_sample = advance(
                row,
                sample,
                x0_hat if self.config.clip_sample and not row.is_corrector else model_output,
                self._memory,
                lambda: standard_normal_like(like, generator),
                batch_norms=self.config.langevin_norm == "batch",
            )
            if row.remember:
                self._memory = [x0_hat, *self._memory][: self._memory_length]
        self._step_index = index + 1

        prev_sample, x0_hat = prev_sample.to(dtype), x0_hat.to(dtype)
        return SDESchedulerOutput(prev_sample, x0_hat) if return_dict else (prev_sample, x0_hat)

    def _x0_hat(self, row: Row, model_output: Tensor, sample: Tensor) -> Tensor:
        x0_hat = torch.add(sample * row.skip, model_output, alpha=row.out)
        if self.config.clip_sample:
            x0_hat = x0_hat.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x0_hat

    # ------------------------------------------------------------------ the path, for training and editing

    def sde_time(self, timestep: float | Tensor) -> Tensor:
        """SDE time at which the network is fed ``timestep``, same shape.

        With it an exact score can stand in for a network: at ``timestep`` it is grad log p_t, t = sde_time(timestep).
        """
        return self.conditioning.time(self.sde, timestep)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Draw from the marginal: alpha(t) x_0 + sigma(t) noise.

        Args:
            original_samples: x_0, shape (B, ...).
            noise: Unit noise of the same shape.
            timesteps: Network timesteps, shape (B,) or ().
        """
        t = self.sde_time(timesteps.to(original_samples.device))
        alpha, sigma = (
            expand_like(v, original_samples).to(original_samples) for v in (self.sde.alpha(t), self.sde.sigma(t))
        )
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """``add_noise`` under the name and argument order that flow-matching pipelines use."""
        return self.add_noise(sample, noise, timestep)

    def denoiser(self, network: Callable[..., Any], **kwargs: Any) -> Callable[[Tensor, Tensor | float], Tensor]:
        """(x_t, SDE time) -> x0_hat for a network that this scheduler describes; see ``network_denoiser``."""
        return network_denoiser(network, self.sde, self.parametrization, self.conditioning, **kwargs)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)
