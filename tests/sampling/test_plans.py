"""Plans: their order of calls, folding, and that they are the paper's algorithms."""

import math

import pytest
import torch
from analytic import GaussianMixture, PointwiseGaussian
from paths import UserSDE

from diffusers_sde.basics.noise import standard_normal_like
from diffusers_sde.networks.parametrizations import PREDICTION_TYPES, get_parametrization
from diffusers_sde.sampling.correctors import CORRECTORS
from diffusers_sde.sampling.exponential import Exponential
from diffusers_sde.sampling.loop import sample
from diffusers_sde.sampling.planning import make_plan
from diffusers_sde.sampling.predictors import PREDICTORS
from diffusers_sde.sampling.rows import advance
from diffusers_sde.sdes import SDES, VESDE, VPSDE, CosineSDE, DiscreteVPSDE, RectifiedFlowSDE

INSTANCES = {name: cls() for name, cls in SDES.items()} | {"user": UserSDE()}
every_sde = pytest.mark.parametrize("sde", INSTANCES.values(), ids=INSTANCES.keys())
every_corrector = pytest.mark.parametrize("corrector", [None, *CORRECTORS])
every_predictor = pytest.mark.parametrize("predictor", PREDICTORS)

MIXTURE = GaussianMixture([0.6, 0.4], [[1.0, 0.5], [-1.0, 0.0]], [[[0.2, 0.1], [0.1, 0.3]], [[0.1, 0.0], [0.0, 0.4]]])


def grid(sde, n=8):
    return torch.linspace(0.9 * sde.t_max, 0.05 * sde.t_max, n, dtype=torch.float64)


def plan_of(sde, predictor, corrector, correct_steps=1, times=None, **kwargs):
    if isinstance(predictor, str) and PREDICTORS[predictor].deterministic:
        kwargs["stochasticity"] = 0.0
    return make_plan(sde, grid(sde) if times is None else times, predictor, corrector, correct_steps, **kwargs)


# ---------------------------------------------------------------------- the paper's algorithms, written out


def score_of(sde, x, t):
    return (sde.alpha(t) * MIXTURE.denoiser(sde)(x, t) - x) / sde.sigma(t) ** 2


def langevin_by_hand(x, score, alpha, snr, generator):
    z = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    out = torch.empty_like(x)
    for i in range(len(x)):
        step = 2 * alpha * (snr * z[i].norm() / score[i].norm()) ** 2
        out[i] = x[i] + step * score[i] + torch.sqrt(2 * step) * z[i]
    return out


def test_pc_for_ve_is_algorithm_2():
    """N levels, M corrector steps; corrector at sigma_{i+1} first, then the predictor to sigma_i."""
    sde, n, m, snr = VESDE(), 25, 2, 0.16
    times = torch.linspace(1.0, 1e-5, n, dtype=torch.float64)
    sigmas = [0.01 * 5000 ** float(t) for t in times]
    x = 50.0 * torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    ours = sample(
        make_plan(sde, times, "reverse_diffusion", "langevin", m, snr, denoise_final=False),
        MIXTURE.denoiser(sde),
        x,
        torch.Generator().manual_seed(1),
    )
    for i in range(n - 1):
        for _ in range(m):
            x = langevin_by_hand(x, score_of(sde, x, times[i]), 1.0, snr, generator)
        gained = sigmas[i] ** 2 - sigmas[i + 1] ** 2
        x = x + gained * score_of(sde, x, times[i])
        x = x + math.sqrt(gained) * torch.randn(x.shape, dtype=x.dtype, generator=generator)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def test_pc_for_vp_is_algorithm_3():
    """On DDPM's table: (2 - sqrt(1 - beta)) x + beta score + sqrt(beta) z, Langevin with alpha_i = 1 - beta_i."""
    sde, m, snr, stride_free = DiscreteVPSDE(), 1, 0.05, 30
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    index = list(range(999, 999 - stride_free, -1))  # consecutive entries, where the table's own beta applies
    times = torch.tensor([(i + 1) / 1000 for i in index], dtype=torch.float64)
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    ours = sample(
        make_plan(sde, times, "reverse_diffusion", "langevin", m, snr, denoise_final=False),
        MIXTURE.denoiser(sde),
        x,
        torch.Generator().manual_seed(1),
    )
    for i, t in zip(index[:-1], times[:-1], strict=True):
        for _ in range(m):
            x = langevin_by_hand(x, score_of(sde, x, t), 1 - betas[i], snr, generator)
        x = (2 - (1 - betas[i]).sqrt()) * x + betas[i] * score_of(sde, x, t)
        x = x + betas[i].sqrt() * torch.randn(x.shape, dtype=x.dtype, generator=generator)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


@every_corrector
@every_predictor
@every_sde
def test_a_plan_is_its_loop(sde, predictor, corrector):
    """Corrector calls at t, then the predictor's calls to s, then x0_hat: bit for bit what two nested loops give."""
    if predictor == "none" and corrector is None:
        return
    steps, snr, model = 2, 0.1, PointwiseGaussian()
    times = grid(sde, 6)
    plan = plan_of(sde, predictor, corrector, steps, times, snr=snr)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(2)).double() * sde.prior_std
    ours = sample(plan, model.denoiser(sde), x, torch.Generator().manual_seed(3))

    generator, eta = torch.Generator().manual_seed(3), 0.0 if PREDICTORS[predictor].deterministic else 1.0
    noise = lambda: torch.randn(3, 4, dtype=torch.float64, generator=generator)  # noqa: E731
    stages = PREDICTORS[predictor]().stages(sde, times, eta)
    for i, t in enumerate(times.tolist()):
        s = times[i + 1] if i + 1 < len(times) else torch.tensor(math.nan, dtype=torch.float64)
        for _ in range(steps if corrector else 0):
            c = CORRECTORS[corrector](sde, torch.tensor([t], dtype=torch.float64), s[None], snr)
            d = model.denoise(x, sde.alpha(t), sde.sigma(t))
            if c.langevin is None:
                x = float(c.x) * x + float(c.x0) * d + float(c.noise) * noise()
            else:
                score, z = float(c.x) * x + float(c.x0) * d, noise()
                norms = [v.norm(dim=1, keepdim=True) for v in (z, score)]
                step = float(c.langevin) * (norms[0] / norms[1]) ** 2
                x = x + step * score + (2 * step).sqrt() * z
        if i + 1 == len(times):
            x = model.denoise(x, sde.alpha(t), sde.sigma(t))
            break
        earlier = []
        for stage in stages:
            at = t if stage.t is None else float(stage.t[i])
            d = model.denoise(x, sde.alpha(at), sde.sigma(at))
            x = float(stage.x[i]) * x + float(stage.x0[i]) * d
            for weight, e in zip(stage.history, earlier, strict=False):
                x = x + float(weight[i]) * e
            if float(stage.noise[i]):
                x = x + float(stage.noise[i]) * noise()
            earlier.insert(0, d)
    torch.testing.assert_close(ours, x, rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------------- structure


@pytest.mark.parametrize("denoise_final", [True, False])
@pytest.mark.parametrize("correct_steps", [1, 3])
@every_corrector
@every_predictor
def test_rows_levels_and_order(predictor, corrector, correct_steps, denoise_final):
    if predictor == "none" and corrector is None:
        return
    sde, n = VPSDE(), 5
    times = grid(sde, n)
    plan = plan_of(sde, predictor, corrector, correct_steps, times, denoise_final=denoise_final)
    calls, corrections = PREDICTORS[predictor].calls, correct_steps if corrector else 0
    assert plan.rows_per_level == calls + corrections
    assert len(plan.rows) == (n - 1) * plan.rows_per_level + (corrections + 1 if denoise_final else 0)
    for level in range(n - 1):
        rows = plan.rows[level * plan.rows_per_level : (level + 1) * plan.rows_per_level]
        t, s = float(times[level]), float(times[level + 1])
        assert [row.is_corrector for row in rows] == [True] * corrections + [False] * calls
        assert all((row.t, row.s) == (t, t) for row in rows[:corrections])
        predictions = rows[corrections:]
        assert [row.continues for row in predictions] == [False] + [True] * (calls - 1) if calls else not predictions
        if calls:
            # Each call is made where the one before has led, from the level's time to that of the next.
            assert predictions[0].t == t and predictions[-1].s == s
            assert [row.t for row in predictions[1:]] == [row.s for row in predictions[:-1]]
            assert all(t >= row.t >= row.s >= s for row in predictions)
    last = plan.rows[-1]
    assert not last.is_corrector or predictor == "none"  # the final sample is never corrected
    if denoise_final:
        assert (last.t, last.s, last.x, last.model, last.noise) == (float(times[-1]), None, 0.0, 1.0, 0.0)
    elif calls:
        assert last.s == float(times[-1])


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@every_corrector
@every_predictor
def test_folding_changes_what_the_model_returns_and_nothing_else(predictor, corrector, prediction_type):
    if predictor == "none" and corrector is None:
        return
    sde, parametrization, model = VPSDE(), get_parametrization(prediction_type, 0.6), PointwiseGaussian()
    plan = plan_of(sde, Exponential(3) if predictor == "exponential" else predictor, corrector)

    def network(x, t):
        return parametrization.from_x0(model.denoiser(sde)(x, t), x, sde.alpha(t), sde.sigma(t))

    x = torch.randn(3, 4, dtype=torch.float64)
    expected = sample(plan, model.denoiser(sde), x, torch.Generator().manual_seed(3))
    folded = plan.fold(parametrization, sde)
    torch.testing.assert_close(sample(folded, network, x, torch.Generator().manual_seed(3)), expected)
    assert (folded.rows_per_level, folded.memory, len(folded.rows)) == (
        plan.rows_per_level,
        plan.memory,
        len(plan.rows),
    )
    half = plan.fold(parametrization, sde, bounds_estimate=True)
    for before, after, full in zip(plan.rows, half.rows, folded.rows, strict=True):
        assert after.x == (full.x if before.is_corrector else before.x)
        assert (after.skip, after.out) == (full.skip, full.out)


def test_noise_is_drawn_only_where_a_row_has_some():
    draws = []

    def draw():
        draws.append(1)
        return torch.zeros(2, 3)

    for predictor, corrector, eta, expected in [
        ("exponential", None, 0.0, 0),
        ("euler_maruyama", None, 0.0, 0),
        ("exponential", None, 1.0, 7),
        ("ancestral", "langevin", 1.0, 7 + 8),
        ("heun", "annealed_langevin", 0.0, 8),
    ]:
        draws.clear()
        plan = make_plan(VPSDE(), grid(VPSDE()), predictor, corrector, stochasticity=eta)
        x, memory = torch.randn(2, 3), []
        for row in plan.rows:
            memory = [x, *memory][:3]
            x, _ = advance(row, x, 0.5 * x, memory, draw)
        assert len(draws) == expected == sum(row.draws_noise for row in plan.rows)


def test_a_callback_sees_every_row_and_single_times_work():
    sde, seen = VPSDE(), []
    plan = make_plan(sde, torch.tensor([0.7], dtype=torch.float64))
    x = torch.randn(2, 2, dtype=torch.float64)
    got = sample(plan, MIXTURE.denoiser(sde), x, callback=lambda i, value: seen.append((i, value)))
    torch.testing.assert_close(got, MIXTURE.denoiser(sde)(x, 0.7))
    assert len(seen) == 1 and seen[0][0] == 0


def test_final_time_ends_with_a_ddim_step():
    sde, last, final = VPSDE(), 0.05, 0.01
    plan = make_plan(sde, grid(sde), final_time=final)
    x, x0 = torch.randn(2, 3, 4, dtype=torch.float64)
    eps = (x - sde.alpha(last) * x0) / sde.sigma(last)
    expected = sde.alpha(final) * x0 + sde.sigma(final) * eps
    torch.testing.assert_close(advance(plan.rows[-1], x, x0, [], lambda: torch.zeros(0))[0], expected)
    with pytest.raises(ValueError, match="final_time"):
        make_plan(sde, grid(sde), final_time=0.06)


def test_noise_of_each_sample_comes_from_its_own_generator():
    x = torch.zeros(3, 2, 2)
    alone = [standard_normal_like(x[:1], [torch.Generator().manual_seed(i)]) for i in range(3)]
    together = standard_normal_like(x, [torch.Generator().manual_seed(i) for i in range(3)])
    assert torch.equal(together, torch.cat(alone))
    single = standard_normal_like(x, torch.Generator().manual_seed(7))
    assert torch.equal(single, torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(7)))
    assert standard_normal_like(x.half()).dtype == torch.float32  # never drawn in half precision
    assert standard_normal_like(x.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="generator is a list of 2, but there are 3"):
        standard_normal_like(x, [torch.Generator()] * 2)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change, words",
    [
        ({"predictor": "euler"}, ["predictor must be one of", "euler_maruyama", "'euler'"]),
        ({"corrector": "mala"}, ["corrector must be None or one of", "langevin", "'mala'"]),
        ({"times": [0.5, 0.5]}, ["times", "decreasing"]),
        ({"times": [0.1, 0.5]}, ["times", "decreasing"]),
        ({"times": []}, ["times"]),
        ({"times": [0.5], "denoise_final": False}, ["times"]),
        ({"times": [0.5, math.nan]}, ["times"]),
        ({"stochasticity": -0.1}, ["stochasticity", "-0.1"]),
        ({"stochasticity": math.inf}, ["stochasticity"]),
        ({"predictor": "heun"}, ["heun", "probability_flow"]),
        ({"predictor": "none"}, ["none", "corrector"]),
        ({"corrector": "langevin", "correct_steps": 0}, ["correct_steps", "0"]),
        ({"corrector": "langevin", "correct_steps": 1.5}, ["correct_steps", "1.5"]),
        ({"corrector": "langevin", "snr": -0.1}, ["snr", "-0.1"]),
        ({"corrector": "annealed_langevin", "snr": 0.0}, ["snr"]),
        ({"corrector": "langevin", "snr": math.nan}, ["snr"]),
        ({"predictor": "ancestral", "stochasticity": 1.5}, ["stochasticity"]),
        ({"sde": RectifiedFlowSDE(), "times": [1.0, 0.5], "predictor": "euler_maruyama"}, ["euler_maruyama", "alpha"]),
        ({"sde": CosineSDE(), "times": [1.0, 0.5], "predictor": "euler_maruyama"}, ["euler_maruyama", "alpha"]),
    ],
)
def test_bad_arguments_are_named(change, words):
    arguments = {"sde": VPSDE(), "times": [0.9, 0.5, 0.1]} | change
    arguments["times"] = torch.tensor(arguments["times"], dtype=torch.float64)
    with pytest.raises(ValueError) as error:
        make_plan(**arguments)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("prediction_type", ["epsilon", "score"])
def test_pure_noise_does_not_determine_the_data_from_its_noise(prediction_type):
    plan = make_plan(RectifiedFlowSDE(), torch.tensor([1.0, 0.5], dtype=torch.float64))
    with pytest.raises(ValueError, match="v_prediction"):
        plan.fold(get_parametrization(prediction_type), RectifiedFlowSDE())


def test_rows_are_values():
    (row, *_), (same, *_) = (plan_of(VPSDE(), "ancestral", None).rows for _ in range(2))
    assert row == same and row._replace(x=0.0) != row
