"""The examples by task: each is short, and does what it says with parts that have a handful of parameters."""

import importlib.util
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_networks import tiny_unet
from tiny_parts import conditional_unet, sd3_transformer, tiny_text, tiny_vae

from diffusers_sde import FlowSDEScheduler, SDEPipeline, VPSDEScheduler

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
BY_TASK = sorted(set(EXAMPLES) - {"trajectories"})  # that one is the paper's figure


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_text(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def model(tmp_path):
    """A saved pipeline on 8x8 grey images, of Gaussian data."""
    SDEPipeline(tiny_unet(), VPSDEScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("name", BY_TASK)
def test_an_example_is_short_and_the_page_calls_it_by_options_that_it_has(name):
    source, page = (p.read_text(encoding="utf-8") for p in (EXAMPLES[name], ROOT / "docs" / "guides" / "examples.md"))
    assert len(source.splitlines()) < 80
    assert f"(../../examples/{name}.py)" in page
    calls = re.findall(rf"^python examples/{name}\.py (.*)$", page + source, re.M)
    options = {option for call in calls for option in re.findall(r"(--\w+)", call)}
    assert options and all(f'add_argument("{option}"' in source for option in options)


def test_stable_diffusion_has_the_same_number_of_calls_for_each_sampler(text, tmp_path, capsys):
    diffusers.StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=text.encoder,
        tokenizer=text.tokenizer,
        unet=conditional_unet(cross_attention_dim=16),
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "sd")
    picture = tmp_path / "sd.png"
    example("stable_diffusion_pc").main(["--model", str(tmp_path / "sd"), "--calls", "6", "--output", str(picture)])
    said = re.findall(r"^(.*): (\d) levels, (\d) network calls$", capsys.readouterr().out, re.M)
    assert said == [("DDIMScheduler", "6", "6"), ("reverse SDE", "6", "6"), ("predictor-corrector", "3", "6")]
    columns = np.split(np.asarray(Image.open(picture)), 3, axis=1)
    assert len({column.tobytes() for column in columns}) == 3


def test_sd3_draws_noise_on_the_way_unless_it_is_the_ode(text, tmp_path):
    diffusers.StableDiffusion3Pipeline(
        transformer=sd3_transformer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=text.encoder_projected,
        tokenizer=text.tokenizer,
        text_encoder_2=text.encoder_projected,
        tokenizer_2=text.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(tmp_path / "sd3")
    module = example("sd3_reverse_sde")
    picture = tmp_path / "sd3.png"
    arguments = ["--levels", "3", "--count", "2", "--size", "16", "--without_t5", "--output", str(picture)]
    module.main(["--model", str(tmp_path / "sd3"), *arguments])
    assert Image.open(picture).size == (32, 48)
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "sd3", text_encoder_3=None, tokenizer_3=None)

    def draw(stochasticity, seed):
        pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler.config, stochasticity=stochasticity)
        torch.manual_seed(seed)
        options = {"num_inference_steps": 3, "height": 16, "width": 16, "output_type": "latent"}
        return pipe("a cat", generator=torch.Generator().manual_seed(0), **options).images

    assert torch.equal(draw(0.0, 1), draw(0.0, 2)) and not torch.equal(draw(1.0, 1), draw(1.0, 2))


def test_a_photograph_comes_back_around_its_hole(model, tmp_path):
    photograph = Image.effect_noise((40, 30), 60).convert("RGB")
    photograph.save(tmp_path / "photograph.png")
    module = example("inpaint_photograph")
    picture = tmp_path / "filled.png"
    options = ["--hole", "0", "0.5", "1", "1", "--count", "2", "--levels", "3", "--output", str(picture)]
    module.main(["--model", model, "--image", str(tmp_path / "photograph.png"), *options])
    images = [each[1:-1, 1:-1] for each in np.split(np.asarray(Image.open(picture).convert("L")), 4, axis=1)]
    assert all((image[:4] == images[0][:4]).all() for image in images)
    assert len({image[4:].tobytes() for image in images}) == 4
    assert np.asarray(module.hole_mask((8, 4), (0.25, 0.5, 1, 1))).tolist() == [[0] * 8] * 2 + [[0, 0] + [255] * 6] * 2


def test_likelihood_tells_apart_what_a_gaussian_tells_apart(model, tmp_path, capsys):
    """To a model of unit noise the bits of an image are the mean square of its values, and little else."""
    folders = []
    for name, std in (("quiet", 20), ("loud", 90)):
        (tmp_path / name).mkdir()
        folders.append(str(tmp_path / name))
        generator = np.random.default_rng(0)
        for i in range(4):
            values = np.clip(128 + std * generator.standard_normal((8, 8)), 0, 255).astype(np.uint8)
            Image.fromarray(values).save(tmp_path / name / f"{i}.png")
    example("likelihood_of_two_sets").main(
        ["--model", model, "--known", folders[0], "--other", folders[1], "--output", str(tmp_path / "bits.png")]
    )
    assert "in 100.0% of the pairs" in capsys.readouterr().out
    assert (tmp_path / "bits.png").is_file()
    images = example("likelihood_of_two_sets").images_of
    one, turned, stroke = (np.asarray(images(name, 1, (1, 8, 8))[0]) for name in ("digits", "upside_down", "strokes"))
    assert (turned[::-1] == one).all() and (stroke == stroke[0]).all() and (stroke[0] > 0).sum() == 2


def test_a_reward_changes_what_is_drawn(model, tmp_path):
    module = example("reward_tuned")
    rewards = module.slender(torch.tensor([0.2, 0.5]).view(2, 1, 1, 1).expand(2, 1, 8, 8))
    torch.testing.assert_close(rewards, torch.tensor([0.0, -0.3]))
    options = ["--rounds", "1", "--group_size", "4", "--levels", "4"]
    module.main(["--model", model, "--output", str(tmp_path / "tuned"), *options])
    assert Image.open(tmp_path / "tuned" / "before_and_after.png").size == (8 * 68, 4 * 68)
    tuned, start = (SDEPipeline.from_pretrained(folder).unet.state_dict() for folder in (tmp_path / "tuned", model))
    assert any(not torch.equal(tuned[key], start[key]) for key in start)
