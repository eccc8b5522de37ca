"""Stock schedulers in the pipelines of this package: those that fit run, the others are refused before any work."""

import inspect

import diffusers
import pytest
import torch
from tiny_networks import tiny_unet

from diffusers_sde import FlowSDEScheduler, InpaintSDEPipeline, RestorationSDEPipeline, SDEPipeline
from diffusers_sde.schedulers import SCHEDULERS

FLOW = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "LTXEulerAncestralRFScheduler"]
FLOW_OF_SOLVERS = ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler"]
OTHERS = [
    *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"),
    *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "UnCLIPScheduler"),
    *("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"),
    *("SASolverScheduler", "UniPCMultistepScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"),
]
CASES = [
    *((name, {}) for name in FLOW + OTHERS),
    *((name, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}) for name in FLOW_OF_SOLVERS),
]


def pipeline(scheduler, cls=SDEPipeline):
    pipe = cls(tiny_unet(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise():
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_hand(unet, scheduler, x, steps):
    """The loop as each stock scheduler's own pipelines write it."""
    scheduler.set_timesteps(steps)
    x, generator = x * getattr(scheduler, "init_noise_sigma", 1.0), torch.Generator().manual_seed(2)
    parameters = inspect.signature(scheduler.step).parameters
    for i, t in enumerate(scheduler.timesteps):
        fed = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        arguments = {"generator": generator} if "generator" in parameters else {}
        if "prev_timestep" in parameters:
            arguments["prev_timestep"] = scheduler.timesteps[i + 1] if i + 1 < len(scheduler.timesteps) else None
        x = scheduler.step(unet(fed, t).sample, t, x, **arguments).prev_sample
    return x


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=[f"{n}-{'flow' if a else 'own'}" for n, a in CASES])
def test_a_stock_scheduler_that_fits_runs_as_in_its_own_pipelines(name, arguments):
    if name == "UnCLIPScheduler":
        arguments = {"clip_sample": False}
    scheduler = getattr(diffusers, name)(**arguments)
    pipe = pipeline(scheduler)
    out = pipe(latents=noise(), num_inference_steps=4, generator=torch.Generator().manual_seed(2), output_type="latent")
    expected = by_hand(pipe.unet, type(scheduler).from_config(scheduler.config), noise(), 4)
    assert bool(torch.isfinite(out.images).all())
    torch.testing.assert_close(out.images, expected)
    assert pipe.num_timesteps == len(scheduler.timesteps)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_stock_flow_scheduler_is_the_ode_of_ours(shift):
    ours = FlowSDEScheduler(
        shift=shift, time_grid="uniform", sampling_eps=1e-3, probability_flow=True, solver_order=1,
        solver_correction=False, gaussian_std=0.0,
    )  # fmt: skip
    pipe = pipeline(ours)
    arguments = {"latents": noise(), "num_inference_steps": 5, "output_type": "latent"}
    expected = pipe(**arguments).images
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    assert pipe.scheduler.config.shift == shift
    torch.testing.assert_close(pipe(**arguments).images, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ScoreSdeVeScheduler", "RePaintScheduler"])
def test_a_stock_scheduler_that_steps_in_another_way_is_refused_at_once(name):
    pipe = pipeline(getattr(diffusers, name)())
    with pytest.raises(ValueError, match=r"cannot run: .*Convert it by (VE|VP)SDEScheduler\.from_config") as error:
        pipe(num_inference_steps=3)
    advised = str(error.value).split("Convert it by ")[1].split(".")[0]
    pipe.scheduler = SCHEDULERS[advised].from_config(pipe.scheduler.config)
    assert pipe(num_inference_steps=3, output_type="pt").images.shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("name", "advised"),
    [
        ("DDPMScheduler", "VPSDEScheduler"),
        ("FlowMatchEulerDiscreteScheduler", "FlowSDEScheduler"),
        ("EDMEulerScheduler", "VESDEScheduler"),
    ],
)
def test_conditional_pipelines_name_the_class_that_they_need_instead(name, advised):
    scheduler = getattr(diffusers, name)()
    for cls, arguments in (
        (InpaintSDEPipeline, {"mask_image": torch.ones(8, 8)}),
        (RestorationSDEPipeline, {"operator": torch.nn.Identity(), "noise_std": 0.1}),
    ):
        with pytest.raises(ValueError, match=rf"convert it by {advised}\.from_config"):
            pipeline(scheduler, cls)(torch.zeros(1, 1, 8, 8), **arguments)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "DDIMScheduler"])
def test_the_methods_of_the_probability_flow_take_stock_schedulers(name):
    pipe = pipeline(getattr(diffusers, name)())
    out = pipe(latents=noise(), method="ode", rtol=0.1, atol=0.1, output_type="latent").images
    assert bool(torch.isfinite(out).all())


def test_a_flow_map_is_no_flow_even_in_memory():
    pipe = pipeline(diffusers.FlowMapEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="flow map"):
        pipe.encode(torch.zeros(1, 1, 8, 8))
