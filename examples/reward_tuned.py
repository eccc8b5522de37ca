"""A model that learns from a reward: a Python function of images, and no data.

python examples/reward_tuned.py --model outputs/demo --output outputs/slender

The reward here is how little ink a digit needs, as long as it keeps some; write your own below. Each round draws images
by a stochastic sampler, rewards them, and makes the steps towards better images likelier. Rewards are taken literally:
watch the sheet for what yours has forgotten, and raise --kl_weight to stay closer to the model at the start. The
picture has samples before in the upper half, and after in the lower, from the same noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps
from torch import Tensor

from diffusers_sde import SDEPipeline
from diffusers_sde.training.policy_configuration import PolicyTrainingConfig
from diffusers_sde.training.rl import train_policy


def slender(images: Tensor, class_labels: Tensor | None = None) -> Tensor:
    """The reward: minus the distance of the mean grey value from 0.2; that of digits is 0.31 on average.

    Args:
        images: In [0, 1], shape (B, C, H, W).
        class_labels: Of a model that knows classes, shape (B,).

    Returns:
        One number for each image, shape (B,).
    """
    return -(images.mean((1, 2, 3)) - 0.2).abs()


def samples(pipe: SDEPipeline, count: int, levels: int) -> list[Image.Image]:
    """Images in frames, from the same noise for every pipeline."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    images = pipe(batch_size=count, num_inference_steps=levels, generator=generators).images
    return [ImageOps.expand(image.resize((64, 64)), 2, "white") for image in images]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/demo", help="folder or Hub name of a pipeline")
    parser.add_argument("--output", type=Path, default=Path("outputs/slender"), help="folder of the new pipeline")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--group_size", type=int, default=16, help="images whose rewards are compared")
    parser.add_argument("--levels", type=int, default=8, help="noise levels of the images that are rewarded")
    parser.add_argument("--kl_weight", type=float, default=0.02, help="what keeps the model near its start")
    arguments = parser.parse_args(argv)
    before = samples(SDEPipeline.from_pretrained(arguments.model), 16, arguments.levels)
    config = PolicyTrainingConfig(
        model=arguments.model,
        reward="examples:slender",  # a name for the log; the function itself is handed over below
        output_dir=str(arguments.output),
        max_train_steps=arguments.rounds,
        group_size=arguments.group_size,
        num_inference_steps=arguments.levels,
        stochastic_indices=(0, arguments.levels // 2 + 1),  # noise in the first steps, where it decides most
        kl_weight=arguments.kl_weight,
        learning_rate=3e-4,
        overwrite_output_dir=True,
        logger="none",
    )
    train_policy(config, slender)
    after = samples(SDEPipeline.from_pretrained(arguments.output), 16, arguments.levels)
    picture = arguments.output / "before_and_after.png"
    make_image_grid([*before, *after], rows=4, cols=8).save(picture)
    print(f"Look at {picture}.")


if __name__ == "__main__":
    main()
