"""The numbers about one set of images against another."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .distances import NEIGHBOURS, frechet_distance, inception_score, kernel_distance, precision_recall
from .features import FeatureExtractor

MOST_PAIRED = 10_000  # images of precision and recall, which compare each with each


class SampleQuality:
    """Compares sets of images with a reference, whose features are computed once.

    Args:
        reference: Bytes, shape (M, C, H, W).
        extractor: Features and, for the inception score and the class accuracy, logits.
        batch_size: Images in one call of the extractor.
        progress_bar: Whether to show a progress bar while features are computed.

    Raises:
        ValueError: Too few images.
    """

    def __init__(
        self, reference: Tensor, extractor: FeatureExtractor, batch_size: int = 256, progress_bar: bool = False
    ) -> None:
        self._extractor, self._batch_size, self._progress_bar = extractor, batch_size, progress_bar
        _check_count("reference", reference)
        self.reference, _ = self.features(reference, "Features of the data")

    @property
    def dimensions(self) -> int:
        """Length of a feature vector."""
        return self.reference.shape[1]

    def features(self, images: Tensor, title: str = "Features") -> tuple[Tensor, Tensor | None]:
        """Features of images, shape (N, D), and their logits, shape (N, classes), if the extractor has any."""
        parts = tqdm(images.split(self._batch_size), desc=title, disable=not self._progress_bar, leave=False)
        results = [self._extractor(part) for part in parts]
        logits = [row for _, row in results if row is not None]
        return torch.cat([row for row, _ in results]), torch.cat(logits) if logits else None

    def __call__(self, images: Tensor, labels: Tensor | None = None) -> dict[str, float]:
        """The numbers about a set of images.

        Args:
            images: Bytes, shape (N, C, H, W).
            labels: Classes that the images were asked for, shape (N,); for a classifier of the same classes only.

        Returns:
            By name, where <f> is the extractor's: ``FD-<f>``, ``KID-<f>`` and ``KID-<f>_std``, ``precision`` and
            ``recall``, and if there are logits ``IS-<f>`` and ``IS-<f>_std``; with Inception these are ``FID``, ``KID``
            and ``IS``. ``class_accuracy`` where labels are given.
        """
        _check_count("images", images)
        features, logits = self.features(images)
        name = self._extractor.name
        inception = name == "inception"
        suffix = "" if inception else f"-{name}"
        result = {"FID" if inception else f"FD-{name}": frechet_distance(features, self.reference)}
        result[f"KID{suffix}"], result[f"KID{suffix}_std"] = kernel_distance(features, self.reference)
        if logits is not None:
            result[f"IS{suffix}"], result[f"IS{suffix}_std"] = inception_score(logits)
        pairs = min(len(features), len(self.reference), MOST_PAIRED)
        result["precision"], result["recall"] = precision_recall(spread(features, pairs), spread(self.reference, pairs))
        if labels is not None and logits is not None:
            result["class_accuracy"] = float((logits.argmax(1) == labels).double().mean())
        return result


def spread(rows: Tensor, count: int) -> Tensor:
    """``count`` rows, spread evenly over all."""
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]


def _check_count(name: str, images: Tensor) -> None:
    if len(images) <= NEIGHBOURS + 1:
        raise ValueError(f"{name} must be more than {NEIGHBOURS + 1} images, got {len(images)}.")
