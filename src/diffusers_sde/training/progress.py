"""The quality of the samples, measured while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from ..evaluation.samplers import ImageSampler, Sampler, draw_images
from ..images.samples import TrainingSource
from ..metrics import SampleQuality, make_extractor
from ..pipelines import SDEPipeline
from .configuration import TrainingConfig

REFERENCE = 10_000  # number of images to compare with, spread evenly over the data
CLASSIFIER = "classifier.safetensors"


class ProgressOfSamples:
    """Draws the same few samples every time and compares them with the data; torch's random state does not change.

    The features of the data are prepared when the object is built, so that it fails before training starts if something
    is missing.

    Args:
        config: The configuration of the run.
        source: The data.
        captions: What the samples show, in turn, for a network that is told captions; None for others.

    Raises:
        ValueError: The features cannot be computed.
    """

    def __init__(self, config: TrainingConfig, source: TrainingSource, captions: Sequence[str] | None = None) -> None:
        self._config, self._captions, self._process = config, captions, PartialState()
        if not self._process.is_main_process:
            return
        images, labels = source.spread(REFERENCE)
        labels = None if config.caption_column is not None else labels  # the numbers of captions are no classes
        path = Path(config.output_dir) / CLASSIFIER
        extractor = make_extractor(config.eval_features, images, labels, path, device=self._process.device)
        self._quality = SampleQuality(images, extractor)

    def __call__(self, pipe: SDEPipeline) -> dict[str, float]:
        """The numbers of ``metrics.SampleQuality``, on the main process. All processes must call it together."""
        config = self._config
        sampler = Sampler("evaluation", {"num_inference_steps": config.num_inference_steps})
        drawer = ImageSampler(pipe, sampler, config.seed, prompts=self._captions)
        images, _ = draw_images(drawer, config.num_eval_images, config.eval_batch_size, self._process)
        return self._quality(images) if self._process.is_main_process else {}
