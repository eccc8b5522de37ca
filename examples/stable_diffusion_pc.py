"""Stable Diffusion by predictor-corrector sampling, beside the reverse SDE and the scheduler that it came with.

python examples/stable_diffusion_pc.py --prompt "a lighthouse in a storm" --output lighthouse.png

All three get the same number of network calls and start from the same noise. A Langevin step costs one call, so that
predictor-corrector sampling has half as many noise levels. The picture has one column for each, in the order in which
their names are printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image

from diffusers_sde import VPSDEScheduler


def schedulers(config: dict) -> dict:
    """Ours for a network whose scheduler had this config, by name."""
    return {
        "reverse SDE": VPSDEScheduler.from_config(config),
        "predictor-corrector": VPSDEScheduler.from_config(config, corrector="langevin", snr=0.1),
    }


def draw(pipe: StableDiffusionPipeline, prompt: str, calls: int, seeds: Sequence[int]) -> dict[str, list[Image.Image]]:
    """Images of each scheduler, one for each seed."""
    stock, drawn = pipe.scheduler, {}
    for name, scheduler in {type(stock).__name__: stock, **schedulers(stock.config)}.items():
        pipe.scheduler = scheduler
        levels = calls // 2 if "corrector" in name else calls
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        drawn[name] = pipe([prompt] * len(seeds), num_inference_steps=levels, generator=generators).images
        print(f"{name}: {levels} levels, {len(scheduler.timesteps)} network calls")
    pipe.scheduler = stock
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="folder or Hub name")
    parser.add_argument("--prompt", default="a lighthouse in a storm")
    parser.add_argument("--calls", type=int, default=50, help="network calls of each sampler")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one row of the picture for each")
    parser.add_argument("--output", type=Path, default=Path("stable_diffusion_pc.png"))
    arguments = parser.parse_args(argv)
    pipe = StableDiffusionPipeline.from_pretrained(arguments.model)
    if torch.cuda.is_available():
        pipe.to("cuda", torch.float16)
    drawn = draw(pipe, arguments.prompt, arguments.calls, arguments.seeds)
    images = [image for row in zip(*drawn.values(), strict=True) for image in row]
    make_image_grid(images, rows=len(arguments.seeds), cols=len(drawn)).save(arguments.output)
    print(f"Look at {arguments.output}.")


if __name__ == "__main__":
    main()
