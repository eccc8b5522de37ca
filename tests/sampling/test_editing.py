"""Variations of data."""

import math

import pytest
import torch
from flow_models import mixture

from diffusers_sde.sampling.editing import edit
from diffusers_sde.sdes import VPSDE


def test_edit_moves_more_with_more_strength_and_keeps_the_distribution():
    sde, model = VPSDE(), mixture()
    x = model.sample(1500, torch.Generator().manual_seed(0))

    def edited(strength):
        generator = torch.Generator().manual_seed(1)
        return edit(model.denoiser(sde), sde, x, strength, 60, t_min=1e-3, generator=generator)

    small, large = edited(0.3), edited(0.9)
    assert (small - x).square().mean() < 0.5 * (large - x).square().mean()
    # The data are a fixed point of "add noise, then reverse": z-scores below 4.9, and 3 % for the discretisation.
    slack = 4.9 * x.std(0) / math.sqrt(len(x)) + 0.03 * x.std(0)
    assert ((large.mean(0) - x.mean(0)).abs() < slack).all()
    assert ((large.std(0) / x.std(0) - 1).abs() < 0.08).all()


def test_a_bad_strength_is_refused():
    sde, model, x = VPSDE(), mixture(), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="strength"):
        edit(model.denoiser(sde), sde, x, 1.5)
