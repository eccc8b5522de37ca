"""Write what a version saves, small, and the samples that it gives: data for tests of later versions.

``python tests/write_saved.py tests/data/saved_by_<version>`` is run once, with the version that is to be remembered
installed: what is saved states the version of the installed package.
The samples are those of settings whose numbers are meant to stay: order and stochasticity are given, the levels are
the saved config's own. The code that a saved folder carries is left out: the tests are of configs and weights, which
the package reads by itself, and it is 140 kB for a scheduler and 350 kB for a pipeline.
"""

import json
import sys
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file

import diffusers_sde

NAMES = ("VESDEScheduler", "VPSDEScheduler", "SubVPSDEScheduler", "FlowSDEScheduler")
OPTIONS = {
    "default": {},
    "predictor_corrector": {
        "predictor": "reverse_diffusion",
        "corrector": "langevin",
        "stochasticity": 1.0,
        "time_grid": "uniform",
    },
    "ode": {"probability_flow": True, "solver_order": 2},
}
# What is given on loading, where the saved config leaves it to the sampler.
GIVEN = (
    {"solver_order": 1, "stochasticity": 1.0},
    {"solver_order": 2, "stochasticity": 0.5},
    {"solver_order": 2, "probability_flow": True},
)
LEVELS = 5
STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
TRAINING = {
    "dataset_name": "digits",
    "block_out_channels": (4,),
    "layers_per_block": 1,
    "train_batch_size": 4,
    "learning_rate": 0.01,
    "max_train_steps": 3,
    "lr_warmup_steps": 0,
    "checkpointing_steps": 2,
    "sample_every": 0,
    "logger": "none",
    "mixed_precision": "no",
}


def schedulers():
    """(name, scheduler) of everything that is saved."""
    for name in NAMES:
        for kind, options in OPTIONS.items():
            yield f"{name}/{kind}", getattr(diffusers_sde, name)(**options)
    stock = diffusers.DDIMScheduler(**STABLE_DIFFUSION)
    yield "VPSDEScheduler/from_ddim", diffusers_sde.VPSDEScheduler.from_config(stock.config)
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    yield "FlowSDEScheduler/from_flow_match_euler", diffusers_sde.FlowSDEScheduler.from_config(stock.config)


def sample(scheduler):
    """Four numbers from a closed form in place of a network, which sees both the state and its time."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(LEVELS)
    x = torch.randn(1, 1, 2, 2, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        state = scheduler.scale_model_input(x, t)
        if scheduler.config.prediction_type == "score":  # of VE, which is fed sigma
            output = (torch.tanh(state) - state) / (t * t + 0.25)
        else:
            output = state - torch.exp(-t / 200.0) * torch.sin(2.0 * state)
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x.flatten().tolist()


def pipelines():
    """(name, pipeline, arguments of its call) of everything that is saved."""

    def unet(**options):
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=4,
            in_channels=1,
            out_channels=1,
            block_out_channels=(2,),
            layers_per_block=1,
            norm_num_groups=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            add_attention=False,
            **options,
        ).eval()

    yield (
        "SDEPipeline",
        diffusers_sde.SDEPipeline(
            unet(),
            diffusers_sde.VPSDEScheduler(prediction_type="v_prediction", solver_order=2, stochasticity=1.0),
        ),
        {},
    )
    yield (
        "ClassConditionalSDEPipeline",
        diffusers_sde.ClassConditionalSDEPipeline(
            unet(num_class_embeds=3),
            diffusers_sde.FlowSDEScheduler(solver_order=2, probability_flow=True),
            data_min=0.0,
            id2label={0: "zero", 1: "one"},
            null_class=2,
        ),
        {"class_labels": ["one"], "guidance_scale": 2.0},
    )


def draw(pipeline, arguments):
    """One image in the range of the network, as a list."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(**arguments, num_inference_steps=LEVELS, generator=generator, output_type="latent").images
    return images.flatten().tolist()


def trained_weights(output_dir):
    """A few of the averaged weights that a run has saved at its end, of the first and the last layer."""
    weights = load_file(Path(output_dir) / "unet" / "diffusion_pytorch_model.safetensors")
    return [w for name in ("conv_in.weight", "conv_out.weight") for w in weights[name].flatten()[:6].tolist()]


def main(target):
    from diffusers_sde.training import TrainingConfig, train

    samples = {"schedulers": [], "pipelines": []}
    for name, scheduler in schedulers():
        scheduler.save_pretrained(target / "schedulers" / name)
        for given in GIVEN if name.endswith(("default", "euler", "ddim")) else ({},):
            cls = type(scheduler)
            values = sample(cls.from_pretrained(target / "schedulers" / name, **given))
            samples["schedulers"].append({"name": name, "given": given, "sample": values})
    for name, pipeline, arguments in pipelines():
        pipeline.save_pretrained(target / "pipelines" / name)
        samples["pipelines"].append({"name": name, "arguments": arguments, "sample": draw(pipeline, arguments)})
    run = target / "run"
    train(TrainingConfig(output_dir=str(run), **TRAINING))
    samples["trained_weights"] = trained_weights(run)
    # What is left is what a run has saved that was stopped after its first checkpoint.
    for path in sorted(run.rglob("*"), reverse=True):
        kept = "checkpoint-2" in path.parts or path.name in ("training_config.json", "checkpoint-2")
        if not kept:
            path.rmdir() if path.is_dir() else path.unlink()
    config = json.loads((run / "training_config.json").read_text()) | {"output_dir": "run"}
    (run / "training_config.json").write_text(json.dumps(config, indent=2) + "\n")
    for code in target.rglob("*.py"):
        code.unlink()
    (target / "samples.json").write_text(json.dumps(samples, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
