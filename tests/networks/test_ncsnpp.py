"""NCSN++ as a model of diffusers; what it computes is held to the official code in tests/hub/test_score_sde.py."""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch.nn.functional import avg_pool2d

from diffusers_sde import InpaintSDEPipeline, NCSNpp, SDEPipeline, VESDEScheduler, VPSDEScheduler
from diffusers_sde.networks.ncsnpp import PRESETS
from diffusers_sde.networks.ncsnpp_blocks import NEXT_TO_ZERO
from diffusers_sde.networks.resampling import Doubled, DoubledConv, Halved, HalvedConv

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "attention_resolutions": (4,),
    "dropout": 0.0,
}
VP = {"time_embedding_type": "positional", "scale_by_sigma": False, "center_input_sample": False}


def tiny_network(seed=0, **options):
    """A network all of whose parameters matter: those that begin at zero are drawn too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NCSNpp(**{**TINY, **options})
        with torch.no_grad():
            for p in network.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return network.eval()


def images(seed=1, count=2):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- resampling


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3, 3, 1), (1, 2, 3, 4), (1, 2, 4), (1, 4, 6, 9, 4, 1)])
def test_filters_are_the_convolution_with_zeros_between_or_every_second_pixel(kernel):
    """Against sums over pixels that are written out, at one position far from the border and at each border."""
    x = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    taps = torch.tensor(kernel, dtype=torch.float64) / sum(kernel)
    n = len(kernel)

    def along(line, positions, offset, gain):
        """gain * sum_k taps[k] line[i + offset - k], 0 outside, for each i."""
        value = lambda j: line[j] if 0 <= j < len(line) else torch.zeros(())  # noqa: E731
        return torch.stack([gain * sum(taps[k] * value(i + offset - k) for k in range(n)) for i in positions])

    def both_axes(picture, positions, offset, gain):
        rows = torch.stack([along(row, positions, offset, gain) for row in picture])
        return torch.stack([along(column, positions, offset, gain) for column in rows.T], 1)

    halved = torch.stack([both_axes(c, range(0, 6, 2), n - 1 - (n - 1) // 2, 1.0) for c in x[0]])
    torch.testing.assert_close(Halved(kernel)(x)[0], halved, rtol=1e-6, atol=1e-6)
    spread = torch.zeros(1, 2, 12, 12, dtype=torch.float64)
    spread[..., ::2, ::2] = x
    doubled = torch.stack([both_axes(c, range(12), n - 1 - ((n - 1) // 2 + 1), 2.0) for c in spread[0]])
    torch.testing.assert_close(Doubled(kernel)(x)[0], doubled, rtol=1e-6, atol=1e-6)


def test_resampling_keeps_a_constant_and_inverts_where_nothing_is_lost():
    constant = torch.full((1, 2, 8, 8), 3.0)
    for kernel in ((1, 3, 3, 1), None):
        assert Halved(kernel)(constant)[..., 1:-1, 1:-1].eq(3.0).all()
        assert Doubled(kernel)(constant)[..., 1:-1, 1:-1].eq(3.0).all()
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Halved(None)(Doubled(None)(x)), x)
    torch.testing.assert_close(Halved((1, 1))(x), avg_pool2d(x, 2))
    torch.testing.assert_close(Doubled((1, 1))(x), Doubled(None)(x))


def test_a_learned_convolution_that_passes_its_input_is_the_filter_alone():
    """With the identity as its weight, which skips the border that the padding adds."""
    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    for kernel in ((1, 3, 3, 1), (1, 2, 3, 4), (1, 2, 4), None):
        for module in (HalvedConv(2, 2, kernel), DoubledConv(2, 2, kernel)):
            with torch.no_grad():
                module.conv.weight.zero_()
                module.conv.weight[[0, 1], [0, 1], 1, 1] = 1.0
                y = module(x)
            if isinstance(module, DoubledConv):
                assert torch.equal(y, Doubled(kernel)(x))
            elif kernel is None:
                assert torch.equal(y, x[..., 1::2, 1::2])
            elif len(kernel) == 4:  # the filter of stride 2 pads one pixel less on each side
                torch.testing.assert_close(y, Halved(kernel)(x))


@pytest.mark.parametrize("kernel", [(1,), (1, -1), "1331", (1, float("inf"))])
def test_filters_that_are_none_are_refused(kernel):
    with pytest.raises(ValueError, match="fir_kernel must be"):
        NCSNpp(**{**TINY, "fir_kernel": kernel})


# ---------------------------------------------------------------------- the network


def test_an_untrained_network_predicts_next_to_nothing():
    """The last convolution begins at 1e-5 of the usual size, which the division by sigma does not hide."""
    torch.manual_seed(0)
    output = NCSNpp(**TINY).eval()(images(), torch.ones(2)).sample
    assert 0.0 < output.abs().max() < 100.0 * NEXT_TO_ZERO**0.5


def test_timesteps_may_be_numbers_or_tensors():
    network, x = tiny_network(), images()
    expected = network(x, torch.tensor([0.7, 0.7])).sample
    for timestep in (0.7, torch.tensor(0.7), torch.tensor([0.7]), torch.tensor(0.7, dtype=torch.float64)):
        assert torch.equal(network(x, timestep).sample, expected)
    (output,) = network(x, 0.7, return_dict=False)
    assert torch.equal(output, expected)
    each = [network(x[i : i + 1], [0.3, 0.7][i]).sample for i in range(2)]
    torch.testing.assert_close(network(x, torch.tensor([0.3, 0.7])).sample, torch.cat(each), rtol=1e-5, atol=1e-6)


def test_levels_are_told_by_their_index_and_the_output_divided_by_sigma():
    levels = {"time_embedding_type": "positional", "sigma_levels": (0.01, 50.0, 1000)}
    by_sigma = tiny_network(**levels)
    by_index = tiny_network(time_embedding_type="positional", scale_by_sigma=False)
    by_index.load_state_dict(by_sigma.state_dict())
    x = images()
    for index in (0, 1, 500, 999):  # 0 is the largest level, as in NCSN
        sigma = 50.0 * (0.01 / 50.0) ** (index / 999)
        torch.testing.assert_close(
            by_sigma(x, sigma).sample * sigma, by_index(x, float(index)).sample, rtol=1e-4, atol=1e-5
        )


def test_images_in_0_1_are_centred_by_the_network():
    for option in ({}, {"progressive_input": "input_skip", "progressive_output": "output_skip"}):
        network, other = tiny_network(**option), tiny_network(center_input_sample=False, **option)
        x = images()
        assert torch.equal(network(x, 0.5).sample, other(2.0 * x - 1.0, 0.5).sample)


def test_a_network_that_is_not_told_the_noise_does_not_depend_on_it():
    network = tiny_network(conditional=False, scale_by_sigma=False)
    assert torch.equal(network(images(), 0.1).sample, network(images(), 10.0).sample)
    told = tiny_network(scale_by_sigma=False)
    assert not torch.equal(told(images(), 0.1).sample, told(images(), 10.0).sample)


def test_classes_are_told_apart_and_asked_for():
    network, x = tiny_network(num_class_embeds=3), images()
    labels = torch.tensor([0, 2])
    both = network(x, 0.5, labels).sample
    assert not torch.equal(both[0], network(x, 0.5, torch.tensor([1, 2])).sample[0])
    with pytest.raises(ValueError, match="class_labels must be given"):
        network(x, 0.5)
    with pytest.raises(ValueError, match="num_class_embeds is None"):
        tiny_network()(x, 0.5, labels)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive_input": "input_skip", "progressive_output": "output_skip"},
        {"progressive_output": "residual", "resblock_type": "ddpm"},
        {**VP, "num_class_embeds": 2},
    ],
)
def test_gradients_reach_every_parameter_with_and_without_checkpointing(options):
    network, x = tiny_network(**options).train(), images()
    labels = torch.tensor([0, 1]) if "num_class_embeds" in options else None
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            network.enable_gradient_checkpointing()
        network.zero_grad()
        network(x, torch.tensor([0.3, 2.0]), labels).sample.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in network.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        # softmax does not depend on what all keys share, and a sum over few pixels rounds.
        assert "key.bias" in name or float(gradient.abs().max()) > 0.0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_the_frequencies_keep_their_precision(tmp_path):
    network = tiny_network()
    frequencies = network.fourier.frequencies.clone()
    low = tiny_network().to(torch.bfloat16)
    assert low.conv_in.weight.dtype == torch.bfloat16 and torch.equal(low.fourier.frequencies, frequencies)
    network.save_pretrained(tmp_path)
    loaded = NCSNpp.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.dtype == low.dtype == torch.bfloat16 and torch.equal(loaded.fourier.frequencies, frequencies)
    x = images()
    with torch.no_grad():
        rough, exact = loaded(x.bfloat16(), torch.tensor(3.3)).sample.float(), network(x, 3.3).sample
    assert float((rough - exact).norm() / exact.norm()) < 0.03


def test_averages_of_a_network_have_its_frequencies():
    """They are fixed, and a second network, which is filled with the averages, drew others."""
    network, other = tiny_network(0), tiny_network(1)
    EMAModel(network.parameters()).copy_to(other.parameters())
    assert torch.equal(other(images(), 0.5).sample, network(images(), 0.5).sample)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_state_what_they_depend_on(name):
    defaults = {"fourier_scale", "conditional", "progressive_combine", "in_channels", "num_class_embeds"}
    assert set(PRESETS[name]) | defaults == set(inspect.signature(NCSNpp).parameters)


@pytest.mark.parametrize(
    "name, millions",
    # The paper's networks have 62 million parameters, and the deep ones twice the blocks; diffusers' copies of the
    # networks for 256 pixels have 65.6.
    [("ve/cifar10_ncsnpp_continuous", (61.0, 64.0)), ("ve/church_ncsnpp_continuous", (65.0, 66.0))],
)
def test_presets_have_the_size_of_the_published_networks(name, millions):
    with torch.device("meta"):
        network = NCSNpp.from_preset(name)
    assert millions[0] < sum(p.numel() for p in network.parameters()) / 1e6 < millions[1]


def test_a_preset_takes_other_options():
    network = NCSNpp.from_preset("vp/cifar10_ddpmpp_continuous", **TINY)
    assert network.config.block_out_channels == (8, 8) and network.config.fir_kernel is None
    with pytest.raises(ValueError, match="preset must be one of ve/cifar10_ncsnpp_continuous"):
        NCSNpp.from_preset("cifar10")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sample_size": 9}, "sample_size must be a multiple of 2"),
        ({"block_out_channels": ()}, "block_out_channels"),
        ({"block_out_channels": (8, 2)}, "block_out_channels must be an integer in"),
        ({"block_out_channels": (8, 9)}, "block_out_channels must be multiples of the groups"),
        ({"norm_num_groups": 3}, "block_out_channels must be multiples of the groups"),
        ({"layers_per_block": 0}, "layers_per_block must be an integer"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"resblock_type": "resnet"}, "resblock_type must be one of biggan, ddpm"),
        ({"progressive_input": None}, "progressive_input must be one of"),
        ({"scale_by_sigma": "yes"}, "scale_by_sigma must be True or False"),
        ({"time_embedding_type": "positional"}, "scale_by_sigma must be False"),
        ({"sigma_levels": (0.01, 50.0, 10)}, "sigma_levels must be None"),
        ({**VP, "sigma_levels": (0.01, 50.0)}, r"sigma_levels must be \(sigma_min"),
        ({**VP, "sigma_levels": (50.0, 0.01, 10)}, "sigma_min of sigma_levels must be less"),
        ({"num_class_embeds": 0}, "num_class_embeds must be an integer"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        NCSNpp(**{**TINY, **options})


# ---------------------------------------------------------------------- in a pipeline


def pipeline(kind):
    if kind == "ve":
        return SDEPipeline(tiny_network(), VESDEScheduler(sigma_max=5.0), data_min=0.0)
    return SDEPipeline(tiny_network(**VP), VPSDEScheduler(continuous=True, time_conditioning="score_sde"))


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(2, num_inference_steps=4, generator=torch.manual_seed(0), output_type="latent").images


@pytest.mark.parametrize("kind", ["ve", "vp"])
def test_a_saved_pipeline_is_the_same(tmp_path, kind, caplog):
    pipe = pipeline(kind)
    pipe.save_pretrained(tmp_path)
    loaded = SDEPipeline.from_pretrained(tmp_path)
    assert type(loaded.unet) is NCSNpp and torch.equal(drawn(loaded), drawn(pipe))
    other = InpaintSDEPipeline.from_pipe(loaded)
    assert other.unet is loaded.unet
    assert "xpected" not in caplog.text and "does not match" not in caplog.text


def test_a_saved_pipeline_loads_without_the_package(tmp_path):
    """By the code that it carries; a filter, the frequencies and the noise levels with it."""
    program = """
import json, sys
sys.modules["diffusers_sde"] = None
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("saved", trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
images = pipe(2, num_inference_steps=4, generator=torch.manual_seed(0), output_type="latent").images
print(json.dumps([type(pipe.unet).__name__, images.tolist()]))
"""
    pipe = pipeline("ve")
    pipe.save_pretrained(tmp_path / "saved")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Expected types" not in result.stderr
    name, found = json.loads(result.stdout.splitlines()[-1])
    assert name == "NCSNpp"
    assert torch.equal(torch.tensor(found), drawn(pipe))


def test_sides_that_the_network_cannot_halve_are_refused_before_anything_is_drawn():
    with pytest.raises(ValueError, match="latents must have sides that are multiples of 2"):
        pipeline("ve")(latents=torch.zeros(1, 1, 7, 8))
