"""Adaptive reverse-SDE sampling: its law, its Brownian path, and that samples do not see each other."""

import math

import pytest
import torch
from analytic import GaussianMixture, PointwiseGaussian, z_threshold

from diffusers_sde.sampling.adaptive import SDEOptions, _BrownianPath, sample_adaptive
from diffusers_sde.sampling.solution import SolverError
from diffusers_sde.sdes import SDES

INSTANCES = {name: cls() for name, cls in SDES.items()}
every_sde = pytest.mark.parametrize("sde", INSTANCES.values(), ids=INSTANCES.keys())


def end(sde):
    return float(sde.time_of(8.0))


MODEL = PointwiseGaussian(0.3, 0.6)


def law(sde, eta, tolerance, seed=0):
    """(mean error in standard deviations, variance ratio) at t_min, and the result."""
    x = torch.randn(20, 2000, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * sde.prior_std
    generator = torch.Generator().manual_seed(seed + 1)
    result = sample_adaptive(
        MODEL.denoiser(sde),
        sde,
        x,
        SDEOptions(tolerance, tolerance, stochasticity=eta),
        t_min=end(sde),
        denoise_final=False,
        generator=generator,
    )
    alpha, sigma = float(sde.alpha(end(sde))), float(sde.sigma(end(sde)))
    variance = (alpha * 0.6) ** 2 + sigma**2
    return (
        float(result.sample.mean() - alpha * 0.3) / math.sqrt(variance),
        float(result.sample.var()) / variance,
        result,
    )


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@every_sde
def test_the_law_of_gaussian_data(sde, eta):
    """Mean and variance at t_min, although steps were rejected. The prior's own error is part of it."""
    mean, ratio, result = law(sde, eta, 0.004)
    noise = z_threshold(1e-5) / math.sqrt(result.sample.numel())
    assert abs(mean) < noise + 0.02
    assert abs(ratio - 1.0) < math.sqrt(2) * noise + 0.02
    assert int(result.rejected.sum()) > 0 and bool((result.calls < 400).all())


def test_rejection_leaves_no_bias():
    """A judge that dislikes large values of the path rejects every other step; the end is N(0, 1) all the same."""
    n, generator = 40_000, torch.Generator().manual_seed(3)
    path = _BrownianPath(torch.zeros(n, 1).double(), torch.device("cpu"))
    now, total, length = torch.zeros(n).double(), torch.zeros(n, 1).double(), torch.full((n,), 0.3).double()
    active, rejections = torch.ones(n, dtype=torch.bool), 0
    draw = lambda wanted: torch.randn(n, 1, dtype=torch.float64, generator=generator)  # noqa: E731
    while bool(active.any()):
        limit = torch.minimum(path.top(), torch.ones(n).double())
        target = torch.minimum(now + length, limit)
        increment = path.increment(now, target, active, draw)
        fine = active & ((increment[:, 0] < 0.5 * (target - now).sqrt()) | (target - now < 0.02))
        rejections += int((active & ~fine).sum())
        path.accept(fine, increment)
        total = torch.where(fine[:, None], total + increment, total)
        now = torch.where(fine, target, now)
        length = torch.where(active & ~fine, 0.5 * (target - now), torch.full_like(length, 0.3))
        active = active & (now < 1.0)
    threshold = z_threshold(1e-5, 2) / math.sqrt(n)
    assert rejections > n
    assert abs(float(total.mean())) < threshold
    assert abs(float(total.var()) - 1.0) < math.sqrt(2) * threshold


def test_a_mixture_is_sampled_and_easy_samples_cost_less():
    sde = SDES["vp"]()
    data = GaussianMixture([0.3, 0.7], [[1.0, 1.0], [-1.0, 0.0]], [[0.05, 0.1], [0.1, 0.05]])
    each = lambda x, t: data.denoise(x, sde.alpha(t), sde.sigma(t))  # noqa: E731
    x = torch.randn(3000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = sample_adaptive(
        each, sde, x, SDEOptions(0.05, 0.02), t_min=1e-3, generator=torch.Generator().manual_seed(1)
    )
    assert float((result.sample[:, 0] > 0).double().mean()) == pytest.approx(0.3, abs=0.04)
    assert int(result.calls.min()) < int(result.calls.max())
    assert result.calls.shape == (3000,)


def test_a_sample_depends_on_its_own_generator_only():
    sde = SDES["sub_vp"]()
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    generators = lambda: [torch.Generator().manual_seed(10 + i) for i in range(4)]  # noqa: E731
    together = sample_adaptive(MODEL.denoiser(sde), sde, x, generator=generators())
    alone = sample_adaptive(MODEL.denoiser(sde), sde, x[2:3], generator=generators()[2:3])
    torch.testing.assert_close(together.sample[2:3], alone.sample)
    assert int(together.calls[2]) == int(alone.calls[0]) and together.sample.dtype == x.dtype


@pytest.mark.parametrize(
    "change, word",
    [
        *(({"t_min": v}, "t_min") for v in (0.0, 1.0, 2.0, math.nan, "a")),
        *(({"generator": v}, "generator") for v in (5, "x", [], [torch.Generator()], [1, 2])),
        ({"conditioning": {"label": torch.zeros(5)}}, "conditioning 'label'"),
    ],
)
def test_bad_arguments_are_named(change, word):
    sde = SDES["vp"]()
    with pytest.raises(ValueError, match=word):
        sample_adaptive(MODEL.denoiser(sde), sde, torch.randn(2, 3), **change)


@pytest.mark.parametrize(
    "change, word",
    [
        *(({"rtol": v}, "rtol") for v in (0.0, -1.0, math.nan, math.inf, "a", None)),
        *(({"atol": v}, "atol") for v in (0.0, -1.0, math.nan, math.inf, "a", None)),
        ({"rtol": 1e-30, "atol": 1e-30}, "rtol and atol"),
        *(({"stochasticity": v}, "stochasticity") for v in (-1.0, math.nan, math.inf, "1", None)),
        *(({"max_calls": v}, "max_calls") for v in (0, math.nan, math.inf, "a", None)),
    ],
)
def test_bad_options_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        SDEOptions(**change)


@pytest.mark.parametrize("x", [torch.full((2, 3), math.nan), torch.zeros(0, 3), torch.zeros(2, 3).long(), "x"])
def test_a_start_that_is_no_batch_of_numbers_is_refused(x):
    sde = SDES["vp"]()
    with pytest.raises(ValueError, match="^x must"):
        sample_adaptive(MODEL.denoiser(sde), sde, x)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_estimate_that_is_not_finite_ends_the_run(value):
    """A NaN error would be rejected for ever, each time at the cost of a longer Brownian path."""
    sde, calls = SDES["vp"](), []

    def denoiser(x, t):
        calls.append(len(x))
        bad = (t < 0.5)[:, None] & (torch.arange(len(x)) == 1)[:, None]
        return torch.where(bad, value, MODEL.denoiser(sde)(x, t))

    with pytest.raises(SolverError, match=r"not finite at t = 0\.4[0-9]*, in 1 samples"):
        sample_adaptive(denoiser, sde, torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    assert len(calls) < 100


def test_an_estimate_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"returned shape \(2, 1\) for a state of \(2, 3\)"):
        sample_adaptive(lambda x, t: x[:, :1], SDES["vp"](), torch.zeros(2, 3))


@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
def test_steps_that_vanish_end_the_run(stochasticity):
    sde = SDES["vp"]()
    with pytest.raises(SolverError, match="step size vanished"):
        rough = lambda x, t: torch.randn_like(x)  # noqa: E731
        sample_adaptive(rough, sde, torch.randn(2, 3).double(), SDEOptions(1e-12, 1e-12, stochasticity=stochasticity))


def test_a_limit_of_calls():
    sde = SDES["vp"]()
    with pytest.raises(RuntimeError, match="max_calls=5"):
        sample_adaptive(MODEL.denoiser(sde), sde, torch.randn(2, 3), SDEOptions(max_calls=5))
