"""A plan that was fitted to one network, as plain numbers in a scheduler's config.

The entry ``fitted_plan`` of a config is a dictionary:

    levels          noise levels, the only number that ``set_timesteps`` takes then
    times           SDE times of the levels
    rows_per_level  model calls of a level
    columns, table  the plan on x0_hat, before it is folded; ``t`` is where the network is called, None is the data
    kinds           what is fixed about each row, as words
    sde             name of the SDE, its last time, and its log-SNR at five times
    settings        the sampler's arguments that the plan was fitted under
    network         some weights of the network; see ``sampled_weights``
    report          what the fit found, for people
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..basics.checks import check_integer, check_number
from ..sampling.rows import PLACES, Kind, Plan
from ..sdes import SDE

PLAN_KEYS = ("levels", "times", "rows_per_level", "columns", "table", "kinds", "sde", "settings", "network", "report")
KIND_WORDS = ("is_corrector", "continues", "is_langevin", "keeps")
NETWORK_SETTINGS = ("prediction_type", "preconditioning", "time_conditioning", "num_train_timesteps", "sigma_data")
"""Arguments that describe the network; the others belong to the sampler, which the plan is."""
LONGEST_PLAN = 10_000  # rows
LOOKED_AT = (0.1, 0.3, 0.5, 0.7, 0.9)  # times, in units of the last one, at which SDEs are compared


def plan_entry(
    plan: Plan,
    times: Tensor,
    levels: int,
    sde: SDE,
    settings: Mapping[str, Any],
    network: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The dictionary of a plan on x0_hat; see the head of this module."""
    table = [[None if math.isnan(value) else value for value in row] for row in plan.table.detach().tolist()]
    kinds = [[word for word in KIND_WORDS if getattr(kind, word)] for kind in plan.kinds]
    return {
        "levels": levels,
        "times": times.detach().tolist(),
        "rows_per_level": plan.rows_per_level,
        "columns": list(plan.columns),
        "table": table,
        "kinds": kinds,
        "sde": _identity(sde),
        "settings": dict(settings),
        "network": None if network is None else dict(network),
        "report": None if report is None else dict(report),
    }


def check_fitted_plan(name: str, value: Any) -> dict[str, Any]:
    """The dictionary as it is, where it holds a plan.

    Raises:
        ValueError: It does not, and in what.
    """
    if not isinstance(value, Mapping) or set(value) != set(PLAN_KEYS):
        found = sorted(value) if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(f"{name} must be None or a dictionary with {', '.join(PLAN_KEYS)}, got {found!r}.")
    check_integer(f"{name}['levels']", value["levels"], at_least=1)
    check_integer(f"{name}['rows_per_level']", value["rows_per_level"], at_least=1)
    for part in ("sde", "settings"):
        if not isinstance(value[part], Mapping):
            raise ValueError(f"{name}[{part!r}] must be a dictionary, got {type(value[part]).__name__}.")
    _numbers(f"{name}['times']", value["times"], None)
    table, kinds, columns = value["table"], value["kinds"], value["columns"]
    if not isinstance(table, (list, tuple)) or not 1 <= len(table) <= LONGEST_PLAN:
        raise ValueError(f"{name}['table'] must be a list of 1 to {LONGEST_PLAN} rows.")
    if not isinstance(kinds, (list, tuple)) or len(kinds) != len(table):
        raise ValueError(f"{name}['kinds'] must say of each of the {len(table)} rows what it is.")
    if any(word not in KIND_WORDS for kind in kinds for word in kind):
        raise ValueError(f"{name}['kinds'] must hold words of {', '.join(KIND_WORDS)}, got {kinds!r}.")
    for i, row in enumerate(table):
        _numbers(f"{name}['table'][{i}]", row, len(columns))
    if list(columns) != list(stored_plan(value).columns):
        raise ValueError(f"{name}['columns'] must be those of a plan, got {list(columns)!r}.")
    return dict(value)


def stored_plan(entry: Mapping[str, Any]) -> Plan:
    """The plan of an entry."""
    table = [[math.nan if value is None else float(value) for value in row] for row in entry["table"]]
    kinds = tuple(Kind(**dict.fromkeys(kind, True)) for kind in entry["kinds"])
    return Plan(torch.tensor(table, dtype=torch.float64), kinds, entry["rows_per_level"])


def why_not_of(entry: Mapping[str, Any], sde: SDE, settings: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """Why a plan does not belong to a scheduler.

    Returns:
        What is wrong about the SDE or the network, in words, or None; and the names of the sampler's arguments that
        have other values than those the plan was fitted under.
    """
    other, own = entry["sde"], _identity(sde)
    same = other.get("name") == own["name"] and all(
        math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
        for a, b in zip([*other.get("log_snr", []), other.get("t_max")], [*own["log_snr"], own["t_max"]], strict=False)
    )
    if not same:
        return f"it was fitted on another {other.get('name')}, not on this {own['name']}", []
    changed = changed_settings(entry, settings)
    of_network = [key for key in changed if key in NETWORK_SETTINGS]
    if of_network:
        key = of_network[0]
        return f"it was fitted with {key}={entry['settings'][key]!r}, not with {settings[key]!r}", []
    return None, changed


def changed_settings(entry: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that have other values than those the plan was fitted under."""
    fitted = entry["settings"].items()
    return [key for key, value in fitted if key in settings and _as_list(value) != _as_list(settings[key])]


def sampled_weights(network: torch.nn.Module) -> dict[str, Any]:
    """Thirty-two weights of a network and how many it has: enough to tell it from another, in any precision.

    They are read once, by a scheduler's fit and where a pipeline is run for the first time.
    """
    parameters = list(network.parameters())
    count = sum(p.numel() for p in parameters)
    chosen = [parameters[i * (len(parameters) - 1) // 31] for i in range(32)] if parameters else []
    weights = [float(p.detach().reshape(-1)[(7919 * i) % p.numel()]) for i, p in enumerate(chosen) if p.numel()]
    return {"parameters": count, "weights": weights}


def is_same_network(stored: Mapping[str, Any] | None, network: torch.nn.Module) -> bool:
    """Whether a network has the weights of which some were stored, up to the rounding of half precision.

    It is taken to have them where none were stored, or where its weights are not in memory.
    """
    if stored is None or any(p.is_meta for p in network.parameters()):
        return True
    found = sampled_weights(network)
    pairs = list(zip(stored["weights"], found["weights"], strict=False))
    near = [abs(a - b) <= 1e-2 * max(abs(a), abs(b)) + 1e-6 for a, b in pairs]
    return stored["parameters"] == found["parameters"] and len(stored["weights"]) == len(near) and all(near)


def _identity(sde: SDE) -> dict[str, Any]:
    times = torch.tensor(LOOKED_AT, dtype=torch.float64) * sde.t_max
    return {"name": type(sde).__name__, "t_max": float(sde.t_max), "log_snr": sde.log_snr(times).tolist()}


def _as_list(value: Any) -> Any:
    """A value, where a tuple is as good as a list."""
    return list(value) if isinstance(value, tuple) else value


def _numbers(name: str, values: Any, count: int | None) -> None:
    if not isinstance(values, (list, tuple)) or count not in (None, len(values)) or len(values) <= 0:
        raise ValueError(f"{name} must be a list of {'' if count is None else f'{count} '}numbers, got {values!r}.")
    for i, value in enumerate(values):
        if value is not None or i != PLACES.index("s") or count is None:
            check_number(f"{name}[{i}]", value)
