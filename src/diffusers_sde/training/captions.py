"""Training on captions: its options, and the embeddings of all captions, computed once and kept in files."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub import constants
from torch import Tensor

from ..basics.options import CheckedOptions, option
from ..evaluation.generate import fingerprint
from ..pipelines.captions import CaptionEncoder, EmbeddedCaptions, caption_width_of
from .encoders import DTYPES
from .row_cache import RowCache

logger = logging.getLogger(__name__)

CAPTION_NUMBERS = "caption_number"  # the column with the number of each image's caption
LONGEST_CAPTION = 77  # tokens, where nothing else is asked for
HASHED_CAPTIONS = 64  # whose tokens tell one tokenizer from another
# Of these kinds, transformers' own choice of a class has parts beside the text encoder, or is none.
_TEXT_ENCODERS = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"}


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(CheckedOptions):
    """Whether the network is told the caption of each image."""

    caption_column: str | None = option(
        None,
        "Train a network that is told captions, those of this column, for generation by text: text, or classes, whose "
        "names are the captions then. Needs text_encoder and model_type unet_condition.",
    )
    text_encoder: str | None = option(
        None,
        "Text encoder of transformers with its tokenizer (CLIP, T5, BERT, ...), a folder or Hub name, of itself or of "
        "a pipeline that has both. It is frozen, and saved with the pipeline. All captions are embedded once, before "
        "training.",
    )
    text_encoder_dtype: str = option(
        "fp32", "Precision of the text encoder, in which it is saved and its embeddings are kept.", choices=DTYPES
    )
    max_caption_length: int | None = option(
        None,
        f"Tokens to which captions are cut and padded. Default: {LONGEST_CAPTION}, or the most that the tokenizer "
        "allows.",
        least=1,
    )
    caption_dropout: float = option(
        0.1,
        "Fraction of images whose caption is replaced by the empty one, which guidance needs; 0 trains without it.",
        least=0.0,
        most=0.999,
    )
    caption_cache_dir: str | None = option(
        None,
        "Folder for the embeddings, in which every text encoder and set of captions has its own. Default: in the cache "
        "of Hugging Face.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        changed = [f.name for f in fields(CaptionOptions) if getattr(self, f.name) != f.default]
        if self.caption_column is None and changed:
            raise ValueError(f"{changed[0]} {getattr(self, changed[0])!r} has no effect without caption_column.")
        if self.caption_column is not None and self.text_encoder is None:
            raise ValueError(f"caption_column {self.caption_column!r} needs text_encoder, which embeds the captions.")
        if self.text_encoder is not None and importlib.util.find_spec("transformers") is None:
            raise ValueError("text_encoder needs transformers: pip install transformers.")


def load_text_encoder(options: CaptionOptions, device: torch.device) -> tuple[Any, Any]:
    """A tokenizer and a frozen text encoder, from their own folder or repository, or from those of a pipeline.

    Raises:
        ValueError: There are none.
    """
    import transformers  # not everybody who trains has it

    path = options.text_encoder
    assert path is not None, "whoever trains without captions needs no text encoder"
    try:
        try:
            config, subfolders = transformers.AutoConfig.from_pretrained(path), ("", "")
        except (OSError, ValueError):
            config = transformers.AutoConfig.from_pretrained(path, subfolder="text_encoder")
            subfolders = ("tokenizer", "text_encoder")
        name = _TEXT_ENCODERS.get(config.model_type, "AutoModelForTextEncoding")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, subfolder=subfolders[0])
        encoder = getattr(transformers, name).from_pretrained(path, subfolder=subfolders[1])
    except Exception as error:  # files that do not belong to a text encoder may raise anything
        raise ValueError(f"text_encoder {path!r} cannot be loaded: {type(error).__name__}: {error}") from error
    caption_width_of(encoder)  # refuses what is none
    return tokenizer, encoder.requires_grad_(False).eval().to(device, DTYPES[options.text_encoder_dtype])


def numbered_captions(dataset: datasets.Dataset, column: str) -> tuple[datasets.Dataset, list[str]]:
    """A data set with a column that counts captions, and the captions, each of them once.

    Args:
        dataset: The images with their captions.
        column: The column with the captions: text, or classes, whose names are the captions.

    Returns:
        The data set, whose column ``CAPTION_NUMBERS`` holds a number for each image, and the captions by number.

    Raises:
        ValueError: There is no such column, or it does not hold one caption for each image.
    """
    if column not in dataset.features:
        raise ValueError(f"caption_column must be one of {', '.join(dataset.features)}, got {column!r}.")
    feature, values = dataset.features[column], dataset.with_format(None)[column][:]
    if isinstance(feature, datasets.ClassLabel):
        values = [feature.names[value] if value is not None and value >= 0 else None for value in values]
    bad = next((i for i, value in enumerate(values) if not isinstance(value, str)), None)
    if bad is not None:
        raise ValueError(
            f"caption_column {column!r} must hold one text for each image, that of image {bad} is {values[bad]!r}."
        )
    captions = sorted(set(values))
    number = {caption: i for i, caption in enumerate(captions)}
    numbers = np.array([number[value] for value in values])
    if CAPTION_NUMBERS in dataset.features:
        dataset = dataset.remove_columns(CAPTION_NUMBERS)
    return dataset.add_column(CAPTION_NUMBERS, numbers), captions


class CaptionCache(RowCache):
    """The embeddings of captions, in a folder; the last row is that of the empty caption.

    Args:
        root: The folder is in this one, and has a name of its own.
        captions: The captions.
        encoder: Embeds them.
    """

    def __init__(self, root: Path, captions: Sequence[str], encoder: CaptionEncoder) -> None:
        model = encoder.text_encoder
        self.captions, self._encoder = [*captions, ""], encoder
        some = list(captions[:: max(1, len(captions) // HASHED_CAPTIONS)])
        tokens = encoder.tokenizer(some, truncation=True, max_length=encoder.max_length)["input_ids"]
        of: dict[str, Any] = {"encoder": fingerprint(model), "class": type(model).__name__, "dtype": str(model.dtype)}
        of |= {"length": encoder.max_length, "tokenizer": tokens, "captions": self.captions}
        key = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:32]
        row_bytes = encoder.max_length * (caption_width_of(model) * model.dtype.itemsize + 1)
        super().__init__(root / key, key, "captions", ("states", "mask"), row_bytes, len(self.captions), "caption")

    @property
    def key(self) -> str:
        """A hash of all that the embeddings depend on."""
        return self._key

    def _compute(self, rows: range, bar: Any) -> dict[str, Tensor]:
        """See ``RowCache``."""
        parts = []
        for start in range(rows.start, rows.stop, self._encoder.chunk):
            part = self.captions[start : min(start + self._encoder.chunk, rows.stop)]
            parts.append(self._encoder(part))
            bar.update(len(part))
        states, masks = ([getattr(part, name).cpu() for part in parts] for name in ("states", "mask"))
        return {"states": torch.cat(states).contiguous(), "mask": torch.cat(masks).contiguous()}

    def read(self, numbers: Tensor) -> EmbeddedCaptions:
        """The embeddings of captions by their numbers, int64 (B,), on the host."""
        rows = [self.row(number) for number in numbers.tolist()]
        return EmbeddedCaptions(*(torch.stack([row[name] for row in rows]) for name in ("states", "mask")))


class TrainingCaptions:
    """The captions of a training run: their encoder, and the embeddings of those of a batch.

    Args:
        options: The options of the run.
        device: Where captions are embedded.

    Attributes:
        encoder: Embeds captions.
        cache: The embeddings of the captions of the data, from ``of``.
    """

    cache: CaptionCache

    def __init__(self, options: CaptionOptions, device: torch.device) -> None:
        tokenizer, text_encoder = load_text_encoder(options, device)
        longest = min(tokenizer.model_max_length, LONGEST_CAPTION)
        if (options.max_caption_length or 0) > tokenizer.model_max_length:
            raise ValueError(
                f"max_caption_length must be at most {tokenizer.model_max_length} for text_encoder "
                f"{options.text_encoder!r}, got {options.max_caption_length!r}."
            )
        self.encoder = CaptionEncoder(tokenizer, text_encoder, options.max_caption_length or longest)
        self._options, self._device = options, device

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return caption_width_of(self.encoder.text_encoder)

    @property
    def captions(self) -> list[str]:
        """The captions of the data, each of them once; the empty one, which stands for any, is not among them."""
        return self.cache.captions[:-1]

    def of(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """A data set with a column that counts its captions, ``CAPTION_NUMBERS``; see ``numbered_captions``."""
        assert self._options.caption_column is not None
        numbered, captions = numbered_captions(dataset, self._options.caption_column)
        root = self._options.caption_cache_dir or Path(constants.HF_HOME, "diffusers_sde", "captions")
        self.cache = CaptionCache(Path(root), captions, self.encoder)
        return numbered

    def prepare(self, process: PartialState) -> None:
        """Fill the cache; to be called on all processes, before ``arguments``."""
        written = self.cache.build(process)
        how = "new" if written else "found"
        logger.info("Captions: %.1f MiB in %s, %s.", self.cache.size / 2**20, self.cache.folder, how)
        self.rest()

    def rest(self) -> None:
        """Let the text encoder wait on the host, since training reads embeddings from files."""
        self.encoder.text_encoder.to("cpu")

    def wake(self) -> None:
        """Bring the text encoder back to its device."""
        self.encoder.text_encoder.to(self._device)

    def arguments(self, numbers: Tensor, draws: Tensor) -> dict[str, Tensor]:
        """What the network is told beside x and timestep, on the device.

        Args:
            numbers: Numbers of the captions of a batch, int64 (B,).
            draws: Uniform in [0, 1), shape (B,); below ``caption_dropout`` the empty caption takes the place.
        """
        hidden = draws < self._options.caption_dropout
        embedded = self.cache.read(torch.where(hidden, len(self.captions), numbers))
        states, mask = (each.to(self._device, non_blocking=True) for each in (embedded.states, embedded.mask))
        everything = torch.arange(len(numbers), device=self._device)
        return EmbeddedCaptions(states, mask).arguments(everything, torch.float32)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that continues it."""
        return {"captions": self.cache.key, "caption_dropout": self._options.caption_dropout}
