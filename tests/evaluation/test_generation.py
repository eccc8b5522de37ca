"""Images by their numbers: the set depends on nothing but model, sampler and seed."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from hub_models import tiny_pipeline
from PIL import Image
from processes import run
from tiny_networks import tiny_unet
from tiny_parts import HAS_TRANSFORMERS

from diffusers_sde import ClassConditionalSDEPipeline, SDEPipeline, VPSDEScheduler
from diffusers_sde.evaluation import ImageSampler, Sampler, SamplingConfig, as_sde_pipeline, generate
from diffusers_sde.evaluation.cli import sample_main
from diffusers_sde.evaluation.samplers import generator_of
from diffusers_sde.images.arrays import to_bytes


@pytest.fixture(scope="module")
def pipe():
    return SDEPipeline(tiny_unet(), VPSDEScheduler(prediction_type="v_prediction"))


@pytest.fixture(scope="module")
def conditional():
    scheduler = VPSDEScheduler(prediction_type="v_prediction")
    return ClassConditionalSDEPipeline(
        tiny_unet(num_class_embeds=4), scheduler, id2label={0: "a", 1: "b", 2: "c"}, null_class=3
    )


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return str(folder)


def draw(pipe, text, numbers, batch_size=64, **options):
    sampler = ImageSampler(pipe, Sampler.parse(text), **options)
    parts = list(sampler(numbers, batch_size))
    assert [number for batch, _ in parts for number in batch] == list(numbers)
    return torch.cat([images for _, images in parts]).int(), sampler


PC = "pc: num_inference_steps=4, predictor=reverse_diffusion, corrector=langevin, snr=0.2"


def test_an_image_depends_on_its_number_and_seed_only(pipe):
    trained = pipe.scheduler
    images, _ = draw(pipe, PC, range(7))
    assert pipe.scheduler is trained
    assert images.shape == (7, 1, 8, 8)
    for numbers, batch_size in ((range(7), 2), ([5, 0, 3], 3)):
        again, _ = draw(pipe, PC, numbers, batch_size)
        assert int((images[list(numbers)] - again).abs().max()) <= 1  # rounding to bytes
    flat = torch.cat([images, draw(pipe, PC, range(7), seed=1)[0]]).flatten(1).float()
    distances = torch.cdist(flat, flat) + 1e6 * torch.eye(14)
    assert float(distances.min()) > 100.0  # and no two images are alike, of one seed or of two


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("num_inference_steps=5", 5),
        ("pc: num_inference_steps=5, corrector=langevin, correct_steps=2", 15),
        ("heun: num_inference_steps=5, predictor=heun, probability_flow=true", 9),
        ("corrector only: num_inference_steps=5, predictor=none, corrector=langevin", 6),  # the last one denoises
        ("stock: scheduler=DDIMScheduler, num_inference_steps=5", 5),
    ],
)
def test_calls_are_counted(pipe, text, calls):
    _, sampler = draw(pipe, text, range(3), 2)
    assert (sampler.calls, sampler.images) == (3 * calls, 3)


def test_calls_of_the_adaptive_ode(pipe):
    coarse, fine = (draw(pipe, f"method=ode, rtol={tol}, atol={tol}", range(4))[1].calls for tol in (0.1, 1e-4))
    assert 4 < coarse < fine


def test_classes_come_in_turn(conditional):
    _, sampler = draw(conditional, "num_inference_steps=2", range(4))
    assert [sampler.label(i) for i in range(4)] == [0, 1, 2, 0]  # not the null class
    _, sampler = draw(conditional, "num_inference_steps=2", range(2), class_labels=["c", "1"])
    assert [sampler.label(i) for i in range(3)] == [2, 1, 2]
    plain, sampler = draw(conditional, "num_inference_steps=3, guidance_scale=1", range(3))
    assert sampler.calls == 9
    guided, sampler = draw(conditional, "num_inference_steps=3, guidance_scale=4", range(3))
    assert sampler.calls == 18 and not torch.equal(plain, guided)  # both halves count


def test_the_ode_is_told_the_classes(conditional):
    images, sampler = draw(conditional, "method=ode", range(6))
    again, _ = draw(conditional, "method=ode", range(6), class_labels=[0, 2, 1])
    same = [torch.equal(a, b) for a, b in zip(images, again, strict=True)]
    assert same == [True, False, False] * 2 and sampler.calls > 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast: predictr=heun", r"sampler 'fast': .*'predictr' \(did you mean 'predictor'"),
        ("fast: predictor=huen", "sampler 'fast': predictor must be"),
        ("fast: corrector=langevin, snr=-1", "sampler 'fast': snr"),
        ("fast: num_inference_steps=0", "sampler 'fast': num_inference_steps must"),
        ("fast: num_inference_steps=2.5", "sampler 'fast': num_inference_steps must"),
        ("fast: method=odd", "sampler 'fast': method must be one of scheduler, ode, sde, got 'odd'"),
        ("fast: method=ode, rtol=tight", "sampler 'fast': rtol must be a number"),
        ("fast: method=ode, rtol=0", "sampler 'fast': rtol must be a number > 0"),
        ("fast: guidance_scale=2", "sampler 'fast': SDEPipeline takes no guidance_scale"),
        ("fast: scheduler=Nothing", "sampler 'fast': scheduler must be a class"),
        ("fast: scheduler=DDIMScheduler, snr=1", "sampler 'fast': DDIMScheduler has no argument snr"),
        ("fast: snr", "'snr' must be key=value"),
        ("fast: snr=1, snr=2", "each key may stand once"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_drawn(pipe, text, message):
    with pytest.raises(ValueError, match=message):
        ImageSampler(pipe, Sampler.parse(text))


def test_wrong_classes(pipe, conditional):
    with pytest.raises(ValueError, match="class_labels need a class-conditional pipeline"):
        ImageSampler(pipe, Sampler("x", {}), class_labels=[1])
    with pytest.raises(ValueError, match="class_labels"):
        ImageSampler(conditional, Sampler("x", {}), class_labels=["d"])
    with pytest.raises(ValueError, match="needs a pipeline with a classifier"):
        ImageSampler(conditional, Sampler("x", {"classifier_guidance_scale": 2}))


def test_pipelines_of_diffusers_are_taken():
    pipe = as_sde_pipeline(DDPMPipeline(tiny_unet(), DDPMScheduler()))
    images, sampler = draw(pipe, "ours: scheduler=VPSDEScheduler, num_inference_steps=3, corrector=langevin", range(2))
    assert images.shape == (2, 1, 8, 8) and sampler.calls == 12
    images, sampler = draw(pipe, "num_inference_steps=3", range(2))
    assert sampler.calls == 6


# ------------------------------------------------------------------ scripts/sample.py


def pngs(folder):
    files = sorted(folder.glob("*.png"))
    return [file.name for file in files], np.stack([np.asarray(Image.open(file)) for file in files])


def test_a_folder_is_completed(model, tmp_path):
    arguments = ["--model", model, "--num_inference_steps", "3", "--corrector", "langevin", "--snr", "0.2"]
    sample_main([*arguments, "--num_images", "5", "--output_dir", str(tmp_path / "whole")])
    names, whole = pngs(tmp_path / "whole")
    assert names == [f"{i:06d}.png" for i in range(5)]
    part = tmp_path / "part"
    sample_main([*arguments, "--num_images", "3", "--output_dir", str(part)])
    marked = Image.new("L", (8, 8), 77)
    marked.save(part / "000001.png")
    (part / "000002.png").unlink()
    (part / ".000002.png.unfinished").write_bytes(b"half")  # as a kill would leave it
    sample_main([*arguments, "--num_images", "5", "--batch_size", "2", "--output_dir", str(part)])
    names, images = pngs(part)
    assert len(names) == 5 and (images[1] == 77).all()
    assert np.abs(np.delete(images, 1, 0).astype(int) - np.delete(whole, 1, 0).astype(int)).max() <= 1
    record = json.loads((part / "samples.json").read_text())
    assert record["calls_per_image"] == 6.0 and record["num_images"] == 5
    assert record["sampler"] == {"num_inference_steps": 3, "corrector": "langevin", "snr": 0.2}


def test_other_images_are_not_mixed_in(model, pipe, tmp_path):
    options = {"num_images": 2, "output_dir": str(tmp_path), "num_inference_steps": 2}
    generate(SamplingConfig(model=model, **options))
    for changed, named in (({"seed": 1}, "seed 0, and now it is 1"), ({"snr": 0.3}, "sampler")):
        with pytest.raises(ValueError, match=f"output_dir .* holds images of {named}"):
            generate(SamplingConfig(model=model, **options, **changed))
    other = SDEPipeline(tiny_unet(), pipe.scheduler)
    with torch.no_grad():
        other.unet.conv_out.bias.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="fingerprint"):
        generate(SamplingConfig(model=str(tmp_path / "other"), **options))


def test_classes_may_be_numbers_or_words():
    options = {"model": "m", "output_dir": "o", "num_images": 1}
    assert SamplingConfig(class_labels=[0, "b"], **options).class_labels == ("0", "b")


def test_one_file(conditional, tmp_path):
    conditional.save_pretrained(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "num_images": 4, "num_inference_steps": 2, "guidance_scale": 2.0}
    config = SamplingConfig(output_dir=str(tmp_path / "npz"), format="npz", **options)
    generate(config)
    generate(SamplingConfig(output_dir=str(tmp_path / "png"), **options))
    with np.load(tmp_path / "npz" / "samples.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].shape == (4, 8, 8, 1)
        assert np.array_equal(arrays["arr_0"][..., 0], pngs(tmp_path / "png")[1])
        assert arrays["arr_1"].tolist() == [0, 1, 2, 0]
    assert sorted(p.name for p in (tmp_path / "npz").iterdir()) == ["samples.json", "samples.npz"]
    assert generate(config)["calls_per_image"] is None  # nothing left to do


@pytest.mark.parametrize("form", ["png", "npz"])
def test_a_larger_set_is_not_passed_off_as_a_smaller_one(model, tmp_path, form):
    """Whoever counts the files of the folder would find more images than samples.json says."""
    options = {"model": model, "output_dir": str(tmp_path), "format": form, "num_inference_steps": 2}
    generate(SamplingConfig(num_images=5, **options))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds images up to number 4, more than num_images 3: ask for 5"):
        generate(SamplingConfig(num_images=3, **options))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert generate(SamplingConfig(num_images=5, **options))["calls_per_image"] is None
    assert generate(SamplingConfig(num_images=6, **options))["num_images"] == 6


def test_broken_images_are_drawn_again(model, tmp_path):
    options = {"model": model, "output_dir": str(tmp_path), "num_images": 5, "num_inference_steps": 2}
    generate(SamplingConfig(**options))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    (tmp_path / "000000.png").write_bytes(b"")  # as a crash of the machine may leave it
    (tmp_path / "000001.png").write_bytes(before["000001.png"][:-20])
    (tmp_path / "000002.png").write_bytes(b"garbage")
    Image.new("L", (4, 4)).save(tmp_path / "000003.png")
    generate(SamplingConfig(**options))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == before


LIMITED = """
import resource, sys
from diffusers_sde.evaluation.cli import sample_main
from diffusers_sde.evaluation.samplers import generator_of
from diffusers_sde.images.arrays import to_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))
sample_main(sys.argv[1:])
"""


def test_a_disk_that_is_really_full_leaves_no_half_of_a_file(model, tmp_path):
    arguments = ["--model", model, "--num_images", "2", "--output_dir", str(tmp_path), "--num_inference_steps", "2"]
    sample_main(arguments)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    before = (tmp_path / "samples.json").read_bytes()
    done = run(f"import sys; sys.argv[1:] = {arguments!r}\n{LIMITED}", tmp_path.parent)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and line.startswith("sample.py: error:") and "could not be written" in line, done.stderr
    assert str(tmp_path) in line and "free" in line
    assert [path.name for path in tmp_path.iterdir()] == ["samples.json"]
    assert (tmp_path / "samples.json").read_bytes() == before


def test_a_folder_in_use_is_left_alone(model, tmp_path, capsys):
    from diffusers_sde.basics.files import lock_folder

    with lock_folder(tmp_path), pytest.raises(SystemExit) as stopped:
        sample_main(["--model", model, "--num_images", "2", "--output_dir", str(tmp_path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sample.py: error: --output_dir") and "is in use by process" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("samples.npz", b"garbage", "samples.npz' holds no images of this model"),
        ("samples.npz", b"", "samples.npz' holds no images of this model"),
        ("samples.json", b"{", "samples.json' cannot be read"),
        ("samples.json", b"[1]", "samples.json' cannot be read"),
        ("samples.json", b"\xff\xfe", "samples.json' cannot be read"),
        ("samples.json", None, "holds images, but no samples.json"),
    ],
)
def test_damaged_folders_are_named_in_one_line(model, tmp_path, capsys, name, content, message):
    arguments = ["--model", model, "--num_images", "2", "--output_dir", str(tmp_path), "--num_inference_steps", "2"]
    sample_main([*arguments, "--format", "npz"])
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        sample_main([*arguments, "--format", "npz"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sample.py: error:") and message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "corrector=langevin, snr=abc"], "snr"),
        (["--sampler", "rho=none"], "rho"),
        (["--sampler", "scheduler=DDIMScheduler, num_train_timesteps=abc"], "sampler 'command line'"),
        (["--seed", str(2**70)], "seed must be an integer at least 0 and at most 9223372036854775807"),
        (["--rtol", "0"], "rtol must be a finite number greater than 0, got 0.0"),
        (["--output_dir", "LINK"], "is a link to"),
        (["--num_images", "0"], "num_images"),
        (["--predictor", "heun", "--sampler", "predictor=none"], "repeats predictor"),
        (["--sampler", "rhoo=3"], "did you mean 'rho'"),
        (["--snr", "0"], "snr"),
        (["--output_dir", "FILE"], "FILE"),
        (["--model", "nowhere/at all"], "nowhere"),
    ],
)
def test_mistakes_end_in_one_line(model, tmp_path, capsys, arguments, message):
    file = tmp_path / "FILE"
    file.touch()
    (tmp_path / "LINK").symlink_to(tmp_path / "nowhere else")
    arguments = [str(tmp_path / word) if word in ("FILE", "LINK") else word for word in arguments]
    with pytest.raises(SystemExit) as stopped:
        sample_main(["--model", model, "--num_images", "2", "--output_dir", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "sample.py: error:" in error.splitlines()[-1]


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="captions are embedded by transformers")
def test_images_of_captions_in_turn(tmp_path):
    """Image number i has prompt i modulo their number, and is what the pipeline draws of it by itself."""
    pipe = tiny_pipeline("pixart")
    prompts, text = ["a cab", "lead"], "sampler: num_inference_steps=3, guidance_scale=2.0"
    images, sampler = draw(pipe, text, range(3), prompts=prompts)
    assert [sampler.prompt(number) for number in range(3)] == ["a cab", "lead", "a cab"]
    arguments = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
    for number, prompt in enumerate(("a cab", "lead", "a cab")):
        noise = torch.randn(1, 1, 8, 8, generator=generator_of(0, number))
        generator = [generator_of(0, number)]
        torch.randn(1, 8, 8, generator=generator[0])  # the noise has been drawn from it
        alone = pipe(prompt, latents=noise, generator=generator, **arguments).images
        assert int((to_bytes(alone, 0.0)[0].int() - images[number]).abs().max()) <= 1
    nothing, _ = draw(pipe, "sampler: num_inference_steps=3", range(1))
    assert not torch.equal(nothing[0], images[0])
    pipe.save_pretrained(tmp_path / "model")
    config = {"model": str(tmp_path / "model"), "output_dir": str(tmp_path / "images"), "num_images": 2}
    config |= {"prompts": ("a cab",), "num_inference_steps": 2}
    assert generate(SamplingConfig(**config))["prompts"] == ["a cab"]
    for others in (("lead",), None):
        with pytest.raises(ValueError, match=r"holds images of prompts \['a cab'\]"):
            generate(SamplingConfig(**(config | {"prompts": others})))


def test_prompts_are_for_captions(pipe):
    with pytest.raises(ValueError, match="prompts need a pipeline that is told captions, and this one is not"):
        ImageSampler(pipe, Sampler.parse("pipeline"), prompts=["a cab"])
