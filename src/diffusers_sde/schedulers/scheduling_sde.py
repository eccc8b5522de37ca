"""What all SDE schedulers share: a plan, and diffusers' ``step()`` that executes one row of it.

diffusers' interface is one class. What belongs to one subject stands in a base class of its own, in this order:
``configured`` (the config), ``path`` (marginals, for training and editing), ``planned`` (the sampler as a plan) and
``levels`` (the noise levels). Here are construction, the position in the plan, the step and its density.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from ..basics.checks import check_number
from ..basics.noise import standard_normal_like
from ..basics.precision import on_device
from ..guidance.temperature import Tempered
from ..networks.conditioning import TimeConditioning
from ..networks.parametrizations import get_parametrization
from ..sampling.policies import get_policy
from ..sampling.rows import Plan, Row, advance, concatenated, estimate_of, row_of
from ..sampling.time_grids import get_time_grid
from ..sampling.transitions import Transition, transition, why_not_gaussian
from ..sdes import SDE
from .arguments import SMALLEST_TIME
from .families import ORIGIN_KEY
from .levels import LevelledScheduler
from .refusals import refuse_foreign


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


class SDEScheduler(LevelledScheduler):
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

    # ------------------------------------------------------------------ construction

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
        self._policy = None if config.policy is None else get_policy(config.policy)
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

    # ------------------------------------------------------------------ laying out the sampler

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
        std = on_device([float(one.std) for one in each], sample.device)
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


def _is_whole(number: Any) -> bool:
    try:
        return not isinstance(number, bool) and int(number) == number
    except (TypeError, ValueError, OverflowError):
        return False
