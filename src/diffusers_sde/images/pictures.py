"""Images side by side."""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor

SHOWN_SIDE = 64  # smaller images are enlarged to this side, in pixels
SHEET = 100  # number of images that ``sheet`` shows at most, where nothing else is asked for


def tile(rows: Tensor) -> Image.Image:
    """A picture of rows of images, each with a white frame.

    Args:
        rows: Bytes, shape (rows, columns, C, H, W).
    """
    framed = torch.nn.functional.pad(rows, (1, 1, 1, 1), value=255)
    pixels = torch.cat([torch.cat(list(row), -1) for row in framed], -2).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    scale = max(1, SHOWN_SIDE // rows.shape[-1])
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def sheet(images: Tensor, most: int = SHEET) -> Image.Image:
    """A picture of the first images in rows, with about as many rows as columns; places without an image are white.

    Args:
        images: Bytes, shape (N, C, H, W), N >= 1.
        most: Number of images that are shown at most.
    """
    images = images[:most]
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = images.new_full((rows * columns - len(images), *images.shape[1:]), 255)
    return tile(torch.cat([images, blank]).unflatten(0, (rows, columns)))
