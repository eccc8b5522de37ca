"""Stable Diffusion 3 by a reverse SDE: a rectified flow has one too, with the same distribution at every time.

python examples/sd3_reverse_sde.py --prompt "a lighthouse in a storm" --output lighthouse.png

The picture has a row for each noise level in --stochasticity: 0 is the probability-flow ODE, for which the network was
trained, and 1 the reverse SDE. "default" takes as much noise as the length of each step allows. All rows start from
the same noise. SD3's pipeline hands no generator to its scheduler, so the noise on the way comes from
torch.manual_seed. The weights need an account on the Hub that has accepted their licence.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import make_image_grid
from PIL import Image

from diffusers_sde import FlowSDEScheduler


def draw(
    pipe: StableDiffusion3Pipeline, prompt: str, stochasticity: float | None, levels: int, count: int, **size: int
) -> list[Image.Image]:
    """Images of one prompt, by the sampler with so much noise on the way; None for the default."""
    pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler.config, stochasticity=stochasticity)
    torch.manual_seed(0)
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return pipe([prompt] * count, num_inference_steps=levels, generator=generators, **size).images


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stabilityai/stable-diffusion-3-medium-diffusers", help="folder or Hub name")
    parser.add_argument("--prompt", default="a lighthouse in a storm")
    parser.add_argument("--stochasticity", nargs="+", default=["0", "default", "1"], help="one row for each")
    parser.add_argument("--levels", type=int, default=28, help="noise levels, and network calls of each image")
    parser.add_argument("--count", type=int, default=3, help="images of each row")
    parser.add_argument("--size", type=int, default=1024, help="height and width in pixels")
    parser.add_argument("--without_t5", action="store_true", help="leave out the largest text encoder")
    parser.add_argument("--output", type=Path, default=Path("sd3_reverse_sde.png"))
    arguments = parser.parse_args(argv)
    t5 = {"text_encoder_3": None, "tokenizer_3": None} if arguments.without_t5 else {}
    pipe = StableDiffusion3Pipeline.from_pretrained(arguments.model, **t5)
    if torch.cuda.is_available():
        pipe.to("cuda", torch.float16)
    images = []
    for word in arguments.stochasticity:
        stochasticity = None if word == "default" else float(word)
        size = {"height": arguments.size, "width": arguments.size}
        images += draw(pipe, arguments.prompt, stochasticity, arguments.levels, arguments.count, **size)
    make_image_grid(images, rows=len(arguments.stochasticity), cols=arguments.count).save(arguments.output)
    print(f"Look at {arguments.output}.")


if __name__ == "__main__":
    main()
