"""Feature extractors by name."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .classifier import STEPS, load_classifier, train_feature_classifier
from .features import FeatureExtractor, InceptionFeatures, PixelFeatures

FEATURES = ("classifier", "inception", "pixels")


def make_extractor(
    name: str | None,
    images: Tensor,
    labels: Tensor | None,
    path: Path | None = None,
    steps: int = STEPS,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> FeatureExtractor:
    """A feature extractor for some data.

    Args:
        name: ``classifier``, ``inception`` or ``pixels``; None for a classifier if there are labels, pixels otherwise.
        images: The data, bytes (N, C, H, W).
        labels: Their classes, shape (N,), or None.
        path: File of the classifier, which is trained and written there if it does not exist.
        steps: Optimiser steps with which a classifier is trained.
        seed: Seed of its weights and of the order of the images.
        device: The device that computes.

    Raises:
        ValueError: A classifier without labels, or of other data; or Inception cannot be had.
    """
    name = name or ("pixels" if labels is None else "classifier")
    if name == "pixels":
        return PixelFeatures()
    if name == "inception":
        return InceptionFeatures(device)
    if labels is None:
        raise ValueError("features 'classifier' need data with classes: take 'pixels' or 'inception'.")
    if path is not None and path.exists():
        return load_classifier(path, images, labels, device)
    classifier = train_feature_classifier(images, labels, steps, seed, device, progress_bar=True)
    if path is not None:
        classifier.save(path)
    return classifier
