"""The options of an evaluation, as one documented dataclass from which the command line is generated."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from PIL import Image

from ..basics.options import LARGEST_SEED, CheckedOptions, option
from ..flow.quantized import DEQUANTIZATIONS
from ..metrics import FEATURES

DEFAULT_SAMPLES = 5000


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(CheckedOptions):
    """What to evaluate; each field is the option of ``scripts/evaluate.py`` with the same name.

    Raises:
        ValueError: A value out of range or an unknown name.
    """

    model: str = option(MISSING, "Folder or Hub name of a pipeline.")
    output_dir: str | None = option(
        None, "Folder for results.json, results.md and pictures. Default: results are printed only."
    )

    # ------------------------------------------------------------------ data
    dataset_name: str | None = option(None, "'digits' or a name on the Hub. Default: digits, or data_dir.")
    data_dir: str | None = option(None, "Local data: a folder of images or Parquet, or such a file.", aliases=["data"])
    dataset_split: str = option(
        "train", "Split that samples are compared with; of the embedded digits a slice like 'train[:1500]' too."
    )
    test_split: str | None = option(
        None,
        "Split of images that the model was not trained on: bits per dimension are computed on it, and it is measured "
        "like a sampler. Default: none, and bits per dimension are those of dataset_split.",
    )
    image_column: str | None = option(None, "Column with the images. Default: the data's image column.")
    label_column: str | None = option(None, "Column with the classes. Default: the data's class column, if any.")
    caption_column: str | None = option(
        None,
        "Draw images of the captions in this column, text or classes by name, spread evenly over dataset_split. "
        "Default: of the empty caption, where the model is told captions.",
    )
    white_level: int | None = option(
        None,
        "Value of white in grey images of more than 8 bits, as in training. Default: 65535.",
        least=1,
        most=2**31 - 1,
    )
    num_reference: int = option(50_000, "Images of dataset_split to compare with, at most.", least=5)

    # ------------------------------------------------------------------ samples
    num_samples: int | None = option(
        None,
        f"Images to draw by each sampler. Default: {DEFAULT_SAMPLES}, or 0 where only bpd or figure is asked for.",
        least=0,
    )
    sampler: tuple[str, ...] | None = option(
        None,
        "Samplers, each 'label: key=value, key=value' with arguments of the scheduler (predictor, corrector, snr, ...) "
        "and of the pipeline (num_inference_steps, method, rtol, atol, guidance_scale). Default: the pipeline's own.",
        adds=True,
    )
    features: str | None = option(
        None,
        "What is compared: features of a small classifier of the data's own classes, of Inception (downloaded by "
        "torch-fidelity), or pixels. Default: classifier where the data have classes, pixels elsewhere.",
        choices=FEATURES,
    )
    classifier: str | None = option(
        None,
        "File of the classifier, which is trained and written there if it does not exist. Numbers made with different "
        "classifiers cannot be compared. Default: classifier.safetensors in output_dir.",
    )
    classifier_steps: int = option(1500, "Optimiser steps of training the classifier, 128 images each.", least=1)

    # ------------------------------------------------------------------ likelihood
    bpd: bool = option(False, "Compute bits per dimension, of a latent model those of the density of its latents.")
    figure: str | None = option(None, "Write a picture here: real images, reconstructions, interpolations.")
    num_images: int | None = option(
        None, "Images for bits per dimension, spread evenly over the data. Default: all.", least=1
    )
    dequantization: str = option("uniform", "Noise added to bytes.", choices=DEQUANTIZATIONS[:2])
    importance_samples: int = option(1, "Dequantisations per image.", least=1)
    num_probes: int = option(1, "Trace probes per network call.", least=1)
    rtol: float = option(3e-4, "Relative tolerance of the solver.", above=0.0)
    atol: float = option(3e-4, "Absolute tolerance of the solver.", above=0.0)
    t_min: float | None = option(None, "SDE time of the data. Default: the model's own.", above=0.0)

    batch_size: int = option(64, "Images in one network call.", least=1)
    seed: int = option(0, "Seed of samples, classifier, dequantisation and probes.", least=0, most=LARGEST_SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples == 0 and not (self.bpd or self.figure):
            raise ValueError("nothing to do: num_samples is 0, and neither bpd nor figure is set.")
        if self.figure is not None:
            suffix = Path(self.figure).suffix.lower()
            if Image.registered_extensions().get(suffix) not in Image.SAVE:
                raise ValueError(f"figure must end in the suffix of a picture, such as .png, got {self.figure!r}.")
        if self.classifier is not None and self.features not in (None, "classifier"):
            raise ValueError(f"classifier needs features 'classifier', got {self.features!r}.")

    @property
    def samples(self) -> int:
        """Number of images to draw by each sampler."""
        if self.num_samples is not None:
            return self.num_samples
        return 0 if (self.bpd or self.figure) and self.sampler is None else DEFAULT_SAMPLES
