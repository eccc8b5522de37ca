"""The table of a plan: its columns and rows, gradients through it, and rows that share a draw."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from analytic import GaussianMixture, PointwiseGaussian

from diffusers_sde.networks.parametrizations import get_parametrization
from diffusers_sde.sampling import Exponential, Form, Plan, Predictor, Row, Singlestep, Stage, make_plan, sample
from diffusers_sde.sampling.rows import advance, row_of
from diffusers_sde.sdes import VESDE, VPSDE, RectifiedFlowSDE

TIMES = torch.linspace(0.9, 0.05, 8, dtype=torch.float64)
MULTISTEP = Exponential(3, solver_correction=True, gaussian_std=0.2)
MIXTURE = GaussianMixture([0.6, 0.4], [[1.0, 0.5], [-1.0, 0.0]], [[[0.2, 0.1], [0.1, 0.3]], [[0.1, 0.0], [0.0, 0.4]]])
PLANS = {
    "multistep": lambda: make_plan(VPSDE(), TIMES, MULTISTEP),
    "predictor-corrector": lambda: make_plan(VPSDE(), TIMES, MULTISTEP, "ornstein_uhlenbeck", 2, 0.3),
    "langevin": lambda: make_plan(VPSDE(), TIMES, "reverse_diffusion", "langevin"),
    "heun": lambda: make_plan(VPSDE(), TIMES, "heun", stochasticity=0.0, denoise_final=False),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_rows_are_the_table(name):
    plan = PLANS[name]()
    for i, row in enumerate(plan.rows):
        expected = {"t": row.t, "s": math.nan if row.s is None else row.s, "x": row.x, "model": row.model}
        expected |= {"noise": row.noise, "langevin": row.langevin or 0.0, "skip": row.skip, "out": row.out}
        keep = row.keep or Form()
        expected |= {"keep.x": keep.x, "keep.model": keep.model, "keep.noise": keep.noise}
        for k in range(plan.memory):
            expected[f"history[{k}]"] = row.history[k] if k < len(row.history) else 0.0
            expected[f"keep.history[{k}]"] = keep.history[k] if k < len(keep.history) else 0.0
        found = {column: float(plan.column(column)[i]) for column in plan.columns}
        assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    again = Plan.from_rows(plan.rows, plan.rows_per_level)
    assert again.rows == plan.rows and again.kinds == plan.kinds
    torch.testing.assert_close(again.table, plan.table, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", PLANS)
def test_a_row_of_tensors_does_what_the_row_of_numbers_does(name):
    """Compiled and fitted runs take tensors for coefficients; what they compute is the same."""
    plan = PLANS[name]().fold(get_parametrization("epsilon"), VPSDE())
    generator = torch.Generator().manual_seed(0)
    x, output, *stored = torch.randn(2 + plan.memory, 3, 5, dtype=torch.float64, generator=generator)
    for row, values, kind in zip(plan.rows, plan.table, plan.kinds, strict=True):
        z = torch.randn(3, 5, dtype=torch.float64, generator=generator)
        by_numbers = advance(row, x, output, stored, lambda: z)  # noqa: B023
        traced = row_of(values, kind, plan.memory, row.draws_noise)
        by_tensors = advance(traced, x, output, stored, lambda: z)  # noqa: B023
        torch.testing.assert_close(by_tensors[0], by_numbers[0], rtol=1e-12, atol=1e-12)
        assert (by_tensors[1] is None) == (by_numbers[1] is None)
        if by_numbers[1] is not None:
            torch.testing.assert_close(by_tensors[1], by_numbers[1], rtol=1e-12, atol=1e-12)


def test_gradients_reach_the_table_the_stochasticity_and_the_grid():
    """Of the mean after the plan, for point data, against differences."""
    sde, mu = VPSDE(), 0.7

    def end(times, eta):
        plan = make_plan(sde, times, Exponential(2, gaussian_std=0.3), stochasticity=eta, denoise_final=False)
        x, stored = torch.tensor([1.3], dtype=torch.float64), []
        for values, kind in zip(plan.table, plan.kinds, strict=True):
            row = row_of(values, kind, plan.memory, draws=True)
            estimate = mu + 0.2 * x  # of any denoiser
            x, kept = advance(row, x, estimate, stored, lambda: torch.ones(1, dtype=torch.float64))
            stored = [kept, *stored][: plan.memory]
        return x.sum()

    times, eta = TIMES.clone().requires_grad_(), torch.full((7,), 0.8, dtype=torch.float64, requires_grad=True)
    end(times, eta).backward()
    for argument in (times, eta):
        assert bool(torch.isfinite(argument.grad).all())
        for i in (1, 3, 6):
            step = torch.zeros_like(argument)
            step[i] = 1e-6
            if argument is times:
                difference = end(times + step, eta) - end(times - step, eta)
            else:
                difference = end(times, eta + step) - end(times, eta - step)
            assert float(argument.grad[i]) == pytest.approx(float(difference.detach()) / 2e-6, rel=1e-4, abs=1e-7)


@dataclass(frozen=True)
class StochasticHeun(Predictor):
    """Heun's method for additive noise, both stages with one draw: x' = x + a dt + g z, x_s = x + (a + a') dt/2 + g z.

    On the VE SDE with the drift a = (x - x0_hat) r of the reverse SDE in a time of its own, r = -2 dsigma/sigma.
    """

    calls: ClassVar[int] = 2

    def stages(self, sde, times, stochasticity):
        sigma, one = sde.sigma(times), torch.ones_like(times[1:])
        start, end = (2.0 * (sigma[1:] - sigma[:-1]) / at for at in (sigma[:-1], sigma[1:]))
        g = (sigma[:-1].square() - sigma[1:].square()).sqrt()
        # x' has the noise g z already. What is stored is x - x' without the noise, the slope at the start.
        first = Stage(one + start, -start, g, keep=Form(-0.5 * start, 0.5 * start, 0.0), s=times[1:])
        second = Stage(one + 0.5 * end, -0.5 * end, 0.0 * one, (one,), t=times[1:])
        return [first, second]


@dataclass(frozen=True)
class SharedDraw(Predictor):
    """Two stages of which the second adds half of the first one's noise again: it can only know it from memory."""

    calls: ClassVar[int] = 2

    def stages(self, sde, times, stochasticity):
        one, none = torch.ones_like(times[1:]), torch.zeros_like(times[1:])
        return [Stage(one, none, one, keep=Form(noise=0.5)), Stage(one, none, none, (one,), t=times[1:])]


def test_two_stages_can_share_a_draw():
    plan = make_plan(VESDE(), TIMES, SharedDraw(), denoise_final=False)
    got = sample(plan, lambda x, t: x, torch.zeros(2, 3), torch.Generator().manual_seed(0))
    generator, expected = torch.Generator().manual_seed(0), torch.zeros(2, 3)
    for _ in range(7):
        expected = expected + 1.5 * torch.randn(2, 3, generator=generator)
    torch.testing.assert_close(got, expected)


def test_a_predictor_of_ones_own_runs_its_formula():
    """Stochastic Heun, written out."""
    sde, times = VESDE(), TIMES
    denoise, sigma = MIXTURE.denoiser(sde), sde.sigma(times)
    x = 20.0 * torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = make_plan(sde, times, StochasticHeun(), denoise_final=False)
    got = sample(plan, denoise, x, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    for i in range(7):
        dsigma = sigma[i + 1] - sigma[i]
        noise = (sigma[i] ** 2 - sigma[i + 1] ** 2).sqrt() * torch.randn(4, 2, dtype=x.dtype, generator=generator)
        slope = 2.0 * (x - denoise(x, times[i])) / sigma[i]
        ahead = x + slope * dsigma + noise
        x = x + 0.5 * (slope + 2.0 * (ahead - denoise(ahead, times[i + 1])) / sigma[i + 1]) * dsigma + noise
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------- the singlestep predictor


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_singlestep_is_its_formula(eta):
    """DPM-Solver++(2S) with exact weights, along one path of the SDE, in lambda = log(alpha/sigma)."""
    sde, times = VPSDE(), TIMES[:4]
    denoise = MIXTURE.denoiser(sde)
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = make_plan(sde, times, Singlestep(), stochasticity=eta, denoise_final=False)
    got = sample(plan, denoise, x, torch.Generator().manual_seed(1))
    generator, q = torch.Generator().manual_seed(1), 1.0 + eta**2

    def linear(t, s, x, integral):
        h = float(sde.log_snr(s) - sde.log_snr(t)) / 2.0
        out = sde.sigma(s) / sde.sigma(t) * math.exp(-(eta**2) * h) * x + sde.alpha(s) * integral
        if eta:
            z = torch.randn(4, 2, dtype=x.dtype, generator=generator)
            out = out + sde.sigma(s) * math.sqrt(1.0 - math.exp(-2.0 * eta**2 * h)) * z
        return out

    for t, s in zip(times[:-1], times[1:], strict=True):
        middle = sde.time_of(0.5 * (sde.log_snr(t) + sde.log_snr(s)))
        half = float(sde.log_snr(s) - sde.log_snr(t)) / 4.0
        constant, slope = 1.0 - math.exp(-q * half), half - (1.0 - math.exp(-q * half)) / q
        at_t = denoise(x, t)
        x = linear(t, middle, x, constant * at_t)
        at_middle = denoise(x, middle)
        d = (at_middle - at_t) / half
        x = linear(middle, s, x + sde.alpha(middle) * slope * d, constant * at_middle + slope * d)
    torch.testing.assert_close(got, x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sde", [VPSDE(), RectifiedFlowSDE()])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_singlestep_starts_from_pure_noise_and_is_exact_for_its_gaussian(sde, eta):
    """Data with the standard deviation ``gaussian_std`` have an estimate e that is constant along the path."""
    times = torch.tensor([sde.t_max, 0.3, 0.01], dtype=torch.float64)
    plan = make_plan(sde, times, Singlestep(0.6), stochasticity=eta, denoise_final=False)
    assert [row.continues for row in plan.rows] == [False, True] * 2
    model = PointwiseGaussian(mean=0.7, std=0.6)
    x = torch.randn(40_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * sde.prior_std
    x = x + float(sde.alpha(sde.t_max)) * 0.7
    x = sample(plan, model.denoiser(sde), x, torch.Generator().manual_seed(1))
    alpha, sigma = float(sde.alpha(0.01)), float(sde.sigma(0.01))
    assert float(x.mean()) == pytest.approx(alpha * 0.7, abs=5 * 0.6 / 200)
    assert float(x.std()) == pytest.approx(math.hypot(alpha * 0.6, sigma), rel=5 / math.sqrt(2 * 40_000) + 1e-3)


def test_rows_can_be_written_by_hand():
    plan = Plan.from_rows([Row(0.5, 0.4, 0.9, 0.1, keep=Form(model=2.0)), Row(0.4, None, 0.0, 1.0, history=(0.25,))])
    assert plan.memory == 1 and len(plan) == 2
    x = sample(plan, lambda x, t: x + 1.0, torch.ones(1, 1, dtype=torch.float64))
    assert float(x) == pytest.approx((0.9 + 0.2 + 1.0) + 0.25 * 4.0)


# ---------------------------------------------------------------------- for people


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_and_its_rows_are_short_in_words(name):
    plan = PLANS[name]()
    assert str(len(plan)) in repr(plan) and len(repr(plan)) < 120 and "\n" not in repr(plan)
    assert all(len(repr(row)) < 200 for row in plan.rows)
    assert repr(plan.rows[0]).startswith("Row(0.9 -> ")
    assert repr(plan).startswith("Plan(0.9 -> data, ") == (plan.rows[-1].s is None)


def test_words_of_rows_and_plans():
    row = Row(0.5, None, x=2.0, model=0.25, noise=0.0, history=(0.125,))
    assert repr(row) == "Row(0.5 -> data, predictor: x=2, model=0.25, history[0]=0.125)"
    langevin = Row(0.5, 0.5, x=-1.0, model=1.0, langevin=0.02, is_corrector=True)
    assert repr(langevin) == "Row(0.5 -> 0.5, langevin: x=-1, model=1, langevin=0.02)"
    plan = Plan.from_rows([langevin, row], rows_per_level=2)
    assert repr(plan) == "Plan(0.5 -> data, 2 calls: 1 langevin, 1 predictor; 2 a level, memory 1)"
    with_gradients = Plan(plan.table.clone().requires_grad_(), plan.kinds, plan.rows_per_level)
    assert repr(with_gradients) == repr(plan) and repr(plan.until(0)) == "Plan(0 calls: none; 2 a level, memory 1)"


def test_notebooks_show_a_plan_as_a_table():
    short, long = (
        PLANS["langevin"](),
        make_plan(VPSDE(), torch.linspace(0.9, 0.05, 101, dtype=torch.float64), MULTISTEP),
    )
    assert short._repr_html_().count("<tr>") == 1 + len(short)
    text = long._repr_html_()
    assert text.count("<tr>") == 1 + 16 + 1 and f"... {len(long) - 16} more ..." in text
    assert text.count(f"<td>{long.rows[3].x:.4g}</td>") >= 1 and "-&gt; data" in text
