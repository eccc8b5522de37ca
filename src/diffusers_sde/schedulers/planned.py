"""The sampler that an SDE scheduler's config describes, laid out as a plan: a rule, its noise, or what was fitted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..networks.parametrizations import Parametrization
from ..sampling.planning import make_plan
from ..sampling.policies import Policy, windowed
from ..sampling.predictors import get_predictor
from ..sampling.rows import Plan
from ..sampling.stages import Predictor
from .arguments import SAMPLER_ARGUMENTS
from .fitted_plans import NETWORK_SETTINGS, plan_entry, stored_plan, why_not_of
from .path import PathScheduler


class PlanningScheduler(PathScheduler):
    """A scheduler whose sampler is a plan over given noise levels."""

    _policy: Policy | None
    _fitted: Plan | None
    _sampled: Parametrization
    _final_time: float | None

    @property
    def stochasticity(self) -> float | list[float] | None:
        """``eta`` of the reverse SDE: 0 is the probability-flow ODE, 1 the reverse SDE, None is up to the predictor."""
        return 0.0 if self.config.probability_flow else self.config.stochasticity

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
