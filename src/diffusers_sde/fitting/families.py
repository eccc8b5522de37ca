"""Plans with parameters: a sampler of the package, and what may be changed about it to suit one network.

All parameters are numbers around 0, and where all are 0 the plan is that of the sampler itself:

* ``grid``: the intervals are softmax shares of the path in lambda = log(alpha/sigma), so that they keep their order;
  none falls below a floor. ``end`` lets the last level stand at more noise than the sampler's.
* ``stochasticity``: eta of each interval, times exp(e), of predictors that have coefficients for every eta. It enters
  the predictor, so that the coefficients of the sample and of the noise stay those of one SDE.
* ``state`` and ``history``: each step is x_s = (1 + a) x x_t + (model + b_0) x0_hat + sum_k (history_k + b_k) stored_k
  + noise z, around the predictor's own coefficients (Oganov et al. 2026, arXiv:2510.17699). b_0 follows from the
  others: with mu the mean of x_t and c_k that of stored_k for data that are one point, it solves
  a x mu + b_0 + sum_k b_k c_k = 0. So the mean of the samples stays right where x0_hat is, and a point stays a point,
  whatever the parameters are.
* ``estimate``: x0_hat + w k (x_t - alpha x0_hat), k = alpha c^2 / (alpha^2 c^2 + sigma^2), takes the place of x0_hat.
  The bracket is the noise in x_t; c is the standard deviation of the data.
* ``inputs``: the network is called at a noise level up to half an interval beside that of the sample (Tong et al. 2025,
  arXiv:2405.15506), within the levels that it knows. A network that knows a table of times is called at the sample's.
* ``corrector``: the step sizes of a corrector, snr of each level times exp(r).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..basics.checks import check_number
from ..sampling.exponential import Exponential, Singlestep
from ..sampling.planning import check_times, make_plan
from ..sampling.rows import MODEL, PLACES, STORED, Plan, X, substitute_estimate, without_unused_memory
from ..sampling.stages import Predictor
from ..sampling.time_grids import SECH_START
from ..sdes import SDE

SHORTEST_SHARE = 1e-3  # of the path in lambda, for an interval: a softmax may collapse
FEWEST_LOOKED_BACK = 2  # stored estimates that a step may weigh, where the sampler stores any
FARTHEST_INPUT = 0.5  # of the distance to the next level
ANY_STOCHASTICITY = (Exponential, Singlestep)  # predictors whose coefficients exist for every eta
PARTS = ("grid", "end", "stochasticity", "state", "history", "estimate", "inputs", "corrector")


@dataclass(frozen=True, eq=False)
class PlanFamily:
    """The plans around a sampler; see the head of this module.

    Args:
        sde: The SDE.
        times: The sampler's own grid, decreasing.
        predictor: The predictor.
        corrector: As in ``make_plan``.
        correct_steps: As in ``make_plan``.
        snr: As in ``make_plan``, one number.
        stochasticity: One number, None for the predictor's choice, or a function from a grid to eta of each interval.
        denoise_final: As in ``make_plan``.
        final_time: As in ``make_plan``.
        data_std: Standard deviation of the data.
        snap: For networks that know only some times: a function from a grid to the nearest grid of such times, which
            the levels are then moved to. ``inputs`` are left out.
        parts: Names of what is fitted, of ``PARTS``.

    Raises:
        ValueError: A grid that does not decrease, a part that does not exist, or what ``make_plan`` refuses.
    """

    sde: SDE
    times: Tensor
    predictor: Predictor
    corrector: str | None = None
    correct_steps: int = 1
    snr: float = 0.16
    stochasticity: float | None | Callable[[Tensor], Tensor | float | None] = None
    denoise_final: bool = True
    final_time: float | None = None
    data_std: float = 0.5
    snap: Callable[[Tensor], Tensor] | None = None
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        check_number("data_std", self.data_std, above=0.0)
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise ValueError(f"parts must be of {', '.join(PARTS)}, got {', '.join(map(repr, unknown))}.")
        times = check_times(self.sde, self.times, 1 if self.denoise_final else 2).detach()
        object.__setattr__(self, "times", times)

    # ------------------------------------------------------------------ the parameters

    @cached_property
    def base(self) -> Plan:
        """The sampler's own plan, on x0_hat."""
        return self._planned(self.times, self._eta_of(self.times), self.snr)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each part stands in the vector of parameters."""
        intervals = len(self.times) - 1
        eta = self._eta_of(self.times) if isinstance(self.predictor, ANY_STOCHASTICITY) else None
        lengths = {
            "grid": intervals if intervals > 1 else 0,
            "end": int(intervals > 0 and self.denoise_final and self.final_time is None),
            "stochasticity": intervals if eta is not None and bool((eta > 0.0).any()) else 0,
            "state": len(self._moving),
            "history": len(self._moving) * self._memory,
            "estimate": len(self._moving),
            "inputs": self._levels if self.snap is None else 0,
            "corrector": 0 if self.corrector is None else self._levels,
        }
        slices, first = {}, 0
        for part in PARTS:
            count = lengths[part] if part in self.parts else 0
            slices[part] = slice(first, first + count)
            first += count
        return slices

    @property
    def size(self) -> int:
        """How many parameters there are."""
        return max(part.stop for part in self.slices.values())

    @property
    def _levels(self) -> int:
        return len(self.times) if self.denoise_final else len(self.times) - 1

    @cached_property
    def _moving(self) -> list[int]:
        """The rows of the predictor that lead from a level to the next one."""
        at_data = torch.isnan(self.base.column("s")).tolist()
        used = (self.base.column("model") != 0.0).tolist()
        return [i for i, kind in enumerate(self.base.kinds) if not kind.is_corrector and used[i] and not at_data[i]][
            : None if self.final_time is None else -1
        ]

    @cached_property
    def _memory(self) -> int:
        """How many stored quantities the steps weigh."""
        return max(self.base.memory, FEWEST_LOOKED_BACK) if any(kind.keeps for kind in self.base.kinds) else 0

    @cached_property
    def _lambdas(self) -> Tensor:
        """The sampler's levels in lambda; a level of pure noise gets a finite place."""
        lam = 0.5 * self.sde.log_snr(self.times)
        if len(lam) > 1 and bool(torch.isneginf(lam[0])):
            after = lam[1] - (lam[2] - lam[1] if len(lam) > 2 else 1.0)
            lam = torch.cat([torch.minimum(after, lam.new_tensor(SECH_START)).reshape(1), lam[1:]])
        return lam

    def _part(self, parameters: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
        """The numbers of a part, zeros where it is not fitted."""
        values = parameters[self.slices[name]]
        return values.reshape(shape) if len(values) else parameters.new_zeros(shape)

    # ------------------------------------------------------------------ the plan

    def level_times(self, parameters: Tensor) -> Tensor:
        """The grid of these parameters, shape of ``times``, with gradients."""
        if len(self.times) == 1:
            return self.times
        lam = self._lambdas
        length = lam[-1] - lam[0]
        shares = (lam[1:] - lam[:-1]) / length
        floor = min(SHORTEST_SHARE, 0.5 * float(shares.min()))
        rest = 1.0 - floor * len(shares)
        logits = torch.log((shares - floor) / rest) + self._part(parameters, "grid", shares.shape)
        share = floor + rest * torch.softmax(logits, 0)
        end = self._part(parameters, "end", (1,)).clamp(min=-0.5 * float(length))
        last = lam[-1] + end - end.detach().clamp(min=0.0)  # cut off at 0, where its gradient goes on
        inner = lam[0] + (last - lam[0]) * share.cumsum(0)
        times = torch.cat([self.times[:1], _time_at(self.sde, inner)])
        if self.snap is None:
            return times
        # What the network knows stands in the plan, and gradients pass as if it had not been moved.
        return times + (self.snap(times.detach()) - times).detach()

    def plan(self, parameters: Tensor) -> Plan:
        """The plan of these parameters, on x0_hat; gradients reach its table.

        Args:
            parameters: Shape (size,), float64.
        """
        times = self.level_times(parameters)
        eta = self._eta_of(times)
        if eta is not None and len(parameters[self.slices["stochasticity"]]):
            eta = eta * torch.exp(self._part(parameters, "stochasticity", eta.shape))
        snr: Tensor | float = self.snr
        if self.corrector is not None:
            snr = self.snr * torch.exp(self._part(parameters, "corrector", (self._levels,)))
        plan = self._planned(times, eta, snr)
        table = self._with_memory(plan, self._memory)
        places, move, keep = table[:, : len(PLACES)], *table[:, len(PLACES) :].chunk(2, dim=1)

        rows = torch.tensor(self._moving, dtype=torch.int64)
        weight = self._at_rows(self._part(parameters, "estimate", (len(rows),)), rows, len(plan))
        alpha, sigma = self.sde.alpha(places[:, 0]), self.sde.sigma(places[:, 0])
        gain = weight * alpha * self.data_std**2 / ((alpha * self.data_std).square() + sigma.square())
        move, keep = (substitute_estimate(form, gain, 1.0 - gain * alpha) for form in (move, keep))

        move = self._corrected(plan, places, move, keep, parameters, rows)
        t = self._input_times(parameters, times, places[:, 0], plan)
        table = torch.cat([t[:, None], places[:, 1:], move, keep], dim=1)
        return without_unused_memory(Plan(table, plan.kinds, plan.rows_per_level))

    def _corrected(
        self, plan: Plan, places: Tensor, move: Tensor, keep: Tensor, parameters: Tensor, rows: Tensor
    ) -> Tensor:
        """The forms with the corrections of the state and of the history, and what these ask of x0_hat's weight."""
        memory = move.shape[1] - STORED
        pushed = self._means(plan, move, keep)
        means = torch.stack([mean for mean, _ in pushed])
        stored = torch.stack([kept for _, kept in pushed])
        state = self._at_rows(self._part(parameters, "state", (len(rows),)), rows, len(plan))
        weights = self._part(parameters, "history", (len(rows), self._memory))
        weights = torch.cat([weights, weights.new_zeros(len(rows), memory - self._memory)], dim=1)
        exists = torch.tensor([[k < count for k in range(memory)] for count in self._stored_before], dtype=torch.bool)
        scale = self.sde.alpha(torch.where(torch.isnan(places[:, 1]), places[:, 0], places[:, 1]))
        history = self._at_rows(weights, rows, len(plan)) * exists.reshape(len(plan), memory) * scale[:, None]
        of_x = state * move[:, X]
        of_model = -(of_x * means + (history * stored).sum(1))
        return move + torch.cat([torch.stack([of_x, of_model, torch.zeros_like(of_x)], dim=1), history], dim=1)

    @cached_property
    def _stored_before(self) -> list[int]:
        """How many quantities have been stored before each row."""
        counts, count = [], 0
        for kind in self.base.kinds:
            counts.append(count)
            count += kind.keeps
        return counts

    def _means(self, plan: Plan, move: Tensor, keep: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For data that are the point 1: the means of the sample and of what is stored, in front of each row."""
        mean, memory = self.sde.alpha(plan.column("t")[0]), move.shape[1] - STORED
        stored = [torch.zeros_like(mean)] * memory
        found = []
        for i, kind in enumerate(plan.kinds):
            kept = torch.stack(stored) if stored else mean.new_zeros(0)
            found.append((mean, kept))
            if kind.keeps:
                value = keep[i, X] * mean + keep[i, MODEL] + (keep[i, STORED:] * kept).sum()
                stored = [value, *stored][:memory]
            if not kind.is_langevin:  # whose score vanishes in the mean
                mean = move[i, X] * mean + move[i, MODEL] + (move[i, STORED:] * kept).sum()
        return found

    def _input_times(self, parameters: Tensor, times: Tensor, t: Tensor, plan: Plan) -> Tensor:
        """Times at which the network is called, of each row."""
        shifts = parameters[self.slices["inputs"]]
        if not len(shifts):
            return t
        lam = 0.5 * self.sde.log_snr(times)
        lam = torch.where(torch.isneginf(lam), self._lambdas[0], lam)
        if len(lam) > 1:
            gaps = lam[1:] - lam[:-1]
            room = torch.minimum(torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]]))
        else:
            room = torch.ones_like(lam)
        known = self._lambdas
        moved = lam[: self._levels] + FARTHEST_INPUT * room[: self._levels] * torch.tanh(shifts)
        moved = moved.clamp(float(known[0]), float(known[-1]))
        fed = _time_at(self.sde, moved)
        if bool(torch.isneginf(self.sde.log_snr(self.times[0]))):
            fed = torch.cat([times[:1], fed[1:]])
        level = torch.tensor([min(i // plan.rows_per_level, self._levels - 1) for i in range(len(plan))])
        stays = torch.tensor([kind.continues for kind in plan.kinds])
        return torch.where(stays, t, fed[level])

    def _planned(self, times: Tensor, eta: Tensor | None, snr: Tensor | float) -> Plan:
        return make_plan(
            self.sde,
            times,
            self.predictor,
            self.corrector,
            self.correct_steps,
            snr,
            0.0 if eta is None else eta,
            self.denoise_final,
            self.final_time,
        )

    def _eta_of(self, times: Tensor) -> Tensor | None:
        """The sampler's eta of each interval of a grid; None for the probability flow."""
        value = self.stochasticity(times) if callable(self.stochasticity) else self.stochasticity
        if value is None:
            value = self.predictor.default_stochasticity(self.sde, times)
        eta = torch.as_tensor(value, dtype=torch.float64).expand(len(times) - 1)
        return eta if bool((eta > 0.0).any()) else None

    @staticmethod
    def _at_rows(values: Tensor, rows: Tensor, count: int) -> Tensor:
        """Values of some rows, 0 for the others."""
        return values.new_zeros((count, *values.shape[1:])).index_put((rows,), values)

    @staticmethod
    def _with_memory(plan: Plan, memory: int) -> Tensor:
        """A plan's table with columns for ``memory`` stored quantities, at least as many as it has."""
        move, keep = plan.table[:, len(PLACES) :].chunk(2, dim=1)
        missing = move.new_zeros(len(plan), max(memory - plan.memory, 0))
        return torch.cat([plan.table[:, : len(PLACES)], move, missing, keep, missing], dim=1)


def _time_at(sde: SDE, lam: Tensor) -> Tensor:
    """``sde.time_of(2 lam)`` with the derivative of the inverse, also where that is found by bisection."""
    with torch.no_grad():
        t = sde.time_of(2.0 * lam).clamp(max=sde.t_max)
    if not lam.requires_grad:
        return t
    with torch.enable_grad():
        leaf = t.clone().requires_grad_(True)
        slope = torch.autograd.grad(sde.log_snr(leaf).sum(), leaf)[0]
    return t + 2.0 * (lam - lam.detach()) / slope
