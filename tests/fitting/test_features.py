"""Features of a network's middle: what is read, at which time, and of which networks."""

import pytest
import torch
from diffusers import DDPMScheduler
from exact_networks import quiet, seeded, unet
from tiny_parts import conditional_unet, tiny_text
from torch import nn

from diffusers_sde import (
    ClassConditionalSDEPipeline,
    SDEPipeline,
    TextSDEPipeline,
    VESDEScheduler,
    VPSDEScheduler,
    fit_scheduler,
)
from diffusers_sde.fitting import MiddleFeatures, middle_of
from diffusers_sde.fitting.families import PARTS
from diffusers_sde.pipelines.fit_subjects import FEATURE_NOISE, DenoisedSubject


class Network(nn.Module):
    """A network with a linear middle, which keeps what it was told."""

    def __init__(self, tokens=False, both=False):
        super().__init__()
        self.mid_block, self.tokens, self.both, self.told = nn.Identity(), tokens, both, []

    def forward(self, x, t):
        self.told.append((x.detach().clone(), t))
        activations = torch.cat([x, x.square()], 1)
        activations = activations.flatten(2).transpose(1, 2) if self.tokens else activations
        return self.mid_block((activations,) if self.both else activations)


@pytest.mark.parametrize("tokens", [False, True])
def test_features_are_the_mean_of_the_middle_over_all_places(tokens):
    network, sde = Network(tokens), VPSDEScheduler().sde
    t = torch.tensor(0.2, dtype=torch.float64)
    features = MiddleFeatures(network.mid_block, network, sde, t)
    x = torch.randn(5, 2, 3, 4, generator=seeded(), requires_grad=True)
    scaled = x * float(sde.alpha(t))
    found = features(x)
    torch.testing.assert_close(found, torch.cat([scaled, scaled.square()], 1).mean((2, 3)))
    ((given, told),) = network.told
    assert torch.equal(given, scaled) and told == t
    assert torch.autograd.grad(found.sum(), x)[0].abs().max() > 0.0
    assert not network.mid_block._forward_hooks


def test_a_middle_of_another_kind_is_refused():
    network = Network(both=True)
    features = MiddleFeatures(network.mid_block, network, VPSDEScheduler().sde, torch.tensor(0.2))
    with pytest.raises(ValueError, match="middle must return"):
        features(torch.zeros(2, 1, 4, 4))
    assert not network.mid_block._forward_hooks
    with pytest.raises(ValueError, match="middle must return"):
        MiddleFeatures(nn.Identity(), network, VPSDEScheduler().sde, torch.tensor(0.2))(torch.zeros(2, 1, 4, 4))


def test_where_the_middle_is():
    network = unet()
    assert middle_of(network) is network.mid_block
    row = nn.Module()
    row.transformer_blocks = nn.ModuleList(nn.Identity() for _ in range(5))
    assert middle_of(row) is row.transformer_blocks[2]
    assert middle_of(nn.Linear(2, 2)) is None


def subject_of(pipe, call=None, levels=5):
    return DenoisedSubject(pipe, pipe.scheduler, levels, 1.0, None, call, PARTS, False, 4)


@pytest.mark.parametrize(
    "scheduler",
    [VPSDEScheduler(), VESDEScheduler(data_std=0.3), VPSDEScheduler.from_config(DDPMScheduler().config)],
)
def test_the_time_is_that_of_a_little_noise(scheduler):
    """A network of a table is told one of its own times."""
    subject = subject_of(quiet(SDEPipeline(unet(), scheduler)))
    t, std = subject._feature_time(), scheduler.config.data_std or 0.5
    ratio = float(scheduler.sde.sigma(t) / scheduler.sde.alpha(t))
    assert ratio == pytest.approx(FEATURE_NOISE * std, rel=0.02)
    fed = scheduler.conditioning.timestep(scheduler.sde, t)
    assert subject.family.snap is None or float((fed - fed.round()).abs()) < 1e-6


def told_labels(subject, images):
    """What the network is told of classes where features are read."""
    told = []
    hook = subject.network.register_forward_pre_hook(
        lambda module, arguments, named: told.append(named.get("class_labels")), with_kwargs=True
    )
    found = subject.features(images)
    hook.remove()
    return found, told


def test_networks_of_classes_are_told_the_null_class_or_not_asked():
    images = torch.rand(60, 1, 8, 8, generator=seeded()) * 2.0 - 1.0
    pipe = quiet(ClassConditionalSDEPipeline(unet(num_class_embeds=3), VPSDEScheduler(), null_class=2))
    found, told = told_labels(subject_of(pipe), images)
    assert found(images[:3]).shape == (3, 8) and told[0].tolist() == [2]
    pipe = quiet(ClassConditionalSDEPipeline(unet(num_class_embeds=3), VPSDEScheduler()))
    found, told = told_labels(subject_of(pipe), images)
    assert found is None and not told
    options = {"steps": 2, "batch_size": 8, "held_out": 16, "progress_bar": False}
    report = fit_scheduler(pipe, 3, images, **options).report
    assert "gain_of_features" not in report and "gain_of_patches" in report


def test_networks_of_captions_are_told_the_null_caption(tmp_path):
    text = tiny_text(tmp_path)
    network = conditional_unet(in_channels=1, out_channels=1, cross_attention_dim=16)
    options = {"null_caption": "", "max_caption_length": 8}
    pipe = quiet(TextSDEPipeline(network, VPSDEScheduler(), text.encoder, text.tokenizer, **options))
    images = torch.randn(4, 1, 8, 8, generator=seeded())
    told = []
    network.register_forward_pre_hook(
        lambda module, arguments, named: told.append(named["encoder_hidden_states"]), with_kwargs=True
    )
    features = subject_of(pipe, {"prompt": ["a", "b"]}).features(images)
    assert features(images).shape == (4, 16)
    null = pipe.unconditional(4)["encoder_hidden_states"]
    assert torch.equal(told[-1], null)
