"""A zoo of small trained networks, on which samplers are chosen and judged.

    python benchmarks/zoo.py --fashion path/to/fashion_mnist --cifar path/to/cifar10 --output outputs/zoo

trains the networks of RECIPES one after another, each in about a minute of one core, and skips those that are there.
They differ in data, size, SDE, prediction and length of training on purpose, and all of them are poor: how samplers
compare where a network errs is the question. Some of the recipes are **held out**: no setting may be chosen on them.
There are three rounds of these. Those of the first two have been looked at, so that later settings were chosen on them,
too.

Some of them are trained the way others train: a plain loop around diffusers' DDPMScheduler, saved as a DDPMPipeline.
The folders of the data hold train.parquet and test.parquet with the columns image and label. The digits come with
scikit-learn. Drawn here are spots (one to four Gaussian spots on black, the number of them is the class), bars (one to
four bright rectangles on grey, likewise), gratings (waves of random phase, the class is the direction), checkers
(checkerboards of two random colours, the class is the length of a square), glyphs (ten letters at random places), rings
(one to three circles), textures (random fields of four spectra) and strokes (lines of one to four pieces). Vehicles and
animals are classes of CIFAR-10, shoes are some of Fashion-MNIST, and negatives are Fashion-MNIST in inverted grey.
"""

from __future__ import annotations

import argparse
import functools
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image, ImageDraw, ImageFont, ImageOps
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
        data: ``digits``, ``fashion``, ``cifar``, ``negatives``, or a name in ``PARTS_OF`` or ``DRAWN``.
        held_out: 0 if settings are chosen on it, or else the round in which it was held out.
        steps: Optimiser steps, of 64 images each.
        resolution: Side of the images.
        channels: 1 or 3.
        blocks: Channels for each level of the UNet.
        options: Options of ``scripts/train.py``; for networks of strangers, arguments of the DDPMScheduler.
        stranger: Whether it is trained by a plain loop around diffusers' DDPMScheduler.
        seed: Seed of the weights and of the order of the images.
    """

    data: str
    held_out: int
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
    "digits-vp-epsilon": Recipe("digits", 0, 1000, options=_ours("vp", "epsilon")),
    "digits-ve-edm": Recipe("digits", 0, 500, options=_ours("ve", "edm")),
    "digits-ddpm": Recipe("digits", 0, 800, stranger=True),
    "fashion-flow": Recipe("fashion", 0, 900, options=_ours("flow", "flow_prediction")),
    "fashion-sub_vp-v": Recipe("fashion", 0, 500, blocks=(24, 48), options=_ours("sub_vp", "v_prediction")),
    "fashion-ve-epsilon": Recipe("fashion", 0, 900, options=_ours("ve", "epsilon")),
    "cifar-vp-v": Recipe("cifar", 1, 1000, options=_ours("vp", "v_prediction")),
    "cifar-colour-ve-edm": Recipe("cifar", 1, 1000, channels=3, options=_ours("ve", "edm")),
    "cifar-colour-ddpm-cosine": Recipe(
        "cifar",
        1,
        1000,
        channels=3,
        stranger=True,
        options={"beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
    ),
    "spots-vp-epsilon": Recipe("spots", 1, 700, options=_ours("vp", "epsilon")),
    "spots-flow": Recipe("spots", 1, 500, options=_ours("flow", "flow_prediction")),
    "spots-sub_vp-epsilon": Recipe("spots", 1, 1200, options=_ours("sub_vp", "epsilon")),
    "fashion-12-ddpm": Recipe("fashion", 1, 700, resolution=12, stranger=True, options={"clip_sample": False}),
    "cifar-16-ve-epsilon": Recipe("cifar", 1, 900, 16, blocks=(16, 32, 32), options=_ours("ve", "epsilon")),
    # The second round.
    "glyphs-vp-v": Recipe("glyphs", 2, 1000, options=_ours("vp", "v_prediction")),
    "gratings-vp-epsilon": Recipe("gratings", 2, 800, options=_ours("vp", "epsilon")),
    "checkers-ve-edm": Recipe("checkers", 2, 1000, channels=3, options=_ours("ve", "edm")),
    "vehicles-flow": Recipe("vehicles", 2, 1000, channels=3, options=_ours("flow", "flow_prediction")),
    "negatives-sub_vp-v": Recipe("negatives", 2, 800, options=_ours("sub_vp", "v_prediction")),
    "bars-ddpm": Recipe("bars", 2, 900, stranger=True),
    # The third round.
    "rings-vp-epsilon": Recipe("rings", 3, 900, options=_ours("vp", "epsilon")),
    "textures-ve-edm": Recipe("textures", 3, 900, options=_ours("ve", "edm")),
    "shoes-flow": Recipe("shoes", 3, 900, options=_ours("flow", "flow_prediction")),
    "strokes-sub_vp-epsilon": Recipe("strokes", 3, 1000, options=_ours("sub_vp", "epsilon")),
    "animals-vp-v": Recipe("animals", 3, 1000, channels=3, options=_ours("vp", "v_prediction")),
    "shoes-ddpm-cosine": Recipe(
        "shoes", 3, 900, stranger=True, options={"beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
    ),
    # Not for choosing or judging a setting: other networks of the same data, for what is transferred between networks.
    "digits-ddpm-again": Recipe("digits", 0, 800, stranger=True, seed=1),
}
TRANSFER = {"digits-ddpm-again": "digits-ddpm"}


SIDE = 16  # of the images that are drawn


def _spots(generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """Values in [0, 1], and the class."""
    label, image, grid = int(generator.integers(4)), np.zeros((SIDE, SIDE)), np.arange(float(SIDE))
    for _ in range(label + 1):
        x, y = generator.uniform(2.0, 13.0, 2)
        width, height = generator.uniform(0.9, 2.2), generator.uniform(0.4, 1.0)
        image += height * np.exp(-((grid[None] - x) ** 2 + (grid[:, None] - y) ** 2) / (2.0 * width**2))
    return image, label


def _bars(generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """As ``_spots``."""
    label, image = int(generator.integers(4)), np.full((SIDE, SIDE), generator.uniform(0.1, 0.4))
    for _ in range(label + 1):
        (x, y), (width, height) = generator.integers(0, SIDE - 4, 2), generator.integers(3, 9, 2)
        image[y : y + height, x : x + width] = generator.uniform(0.6, 1.0)
    return image, label


def _gratings(generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """As ``_spots``."""
    label, (y, x) = int(generator.integers(6)), np.mgrid[:SIDE, :SIDE]
    angle = np.pi * (label + generator.uniform(-0.3, 0.3)) / 6.0
    wave = 2.0 * np.pi / generator.uniform(7.0, 14.0) * (x * np.cos(angle) + y * np.sin(angle))
    return 0.5 + generator.uniform(0.25, 0.5) * np.sin(wave + generator.uniform(0.0, 2.0 * np.pi)), label


def _checkers(generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """As ``_spots``, in colour."""
    label = int(generator.integers(3))
    side, (y, x) = (4, 6, 8)[label], np.mgrid[:SIDE, :SIDE]
    a, b = generator.integers(0, 2 * side, 2)
    is_odd = ((x + a) // side + (y + b) // side) % 2
    return generator.uniform(0.0, 1.0, (2, 3))[is_odd], label


def _glyphs(generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """As ``_spots``."""
    label, image = int(generator.integers(10)), Image.new("L", (SIDE, SIDE), 0)
    place = tuple(int(n) for n in generator.integers([2, 0], [7, 5]))
    ImageDraw.Draw(image).text(place, "ABCEFHKLMX"[label], fill=int(generator.integers(150, 256)), font=_font())
    return np.asarray(image) / 255.0, label


def _rings(generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """As ``_spots``."""
    label, image, (y, x) = int(generator.integers(3)), np.zeros((SIDE, SIDE)), np.mgrid[:SIDE, :SIDE]
    for _ in range(label + 1):
        (a, b), radius = generator.uniform(4.0, 11.0, 2), generator.uniform(2.0, 5.0)
        ring = np.exp(-((np.hypot(x - a, y - b) - radius) ** 2) / 0.8)
        image = np.maximum(image, generator.uniform(0.5, 1.0) * ring)
    return image, label


def _textures(generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """As ``_spots``: random fields whose spectrum falls as a power of the frequency, which is the class."""
    label, frequencies = int(generator.integers(4)), np.fft.fftfreq(SIDE)
    size = np.hypot(frequencies[:, None], frequencies[None])
    size[0, 0] = 1.0
    field = np.fft.ifft2(np.fft.fft2(generator.standard_normal((SIDE, SIDE))) * size ** -(0.5 + 0.6 * label)).real
    return generator.uniform(0.3, 0.7) + 0.15 * (field - field.mean()) / field.std(), label


def _strokes(generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """As ``_spots``: lines of one to four pieces on grey."""
    label, image = int(generator.integers(4)), Image.new("L", (SIDE, SIDE), int(generator.integers(60, 120)))
    points = [tuple(int(n) for n in generator.integers(1, SIDE - 1, 2)) for _ in range(label + 2)]
    ImageDraw.Draw(image).line(points, fill=int(generator.choice([0, 255])), width=2)
    return np.asarray(image) / 255.0, label


@functools.cache
def _font() -> Any:
    return ImageFont.load_default()


DRAWN = {
    "spots": _spots,
    "bars": _bars,
    "gratings": _gratings,
    "checkers": _checkers,
    "glyphs": _glyphs,
    "rings": _rings,
    "textures": _textures,
    "strokes": _strokes,
}
# Some classes of a data set.
PARTS_OF = {
    "vehicles": ("cifar", (0, 1, 8, 9)),
    "animals": ("cifar", (2, 3, 4, 5, 6, 7)),
    "shoes": ("fashion", (5, 7, 9)),
}


def drawn(data: str, count: int, seed: int) -> datasets.Dataset:
    """Images of one of ``DRAWN``, bytes, and their classes."""
    generator = np.random.default_rng(seed)
    pairs = [DRAWN[data](generator) for _ in range(count)]
    images = [Image.fromarray(np.rint(255.0 * image.clip(0.0, 1.0)).astype(np.uint8)) for image, _ in pairs]
    labels = [label for _, label in pairs]
    kind = datasets.ClassLabel(num_classes=max(labels) + 1)
    features = datasets.Features({"image": datasets.Image(), "label": kind})
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
        count = JUDGED if to_judge else SUBSET
        if data in DRAWN:
            return drawn(data, count, seed=1 if to_judge else 0)
        whole, classes = PARTS_OF.get(data, (data, ()))
        folder = self.fashion if whole in ("fashion", "negatives") else self.cifar
        file = folder / ("test.parquet" if to_judge else "train.parquet")
        images = datasets.load_dataset("parquet", data_files=str(file), split="train")
        if classes:
            rows = np.flatnonzero(np.isin(images["label"], classes))
            images = images.select(rows[:count])
            new = datasets.Features({**images.features, "label": datasets.ClassLabel(num_classes=len(classes))})
            return images.map(lambda row: {"label": classes.index(row["label"])}, features=new)
        images = images.select(range(min(len(images), count)))
        if data == "negatives":
            images = images.map(lambda row: {"image": ImageOps.invert(row["image"].convert("L"))})
        return images

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
