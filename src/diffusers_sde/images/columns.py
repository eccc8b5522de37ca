"""Which columns of a data set hold the images and their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor


def image_column(features: Mapping[str, Any], wanted: str | None) -> str:
    """The column with the images: the one that is wanted, or the first that looks like it."""
    columns = list(features)
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"image_column must be one of {', '.join(columns)}, got {wanted!r}.")
        return wanted
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found += [name for name, feature in features.items() if _is_encoded(feature)]
    found += [name for name in ("image", "img", "images") if name in columns]
    if not found:
        raise ValueError(f"The data set has no image column: name it with image_column, one of {', '.join(columns)}.")
    return found[0]


def _is_encoded(feature: Any) -> bool:
    """Whether a column, though not typed as images, holds the bytes of their files: {bytes, path}, as in Parquet."""
    return (
        isinstance(feature, Mapping)
        and set(feature) == {"bytes", "path"}
        and isinstance(feature["bytes"], datasets.Value)
        and "binary" in feature["bytes"].dtype
    )


def decoded(dataset: Any, column: str) -> Any:
    """A data set whose column of images is known to be one."""
    feature = dataset.features[column]
    is_bytes = isinstance(feature, datasets.Value) and "binary" in feature.dtype
    return dataset.cast_column(column, datasets.Image()) if is_bytes or _is_encoded(feature) else dataset


def label_column(features: Mapping[str, Any], wanted: str | None) -> str | None:
    """The column with the classes: the one that is wanted, or the first of classes, if any."""
    if wanted is not None and wanted not in features:
        raise ValueError(f"label_column must be one of {', '.join(features)}, got {wanted!r}.")
    found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return wanted or (found[0] if found else None)


def classes_of(
    dataset: datasets.Dataset, wanted: str | None, num_classes: int | None
) -> tuple[list[str], Tensor | None]:
    """The names of the classes, and the class of each image, shape (n,); none where the data have no classes."""
    column = label_column(dataset.features, wanted)
    if column is None:
        return [], None
    values = np.asarray(dataset.with_format(None)[column][:])
    if values.dtype.kind not in "iu":
        raise ValueError(f"label_column {column!r} must hold class numbers, it holds {values.dtype}.")
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
    else:
        names = map(str, range(num_classes or int(values.max()) + 1))
    return list(names), torch.from_numpy(values.astype(np.int64))


def captions_of(dataset: datasets.Dataset, column: str) -> list[str]:
    """The caption of each image.

    Args:
        dataset: The images with their captions.
        column: The column with the captions: text, or classes, whose names are the captions.

    Raises:
        ValueError: There is no such column, or it does not hold one caption for each image.
    """
    if column not in dataset.features:
        raise ValueError(f"caption_column must be one of {', '.join(dataset.features)}, got {column!r}.")
    captions = as_captions(dataset.with_format(None)[column][:], dataset.features[column])
    bad = next((i for i, caption in enumerate(captions) if not isinstance(caption, str)), None)
    if bad is not None:
        raise ValueError(
            f"caption_column {column!r} must hold one text for each image, that of image {bad} is {captions[bad]!r}."
        )
    return captions


def as_captions(values: Sequence[Any], feature: Any) -> list[Any]:
    """Values of a column as captions: classes by their names, None where there is none, and others as they are.

    Args:
        values: The values.
        feature: What datasets says of the column.
    """
    if not isinstance(feature, datasets.ClassLabel):
        return list(values)
    return [feature.names[value] if value is not None and value >= 0 else None for value in values]
