"""Noise that is reproducible, sample by sample."""

import torch

from diffusers_sde.basics.noise import sample_generators


def test_sample_generators_depend_on_content_seed_and_purpose_only():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

    def draws(x, seed, purpose="probes"):
        sources = sample_generators(x, torch.Generator().manual_seed(seed), purpose)
        return torch.stack([torch.rand(5, generator=source) for source in sources])

    assert torch.equal(draws(x, 1).flip(0), draws(x.flip(0), 1))
    assert not torch.equal(draws(x, 1), draws(x, 2))
    assert not torch.equal(draws(x, 1), draws(x, 1, "dequantisation"))
    assert len({tuple(row.tolist()) for row in draws(x, 1)}) == 3
