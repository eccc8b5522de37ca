"""Images between bytes, arrays, tensors and the network's range."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_sde.images.arrays import as_batch, as_hole, from_network, in_network_range, to_network

BYTES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 1.0), (-2.0, 3.0)])
def test_bytes_lie_evenly_in_the_range_and_come_back(low, high):
    x = to_network(BYTES, low, high)
    torch.testing.assert_close(x.double(), torch.linspace(low, high, 256, dtype=torch.float64), rtol=0, atol=1e-6)
    assert x.dtype == torch.float32 and torch.equal(from_network(x, low, high).mul(255).round().byte(), BYTES)
    outside = torch.tensor([low - 1.0, high + 1.0])
    assert from_network(outside, low, high).tolist() == [0.0, 1.0]


def test_only_integers_are_scaled():
    x = torch.tensor([0.25, -7.0], dtype=torch.float64)
    assert in_network_range(x, 0.0, 1.0) is x
    whole = in_network_range(torch.tensor([0, 51, 255]), -1.0, 1.0)
    torch.testing.assert_close(whole, torch.tensor([-1.0, -0.6, 1.0]))
    for wrong in (torch.tensor([256]), torch.tensor([-1]), torch.tensor([True]), torch.tensor([1j])):
        with pytest.raises(ValueError, match="image must|image: integers must lie in 0..255"):
            in_network_range(wrong, -1.0, 1.0, "image")


def test_axes_of_a_batch():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert torch.equal(as_batch(pixels), expected) and as_batch(expected) is expected
    assert torch.equal(as_batch([Image.fromarray(p) for p in pixels]), expected)
    assert torch.equal(as_batch(pixels[..., 0]), expected[:, :1])
    with pytest.raises(ValueError, match="one size and mode"):
        as_batch([Image.new("L", (4, 4)), Image.new("L", (4, 5))])


def test_holes_are_white():
    mask = np.array([[0, 127, 128, 255]], dtype=np.uint8)
    white = torch.tensor([[[[False, False, True, True]]]])
    for given in (mask, mask / 255.0, Image.fromarray(mask), torch.from_numpy(mask), mask >= 128, mask[..., None]):
        assert torch.equal(as_hole(given), white)
    for wrong, message in ((mask // 64, "were these labels"), (mask / 100.0, "numbers in"), ("x", "PIL images")):
        with pytest.raises(ValueError, match=message):
            as_hole(wrong, "mask_image")
