"""How good the samples are while training goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from ..generation import ImageSampler, Sampler, draw_images
from ..metrics import SampleQuality, make_extractor
from ..pipelines import SDEPipeline
from .configuration import TrainingConfig
from .data import ImageSource

REFERENCE = 10_000  # images, spread evenly over the data
CLASSIFIER = "classifier.safetensors"


class ProgressOfSamples:
    """Draws the same few samples every time and compares them with the data; torch's random state is left alone.

    Building it prepares the features of the data, so that whatever is missing is missed before training starts.

    Args:
        config: Of the run.
        source: The data.

    Raises:
        ValueError: Features that cannot be had.
    """

    def __init__(self, config: TrainingConfig, source: ImageSource) -> None:
        self._config, self._process = config, PartialState()
        if not self._process.is_main_process:
            return
        indices = np.unique(np.linspace(0, len(source) - 1, min(len(source), REFERENCE)).round().astype(int))
        images = torch.from_numpy(source.get_many(indices.tolist()))
        labels = None if source.labels is None else source.labels[torch.from_numpy(indices)]
        path = Path(config.output_dir) / CLASSIFIER
        extractor = make_extractor(config.eval_features, images, labels, path, device=self._process.device)
        self._quality = SampleQuality(images, extractor)

    def __call__(self, pipe: SDEPipeline) -> dict[str, float]:
        """The numbers, on the main process; to be called on all. See ``metrics.SampleQuality``."""
        config = self._config
        sampler = Sampler("evaluation", {"num_inference_steps": config.num_inference_steps})
        drawer = ImageSampler(pipe, sampler, config.seed)
        images, _ = draw_images(drawer, config.num_eval_images, config.eval_batch_size, self._process)
        return self._quality(images) if self._process.is_main_process else {}
