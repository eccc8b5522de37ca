"""What the ways to learn from rewards have in common: images are drawn, and each gives several rows to learn from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor

from ..evaluation.samplers import generator_of
from ..pipelines import SDEPipeline
from .adapters import without_adapter
from .policy_configuration import PolicyTrainingConfig


class Reference:
    """The network that a run has started from.

    Args:
        pipe: A pipeline with that network, or, with an adapter, with the network that learns.
        accelerator: It says in which precision the network computes.
        adapted: Whether the network that learns has an adapter: without it, it is the one that the run started from.
    """

    def __init__(self, pipe: SDEPipeline, accelerator: Accelerator, adapted: bool) -> None:
        self._pipe, self._accelerator, self._adapted = pipe, accelerator, adapted

    @property
    def network(self) -> Any:
        """The network that is called: with an adapter, the one that learns."""
        return self._pipe.unet

    @contextmanager
    def pipeline(self) -> Iterator[SDEPipeline]:
        """The pipeline with that network, for calls without gradients within this context."""
        network = without_adapter(self._pipe.unet) if self._adapted else nullcontext()
        with torch.no_grad(), self._accelerator.autocast(), network:
            yield self._pipe


class RewardMethod(ABC):
    """A way to change a network by rewards.

    Args:
        config: The options of the run.
        pipe: The pipeline that draws the images, with the network that learns.
        reference: The network that the run has started from.
    """

    learns_from_average: ClassVar[bool]
    """Whether images are drawn, and compared, by the averaged weights where an average is kept."""
    statistics: ClassVar[tuple[str, ...]]
    """The names of what is logged of the rows."""

    def __init__(self, config: PolicyTrainingConfig, pipe: SDEPipeline, reference: Reference) -> None:
        self.config, self.pipe, self.reference = config, pipe, reference

    @abstractmethod
    def count_steps(self) -> int:
        """How many rows there are to learn from for each image, before ``trained_steps`` are drawn from them."""

    @abstractmethod
    def draw(self, numbers: range, first: int, labels: list[int] | None) -> tuple[Any, Tensor]:
        """Draw images.

        Args:
            numbers: Their numbers in the round.
            first: Number of the first image of the round in the run: the noise of an image follows from the two.
            labels: The class of each, or the number of its prompt; None for a model without both.

        Returns:
            What there is to learn from, whose length is the number of rows for each image, and the images in [0, 1],
            shape (B, C, H, W).
        """

    @abstractmethod
    def losses(self, drawn: Any, steps: Tensor, images: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of rows, to be minimised.

        Args:
            drawn: What ``draw`` returned.
            steps: Which of its rows, int64, shape (n,).
            images: Of which of its images, int64, shape (n,).
            advantages: The advantage of that image, shape (n,).

        Returns:
            The losses, shape (n,), and without gradients the sums of what ``statistics`` names.
        """


def arguments_of_images(config: PolicyTrainingConfig, numbers: range, first: int, labels: list[int] | None) -> Any:
    """What a pipeline is called with for images of a round; see ``RewardMethod.draw``."""
    arguments: dict[str, Any] = {"batch_size": len(numbers)}
    if labels is not None and config.prompts is not None:
        arguments = {"prompt": [config.prompts[number] for number in labels], "guidance_scale": config.guidance_scale}
    elif labels is not None:
        arguments = {"class_labels": labels, "guidance_scale": config.guidance_scale}
    generators = [generator_of(config.seed, first + number) for number in numbers]
    return arguments | {"num_inference_steps": config.num_inference_steps, "generator": generators}
