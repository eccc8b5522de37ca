"""Every SDE: the paper's formulas, the identities that hold for any of them, and numerical stability."""

import math
import pickle

import mpmath
import pytest
import torch
from analytic import z_threshold
from diffusers import DDIMScheduler, DDPMScheduler
from paths import UserSDE

from diffusers_sde.sdes import (
    EDMSDE,
    SDE,
    SDES,
    VESDE,
    VPSDE,
    CosineSDE,
    DiscreteVPSDE,
    RectifiedFlowSDE,
    SubVPSDE,
    ddpm_betas,
    discrete_vp,
    expand_like,
    rescale_to_zero_terminal_snr,
    smld_sigmas,
)

# Every registered SDE with its defaults, so a new one is tested by itself; a few variants; one from outside.
INSTANCES = {name: cls() for name, cls in SDES.items()} | {
    "vp_30": VPSDE(beta_min=0.5, beta_max=30.0),
    "cosine_offset": CosineSDE(offset=0.008),
    "zero_snr": DiscreteVPSDE.from_betas(ddpm_betas("scaled_linear", 100, 0.001, 0.1), rescale_betas_zero_snr=True),
    "user": UserSDE(),
}
every_sde = pytest.mark.parametrize("sde", INSTANCES.values(), ids=INSTANCES.keys())


def some_times(sde, n=40):
    """Increasing times all over (t_min, t_max), float64; between the entries of a table, where f and g^2 jump."""
    u = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
    t = torch.cat([sde.t_min * (0.5 * sde.t_max / sde.t_min) ** u, sde.t_max * (0.01 + 0.981 * u)])
    if isinstance(sde, DiscreteVPSDE):
        entries = len(sde.alphas_cumprod)
        t = torch.where(t < 0.9 / entries, t, ((t * entries).floor() + 0.5) / entries)
    return t.unique()


# ---------------------------------------------------------------------- the paper's formulas, written out

BETA_MIN, BETA_MAX = 0.1, 20.0
SIGMA_MIN, SIGMA_MAX = 0.01, 50.0


def _beta(t):
    return BETA_MIN + t * (BETA_MAX - BETA_MIN)


def _integral(t):
    return t * BETA_MIN + t**2 * (BETA_MAX - BETA_MIN) / 2


# name: t -> alpha, sigma, f, g^2 in mpmath's numbers
FORMULAS = {
    "ve": lambda t: (
        mpmath.mpf(1),
        SIGMA_MIN * (mpmath.mpf(SIGMA_MAX) / SIGMA_MIN) ** t,
        mpmath.mpf(0),
        2 * mpmath.log(mpmath.mpf(SIGMA_MAX) / SIGMA_MIN) * (SIGMA_MIN * (mpmath.mpf(SIGMA_MAX) / SIGMA_MIN) ** t) ** 2,
    ),
    "vp": lambda t: (
        mpmath.exp(-_integral(t) / 2),
        mpmath.sqrt(1 - mpmath.exp(-_integral(t))),
        -_beta(t) / 2,
        _beta(t),
    ),
    "sub_vp": lambda t: (
        mpmath.exp(-_integral(t) / 2),
        1 - mpmath.exp(-_integral(t)),
        -_beta(t) / 2,
        _beta(t) * (1 - mpmath.exp(-2 * _integral(t))),
    ),
    "cosine": lambda t: (
        mpmath.cos(mpmath.pi * t / 2),
        mpmath.sin(mpmath.pi * t / 2),
        -mpmath.pi / 2 * mpmath.tan(mpmath.pi * t / 2),
        mpmath.pi * mpmath.tan(mpmath.pi * t / 2),
    ),
    "edm": lambda t: (mpmath.mpf(1), t, mpmath.mpf(0), 2 * t),
    "rectified_flow": lambda t: (1 - t, t, -1 / (1 - t), 2 * t / (1 - t)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FORMULAS)
def test_paper_formulas_at_every_scale_of_t(name, dtype):
    """To a few units of rounding from t = 1e-5 on, against 50 digits: sqrt(1 - exp) would be off by 6e-3 in float32."""
    sde = SDES[name]()
    times = torch.tensor([1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99], dtype=dtype)
    with mpmath.workdps(50):
        expected = [[float(v) for v in FORMULAS[name](mpmath.mpf(float(t)))] for t in times]
    rounding = 40 * torch.finfo(dtype).eps
    for i, quantity in enumerate((sde.alpha, sde.sigma, sde.f, sde.g2)):
        ours, exact = quantity(times), torch.tensor([row[i] for row in expected], dtype=torch.float64)
        assert ours.dtype == dtype
        # f multiplies x in dx/dt, where only its absolute error counts.
        atol = rounding if quantity == sde.f else 0.0
        torch.testing.assert_close(ours.double(), exact, rtol=rounding, atol=atol)


def test_smallest_noise_of_each_path():
    """The numbers by which a wrong convention shows: VE keeps sigma_min at 0, sub-VP squares VP's noise."""
    assert float(VESDE().sigma(1e-5)) == pytest.approx(0.01, rel=1e-3)
    assert float(VESDE().sigma(0.0)) == pytest.approx(0.01, rel=1e-12)
    assert float(VPSDE().sigma(1e-3)) == pytest.approx(0.01049, rel=1e-3)
    assert float(VPSDE().sigma(1e-5)) == pytest.approx(0.001, rel=1e-3)
    assert float(SubVPSDE().sigma(1e-5)) == pytest.approx(1e-6, rel=2e-3)
    assert float(VPSDE().log_snr(1e-3)) == pytest.approx(9.1, abs=0.05)
    assert float(SubVPSDE().log_snr(1e-3)) == pytest.approx(18.2, abs=0.05)


# ---------------------------------------------------------------------- what holds for any of them


@every_sde
def test_f_and_g2_are_the_derivatives_of_the_marginal(sde):
    """f = d log alpha/dt and g^2 = alpha^2 d(sigma^2/alpha^2)/dt = d sigma^2/dt - 2 f sigma^2, by central
    differences."""
    t = some_times(sde)
    h = 1e-5 * torch.minimum(t, sde.t_max - t)
    f = (sde.log_alpha(t + h) - sde.log_alpha(t - h)) / (2 * h)
    ratio = (sde.sigma(t + h) / sde.alpha(t + h)) ** 2 - (sde.sigma(t - h) / sde.alpha(t - h)) ** 2
    growth = (sde.sigma(t + h) ** 2 - sde.sigma(t - h) ** 2) / (2 * h)
    torch.testing.assert_close(sde.f(t), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sde.g2(t), sde.alpha(t) ** 2 * ratio / (2 * h), rtol=1e-5, atol=0)
    scale = growth.abs() + 2 * (f * sde.sigma(t) ** 2).abs()
    assert ((sde.g2(t) - (growth - 2 * sde.f(t) * sde.sigma(t) ** 2)).abs() < 1e-5 * scale).all()
    assert (sde.g2(t) > 0).all()
    torch.testing.assert_close(sde.diffusion(t) ** 2, sde.g2(t))


@every_sde
def test_chapman_kolmogorov(sde):
    t = some_times(sde, 12)
    r, s, t = torch.combinations(t, 3).unbind(1)
    (a_rs, v_rs), (a_st, v_st), (a_rt, v_rt) = sde.transition(r, s), sde.transition(s, t), sde.transition(r, t)
    torch.testing.assert_close(a_st * a_rs, a_rt, rtol=1e-10, atol=0)
    torch.testing.assert_close(a_st**2 * v_rs + v_st, v_rt, rtol=1e-7, atol=0)


@every_sde
def test_a_transition_carries_marginal_to_marginal(sde):
    s, t = torch.combinations(some_times(sde, 15), 2).unbind(1)
    a, v = sde.transition(s, t)
    assert (v > 0).all()
    torch.testing.assert_close(a * sde.alpha(s), sde.alpha(t), rtol=1e-10, atol=0)
    torch.testing.assert_close(a**2 * sde.sigma(s) ** 2 + v, sde.sigma(t) ** 2, rtol=1e-10, atol=0)


@every_sde
def test_a_short_transition_is_the_sde(sde):
    """a = 1 + f dt and v = g^2 dt to first order: the kernel belongs to this f and g."""
    t = some_times(sde)
    dt = 1e-6 * torch.minimum(t, sde.t_max - t)
    a, v = sde.transition(t, t + dt)
    torch.testing.assert_close((a - 1) / dt, sde.f(t), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(v / dt, sde.g2(t), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@every_sde
def test_time_of_inverts_log_snr(sde, dtype):
    """As well as the precision of the log-SNR itself allows: dt = d log_snr / |log_snr'|."""
    t = some_times(sde).to(dtype)
    log_snr = sde.log_snr(t)
    assert (log_snr[1:] < log_snr[:-1]).all()
    back = sde.time_of(log_snr)
    assert back.dtype == dtype
    slope = (sde.g2(t) / sde.sigma(t) ** 2).double()
    eps = torch.finfo(dtype).eps
    # Beside the log-SNR's own rounding, t is known to the spacing of the numbers that it is a difference of.
    allowed = 16 * eps * ((1 + log_snr.double().abs()) / slope + t.double() + (0.02 if sde == CosineSDE(0.008) else 0))
    assert ((back.double() - t.double()).abs() <= allowed).all()


@every_sde
def test_the_ends_of_log_snr_invert(sde):
    assert float(sde.time_of(sde.log_snr(sde.t_max))) == pytest.approx(sde.t_max, rel=1e-12)
    assert float(sde.time_of(sde.log_snr(sde.t_min))) == pytest.approx(sde.t_min, rel=1e-10)


@pytest.mark.parametrize("name", [name for name, sde in INSTANCES.items() if type(sde)._time_of is not SDE._time_of])
def test_closed_inverse_equals_bisection(name):
    sde = INSTANCES[name]
    log_snr = sde.log_snr(some_times(sde))
    torch.testing.assert_close(sde.time_of(log_snr), SDE._time_of(sde, log_snr), rtol=1e-8, atol=1e-14)


@every_sde
def test_float32_stays_accurate_near_the_data(sde):
    """Everything a training loop evaluates, from t = 1e-5 on: no cancellation anywhere."""
    t = torch.tensor([1e-5, 1.05e-4, 1.05e-3, 1.05e-2]) * sde.t_max
    for quantity in (sde.alpha, sde.sigma, sde.g2, sde.log_snr, sde.diffusion):
        torch.testing.assert_close(quantity(t).double(), quantity(t.double()), rtol=2e-5, atol=0)
    a, v = sde.transition(t, 10 * t)
    a64, v64 = sde.transition(t.double(), 10 * t.double())
    torch.testing.assert_close(a.double(), a64, rtol=2e-5, atol=0)
    # A variance gained is as good as a difference of log-SNRs: the paths that start noisy hardly gain any at first.
    log_snr, gained = sde.log_snr(t.double()), sde.log_snr(t.double()) - sde.log_snr(10 * t.double())
    assert ((v.double() / v64 - 1).abs() < 2e-5 + 1.2e-7 * log_snr.abs() / gained).all()


# ---------------------------------------------------------------------- tensors in, tensors out

METHODS = ["alpha", "sigma", "log_alpha", "log_sigma", "log_snr", "f", "g2", "diffusion"]


@pytest.mark.parametrize("method", METHODS)
@every_sde
def test_shape_and_precision_of_t(sde, method):
    function = getattr(sde, method)
    flat = torch.linspace(0.1, 0.9, 6) * sde.t_max
    values = function(flat)
    for shape in [(1, 6), (2, 3), (1, 2, 3), (6, 1, 1, 1)]:
        assert torch.equal(function(flat.reshape(shape)), values.reshape(shape))
    assert function(flat[2]).shape == () and function(flat[2]).dtype == torch.float32
    torch.testing.assert_close(function(flat[2]), values[2])
    assert function(flat[:0]).shape == (0,)
    assert torch.equal(function(flat[2].expand(2, 2)), values[2].expand(2, 2))
    assert torch.equal(function(flat[::2]), values[::2])
    assert values.dtype == torch.float32
    assert function(flat.double()).dtype == torch.float64
    assert function(0.5).dtype == torch.float64 and function(0.5).shape == ()
    assert function([0.25, 0.5]).shape == (2,)
    for half in (torch.float16, torch.bfloat16):
        at_half = torch.tensor([0.25, 0.5]).to(half)
        assert torch.equal(function(at_half), function(at_half.float()))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@every_sde
def test_derivatives_work_without_autograd(sde, context):
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64) * sde.t_max
    f, g2 = sde.f(t), sde.g2(t)
    with context():
        inside = t.clone()
        assert torch.equal(sde.f(inside), f) and torch.equal(sde.g2(inside), g2)
        assert torch.equal(sde.g2(inside[1:]), g2[1:])


def test_a_table_first_used_in_inference_mode_serves_autograd_later():
    betas = torch.linspace(1e-3, 0.05, 37, dtype=torch.float64)  # a table no other test has cached
    sde = DiscreteVPSDE.from_betas(betas)
    discrete_vp._log_snr_table.cache_clear()
    with torch.inference_mode():
        sde.g2(0.5)
    t = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(sde.log_snr(t).sum(), t)
    torch.testing.assert_close(slope, -(sde.g2(t) / sde.sigma(t) ** 2).detach())
    sde.alpha(0.5).numpy()


@every_sde
def test_f_differentiates_where_autograd_is_on(sde):
    """Reverse-mode and forward-mode derivatives agree, also one on top of the other."""
    t = torch.tensor(0.4013 * sde.t_max, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(sde.log_snr(t), t)
    torch.testing.assert_close(slope, -(sde.g2(t) / sde.sigma(t) ** 2).detach())
    (curvature,) = torch.autograd.grad(sde.g2(t), t)
    h = 1e-6 * sde.t_max
    difference = (sde.g2(t.detach() + h) - sde.g2(t.detach() - h)) / (2 * h)
    torch.testing.assert_close(curvature, difference, rtol=1e-5, atol=1e-6)


@every_sde
def test_marginal_drift_and_reverse_drift(sde):
    x, score = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64) * sde.t_max
    mean, std = sde.marginal(x, t)
    drift = sde.drift(x, t)
    for i in range(3):
        alpha, sigma, f, g2 = (float(v) for v in (sde.alpha(t[i]), sde.sigma(t[i]), sde.f(t[i]), sde.g2(t[i])))
        torch.testing.assert_close(mean[i], alpha * x[i])
        assert std.shape == (3, 1, 1, 1) and float(std[i]) == pytest.approx(sigma)
        torch.testing.assert_close(drift[i], f * x[i])
        for eta in (0.0, 0.5, 1.0):
            expected = f * x[i] - (1 + eta**2) / 2 * g2 * score[i]
            torch.testing.assert_close(sde.reverse_drift(x, t, score, eta)[i], expected)
    half = sde.marginal(x.to(torch.bfloat16), t)
    assert half[0].dtype == torch.bfloat16


def test_expand_like_appends_axes():
    x = torch.zeros(2, 3, 4)
    assert expand_like(torch.zeros(2), x).shape == (2, 1, 1)
    assert expand_like(torch.zeros(()), x).shape == (1, 1, 1)
    assert expand_like(torch.zeros(2, 3), x).shape == (2, 3, 1)


# ---------------------------------------------------------------------- the prior


@every_sde
def test_prior_density_and_sampling(sde):
    assert sde.prior_std == pytest.approx(float(sde.sigma(sde.t_max)), rel=1e-4)
    x = torch.randn(5, 3, 4) * sde.prior_std
    expected = torch.distributions.Normal(0.0, torch.tensor(sde.prior_std, dtype=torch.float64)).log_prob(x.double())
    torch.testing.assert_close(sde.prior_log_prob(x), expected.flatten(1).sum(1), rtol=1e-12, atol=0)
    assert sde.prior_log_prob(x[:, 0, 0]).shape == (5,)

    draw = sde.prior_sample((4, 50_000), torch.Generator().manual_seed(3), dtype=torch.float64)
    n, z = draw.numel(), z_threshold(1e-6, 2)
    assert abs(float(draw.mean())) < z * sde.prior_std / math.sqrt(n)
    assert abs(float(draw.var()) / sde.prior_std**2 - 1) < z * math.sqrt(2 / n)
    assert torch.equal(draw, sde.prior_sample((4, 50_000), torch.Generator().manual_seed(3), dtype=torch.float64))
    assert sde.prior_sample([2], dtype=torch.float32).dtype == torch.float32


def test_ve_prior_is_sigma_max():
    assert VESDE(0.01, 1348.0).prior_std == pytest.approx(1348.0, rel=1e-12)
    assert float(VPSDE().alpha(1.0)) == pytest.approx(0.0066, rel=0.01)  # small, not zero


# ---------------------------------------------------------------------- discrete tables

TABLES = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "linear", "num_train_timesteps": 250, "beta_start": 0.0008, "beta_end": 0.04},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"trained_betas": [0.01, 0.02, 0.05, 0.1, 0.3, 0.5], "num_train_timesteps": 6},
]


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    "theirs, table",
    [(DDPMScheduler, t) for t in TABLES] + [(DDIMScheduler, t) for t in TABLES if t.get("beta_schedule") != "sigmoid"],
)
def test_discrete_vp_equals_the_table_of_diffusers(theirs, table, zero_snr):
    reference = theirs(**table, rescale_betas_zero_snr=zero_snr).alphas_cumprod.double()
    sde = DiscreteVPSDE.from_betas(ddpm_betas(**table), rescale_betas_zero_snr=zero_snr)
    n = len(reference)
    t = torch.arange(1, n + 1, dtype=torch.float64) / n
    # diffusers multiplies 1000 factors in float32; its beta, not ours, carries that error.
    torch.testing.assert_close(sde.alpha(t) ** 2, reference, rtol=2e-4, atol=1e-7)
    exact = torch.tensor(sde.alphas_cumprod, dtype=torch.float64)
    torch.testing.assert_close(sde.alpha(t) ** 2, exact, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(sde.sigma(t) ** 2, 1 - exact, rtol=1e-11, atol=0)
    torch.testing.assert_close(sde.alpha(t.float()).double() ** 2, exact, rtol=1e-3, atol=1e-7)


def test_table_transition_is_ddpm():
    """From entry n - 1 to entry n: mean sqrt(1 - beta_n), variance beta_n; from the data to entry 0 likewise."""
    betas = ddpm_betas("linear", 50, 1e-3, 0.2)
    t = torch.arange(0, 51, dtype=torch.float64) / 50
    a, v = DiscreteVPSDE.from_betas(betas).transition(t[:-1], t[1:])
    torch.testing.assert_close(a, (1 - betas).sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(v, betas, rtol=1e-11, atol=0)


def test_linear_table_discretises_the_vp_sde():
    """beta_i = beta(i/N)/N: the same path in the limit, but 4 % apart in sigma near the data at N = 1000."""
    gaps = []
    for n in (1000, 4000):
        table, t = DiscreteVPSDE.from_betas(ddpm_betas("linear", n, 0.1 / n, 20 / n)), torch.tensor([0.1, 0.5, 0.9])
        gaps.append((table.log_snr(t) - VPSDE().log_snr(t)).abs().max())
    assert 3.5 < gaps[0] / gaps[1] < 4.5
    first = torch.tensor(0.002, dtype=torch.float64)
    ratio = DiscreteVPSDE().sigma(first) / VPSDE().sigma(first)
    assert 0.005 < abs(float(ratio) - 1) < 0.05


def test_between_entries_the_path_is_monotone_and_reaches_the_data():
    sde = DiscreteVPSDE()
    t = torch.linspace(1e-6, 1.0, 20_001, dtype=torch.float64)
    assert (sde.log_snr(t).diff() < 0).all()
    assert float(sde.sigma(0.0)) == 0.0 and float(sde.alpha(0.0)) == 1.0
    small = torch.tensor([1e-5, 2e-5], dtype=torch.float64)
    variance = sde.sigma(small) ** 2 / sde.alpha(small) ** 2
    assert float(variance[1] / variance[0]) == pytest.approx(2.0, rel=1e-9)


def test_zero_terminal_snr():
    alphas_cumprod = torch.cumprod(1 - ddpm_betas(), 0)
    rescaled = rescale_to_zero_terminal_snr(alphas_cumprod)
    assert float(rescaled[-1]) == 0.0 and float(rescaled[0]) == pytest.approx(float(alphas_cumprod[0]), rel=1e-12)
    sde = DiscreteVPSDE.from_betas(ddpm_betas(), rescale_betas_zero_snr=True)
    assert float(sde.alpha(1.0)) == 0.0 and float(sde.sigma(1.0)) == 1.0
    a, v = sde.transition(0.999, 1.0)
    assert float(a) == 0.0 and float(v) == 1.0


def test_smld_sigmas_are_geometric():
    sigmas = smld_sigmas(10, 0.01, 1.0)
    torch.testing.assert_close(sigmas[1:] / sigmas[:-1], torch.full((9,), 100 ** (1 / 9), dtype=torch.float64))
    assert float(sigmas[0]) == pytest.approx(0.01, rel=1e-12) and float(sigmas[-1]) == pytest.approx(1.0, rel=1e-12)


# ---------------------------------------------------------------------- bad input, and the rest


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: VESDE(sigma_min=0.0), ["sigma_min"]),
        (lambda: VESDE(sigma_min=2.0, sigma_max=1.0), ["sigma_min", "sigma_max"]),
        (lambda: VESDE(sigma_max=math.inf), ["sigma_max"]),
        (lambda: VPSDE(beta_min=-0.1), ["beta_min"]),
        (lambda: SubVPSDE(beta_min=3.0, beta_max=2.0), ["beta_min", "beta_max"]),
        (lambda: VPSDE(beta_min=math.nan), ["beta_min"]),
        (lambda: CosineSDE(offset=-1.0), ["offset"]),
        (lambda: VPSDE(t_min=0.5, t_max=0.1), ["t_min", "t_max"]),
        (lambda: EDMSDE(t_max=math.inf), ["t_max"]),
        (lambda: DiscreteVPSDE((0.5, 0.6)), ["alphas_cumprod"]),
        (lambda: DiscreteVPSDE((1.0, 0.6)), ["alphas_cumprod"]),
        (lambda: DiscreteVPSDE((0.5, -0.6)), ["alphas_cumprod"]),
        (lambda: DiscreteVPSDE((0.5,)), ["alphas_cumprod"]),
        (lambda: DiscreteVPSDE((0.9, math.nan, 0.1)), ["alphas_cumprod"]),
        (lambda: ddpm_betas("cosine"), ["beta_schedule", "squaredcos_cap_v2", "cosine"]),
        (lambda: ddpm_betas(num_train_timesteps=1), ["num_train_timesteps"]),
        (lambda: ddpm_betas(beta_start=-1.0), ["beta_start"]),
        (lambda: ddpm_betas(beta_end=1.5), ["beta_end"]),
        (lambda: ddpm_betas(trained_betas=[0.1, 0.0]), ["trained_betas"]),
        (lambda: smld_sigmas(1), ["num_scales"]),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words)


@every_sde
def test_an_sde_is_a_value(sde):
    twin = pickle.loads(pickle.dumps(sde))
    assert twin == sde and hash(twin) == hash(sde)
    with pytest.raises(AttributeError):
        sde.t_max = 2.0


def test_flow_is_the_straight_path():
    x0, x1, t = torch.randn(3), torch.randn(3), 0.37
    sde = RectifiedFlowSDE()
    mean, std = sde.marginal(x0[None], t)
    torch.testing.assert_close(mean + std * x1, (x0 + t * (x1 - x0))[None])
