"""The demo's computations, without Gradio: examples/space/runs.py."""

import importlib.util
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from diffusers_sde import ClassConditionalSDEPipeline, SDEPipeline, VESDEScheduler, VPSDEScheduler

PATH = Path(__file__).resolve().parent.parent / "examples" / "space" / "runs.py"
if not PATH.exists():
    pytest.skip("examples/space is not here", allow_module_level=True)
spec = importlib.util.spec_from_file_location("space_runs", PATH)
runs = sys.modules["space_runs"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)


def unet(**arguments):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 2}
    return diffusers.UNet2DModel(block_out_channels=(4, 8), **blocks, **sizes, **arguments)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    SDEPipeline(unet(), VPSDEScheduler()).save_pretrained(folder)
    return runs.load_model(str(folder))


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    pipe = ClassConditionalSDEPipeline(
        unet(num_class_embeds=4), VPSDEScheduler(), id2label={0: "zero", 1: "one", 2: "two"}, null_class=3
    )
    pipe.save_pretrained(folder)
    return runs.load_model(str(folder))


def test_the_last_frame_is_what_the_pipeline_returns(plain):
    settings = runs.Settings("VP", corrector="langevin", levels=20)
    frames = list(runs.generate(plain, settings, 2, seed=5))
    pipe = SDEPipeline(plain.pipe.unet, settings.scheduler(plain))
    generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
    expected = pipe(2, 20, generators, output_type="pt").images
    assert torch.equal(frames[-1].images, expected)
    calls = [frame.call for frame in frames]
    assert calls == sorted(set(calls)) and len(calls) <= runs.MAX_FRAMES + 1
    assert frames[-1].call == frames[-1].total == pipe.num_timesteps


def test_runs_at_the_same_time_do_not_disturb_each_other(plain):
    choices = (runs.Settings("VP", levels=8), runs.Settings("VP", corrector="langevin", levels=12))
    alone = [list(runs.generate(plain, s, 2, 1))[-1].images for s in choices]
    together = [runs.generate(plain, s, 2, 1) for s in choices]
    last = {}
    while together:
        for run in list(together):
            frame = next(run, None)
            if frame is None:
                together.remove(run)
            else:
                last[frame.total] = frame.images
    assert [torch.equal(a, b) for a, b in zip(alone, (last[8], max(last.items())[1]), strict=True)] == [True, True]


@pytest.mark.parametrize("data_min", [-1.0, 0.0])
def test_a_noisy_state_is_shown_at_the_contrast_of_the_data(data_min):
    scheduler = VESDEScheduler(prediction_type="edm", sigma_max=50.0)
    view = runs._view(SDEPipeline(unet(), scheduler, data_min=data_min), False, {})
    middle, half = (1 + data_min) / 2, (1 - data_min) / 2
    signal = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.5
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[0]
    alpha, sigma = (float(f(scheduler.sde_time(t))) for f in (scheduler.sde.alpha, scheduler.sde.sigma))
    assert sigma > 10
    x = alpha * middle + sigma * signal  # noise of half a standard deviation at most
    # In units of the half range the state's standard deviation is sigma / half, and is brought to 1.
    expected = 0.5 + 0.5 * signal * sigma / half / (alpha**2 + (sigma / half) ** 2) ** 0.5
    assert torch.allclose(view(x, t), expected, atol=1e-5)


@pytest.mark.parametrize("posterior", runs.INPAINT_POSTERIORS)
def test_completions_keep_what_is_known(classes, posterior):
    image = Image.effect_noise((8, 8), 60)
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 4, 8, 8))
    settings = runs.Settings("VP", levels=3)
    frames = list(runs.inpaint(classes, settings, image, mask, posterior, 2, label="each in turn"))
    known = torch.tensor(list(image.tobytes())).reshape(8, 8) / 255
    assert torch.allclose(frames[-1].images[:, 0, :4], known[:4].expand(2, 4, 8), atol=1e-6)
    assert not torch.allclose(frames[-1].images[0], frames[-1].images[1])


def test_a_class_is_what_the_pipeline_is_asked_for(classes):
    assert classes.labels("each in turn", 4).tolist() == [0, 1, 2, 0]
    assert classes.labels("any", 2).tolist() == [3, 3]
    with pytest.raises(ValueError, match="'seven'"):
        runs.generate(classes, runs.Settings("VP"), label="seven")
    frames = {
        label: list(runs.generate(classes, runs.Settings("VP", levels=3), 1, 0, label)) for label in ("one", "two")
    }
    assert not torch.equal(frames["one"][-1].images, frames["two"][-1].images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sde": "VE"}, "VESDEScheduler cannot represent"),
        ({"predictor": "heun"}, "probability_flow=True"),
        ({"predictor": "none"}, "needs a corrector"),
        ({"levels": 0}, "num_inference_steps"),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_run(plain, change, message):
    with pytest.raises(ValueError, match=message):
        runs.generate(plain, runs.Settings(**{"sde": "VP", **change}))


def test_bad_input_is_refused(plain):
    settings = runs.Settings("VP")
    for count, seed in ((0, 0), (17, 0), (1, -1), (1, None)):
        with pytest.raises(ValueError, match="must be an integer"):
            runs.generate(plain, settings, count, seed)
    with pytest.raises(ValueError, match="covers no whole pixel"):
        runs.inpaint(plain, settings, Image.new("L", (8, 8)), Image.new("L", (8, 8)))


def test_a_closed_run_stops(plain):
    calls = []
    hook = plain.pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    run = runs.generate(plain, runs.Settings("VP", levels=900), 1)
    next(run)
    run.close()
    threads = [t for t in runs.threading.enumerate() if t.name.endswith("(work)")]
    for thread in threads:
        thread.join(20)
    hook.remove()
    assert threads and not any(t.is_alive() for t in threads)
    assert len(calls) < 900


def test_pictures_and_strokes_at_the_size_of_the_network():
    small = Image.effect_noise((8, 8), 60)
    assert runs.fit(runs.zoom(small, 480), (1, 8, 8)).tobytes() == small.tobytes()
    layer = Image.new("RGBA", (80, 80))
    layer.paste(
        (255, 255, 255, 255), (0, 0, 16, 14)
    )  # one pixel and 6 tenths of the next, and 4 tenths of the row below
    mask = runs.painted([layer], (3, 8, 8))
    white = [i for i, value in enumerate(mask.tobytes()) if value]
    assert white == [0, 1]
    page = runs.sheet([small] * 5, 3, width=300, gap=4)
    assert page.size == (3 * 100 + 4, 2 * 100 + 4)
