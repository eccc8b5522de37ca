"""Predictors: convergence at the declared order, measured without Monte Carlo, and the closed forms they must equal.

The law of a sampler on Gaussian data is computed exactly (``analytic.push_gaussian``) and compared with the exact law
of the reverse SDE, started off the marginal's mean so that the mean has something to get wrong.
"""

import math

import numpy as np
import pytest
import torch
from analytic import convergence_order, exact_reverse_gain, marginal_moments, push_gaussian
from paths import INSTANCES, MEAN0, STD0, interval, measured_order

from diffusers_sde.sampling.exponential import Exponential, Singlestep
from diffusers_sde.sampling.planning import make_plan
from diffusers_sde.sampling.predictors import PREDICTORS, get_predictor
from diffusers_sde.sampling.rows import Plan
from diffusers_sde.sampling.stages import ESTIMATE
from diffusers_sde.sdes import SDES, VESDE, VPSDE, CosineSDE, DiscreteVPSDE, RectifiedFlowSDE, ddpm_betas

every_sde = pytest.mark.parametrize("sde", INSTANCES.values(), ids=INSTANCES.keys())

RULES = [cls() for cls in PREDICTORS.values() if cls.calls] + [Exponential(2), Singlestep(0.3)]
CASES = [(rule, eta) for rule in RULES for eta in ((0.0,) if rule.deterministic else (0.0, 0.5, 1.0))]


@pytest.mark.parametrize("predictor, eta", CASES, ids=str)
@every_sde
def test_convergence_order(sde, predictor, eta):
    """The order that every predictor declares."""

    def make(times):
        plan = make_plan(sde, times, predictor, stochasticity=eta, denoise_final=False)
        return plan, eta

    measured, error = measured_order(sde, make)
    assert measured == pytest.approx(predictor.order, abs=0.1)
    assert error < {1: 0.1, 2: 0.01}[predictor.order]


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("name", [name for name in INSTANCES if name != "discrete_vp"])
def test_exponential_reaches_order_three_from_an_exact_start(name, eta):
    """Multistep starts with lower orders, which costs O(h^2) once. Two exact steps instead, and the order shows.

    For eta = 0.5 the mean: its past is deterministic, that of the sample is not. (On the table of ten the error is at
    rounding before the asymptotic rate sets in.)
    """
    sde = INSTANCES[name]
    start, end = interval(sde)
    errors, ns = [], [160, 320, 640]
    for n in ns:
        times = torch.linspace(start, end, n + 1, dtype=torch.float64)
        plan = make_plan(sde, times, Exponential(3), stochasticity=eta, denoise_final=False)
        plan = Plan.from_rows(plan.rows[2:])
        t0, t1, t2 = times[:3].tolist()

        def gain(t):  # of the denoiser
            alpha, variance = float(sde.alpha(t)), marginal_moments(sde, t, MEAN0, STD0)[1]
            return alpha * STD0**2 / variance

        memory = [gain(t) / exact_reverse_gain(sde, t, t2, STD0, eta) for t in (t1, t0)]
        mean, variance = marginal_moments(sde, t2, MEAN0, STD0)
        exact_mean, exact_variance = marginal_moments(sde, end, MEAN0, STD0)
        offset = 1.3 * math.sqrt(variance)
        got_mean, got_variance = push_gaussian(plan, sde, MEAN0, STD0, mean + offset, variance, memory)
        exact_mean += offset * exact_reverse_gain(sde, t2, end, STD0, eta)
        errors.append(abs(got_mean - exact_mean) + (abs(got_variance - exact_variance) if eta == 0 else 0.0))
    assert convergence_order(errors, ns) == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("slip", ["model", "x", "noise", "history"])
def test_a_wrong_coefficient_is_seen(slip):
    """The measurement is one: 2 % on one coefficient, or one letter in a formula, and the order is gone."""
    sde = VPSDE()

    def make(times):
        plan = make_plan(sde, times, Exponential(2), stochasticity=1.0, denoise_final=False)
        if slip == "history":
            rows = [row._replace(history=tuple(1.02 * h for h in row.history)) for row in plan.rows]
        elif slip == "noise":
            # sigma_t for sigma_s in the noise
            rows = [r._replace(noise=r.noise * float(sde.sigma(r.t) / sde.sigma(r.s))) for r in plan.rows]
        else:
            rows = [row._replace(**{slip: getattr(row, slip) * (1 + 0.02 / len(plan.rows))}) for row in plan.rows]
        return Plan.from_rows(rows), 1.0

    measured, _ = measured_order(sde, make)
    assert measured < 1.5


@every_sde
def test_denoise_final_returns_the_estimate_of_the_last_time(sde):
    """Law of x0_hat at the last time: mean of the data, variance k^2 Var(x_t)."""
    start, end = interval(sde)
    times = torch.linspace(start, end, 400, dtype=torch.float64)
    plan = make_plan(sde, times, Exponential(2), denoise_final=True)
    mean, variance = push_gaussian(plan, sde, MEAN0, STD0, *marginal_moments(sde, start, MEAN0, STD0))
    alpha, noisy = float(sde.alpha(end)), marginal_moments(sde, end, MEAN0, STD0)[1]
    assert mean == pytest.approx(MEAN0, rel=1e-3)
    assert variance == pytest.approx((alpha * STD0**2 / noisy) ** 2 * noisy, rel=0.02)


# ---------------------------------------------------------------------- closed forms


def stages(name, sde, times, eta=1.0, **options):
    return PREDICTORS[name](**options).stages(sde, torch.as_tensor(times, dtype=torch.float64), eta)


def grid(sde, n=9):
    return torch.linspace(*interval(sde), n, dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@every_sde
def test_ancestral_is_exact_on_point_data(sde, eta):
    """With x0_hat = mu known, x_s ~ N(alpha_s mu, sigma_s^2) at every level, whatever eta and however long the
    steps."""
    times, mu = grid(sde), 1.7
    plan = make_plan(sde, times, "ancestral", stochasticity=eta, denoise_final=False)
    mean, variance = float(sde.alpha(times[0])) * mu, float(sde.sigma(times[0])) ** 2
    for row, s in zip(plan.rows, times[1:], strict=True):
        mean, variance = row.x * mean + row.model * mu, row.x**2 * variance + row.noise**2
        assert mean == pytest.approx(float(sde.alpha(s)) * mu, rel=1e-10)
        assert variance == pytest.approx(float(sde.sigma(s)) ** 2, rel=1e-10)


@every_sde
def test_exponential_order_one_is_ancestral_and_ddim(sde):
    times = grid(sde)
    for eta in (0.0, 1.0):
        (a,), (e,) = stages("ancestral", sde, times, eta), stages("exponential", sde, times, eta)
        for ours, theirs in zip(e[:3], a[:3], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    # DDIM: x_s = alpha_s x0_hat + sigma_s eps_hat with eps_hat = (x_t - alpha_t x0_hat)/sigma_t.
    t, s = times[:-1], times[1:]
    torch.testing.assert_close(e.noise > 0, torch.ones_like(t, dtype=torch.bool))
    (ddim,) = stages("exponential", sde, times, 0.0)
    torch.testing.assert_close(ddim.x, sde.sigma(s) / sde.sigma(t))
    torch.testing.assert_close(ddim.x0, sde.alpha(s) - sde.sigma(s) / sde.sigma(t) * sde.alpha(t))
    assert not ddim.noise.any()


@pytest.mark.parametrize("eta", [0.25, 0.7])
@every_sde
def test_exponential_is_the_exact_solution_for_a_constant_estimate(sde, eta):
    """Order 1 with any eta on point data: exact as ancestral sampling is, with a noise of its own."""
    times, mu = grid(sde), -0.4
    mean, variance = float(sde.alpha(times[0])) * mu, float(sde.sigma(times[0])) ** 2
    (stage,) = stages("exponential", sde, times, eta)
    for x, x0, noise, s in zip(stage.x, stage.x0, stage.noise, times[1:], strict=True):
        mean, variance = float(x) * mean + float(x0) * mu, float(x) ** 2 * variance + float(noise) ** 2
        assert mean == pytest.approx(float(sde.alpha(s)) * mu, rel=1e-10, abs=1e-12)
        assert variance == pytest.approx(float(sde.sigma(s)) ** 2, rel=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_exponential_weights_are_exact_for_polynomials(order, eta):
    """alpha_s q int exp(-q (lambda_s - l)) P(l) dl for every polynomial P of degree < order, on an uneven grid."""
    sde, q = VPSDE(), 1 + eta**2
    times = torch.tensor([0.95, 0.8, 0.72, 0.5, 0.31, 0.3, 0.02, 0.001], dtype=torch.float64)
    lam = (0.5 * sde.log_snr(times)).numpy()
    (stage,) = stages("exponential", sde, times, eta, solver_order=order)
    nodes, quadrature = np.polynomial.legendre.leggauss(60)
    for i in range(order - 1, len(times) - 1):
        length = lam[i + 1] - lam[i]
        where = lam[i] + 0.5 * length * (nodes + 1)
        for degree in range(order):
            kernel = q * np.exp(-q * (lam[i + 1] - where))
            integral = 0.5 * length * (quadrature * kernel * (where - lam[i]) ** degree).sum()
            values = [(lam[i - k] - lam[i]) ** degree for k in range(order)]
            weights = [float(stage.x0[i])] + [float(h[i]) for h in stage.history]
            got = sum(w * v for w, v in zip(weights, values, strict=True))
            assert got == pytest.approx(float(sde.alpha(times[i + 1])) * integral, rel=1e-9, abs=1e-12)


def test_multistep_starts_with_lower_orders():
    times = grid(VPSDE())
    (stage,) = stages("exponential", VPSDE(), times, 0.5, solver_order=3)
    (first,), (second,) = (stages("exponential", VPSDE(), times, 0.5, solver_order=p) for p in (1, 2))
    assert float(stage.x0[0]) == float(first.x0[0]) and float(stage.history[0][0]) == float(stage.history[1][0]) == 0
    assert float(stage.x0[1]) == pytest.approx(float(second.x0[1]))
    assert float(stage.history[0][1]) == pytest.approx(float(second.history[0][1])) and float(stage.history[1][1]) == 0
    assert stage.keep == ESTIMATE and first.keep is None


@every_sde
def test_formulas_in_terms_of_the_score(sde):
    """Each of the paper's updates, written with the score: x_s = A x_t + C score + noise z."""
    times, eta = grid(sde), 0.6
    t, s = times[:-1], times[1:]
    dt, beta = t - s, sde.transition(s, t)[1]
    a = sde.alpha(t) / sde.alpha(s)
    expected = {
        "euler_maruyama": (
            1 - sde.f(t) * dt,
            0.5 * (1 + eta**2) * sde.g2(t) * dt,
            eta * (sde.g2(t) * dt).sqrt(),
        ),
        "reverse_diffusion": (2 - a, 0.5 * (1 + eta**2) * beta, eta * beta.sqrt()),
    }
    for name, (x, score, noise) in expected.items():
        (stage,) = stages(name, sde, times, eta)
        # x0_hat = (x_t + sigma^2 score)/alpha
        torch.testing.assert_close(stage.x + stage.x0 / sde.alpha(t), x, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(stage.x0 * sde.sigma(t) ** 2 / sde.alpha(t), score, rtol=1e-9, atol=0)
        torch.testing.assert_close(stage.noise, noise, rtol=1e-9, atol=0)


def test_ancestral_is_ddpm_on_its_own_table():
    """Ho et al. 2020, eq. 7 and 11: posterior mean and variance from beta_t, alpha_t and alpha_bar_t."""
    betas = ddpm_betas("linear", 40, 1e-3, 0.2)
    alpha_bar = torch.cumprod(1 - betas, 0)
    before, now, beta = alpha_bar[:-1], alpha_bar[1:], betas[1:]
    sde, times = DiscreteVPSDE.from_betas(betas), torch.arange(40, 0, -1, dtype=torch.float64) / 40
    (small,) = stages("ancestral", sde, times)
    (large,) = stages("ancestral", sde, times, variance_type="fixed_large")
    flip = lambda v: v.flip(0)  # noqa: E731 - the table runs the other way
    torch.testing.assert_close(flip(small.x), (1 - beta).sqrt() * (1 - before) / (1 - now), rtol=1e-9, atol=0)
    torch.testing.assert_close(flip(small.x0), before.sqrt() * beta / (1 - now), rtol=1e-9, atol=0)
    torch.testing.assert_close(flip(small.noise) ** 2, beta * (1 - before) / (1 - now), rtol=1e-9, atol=0)
    torch.testing.assert_close(flip(large.noise) ** 2, beta, rtol=1e-9, atol=0)
    torch.testing.assert_close(large.x, small.x)


def test_ancestral_is_smld_on_its_own_scales():
    """Song et al. 2021, eq. 47: x + (sigma_i^2 - sigma_{i-1}^2) score, variance sigma_{i-1}^2 (1 -
    sigma_{i-1}^2/sigma_i^2)."""
    sde, times = VESDE(), torch.arange(9, -1, -1, dtype=torch.float64) / 9
    high, low = sde.sigma(times[:-1]) ** 2, sde.sigma(times[1:]) ** 2
    (stage,) = stages("ancestral", sde, times)
    torch.testing.assert_close(stage.x + stage.x0, torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(stage.x0 * high, high - low)
    torch.testing.assert_close(stage.noise**2, low * (high - low) / high)


def test_heun_is_karras_algorithm_1_on_ve():
    """Euler to t_{i+1} with d = (x - D)/sigma, then the mean of both slopes."""
    sde, times = VESDE(), grid(VESDE(), 5)
    (first, second), sigma = stages("heun", sde, times, 0.0), sde.sigma(times)
    x = torch.tensor(0.8, dtype=torch.float64)
    denoise = lambda x, sigma: torch.tanh(x / (1 + sigma))  # noqa: E731 - any function
    for i in range(4):
        d = (x - denoise(x, sigma[i])) / sigma[i]
        euler = x + (sigma[i + 1] - sigma[i]) * d
        expected = x + (sigma[i + 1] - sigma[i]) * 0.5 * (d + (euler - denoise(euler, sigma[i + 1])) / sigma[i + 1])
        at_t = denoise(x, sigma[i])
        x = first.x[i] * x + first.x0[i] * at_t
        torch.testing.assert_close(x, euler)
        x = second.x[i] * x + second.x0[i] * denoise(x, sigma[i + 1]) + second.history[0][i] * at_t
        torch.testing.assert_close(x, expected)
    assert torch.equal(second.t, times[1:]) and first.keep == ESTIMATE and first.t is None


def test_flow_euler_is_ddim_and_heun_is_heun_on_the_velocity():
    """On the straight path the probability flow is dx/dt = eps_hat - x0_hat: one Euler step of it is DDIM."""
    sde, times = RectifiedFlowSDE(), torch.tensor([1.0, 0.7, 0.4, 0.1], dtype=torch.float64)
    velocity = lambda x, t: torch.sin(3 * x) + t  # noqa: E731 - any function
    x = y = torch.tensor(0.3, dtype=torch.float64)
    (ddim,), (first, second) = stages("exponential", sde, times, 0.0), stages("heun", sde, times, 0.0)
    for i in range(3):
        t, s = times[i], times[i + 1]
        euler = x + (s - t) * velocity(x, t)
        x = ddim.x[i] * x + ddim.x0[i] * (x - t * velocity(x, t))
        torch.testing.assert_close(x, euler)

        k1 = velocity(y, t)
        expected = y + (s - t) * 0.5 * (k1 + velocity(y + (s - t) * k1, s))
        at_t = y - t * k1
        y = first.x[i] * y + first.x0[i] * at_t
        y = second.x[i] * y + second.x0[i] * (y - s * velocity(y, s)) + second.history[0][i] * at_t
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", [name for name, rule in PREDICTORS.items() if rule.calls and rule.finite_at_zero_snr])
@pytest.mark.parametrize(
    "sde",
    [RectifiedFlowSDE(), CosineSDE(), CosineSDE(0.008), DiscreteVPSDE.from_betas(ddpm_betas(), True)],
    ids=["flow", "cosine", "cosine_offset", "zero_snr"],
)
def test_a_start_from_pure_noise_is_finite(sde, name):
    """alpha(t_max) = 0: lambda = -infinity, and yet every coefficient is finite and the first step is exact."""
    times = torch.linspace(1.0, 0.01, 20, dtype=torch.float64)
    eta = 0.0 if PREDICTORS[name].deterministic else 1.0
    rules = [PREDICTORS[name]()] + ([Exponential(order) for order in (2, 3)] if name == "exponential" else [])
    for rule in rules:
        plan = make_plan(sde, times, rule, stochasticity=eta, denoise_final=False)
        mean, variance = push_gaussian(plan, sde, MEAN0, STD0, 0.0, 1.0)
        assert math.isfinite(mean) and variance > 0
    if name in ("ancestral", "exponential"):
        # x0_hat is the mean of the data there, so the first step draws from N(alpha_s m, sigma_s^2) whatever x is.
        row = plan.rows[0]
        assert row.x == pytest.approx(0.0, abs=1e-7)
        assert row.model == pytest.approx(float(sde.alpha(times[1])), rel=1e-9)
        assert row.noise == pytest.approx(float(sde.sigma(times[1])), rel=1e-9)


def test_the_last_steps_near_the_data_lose_no_precision():
    """Tiny steps at log-SNRs of 20 and more, where sub-VP ends: weights exact to rounding, not to cancellation."""
    sde = SDES["sub_vp"]()
    times = sde.time_of(20.0 + torch.tensor([0.0, 1e-6, 3e-6, 4e-6, 6e-6], dtype=torch.float64))
    (stage,) = stages("exponential", sde, times, 1.0, solver_order=3)
    total = stage.x0 + sum(stage.history)
    h = 0.5 * sde.log_snr(times).diff()
    torch.testing.assert_close(total, sde.alpha(times[1:]) * -torch.expm1(-2 * h), rtol=1e-8, atol=0)


# ---------------------------------------------------------------------- bad input


def test_unknown_predictor():
    with pytest.raises(ValueError, match="predictor must be one of euler_maruyama, .*'euler'"):
        get_predictor("euler")


@pytest.mark.parametrize("order", [0, 4, -1, "2", 1.5])
def test_solver_order(order):
    with pytest.raises(ValueError, match=r"solver_order must be an integer in \[1, 3\]"):
        Exponential(solver_order=order)
