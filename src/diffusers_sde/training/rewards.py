"""Rewards by name: a Python function that looks at images, or the classifier that ``train_classifier`` has trained."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..images.arrays import to_network
from ..networks.classifier import NoiseConditionalClassifier
from ..pipelines import ClassConditionalSDEPipeline, SDEPipeline

CLASSIFIER_REWARD = "classifier"
REWARD_INPUTS = ("pt", "pil")

Reward = Callable[[Tensor, "Tensor | None"], Tensor]
"""(images in [0, 1] of shape (B, C, H, W), what was asked for) -> rewards, float32, shape (B,).

What was asked for are classes, or numbers of prompts, int64 of shape (B,), or None.
"""


def load_reward(
    name: str,
    pipe: SDEPipeline,
    classifier: str | None = None,
    images_as: str = "pt",
    prompts: Sequence[str] | None = None,
) -> Reward:
    """The reward of this name.

    Args:
        name: ``package.module:function``, a function of a batch of images that returns one number for each; it is also
            given ``class_labels``, int64 of shape (B,), or ``prompts``, a list of B strings, if it has an argument of
            that name. Or ``classifier:CLASS``, the probability of a class by its number or name, and ``classifier``
            that of the class asked for.
        pipe: The pipeline whose images are rewarded.
        classifier: Folder or Hub name of the ``NoiseConditionalClassifier``.
        images_as: What a function gets: ``pt``, a tensor in [0, 1] of shape (B, C, H, W), or ``pil``, a list of images.
        prompts: What the numbers that a reward is told in the place of classes stand for; None for classes.

    Raises:
        ValueError: There is no such function or class, or a classifier is missing or does not fit.
    """
    kind, _, rest = name.partition(":")
    if kind == CLASSIFIER_REWARD:
        return _classifier_reward(name, rest, pipe, classifier)
    if classifier is not None:
        raise ValueError(f"reward_classifier has no effect on reward {name!r}: it is for 'classifier:CLASS'.")
    return _function_reward(name, pipe, images_as, prompts)


def _function_reward(name: str, pipe: SDEPipeline, images_as: str, prompts: Sequence[str] | None) -> Reward:
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"reward must be 'package.module:function', 'classifier:CLASS' or 'classifier', got {name!r}.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a script's own folder is there, the one that it was started in is not
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
        parameters = inspect.signature(found).parameters
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"reward {name!r} cannot be imported: {error}.") from error

    def reward(images: Tensor, labels: Tensor | None) -> Tensor:
        seen: Any = images if images_as == "pt" else pipe.image_processor.pt_to_numpy(images)
        seen = seen if images_as == "pt" else pipe.image_processor.numpy_to_pil(seen)
        told: dict[str, Any] = {"class_labels": labels if prompts is None else None, "prompts": None}
        if prompts is not None and labels is not None:
            told["prompts"] = [prompts[number] for number in labels.tolist()]
        values = found(seen, **{name: value for name, value in told.items() if name in parameters})
        return checked_rewards(values, len(images), name).to(images.device)

    return reward


def checked_rewards(values: Any, count: int, name: str) -> Tensor:
    """Rewards as float32, shape (B,).

    Raises:
        ValueError: There are not ``count`` finite numbers.
    """
    try:
        rewards = torch.as_tensor(values, dtype=torch.float32).detach().reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"reward {name!r} must return one number for each image, got {values!r}.") from error
    if len(rewards) != count or not bool(torch.isfinite(rewards).all()):
        raise ValueError(f"reward {name!r} must return {count} finite numbers, got {rewards.tolist()}.")
    return rewards


def _classifier_reward(name: str, wanted: str, pipe: SDEPipeline, path: str | None) -> Reward:
    if path is None:
        raise ValueError(f"reward {name!r} needs reward_classifier, what scripts/train_classifier.py has trained.")
    try:
        network = NoiseConditionalClassifier.from_pretrained(path).to(pipe.device).eval().requires_grad_(False)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"reward_classifier {path!r} cannot be loaded: {error}") from error
    config = network.config
    if tuple(pipe.sample_shape) != (config.in_channels, config.sample_size, config.sample_size):
        raise ValueError(
            f"reward_classifier {path!r} was trained on images of {config.in_channels} channels and side "
            f"{config.sample_size}, the model's have shape {tuple(pipe.sample_shape)}."
        )
    names = {str(label): int(number) for number, label in (config.id2label or {}).items()}
    number = names.get(wanted, int(wanted) if wanted.isdecimal() else None)
    if wanted and (number is None or number >= config.num_classes):
        known = ", ".join(names) or f"0 to {config.num_classes - 1}"
        raise ValueError(f"reward {name!r} must name one of the classifier's classes, {known}.")
    if not wanted and not isinstance(pipe, ClassConditionalSDEPipeline):
        raise ValueError("reward 'classifier' needs a class-conditional model: name a class, such as 'classifier:3'.")

    @torch.no_grad()
    def reward(images: Tensor, labels: Tensor | None) -> Tensor:
        asked = labels if number is None else torch.full((len(images),), number)
        assert asked is not None
        # Bytes, as an image is saved: what lies between them must not be rewarded.
        x = to_network((images * 255.0).round(), config.data_min, config.data_max).to(network.dtype)
        clean = torch.full((len(images),), config.highest_log_snr, device=images.device)
        logits = network(x, clean).float()
        return torch.softmax(logits, 1).gather(1, asked[:, None].to(logits.device))[:, 0]

    return reward
