"""One way for images between files, arrays and tensors: whatever a data set holds, bytes, and the network's range."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

GREY_MODES = ("1", "L")  # of what as_pil returns
DEEP_WHITE = 65535  # of grey images of more than 8 bits


def as_pil(value: Any, white: int | None) -> Image.Image:
    """Any image as a PIL image of mode 1, L or RGB. How bright it becomes does not depend on the image itself.

    Args:
        value: The image.
        white: Value of white in integer images of more than 8 bits; None for 65535.
    """
    if not isinstance(value, Image.Image):
        return _array_as_pil(np.asarray(value), white)
    image = ImageOps.exif_transpose(value)
    if image.mode == "F" or image.mode.startswith("I"):  # PIL's own conversion would clip these at 255
        pixels = np.asarray(image)
        deep = image.mode != "F"
        return _array_as_pil(_scaled(pixels, DEEP_WHITE if white is None else white) if deep else pixels, white)
    grey = image.mode in ("1", "L", "LA", "La") or (image.mode in ("P", "PA") and _has_grey_palette(image))
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:  # LAB's A is no alpha
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode in GREY_MODES:
        return image
    return image.convert("L" if grey else "RGB")


def _has_grey_palette(image: Image.Image) -> bool:
    """Whether all colours that an image takes from its palette are grey."""
    used = [index for index, count in enumerate(image.getchannel(0).histogram()) if count]
    palette = np.asarray(image.convert("P").getpalette("RGB") if image.mode == "PA" else image.getpalette("RGB"))
    colours = palette.reshape(-1, 3)
    colours = colours[[index for index in used if index < len(colours)]]
    return bool((colours == colours[:, :1]).all())


def _scaled(pixels: np.ndarray, white: int) -> np.ndarray:
    """Integers from 0 to ``white`` as floats in [0, 1]."""
    low, high = int(pixels.min(initial=0)), int(pixels.max(initial=0))
    if low < 0 or high > white:
        raise ValueError(f"integers of more than 8 bits must lie in 0..{white} (white_level), got {low} to {high}")
    return pixels / float(white)


def _array_as_pil(pixels: np.ndarray, white: int | None) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[-1] not in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] == 3)) or pixels.size == 0:
        raise ValueError(f"an array of shape (H, W), (H, W, 1 or 3) or (1 or 3, H, W) is needed, got {pixels.shape}.")
    # Integers of other types may be bytes that were counted in Python, unless it is said that they are not.
    if pixels.dtype == np.uint16 or (white is not None and pixels.dtype.kind in "iu" and pixels.dtype != np.uint8):
        pixels = _scaled(pixels, DEEP_WHITE if white is None else white)
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            raise ValueError("it has values that are not finite.")
        if pixels.min() < 0.0 or pixels.max() > 1.0:
            raise ValueError(f"floats must lie in [0, 1], got {pixels.min():g} to {pixels.max():g}.")
        pixels = np.rint(pixels * 255.0)
    elif pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(
            f"integers must lie in 0..255, or in 0..white_level where that is given, got {pixels.dtype} from "
            f"{pixels.min()} to {pixels.max()}."
        )
    return Image.fromarray(pixels.astype(np.uint8))


def to_network(images: Tensor, data_min: float, data_max: float = 1.0) -> Tensor:
    """Bytes as float32 in [data_min, data_max], the same shape."""
    return images.float() * ((data_max - data_min) / 255.0) + data_min


def to_bytes(x: Tensor, data_min: float, data_max: float = 1.0) -> Tensor:
    """Values in [data_min, data_max] as bytes on the CPU, the same shape; values outside are clamped."""
    return ((x - data_min) / (data_max - data_min)).clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8).cpu()
