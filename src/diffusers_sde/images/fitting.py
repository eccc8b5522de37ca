"""How any image becomes a square byte image of one size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .arrays import as_pil


def open_image(index: int, read: Callable[[], Any], white: int | None) -> Image.Image:
    """An image as a PIL image of mode 1, L or RGB.

    Args:
        index: Its number, for messages.
        read: Returns the image, whatever the data set holds.
        white: See ``as_pil``.

    Raises:
        ValueError: It cannot be read or used.
    """
    try:
        value = read()
        if value is None:
            raise ValueError("there is none")
        return as_pil(value, white)
    except Exception as error:  # whatever a decoder throws, the user needs to know which image
        raise ValueError(
            f"Image {index} of the data set cannot be used: {error} (skip_broken_images leaves such images out)."
        ) from error


@dataclass(frozen=True)
class ImageFormat:
    """Square byte images of one size, and how others are made so.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        resolution: Side in pixels.
        fixed_size: Whether images of another size are an error; otherwise they are scaled and cropped.
        center_crop: Whether crops are central; otherwise they are placed at random where there is a generator.
    """

    channels: int
    resolution: int
    fixed_size: bool
    center_crop: bool

    def check_size(self, index: int, image: Image.Image) -> None:
        """Raise a ValueError where an image does not have the size that all of them must have."""
        if self.fixed_size and image.size != (self.resolution, self.resolution):
            raise ValueError(
                f"Image {index} has {image.width}x{image.height} pixels, the first is {self.resolution} wide: images "
                "that are not square or differ in size need resolution (and center_crop, or are cropped at random)."
            )

    def fit(self, index: int, image: Image.Image, random: np.random.Generator | None) -> np.ndarray:
        """An image as bytes of shape (C, H, W); ``random`` places the crop unless cropping is central."""
        self.check_size(index, image)
        image = image.convert("L" if self.channels == 1 else "RGB")
        side = self.resolution
        if image.size != (side, side):
            scale = side / min(image.size)
            width, height = (max(side, round(length * scale)) for length in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            left, top = (width - side) // 2, (height - side) // 2
            if random is not None and not self.center_crop:
                left, top = int(random.integers(width - side + 1)), int(random.integers(height - side + 1))
            image = image.crop((left, top, left + side, top + side))
        pixels = np.asarray(image, dtype=np.uint8)
        return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
