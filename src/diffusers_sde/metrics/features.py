"""What is compared about images: their pixels, or what Inception sees in them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

PIXEL_FEATURES = 1024  # at most: a Frechet distance needs more images than features, and costs their cube


class FeatureExtractor(Protocol):
    """(images: bytes (B, C, H, W)) -> features (B, D) and class logits (B, classes) or None, both float32.

    Attributes:
        name: How metrics are called that are computed from them: "FD-<name>".
    """

    name: str

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and logits."""
        ...


class PixelFeatures:
    """Pixels in [0, 1], averaged over squares until there are at most 1024 of them."""

    name = "pixels"

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        """Pixels, shape (B, D)."""
        x = images.float() / 255.0
        while x[0].numel() > PIXEL_FEATURES:
            x = torch.nn.functional.avg_pool2d(x, 2)
        return x.flatten(1), None


class InceptionFeatures:
    """The Inception network of the FID and of the Inception score, from torch-fidelity, with its downloaded weights.

    Args:
        device: The device that computes.

    Raises:
        ValueError: torch-fidelity is not installed, or the weights cannot be had.
    """

    name = "inception"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError as error:
            raise ValueError(
                f"features 'inception' need torch-fidelity ({error}): pip install torch-fidelity, or take features "
                "'classifier' or 'pixels'."
            ) from error
        try:
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        except OSError as error:
            folder = f"{torch.hub.get_dir()}/checkpoints"
            raise ValueError(
                f"features 'inception' need weights that cannot be downloaded ({error}): put {URL_INCEPTION_V3} into "
                f"{folder}, or take features 'classifier' or 'pixels'."
            ) from error
        self._network, self._device = network.to(device), device

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features, shape (B, 2048), and unbiased logits, shape (B, 1008)."""
        with torch.no_grad():
            features, logits = self._network(images.expand(-1, 3, -1, -1).contiguous().to(self._device))
        return features.float().cpu(), logits.float().cpu()
