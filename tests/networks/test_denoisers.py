"""How networks of different kinds are called: by what their classes say, and as they are when they are wrapped."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_networks import tiny_unet
from tiny_parts import conditional_unet, pixart
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from diffusers_sde.networks.denoisers import call_network, with_timestep


@pytest.fixture
def one_process():
    """A group of processes that has this one alone, for wrappers that need a group."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def data():
    generator = torch.Generator().manual_seed(0)
    x, states = torch.randn(2, 1, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    return x, torch.tensor([3.5, 700.0]), {"encoder_hidden_states": states}


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [pixart, lambda: conditional_unet(cross_attention_dim=16, in_channels=1, out_channels=1)]
)
def test_networks_that_are_told_captions_are_called_by_the_names_of_their_arguments(make, one_process):
    """UNet2DConditionModel has its timestep in the second place, PixArtTransformer2DModel its captions."""
    network, (x, timestep, told) = make(), data()
    first = "sample" if isinstance(network, UNet2DConditionModel) else "hidden_states"
    expected = network(**{first: x}, timestep=timestep, **told).sample
    other = network(**{first: x}, timestep=timestep + 100.0, **told).sample
    assert (expected - other).abs().max() > 1e-4  # the timestep reaches the output
    for called in (network, DistributedDataParallel(network), torch.compile(network, backend="eager")):
        assert torch.equal(with_timestep(called, x, timestep, **told).sample, expected)
        assert torch.equal(call_network(called, x, timestep, **told), expected)


@torch.no_grad()
def test_other_networks_are_called_by_place():
    x, timestep, _ = data()
    network = tiny_unet(1.0)
    assert torch.equal(call_network(network, x, timestep), network(x, timestep).sample)
    assert torch.equal(
        call_network(lambda a, b: a * b[:, None, None, None], x, timestep), x * timestep[:, None, None, None]
    )


@torch.no_grad()
def test_a_transformer_without_captions_and_its_variance():
    x, timestep, _ = data()
    network = pixart(cross_attention_dim=None, caption_channels=None, out_channels=2)
    expected = network(x, timestep=timestep).sample
    assert expected.shape == (2, 2, 8, 8) and torch.equal(call_network(network, x, timestep), expected[:, :1])
