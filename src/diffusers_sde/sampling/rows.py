"""A sampler as a table: one row for each model call, and what it means to execute a row.

Between two model calls a sampler forms linear combinations of what it has: the sample x_t, what the model returned, F,
fresh unit noise z, and quantities that earlier rows have stored. A row has two such linear forms,

    move: x_s     = x * x_t + model * F + noise * z + sum_k history[k] * stored[k],
    keep: stored' = x * x_t + model * F + noise * z + sum_k history[k] * stored[k],

of which the second may be missing. stored[0] is what was stored last. All coefficients of a plan stand in one float64
tensor, ``Plan.table``, which may carry gradients. Whoever executes a plan calls the model, calls ``advance`` and goes
to the next row; it knows nothing of SDEs.

One kind of row is not linear, the Langevin corrector: its step size follows from the norms of the sample's own score
and noise.

The table, its rows, how they are executed and how they read belong together, which makes the file a long one.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..networks.parametrizations import Parametrization
from ..sdes import SDE

LARGEST_NUMBER = torch.finfo(torch.float32).max  # samples and their coefficients must be smaller

# The columns of a table that are not those of a linear form. A time s of NaN stands for the data.
PLACES = ("t", "s", "langevin", "skip", "out")
# The first columns of a linear form; the others are the weights of what is stored.
X, MODEL, NOISE, STORED = 0, 1, 2, 3
SHOWN_ROWS = 8  # at either end of a plan, in notebooks


class Form(NamedTuple):
    """A linear form x * x_t + model * F + noise * z + sum_k history[k] * stored[k].

    In a plan's ``rows`` the coefficients are Python floats, with which nothing waits for a device. Where a plan is
    compiled or fitted they are tensors of shape ().
    """

    x: Any = 0.0
    model: Any = 0.0
    noise: Any = 0.0
    history: tuple[Any, ...] = ()


class Row(NamedTuple):
    """One model call and the update that follows it; see the head of this module.

    A linear row moves the sample to x * x_t + model * F + noise * z + sum_k history[k] * stored[k]. A Langevin row has
    no constant update: ``x`` and ``model`` give the score, and the step size is langevin (|z|/|score|)^2.

    Attributes:
        t: SDE time at which the model is called.
        s: SDE time of the result; None for the data (alpha = 1, sigma = 0).
        x, model, noise, history: The linear form ``move``.
        keep: The linear form of what is stored for later rows; None if nothing is.
        langevin: Factor of a Langevin row's step size; None in linear rows.
        skip, out: Coefficients in x0_hat = skip * x_t + out * F.
        is_corrector: Whether a corrector owns this call.
        continues: Whether the predictor began this interval with an earlier call.
        of_estimate: Whether ``model`` multiplies x0_hat, bounded by the executor, instead of F.
        keeps_estimate: The same of ``keep``.
    """

    t: Any
    s: Any
    x: Any
    model: Any
    noise: Any = 0.0
    history: tuple[Any, ...] = ()
    keep: Form | None = None
    langevin: Any = None
    skip: Any = 0.0
    out: Any = 1.0
    is_corrector: bool = False
    continues: bool = False
    of_estimate: bool = False
    keeps_estimate: bool = False

    @property
    def draws_noise(self) -> bool:
        """Whether ``advance`` draws noise."""
        kept = 0.0 if self.keep is None else self.keep.noise
        return self.langevin is not None or _is_present(self.noise) or _is_present(kept)

    @property
    def needs_estimate(self) -> bool:
        """Whether ``advance`` needs x0_hat beside what the model returned."""
        return self.of_estimate or self.keeps_estimate

    @property
    def kind_in_words(self) -> str:
        """What the row does, in a few words."""
        if self.langevin is not None:
            return "langevin"
        return "corrector" if self.is_corrector else "predictor, continued" if self.continues else "predictor"

    def __repr__(self) -> str:
        given = {"x": self.x, "model": self.model, "noise": self.noise, **dict(self._remembered)}
        numbers = ", ".join(f"{name}={_brief(value)}" for name, value in given.items() if _is_present(value))
        if self.langevin is not None:
            numbers += f", langevin={_brief(self.langevin)}"
        return f"Row({_brief(self.t)} -> {_end(self.s)}, {self.kind_in_words}: {numbers})"

    @property
    def _remembered(self) -> list[tuple[str, Any]]:
        return [(f"history[{k}]", weight) for k, weight in enumerate(self.history)]


class Kind(NamedTuple):
    """What is fixed about a row, whatever its coefficients are; the attributes are those of ``Row``."""

    is_corrector: bool = False
    continues: bool = False
    is_langevin: bool = False
    keeps: bool = False
    of_estimate: bool = False
    keeps_estimate: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """A sampler for one SDE on one grid.

    Attributes:
        table: Coefficients, one row per model call, float64, shape (nfe, columns). The columns are ``PLACES`` and the
            entries of the forms ``move`` and ``keep``; ``column`` finds one by its name. It may require gradients.
        kinds: What is fixed about each row.
        rows_per_level: Those of correctors and of the predictor together. The last level may have fewer.
    """

    table: Tensor
    kinds: tuple[Kind, ...]
    rows_per_level: int

    @classmethod
    def from_rows(cls, rows: Sequence[Row], rows_per_level: int = 1) -> Plan:
        """A plan of rows that are given as Python floats."""
        forms = [form for row in rows for form in (row, row.keep) if form is not None]
        width = max((len(form.history) for form in forms), default=0)

        def numbers(form: Form | Row | None) -> list[float]:
            form = form or Form()
            return [form.x, form.model, form.noise, *form.history, *[0.0] * (width - len(form.history))]

        table = [
            [
                row.t,
                math.nan if row.s is None else row.s,
                0.0 if row.langevin is None else row.langevin,
                row.skip,
                row.out,
                *numbers(row),
                *numbers(row.keep),
            ]
            for row in rows
        ]
        kinds = tuple(
            Kind(
                row.is_corrector,
                row.continues,
                row.langevin is not None,
                row.keep is not None,
                row.of_estimate,
                row.keeps_estimate,
            )
            for row in rows
        )
        return cls(torch.tensor(table, dtype=torch.float64), kinds, rows_per_level)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        rows, kinds = self.rows, [row.kind_in_words for row in self.rows]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        path = f"{_brief(rows[0].t)} -> {_end(rows[-1].s)}, " if rows else ""
        return f"Plan({path}{len(rows)} calls: {counts or 'none'}; {self.rows_per_level} a level, memory {self.memory})"

    def _repr_html_(self) -> str:
        """A table of the rows, which notebooks show; of many rows the first and the last."""
        shown = list(enumerate(self.rows))
        if len(shown) > 2 * SHOWN_ROWS:
            shown = [*shown[:SHOWN_ROWS], *shown[-SHOWN_ROWS:]]
        head = ("", "t", "s", "row", "x", "model", "noise", *(f"history[{k}]" for k in range(self.memory)))
        lines = [f"<tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>"]
        before = -1
        for number, row in shown:
            if number != before + 1:
                lines.append(f'<tr><td colspan="{len(head)}">... {number - before - 1} more ...</td></tr>')
            weights = (row.x, row.model, row.noise, *row.history)
            numbers = [_brief(value) if _is_present(value) else "" for value in weights]
            cells = [str(number), _brief(row.t), _end(row.s), row.kind_in_words, *numbers]
            cells += [""] * (len(head) - len(cells))
            lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
            before = number
        return f"<p>{html.escape(repr(self))}</p><table>{''.join(lines)}</table>"

    @property
    def memory(self) -> int:
        """How many stored quantities the rows look back on."""
        return (self.table.shape[1] - len(PLACES)) // 2 - STORED

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the table's columns."""
        form = ("x", "model", "noise", *(f"history[{k}]" for k in range(self.memory)))
        return (*PLACES, *form, *(f"keep.{name}" for name in form))

    def column(self, name: str) -> Tensor:
        """A column of the table, a view of shape (nfe,)."""
        return self.table[:, self.columns.index(name)]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows with Python floats as coefficients; ``len(rows)`` is the number of function evaluations (nfe)."""
        pairs = zip(self.table.detach().tolist(), self.kinds, strict=True)
        return tuple(row_of(values, kind, self.memory) for values, kind in pairs)

    def until(self, index: int) -> Plan:
        """The rows before number ``index``, as a plan."""
        return Plan(self.table[:index], self.kinds[:index], self.rows_per_level)

    def fold(
        self, parametrization: Parametrization, sde: SDE, bounds_estimate: bool | Sequence[bool] | Tensor = False
    ) -> Plan:
        """The same plan for a model that returns its raw output instead of x0_hat.

        Args:
            parametrization: What the model predicts.
            sde: The plan's SDE.
            bounds_estimate: True leaves the coefficients of x0_hat where they are in the predictors' rows, and in what
                is stored, for an executor that bounds x0_hat first. It is one choice, or one for each row, shape
                (nfe,). Correctors always take the network's own score.

        Raises:
            ValueError: The parametrisation does not determine x0_hat at one of the plan's times, or the plan has been
                folded already.
        """
        is_folded = bool((self.column("skip") != 0.0).any() | (self.column("out") != 1.0).any())
        if is_folded:
            raise ValueError("this plan is folded: its rows take the network's output, not x0_hat.")
        t = self.column("t")
        skip, out = (c.to(torch.float64) for c in parametrization.coefficients(sde.alpha(t), sde.sigma(t)))
        move, keep = self.table[:, len(PLACES) :].chunk(2, dim=1)
        folded = substitute_estimate(move, skip, out), substitute_estimate(keep, skip, out)
        bounded = torch.as_tensor(bounds_estimate, dtype=torch.bool, device=move.device).expand(len(self))
        moves = bounded & ~torch.tensor([kind.is_corrector for kind in self.kinds], device=move.device)
        folded = torch.where(moves[:, None], move, folded[0]), torch.where(bounded[:, None], keep, folded[1])
        kinds = tuple(
            kind._replace(of_estimate=of_estimate, keeps_estimate=bounds and kind.keeps)
            for kind, of_estimate, bounds in zip(self.kinds, moves.tolist(), bounded.tolist(), strict=True)
        )
        places = torch.stack([t, self.column("s"), self.column("langevin"), skip, out], dim=1)
        table = torch.cat([places, *folded], dim=1)
        # The coefficients are infinite where alpha = 0. Samples are float32, in which an alpha of 1e-39 acts like 0.
        if not is_finite(table):
            raise ValueError(
                f"prediction_type of {parametrization.name} does not determine the data where alpha(t) = 0 "
                f"(t = {float(t[0])}); use 'v_prediction', 'flow_prediction', 'sample' or 'edm' there. (A "
                "beta_start or beta_end that is too large leaves as good as no signal, too.)"
            )
        return Plan(table, kinds, self.rows_per_level)


def row_of(values: Sequence[Any] | Tensor, kind: Kind, memory: int, draws: bool | None = None) -> Row:
    """One row of a table.

    Args:
        values: The row of the table: floats, or a tensor. Of a tensor the coefficients are tensors of shape ().
        kind: What is fixed about it.
        memory: The plan's.
        draws: Of a tensor, whether its row has noise, which cannot be seen from its values without waiting for them.
    """
    begin, half = len(PLACES), STORED + memory

    def form(first: int) -> Form:
        history = tuple(values[first + STORED + k] for k in range(memory))
        if draws is None:
            while history and history[-1] == 0.0:  # no such quantity exists yet, or it does not count
                history = history[:-1]
        return Form(values[first + X], values[first + MODEL], values[first + NOISE], history)

    t, s, langevin, skip, out = (values[i] for i in range(begin))
    if draws is None:
        s = None if math.isnan(s) else s
    move, keep = form(begin), form(begin + half) if kind.keeps else None
    if draws is False:
        move = move._replace(noise=0.0)
    if draws is not None and keep is not None:
        keep = keep._replace(noise=0.0 if draws is False else keep.noise)
    return Row(
        t,
        s,
        *move,
        keep=keep,
        langevin=langevin if kind.is_langevin else None,
        skip=skip,
        out=out,
        is_corrector=kind.is_corrector,
        continues=kind.continues,
        of_estimate=kind.of_estimate,
        keeps_estimate=kind.keeps_estimate,
    )


# ---------------------------------------------------------------------- execution


def mean(form: Form | Row, x: Tensor, model_output: Tensor, stored: Sequence[Tensor]) -> Tensor:
    """A linear form without its noise: x * x_t + model * F + sum_k history[k] * stored[k], a new tensor like ``x``."""
    if isinstance(form.x, float) and form.x == 0.0:
        total = model_output * form.model
    else:
        total = _add(x * form.x, model_output, form.model)
    for weight, value in zip(form.history, stored, strict=False):
        total = _add(total, value, weight)
    return total


def advance(
    row: Row,
    x: Tensor,
    model_output: Tensor,
    stored: Sequence[Tensor],
    draw: Callable[[], Tensor],
    estimate: Tensor | None = None,
    batch_norms: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Execute one row.

    Args:
        row: The row.
        x: Sample, shape (B, ...).
        model_output: What the plan's model returned at (``x``, ``row.t``), same shape.
        stored: What earlier rows have stored, the last one first, at least ``len(row.history)`` of them.
        draw: Function that returns fresh unit noise of x's shape; it is called only if the row has noise.
        estimate: x0_hat, for rows that need it; see ``Row.needs_estimate``.
        batch_norms: Whether the Langevin step size follows from norms averaged over the batch, as in the official code,
            instead of from each sample's own norms. Samples then depend on their batch mates.

    Returns:
        The new sample, same shape, and what the row stores, or None.
    """
    moved = mean(row, x, input_of(model_output, estimate, row.of_estimate), stored)
    z = draw() if row.draws_noise else None
    kept = None
    if row.keep is not None:
        kept = mean(row.keep, x, input_of(model_output, estimate, row.keeps_estimate), stored)
        if z is not None and _is_present(row.keep.noise):
            kept = _add(kept, z, row.keep.noise)
    if row.langevin is not None and z is not None:
        step = row.langevin * squared_norm_ratio(z, moved, batch_norms)
        return torch.addcmul(x, step, moved).addcmul_(torch.sqrt(2.0 * step), z), kept
    if z is not None and _is_present(row.noise):
        moved = _add(moved, z, row.noise)
    return moved, kept


def estimate_of(row: Row, x: Tensor, model_output: Tensor) -> Tensor:
    """x0_hat = skip * x_t + out * F."""
    return _add(x * row.skip, model_output, row.out)


def squared_norm_ratio(z: Tensor, score: Tensor, batch_norms: bool) -> Tensor:
    """(|z| / |score|)^2 of each sample, or of the batch means of both norms, broadcastable against the sample."""
    axes = tuple(range(1, score.ndim))
    score_norm, noise_norm = (
        torch.linalg.vector_norm(v, dim=axes, keepdim=True) if axes else v.abs() for v in (score, z)
    )
    if batch_norms:
        score_norm, noise_norm = score_norm.mean(0, keepdim=True), noise_norm.mean(0, keepdim=True)
    # A score of zero says nothing about the scale of p_t. The step is then zero, where the formula would be infinite.
    return torch.where(score_norm > 0, noise_norm / score_norm, torch.zeros_like(noise_norm)).square()


def _add(total: Tensor, value: Tensor, weight: Any) -> Tensor:
    """total + weight * value; ``total`` is a tensor of our own."""
    # At image sizes an allocation costs as much as the arithmetic, so a number is added in place. Tensors as weights
    # are traced or differentiated.
    return total.add_(value, alpha=weight) if isinstance(weight, float) else total + weight * value


def input_of(model_output: Tensor, estimate: Tensor | None, of_estimate: bool) -> Tensor:
    """What a form's ``model`` multiplies: what the model returned, or the bounded x0_hat; same shape.

    Raises:
        ValueError: It is the estimate, and that was not given.
    """
    if not of_estimate:
        return model_output
    if estimate is None:
        raise ValueError("this row takes the bounded x0_hat: pass it as estimate.")
    return estimate


def _brief(value: Any) -> str:
    """A number for people; a tensor, which may carry gradients, by its value."""
    return f"{float(value):.4g}"


def _end(s: Any) -> str:
    """The time of a row's result for people."""
    return "data" if s is None or math.isnan(float(s)) else _brief(s)


def _is_present(weight: Any) -> bool:
    return isinstance(weight, Tensor) or weight != 0.0


# ---------------------------------------------------------------------- linear forms as rows of tensors


def substitute_x(form: Tensor, inner: Tensor) -> Tensor:
    """Linear forms after the sample itself has been replaced by another linear form.

    Args:
        form: Columns x, F, z and stored quantities, shape (n, columns).
        inner: What x_t becomes, same shape.
    """
    return torch.cat([torch.zeros_like(form[:, :1]), form[:, 1:]], dim=1) + form[:, :1] * inner


def substitute_estimate(form: Tensor, of_x: Tensor, of_model: Tensor) -> Tensor:
    """Linear forms in which F stood for of_x * x_t + of_model * F, shape (n, columns); both factors have shape (n,)."""
    model = form[:, MODEL]
    return torch.cat([torch.stack([form[:, X] + model * of_x, model * of_model], dim=1), form[:, NOISE:]], dim=1)


def concatenated(plans: Sequence[Plan]) -> Plan:
    """Plans one after another; ``rows_per_level`` is that of the last."""
    memory = max(plan.memory for plan in plans)

    def widened(plan: Plan) -> Tensor:
        move, keep = plan.table[:, len(PLACES) :].chunk(2, dim=1)
        missing = move.new_zeros(len(plan), memory - plan.memory)
        return torch.cat([plan.table[:, : len(PLACES)], move, missing, keep, missing], dim=1)

    table = torch.cat([widened(plan) for plan in plans])
    return Plan(table, tuple(kind for plan in plans for kind in plan.kinds), plans[-1].rows_per_level)


def without_unused_memory(plan: Plan) -> Plan:
    """The plan without columns of stored quantities in which all coefficients are 0."""
    move, keep = plan.table[:, len(PLACES) :].chunk(2, dim=1)
    is_used = (move.detach() != 0.0).any(0) | (keep.detach() != 0.0).any(0)
    columns = STORED + max((k + 1 for k, used in enumerate(is_used[STORED:].tolist()) if used), default=0)
    table = torch.cat([plan.table[:, : len(PLACES)], move[:, :columns], keep[:, :columns]], dim=1)
    return Plan(table, plan.kinds, plan.rows_per_level)


def is_finite(table: Tensor) -> bool:
    """Whether all coefficients of a table are numbers of float32."""
    numbers = torch.cat([table[:, :1], table[:, 2:]], dim=1)  # a time s of NaN is the data
    return bool((numbers.abs() < LARGEST_NUMBER).all())
