"""Checks of arguments: the one place that says what a number, a count or a word has to be.

Every function takes the name of an argument and its value, returns the value as a plain Python (or torch) one, and
raises a ``ValueError`` that says the name, what is allowed and what was given. Configs come from JSON files that people
edit by hand, so a string is never taken for a number and a boolean never for a count.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST_COUNT = 2**31 - 1
SMALLEST_TOLERANCE = 1e-13  # below it nothing but round-off is left, in float64


def check_number(
    name: str,
    value: Any,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> float:
    """A finite number within bounds: Python's, numpy's or a tensor with one element, no boolean and no string."""
    number = _plain(value)
    fits = isinstance(number, numbers.Real) and not isinstance(number, bool) and math.isfinite(number)
    fits = fits and (above is None or number > above) and (at_least is None or number >= at_least)
    fits = fits and (below is None or number < below) and (at_most is None or number <= at_most)
    if not fits:
        raise ValueError(
            f"{name} must be a finite number{_range(above, at_least, below, at_most)}, got {_shown(value)}."
        )
    return float(number)


def check_ordered(
    low_name: str,
    low: Any,
    high_name: str,
    high: Any,
    above: float | None = None,
    at_least: float | None = None,
    may_be_equal: bool = False,
) -> tuple[float, float]:
    """Two finite numbers, the first below the second, or equal if they may; the bounds are the first one's."""
    low, high = check_number(low_name, low, above, at_least), check_number(high_name, high)
    if not (low < high or (may_be_equal and low == high)):
        relation = "at most" if may_be_equal else "less than"
        raise ValueError(f"{low_name} must be {relation} {high_name}, got {low!r} and {high!r}.")
    return low, high


def check_pair(name: str, value: Any, at_least: float | None = None) -> tuple[float, float]:
    """Two increasing numbers; the second may be infinite."""
    try:
        low, high = check_numbers(name, value, at_least=2).tolist()
    except ValueError:
        low, high = math.nan, math.nan
    if not (math.isfinite(low) and low < high and (at_least is None or low >= at_least)):
        raise ValueError(
            f"{name} must be two increasing numbers{_range(None, at_least, None, None)}, got {_shown(value)}."
        )
    return low, high


def check_integer(name: str, value: Any, at_least: int | None = None, at_most: int | None = None) -> int:
    """A whole number within bounds; 2.0 is one. Without ``at_most`` it is a count, below 2^31."""
    number = _plain(value)
    fits = isinstance(number, numbers.Real) and not isinstance(number, bool) and math.isfinite(number)
    fits = fits and (isinstance(number, numbers.Integral) or float(number).is_integer())
    if at_most is None and fits and number > LARGEST_COUNT:
        at_most = LARGEST_COUNT
    fits = fits and (at_least is None or number >= at_least) and (at_most is None or number <= at_most)
    if not fits:
        raise ValueError(f"{name} must be an integer{_range(None, at_least, None, at_most)}, got {_shown(value)}.")
    return int(number)


def check_choice(name: str, value: Any, allowed: Collection[Any]) -> Any:
    """One of the words ``allowed``, which may hold None."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        words = ", ".join(str(word) for word in allowed if word is not None)
        raise ValueError(f"{name} must be {'None or ' * (None in allowed)}one of {words}, got {_shown(value)}.")
    return value


def check_flag(name: str, value: Any) -> bool:
    """True or False, nothing that counts as one of them."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {_shown(value)}.")
    return bool(value)


def check_numbers(name: str, values: Any, at_least: int = 1) -> Tensor:
    """A sequence of numbers as float64, shape (n,), on the CPU; ``at_least`` is the smallest n. Infinity passes.

    The result of a tensor carries its gradients.
    """
    try:
        tensor = values.cpu() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
        fits = tensor.ndim == 1 and len(tensor) >= at_least and tensor.dtype != torch.bool and not tensor.is_complex()
    except (TypeError, ValueError):  # words, or rows of different lengths
        tensor, fits = torch.empty(0), False
    if not fits:
        raise ValueError(f"{name} must be a sequence of at least {at_least} numbers, got {_shown(values)}.")
    return tensor.to(torch.float64)


def check_shape(name: str, value: Any) -> tuple[int, ...]:
    """A shape: a sequence of positive integers, as a tuple."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"{name} must be a shape, a sequence of positive integers, got {_shown(value)}.")
    if not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0 for n in value):
        raise ValueError(f"{name} must be a shape of positive integers, got {_shown(value)}.")
    return tuple(int(n) for n in value)


def check_tolerances(rtol: Any, atol: Any, largest_atol: float = math.inf) -> tuple[float, float]:
    """Tolerances of an adaptive solver: positive, rtol below 1, and not both below what float64 resolves."""
    rtol = check_number("rtol", rtol, above=0.0, below=1.0)
    atol = check_number("atol", atol, above=0.0, below=largest_atol)
    if rtol + atol < SMALLEST_TOLERANCE:
        raise ValueError(f"rtol and atol must not both lie below {SMALLEST_TOLERANCE:g}, got {rtol!r} and {atol!r}.")
    return rtol, atol


def check_tensor(name: str, value: Any, shape: tuple[int | None, ...] | None = None, finite: bool = True) -> Tensor:
    """A tensor of real numbers with at least one element.

    Args:
        name: Of the argument.
        value: The tensor.
        shape: Its shape, None for any size of an axis; None for any shape.
        finite: Whether NaN and infinity are refused.
    """
    letters = "BCHW" if shape is None or len(shape) <= 4 else ["?"] * len(shape)
    text = "(B, ...)" if shape is None else f"({', '.join(str(n or c) for n, c in zip(shape, letters, strict=False))})"
    if not isinstance(value, Tensor) or value.is_complex():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a tensor of real numbers, shape {text}, got {kind}.")
    right = value.ndim > 0 if shape is None else value.ndim == len(shape)
    right = right and (shape is None or all(n in (None, m) for n, m in zip(shape, value.shape, strict=True)))
    if not right or value.numel() == 0:
        raise ValueError(f"{name} must have shape {text} with at least one sample, got {tuple(value.shape)}.")
    if finite and value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} must be finite.")
    return value


def check_generators(generator: Any, count: int) -> torch.Generator | list[torch.Generator] | None:
    """None, one generator, or a sequence of ``count`` generators, as a list; nothing is drawn from them."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if not isinstance(generator, (list, tuple)) or not all(isinstance(g, torch.Generator) for g in generator):
        raise ValueError(f"generator must be a torch.Generator, a list of them, or None, got {_shown(generator)}.")
    if len(generator) != count:
        raise ValueError(f"generator is a list of {len(generator)}, but there are {count} samples: pass one for each.")
    return list(generator)


def _plain(value: Any) -> Any:
    """The number in an array or tensor with one element and no axes, and anything else as it is."""
    return value.item() if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.ndim == 0 else value


def _range(above: float | None, at_least: float | None, below: float | None, at_most: float | None) -> str:
    low, high = at_least if above is None else above, at_most if below is None else below
    low_text, high_text = (str(n) if isinstance(n, int) else f"{n:g}" if n is not None else "" for n in (low, high))
    if low is not None and high is not None and high < math.inf:
        return f" in {'[' if above is None else '('}{low_text}, {high_text}{']' if below is None else ')'}"
    if low is not None:
        return f" {'>=' if above is None else '>'} {low_text}"
    return "" if high is None else f" {'<=' if below is None else '<'} {high_text}"


def _shown(value: Any) -> str:
    """The value for a message, on one line and not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else text[:97] + "..."


def check_state(x: Tensor, name: str = "x") -> Tensor:
    """Check that ``x`` is a batch of finite floating-point samples; return a copy in float32 or float64.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a floating-point tensor of shape (B, ...), got {kind}.")
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"{name} must have shape (B, ...) with at least one sample, got {tuple(x.shape)}.")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} must be finite.")
    # A clone made outside inference mode may be differentiated, and the caller's tensor is never written to.
    with torch.inference_mode(False):
        return x.detach().clone().to(x.dtype if x.dtype == torch.float64 else torch.float32)


def check_conditioning(conditioning: Mapping[str, Tensor] | None, samples: int) -> dict[str, Tensor]:
    """Check that the denoiser's arguments have one row per sample; return copies of them."""
    for name, value in (conditioning or {}).items():
        if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != samples:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"conditioning {name!r} must be a tensor with one row per sample ({samples}), got {shape}."
            )
    with torch.inference_mode(False):
        return {name: value.clone() for name, value in (conditioning or {}).items()}
