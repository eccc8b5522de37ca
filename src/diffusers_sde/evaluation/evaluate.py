"""Measure a saved pipeline: its samplers against data, its likelihood, its latent codes.

``evaluate`` returns, and writes to ``results.json``, a dictionary of JSON values:

- ``model``, ``sde``: the pipeline, and its SDE in words; ``seed``.
- ``data``: ``name``, ``split`` and ``images`` of the reference; ``test_split`` and ``test_images``, or None; and
  ``caption_column`` where samples are asked for captions of the data.
- ``num_samples``: images drawn by each sampler; the following three exist where it is not 0.
- ``features``: ``name`` (``classifier``, ``inception`` or ``pixels``) and ``dimensions``; for a classifier ``accuracy``
  on images that it was not trained on, and ``data``, the fingerprint of those that it was.
- ``samplers``: a list, one entry for each sampler: ``label``; ``options``, what was changed about the pipeline's own;
  ``calls_per_image``, network calls, counted; ``metrics``, see ``metrics.SampleQuality``; and ``nearest``, about the
  distance of up to 1000 samples to the nearest reference image (root mean square difference of pixels in [0, 1]):
  ``median``, ``one_percent`` (quantile), and ``share_below``, the share of samples nearer than the baseline's
  ``one_percent``: 0.01 is what new images would have, much more means copies of the training data.
- ``baseline``: ``label``, and ``metrics`` and ``nearest`` of real images: of as many as there are samples from the test
  split. Without one it is the reference's own images, of which only ``nearest`` (among the others) is known.
- ``bits_per_dim``, where asked for: ``mean``, ``standard_error``, ``images``, ``split``, ``given_class`` (true for a
  class-conditional network), the settings, and ``per_image``.
- ``latent_bits_per_dim`` in its place where the network works on the latents of an autoencoder: the density of the
  latents, -log2 p / d, as the network sees them. It is no number of bits per pixel.
- ``figure``, where asked for: ``path``, and ``round_trip_rms``, the error of images rebuilt from their codes.

``report.eval_results`` turns it into entries of a model card, ``report.markdown_table`` into a table.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..basics.files import saving, write_whole
from ..basics.processes import lock_for_all
from ..images.pictures import sheet, tile
from ..metrics import ClassifierFeatures, SampleQuality, make_extractor, nearest_neighbours
from ..metrics.quality import spread
from ..pipelines import ClassConditionalSDEPipeline, ProbabilityFlow
from ..shipping.cards import too_few_samples
from .codes import draw_codes, measured_bits_per_dim, measured_latent_bits
from .configuration import EvaluationConfig
from .data import AskedImages, Images, asked_of_data, data_name, read_images
from .report import markdown_table, warning_of_few_samples
from .samplers import ImageSampler, Sampler, as_sde_pipeline, draw_images, launched_processes, load_pipeline

logger = logging.getLogger(__name__)

NEAREST_IMAGES = 1000  # at most this many images have their nearest neighbours looked for
NEAREST_SHOWN, NEIGHBOURS_SHOWN = 12, 4


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Evaluate a pipeline.

    Under ``accelerate launch`` samples and images are divided among the processes; no number depends on the division.

    Returns:
        The results, the same on every process; see the module's docstring.

    Raises:
        ValueError: The arguments, the data or the pipeline are bad, which is found before anything is drawn. It is a
            ``FolderInUse`` if another run is writing to the output folder.
        OSError: The output folder cannot be written.
    """
    process = launched_processes()
    if config.output_dir is None:
        return _evaluate(config, process)
    with lock_for_all(Path(config.output_dir), process):
        return _evaluate(config, process)


def _evaluate(config: EvaluationConfig, process: PartialState) -> dict[str, Any]:
    with process.main_process_first():
        pipe = load_pipeline(config.model).to(process.device)
    flow = ProbabilityFlow(pipe, t_min=config.t_min)
    with process.main_process_first():
        asked = asked_of_data(config)
    samplers = _samplers(config, pipe, asked)
    reference, test = _data(config, pipe, process)
    report: dict[str, Any] = {
        "model": config.model,
        "sde": repr(flow.sde) if len(repr(flow.sde)) < 200 else type(flow.sde).__name__,
        "seed": config.seed,
        "data": {
            "name": data_name(config),
            "split": reference.split,
            "images": len(reference.pixels),
            "test_split": test and test.split,
            "test_images": test and len(test.pixels),
        },
        "num_samples": config.samples,
    }
    if asked is not None:
        report["data"]["caption_column"] = config.caption_column
    if samplers:
        judge = _Judge(config, reference, test, asked, process) if process.is_main_process else None
        if judge is not None:
            report |= {"features": judge.description, "baseline": judge.baseline(), "samplers": []}
            if too_few_samples(report):
                logger.warning(warning_of_few_samples(report))
        for sampler in samplers:
            drawn, calls = draw_images(sampler, config.samples, config.batch_size, process, progress_bar=True)
            if judge is not None:
                report["samplers"].append(judge(sampler, drawn, calls))
                _write(config, report)  # so that an interruption does not lose the results so far
    images = test or reference
    if config.bpd:
        name, measured = "bits_per_dim", measured_bits_per_dim
        if flow.is_latent:
            name, measured = "latent_bits_per_dim", measured_latent_bits
        report[name] = measured(config, flow, images, _is_conditional(pipe), process)
    if config.figure is not None and process.is_main_process:
        report["figure"] = {"path": config.figure, "round_trip_rms": draw_codes(config, flow, images.pixels)}
    if process.is_main_process:
        _write(config, report)
    return broadcast_object_list([report])[0]


def _samplers(config: EvaluationConfig, pipe: Any, asked: AskedImages | None) -> list[ImageSampler]:
    if config.samples == 0:
        return []
    sde_pipe = as_sde_pipeline(pipe)
    named = [Sampler.parse(text) for text in config.sampler or ("pipeline",)]
    labels = [sampler.label for sampler in named]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"sampler labels must differ, {', '.join(map(repr, twice))} stands twice.")
    prompts = None if asked is None else asked.captions
    return [ImageSampler(sde_pipe, sampler, config.seed, prompts=prompts) for sampler in named]


def _data(config: EvaluationConfig, pipe: Any, process: PartialState) -> tuple[Images, Images | None]:
    show = process.is_main_process
    with process.main_process_first():  # the other processes then find the data that the first one has converted
        # Without samplers nothing is compared, and the reference holds the images whose likelihood is computed.
        if config.samples == 0 and config.test_split is not None:
            reference = read_images(config, pipe, config.test_split, config.num_images, show)
            return reference, reference
        count = config.num_reference if config.samples else config.num_images
        reference = read_images(config, pipe, config.dataset_split, count, show)
        if config.test_split is None:
            return reference, None
        return reference, read_images(config, pipe, config.test_split, None, show)


def _is_conditional(pipe: Any) -> bool:
    return isinstance(pipe, ClassConditionalSDEPipeline)


class _Judge:
    """Measures samples against the reference, on one process."""

    def __init__(
        self,
        config: EvaluationConfig,
        reference: Images,
        test: Images | None,
        asked: AskedImages | None,
        process: PartialState,
    ) -> None:
        self._config, self._reference, self._test, self._asked = config, reference, test, asked
        path = None if config.output_dir is None else Path(config.output_dir) / "classifier.safetensors"
        extractor = make_extractor(
            config.features,
            reference.pixels,
            reference.labels,
            path if config.classifier is None else Path(config.classifier),
            config.classifier_steps,
            config.seed,
            process.device,
        )
        self._has_classes = isinstance(extractor, ClassifierFeatures)
        self._quality = SampleQuality(reference.pixels, extractor, progress_bar=True)
        self.description: dict[str, Any] = {"name": extractor.name, "dimensions": self._quality.dimensions}
        if isinstance(extractor, ClassifierFeatures):
            self.description |= {"accuracy": extractor.accuracy, "data": extractor.data}
        real = self._some(reference.pixels if test is None else test.pixels)
        among_themselves = test is None  # then the nearest image is the image itself, and the second nearest is taken
        found, _ = nearest_neighbours(real, reference.pixels, 1 + among_themselves)
        self._real_distances = found[:, -1]

    def _some(self, images: Tensor) -> Tensor:
        return spread(images, min(NEAREST_IMAGES, len(images)))

    def _nearest(self, distances: Tensor) -> dict[str, float]:
        bound = self._real_distances.double().quantile(0.01)
        x = distances.double()
        values = {"median": x.median(), "one_percent": x.quantile(0.01), "share_below": (x < bound).double().mean()}
        return {name: float(value) for name, value in values.items()}

    def baseline(self) -> dict[str, Any]:
        """The numbers of real images."""
        nearest = self._nearest(self._real_distances)
        if self._test is None:
            return {"label": f"real images ({self._reference.split})", "metrics": None, "nearest": nearest}
        count = min(self._config.samples, len(self._test.pixels))
        labels = self._test.labels if self._has_classes else None
        metrics = self._quality(spread(self._test.pixels, count), None if labels is None else spread(labels, count))
        return {"label": f"real images ({self._test.split})", "metrics": metrics, "nearest": nearest}

    def __call__(self, sampler: ImageSampler, images: Tensor, calls: float) -> dict[str, Any]:
        """Write the pictures of one sampler, and return its entry in the report."""
        labels = [sampler.label(number) for number in range(len(images))]
        known = None if labels[0] is None else torch.tensor(labels)
        if self._asked is not None:
            known = self._asked.labels
        metrics = self._quality(images, known if self._has_classes else None)
        some = self._some(images)
        distances, indices = nearest_neighbours(some, self._reference.pixels, NEIGHBOURS_SHOWN)
        label = sampler.sampler.label
        if self._config.output_dir is not None:
            folder = Path(self._config.output_dir)
            name = "".join(c if c.isalnum() or c in "-_." else "_" for c in label) + ".png"
            closest = distances[:, 0].argsort()[:NEAREST_SHOWN]
            rows = torch.cat([some[closest, None], self._reference.pixels[indices[closest]]], 1)
            for place, picture in (("samples", sheet(images)), ("nearest", tile(rows))):
                with saving("A picture", folder):
                    write_whole(folder / place / name, partial(picture.save, format="PNG"))
        return {
            "label": label,
            "options": dict(sampler.sampler.options),
            "calls_per_image": calls,
            "metrics": metrics,
            "nearest": self._nearest(distances[:, 0]),
        }


def _write(config: EvaluationConfig, report: dict[str, Any]) -> None:
    if config.output_dir is None:
        return
    for name, content in (("results.json", json.dumps(report, indent=2)), ("results.md", markdown_table(report))):
        with saving(name, Path(config.output_dir)):
            write_whole(Path(config.output_dir) / name, partial(Path.write_text, data=content + "\n"))
