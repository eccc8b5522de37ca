"""What turns captions into the embeddings that a network is told: a tokenizer and a text encoder of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class EmbeddedCaptions:
    """The embeddings of N captions, of L tokens each.

    Attributes:
        states: Last hidden states of the text encoder, shape (N, L, D).
        mask: Which tokens belong to the caption and not to its padding, boolean (N, L).
    """

    states: Tensor
    mask: Tensor

    def to(self, device: torch.device | str) -> EmbeddedCaptions:
        """The same on another device."""
        return EmbeddedCaptions(self.states.to(device), self.mask.to(device))

    def arguments(self, numbers: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a network on captions takes beside x and timestep.

        Args:
            numbers: Which of the captions, int64 (B,).
            dtype: Precision of the network.
        """
        return {"encoder_hidden_states": self.states[numbers].to(dtype), "encoder_attention_mask": self.mask[numbers]}


@dataclass(frozen=True)
class CaptionEncoder:
    """Embeds captions.

    Args:
        tokenizer: A tokenizer of transformers.
        text_encoder: A text encoder of transformers, such as ``CLIPTextModel``, ``T5EncoderModel`` or ``BertModel``.
        max_length: L, the number of tokens to which captions are cut and padded.
        shows_padding: Whether the padding is encoded and attended to like the caption, as in Stable Diffusion.
        chunk: Captions that are encoded at a time, which bounds the memory.
    """

    tokenizer: Any
    text_encoder: Any
    max_length: int
    shows_padding: bool = False
    chunk: int = 64

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> EmbeddedCaptions:
        """The embeddings of captions, in the encoder's precision and on its device, in whichever context."""
        with torch.autocast(self.text_encoder.device.type, enabled=False):
            return self._encoded(captions)

    def _encoded(self, captions: Sequence[str]) -> EmbeddedCaptions:
        device, states, masks = self.text_encoder.device, [], []
        for start in range(0, len(captions), self.chunk):
            tokens = self.tokenizer(
                list(captions[start : start + self.chunk]),
                padding="max_length",
                max_length=self.max_length,
                truncation=True,
                return_tensors="pt",
            )
            mask = tokens["attention_mask"].to(device)
            # A network cannot attend to nothing, so that of a caption without tokens one token of padding is seen.
            mask[:, 0] |= ~mask.any(1)
            seen = None if self.shows_padding else mask
            states.append(self.text_encoder(tokens["input_ids"].to(device), attention_mask=seen)[0])
            masks.append(torch.ones_like(mask).bool() if self.shows_padding else mask.bool())
        return EmbeddedCaptions(torch.cat(states), torch.cat(masks))


def caption_width_of(text_encoder: Any) -> int:
    """D, the width of the embeddings of a text encoder.

    Raises:
        ValueError: It is no text encoder of transformers.
    """
    width = getattr(getattr(text_encoder, "config", None), "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(
            "text_encoder must be a text encoder of transformers, such as CLIPTextModel, got "
            f"{type(text_encoder).__name__}."
        )
    return width


def checked_captions(name: str, value: Any) -> list[str]:
    """Captions as a list, given one or several.

    Args:
        name: Name of the argument, for messages.
        value: A string or a sequence of strings, at least one.

    Raises:
        ValueError: Something else.
    """
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, (list, tuple)) or not captions or not all(isinstance(c, str) for c in captions):
        raise ValueError(f"{name} must be a string or a list of strings, at least one, got {value!r}.")
    return list(captions)
