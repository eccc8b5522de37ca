"""A small classifier of the data's own classes, whose features stand in where Inception's cannot be had.

Numbers made with it compare models evaluated with the same file, and nothing else: they are called FD-classifier, not
FID.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..basics.files import saving, write_whole

WIDTHS = (32, 64, 128)
LARGEST = 32  # pixels; larger images are averaged down
STEPS, BATCH, LEARNING_RATE = 1500, 128, 3e-3
HELD_OUT = 10  # every tenth image measures the accuracy


class ClassifierNetwork(nn.Module):
    """Three convolutions of stride 2, the mean over the image, and a linear layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in WIDTHS:
            layers += [nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features, shape (B, 128), and logits, shape (B, classes), of bytes (B, C, H, W)."""
        x = images.float() / 127.5 - 1.0
        if x.shape[-1] > LARGEST:
            x = nn.functional.interpolate(x, (LARGEST, LARGEST), mode="area")
        features = self.body(x)
        return features, self.head(features)


class ClassifierFeatures:
    """A trained classifier as a feature extractor.

    Args:
        network: The network, in evaluation mode.
        accuracy: On images that it was not trained on.
        data: Fingerprint of the data it was trained on.
    """

    name = "classifier"

    def __init__(self, network: ClassifierNetwork, accuracy: float, data: str) -> None:
        self.network, self.accuracy, self.data = network.eval().requires_grad_(False), accuracy, data

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features, shape (B, 128), and logits, shape (B, classes)."""
        device = next(self.network.parameters()).device
        features, logits = self.network(images.to(device))
        return features.cpu(), logits.cpu()

    def save(self, path: Path) -> None:
        """Write a safetensors file: whole or not at all.

        Raises:
            SaveError: It cannot be written.
        """
        state = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        metadata = {"accuracy": json.dumps(self.accuracy), "data": self.data}
        with saving("The classifier", path.parent):
            write_whole(path, partial(save_file, state, metadata=metadata))


def data_fingerprint(images: Tensor, labels: Tensor) -> str:
    """A hash of labelled images."""
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    digest.update(images.contiguous().numpy().tobytes())
    digest.update(labels.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_classifier(
    path: Path, images: Tensor, labels: Tensor, device: torch.device | str = "cpu"
) -> ClassifierFeatures:
    """A classifier written by ``ClassifierFeatures.save``.

    Args:
        path: The file.
        images: What it must have been trained on, bytes (N, C, H, W).
        labels: Their classes, shape (N,).
        device: The device that computes.

    Raises:
        ValueError: The file is no such classifier, or one of other data.
    """
    data = data_fingerprint(images, labels)
    try:
        with safe_open(path, "pt") as file:
            metadata, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        network = ClassifierNetwork(state["body.0.weight"].shape[1], len(state["head.bias"]))
        network.load_state_dict(state)
        trained_on, accuracy = metadata["data"], float(json.loads(metadata["accuracy"]))
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"classifier {str(path)!r} cannot be read: {error}") from error
    if trained_on != data:
        raise ValueError(
            f"classifier {str(path)!r} was trained on other images: delete it or name another file, and compare only "
            "numbers of one classifier."
        )
    return ClassifierFeatures(network.to(device), accuracy, data)


def train_feature_classifier(
    images: Tensor,
    labels: Tensor,
    steps: int = STEPS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress_bar: bool = False,
) -> ClassifierFeatures:
    """Train a classifier; torch's global random state is left as it was.

    Args:
        images: Bytes, shape (N, C, H, W).
        labels: Classes, shape (N,).
        steps: Optimiser steps of 128 images.
        seed: Seed of the weights and of the order of the images.
        device: The device that trains.
        progress_bar: Whether to show a progress bar.

    Raises:
        ValueError: Fewer than two classes, or labels that do not match.
    """
    if len(labels) != len(images) or int(labels.min()) < 0 or len(labels.unique()) < 2:
        raise ValueError("a classifier needs one class >= 0 for each image, and at least two classes.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ClassifierNetwork(images.shape[1], int(labels.max()) + 1).to(device)
    held_out = torch.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    mine, generator = torch.where(~held_out)[0], torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in tqdm(range(steps), desc="Training the classifier", disable=not progress_bar, leave=False):
        chosen = mine[torch.randint(len(mine), (BATCH,), generator=generator)]
        _, logits = network(images[chosen].to(device))
        loss = nn.functional.cross_entropy(logits, labels[chosen].to(device), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    result = ClassifierFeatures(network, float("nan"), data_fingerprint(images, labels))
    if bool(held_out.any()):
        parts = zip(images[held_out].split(1024), labels[held_out].split(1024), strict=True)
        right = [(result(part)[1].argmax(1) == truth) for part, truth in parts]
        result.accuracy = float(torch.cat(right).double().mean())
    return result
