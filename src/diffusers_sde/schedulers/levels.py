"""The noise levels that an SDE scheduler samples on: a grid of its config, or a list that a pipeline passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..basics.checks import check_number, check_numbers
from ..networks.conditioning import TimeConditioning
from ..sampling.time_grids import MIN_LOG_SNR, WARPED, discrete_timesteps, get_time_grid, whole_timesteps
from .arguments import SMALLEST_TIME
from .planned import PlanningScheduler
from .stock_configs import LEFT_OUT_KEY


class LevelledScheduler(PlanningScheduler):
    """A scheduler that chooses noise levels."""

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

    def _fed(self, t: Tensor) -> Tensor:
        """Timesteps of SDE times: int64 where they are entries of a DDPM table, as in diffusers, float32 otherwise."""
        fed = self.conditioning.timestep(self.sde, t)
        if self.conditioning.name == "discrete" and bool(((fed - fed.round()).abs() < 1e-6).all()):
            return fed.round().to(torch.int64)
        return fed.to(torch.float32)
