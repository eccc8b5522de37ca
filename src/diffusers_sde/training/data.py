"""Images to train on: where they come from, and how a sample number becomes a training sample."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .configuration import EMBEDDED_DATASETS, TrainingConfig
from .randomness import AUGMENTATION, NOISE, SampleRandom, epoch_order

logger = logging.getLogger(__name__)

CACHE_BYTES = 2**30
SCANNED_IMAGES = 256
IMAGE_SUFFIXES = frozenset(Image.registered_extensions())
GREY_MODES = ("1", "L")  # of what _as_pil returns
DEEP_WHITE = 65535  # of grey images of more than 8 bits
FINGERPRINTED = 16  # images

# ------------------------------------------------------------------ where images come from


def load_images(config: TrainingConfig) -> datasets.Dataset | datasets.IterableDataset:
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


def _load(config: TrainingConfig) -> datasets.Dataset | datasets.IterableDataset:
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


def _load_local(path: Path, config: TrainingConfig) -> datasets.Dataset | datasets.IterableDataset:
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


# ------------------------------------------------------------------ images as the network sees them


class ImageSource:
    """A data set seen as square byte images of one size, with what the rest of training needs to know about it.

    Args:
        dataset: Its rows have an image (a PIL image, or an array: bytes, integers of 16 bits, or floats in [0, 1]), or
            the bytes of its file, and perhaps a class.
        config: Resolution, cropping and columns.
        show_progress: Whether to show a progress bar while images are read into memory.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        resolution: Side in pixels.
        class_names: Names of the classes; empty where there are none.
        labels: Class of each image, shape (n,), or None.

    Raises:
        ValueError: No images, no such column, images that are broken, not finite or of mixed sizes.
    """

    def __init__(self, dataset: datasets.Dataset, config: TrainingConfig, show_progress: bool = False) -> None:
        if len(dataset) == 0:
            raise ValueError("The data set is empty: there is nothing to train on.")
        self._center_crop, self._white = config.center_crop, config.white_level
        self._image_column = image_column(dataset.features, config.image_column)
        self._dataset = dataset = decoded(dataset, self._image_column)
        if config.skip_broken_images:
            self._dataset = dataset = self._without_broken(show_progress)
        self.class_names, self.labels = _classes(dataset, config)
        first = [self._read(i) for i in range(min(len(dataset), SCANNED_IMAGES))]
        self.channels = config.channels or (1 if all(image.mode in GREY_MODES for image in first) else 3)
        self.resolution = config.resolution or first[0].width
        self._fixed_size = config.resolution is None
        for i, image in enumerate(first):
            self._check_size(i, image)
        fits = len(dataset) * self.channels * self.resolution**2 <= CACHE_BYTES
        self._cache: np.ndarray | None = None
        if config.cache_images or (config.cache_images is None and fits):
            self._cache = self._read_all(show_progress)

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def num_images(self) -> int | None:
        """Images in one pass through the data; None where that is not known."""
        return len(self)

    def epoch(self, samples_seen: int) -> float:
        """Passes through the data when so many samples have been seen."""
        return samples_seen / len(self)

    @property
    def is_cached(self) -> bool:
        """Whether all images are in memory."""
        return self._cache is not None

    def get(self, index: int, random: np.random.Generator | None = None) -> np.ndarray:
        """Image ``index``, bytes of shape (C, H, W); ``random`` places the crop unless cropping is central."""
        if self._cache is not None:
            return self._cache[index]
        return self._fit(index, self._read(index), random)

    def get_many(self, indices: Sequence[int]) -> np.ndarray:
        """Images, central crops, shape (B, C, H, W)."""
        return np.stack([self.get(i) for i in indices])

    def statistics(self, data_min: float = -1.0) -> tuple[float, float]:
        """Standard deviation of the pixels and the largest distance between two images, for values in [data_min, 1].

        Measured on up to 1024 images spread evenly over the data set.
        """
        n = max(2, min(len(self), 1024, 2**25 // (self.channels * self.resolution**2)))
        indices = np.unique(np.linspace(0, len(self) - 1, n).round().astype(int))
        images = to_network(torch.from_numpy(self.get_many(indices.tolist())).flatten(1), data_min)
        return float(images.std(correction=0)), float(torch.cdist(images, images).max())

    def fingerprint(self, with_classes: bool = False) -> str:
        """A hash of some images, the first and the last among them, and perhaps of all classes."""
        digest, n = hashlib.sha256(), len(self._dataset)
        for index in np.unique(np.linspace(0, n - 1, min(n, FINGERPRINTED)).round().astype(int)).tolist():
            image = self._read(index)
            digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
        if with_classes and self.labels is not None:
            digest.update(json.dumps([self.class_names, self.labels.tolist()]).encode())
        return digest.hexdigest()[:16]

    def _read(self, index: int) -> Image.Image:
        return self._open(index, lambda: self._dataset[index][self._image_column])

    def _open(self, index: int, read: Callable[[], Any]) -> Image.Image:
        try:
            value = read()
            if value is None:
                raise ValueError("there is none")
            return _as_pil(value, self._white)
        except Exception as error:  # whatever a decoder throws, the user needs to know which image
            raise ValueError(
                f"Image {index} of the data set cannot be used: {error} (skip_broken_images leaves such images out)."
            ) from error

    def _without_broken(self, show_progress: bool) -> datasets.Dataset:
        """The data set without the images that cannot be read, which are reported."""
        whole, broken = [], []
        for i in self._progress(range(len(self)), "Checking images", show_progress):
            try:
                self._read(i).load()
                whole.append(i)
            except (ValueError, OSError):
                broken.append(i)
        if not whole:
            raise ValueError(f"None of the {len(broken)} images of the data set can be read.")
        if broken:
            first = ", ".join(self._name(i) for i in broken[:5])
            logger.warning(
                "Left out %d of %d images, which cannot be read: %s%s.",
                len(broken),
                len(self),
                first,
                ", ..." if len(broken) > 5 else "",
            )
        return self._dataset.select(whole)

    def _name(self, index: int) -> str:
        """The file that an image comes from, or its number."""
        if not isinstance(self._dataset.features[self._image_column], datasets.Image):
            return str(index)
        raw = self._dataset.cast_column(self._image_column, datasets.Image(decode=False))[index][self._image_column]
        return (raw or {}).get("path") or str(index)

    def _check_size(self, index: int, image: Image.Image) -> None:
        if self._fixed_size and image.size != (self.resolution, self.resolution):
            raise ValueError(
                f"Image {index} has {image.width}x{image.height} pixels, the first is {self.resolution} wide: images "
                "that are not square or differ in size need resolution (and center_crop, or are cropped at random)."
            )

    def _fit(self, index: int, image: Image.Image, random: np.random.Generator | None) -> np.ndarray:
        self._check_size(index, image)
        image = image.convert("L" if self.channels == 1 else "RGB")
        side = self.resolution
        if image.size != (side, side):
            scale = side / min(image.size)
            width, height = (max(side, round(length * scale)) for length in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            left, top = (width - side) // 2, (height - side) // 2
            if random is not None and not self._center_crop:
                left, top = int(random.integers(width - side + 1)), int(random.integers(height - side + 1))
            image = image.crop((left, top, left + side, top + side))
        pixels = np.asarray(image, dtype=np.uint8)
        return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _read_all(self, show_progress: bool) -> np.ndarray | None:
        pixels = np.empty((len(self), self.channels, self.resolution, self.resolution), dtype=np.uint8)
        for i, image in self._progress(self._read_in_order(), "Reading images", show_progress):
            if not self._center_crop and not self._fixed_size and image.width != image.height:
                logger.info("Images that are not square are cropped at random, so they are read again every time.")
                return None
            pixels[i] = self._fit(i, image, None)
        return pixels

    def _read_in_order(self) -> Iterator[tuple[int, Image.Image]]:
        """All images with their numbers, a few hundred at a time, which is much faster than one by one."""
        column = self._dataset.select_columns([self._image_column])
        for start in range(0, len(self), SCANNED_IMAGES):
            numbers = range(start, min(start + SCANNED_IMAGES, len(self)))
            try:
                images = [_as_pil(value, self._white) for value in column[start : numbers.stop][self._image_column]]
            except Exception:  # one of them is broken: one by one, the error names it
                images = [self._read(i) for i in numbers]
            yield from zip(numbers, images, strict=True)

    def _progress(self, items: Iterable[Any], what: str, show: bool) -> Iterable[Any]:
        interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file needs no animation
        return tqdm(items, desc=what, total=len(self), disable=not show, leave=False, mininterval=interval)


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


def _classes(dataset: datasets.Dataset, config: TrainingConfig) -> tuple[list[str], Tensor | None]:
    column = label_column(dataset.features, config.label_column)
    if column is None:
        return [], None
    values = np.asarray(dataset.with_format(None)[column][:])
    if values.dtype.kind not in "iu":
        raise ValueError(f"label_column {column!r} must hold class numbers, it holds {values.dtype}.")
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
    else:
        names = map(str, range(config.num_classes or int(values.max()) + 1))
    return list(names), torch.from_numpy(values.astype(np.int64))


def _as_pil(value: Any, white: int | None) -> Image.Image:
    """Any image as a PIL image of mode 1, L or RGB. How bright it becomes does not depend on the image itself.

    Args:
        value: The image.
        white: Value of white in integer images of more than 8 bits; None for 65535.
    """
    if not isinstance(value, Image.Image):
        return _array_as_pil(np.asarray(value), white)
    image = ImageOps.exif_transpose(value)
    if image.mode == "F" or image.mode.startswith("I"):  # PIL's own conversion would clip these at 255
        pixels = np.asarray(image)
        deep = image.mode != "F"
        return _array_as_pil(_scaled(pixels, DEEP_WHITE if white is None else white) if deep else pixels, white)
    grey = image.mode in ("1", "L", "LA", "La") or (image.mode in ("P", "PA") and _has_grey_palette(image))
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:  # LAB's A is no alpha
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode in GREY_MODES:
        return image
    return image.convert("L" if grey else "RGB")


def _has_grey_palette(image: Image.Image) -> bool:
    """Whether all colours that an image takes from its palette are grey."""
    used = [index for index, count in enumerate(image.getchannel(0).histogram()) if count]
    palette = np.asarray(image.convert("P").getpalette("RGB") if image.mode == "PA" else image.getpalette("RGB"))
    colours = palette.reshape(-1, 3)
    colours = colours[[index for index in used if index < len(colours)]]
    return bool((colours == colours[:, :1]).all())


def _scaled(pixels: np.ndarray, white: int) -> np.ndarray:
    """Integers from 0 to ``white`` as floats in [0, 1]."""
    low, high = int(pixels.min(initial=0)), int(pixels.max(initial=0))
    if low < 0 or high > white:
        raise ValueError(f"integers of more than 8 bits must lie in 0..{white} (white_level), got {low} to {high}")
    return pixels / float(white)


def _array_as_pil(pixels: np.ndarray, white: int | None) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[-1] not in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] == 3)) or pixels.size == 0:
        raise ValueError(f"an array of shape (H, W), (H, W, 1 or 3) or (1 or 3, H, W) is needed, got {pixels.shape}.")
    # Integers of other types may be bytes that were counted in Python, unless it is said that they are not.
    if pixels.dtype == np.uint16 or (white is not None and pixels.dtype.kind in "iu" and pixels.dtype != np.uint8):
        pixels = _scaled(pixels, DEEP_WHITE if white is None else white)
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            raise ValueError("it has values that are not finite.")
        if pixels.min() < 0.0 or pixels.max() > 1.0:
            raise ValueError(f"floats must lie in [0, 1], got {pixels.min():g} to {pixels.max():g}.")
        pixels = np.rint(pixels * 255.0)
    elif pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(
            f"integers must lie in 0..255, or in 0..white_level where that is given, got {pixels.dtype} from "
            f"{pixels.min()} to {pixels.max()}."
        )
    return Image.fromarray(pixels.astype(np.uint8))


# ------------------------------------------------------------------ from sample numbers to batches


def to_network(images: Tensor, data_min: float) -> Tensor:
    """Bytes as float32 in [data_min, 1], same shape."""
    return images.float() * ((1.0 - data_min) / 255.0) + data_min


class TrainingSamples(Dataset):
    """Training samples by number: the image, and the random numbers that go with it.

    Noise is drawn here, so that loader processes share the work, in float32 on the host: a run sees the same noise on
    every device and at every precision.

    Args:
        source: The images.
        seed: Of order, augmentation, times and noise.
        random_flip: Mirror half of the samples.
        strata: Number n has its u in part n mod ``strata`` of so many equal parts of [0, 1); 1: anywhere.
    """

    def __init__(self, source: ImageSource, seed: int, random_flip: bool, strata: int = 1) -> None:
        self._source, self._seed, self._random_flip, self._strata = source, seed, random_flip, strata
        self._augmentation, self._noise = SampleRandom(seed, AUGMENTATION), SampleRandom(seed, NOISE)

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """A batch.

        Args:
            numbers: Sample numbers, length B.

        Returns:
            ``images``, bytes (B, C, H, W); ``noise``, unit Gaussian, float32 (B, C, H, W); ``u``, uniform in [0, 1),
            float64 (B,), which stands for the time; and where the data have classes ``labels``, int64 (B,), and
            ``label_draw``, uniform in [0, 1), float64 (B,), which decides whether the class is hidden.
        """
        source, n = self._source, len(self._source)
        indices = [int(epoch_order(self._seed, number // n, n)[number % n]) for number in numbers]
        labels = None if source.labels is None else source.labels[indices]
        return self._batch(numbers, lambda i, random: source.get(indices[i], random), labels)

    def deal(self, first: int, batch_size: int, process: int, processes: int) -> Iterable[list[Any]]:
        """What ``__getitems__`` takes for each batch of one process, from sample number ``first`` on, without end.

        Micro-batch m of the run holds numbers first + m P B + [p B, (p + 1) B) on process p of P.
        """
        start = first + process * batch_size
        while True:
            yield list(range(start, start + batch_size))
            start += processes * batch_size

    def _batch(
        self,
        numbers: Sequence[int],
        image_of: Callable[[int, np.random.Generator], np.ndarray],
        labels: Tensor | None,
    ) -> dict[str, Tensor]:
        source = self._source
        shape = (len(numbers), source.channels, source.resolution, source.resolution)
        images, noise = np.empty(shape, dtype=np.uint8), np.empty(shape, dtype=np.float32)
        u, label_draw = np.empty(len(numbers)), np.empty(len(numbers))
        for i, number in enumerate(numbers):
            augment = self._augmentation(number)
            flip = self._random_flip and augment.random() < 0.5
            image = image_of(i, augment)
            images[i] = image[..., ::-1] if flip else image
            draw = self._noise(number)
            u[i] = (number % self._strata + draw.random()) / self._strata
            draw.standard_normal(out=noise[i], dtype=np.float32)
            label_draw[i] = draw.random()
        batch = {"images": torch.from_numpy(images), "noise": torch.from_numpy(noise), "u": torch.from_numpy(u)}
        if labels is not None:
            batch["labels"] = labels
            batch["label_draw"] = torch.from_numpy(label_draw)
        return batch


def batches(
    samples: TrainingSamples,
    first: int,
    batch_size: int,
    process: int = 0,
    processes: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """The batches of one process, without end, from sample number ``first`` on."""
    loader = DataLoader(
        samples,
        batch_sampler=samples.deal(first, batch_size, process, processes),
        collate_fn=lambda batch: batch,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Not torch's global generator, from which a loader would otherwise draw: a resumed run must find it unmoved.
        generator=torch.Generator(),
    )
    return iter(loader)
