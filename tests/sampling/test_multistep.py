"""Multistep exponential integration: its order with every option, and the samplers that it must equal."""

import math

import diffusers
import pytest
import torch
from analytic import GaussianMixture, push_gaussian
from paths import INSTANCES, MEAN0, STD0, interval, measured_order
from states import start

from diffusers_sde import FlowSDEScheduler, VPSDEScheduler
from diffusers_sde.sampling.correctors import CORRECTORS
from diffusers_sde.sampling.exponential import Exponential
from diffusers_sde.sampling.loop import sample
from diffusers_sde.sampling.planning import make_plan
from diffusers_sde.sampling.rows import advance
from diffusers_sde.sdes import VPSDE, RectifiedFlowSDE

every_sde = pytest.mark.parametrize("sde", INSTANCES.values(), ids=INSTANCES.keys())


def order_of(sde, eta, **options):
    def make(times):
        return make_plan(sde, times, Exponential(**options), stochasticity=eta, denoise_final=False), eta

    return measured_order(sde, make)


# ---------------------------------------------------------------------- orders


@pytest.mark.parametrize("solver_type, gaussian_std", [("heun", 0.2), ("midpoint", 0.0)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@every_sde
def test_order_two(sde, eta, solver_type, gaussian_std):
    order, error = order_of(sde, eta, solver_order=2, solver_type=solver_type, gaussian_std=gaussian_std)
    assert order == pytest.approx(2.0, abs=0.1) and error < 0.02


@pytest.mark.parametrize("gaussian_std", [0.0, 0.3])
@pytest.mark.parametrize("solver_order", [1, 2])
@every_sde
def test_the_correction_raises_the_order_of_the_probability_flow(sde, solver_order, gaussian_std):
    options = {"solver_order": solver_order, "gaussian_std": gaussian_std}
    order, error = order_of(sde, 0.0, solver_correction=True, **options)
    assert order == pytest.approx(solver_order + 1, abs=0.1)
    assert error < 0.5 * order_of(sde, 0.0, **options)[1]


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.5])
@every_sde
def test_the_correction_is_weakly_of_order_two(sde, eta):
    """Order 1 becomes 2. Order 2 stays 2, which the noise decides, where the error is no larger than before."""
    order, error = order_of(sde, eta, solver_order=1, solver_correction=True)
    assert order == pytest.approx(2.0, abs=0.1)
    assert error < 0.5 * order_of(sde, eta, solver_order=1)[1]
    order, error = order_of(sde, eta, solver_order=2, solver_correction=True)
    assert order > 1.9 and error < order_of(sde, eta, solver_order=2)[1]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("std", [0.05, 0.6, 3.0])
@every_sde
def test_data_of_the_gaussian_std_are_sampled_exactly_in_any_number_of_steps(sde, std, eta):
    start_time, end = interval(sde)
    times = torch.tensor([start_time, 0.5 * (start_time + end), end], dtype=torch.float64)
    plan = make_plan(sde, times, Exponential(gaussian_std=std), stochasticity=eta, denoise_final=False)
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    variance = alpha**2 * std**2 + sigma**2
    got_mean, got_variance = push_gaussian(plan, sde, MEAN0, std, float(alpha[0]) * MEAN0, float(variance[0]))
    assert got_mean == pytest.approx(float(alpha[-1]) * MEAN0, rel=1e-9)
    assert got_variance == pytest.approx(float(variance[-1]), rel=1e-9)


def test_a_large_gaussian_std_is_noise_prediction():
    """For eta = 0 and order 1, DDIM, both are the same; at order 2 the slope is that of the noise."""
    sde = RectifiedFlowSDE()
    times = torch.tensor([0.9, 0.6, 0.4], dtype=torch.float64)
    plan = make_plan(sde, times, Exponential(2, gaussian_std=1e4), stochasticity=0.0, denoise_final=False)
    eps = torch.tensor([0.3, 0.5], dtype=torch.float64)  # any two estimates of the noise
    x, memory = torch.tensor([1.3], dtype=torch.float64), []
    y = [float(x) / 0.1]  # x/alpha, dy = eps d(sigma/alpha); the polynomial is one in (sigma/alpha)^2
    rho = (sde.sigma(times) / sde.alpha(times)).tolist()
    for i, row in enumerate(plan.rows):
        d = (x - sde.sigma(row.t) * eps[i]) / sde.alpha(row.t)
        x, kept = advance(row, x, d, memory, lambda: torch.zeros(0))
        memory = [kept]
        slope = 0.0 if i == 0 else float(eps[1] / rho[1] - eps[0] / rho[0]) / (rho[1] ** 2 - rho[0] ** 2)
        # eps/rho is what is extrapolated: dy = (eps/rho) d(rho^2)/2.
        d2 = rho[i + 1] ** 2 - rho[i] ** 2
        y.append(y[-1] + 0.5 * (float(eps[i]) / rho[i] * d2 + 0.5 * slope * d2**2))
        assert float(x / sde.alpha(times[i + 1])) == pytest.approx(y[-1], rel=1e-5)


@pytest.mark.parametrize("solver_order", [1, 2, 3])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@every_sde
def test_every_option_is_finite_from_end_to_end(sde, eta, solver_order):
    """From t_max, where alpha may vanish, to within 1e-5 of the data; and with less history than the order asks for."""
    for n in (1, 2, 3, 4, 12):
        times = torch.linspace(sde.t_max, 1e-5, n + 1, dtype=torch.float64)
        for gaussian_std in (0.0, 0.1, 10.0):
            predictor = Exponential(solver_order, "heun", True, gaussian_std)
            plan = make_plan(sde, times, predictor, stochasticity=eta)
            mean, variance = push_gaussian(plan, sde, MEAN0, STD0, 0.0, sde.prior_std**2)
            assert math.isfinite(mean) and math.isfinite(variance) and variance >= 0


# ---------------------------------------------------------------------- diffusers


@pytest.mark.parametrize("grid", [{}, {"use_karras_sigmas": True}, {"use_lu_lambdas": True}])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("n", [6, 20])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_order_two_is_dpm_solver_2m(n, algorithm_type, solver_type, grid):
    stock = diffusers.DPMSolverMultistepScheduler(
        algorithm_type=algorithm_type, solver_type=solver_type, timestep_spacing="trailing", **grid
    )
    flow = algorithm_type == "dpmsolver++"
    ours = VPSDEScheduler.from_config(
        stock.config, solver_order=2, solver_type=solver_type, solver_correction=False, gaussian_std=0.0,
        predictor="exponential", probability_flow=flow, stochasticity=1.0, bound_above_sigma=None,
    )  # fmt: skip
    stock.set_timesteps(n)
    if grid:  # whose timesteps stock rounds to integers: its sigmas say where it stands
        ours.set_timesteps(sigmas=stock.sigmas[:-1].double())
    else:
        ours.set_timesteps(timesteps=stock.timesteps)

    def loop(scheduler):
        x, generator = start(), torch.Generator().manual_seed(4)
        for i, t in enumerate(scheduler.timesteps):
            output = torch.tanh(0.7 * x) + 0.1 * x.roll(1, -1) + 0.02 * i
            x = scheduler.step(output, t, x, generator=generator).prev_sample
        return x

    torch.testing.assert_close(loop(ours), loop(stock), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("n", [3, 12, 40])
@pytest.mark.parametrize("scheduler_class", [VPSDEScheduler, FlowSDEScheduler])
def test_the_default_stochasticity_is_what_each_step_allows(scheduler_class, n):
    """Order 1: x_s = sigma_s/sigma_t exp(-eta^2 h) x_t + alpha_s (1 - exp(-(1 + eta^2) h)) x0_hat + noise."""
    scheduler = scheduler_class(solver_order=1, solver_correction=False, gaussian_std=0.0, prediction_type="sample")
    scheduler.set_timesteps(n)
    sde, times = scheduler.sde, scheduler.level_times(n)
    seen = []
    lengths = (0.5 * sde.log_snr(times).diff()).tolist()
    for i, (row, t, s) in enumerate(zip(scheduler.rows[:-1], times, times[1:], strict=False)):
        h = lengths[i]
        eta2 = min(0.6 / max(lengths[i : i + 2]), 2.0)  # its own length and that of the next interval
        alpha, sigma_t, sigma_s = float(sde.alpha(s)), float(sde.sigma(t)), float(sde.sigma(s))
        renewed = eta2 * h if eta2 > 0 else 0.0  # the first step of a flow is infinite, and deterministic
        assert row.noise == pytest.approx(sigma_s * math.sqrt(1 - math.exp(-2 * renewed)), rel=1e-6, abs=1e-9)
        assert row.x == pytest.approx(sigma_s / sigma_t * math.exp(-renewed), rel=1e-6)
        assert row.model == pytest.approx(alpha * (1 - math.exp(-h - renewed)), rel=1e-6)
        seen.append(eta2)
    assert (max(seen) == 2.0) == (n == 40)
    assert scheduler.stochasticity is None
    other = scheduler_class(predictor="ancestral")  # the paper's predictors keep the paper's reverse SDE
    other.set_timesteps(n)
    expected = make_plan(sde, times, "ancestral", stochasticity=1.0).rows
    assert [row.noise for row in other.rows] == [row.noise for row in expected]


@pytest.mark.parametrize("gaussian_std", [0.0, 0.3])
def test_each_interval_has_its_own_stochasticity(gaussian_std):
    """Its coefficients are those of a run with that stochasticity; what completes a step is of the interval before."""
    times = torch.linspace(0.9, 0.1, 6, dtype=torch.float64)
    predictor = Exponential(3, "heun", True, gaussian_std)
    etas = torch.tensor([0.0, 0.4, 1.0, 1.4, 0.7], dtype=torch.float64)
    (mixed,) = predictor.stages(VPSDE(), times, etas)
    for i, eta in enumerate(etas.tolist()):
        (alone,) = predictor.stages(VPSDE(), times, eta)
        own = [(mixed.x, alone.x), (mixed.x0, alone.x0), (mixed.noise, alone.noise)]
        for a, b in own + list(zip(mixed.history, alone.history, strict=True)):
            torch.testing.assert_close(a[i], b[i], rtol=1e-12, atol=1e-14)
        for a, b in zip(mixed.completion, alone.completion, strict=True):
            torch.testing.assert_close(a[i + 1 : i + 2], b[i + 1 : i + 2], rtol=1e-12, atol=1e-14)
    assert len(mixed.completion) == 4 and all(bool(weights[1:].abs().sum() > 0) for weights in mixed.completion)


# ---------------------------------------------------------------------- orders chosen by interval


def rows_of(times, order, stochasticity=None, correction=True, gaussian_std=0.05, sde=None):
    predictor = Exponential(order, "heun", correction, gaussian_std)
    return make_plan(sde or VPSDE(), times, predictor, stochasticity=stochasticity).rows


def lambda_grid(lengths, start=-3.0, sde=None):
    """Times whose intervals have these lengths in log(alpha/sigma)."""
    lam = torch.cat([torch.tensor([start]), start + torch.tensor(lengths).cumsum(0)]).double()
    return (sde or VPSDE()).time_of(2.0 * lam)


@pytest.mark.parametrize("eta", [None, 0.0, 1.0])
@pytest.mark.parametrize("h, order", [(0.3, 3), (0.59, 3), (0.8, 2), (1.5, 2)])
def test_on_intervals_that_are_alike_the_chosen_order_is_the_classical_rule(h, order, eta):
    """Bit for bit, corrections included. Without a Gaussian part lambda is log(alpha/sigma)."""
    times = lambda_grid([h] * 5)
    assert rows_of(times, None, eta, gaussian_std=0.0) == rows_of(times, order, eta, gaussian_std=0.0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@every_sde
def test_the_chosen_order_converges_as_the_third(sde, eta):
    """The reach is above 1, so that it does not act on a fine grid whose intervals change smoothly."""
    order, error = order_of(sde, eta, solver_order=None, solver_correction=True)
    expected, other = order_of(sde, eta, solver_order=3, solver_correction=True)
    assert order == pytest.approx(expected, abs=1e-6) and error == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("start", [-3.0, -math.inf])
def test_the_order_is_that_of_the_median_interval(start):
    """Up to 0.6 it is order 3, where a first interval from pure noise, which is infinite, does not count."""
    sde = VPSDE() if math.isfinite(start) else RectifiedFlowSDE()
    for lengths, order in (([0.3, 0.59, 0.9], 3), ([0.3, 0.7, 0.7], 2), ([0.3, 0.3, 0.3, 2.0], 3)):
        times = lambda_grid(lengths, sde=sde)
        if math.isinf(start):
            times = torch.cat([torch.ones(1).double(), times])
        rows = rows_of(times, None, 0.0, gaussian_std=0.0, correction=False, sde=sde)
        assert max(len(row.history) for row in rows) == order - 1


def test_an_estimate_is_not_extrapolated_further_than_it_carries():
    """The slope of a long interval behind short ones: classical up to the reach, and then as if they lay further back.

    With order 2 and no Gaussian part x_s has the coefficient -alpha_s (h - 1/q + exp(-q h)/q) / h1 of the estimate
    before, where q = 1 + eta^2 and h1 is the distance back.
    """
    sde = VPSDE()
    for eta, reach in ((0.0, 1.75), (1.0, 1.1)):  # nu = 1 - exp(-2) = 0.86 for eta = 1: 0.85/sqrt(nu) is below 1.1
        for h in (1.0, 1.05, 1.6, 3.0):
            times = lambda_grid([1.0, 1.0, h], start=-2.0)  # order 2
            row = rows_of(times, None, eta, correction=False, gaussian_std=0.0)[2]
            q, distance = 1.0 + eta**2, max(1.0, h / reach)
            slope = float(sde.alpha(times[3])) * (h - (1.0 - math.exp(-q * h)) / q) / distance
            assert row.history == (pytest.approx(-slope, rel=1e-6),)
    # Little noise allows more: a reach of 0.85/sqrt(nu) = 1.48 where the interval before has renewed nu = 0.33.
    times, reach = lambda_grid([1.0, 0.2, 1.8], start=-2.0), 0.85 / math.sqrt(1.0 - math.exp(-0.4))
    row = rows_of(times, None, 1.0, correction=False, gaussian_std=0.0)[2]
    slope = float(sde.alpha(times[3])) * (1.8 - (1.0 - math.exp(-3.6)) / 2.0) / (1.8 / reach)
    assert 1.1 < reach < 1.75 and row.history == (pytest.approx(-slope, rel=1e-6),)


# ---------------------------------------------------------------------- execution


@pytest.mark.parametrize("clip", [False, True])
def test_a_scheduler_remembers_what_its_plan_says(clip):
    """The scheduler's loop equals the reference loop with everything on, clipped or not."""
    arguments = {"solver_order": 2, "solver_correction": True, "gaussian_std": 0.2, "stochasticity": 1.0}
    scheduler = VPSDEScheduler(clip_sample=clip, clip_sample_range=0.8, prediction_type="sample", **arguments)
    scheduler.set_timesteps(7)
    model = GaussianMixture([0.5, 0.5], torch.randn(2, 48), torch.rand(2, 48) + 0.1).denoiser(scheduler.sde)
    generator = torch.Generator().manual_seed(1)
    x = start(torch.float64)
    for t in scheduler.timesteps:
        output = model(x, scheduler.sde_time(t.double()))
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    plan = make_plan(scheduler.sde, scheduler._level_times, Exponential(2, "heun", True, 0.2), stochasticity=1.0)
    limit = (lambda d: d.clamp(-0.8, 0.8)) if clip else (lambda d: d)
    expected = sample(plan, lambda x, t: limit(model(x, t)), start(torch.float64), torch.Generator().manual_seed(1))
    torch.testing.assert_close(x, limit(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gaussian_std", [0.0, 0.3])
@pytest.mark.parametrize("correct_steps", [1, 2])
@pytest.mark.parametrize("corrector", ["annealed_langevin", "ornstein_uhlenbeck", "langevin"])
def test_slopes_are_taken_along_the_path_and_not_across_the_corrector(corrector, correct_steps, gaussian_std):
    """Multistep and corrector together, written out as a loop for order 2."""
    sde, snr, n = VPSDE(), 0.3, 5
    times = torch.linspace(0.9, 0.1, n, dtype=torch.float64)
    data = GaussianMixture([0.5, 0.5], [[1.0, -1.0], [-1.0, 0.3]], [[0.3, 0.2], [0.1, 0.4]])
    denoise, x = data.denoiser(sde), torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    predictor = Exponential(2, solver_correction=True, gaussian_std=gaussian_std)
    plan = make_plan(sde, times, predictor, corrector, correct_steps, snr)
    got = sample(plan, denoise, x, torch.Generator().manual_seed(1))

    (stage,) = predictor.stages(sde, times, 1.0)
    generator = torch.Generator().manual_seed(1)
    noise = lambda: torch.randn(4, 2, dtype=torch.float64, generator=generator)  # noqa: E731
    ratio = gaussian_std**2 * sde.log_snr(times).exp()
    estimate = lambda x, d, i: d + ratio[i] * (d - x / sde.alpha(times[i]))  # noqa: E731
    differences, after = [], None
    for i in range(n):
        c = CORRECTORS[corrector](
            sde, times[i : i + 1], times.new_tensor([times[i + 1] if i + 1 < n else math.nan]), snr
        )
        for m in range(correct_steps):
            d = denoise(x, times[i])
            base = x
            if m == 0 and i < n - 1:
                before = estimate(x, d, i)
                if after is not None:
                    differences.insert(0, before - after)
                    if c.langevin is None:
                        late = [float(v[i]) for v in stage.completion]
                        base = x + late[0] * differences[0]
                        if len(differences) > 1:
                            base = base - late[2] * differences[1]
            if c.langevin is None:
                x = float(c.x) * base + float(c.x0) * d + float(c.noise) * noise()
            else:
                score, z = float(c.x) * x + float(c.x0) * d, noise()
                step = float(c.langevin) * (z.norm(dim=1, keepdim=True) / score.norm(dim=1, keepdim=True)) ** 2
                x = x + step * score + (2 * step).sqrt() * z
        d = denoise(x, times[i])
        if i == n - 1:
            x = d
            break
        after = estimate(x, d, i)
        new = float(stage.x[i]) * x + float(stage.x0[i] + stage.history[0][i]) * after
        if differences:
            new = new - float(stage.history[0][i]) * differences[0]
        x = new + float(stage.noise[i]) * noise()
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name, value", [("solver_type", "rk4"), ("gaussian_std", -0.1), ("gaussian_std", math.nan)])
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        Exponential(**{name: value})
