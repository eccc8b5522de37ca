"""What the page computes, without its server."""

import base64
import io

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_sde import ClassConditionalSDEPipeline, InpaintSDEPipeline, SDEPipeline, VPSDEScheduler
from diffusers_sde.space import runs
from diffusers_sde.space.particles import particles


def unet(**arguments):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 2}
    found = diffusers.UNet2DModel(block_out_channels=(4, 8), **blocks, **sizes, **arguments)
    # With v = 0 the data are unit Gaussians; a network whose output is small is a model of something close to that.
    for parameter in found.conv_out.parameters():
        parameter.data.mul_(0.3)
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    SDEPipeline(unet(), VPSDEScheduler(prediction_type="v_prediction")).save_pretrained(folder)
    return runs.load_model("plain", str(folder))


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    pipe = ClassConditionalSDEPipeline(
        unet(num_class_embeds=4),
        VPSDEScheduler(prediction_type="v_prediction"),
        id2label={0: "zero", 1: "one", 2: "two"},
        null_class=3,
    )
    pipe.save_pretrained(folder)
    return runs.load_model("classes", str(folder))


def pixels_of(address):
    """A PNG in a data address as an array of floats in [0, 1]."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))) / 255


def address_of(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def drawing():
    values = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("sampler", ["sde", "pc", "ode"])
def test_what_forms_is_what_the_pipeline_returns(plain, sampler):
    found = {part["sampler"]: part for part in runs.form(plain, seed=5, steps=6)}[sampler]
    scheduler = VPSDEScheduler.from_config(plain.pipe.scheduler.config, **runs.SAMPLERS[sampler])
    seeds = range(5, 5 + runs.FORMING)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    pipe = SDEPipeline(plain.pipe.unet, scheduler)
    images = pipe(runs.FORMING, 6, generators, latents=plain.noise(seeds), output_type="pt").images
    states = pixels_of(found["states"])
    assert states.shape == (7 * 8, runs.FORMING * 8)
    expected = np.concatenate(list(images[:, 0].numpy()), axis=1)
    assert np.abs(states[-8:] - expected).max() < 0.003
    assert found["calls"] == pipe.num_timesteps
    assert found["sigmas"] == sorted(found["sigmas"], reverse=True) and found["sigmas"][-1] == 0.0


def test_all_samplers_start_from_the_same_noise_at_the_same_levels(plain):
    parts = list(runs.form(plain, steps=6))
    first = [pixels_of(part["states"])[:8] for part in parts]
    assert all(np.array_equal(first[0], other) for other in first)
    assert all(part["sigmas"] == parts[0]["sigmas"] for part in parts)


@pytest.mark.parametrize("data_min", [-1.0, 0.0])
def test_a_noisy_state_is_shown_at_the_contrast_of_the_data(data_min):
    pipe = SDEPipeline(unet(), VPSDEScheduler(), data_min=data_min)
    model = runs.Model("", pipe, VPSDEScheduler, {})
    middle, half = (1 + data_min) / 2, (1 - data_min) / 2
    signal = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.5
    # sigma/alpha = 20: the state is noise of half a standard deviation at most around alpha times the middle.
    moment = runs.Moment(20.0, 0.05, 0.05 * middle + signal, signal)
    expected = 0.5 + 0.5 * (signal / 0.05) / half / (1.0 + (20.0 / half) ** 2) ** 0.5
    assert torch.allclose(runs.at_contrast(model, moment), expected, atol=1e-5)


def test_completions_are_those_of_the_pipeline_and_keep_what_is_known(plain):
    hole = Image.new("L", (8, 8))
    hole.paste(255, (0, 4, 8, 8))
    found = pixels_of(runs.complete(plain, address_of(drawing()), address_of(hole), seed=2)["sheet"])
    known = np.asarray(drawing()) / 255
    for i in range(runs.COMPLETIONS):
        assert np.abs(found[:4, 8 * i : 8 * i + 8] - known[:4]).max() < 0.003
    pipe = InpaintSDEPipeline(plain.pipe.unet, VPSDEScheduler.from_config(plain.pipe.scheduler.config))
    generator = torch.Generator().manual_seed(3)
    one = pipe(drawing(), hole, posterior="mmps", num_inference_steps=25, generator=generator, output_type="pt")
    assert np.abs(found[:, 8:16] - one.images[0, 0].numpy()).max() < 0.02


def test_the_way_between_two_codes_ends_at_their_pictures(plain):
    found = pixels_of(runs.between(plain, seed=3, other=4)["sheet"])
    scheduler = VPSDEScheduler.from_config(plain.pipe.scheduler.config, probability_flow=True)
    pipe = SDEPipeline(plain.pipe.unet, scheduler)
    for seed, at in ((3, 0), (4, runs.BETWEEN - 1)):
        expected = pipe(1, 25, latents=plain.noise([seed]), output_type="pt").images[0, 0].numpy()
        assert np.abs(found[:, 8 * at : 8 * at + 8] - expected).max() < 0.003


def test_the_way_may_start_at_a_drawing(plain):
    found = pixels_of(runs.between(plain, drawing=address_of(drawing()))["sheet"])
    # 25 steps down an adaptive way up: close, not equal.
    assert np.abs(found[:, :8] - np.asarray(drawing()) / 255).mean() < 0.1


def test_likelihoods_are_those_of_the_pipeline(plain, monkeypatch):
    monkeypatch.setattr(runs, "COMPARED", 3)
    found = runs.likelihood(plain, address_of(drawing()))
    image = torch.from_numpy(np.asarray(drawing()).copy())[None, None]
    pipe = SDEPipeline(plain.pipe.unet, plain.pipe.scheduler)
    expected = pipe.bits_per_dim(image, generator=[torch.Generator().manual_seed(0)])
    assert abs(found["drawing"] - expected.mean) < 0.02
    assert len(found["own"]) == runs.COMPARED and found["own"] == sorted(found["own"])


def test_a_class_is_what_the_network_is_asked_for(classes):
    assert list(classes.classes) == ["zero", "one", "two"]
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(500)
    for name, number in (("two", 2), ("", 3)):
        expected = classes.pipe.unet(x, t, class_labels=torch.tensor([number] * 2)).sample
        assert torch.equal(classes.network(name)(x, t).sample, expected)
    with pytest.raises(ValueError, match="'seven'"):
        next(runs.form(classes, label="seven"))


@pytest.mark.parametrize(("scale", "expected"), [(None, 2.0), (1, 1.0), (5, 5.0)])
def test_guidance_goes_from_any_class_through_the_class_and_beyond(classes, scale, expected):
    x, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    found = classes.guided("", [7, 8, 9, 4], scale)(x, t).sample
    asked = classes.pipe.unet(x, t, class_labels=torch.tensor([1, 2, 0, 1])).sample  # seed mod 3, in turns
    null = classes.pipe.unet(x, t, class_labels=torch.tensor([3] * 4)).sample
    assert (asked - null).abs().max() > 1e-3
    assert torch.allclose(found, null + expected * (asked - null), atol=1e-5)
    of_one = classes.guided("two", [7, 8, 9, 4], 1)(x, t).sample
    assert torch.equal(of_one, classes.pipe.unet(x, t, class_labels=torch.tensor([2] * 4)).sample)


def test_an_image_depends_on_its_seed_alone_also_by_class(classes):
    first, second = (pixels_of(list(runs.form(classes, seed=s, steps=6))[0]["states"])[-8:] for s in (5, 6))
    assert np.abs(first[:, 8:] - second[:, :-8]).max() < 0.005


def test_a_model_without_a_null_class_is_not_guided(plain, classes):
    assert runs.describe(plain)["guidance"] == [] and runs.describe(classes)["guidance"] == [1, 2, 3, 5]
    assert plain.guided("", [0]) is plain.pipe.unet
    with pytest.raises(ValueError, match="guidance must be 1 for a model without a null class, got 2"):
        next(runs.form(plain, guidance=2))
    with pytest.raises(ValueError, match="guidance must be one of 1, 2, 3, 5, got 4"):
        next(runs.form(classes, guidance=4))


def test_weights_in_half_precision_are_computed_with_in_single(tmp_path):
    pipe = SDEPipeline(unet().half(), VPSDEScheduler(prediction_type="v_prediction"))
    pipe.save_pretrained(tmp_path)
    model = runs.load_model("half", str(tmp_path))
    assert {p.dtype for p in model.pipe.unet.parameters()} == {torch.float32}
    saved = pipe.unet.state_dict()
    assert all(torch.equal(p, saved[name].float()) for name, p in model.pipe.unet.state_dict().items())
    runs.few(model)


def test_few_calls_are_as_many_as_they_say(plain):
    rows = {row["name"]: row for row in runs.few(plain)["rows"]}
    assert [rows[name]["calls"] for name in ("first order", "nothing set", "100 calls")] == [6, 6, 100]
    assert rows["100 calls"]["error"] == 0.0


@pytest.mark.parametrize(
    ("run", "settings", "message"),
    [
        ("form", {"seed": -1}, "seed must be a whole number"),
        ("form", {"seed": 0.5}, "seed must be a whole number"),
        ("form", {"seed": True}, "seed must be a whole number"),
        ("form", {"steps": 1000}, "steps must be one of 6, 12, 25, 50"),
        ("between", {"other": 2**40}, "seed must be a whole number"),
        ("likelihood", {"image": "data:text/html,hello"}, "small PNG"),
        ("likelihood", {"image": "data:image/png;base64,aGVsbG8="}, "small PNG"),
        ("likelihood", {"image": address_of(Image.new("L", (9, 8)))}, "8 x 8 pixels, got 9 x 8"),
        (
            "complete",
            {"image": address_of(Image.new("L", (8, 8))), "hole": address_of(Image.new("L", (8, 8)))},
            "Nothing is to be drawn",
        ),
    ],
)
def test_what_a_browser_may_send_is_checked_before_a_network_call(plain, run, settings, message):
    calls = []
    hook = plain.pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        found = getattr(runs, run)(plain, **settings)
        next(iter(found))
    hook.remove()
    assert not calls


@pytest.mark.parametrize("mixture", ["islands", "ring"])
def test_the_clouds_have_the_distribution_of_the_data_and_of_each_moment(mixture):
    """Second moments of 240 particles, whose standard error is about 5 %."""
    found = particles(mixture, seed=1)
    centres, std = np.asarray(found["centres"]), found["std"]
    start = None
    for name in ("sde", "pc", "ode"):
        values = np.frombuffer(base64.b64decode(found["paths"][name]), "<i2").reshape(-1, found["particles"], 2)
        path = values / found["scale"]
        assert len(path) == len(found["levels"])
        start = path[0] if start is None else start
        assert np.array_equal(path[0], start)
        for k in (0, 30, len(path) - 1):
            alpha, sigma = found["levels"][k]
            expected = alpha**2 * ((centres**2).sum(1).mean() + 2 * std**2) + 2 * sigma**2
            assert (path[k] ** 2).sum(1).mean() == pytest.approx(expected, rel=0.25)
        distance = np.linalg.norm(path[-1][:, None] - centres, axis=-1).min(1)
        assert np.sqrt((distance**2).mean()) == pytest.approx(std * 2**0.5, rel=0.15)
    with pytest.raises(ValueError, match="'square'"):
        particles("square")
