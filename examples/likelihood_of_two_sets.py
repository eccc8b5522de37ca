"""Watch likelihood tell two sets of images apart: those like the training data, and others.

python examples/likelihood_of_two_sets.py --model outputs/demo   # digits, and digits upside down
python examples/likelihood_of_two_sets.py --model outputs/images --known test/ --other elsewhere/   # your own

The probability-flow ODE gives the bits per dimension of each image. Printed are the means with their standard errors,
and how often an image of the other set costs more bits than one of the known set: 0.5 says that the sets cannot be told
apart. Below 0.5 is possible: densities are high where images are simple, so that plain strokes are likelier than most
digits to a model of digits (compare Nalisnick et al. 2019, arXiv:1810.09136). Try --other strokes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from diffusers_sde import SDEPipeline

TRAINED_ON = 1700  # the digits that `make demo` trains on are those before


def images_of(name: str, count: int, shape: tuple[int, ...]) -> list[Image.Image]:
    """Images of a folder, or ``digits`` that the demo has not seen, or these ``upside_down``, or plain ``strokes``."""
    if name == "strokes":
        images = [Image.new("L", (8, 8)) for _ in range(count)]
        for i, image in enumerate(images):
            image.paste(160 + 7 * i % 96, (2 + i % 3, 0, 4 + i % 3, 8))
        return images
    if name in ("digits", "upside_down"):
        digits = (load_digits().images[TRAINED_ON:][:count] * 255 / 16).round().astype("uint8")
        images = [Image.fromarray(digit) for digit in digits]
        return [ImageOps.flip(image) for image in images] if name == "upside_down" else images
    paths = sorted(path for path in Path(name).iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    mode, size = "L" if shape[0] == 1 else "RGB", (shape[2], shape[1])
    return [ImageOps.fit(Image.open(path).convert(mode), size) for path in paths[:count]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/demo", help="folder or Hub name of a pipeline on pixels")
    parser.add_argument("--known", default="digits", help="a folder of images, or digits")
    parser.add_argument("--other", default="upside_down", help="a folder of images, upside_down or strokes")
    parser.add_argument("--count", type=int, default=97, help="images of each set")
    parser.add_argument("--output", type=Path, default=Path("likelihood_of_two_sets.png"))
    arguments = parser.parse_args(argv)
    pipe = SDEPipeline.from_pretrained(arguments.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    bits = {}
    for name in (arguments.known, arguments.other):
        images = images_of(name, arguments.count, pipe.image_shape)
        result = pipe.bits_per_dim(images, generator=torch.Generator().manual_seed(0))
        bits[name] = result.per_image.cpu()
        print(f"{name}: {result.mean:.3f} +- {result.standard_error:.3f} bits per dimension, {len(images)} images")
        plt.hist(bits[name].numpy(), bins=20, alpha=0.6, label=name)
    known, other = bits.values()
    above = (other[:, None] > known).double().mean()
    print(f"An image of {arguments.other} costs more bits than one of {arguments.known} in {above:.1%} of the pairs.")
    plt.xlabel("bits per dimension")
    plt.legend()
    plt.savefig(arguments.output, dpi=110)
    print(f"Look at {arguments.output}.")


if __name__ == "__main__":
    main()
