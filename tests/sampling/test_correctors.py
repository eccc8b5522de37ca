"""Correctors: the paper's update, and that Langevin dynamics leaves p_t as it is."""

import math

import pytest
import torch
from analytic import PointwiseGaussian, marginal_moments, push_gaussian, z_threshold

from diffusers_sde.basics.noise import standard_normal_like
from diffusers_sde.sampling.correctors import CORRECTORS, get_corrector
from diffusers_sde.sampling.planning import make_plan
from diffusers_sde.sampling.rows import Plan, Row, advance
from diffusers_sde.sdes import SDES, VESDE, VPSDE, DiscreteVPSDE, ddpm_betas

INSTANCES = {name: cls() for name, cls in SDES.items()}
every_sde = pytest.mark.parametrize("sde", INSTANCES.values(), ids=INSTANCES.keys())


def corrector_row(sde, name, t, s, snr):
    """The row of one corrector call at t, on x0_hat."""
    plan = make_plan(sde, torch.tensor([t, s], dtype=torch.float64), "ancestral", name, 1, snr)
    row = plan.rows[0]
    assert row.is_corrector and row.t == t and row.s == t
    return row


@pytest.mark.parametrize("snr", [0.01, 0.16])
@every_sde
def test_langevin_is_the_papers_update(sde, snr):
    """Algorithms 4 and 5: step = 2 alpha (snr |z|/|g|)^2, x + step g + sqrt(2 step) z, one sample at a time."""
    t, s = 0.6 * sde.t_max, 0.5 * sde.t_max
    x, x0_hat, z = torch.randn(3, 4, 2, 3, dtype=torch.float64)
    row = corrector_row(sde, "langevin", t, s, snr)
    ours = advance(row, x, x0_hat, [], lambda: z)[0]
    alpha_i = float(sde.alpha(t) / sde.alpha(s)) ** 2
    for i in range(4):
        score = (float(sde.alpha(t)) * x0_hat[i] - x[i]) / float(sde.sigma(t)) ** 2
        step = 2 * alpha_i * (snr * z[i].norm() / score.norm()) ** 2
        torch.testing.assert_close(ours[i], x[i] + step * score + (2 * step).sqrt() * z[i])

    together = advance(row, x, x0_hat, [], lambda: z, batch_norms=True)[0]
    score = (float(sde.alpha(t)) * x0_hat - x) / float(sde.sigma(t)) ** 2
    noise_norm, score_norm = (v.flatten(1).norm(dim=1).mean() for v in (z, score))
    step = 2 * alpha_i * (snr * noise_norm / score_norm) ** 2
    torch.testing.assert_close(together, x + step * score + (2 * step).sqrt() * z)
    assert not torch.allclose(together, ours)


@every_sde
def test_annealed_langevin_is_the_official_update(sde):
    """step = 2 alpha (snr sigma_t)^2, x + step g + sqrt(2 step) z."""
    t, s, snr = 0.6 * sde.t_max, 0.5 * sde.t_max, 0.16
    x, x0_hat, z = torch.randn(3, 4, 2, 3, dtype=torch.float64)
    ours = advance(corrector_row(sde, "annealed_langevin", t, s, snr), x, x0_hat, [], lambda: z)[0]
    sigma = float(sde.sigma(t))
    step = 2 * float(sde.alpha(t) / sde.alpha(s)) ** 2 * (snr * sigma) ** 2
    score = (float(sde.alpha(t)) * x0_hat - x) / sigma**2
    torch.testing.assert_close(ours, x + step * score + math.sqrt(2 * step) * z)


def test_alpha_is_one_minus_beta_on_ddpms_own_table_and_one_for_ve():
    betas = ddpm_betas("linear", 50, 1e-3, 0.2)
    sde, snr = DiscreteVPSDE.from_betas(betas), 0.1
    times = torch.arange(50, 0, -1, dtype=torch.float64) / 50
    plan = make_plan(sde, times, "ancestral", "langevin", 1, snr)
    steps = torch.tensor([row.langevin for row in plan.rows if row.is_corrector], dtype=torch.float64)
    # The last level leads to the data, alpha_bar = 1, and its ratio is 1 - beta_1 as well.
    torch.testing.assert_close(steps.flip(0), 2 * (1 - betas) * snr**2, rtol=1e-11, atol=0)
    plan = make_plan(VESDE(), times, "ancestral", "langevin", 1, snr)
    assert all(row.langevin == pytest.approx(2 * snr**2, rel=1e-14) for row in plan.rows if row.is_corrector)


AFFINE = [name for name in CORRECTORS if corrector_row(VPSDE(), name, 0.5, 0.4, 0.1).langevin is None]


@pytest.mark.parametrize("name", AFFINE)
@every_sde
def test_every_affine_corrector_leaves_p_t_invariant_to_second_order(sde, name):
    """One call on p_t keeps the mean, and changes the variance by O(step^2), the step being O(snr^2)."""
    mean0, std0, t = 0.7, 0.6, 0.3 * sde.t_max
    exact_mean, exact_variance = marginal_moments(sde, t, mean0, std0)
    changes = []
    for snr in (0.2, 0.1):
        plan = Plan.from_rows([corrector_row(sde, name, t, 0.98 * t, snr)])
        mean, variance = push_gaussian(plan, sde, mean0, std0, exact_mean, exact_variance)
        assert mean == pytest.approx(exact_mean, rel=1e-9, abs=1e-12)
        changes.append(variance / exact_variance - 1)
        # It is a corrector: a state away from the mean is drawn to it.
        moved, _ = push_gaussian(plan, sde, mean0, std0, exact_mean + 1.0, exact_variance)
        assert 0 < moved - exact_mean < 1 - 1e-7
    assert abs(changes[0]) < 0.02 and changes[0] / changes[1] == pytest.approx(16, rel=0.1)


@every_sde
def test_ornstein_uhlenbeck_is_exact_on_point_data_and_as_good_as_it_says(sde):
    """With w = 1 - exp(-2 snr^2) the variance changes by -w^2 sigma^2 alpha^2 c^2 / (alpha^2 c^2 + sigma^2)."""
    t, snr = 0.3 * sde.t_max, 0.4
    plan = Plan.from_rows([corrector_row(sde, "ornstein_uhlenbeck", t, 0.98 * t, snr)])
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    for c in (0.0, 0.6):
        mean, variance = marginal_moments(sde, t, 0.7, c)
        after = push_gaussian(plan, sde, 0.7, c, mean, variance)
        change = -((1 - math.exp(-2 * snr**2)) ** 2) * sigma**2 * alpha**2 * c**2 / variance
        assert after[0] == pytest.approx(mean, rel=1e-10)
        assert after[1] == pytest.approx(variance + change, rel=1e-10)


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
@every_sde
def test_annealed_langevin_leaves_p_t_invariant_up_to_its_step(sde, fraction):
    """Its stationary law, exactly: the mean is that of p_t and the variance off by the step size times 1/(2 Var).

    x <- x - u (x - m) + sqrt(2 u Var) z has the stationary variance Var/(1 - u/2) with u = step/Var.
    """
    mean0, std0, t = 0.7, 0.6, fraction * sde.t_max
    exact_mean, exact_variance = marginal_moments(sde, t, mean0, std0)
    biases = []
    for snr in (0.2, 0.1, 0.05):
        row = corrector_row(sde, "annealed_langevin", t, 0.98 * t, snr)
        step = 2 * float(sde.alpha(t) / sde.alpha(0.98 * t)) ** 2 * (snr * float(sde.sigma(t))) ** 2
        u = step / exact_variance
        count = min(int(60 / u) + 1, 3000)
        plan = Plan.from_rows([row] * count)
        stationary = exact_variance / (1 - u / 2)
        mean, variance = push_gaussian(plan, sde, mean0, std0, exact_mean, stationary)
        assert mean == pytest.approx(exact_mean, rel=1e-9, abs=1e-12)
        assert variance == pytest.approx(stationary, rel=1e-9)
        # From elsewhere it moves there at the rate 1 - u per step.
        mean, variance = push_gaussian(plan, sde, mean0, std0, exact_mean + 1.0, 2 * exact_variance)
        assert mean - exact_mean == pytest.approx((1 - u) ** count, rel=1e-6, abs=1e-9)
        assert variance - stationary == pytest.approx(
            (2 * exact_variance - stationary) * (1 - u) ** (2 * count), rel=1e-6, abs=1e-9 * exact_variance
        )
        biases.append(stationary / exact_variance - 1)
    assert biases[0] / biases[1] == pytest.approx(4, rel=0.1) and biases[1] / biases[2] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("start", [1.0, 1.6])
@every_sde
def test_langevin_leaves_p_t_invariant_up_to_its_step(sde, start):
    """Variance after 15 steps at snr 0.1 against its exact recursion in high dimension, and against p_t itself.

    With d = 2048 the norms are their expectations to 2 %: |z|^2 = d and |g|^2 = d v/S^2 for a state of variance v, S
    the variance of p_t. So step = u S^2/v with u = 2 alpha snr^2 and v <- v (1 - u S/v)^2 + 2 u S^2/v. False-alarm rate
    of each comparison 1e-6; an error of 4 % in the variance fails.
    """
    model, t, snr, batch, d = PointwiseGaussian(0.3, 0.6), 0.3 * sde.t_max, 0.1, 24, 2048
    generator = torch.Generator().manual_seed(5)
    mean, variance = marginal_moments(sde, t, 0.3, 0.6)
    row = corrector_row(sde, "langevin", t, 0.98 * t, snr)
    x = mean + math.sqrt(start * variance) * torch.randn(batch, d, dtype=torch.float64, generator=generator)
    v, u = start * variance, row.langevin
    assert u == pytest.approx(2 * float(sde.alpha(t) / sde.alpha(0.98 * t)) ** 2 * snr**2)
    for _ in range(15):
        x = advance(row, x, model.denoiser(sde)(x, t), [], lambda: standard_normal_like(x, generator))[0]  # noqa: B023
        v = v * (1 - u * variance / v) ** 2 + 2 * u * variance**2 / v
    standard_error, z = math.sqrt(2 / x.numel()), z_threshold(1e-6)
    measured = float((x - mean).square().mean())
    assert abs(measured / v - 1) < z * standard_error + 2e-3  # 2e-3: the spread of the norms at this d
    if start == 1.0:
        assert abs(measured / variance - 1) < z * standard_error + u / 4 + 2e-3
    assert abs(float(x.mean()) - mean) < z * math.sqrt(variance / x.numel())


@pytest.mark.parametrize("batch_norms", [False, True])
def test_a_vanishing_score_moves_nothing(batch_norms):
    sde, t = VPSDE(), 0.5
    row = corrector_row(sde, "langevin", t, 0.4, 0.16)
    x0_hat = torch.randn(2, 3, 4)
    x = x0_hat * float(sde.alpha(t)) * 0  # the score of sample 0 vanishes where alpha x0_hat = x
    x0_hat = x0_hat * 0
    x0_hat[1] = 0.0 if batch_norms else 1.0
    out = advance(row, x, x0_hat, [], lambda: torch.randn(2, 3, 4), batch_norms)[0]
    assert torch.isfinite(out).all() and torch.equal(out[0], x[0])
    assert batch_norms or not torch.equal(out[1], x[1])


def test_where_there_is_no_signal_the_corrector_rests():
    """alpha_t = 0 at the start of a straight path: the paper's alpha_i = 0 there, and nothing is infinite."""
    sde = SDES["rectified_flow"]()
    for name in ("langevin", "annealed_langevin"):
        plan = make_plan(sde, torch.tensor([1.0, 0.5], dtype=torch.float64), "ancestral", name)
        x, x0_hat = torch.randn(2, 2, 3)
        torch.testing.assert_close(advance(plan.rows[0], x, x0_hat, [], lambda: torch.randn(2, 3))[0], x)


def test_one_dimensional_samples_have_norms():
    """A batch of scalars: the norm is the absolute value."""
    row = Row(0.5, 0.5, -1.0, 0.0, langevin=0.02)
    x, z = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    step = 0.02 * (z.abs() / x.abs()) ** 2
    torch.testing.assert_close(advance(row, x, x, [], lambda: z)[0], x - step * x + (2 * step).sqrt() * z)


def test_unknown_corrector():
    with pytest.raises(ValueError, match="corrector must be None or one of langevin, annealed_langevin, .*got 'mala'"):
        get_corrector("mala")
