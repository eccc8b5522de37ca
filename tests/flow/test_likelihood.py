"""Log-densities and bits per dimension against closed forms."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic import GaussianMixture

from diffusers_sde.basics.noise import sample_generators
from diffusers_sde.flow.likelihood import log_prob
from diffusers_sde.flow.quantized import Quantization, bits_per_dim, truncated_normal
from diffusers_sde.flow.solver import ODEOptions
from diffusers_sde.flow.trace import TraceOptions, jacobian_products
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


def name(sde):
    return type(sde).__name__


def gaussian():
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(4, 4, dtype=torch.float64, generator=generator) * 0.3
    return GaussianMixture.gaussian([-0.5, -0.1, 0.3, 0.7], root @ root.T + 0.01 * torch.eye(4))


def mixture():
    return GaussianMixture(
        [0.5, 0.3, 0.2],
        [[-0.8, 0.2, 0.0], [0.7, 0.5, -0.3], [0.0, -0.9, 0.4]],
        [[0.04, 0.02, 0.09], [0.03, 0.05, 0.02], [0.01, 0.04, 0.02]],
    )


def generators(n, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(n)]


# ---------------------------------------------------------------------- densities


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


def test_jacobian_products_in_both_directions():
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    probes = [torch.randn(3, 6, dtype=torch.float64, generator=g) for g in generators(2)]
    for direction in ("reverse", "forward"):
        x0, products = jacobian_products(lambda x: torch.sin(x @ matrix), x, probes, direction)
        assert torch.allclose(x0, torch.sin(x @ matrix)) and not x0.requires_grad
        jacobian = torch.cos(x @ matrix)[:, :, None] * matrix.T
        for probe, product in zip(probes, products, strict=True):
            assert torch.allclose(product, torch.einsum("bi,bij,bj->b", probe, jacobian, probe))
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jacobian_products(lambda x: x.detach(), x, probes)


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


# ---------------------------------------------------------------------- quantised data


def test_offset_follows_from_range_and_bit_depth():
    assert Quantization(-1.0, 1.0, grid="bins").offset == 7.0  # the paper's
    assert Quantization(0.0, 1.0, grid="bins").offset == 8.0
    assert Quantization(-1.0, 1.0).offset == pytest.approx(6.9944, abs=1e-4)  # x / 127.5 - 1
    assert Quantization(0.0, 1.0, bit_depth=5, grid="bins").offset == 5.0
    assert torch.equal(Quantization(-1.0, 1.0).centers(torch.tensor([0, 255])), torch.tensor([-1.0, 1.0]))
    bins = Quantization(0.0, 1.0, grid="bins")
    assert torch.allclose(bins.centers(torch.tensor([0, 255])), torch.tensor([0.5, 255.5]) / 256)


def test_truncated_normal_is_normalised_and_matches_its_density():
    u, log_q = truncated_normal((200_000,), 0.7, 1.0, torch.Generator().manual_seed(0))
    assert u.abs().max() <= 1.0
    grid = torch.linspace(-1.0, 1.0, 20_001, dtype=torch.float64)
    density = torch.exp(-0.5 * (grid / 0.7) ** 2)
    density = density / torch.trapezoid(density, grid)
    # E[1/q] is the length of the interval, and E[u^2] that of the density: z-scores below 4.9 (1e-6 each).
    inverse = torch.exp(-log_q)
    assert (inverse.mean() - 2.0).abs() < 4.9 * inverse.std() / math.sqrt(len(u))
    square = torch.trapezoid(density * grid**2, grid)
    assert (u.square().mean() - square).abs() < 4.9 * u.square().std() / math.sqrt(len(u))


def pixels(n=4, d=6):
    return torch.randint(0, 256, (n, d), generator=torch.Generator().manual_seed(0), dtype=torch.int64)


def test_bits_per_dim_of_a_smooth_density_is_the_log_of_the_bin_probability():
    """A density that is nearly constant over a bin: -log2 of its probability, per dimension."""
    sde, images = VPSDE(), pixels()
    model = GaussianMixture.gaussian(torch.zeros(6), torch.full((6,), 0.4))
    result = bits_per_dim(model.denoiser(sde), sde, images, trace=EXACT, options=TIGHT)
    x = images / 127.5 - 1.0
    edges = torch.distributions.Normal(0.0, math.sqrt(0.4)).cdf(torch.stack([x - 1 / 255, x + 1 / 255]).double())
    exact = -torch.log2(edges[1] - edges[0]).mean(1)
    assert (result.per_image - exact).abs().max() < 1.5e-3 * 4
    assert result.mean == pytest.approx(float(result.per_image.mean()))
    assert result.standard_error == pytest.approx(float(result.per_image.std()) / 2)


def test_truncated_normal_dequantisation_is_tight_for_a_model_of_undequantised_data():
    """Data on the grid itself: p_t is a Gaussian around every level, and a draw inside it gives the level's share."""
    sde, quantization = VPSDE(), Quantization(-1.0, 1.0, bit_depth=2)
    levels = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    weights = torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    model = GaussianMixture(weights, quantization.centers(levels), torch.full((16, 2), 1e-12))
    exact = -torch.log2(model.weights) / 2

    def value(dequantization):
        return bits_per_dim(
            model.denoiser(sde),
            sde,
            levels,
            quantization,
            dequantization=dequantization,
            trace=EXACT,
            options=ODEOptions(1e-6, 1e-6),
            t_min=0.02,  # sigma is a ninth of the bin
            generator=torch.Generator().manual_seed(1),
        ).per_image

    assert (value("truncated_normal") - exact).abs().max() < 5e-3
    assert (value("uniform") - exact).mean() > 0.5


def test_importance_weighting_tightens_the_bound():
    """A density that varies inside the bins: the bound falls towards -log2 of the bin probability with more draws."""
    sde, quantization = VPSDE(), Quantization(-1.0, 1.0, bit_depth=3)
    std = 0.12
    model = GaussianMixture.gaussian(torch.zeros(2), torch.full((2,), std**2))
    images = torch.tensor([[3, 4], [4, 5], [2, 3]]).repeat(20, 1)
    x = quantization.centers(images).double()
    half = 0.5 * quantization.width
    normal = torch.distributions.Normal(0.0, math.sqrt(std**2 + float(sde.sigma(1e-5)) ** 2))
    exact = -torch.log2(normal.cdf(x + half) - normal.cdf(x - half)).mean()

    def value(k):
        return bits_per_dim(
            model.denoiser(sde),
            sde,
            images,
            quantization,
            importance_samples=k,
            trace=EXACT,
            options=ODEOptions(batch_size=4096),
            generator=generators(len(images)),
        )

    one, many = value(1), value(64)
    assert one.mean > exact + 0.1  # the plain bound is loose here
    assert exact - 0.01 < many.mean < exact + 0.05
    assert many.calls.min() > 64 and many.importance_samples == 64


def test_the_same_images_in_other_ranges_have_the_same_bits_per_dim():
    """As integers, in [0, 1] and in [-1, 1]; and for VE with the network's range and its sigmas rescaled together.

    (Shifting the network's range, as from [-1, 1] to [0, 1], moves the data against VE's prior N(0, sigma_max^2):
    that is another model, by a few thousandths of a bit at sigma_max = 50.)
    """
    images = pixels(3)
    model = {
        (-1.0, 1.0): (VESDE(0.02, 100.0), GaussianMixture.gaussian(torch.full((6,), 0.2), torch.full((6,), 0.3))),
        (-0.5, 0.5): (VESDE(0.01, 50.0), GaussianMixture.gaussian(torch.full((6,), 0.1), torch.full((6,), 0.075))),
    }
    values = []
    for (low, high), (sde, data) in model.items():
        options = ODEOptions(1e-6, 1e-6, data_mean=0.5 * (low + high), data_std=0.25 * (high - low))
        for given, value_range in (
            (images, None),
            (images / 255.0, (0.0, 1.0)),
            (images / 127.5 - 1.0, (-1.0, 1.0)),
            (images.to(torch.uint8), None),
        ):
            result = bits_per_dim(
                data.denoiser(sde),
                sde,
                given,
                Quantization(low, high),
                value_range,
                options=options,
                generator=torch.Generator().manual_seed(3),
            )
            values.append(result.per_image)
    assert torch.allclose(values[0], values[1], rtol=1e-9) and torch.allclose(values[0], values[2], rtol=1e-9)
    # sigma from 0.02 to 100 for data twice as wide as with 0.01 to 50: one model.
    assert all(torch.allclose(values[0], value, atol=1e-5) for value in values)


def test_an_image_has_the_same_bits_per_dim_alone_and_in_a_batch():
    sde, model, images = VPSDE(), GaussianMixture.gaussian(torch.zeros(6), torch.full((6,), 0.4)), pixels()

    def value(images):
        return bits_per_dim(
            model.denoiser(sde), sde, images, importance_samples=2, generator=torch.Generator().manual_seed(0)
        ).per_image

    together = value(images)
    for i in range(len(images)):
        assert torch.allclose(value(images[i : i + 1]), together[i], rtol=1e-11)


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        (pixels().to(torch.uint8), {"dequantization": "none"}, "choose a dequantization"),
        (pixels() / 127.5 - 1.0, {"dequantization": "none"}, "were not dequantised"),
        ((pixels() + 0.5) / 128 - 1.0, {"dequantization": "none"}, "were not dequantised"),
        (torch.rand(2, 6) * 3, {"dequantization": "none"}, "network's range"),
        (pixels() / 255.0 * 3, {"value_range": (0.0, 1.0)}, "value_range"),
        (pixels() / 127.5 - 1.0, {"value_range": (0.0, 1.0)}, "value_range"),
        (torch.rand(2, 6), {}, "not on the grid"),
        (torch.full((2, 6), math.nan), {}, "finite"),
        (pixels() + 10, {}, r"0\.\.255"),
        (pixels(), {"dequantization": "normal"}, "dequantization must be one of"),
        (pixels(), {"importance_samples": 0}, "importance_samples"),
        (torch.rand(2, 6), {"dequantization": "none", "importance_samples": 2}, "importance_samples must be 1"),
        (pixels(), {"generator": generators(2)}, "generator is a list of 2"),
        ([1, 2], {}, "images must be a tensor"),
    ],
)
def test_bad_images_are_refused(images, arguments, message):
    sde, model = VPSDE(), GaussianMixture.gaussian(torch.zeros(6), torch.full((6,), 0.4))
    with pytest.raises(ValueError, match=message):
        bits_per_dim(model.denoiser(sde), sde, images, **arguments)


def test_dequantised_data_of_the_user_are_accepted():
    sde, model = VPSDE(), GaussianMixture.gaussian(torch.zeros(6), torch.full((6,), 0.4))
    x = (pixels() + torch.rand(4, 6, generator=torch.Generator().manual_seed(0))) / 128 - 1.0
    result = bits_per_dim(model.denoiser(sde), sde, x, Quantization(grid="bins"), dequantization="none", trace=EXACT)
    exact = -model.log_prob(sde, x.double(), 1e-5) / 6 / math.log(2) + 7
    assert (result.per_image - exact).abs().max() < 2e-3


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "slq"},
        {"num_probes": 0},
        {"probe": "normal"},
        {"differentiation": "both"},
    ],
)
def test_bad_trace_options_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        TraceOptions(**arguments)


@pytest.mark.parametrize("arguments", [{"low": 1.0}, {"bit_depth": 0}, {"bit_depth": 17}, {"grid": "centres"}])
def test_bad_quantization_is_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Quantization(**arguments)


def test_sample_generators_depend_on_content_seed_and_purpose_only():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

    def draws(x, seed, purpose="probes"):
        sources = sample_generators(x, torch.Generator().manual_seed(seed), purpose)
        return torch.stack([torch.rand(5, generator=source) for source in sources])

    assert torch.equal(draws(x, 1).flip(0), draws(x.flip(0), 1))
    assert not torch.equal(draws(x, 1), draws(x, 2))
    assert not torch.equal(draws(x, 1), draws(x, 1, "dequantisation"))
    assert len({tuple(row.tolist()) for row in draws(x, 1)}) == 3
