"""Checkpoints of score_sde_pytorch: the functions that the official networks are, and the pipelines around them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_models import fingerprint
from official_networks import CASES, SIDE, configuration, inputs, official_state

from diffusers_sde import NCSNpp, SDEPipeline, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.hub.cli import convert_main as main
from diffusers_sde.hub.convert import convert_checkpoint
from diffusers_sde.hub.score_sde import convert_ncsnpp, official_names, preset_setting, read_checkpoint
from diffusers_sde.networks import network_denoiser
from diffusers_sde.networks.ncsnpp import PRESETS

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "score_sde_networks.npz")
# What leaves no trace in the shapes and is not as in the official configurations.
UNTRACED = {
    "concatenated": {"skip_rescale": False},
    "residual_output": {"fir_kernel": None},
    "ddpm_blocks": {"skip_rescale": True, "norm_num_groups": None, "fir_kernel": None},
    "three_levels": {"fir_kernel": (1, 2, 3, 4)},
    "odd_filter": {"fir_kernel": (1, 2, 4)},
}


def sigmas(case):
    config = configuration(case)
    ends = np.log(config["sigma_max"]), np.log(config["sigma_min"])
    return torch.from_numpy(np.exp(np.linspace(*ends, config["num_scales"])))


def state_of(case):
    shapes = json.loads(str(GOLDEN[f"{case}/shapes"]))
    return {"sigmas": sigmas(case), **official_state(case, shapes)}


def sde_of(case):
    return "ve" if configuration(case)["scale_by_sigma"] else "vp"


def write(path, state, averaged=None, rate=2e-4):
    """A checkpoint as the official code saves it: parallel names, and averages without names."""
    ema = [p for key, p in (averaged or state).items() if key not in ("sigmas", "all_modules.0.W")]
    torch.save(
        {
            "optimizer": {"state": {}, "param_groups": [{"lr": rate, "params": list(range(len(ema)))}]},
            "model": {f"module.{key}": value for key, value in state.items()},
            "ema": {"decay": 0.999, "num_updates": 7, "shadow_params": ema},
            "step": 7,
        },
        path,
    )
    return path


def relative_error(found, expected):
    found, expected = (a.double().flatten(1) for a in (found, expected))
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_official_code(case):
    """Within 1e-4 of each sample: another convolution kernel moves them by 2e-6, a label that is rounded by 2e-2."""
    pipe = convert_ncsnpp(state_of(case), SIDE, sde_of(case), options=UNTRACED.get(case))
    x, labels, sigma = inputs(case)
    fed = sigma.float() if sde_of(case) == "ve" else labels.float() + 0.3
    with torch.no_grad():
        found = pipe.unet(x, fed).sample
    assert relative_error(found, torch.from_numpy(GOLDEN[f"{case}/output"])) < 1e-4


@pytest.mark.parametrize(
    "case, sde",
    [
        ("ve_ncsnpp_continuous", "ve"),
        ("ve_ncsnpp_discrete", "ve"),
        ("vp_ddpmpp", "vp"),
        ("vp_ddpmpp", "sub_vp"),
        ("ddpm", "vp"),
    ],
)
def test_scores_of_pipelines_are_those_of_the_official_code(case, sde):
    """At the times of the recorded labels: the output itself (VE), and minus it over the standard deviation (VP)."""
    x, labels, sigma = inputs(case)
    output = torch.from_numpy(GOLDEN[f"{case}/output"])
    if sde == "ve":
        t, expected = 1.0 - labels.double() / 999.0, output
    else:
        t = (labels.double() + 0.3) / 999.0
        mean = torch.exp(-0.25 * t**2 * 19.9 - 0.5 * t * 0.1)
        std = (1.0 - mean**2) if sde == "sub_vp" else (1.0 - mean**2).sqrt()
        expected = -output / std[:, None, None, None].float()
    pipe = convert_ncsnpp(state_of(case), SIDE, sde)
    scheduler = pipe.scheduler
    denoise = network_denoiser(pipe.unet, scheduler.sde, scheduler.parametrization, scheduler.conditioning)
    with torch.no_grad():
        x0 = denoise(x, t).double()
    alpha, noise = (f(t)[:, None, None, None] for f in (scheduler.sde.alpha, scheduler.sde.sigma))
    # x0_hat is formed in float32, and near the data its difference to x loses digits.
    assert relative_error((alpha * x0 - x) / noise**2, expected) < 1e-3


def test_the_options_are_read_off_the_shapes():
    found = {case: convert_ncsnpp(state_of(case), SIDE, sde_of(case)).unet.config for case in list(CASES)[:8]}
    assert found["ve_ncsnpp_256"].progressive_input == "input_skip"
    assert found["ve_ncsnpp_256"].progressive_output == "output_skip"
    assert found["concatenated"].progressive_combine == "cat"
    assert found["vp_ddpmpp"].fir_kernel is None and found["vp_ncsnpp"].fir_kernel == (1, 3, 3, 1)
    assert found["ve_ncsnpp_discrete"].sigma_levels == (0.01, 50.0, 1000)
    assert found["ddpm"].resblock_type == "ddpm" and not found["ddpm"].skip_rescale
    three = convert_ncsnpp(state_of("three_levels"), SIDE, "ve").unet.config
    assert three.block_out_channels == (8, 24, 16) and three.layers_per_block == 2
    assert three.attention_resolutions == (8, 2)
    assert convert_ncsnpp(state_of("odd_filter"), SIDE, "vp").unet.config.attention_resolutions == ()


@pytest.mark.parametrize(
    "case, sde, scheduler, options",
    [
        ("ve_ncsnpp_256", "ve", VESDEScheduler, {"sigma_max": 348.0, "num_train_timesteps": 2000}),
        ("ve_ncsnpp_discrete", "ve", VESDEScheduler, {"sigma_max": 50.0, "sampling_eps": 1e-5}),
        ("ve_ddpm_discrete", "ve", VESDEScheduler, {"prediction_type": "score", "time_conditioning": "sigma"}),
        ("vp_ncsnpp", "vp", VPSDEScheduler, {"continuous": True, "time_conditioning": "score_sde"}),
        ("vp_ddpmpp", "sub_vp", SubVPSDEScheduler, {"time_conditioning": "score_sde", "beta_end": 0.02}),
    ],
)
def test_a_file_becomes_a_pipeline_with_its_scheduler_and_range(tmp_path, case, sde, scheduler, options):
    path = write(tmp_path / "checkpoint.pth", state_of(case))
    main(["--source", str(path), "--image_size", "8", "--sde", sde, "--output_dir", str(tmp_path / "ours")])
    pipe = SDEPipeline.from_pretrained(tmp_path / "ours")
    assert type(pipe.scheduler) is scheduler and type(pipe.unet) is NCSNpp
    assert dict(pipe.scheduler.config).items() >= options.items()
    assert (pipe.config.data_min, pipe.config.data_max) == ((0.0, 1.0) if sde == "ve" else (-1.0, 1.0))
    assert fingerprint(pipe) == fingerprint(convert_checkpoint(path, 8, sde))


def test_what_is_converted_samples_corrects_and_has_a_likelihood():
    pipe = convert_ncsnpp(state_of("ve_ncsnpp_continuous"), SIDE, "ve")
    options = {"predictor": "reverse_diffusion", "corrector": "langevin", "time_grid": "uniform"}
    pipe.scheduler = VESDEScheduler.from_config(pipe.scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(1, num_inference_steps=3, generator=torch.manual_seed(0), output_type="pt").images
    assert drawn.shape == (1, 3, 8, 8) and drawn.std() > 0.0
    picture = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=torch.manual_seed(0))
    assert math.isfinite(pipe.bits_per_dim(picture, rtol=0.3, atol=0.3, generator=torch.manual_seed(0)).mean)


def test_the_signal_to_noise_ratio_is_that_of_images_of_the_size():
    assert convert_ncsnpp(state_of("ve_ncsnpp_continuous"), 32, "ve").scheduler.config.snr == 0.16
    assert convert_ncsnpp(state_of("ve_ncsnpp_continuous"), 256, "ve").scheduler.config.snr == 0.075


def test_averaged_weights_are_taken_in_the_order_of_what_is_trained(tmp_path):
    """The frequencies and the noise levels are no averages; the learning rate may be a number of numpy."""
    raw = state_of("ve_ncsnpp_continuous")
    averaged = {key: value + (0.0 if key in ("sigmas", "all_modules.0.W") else 1.0) for key, value in raw.items()}
    path = write(tmp_path / "checkpoint.pth", raw, averaged, rate=np.float64(2e-4))
    for use_ema, expected in ((True, averaged), (False, raw)):
        found = read_checkpoint(path, use_ema)
        assert list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in found)
    averaged.pop("all_modules.5.Conv_0.weight")
    with pytest.raises(ValueError, match="averaged weights do not fit"):
        read_checkpoint(write(path, raw, averaged))


def test_official_names_follow_the_official_numbers():
    """Every name of a recorded network, in its order."""
    for case in CASES:
        network = convert_ncsnpp(state_of(case), SIDE, sde_of(case), options=UNTRACED.get(case)).unet
        names = [theirs for theirs, _ in official_names(network)]
        assert sorted(set(names)) == sorted(key for key in state_of(case) if key != "sigmas")
        own = {ours for _, ours in official_names(network)}
        assert own == set(network.state_dict())


def tiny_preset(monkeypatch, name, **options):
    monkeypatch.setitem(PRESETS, name, {**PRESETS[name], "sample_size": 8, "block_out_channels": (8, 8), **options})


def test_a_preset_says_what_the_file_does_not(tmp_path, monkeypatch):
    name = "vp/cifar10_ncsnpp_continuous"
    tiny_preset(monkeypatch, name, layers_per_block=1, attention_resolutions=(4,))
    torch.manual_seed(0)
    network = NCSNpp.from_preset(name).eval()
    values = network.state_dict()
    state = {}
    for theirs, ours in official_names(network):
        state[theirs] = values[ours].T if "NIN" in theirs and theirs.endswith("W") else values[ours]
    path = write(tmp_path / "checkpoint.pth", {"sigmas": sigmas("vp_ncsnpp"), **state})
    pipe = convert_checkpoint(path, preset=name)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pipe.unet(x, 3.5).sample, network(x, 3.5).sample)
    assert pipe.unet.config.dropout == 0.1 and pipe.scheduler.config.continuous
    tiny_preset(monkeypatch, name, layers_per_block=2, attention_resolutions=(4,))
    with pytest.raises(ValueError, match="is not of score_sde's NCSN"):
        convert_checkpoint(path, preset=name)
    assert preset_setting("subvp/cifar10_ddpmpp_deep_continuous") == (32, "sub_vp", False)
    assert preset_setting("vp/cifar10_ddpmpp") == (32, "vp", True)


def test_networks_are_refused_with_an_sde_that_is_not_theirs(tmp_path):
    fourier = state_of("ve_ncsnpp_continuous")
    with pytest.raises(ValueError, match="sde must be 've' for a network with a Fourier embedding"):
        convert_ncsnpp(fourier, SIDE, "vp")
    with pytest.raises(ValueError, match="does not say its noise levels"):
        convert_ncsnpp({key: value for key, value in fourier.items() if key != "sigmas"}, SIDE, "ve")
    for wrong in (sigmas("ddpm").flip(0), torch.ones(10), torch.linspace(50.0, 0.01, 10), torch.tensor(3.0)):
        with pytest.raises(ValueError, match="no decreasing geometric sequence"):
            convert_ncsnpp({**fourier, "sigmas": wrong}, SIDE, "ve")
    with pytest.raises(ValueError, match="discrete is a table of the vp SDE"):
        convert_ncsnpp(state_of("vp_ddpmpp"), SIDE, "sub_vp", discrete=True)
    with pytest.raises(ValueError, match="sde must be one of vp, sub_vp, ve"):
        convert_ncsnpp(fourier, SIDE, "edm")


@pytest.mark.parametrize("case", ["ve_ncsnpp_continuous", "vp_ddpmpp", "concatenated", "ddpm_blocks"])
def test_any_shape_that_is_wrong_is_refused(tmp_path, case):
    """Every parameter in turn missing, as a single number, empty, and with one entry more."""
    state = state_of(case)
    for name in [key for key in state if key != "sigmas"][::5]:
        wider = torch.cat([state[name], state[name][:1]])
        for wrong in (None, torch.tensor(1.0), torch.zeros(0), wider):
            other = {key: value for key, value in state.items() if key != name}
            if wrong is not None:
                other[name] = wrong
            torch.save({"model": other}, tmp_path / "other.pth")
            with pytest.raises(ValueError, match=r"checkpoint|score_sde's|sde must be"):
                convert_checkpoint(tmp_path / "other.pth", SIDE, sde_of(case), use_ema=False)


def test_a_table_of_levels_is_fed_where_its_levels_are():
    """At the times of the levels the network is told whole numbers, the largest level first."""
    pipe = convert_ncsnpp(state_of("ve_ncsnpp_discrete"), SIDE, "ve")
    t = torch.tensor([1.0, 1.0 - 349 / 999, 0.0], dtype=torch.float64)
    fed = pipe.scheduler.conditioning.timestep(pipe.scheduler.sde, t)
    position = pipe.unet._position(fed.float())
    torch.testing.assert_close(position, torch.tensor([0.0, 349.0, 999.0]), rtol=0.0, atol=1e-3)
    assert math.isclose(float(fed[0]), 50.0)
