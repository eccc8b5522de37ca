"""Training on captions: its options, and their embeddings.

Those of stored images are computed once and kept in files, those of streamed ones on the way.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import logging
from abc import ABC, abstractmethod
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
from ..images.columns import captions_of
from ..pipelines import TextSDEPipeline
from ..pipelines.captions import CaptionEncoder, EmbeddedCaptions, caption_width_of
from .encoders import DTYPES
from .row_cache import RowCache

logger = logging.getLogger(__name__)

CAPTION_NUMBERS = "caption_number"  # the column with the number of each image's caption
LONGEST_CAPTION = 77  # tokens, where nothing else is asked for
HASHED_CAPTIONS = 64  # whose tokens tell one tokenizer from another
STOCK_PIPELINES = {"StableDiffusionPipeline": True, "PixArtAlphaPipeline": False, "PixArtSigmaPipeline": False}
"""Stock pipelines whose networks are told captions as here, and whether these see the padding."""
# Of these kinds, transformers' own choice of a class has parts beside the text encoder, or is none.
_TEXT_ENCODERS = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"}


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(CheckedOptions):
    """Whether the network is told the caption of each image."""

    caption_column: str | None = option(
        None,
        "Train a network that is told captions, those of this column, for generation by text: text, or classes, whose "
        "names are the captions then. Needs text_encoder and model_type unet_condition or pixart, or init_from.",
    )
    text_encoder: str | None = option(
        None,
        "Text encoder of transformers with its tokenizer (CLIP, T5, BERT, ...), a folder or Hub name, of itself or of "
        "a pipeline that has both. It is frozen, and saved with the pipeline. All captions are embedded once, before "
        "training; those of a stream on the way. Default: that of init_from.",
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
        if self.caption_column is not None and importlib.util.find_spec("transformers") is None:
            raise ValueError("caption_column needs transformers: pip install transformers.")


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


def caption_encoder(options: CaptionOptions, saved: CaptionEncoder | None, device: torch.device) -> CaptionEncoder:
    """What embeds the captions of a run: the parts that the options name, or those of a saved model.

    Args:
        options: The options of the run.
        saved: What embeds the captions of the model that the run starts from; None where it brings none.
        device: Where captions are embedded.

    Raises:
        ValueError: There is no text encoder, or another one than that of the saved model, or captions are to be longer
            than it takes.
    """
    named = None if options.text_encoder is None else load_text_encoder(options, device)
    if saved is None and named is None:
        raise ValueError("caption_column needs text_encoder: what init_from names brings none.")
    if saved is None:
        assert named is not None, "one of the two is there"
        tokenizer, text_encoder = named
        length, shows_padding = min(tokenizer.model_max_length, LONGEST_CAPTION), False
    else:
        tokenizer, text_encoder = saved.tokenizer, saved.text_encoder.requires_grad_(False).eval()
        text_encoder = text_encoder.to(device, DTYPES[options.text_encoder_dtype])
        length, shows_padding = saved.max_length, saved.shows_padding
        if named is not None and fingerprint(named[1]) != fingerprint(text_encoder):
            raise ValueError(
                f"text_encoder {options.text_encoder!r} is another one than that of init_from, whose network has "
                "learnt its embeddings: leave text_encoder out."
            )
    if (options.max_caption_length or 0) > tokenizer.model_max_length:
        raise ValueError(
            f"max_caption_length must be at most {tokenizer.model_max_length} for this text encoder, got "
            f"{options.max_caption_length!r}."
        )
    return CaptionEncoder(tokenizer, text_encoder, options.max_caption_length or length, shows_padding)


def saved_encoder(pipe: Any) -> CaptionEncoder | None:
    """What embeds captions for the network of a pipeline as it was trained; None where it is not known here.

    Args:
        pipe: A ``TextSDEPipeline``, or one of ``STOCK_PIPELINES``.
    """
    if isinstance(pipe, TextSDEPipeline):
        return pipe.captions
    shows_padding = STOCK_PIPELINES.get(type(pipe).__name__)
    if shows_padding is None:
        return None
    known = inspect.signature(pipe.encode_prompt).parameters.get("max_sequence_length")
    length = min(pipe.tokenizer.model_max_length, LONGEST_CAPTION if known is None else known.default)
    return CaptionEncoder(pipe.tokenizer, pipe.text_encoder, length, shows_padding)


def encoding_of(encoder: CaptionEncoder, captions: Sequence[str]) -> dict[str, Any]:
    """All that the embeddings of captions depend on, for hashes.

    Args:
        encoder: Embeds them.
        captions: The captions, whose tokens also tell one tokenizer from another.
    """
    model = encoder.text_encoder
    some = list(captions[:: max(1, len(captions) // HASHED_CAPTIONS)])
    tokens = encoder.tokenizer(some, truncation=True, max_length=encoder.max_length)["input_ids"]
    of: dict[str, Any] = {"encoder": fingerprint(model), "class": type(model).__name__, "dtype": str(model.dtype)}
    of |= {"length": encoder.max_length, "tokenizer": tokens, "captions": list(captions)}
    return of | ({"shows_padding": True} if encoder.shows_padding else {})


def hash_of(content: dict[str, Any]) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


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
    values = captions_of(dataset, column)
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
        # The empty caption is hashed with the others, but its tokens are not: files of earlier versions are found.
        key = hash_of(encoding_of(encoder, captions) | {"captions": self.captions})
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


class TrainingCaptions(ABC):
    """The captions of a training run: what embeds them, and what the network is told of those of a batch.

    Args:
        options: The options of the run.
        encoder: Embeds captions.
        device: Where captions are embedded.
        known: The captions of the images that are known beforehand, one for each image.

    Attributes:
        encoder: Embeds captions.
    """

    def __init__(
        self, options: CaptionOptions, encoder: CaptionEncoder, device: torch.device, known: Sequence[str]
    ) -> None:
        self.encoder = encoder
        self._options, self._device, self._known = options, device, known

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return caption_width_of(self.encoder.text_encoder)

    @property
    def different(self) -> list[str]:
        """The captions of the images that are known beforehand, each of them once."""
        return sorted(set(self._known))

    def spread(self, count: int) -> list[str]:
        """The captions of ``count`` images that are evenly spread over those known beforehand."""
        places = np.linspace(0, len(self._known) - 1, count).round().astype(int)
        return [self._known[place] for place in places]

    @abstractmethod
    def arguments(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the network is told beside x and timestep, on the device, of a batch from ``TrainingSamples``.

        Where its ``label_draw`` is below ``caption_dropout`` the empty caption takes the place of the image's own.
        """

    @abstractmethod
    def describe(self) -> str:
        """The captions in words."""

    @abstractmethod
    def _key(self) -> str:
        """A hash of the captions and of what embeds them."""

    @abstractmethod
    def prepare(self, process: PartialState) -> None:
        """Do what is to be done before ``arguments``; to be called on all processes."""

    @abstractmethod
    def rest(self) -> None:
        """Let the text encoder wait on the host where training does without it."""

    def wake(self) -> None:
        """Bring the text encoder back to its device."""
        self.encoder.text_encoder.to(self._device)

    def _hidden(self, batch: dict[str, Any]) -> Tensor:
        hidden: Tensor = batch["label_draw"] < self._options.caption_dropout
        return hidden

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that continues it."""
        return {"captions": self._key(), "caption_dropout": self._options.caption_dropout}


class StoredCaptions(TrainingCaptions):
    """The captions of stored images: each different one is embedded once, before training.

    Args:
        options: See ``TrainingCaptions``.
        encoder: See ``TrainingCaptions``.
        device: See ``TrainingCaptions``.
        dataset: The images with their captions.

    Attributes:
        numbered: The images with a column that counts captions, ``CAPTION_NUMBERS``; see ``numbered_captions``.
        captions: The captions by number. The empty one, which stands for any, is not among them.
        cache: Their embeddings.

    Raises:
        ValueError: There are no captions.
    """

    def __init__(
        self, options: CaptionOptions, encoder: CaptionEncoder, device: torch.device, dataset: datasets.Dataset
    ) -> None:
        assert options.caption_column is not None, "whoever trains without captions has none of them"
        self.numbered, self.captions = numbered_captions(dataset, options.caption_column)
        numbers = self.numbered.with_format(None)[CAPTION_NUMBERS][:]
        super().__init__(options, encoder, device, [self.captions[n] for n in numbers])
        root = options.caption_cache_dir or Path(constants.HF_HOME, "diffusers_sde", "captions")
        self.cache = CaptionCache(Path(root), self.captions, encoder)

    def describe(self) -> str:
        """See ``TrainingCaptions``."""
        return f"{len(self.captions)} different captions"

    def _key(self) -> str:
        """See ``TrainingCaptions``."""
        return self.cache.key

    def prepare(self, process: PartialState) -> None:
        """Fill the cache."""
        written = self.cache.build(process)
        how = "new" if written else "found"
        logger.info("Captions: %.1f MiB in %s, %s.", self.cache.size / 2**20, self.cache.folder, how)
        self.rest()

    def rest(self) -> None:
        """Let the text encoder wait on the host, since training reads embeddings from files."""
        self.encoder.text_encoder.to("cpu")

    def arguments(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See ``TrainingCaptions``; a batch has the numbers of its captions in the place of labels."""
        numbers = torch.where(self._hidden(batch), len(self.captions), batch["labels"])
        embedded = self.cache.read(numbers)
        states, mask = (each.to(self._device, non_blocking=True) for each in (embedded.states, embedded.mask))
        everything = torch.arange(len(numbers), device=self._device)
        return EmbeddedCaptions(states, mask).arguments(everything, torch.float32)


class StreamedCaptions(TrainingCaptions):
    """The captions of streamed images, which are embedded on the way, those of a batch at a time.

    The captions known beforehand are those of the first images.
    """

    def describe(self) -> str:
        """See ``TrainingCaptions``."""
        return f"captions, {len(self.different)} different ones of the first {len(self._known)} images"

    def _key(self) -> str:
        """See ``TrainingCaptions``."""
        return hash_of(encoding_of(self.encoder, self._known))

    def prepare(self, process: PartialState) -> None:
        """Do what is to be done before ``arguments``, which is nothing."""

    def rest(self) -> None:
        """Leave the text encoder where it is, since training needs it."""

    def arguments(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See ``TrainingCaptions``; a batch has its captions as they are."""
        hidden = self._hidden(batch).tolist()
        captions = ["" if empty else caption for caption, empty in zip(batch["captions"], hidden, strict=True)]
        number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        numbers = torch.tensor([number[caption] for caption in captions], device=self._device)
        return self.encoder(list(number)).arguments(numbers, torch.float32)
