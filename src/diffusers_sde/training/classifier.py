"""Training of a classifier of noisy images, on the data, the SDE and the loop of the denoiser's training."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor

from ..images.arrays import to_network
from ..images.loading import load_images
from ..images.source import ImageSource
from ..networks.classifier import NoiseConditionalClassifier, classifier_logits, trained_log_snr
from ..sdes import expand_like
from .checkpoints import save_model
from .configuration import ClassifierTrainingConfig
from .networks import checked_classes, network_from_config, unet_sizes
from .run import TrainingRun

logger = logging.getLogger(__name__)

TESTED_RATIOS = (0.1, 0.3, 1.0, 3.0)  # sigma/alpha


class ClassifierTrainer(TrainingRun):
    """One training run of a ``NoiseConditionalClassifier``: cross-entropy at the denoiser's training times.

    Args:
        config: What to train on what, and how.
        dataset: Images with classes, instead of those that ``config`` names; an ``IterableDataset`` is streamed.
        test_dataset: Images with classes to measure the accuracy on, instead of those of ``config.test_split``.

    Raises:
        ValueError: Anything wrong with the configuration, the data or the output folder.
    """

    config: ClassifierTrainingConfig

    def __init__(
        self,
        config: ClassifierTrainingConfig,
        dataset: datasets.Dataset | datasets.IterableDataset | None = None,
        test_dataset: datasets.Dataset | None = None,
    ) -> None:
        super().__init__(config, dataset)
        if test_dataset is None and config.test_split is not None:
            test_dataset = load_images(replace(config, dataset_split=config.test_split, streaming=False))
        source = self.source
        same = replace(config, resolution=source.resolution, channels=source.channels, center_crop=True)
        self.test_source = None if test_dataset is None else ImageSource(test_dataset, same)
        if self.test_source is not None and self.test_source.class_names != source.class_names:
            raise ValueError("test_split must have the classes of the training images.")

    def _build_network(self) -> NoiseConditionalClassifier:
        config, source = self.config, self.source
        classes, path = checked_classes(source), config.model_config_name_or_path
        # The classifier is the encoder of a denoiser of these sizes.
        sizes = (
            unet_sizes(config, source) if path is None else network_from_config(UNet2DModel, path, source, None).config
        )
        with torch.device("cpu"):  # numbers are wanted even where the network is only sketched
            low, high = trained_log_snr(self.sde)
        return NoiseConditionalClassifier(
            sample_size=source.resolution,
            in_channels=source.channels,
            num_classes=classes,
            down_block_types=tuple(sizes["down_block_types"]),
            block_out_channels=tuple(sizes["block_out_channels"]),
            layers_per_block=sizes["layers_per_block"],
            attention_head_dim=sizes["attention_head_dim"],
            norm_num_groups=sizes["norm_num_groups"],
            dropout=sizes["dropout"],
            data_min=config.data_min,
            lowest_log_snr=low,
            highest_log_snr=high,
            id2label={str(number): name for number, name in enumerate(source.class_names)},
        )

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of each sample of a batch from ``TrainingSamples``, in nats, shape (B,)."""
        x0, eps, t = self._inputs(batch)
        labels = batch["labels"].to(x0.device, non_blocking=True)
        return F.cross_entropy(self._logits(self.model, x0, eps, t), labels, reduction="none")

    def _logits(self, network: Any, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (expand_like(v, x0).to(x0) for v in (self.sde.alpha(t), self.sde.sigma(t)))
        return classifier_logits(network, self.sde, alpha * x0 + sigma * eps, t).float()

    def _save_result(self) -> NoiseConditionalClassifier:
        with self._averaged_weights() as classifier:
            if self.step >= self.max_steps and self.test_source is not None:
                self._measure(classifier, self.test_source)
            result = NoiseConditionalClassifier.from_config(classifier.config).to(self.accelerator.device)
            result.load_state_dict(classifier.state_dict())
            if self.accelerator.is_main_process:
                save_model(result, self.output_dir)
        self.accelerator.wait_for_everyone()
        return result.eval()

    @torch.no_grad()
    def _measure(self, classifier: NoiseConditionalClassifier, source: ImageSource) -> None:
        """Log the accuracy at some noise levels."""
        device, generator, accuracies = self.accelerator.device, torch.Generator().manual_seed(self.config.seed), {}
        labels = source.labels
        assert labels is not None
        for ratio in TESTED_RATIOS:
            t, right = self.sde.time_of(-2.0 * torch.tensor(ratio, dtype=torch.float64).log()), 0
            for first in range(0, len(source), self.config.train_batch_size):
                part = range(first, min(first + self.config.train_batch_size, len(source)))
                x0 = to_network(torch.from_numpy(source.get_many(part)), self.config.data_min)
                eps = torch.randn(x0.shape, generator=generator)
                logits = self._logits(classifier, x0.to(device), eps.to(device), t)
                right += int((logits.argmax(1).cpu() == labels[list(part)]).sum())
            accuracies[f"accuracy/{ratio:g}"] = right / len(source)
        self.accelerator.log(accuracies, step=self.step)
        shown = ", ".join(f"{v:.1%} at {name.split('/')[1]}" for name, v in accuracies.items())
        logger.info("Accuracy on %d test images by noise sigma/alpha: %s.", len(source), shown)

    def _identity(self) -> dict[str, Any]:
        own = {"label_dropout": 0.0, "network": "classifier", "classes": self.source.class_names}
        return super()._identity() | own

    def _task(self) -> str:
        return f"tells {len(self.source.class_names)} classes apart"


def train_classifier(
    config: ClassifierTrainingConfig,
    dataset: datasets.Dataset | datasets.IterableDataset | None = None,
    test_dataset: datasets.Dataset | None = None,
) -> NoiseConditionalClassifier:
    """Train a classifier of noisy images and save it; arguments as in ``ClassifierTrainer``.

    Returns:
        The classifier, as it was saved in ``config.output_dir``.

    Raises:
        ValueError: Anything wrong with the configuration, the data or the output folder, before training starts.
        RuntimeError: The loss is not finite any more; the last checkpoint is kept.
    """
    return ClassifierTrainer(config, dataset, test_dataset).run()
