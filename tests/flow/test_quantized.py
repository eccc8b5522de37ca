"""Bits per dimension against closed forms."""

import math

import pytest
import torch
from analytic import GaussianMixture
from flow_models import generators

from diffusers_sde.flow.quantized import Quantization, bits_per_dim, truncated_normal
from diffusers_sde.flow.solver import ODEOptions
from diffusers_sde.flow.trace import TraceOptions
from diffusers_sde.sdes import VESDE, VPSDE

EXACT = TraceOptions("exact")
TIGHT = ODEOptions(rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize("arguments", [{"low": 1.0}, {"bit_depth": 0}, {"bit_depth": 17}, {"grid": "centres"}])
def test_bad_quantization_is_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Quantization(**arguments)
