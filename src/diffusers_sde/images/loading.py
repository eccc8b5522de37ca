"""Data sets of images by name or path."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from .options import EMBEDDED_DATASETS, ImageOptions

IMAGE_SUFFIXES = frozenset(Image.registered_extensions())


def load_images(config: ImageOptions) -> datasets.Dataset | datasets.IterableDataset:
    """The data set that the configuration names; with ``streaming`` an iterable one.

    Raises:
        ValueError: Nothing usable at the path, or no such split.
    """
    try:
        return _load(config)
    except (ValueError, OSError):
        raise
    except Exception as error:  # datasets has errors of its own, whose cause says more than they do
        raise ValueError(
            f"{'train_data_dir' if config.train_data_dir else 'dataset_name'} "
            f"{config.train_data_dir or config.dataset_name!r} cannot be read: {_root_cause(error)}"
        ) from error


def _root_cause(error: BaseException) -> str:
    """What an exception was first, in one line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _load(config: ImageOptions) -> datasets.Dataset | datasets.IterableDataset:
    if config.train_data_dir is not None:
        return _load_local(Path(config.train_data_dir), config)
    name = config.dataset_name or "digits"
    if name in EMBEDDED_DATASETS:
        digits = load_digits()
        try:  # datasets' own slices, such as train[:1500]
            (part,) = datasets.ReadInstruction.from_spec(config.dataset_split).to_absolute({"train": len(digits)})
        except ValueError as error:
            raise ValueError(
                f"The split of the digits must be train or a slice of it, got {config.dataset_split!r}."
            ) from error
        digits = digits.select(range(part.from_, part.to))
        return digits.to_iterable_dataset() if config.streaming else digits
    return datasets.load_dataset(
        name,
        config.dataset_config_name,
        split=config.dataset_split,
        cache_dir=config.cache_dir,
        streaming=config.streaming,
    )


def load_digits() -> datasets.Dataset:
    """Scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels in ten classes (Alpaydin & Kaynak 1998)."""
    from sklearn.datasets import load_digits as load

    digits = load()
    # Seventeen grey levels 0..16, spread over a byte.
    images = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    columns = {"image": [Image.fromarray(image) for image in images], "label": digits.target.tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


def _load_local(path: Path, config: ImageOptions) -> datasets.Dataset | datasets.IterableDataset:
    if not path.exists():
        raise ValueError(f"train_data_dir {str(path)!r} does not exist.")
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            if config.dataset_split not in loaded:
                raise ValueError(f"dataset_split must be one of {', '.join(loaded)}, got {config.dataset_split!r}.")
            loaded = loaded[config.dataset_split]
        return loaded.to_iterable_dataset() if config.streaming else loaded
    if path.is_file():
        parquet = [path] if path.suffix == ".parquet" else []
    else:
        # A folder may hold several splits as files named after them.
        parquet = sorted(path.rglob("*.parquet"))
        parquet = [file for file in parquet if config.dataset_split in file.name] or parquet
    options = {"cache_dir": config.cache_dir, "streaming": config.streaming}
    if parquet:
        files = [str(file) for file in parquet]
        return datasets.load_dataset("parquet", data_files=files, split="train", **options)
    if not path.is_dir() or not any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.rglob("*")):
        raise ValueError(
            f"train_data_dir {str(path)!r} holds no images: it must be a folder of image files, a Parquet file, a "
            "folder of Parquet files or a folder written by save_to_disk."
        )
    return datasets.load_dataset("imagefolder", data_dir=str(path), split=config.dataset_split, **options)
