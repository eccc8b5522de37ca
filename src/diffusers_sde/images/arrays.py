"""One way for images between PIL, arrays and tensors, and between bytes and the network's range."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..basics.checks import check_tensor

GREY_MODES = ("1", "L")  # of what as_pil returns
DEEP_WHITE = 65535  # of grey images of more than 8 bits
DARKEST_WHITE = 64  # a mask of bytes whose largest is below this is not dark, but holds labels


def as_pil(value: Any, white: int | None) -> Image.Image:
    """Return any image as a PIL image of mode 1, L or RGB. How bright it becomes does not depend on the image itself.

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
    """Tell whether all colours that an image takes from its palette are grey."""
    used = [index for index, count in enumerate(image.getchannel(0).histogram()) if count]
    palette = np.asarray(image.convert("P").getpalette("RGB") if image.mode == "PA" else image.getpalette("RGB"))
    colours = palette.reshape(-1, 3)
    colours = colours[[index for index in used if index < len(colours)]]
    return bool((colours == colours[:, :1]).all())


def _scaled(pixels: np.ndarray, white: int) -> np.ndarray:
    """Return integers from 0 to ``white`` as floats in [0, 1]."""
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


def as_batch(images: Any, name: str = "images") -> Tensor:
    """Return PIL images or an array as a tensor (B, C, H, W); the values, and tensors, are left as they are.

    Args:
        images: One PIL image or a list of them, an array (B, H, W) or (B, H, W, C), or a tensor.
        name: Name of the argument, for messages.

    Raises:
        ValueError: Something else, or PIL images of different sizes or of modes other than L and RGB.
    """
    if isinstance(images, Tensor):
        return images
    if isinstance(images, Image.Image):
        images = [images]
    if _are_pil(images):
        if len({(image.size, image.mode) for image in images}) > 1 or images[0].mode not in ("L", "RGB"):
            raise ValueError(
                f"{name} must all have one size and mode, L or RGB, got "
                f"{sorted({f'{i.size[0]}x{i.size[1]} {i.mode}' for i in images})}."
            )
        images = np.stack([np.asarray(image) for image in images])
    if not isinstance(images, np.ndarray):
        raise ValueError(f"{name} must be PIL images, an array or a tensor, got {type(images).__name__}.")
    if images.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold numbers, got {images.dtype}.")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise ValueError(f"{name} as an array must have shape (B, H, W) or (B, H, W, C), got {images.shape}.")
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def as_hole(mask: Any, name: str = "mask_image") -> Tensor:
    """Return a mask that is white where to paint as a boolean tensor, (B, 1 or C, H, W), that is True there.

    Args:
        mask: PIL images, arrays (H, W), (B, H, W) or (B, H, W, C), or tensors (H, W), (B, H, W) or (B, C, H, W), of
            booleans, bytes, or numbers in [0, 1]. Grey is cut at one half.
        name: Name of the argument, for messages.

    Raises:
        ValueError: Something else, or labels, or a mask whose shape is in its alpha channel.
    """
    if isinstance(mask, Image.Image):
        mask = [mask]
    if _are_pil(mask):
        if len({m.size for m in mask}) > 1:
            raise ValueError(f"{name} must all have one size, got {sorted({m.size for m in mask})}.")
        mask = np.stack([_grey_mask(m, name) for m in mask])
    if isinstance(mask, np.ndarray):
        if mask.dtype.kind not in "biuf":
            raise ValueError(f"{name} must hold booleans or numbers, got an array of {mask.dtype}.")
        mask = mask[..., 0] if mask.ndim == 3 and mask.shape[2] == 1 else mask
        mask = mask[None] if mask.ndim == 2 else mask
        mask = mask[..., None] if mask.ndim == 3 else mask
        if mask.ndim != 4:
            raise ValueError(f"{name} must have shape (H, W), (B, H, W) or (B, H, W, C), got {mask.shape}.")
        mask = torch.from_numpy(mask.transpose(0, 3, 1, 2).copy())
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name} must be PIL images, an array or a tensor, got {type(mask).__name__}.")
    mask = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    check_tensor(name, mask, (None,) * 4)
    if mask.dtype == torch.bool:
        return mask
    largest = mask.max()
    if mask.dtype == torch.uint8 and largest > 1:
        if largest < DARKEST_WHITE:
            raise ValueError(
                f"{name} must be white (255) where to paint, got nothing above {int(largest)}: were these labels, "
                f"pass such as {name} == 2."
            )
        return mask >= 128
    if not bool((mask >= 0).all()) or largest > 1:
        raise ValueError(f"{name} must be boolean, uint8, or numbers in [0, 1].")
    return mask >= 0.5


def _are_pil(images: Any) -> bool:
    """Tell whether this is a list of PIL images, with at least one."""
    return isinstance(images, (list, tuple)) and len(images) > 0 and all(isinstance(i, Image.Image) for i in images)


def _grey_mask(mask: Image.Image, name: str) -> np.ndarray:
    """Return a PIL image as grey bytes, shape (H, W)."""
    grey = np.asarray(mask.convert("L"))
    alpha = np.asarray(mask.convert("RGBA"))[..., 3]
    if alpha.min() < alpha.max() and grey.min() == grey.max():
        raise ValueError(
            f"{name} ({mask.mode}) must be white where to paint, but only its alpha channel has a shape: pass "
            f"{name}.getchannel('A'), or its inverse."
        )
    return grey


def to_network(images: Tensor, data_min: float, data_max: float = 1.0) -> Tensor:
    """Map integers 0..255 to float32 in [data_min, data_max], same shape: data_min + (data_max - data_min) k / 255."""
    return images.float() * ((data_max - data_min) / 255.0) + data_min


def in_network_range(images: Tensor, data_min: float, data_max: float, name: str = "images") -> Tensor:
    """Scale integers 0..255 by ``to_network``; floating-point data are taken to be in the network's range already.

    Raises:
        ValueError: Integers outside 0..255, or values that are no numbers.
    """
    if images.is_floating_point():
        return images
    if images.dtype == torch.bool or images.is_complex():
        raise ValueError(f"{name} must hold integers in 0..255 or floating-point numbers, got {images.dtype}.")
    if images.dtype != torch.uint8 and not bool(((images >= 0) & (images <= 255)).all()):
        raise ValueError(
            f"{name}: integers must lie in 0..255, got values from {int(images.min())} to {int(images.max())}."
        )
    return to_network(images, data_min, data_max)


def from_network(x: Tensor, data_min: float, data_max: float) -> Tensor:
    """Map the network's range [data_min, data_max] to [0, 1], same shape, and cut off what lies outside it."""
    return ((x - data_min) / (data_max - data_min)).clamp(0.0, 1.0)


def to_bytes(x: Tensor, data_min: float, data_max: float = 1.0) -> Tensor:
    """Map the network's range to bytes on the CPU, the same shape; what lies outside it is cut off."""
    return from_network(x, data_min, data_max).mul(255.0).round().to(torch.uint8).cpu()
