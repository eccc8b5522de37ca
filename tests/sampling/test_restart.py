"""Restart sampling: exact where its parts are, no call more than its levels, and history that does not cross."""

import pytest
import torch
from analytic import push_gaussian
from paths import INSTANCES, MEAN0, interval

from diffusers_sde.sampling.exponential import Exponential
from diffusers_sde.sampling.planning import make_plan
from diffusers_sde.sampling.restart import restart_plan
from diffusers_sde.sdes import VPSDE

every_sde = pytest.mark.parametrize("sde", INSTANCES.values(), ids=INSTANCES.keys())
PREDICTOR = Exponential(3, solver_correction=True, gaussian_std=0.6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@every_sde
def test_restarts_keep_the_marginals(sde, eta):
    """Steps that are exact for this Gaussian and an exact way up: the law at the end is exact."""
    first, last = interval(sde)
    times = torch.linspace(first, last, 7, dtype=torch.float64)
    arguments = {"stochasticity": eta, "predictor": PREDICTOR, "denoise_final": False}
    plan = restart_plan(sde, times, float(times[5]), float(times[2]), 3, **arguments)
    alpha, sigma = (v.tolist() for v in (sde.alpha(times), sde.sigma(times)))
    start = (alpha[0] * MEAN0, alpha[0] ** 2 * 0.36 + sigma[0] ** 2)
    mean, variance = push_gaussian(plan, sde, MEAN0, 0.6, *start)
    assert mean == pytest.approx(alpha[-1] * MEAN0, rel=1e-8)
    assert variance == pytest.approx(alpha[-1] ** 2 * 0.36 + sigma[-1] ** 2, rel=1e-8)
    # A wrong start is forgotten on the way up, which the flow alone does not do.
    wrong = (start[0] + 1.0, start[1])
    plain = make_plan(sde, times, **arguments)
    errors = [abs(push_gaussian(p, sde, MEAN0, 0.6, *wrong)[0] - alpha[-1] * MEAN0) for p in (plan, plain)]
    assert errors[0] < 0.9 * errors[1]


def test_a_restart_costs_its_levels_and_nothing_else():
    times = torch.linspace(0.9, 0.1, 9, dtype=torch.float64)
    plan = restart_plan(VPSDE(), times, 0.3, 0.7, 2, predictor=PREDICTOR, stochasticity=0.0)
    visited = [row.t for row in plan.rows]
    expected = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.7, 0.6, 0.5, 0.4, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert visited == pytest.approx(expected)
    assert [i for i, row in enumerate(plan.rows) if row.noise] == [5, 9]
    assert plan.rows[6].history == () and len(plan.rows[7].history) == 1  # nothing from before the restart
    assert restart_plan(VPSDE(), times, 0.3, 0.7, 0).rows == make_plan(VPSDE(), times).rows


@pytest.mark.parametrize(
    "change, word", [({"high": 0.2}, "high"), ({"repeats": -1}, "repeats"), ({"repeats": 1.5}, "repeats")]
)
def test_bad_arguments_are_named(change, word):
    arguments = {"low": 0.3, "high": 0.7, "repeats": 1} | change
    with pytest.raises(ValueError, match=word):
        restart_plan(VPSDE(), torch.linspace(0.9, 0.1, 9, dtype=torch.float64), **arguments)
