"""A zoo of small trained networks, on which samplers are chosen and judged.

    python benchmarks/zoo.py --fashion path/to/fashion_mnist --cifar path/to/cifar10 --output outputs/zoo

trains the networks of RECIPES one after another, each in about a minute of one core, and skips those that are there.
They differ in data, size, SDE, prediction and length of training on purpose, and all of them are poor: how samplers
compare where a network errs is the question. Half of the recipes are **held out**: no setting may be chosen on them.

Three of them are trained the way others train: a plain loop around diffusers' DDPMScheduler, saved as a DDPMPipeline.
The folders of the data hold train.parquet and test.parquet with the columns image and label. The digits come with
scikit-learn, and the spots (one to four Gaussian spots on black, the number of them is the class) are drawn here.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

from diffusers_sde.images.loading import load_digits
from diffusers_sde.images.source import ImageSource
from diffusers_sde.training import TrainingConfig, train

SUBSET = 12_000  # images to train on, at most
JUDGED = 4_000  # images that judge, at most; for Fashion-MNIST and CIFAR-10 from the test set


@dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Attributes:
        data: ``digits``, ``fashion``, ``cifar`` or ``spots``.
        held_out: Whether no setting may be chosen on it.
        steps: Optimiser steps, of 64 images each.
        resolution: Side of the images.
        channels: 1 or 3.
        blocks: Channels for each level of the UNet.
        options: Options of ``scripts/train.py``; for networks of strangers, arguments of the DDPMScheduler.
        stranger: Whether it is trained by a plain loop around diffusers' DDPMScheduler.
        seed: Seed of the weights and of the order of the images.
    """

    data: str
    held_out: bool
    steps: int
    resolution: int = 8
    channels: int = 1
    blocks: tuple[int, ...] = (16, 32)
    options: dict[str, Any] = field(default_factory=dict)
    stranger: bool = False
    seed: int = 0


def _ours(sde: str, prediction: str) -> dict[str, Any]:
    return {"sde": sde, "prediction_type": prediction}


RECIPES: dict[str, Recipe] = {
    "digits-vp-epsilon": Recipe("digits", False, 1000, options=_ours("vp", "epsilon")),
    "digits-ve-edm": Recipe("digits", False, 500, options=_ours("ve", "edm")),
    "digits-ddpm": Recipe("digits", False, 800, stranger=True),
    "fashion-flow": Recipe("fashion", False, 900, options=_ours("flow", "flow_prediction")),
    "fashion-sub_vp-v": Recipe("fashion", False, 500, blocks=(24, 48), options=_ours("sub_vp", "v_prediction")),
    "fashion-ve-epsilon": Recipe("fashion", False, 900, options=_ours("ve", "epsilon")),
    "cifar-vp-v": Recipe("cifar", True, 1000, options=_ours("vp", "v_prediction")),
    "cifar-colour-ve-edm": Recipe("cifar", True, 1000, channels=3, options=_ours("ve", "edm")),
    "cifar-colour-ddpm-cosine": Recipe(
        "cifar",
        True,
        1000,
        channels=3,
        stranger=True,
        options={"beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
    ),
    "spots-vp-epsilon": Recipe("spots", True, 700, options=_ours("vp", "epsilon")),
    "spots-flow": Recipe("spots", True, 500, options=_ours("flow", "flow_prediction")),
    "spots-sub_vp-epsilon": Recipe("spots", True, 1200, options=_ours("sub_vp", "epsilon")),
    "fashion-12-ddpm": Recipe("fashion", True, 700, resolution=12, stranger=True, options={"clip_sample": False}),
    "cifar-16-ve-epsilon": Recipe("cifar", True, 900, 16, blocks=(16, 32, 32), options=_ours("ve", "epsilon")),
    # Not for choosing or judging a setting: other networks of the same data, for what is transferred between networks.
    "digits-ddpm-again": Recipe("digits", False, 800, stranger=True, seed=1),
}
TRANSFER = {"digits-ddpm-again": "digits-ddpm"}


def draw_spots(count: int, seed: int) -> datasets.Dataset:
    """Images of one to four Gaussian spots of different widths and heights on black, 16x16 bytes."""
    generator = np.random.default_rng(seed)
    grid = np.arange(16.0)
    images, labels = [], []
    for _ in range(count):
        label = int(generator.integers(4))
        image = np.zeros((16, 16))
        for _ in range(label + 1):
            x, y = generator.uniform(2.0, 13.0, 2)
            width, height = generator.uniform(0.9, 2.2), generator.uniform(0.4, 1.0)
            image += height * np.exp(-((grid[None] - x) ** 2 + (grid[:, None] - y) ** 2) / (2.0 * width**2))
        images.append(Image.fromarray(np.rint(255.0 * image.clip(0.0, 1.0)).astype(np.uint8)))
        labels.append(label)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


@dataclass(frozen=True)
class Folders:
    """Where the data lie that are not drawn here: folders with train.parquet and test.parquet."""

    fashion: Path
    cifar: Path

    def images(self, data: str, to_judge: bool) -> datasets.Dataset:
        """The images to train on or to judge with; the digits are few, so that all of them do both."""
        if data == "digits":
            return load_digits()
        if data == "spots":
            return draw_spots(JUDGED if to_judge else SUBSET, seed=1 if to_judge else 0)
        file = getattr(self, data) / ("test.parquet" if to_judge else "train.parquet")
        images = datasets.load_dataset("parquet", data_files=str(file), split="train")
        return images.select(range(min(len(images), JUDGED if to_judge else SUBSET)))

    def source(self, recipe: Recipe, to_judge: bool) -> ImageSource:
        """The same as the network sees them."""
        config = TrainingConfig(resolution=recipe.resolution, channels=recipe.channels, center_crop=True)
        return ImageSource(self.images(recipe.data, to_judge), config)


def all_of(source: ImageSource) -> tuple[Tensor, Tensor]:
    """Bytes, shape (N, C, H, W), and classes, shape (N,)."""
    return torch.from_numpy(source.get_many(range(len(source)))), torch.as_tensor(source.labels)


def train_ours(recipe: Recipe, folders: Folders, output: Path) -> None:
    """By the package's own training."""
    config = TrainingConfig(
        output_dir=str(output),
        overwrite_output_dir=True,
        resolution=recipe.resolution,
        channels=recipe.channels,
        block_out_channels=recipe.blocks,
        layers_per_block=1,
        attention_resolutions=(4,),
        max_train_steps=recipe.steps,
        learning_rate=2e-3,
        lr_warmup_steps=50,
        adam_beta2=0.99,
        checkpointing_steps=0,
        sample_every=0,
        logger="none",
        seed=recipe.seed,
        **recipe.options,
    )
    train(config, folders.images(recipe.data, to_judge=False))


def train_stranger(recipe: Recipe, folders: Folders, output: Path) -> None:
    """By the loop of diffusers' tutorial: MSE of epsilon at uniform timesteps, no average of the weights."""
    torch.manual_seed(recipe.seed)
    levels = len(recipe.blocks)
    network = UNet2DModel(
        sample_size=recipe.resolution,
        in_channels=recipe.channels,
        out_channels=recipe.channels,
        block_out_channels=recipe.blocks,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        norm_num_groups=8,
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000, **recipe.options)
    images = all_of(folders.source(recipe, to_judge=False))[0]
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    for _ in range(recipe.steps):
        clean = images[torch.randint(len(images), (64,))].float() / 127.5 - 1.0
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (len(clean),))
        with torch.autocast("cpu", torch.bfloat16):
            predicted = network(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        loss = (predicted.float() - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
    DDPMPipeline(network.eval(), scheduler).save_pretrained(output)


def add_folders(parser: argparse.ArgumentParser) -> None:
    """The options that say where the data lie."""
    parser.add_argument("--fashion", type=Path, default=Path("data/fashion_mnist"), help="folder of Fashion-MNIST")
    parser.add_argument("--cifar", type=Path, default=Path("data/cifar10"), help="folder of CIFAR-10")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    parser.add_argument("--only", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--output", type=Path, default=Path("outputs/zoo"))
    args = parser.parse_args()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for name in args.only:
        recipe, output = RECIPES[name], args.output / name
        if (output / "model_index.json").exists():
            continue
        began, cpu = time.perf_counter(), time.process_time()
        (train_stranger if recipe.stranger else train_ours)(recipe, Folders(args.fashion, args.cifar), output)
        print(f"{name}: {time.process_time() - cpu:.0f} s of a core, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
