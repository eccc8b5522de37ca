"""Fill a hole in a photograph with a model that was trained on nothing but whole images.

accelerate launch scripts/train.py --train_data_dir path/to/photographs --resolution 64 --output_dir outputs/photographs
python examples/inpaint_photograph.py --model outputs/photographs --image photograph.jpg --hole 0.3 0.3 0.7 0.7

Bayes' rule adds to the score of the model that of the known pixels, so that the network needs no training for holes.
The photograph is cut to a square and brought to the size of the network. The picture has the photograph, the photograph
with its hole, and completions that are different answers to one question.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps

from diffusers_sde import InpaintSDEPipeline


def fitted(photograph: Image.Image, pipe: InpaintSDEPipeline) -> Image.Image:
    """The photograph as the network sees images: upright, of its size, in grey if it knows no colours."""
    channels, height, width = pipe.image_shape
    mode = {1: "L", 3: "RGB"}[channels]
    return ImageOps.fit(ImageOps.exif_transpose(photograph).convert(mode), (width, height), Image.Resampling.LANCZOS)


def hole_mask(size: tuple[int, int], hole: Sequence[float]) -> Image.Image:
    """White where to paint; ``hole`` is left, top, right and bottom, as parts of the sides."""
    mask = Image.new("L", size)
    mask.paste(255, tuple(round(part * side) for part, side in zip(hole, size * 2, strict=True)))
    return mask


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/photographs", help="folder or Hub name of a pipeline on pixels")
    parser.add_argument("--image", type=Path, required=True, help="the photograph")
    parser.add_argument("--hole", type=float, nargs=4, default=[0.3, 0.3, 0.7, 0.7], help="left top right bottom")
    parser.add_argument("--posterior", default="pigdm", help="method, such as pigdm, mmps, repaint or replacement")
    parser.add_argument("--count", type=int, default=6, help="completions")
    parser.add_argument("--levels", type=int, default=100, help="noise levels")
    parser.add_argument("--output", type=Path, default=Path("inpaint_photograph.png"))
    arguments = parser.parse_args(argv)
    pipe = InpaintSDEPipeline.from_pretrained(arguments.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    with Image.open(arguments.image) as photograph:
        image = fitted(photograph, pipe)
    mask = hole_mask(image.size, arguments.hole)
    completions = pipe(
        image,
        mask,
        posterior=arguments.posterior,
        num_samples=arguments.count,
        num_inference_steps=arguments.levels,
        generator=[torch.Generator().manual_seed(seed) for seed in range(arguments.count)],
    ).images
    with_hole = image.copy()
    with_hole.paste("grey", mask=mask)
    shown = [ImageOps.expand(each, 1, "white") for each in (image, with_hole, *completions)]
    make_image_grid(shown, rows=1, cols=len(shown)).save(arguments.output)
    print(f"Look at {arguments.output}.")


if __name__ == "__main__":
    main()
