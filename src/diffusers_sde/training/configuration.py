"""What a training run is told: documented dataclasses, from which the command lines are generated."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..basics.options import option
from ..images.options import ImageOptions, is_local
from .adapters import AdapterOptions
from .captions import CaptionOptions
from .encoders import EncoderOptions
from .networks import CAPTIONED_NETWORKS, WITHOUT_CAPTIONS, DenoiserOptions, NetworkOptions
from .options import (
    AveragingOptions,
    ClassOptions,
    HubOptions,
    LoadingOptions,
    LossOptions,
    OptimisationOptions,
    RunOptions,
    SampleOptions,
    TimeOptions,
)
from .recipes import RECIPES, recipe_settings
from .trainable import SDEOptions

_HUB = tuple(f.name for f in fields(HubOptions))
_LOCAL = (
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "cache_dir", "logging_dir", "latent_cache_dir"),
    "caption_cache_dir",
    *_HUB,
)


def _without_folders(name: str, word: str) -> str:
    """A word of a command line for others, without the folders of this machine."""
    word = " ".join(word.split()) if "\n" in word or "\r" in word else word  # a card shows one line
    looks_local = word.startswith(("/", "~", ".", "file:")) or "\\" in word or re.match("[A-Za-z]:", word) is not None
    may_be_local = name in (
        "dataset_name",
        "model_config_name_or_path",
        "init_from",
        "vae",
        "text_encoder",
    )  # or a name on the Hub
    if name == "train_data_dir" or looks_local or (may_be_local and (word.count("/") > 1 or is_local(word))):
        last = re.split(r"[/\\]", word.rstrip("/\\"))[-1]
        return f"path/to/{last.strip('~.') or 'data'}"
    return word


# The bases of a dataclass give their fields from the last to the first: in this order they stand in the help.
@dataclass(frozen=True, kw_only=True)
class CommonTrainingConfig(
    RunOptions,
    AveragingOptions,
    OptimisationOptions,
    NetworkOptions,
    TimeOptions,
    SDEOptions,
    LoadingOptions,
    ImageOptions,
):
    """The options that every kind of training has.

    Raises:
        ValueError: A value out of range, an unknown name, or options that contradict each other.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_sampling != "uniform" and self.discrete:
            raise ValueError(f"time_sampling {self.time_sampling!r} needs continuous time, got discrete=True.")
        shifts = self.time_shift != 1.0 or self.time_shift_base_resolution is not None
        if shifts and (self.discrete or self.time_sampling == "importance"):
            raise ValueError(
                "time_shift and time_shift_base_resolution need continuous times that are not drawn by 'importance', "
                f"got discrete={self.discrete!r} and time_sampling={self.time_sampling!r}."
            )

    def check_streamed(self) -> None:
        """Check that the options suit data whose number is not known.

        Raises:
            ValueError: They do not.
        """
        if self.max_train_steps is None:
            raise ValueError("Streamed data need max_train_steps: how many images a pass has is not known.")
        for name in ("save_images_epochs", "save_model_epochs"):
            if getattr(self, name, None) is not None:
                raise ValueError(f"{name} cannot be used with streamed data: how many images a pass has is not known.")

    def public(self) -> dict[str, Any]:
        """All options as a dictionary for files and logs; the token is not among them."""
        secret = {f.name for f in fields(self) if not f.repr}  # see ``option``
        return {name: value for name, value in asdict(self).items() if name not in secret}

    @classmethod
    def describe(cls) -> str:
        """All options, one per paragraph, with their defaults."""
        return "\n".join(f"{f.name} ({f.default!r}): {f.metadata['help']}" for f in fields(cls))


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(
    HubOptions,
    SampleOptions,
    LossOptions,
    AdapterOptions,
    DenoiserOptions,
    EncoderOptions,
    CaptionOptions,
    ClassOptions,
    CommonTrainingConfig,
):
    """Everything that the training of a denoiser is told; each field is the command-line option of the same name.

    ``scripts/train.py --help`` and ``TrainingConfig.describe()`` say what each one means. Names are those of diffusers'
    ``train_unconditional.py`` where it has the option. A default of None is chosen per SDE or from the data.

    Raises:
        ValueError: A value out of range, an unknown name, or options that contradict each other.
    """

    @property
    def needs_labels(self) -> bool:
        """Whether the network is told the class or the caption of each image."""
        return self.class_conditional or self.caption_column is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_sampling == "importance" and self.weighting != "likelihood":
            raise ValueError(
                f"time_sampling 'importance' is for weighting 'likelihood', got weighting={self.weighting!r}."
            )
        self._check_captions()
        if self.lora_rank is not None and self.init_from is None:
            raise ValueError("lora_rank needs init_from: beside new weights that stay as they are it learns nothing.")
        if self.vae is not None and self.data_min != -1.0:
            raise ValueError(f"data_min must be -1 with vae, whose images lie in [-1, 1], got {self.data_min!r}.")
        fourier = ("score", "sigma")
        if self.time_embedding_type == "fourier" and (self.prediction_type, self.time_conditioning) != fourier:
            raise ValueError(
                "time_embedding_type 'fourier' divides the network's output by its timestep: it needs prediction_type "
                f"'score' and time_conditioning 'sigma', got {self.prediction_type!r} and {self.time_conditioning!r}."
            )

    def _check_captions(self) -> None:
        column, kind = self.caption_column, self.model_type
        if column is None:
            if kind in CAPTIONED_NETWORKS and kind not in WITHOUT_CAPTIONS:
                raise ValueError(f"model_type {kind!r} needs caption_column.")
            if kind in CAPTIONED_NETWORKS and self.class_conditional:
                raise ValueError(f"model_type {kind!r} is told no classes: class_conditional must be False.")
            return
        for name in ("class_conditional", "label_column", "num_classes"):
            if getattr(self, name):
                raise ValueError(f"{name} cannot be set beside caption_column, got {getattr(self, name)!r}.")
        if self.init_from is not None:
            return
        if kind not in CAPTIONED_NETWORKS:
            raise ValueError(f"caption_column needs a model_type of {' or '.join(CAPTIONED_NETWORKS)}, got {kind!r}.")
        if self.text_encoder is None:
            raise ValueError(f"caption_column {column!r} needs text_encoder, which embeds the captions.")

    def command(self) -> str:
        """The command line of this run, to be pasted into a shell: nothing of one machine or account only is in it.

        What names a file or folder here becomes ``path/to/`` and its last part.
        """
        words = ["accelerate", "launch", "scripts/train.py"]
        for f in fields(self):
            value = getattr(self, f.name)
            if value == f.default or f.name in _LOCAL:
                continue
            if isinstance(value, bool):
                words.append(f"--{f.name}" if value else f"--no-{f.name}")
                continue
            given = [_without_folders(f.name, str(v)) for v in (value if isinstance(value, tuple) else [value])]
            if len(given) == 1 and given[0].startswith("-"):
                words.append(f"--{f.name}={given[0]}")  # the parser would take it for an option
            else:
                words += [f"--{f.name}", *given]
        return shlex.join(words)

    @classmethod
    def from_recipe(cls, recipe: str | None = None, **options: Any) -> TrainingConfig:
        """The settings of a recipe, such as ``paper_vp_continuous``, which ``options`` override.

        Args:
            recipe: One of ``RECIPES``; None for the defaults.
            **options: Fields of this class.

        Raises:
            ValueError: The recipe is unknown; or see the class.
        """
        if recipe is not None and recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}.")
        settings = {} if recipe is None else recipe_settings(recipe, options.get("model_type"))
        if "num_epochs" in options:
            settings.pop("max_train_steps", None)  # it would count before what was asked for
        return cls(**(settings | options))


@dataclass(frozen=True, kw_only=True)
class ClassifierTrainingConfig(CommonTrainingConfig):
    """Everything that the training of a classifier of noisy images is told; each field is a command-line option.

    Raises:
        ValueError: A value out of range, an unknown name, or options that contradict each other.
    """

    learning_rate: float = option(3e-4, "Learning rate after warm-up.", above=0.0)
    output_dir: str = option("outputs/classifier", "Where checkpoints, logs and the classifier go.")
    test_split: str | None = option(
        None, "Split on which the accuracy is measured at the end; of the embedded digits a slice like 'train[1500:]'."
    )

    @property
    def needs_labels(self) -> bool:
        """A classifier is trained on the classes of the images."""
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_sampling == "importance":
            raise ValueError("time_sampling 'importance' is for the weighted loss of a denoiser, not for a classifier.")
