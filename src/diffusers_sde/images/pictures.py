"""Images side by side."""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor

SHOWN_SIDE = 64  # smaller images are enlarged to this side, in pixels
SHEET = 100  # number of images that ``sheet`` shows at most


def tile(rows: Tensor) -> Image.Image:
    """A picture of rows of images.

    Args:
        rows: Bytes, shape (rows, columns, C, H, W).
    """
    framed = torch.nn.functional.pad(rows, (1, 1, 1, 1), value=255)
    pixels = torch.cat([torch.cat(list(row), -1) for row in framed], -2).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    scale = max(1, SHOWN_SIDE // rows.shape[-1])
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def sheet(images: Tensor) -> Image.Image:
    """A picture of the first images in a square.

    Args:
        images: Bytes, shape (N, C, H, W).
    """
    side = max(1, math.isqrt(min(len(images), SHEET)))
    return tile(images[: side * side].unflatten(0, (side, side)))
