"""Log-densities against closed forms."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic import GaussianMixture
from flow_models import gaussian, generators, mixture, name

from diffusers_sde.flow.likelihood import log_prob
from diffusers_sde.flow.quantized import Quantization
from diffusers_sde.flow.solver import ODEOptions
from diffusers_sde.flow.trace import TraceOptions
from diffusers_sde.sdes import EDMSDE, SDES, VESDE, VPSDE, CosineSDE, DiscreteVPSDE, RectifiedFlowSDE, SubVPSDE

ALL_SDES = [
    VESDE(sigma_max=200.0),  # the prior leaves out the data's variance: 1e-5 nats per dimension here, 1e-4 at 50
    VPSDE(),
    SubVPSDE(),
    DiscreteVPSDE(t_min=1e-3),
    CosineSDE(),
    EDMSDE(),
    RectifiedFlowSDE(),
]
EXACT = TraceOptions("exact")
TIGHT = ODEOptions(rtol=1e-6, atol=1e-6)
GOLDEN = np.load(Path(__file__).parents[1] / "data" / "score_sde_golden.npz")


def test_every_sde_is_covered():
    assert {type(sde) for sde in ALL_SDES} == set(SDES.values())


@pytest.mark.parametrize("model", [gaussian(), mixture()], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("sde", ALL_SDES, ids=name)
def test_exact_trace_gives_the_exact_log_density(sde, model):
    """To 1e-4 nats per dimension, for typical data and for data far out."""
    x = model.sample(6, torch.Generator().manual_seed(0))
    x[-1] += 1.0
    result = log_prob(model.denoiser(sde), sde, x, EXACT, ODEOptions(rtol=3e-7, atol=3e-7))
    exact = model.log_prob(sde, x, sde.t_min)
    # N(0, prior_std^2) stands for p at t_max; its own error is known, and not the solver's.
    latents = result.latents * sde.prior_std
    mismatch = sde.prior_log_prob(latents) - model.log_prob(sde, latents, sde.t_max)
    assert ((result.value - mismatch - exact).abs() / x.shape[1]).max() < 1e-4
    assert mismatch[:-1].abs().max() / x.shape[1] < 4e-3
    assert (result.standard_error == 0).all()
    assert torch.allclose(result.per_dimension, result.value / x.shape[1])


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), RectifiedFlowSDE()], ids=name)
def test_density_error_falls_with_the_tolerance(sde):
    model = mixture()
    x = model.sample(4, torch.Generator().manual_seed(3))
    exact = log_prob(model.denoiser(sde), sde, x, EXACT, ODEOptions(1e-9, 1e-9)).value
    errors = []
    for tolerance in (1e-4, 1e-6):
        result = log_prob(model.denoiser(sde), sde, x, EXACT, ODEOptions(tolerance, tolerance))
        errors.append(float((result.value - exact).abs().max()) / 3)
    assert errors[0] < 1e-2 and errors[1] < 1e-4


@pytest.mark.parametrize("key", ["ve", "vp", "subvp"])
def test_official_likelihood(key):
    """`lik/*`: recorded from the paper's code (RK45, rtol = atol = 1e-5, float32); and the closed form beside it."""
    sde = {"ve": VESDE(), "vp": VPSDE(), "subvp": SubVPSDE()}[key]
    mu, s0 = torch.from_numpy(GOLDEN["lik/mu"]).double(), float(GOLDEN["lik/s0"])
    model = GaussianMixture.gaussian(mu.flatten(), torch.full((mu.numel(),), s0**2, dtype=torch.float64))
    x = torch.from_numpy(GOLDEN["lik/data"]).double()
    # The recorded density is that of x_t itself, with 7 for the bins of [-1, 1].
    result = log_prob(model.denoiser(sde), sde, x, options=TIGHT, generator=torch.Generator().manual_seed(0))
    bits = -result.per_dimension / math.log(2) + Quantization(-1.0, 1.0, grid="bins").offset
    exact, official = torch.from_numpy(GOLDEN[f"{key}/lik/exact_bpd"]), torch.from_numpy(GOLDEN[f"{key}/lik/bpd"])
    # Under the exact density of p at t_max instead of the prior, the closed form; with the prior, the official number,
    # whose solver stops at rtol = atol = 1e-5 in float32.
    end = result.latents * sde.prior_std
    mismatch = sde.prior_log_prob(end) - model.log_prob(sde, end, sde.t_max)
    without = bits + mismatch / (x[0].numel() * math.log(2))
    assert (without - exact).abs().max() < 2e-5
    assert (bits - official).abs().max() < (2e-3 if key == "ve" else 1e-4)
    if key == "ve":
        codes = torch.from_numpy(GOLDEN["ve/lik/z"]).double() / sde.prior_std
    else:
        codes = torch.from_numpy(GOLDEN[f"{key}/lik/z"]).double()
    assert (result.latents - codes).abs().max() < 5e-3
    loose = log_prob(model.denoiser(sde), sde, x)
    assert int(loose.calls.max()) < int(GOLDEN[f"{key}/lik/nfe"])


@pytest.mark.parametrize(
    "trace",
    [
        TraceOptions(),
        TraceOptions(probe="gaussian"),
        TraceOptions("hutchinson"),
        TraceOptions("hutchinson", 2, "gaussian"),
        TraceOptions("resampled", 3, differentiation="forward"),
    ],
    ids=lambda t: f"{t.method}-{t.num_probes}-{t.probe}-{t.differentiation}",
)
def test_estimators_are_unbiased_and_know_their_noise(trace):
    """The mean of n solves differs from the exact trace by less than 4.9 standard errors (false-alarm rate 1e-6)."""
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(5, 5, dtype=torch.float64, generator=generator) * 0.4
    means = torch.randn(2, 5, dtype=torch.float64, generator=generator) * 0.5
    model = GaussianMixture([0.5, 0.5], means, (root @ root.T + 0.02 * torch.eye(5)).expand(2, 5, 5))
    sde, n = VPSDE(), 400
    x = model.sample(1, generator)
    exact = log_prob(model.denoiser(sde), sde, x, EXACT).value
    options = ODEOptions(batch_size=n)
    result = log_prob(model.denoiser(sde), sde, x.repeat(n, 1), trace, options, generator=generators(n))
    scatter = result.value.std()
    assert scatter > 0.01
    # Step sizes are those of the state; what the trace's bound on them adds is solver error, 1e-3 nats per dimension.
    assert (result.value.mean() - exact).abs() < 4.9 * scatter / math.sqrt(n) + 5e-3
    if trace.method == "hutchinson" and trace.num_probes == 1:
        assert result.standard_error.isnan().all()
    else:
        reported = result.standard_error.square().mean().sqrt()
        assert 0.8 < reported / scatter < 1.5


def test_resampled_probes_scatter_less_than_fixed_ones_at_the_same_cost():
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(16, 16, dtype=torch.float64, generator=generator) * 0.15
    model = GaussianMixture.gaussian(torch.zeros(16), root @ root.T + 0.01 * torch.eye(16))
    sde, n = VPSDE(), 200
    x = model.sample(1, generator).repeat(n, 1)

    def solve(method):
        return log_prob(
            model.denoiser(sde), sde, x, TraceOptions(method), ODEOptions(batch_size=n), generator=generators(n)
        )

    fixed, resampled = solve("hutchinson"), solve("resampled")
    # A ratio of 2.5 or more is measured; the ratio of two scatters of 200 is known to 7 %.
    assert resampled.value.std() < 0.5 * fixed.value.std()
    assert resampled.calls.double().mean() < 1.05 * fixed.calls.double().mean()


def test_a_value_does_not_depend_on_batch_mates():
    """One generator for the whole batch: probes follow from the sample's content, wherever it stands."""
    sde, model = RectifiedFlowSDE(), mixture()
    x = model.sample(5, torch.Generator().manual_seed(2))

    def value(x, batch_size=64):
        options, source = ODEOptions(batch_size=batch_size), torch.Generator().manual_seed(11)
        return log_prob(model.denoiser(sde), sde, x, options=options, generator=source).value

    together = value(x)
    for i in range(5):
        assert torch.allclose(value(x[i : i + 1]), together[i : i + 1], rtol=1e-11)
    assert torch.allclose(value(x.flip(0), 2).flip(0), together, rtol=1e-11)
    other = log_prob(model.denoiser(sde), sde, x, generator=torch.Generator().manual_seed(12)).value
    assert not torch.allclose(other, together, rtol=1e-6)


def test_works_under_inference_mode_and_leaves_the_caller_alone():
    sde, model = VPSDE(), mixture()
    x = model.sample(2, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        inside = log_prob(model.denoiser(sde), sde, x.clone(), generator=torch.Generator().manual_seed(0))
    outside = log_prob(model.denoiser(sde), sde, x, generator=torch.Generator().manual_seed(0))
    assert torch.equal(inside.value, outside.value)
    assert not x.requires_grad and not outside.value.requires_grad
