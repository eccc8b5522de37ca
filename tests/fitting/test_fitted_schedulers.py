"""Schedulers that hold a fitted plan: what they execute, save, refuse and drop; and the fit of pipelines."""

import importlib.util
import json
import sys
import warnings

import diffusers
import pytest
import torch
from exact_networks import quiet, seeded, unet
from PIL import Image
from tiny_parts import conditional_unet, tiny_text, tiny_vae

from diffusers_sde import (
    ClassConditionalSDEPipeline,
    FlowSDEScheduler,
    SDEPipeline,
    SubVPSDEScheduler,
    TextSDEPipeline,
    VESDEScheduler,
    VPSDEScheduler,
    diagnose,
    fit_scheduler,
)
from diffusers_sde.basics.networks import computes_in_bf16
from diffusers_sde.fitting import PlanFamily, simulate
from diffusers_sde.fitting.families import PARTS
from diffusers_sde.fitting.targets import Batch
from diffusers_sde.pipelines.fit_subjects import DenoisedSubject
from diffusers_sde.pipelines.fits import _bounds_of_pixels, _split
from diffusers_sde.schedulers.fitted_plans import is_same_network, sampled_weights
from diffusers_sde.shipping.cards import model_card
from diffusers_sde.shipping.figures import draw_pictures
from diffusers_sde.shipping.flattening import self_contained_source
from diffusers_sde.training.fits import fit_main

LEVELS = 5
SCHEDULERS = {
    "vp": lambda **k: VPSDEScheduler(**k),
    "ve_pc": lambda **k: VESDEScheduler(**{"prediction_type": "edm", "sigma_max": 20.0, "corrector": "langevin", **k}),
    "sub_vp": lambda **k: SubVPSDEScheduler(**k),
    "flow": lambda **k: FlowSDEScheduler(**k),
    "bounded": lambda **k: VPSDEScheduler(**{"bound_above_sigma": 1.0, **k}),
    "clipped": lambda **k: VPSDEScheduler(**{"clip_sample": True, "corrector": "ornstein_uhlenbeck", **k}),
}


def fitted(scheduler, network=None, scale=0.1):
    """The scheduler with a plan of random parameters, and that plan."""
    config = scheduler.config
    family = PlanFamily(
        scheduler.sde,
        scheduler.sampling_times(LEVELS),
        scheduler.own_predictor,
        config.corrector,
        snr=config.snr,
        stochasticity=scheduler.own_stochasticity,
    )
    parameters = scale * torch.randn(family.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = family.plan(parameters)
    weights = None if network is None else sampled_weights(network)
    return scheduler.with_plan(plan, family.level_times(parameters), weights), plan


def run(scheduler, network, x, seed=0):
    scheduler.set_timesteps(LEVELS)
    generator = torch.Generator().manual_seed(seed)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        fed = scheduler.scale_model_input(x, t)
        with torch.no_grad():
            output = network(fed, t.expand(len(x)), return_dict=False)[0]
        x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
    return x


@pytest.fixture(scope="module")
def network():
    return unet()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_executes_the_plan_that_was_fitted(name, network):
    """``step`` is compared with the plan on x0_hat, executed as the fit executes it."""
    base = SCHEDULERS[name]()
    scheduler, plan = fitted(base)
    x = torch.randn(2, 1, 8, 8, generator=seeded())
    found = run(scheduler, network, x)
    denoiser = base.denoiser(lambda x, t: network(x, t, return_dict=False)[0])
    with torch.no_grad():
        expected = simulate(
            plan,
            denoiser,
            x * base.init_noise_sigma,
            torch.Generator().manual_seed(0),
            base.bounded if base.bounds_estimates else None,
        )
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))
    assert not torch.allclose(found, run(base, network, x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(scheduler.timesteps, base._fed(plan.column("t")))


@pytest.mark.parametrize("name", ["vp", "ve_pc", "flow"])
def test_it_is_saved_loaded_and_shipped(name, network, tmp_path):
    scheduler, _ = fitted(SCHEDULERS[name](), network)
    x = torch.randn(2, 1, 8, 8, generator=seeded())
    expected = run(scheduler, network, x)
    scheduler.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert config["fitted_plan"]["levels"] == LEVELS
    assert torch.equal(run(type(scheduler).from_pretrained(tmp_path), network, x), expected)
    assert torch.equal(run(type(scheduler).from_config(scheduler.config), network, x), expected)
    assert (tmp_path / "diffusers_sde.py").read_text() == self_contained_source("schedulers")
    spec = importlib.util.spec_from_file_location("shipped", tmp_path / "diffusers_sde.py")
    module = sys.modules["shipped"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        shipped = getattr(module, type(scheduler).__name__).from_config(config)
    finally:
        del sys.modules["shipped"]
    assert torch.equal(run(shipped, network, x), expected)
    assert (tmp_path / "scheduler_config.json").stat().st_size < 40_000


def test_it_passes_through_a_stock_scheduler(network):
    scheduler, _ = fitted(VPSDEScheduler(), network)
    stock = diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)
    stock.set_timesteps(7)
    back = VPSDEScheduler.from_config(stock.config)
    x = torch.randn(2, 1, 8, 8, generator=seeded())
    assert torch.equal(run(back, network, x), run(scheduler, network, x))


def test_it_takes_its_own_number_of_levels():
    scheduler, _ = fitted(VPSDEScheduler())
    with pytest.raises(ValueError, match=r"must be 5, .* got 9"):
        scheduler.set_timesteps(9)
    for lists in ({"timesteps": [999, 500, 3]}, {"sigmas": [10.0, 1.0, 0.1]}):
        with pytest.raises(ValueError, match="must be 5"):
            scheduler.set_timesteps(**lists)
    free = VPSDEScheduler.from_config(scheduler.config, fitted_plan=None)
    free.set_timesteps(9)
    assert len(free.timesteps) == 9


def test_it_starts_at_its_first_level():
    scheduler, _ = fitted(VPSDEScheduler())
    scheduler.set_timesteps(LEVELS)
    scheduler.set_begin_index(2)
    x = torch.randn(1, 1, 8, 8)
    with pytest.raises(ValueError, match="starts at its first level"):
        scheduler.step(x, scheduler.timesteps[2], x)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"prediction_type": "v_prediction"}, "prediction_type='epsilon'"),
        ({"time_conditioning": "score_sde"}, "time_conditioning"),
        ({"beta_end": 0.03}, "another DiscreteVPSDE"),
        ({"continuous": True}, "not on this VPSDE"),
    ],
)
def test_another_network_is_refused(change, reason):
    scheduler, _ = fitted(VPSDEScheduler())
    with pytest.raises(ValueError, match=reason):
        VPSDEScheduler.from_config(scheduler.config, **change)
    VPSDEScheduler.from_config(scheduler.config, fitted_plan=None, **change)


@pytest.mark.parametrize(
    "change", [{"probability_flow": True}, {"corrector": "langevin"}, {"time_grid": "karras"}, {"clip_sample": True}]
)
def test_another_sampler_drops_the_plan_and_says_so(change):
    scheduler, _ = fitted(VPSDEScheduler())
    with pytest.warns(UserWarning, match=f"dropped.*{next(iter(change))}"):
        other = VPSDEScheduler.from_config(scheduler.config, **change)
    assert other.config.fitted_plan is None
    other.set_timesteps(9)
    with pytest.raises(ValueError, match="was fitted with"):
        VPSDEScheduler(fitted_plan=scheduler.config.fitted_plan, **change)


def test_the_same_sampler_keeps_it_without_a_word():
    scheduler, _ = fitted(VPSDEScheduler())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = VPSDEScheduler.from_config(scheduler.config, probability_flow=False, time_grid="sech")
    assert again.config.fitted_plan is not None


@pytest.mark.parametrize(
    "part, value",
    [("levels", 0), ("times", []), ("columns", ["t"]), ("kinds", [["odd"]] * LEVELS), ("table", [[1.0]]), ("sde", 3)],
)
def test_what_is_no_plan_is_refused(part, value):
    entry = fitted(VPSDEScheduler())[0].config.fitted_plan
    with pytest.raises(ValueError, match="fitted_plan"):
        VPSDEScheduler(fitted_plan={**entry, part: value})
    with pytest.raises(ValueError, match="fitted_plan"):
        VPSDEScheduler(fitted_plan={key: v for key, v in entry.items() if key != part})


def test_a_network_is_known_in_any_precision_and_others_are_not(network, caplog):
    stored = sampled_weights(network)
    for dtype in (torch.bfloat16, torch.float16):
        assert is_same_network(stored, unet().to(dtype))
    torch.manual_seed(1)
    other = unet()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.05).add_(0.01)
    assert not is_same_network(stored, other)
    scheduler, _ = fitted(VPSDEScheduler(), network)
    assert not any("fitted to another" in w for w in diagnose(SDEPipeline(network, scheduler)).warnings)
    pipe = quiet(SDEPipeline(other, scheduler))
    assert any("fitted to another" in w for w in diagnose(pipe).warnings)
    diffusers.utils.logging.enable_propagation()
    try:
        with caplog.at_level("WARNING"):
            pipe(num_inference_steps=LEVELS, generator=seeded())
            pipe(num_inference_steps=LEVELS, generator=seeded())
    finally:
        diffusers.utils.logging.disable_propagation()
    assert sum("fitted to another" in record.message for record in caplog.records) == 1


def test_the_card_shows_the_fit(network):
    scheduler, _ = fitted(VPSDEScheduler(), network)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        card = str(model_card(SDEPipeline(network, scheduler), "user/fitted"))
    assert "its sampler was fitted for" in card and f"num_inference_steps={LEVELS}" in card
    assert "fitted_plan=None" in card


def test_the_pictures_of_a_card_are_of_the_fitted_sampler(network, tmp_path):
    scheduler, _ = fitted(VPSDEScheduler(), network)
    pipe = SDEPipeline(network, scheduler)
    draw_pictures(pipe, tmp_path)
    pipe.set_progress_bar_config(disable=True)
    first = pipe(num_inference_steps=LEVELS, generator=[torch.Generator().manual_seed(0)]).images[0]
    sheet = Image.open(tmp_path / "samples.png")
    shown = sheet.crop((2, 2, 66, 66)).resize(first.size, Image.Resampling.NEAREST)
    assert shown.tobytes() == first.tobytes()


# ---------------------------------------------------------------------- pipelines

SMALL = {"steps": 2, "batch_size": 8, "held_out": 16, "progress_bar": False}


def test_a_pipeline_is_fitted_to_data(network):
    pipe = quiet(SDEPipeline(network, VPSDEScheduler()))
    before, trained = pipe.scheduler, network.training
    images = torch.randint(0, 256, (60, 1, 8, 8), generator=seeded(), dtype=torch.uint8)
    fit = fit_scheduler(pipe, 3, images, **SMALL)
    json.dumps(fit.report)
    assert fit.report["calls"] == 3 and fit.report["target"] == "data" and "gain_error" in str(fit)
    # Two steps of 8, looks of 8 at the choice (one before, one after each step), and both samplers on 16.
    drawn = 2 * 8 + 3 * 8 + (2 if fit.report["chosen_step"] else 1) * 16
    # Features: of all 60 images once, of the samples of steps and looks, and of both samplers of the report.
    features = 60 + 2 * 8 + 3 * 8 + 2 * 16
    assert fit.report["network_evaluations"] == 3 * drawn + features
    assert len(fit.report["gain_of_features"]) == 2
    assert pipe.scheduler is before and network.training == trained and next(network.parameters()).requires_grad
    assert fit.report["is_fitted"] == (fit.scheduler.config.fitted_plan is not None)
    again = fit_scheduler(pipe, 3, images, **SMALL)
    assert {**again.report, "seconds": 0} == {**fit.report, "seconds": 0}


def test_samples_are_cut_off_where_the_data_are_pixels(network):
    """In the range of the pipeline, but not for latents, and not for data that lie elsewhere."""
    for data_min, scale, bounds in ((-1.0, 1.0, (-1.0, 1.0)), (0.0, 1.0, (0.0, 1.0)), (-1.0, 5.0, None)):
        pipe = quiet(SDEPipeline(network, VPSDEScheduler(), data_min=data_min))
        arguments = pipe, pipe.scheduler, 2, 1.0, None, None, PARTS, False, 8
        subject = DenoisedSubject(*arguments)
        images = scale * (data_min + (1.0 - data_min) * torch.rand(60, 1, 8, 8, generator=seeded()))
        assert _bounds_of_pixels(subject, images) == bounds
        subject.is_latent = True
        assert _bounds_of_pixels(subject, images) is None


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_steps_of_a_fit_alone_are_in_mixed_precision(network, precision):
    """What is chosen and reported are distances of the network as it is, and so are all features."""
    calls = []
    network.register_forward_pre_hook(
        lambda module, given: calls.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
    )
    images = torch.randint(0, 256, (60, 1, 8, 8), generator=seeded(), dtype=torch.uint8)
    pipe = SDEPipeline(network, VPSDEScheduler())
    fit = fit_scheduler(pipe, 3, images, mixed_precision=precision, **SMALL)
    assert fit.report["mixed_precision"] == precision
    assert set(calls) == {(True, precision == "bf16"), (True, False), (False, False)}
    same = fit_scheduler(pipe, 3, images, mixed_precision="no", **SMALL)
    assert fit.report["unfitted"] == same.report["unfitted"]
    default = fit_scheduler(pipe, 3, images, **SMALL)
    assert default.report["mixed_precision"] == ("bf16" if computes_in_bf16("cpu") else "no")


@pytest.mark.parametrize("stock", [False, True])
def test_a_flow_is_fitted_to_its_own_fine_solution(network, stock):
    pipe = (
        diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()) if stock else SDEPipeline(network, VPSDEScheduler())
    )
    fit = fit_scheduler(pipe, 2, sampler={"probability_flow": True}, teacher_steps=4, **SMALL)
    assert fit.report["objective"] == "paired" and fit.report["unfitted"] > 0
    assert fit.report["network_evaluations_of_teacher"] == 4 * (2 * 16 + 8 + 16)
    if fit.report["is_fitted"]:
        assert fit.report["fitted"] < fit.report["unfitted"]
        quiet(SDEPipeline(network, fit.scheduler))(num_inference_steps=2, generator=seeded())
    if stock:  # levels on whole timesteps
        fit.scheduler.set_timesteps(2)
        fed = fit.scheduler.timesteps
        assert torch.equal(fed, fed.round())


def test_guidance_is_fitted_with_its_scale():
    network = unet(num_class_embeds=4)
    pipe = quiet(ClassConditionalSDEPipeline(network, VPSDEScheduler(), null_class=3))
    fit = fit_scheduler(pipe, 2, guidance_scale=2.0, class_labels=[0, 2], teacher_steps=3, **SMALL)
    assert fit.report["guidance_scale"] == 2.0 and fit.report["target"] == "reverse SDE at 3 levels"
    with pytest.raises(ValueError, match="guidance_scale"):
        fit_scheduler(SDEPipeline(unet(), VPSDEScheduler()), 2, guidance_scale=2.0, teacher_steps=3, **SMALL)


def stable_diffusion(tmp_path):
    text = tiny_text(tmp_path)
    return quiet(
        diffusers.StableDiffusionPipeline(
            tiny_vae(),
            text.encoder,
            text.tokenizer,
            conditional_unet(cross_attention_dim=16),
            diffusers.DDIMScheduler(steps_offset=1, clip_sample=False, set_alpha_to_one=False),
            None,
            None,
            requires_safety_checker=False,
        )
    )


def test_any_other_pipeline_is_run_through_its_own_loop(tmp_path):
    pipe = stable_diffusion(tmp_path)
    small = {**SMALL, "steps": 1, "batch_size": 4, "held_out": 4}
    call = {"prompt": ["a", "b"], "guidance_scale": 3.0}
    fit = fit_scheduler(pipe, 2, call=call, sampler={"probability_flow": True}, teacher_steps=3, **small)
    assert not fit.report["gradients"] and fit.report["guidance_scale"] == 3.0
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
    pipe.scheduler = fit.scheduler
    pipe("a", num_inference_steps=2, output_type="latent")
    with pytest.raises(ValueError, match="call must be given"):
        fit_scheduler(pipe, 2, **small)
    with pytest.raises(ValueError, match="latents"):
        fit_scheduler(pipe, 2, call={"latents": None}, **small)


@pytest.mark.parametrize(
    "given, name",
    [
        ({"num_inference_steps": 1}, "num_inference_steps"),
        ({"objective": "fid"}, "objective"),
        ({"objective": "paired"}, "paired"),
        ({"sampler": {"policy": "exact"}}, "policy"),
        ({"parts": ["gird"]}, "parts"),
        ({"parts": "grid"}, "parts must be a list"),
        ({"parts": []}, "parts must name at least one of grid, "),
        ({"parts": ["corrector"]}, "parts must name"),
        ({"sampler": "probability_flow"}, "sampler must be"),
        ({"data": torch.zeros(60, 3, 8, 8)}, "data"),
        ({"data": torch.zeros(10, 1, 8, 8)}, "data"),
        ({"teacher_steps": 2}, "teacher_steps"),
        ({"class_labels": [1]}, "class_labels"),
        ({"seed": -1}, "seed"),
        ({"mixed_precision": "fp16"}, "mixed_precision"),
        ({"gradients": True, "call": {}}, "gradients"),
    ],
)
def test_other_arguments_are_refused(network, given, name):
    with pytest.raises(ValueError, match=name):
        fit_scheduler(SDEPipeline(network, VPSDEScheduler()), **{"num_inference_steps": 3, **SMALL, **given})


@pytest.mark.parametrize("pipe", [None, "outputs/digits", VPSDEScheduler()], ids=["None", "a folder", "a scheduler"])
def test_what_is_no_pipeline_is_refused(pipe):
    with pytest.raises(ValueError, match="pipe must be a pipeline with a scheduler"):
        fit_scheduler(pipe, 3)


def test_the_teacher_is_finer_than_many_levels(network):
    fit = fit_scheduler(
        SDEPipeline(network, VPSDEScheduler()), 52, **{**SMALL, "steps": 1, "held_out": 4, "batch_size": 2}
    )
    assert fit.report["target"].endswith("at 104 levels")


def test_a_saved_pipeline_is_fitted_from_the_command_line(network, tmp_path, capsys):
    SDEPipeline(network, VPSDEScheduler()).save_pretrained(tmp_path / "model")
    small = ["--steps", "2", "--batch_size", "8", "--held_out", "16", "--num_inference_steps", "2"]
    paths = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    fit_main([*paths, *small, "--dataset_name", "digits", "--num_images", "60", "--sampler", "corrector=langevin"])
    report = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert report["target"] == "data" and report["calls"] == 4 and "verdict" in capsys.readouterr().out
    loaded = SDEPipeline.from_pretrained(tmp_path / "out")
    assert (loaded.scheduler.config.fitted_plan is not None) == report["is_fitted"]
    with pytest.raises(SystemExit):
        fit_main([*paths[:2], "--output_dir", str(tmp_path / "model")])
    assert "--output_dir must be another folder" in capsys.readouterr().err


def test_a_saved_text_pipeline_is_fitted_with_its_prompts_from_the_command_line(tmp_path, capsys):
    stable_diffusion(tmp_path).save_pretrained(tmp_path / "model")
    paths = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    told = ["--prompts", "a", "b", "--guidance_scale", "3", "--sampler", "probability_flow=true"]
    small = ["--steps", "1", "--batch_size", "4", "--held_out", "4", "--num_inference_steps", "2"]
    fit_main([*paths, *told, *small, "--teacher_steps", "3"])
    report = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert report["guidance_scale"] == 3.0 and not report["gradients"]
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(loaded.scheduler, VPSDEScheduler)
    capsys.readouterr()
    for more, message in ((["--prompts", "a", "--dataset_name", "digits"], "--dataset_name"), ([], "prompts are for")):
        with pytest.raises(SystemExit):
            fit_main([*paths, *more, *small])
        assert message in capsys.readouterr().err


def test_images_of_the_sets_are_disjoint():
    parts = _split(torch.arange(100.0).reshape(100, 1), 0)
    seen = [set(part.flatten().tolist()) for part in parts.values()]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 100
    assert [len(part) for part in seen] == [60, 20, 20]


def test_captions_are_fitted_with_gradients(tmp_path):
    """What the fit draws is what the pipeline draws, caption by caption, with guidance."""
    text, network = tiny_text(tmp_path), conditional_unet(cross_attention_dim=16, in_channels=1, out_channels=1)
    pipe = quiet(
        TextSDEPipeline(network, VPSDEScheduler(), text.encoder, text.tokenizer, null_caption="", max_caption_length=8)
    )
    call = {"prompt": ["a", "b"], "guidance_scale": 3.0}
    flow = {"probability_flow": True}
    fit = fit_scheduler(pipe, 2, call=call, sampler=flow, teacher_steps=3, **SMALL)
    assert fit.report["gradients"] and fit.report["guidance_scale"] == 3.0
    pipe.scheduler = VPSDEScheduler(**flow)
    subject = DenoisedSubject(pipe, pipe.scheduler, 4, 1.0, None, call, (), False, 2)
    noise = torch.randn(3, *subject.shape, generator=seeded())
    batch = Batch(noise, noise, {"class_labels": torch.tensor([0, 1, 1])})
    times = pipe.scheduler.sampling_times(4)
    drawn = subject.draw(subject.family.base, times, batch, seeded())
    expected = pipe(["a", "b", "b"], guidance_scale=3.0, latents=noise, num_inference_steps=4, output_type="latent")
    torch.testing.assert_close(drawn, expected.images, rtol=1e-4, atol=1e-4)
    for given in ({**call, "output_type": "pt"}, {"guidance_scale": 3.0}, {"prompt": 3}):
        with pytest.raises(ValueError, match="prompt"):
            fit_scheduler(pipe, 2, call=given, teacher_steps=3, **SMALL)
    with pytest.raises(ValueError, match="put them into it"):
        fit_scheduler(pipe, 2, call=call, guidance_scale=2.0, teacher_steps=3, **SMALL)
