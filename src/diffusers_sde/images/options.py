"""What says which images are read, and how: the options that training and evaluation share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from ..basics.options import CheckedOptions, option

EMBEDDED_DATASETS = ("digits",)
LARGEST_SEED_OF_NUMPY = 2**32 - 2**16  # its seeds are below 2**32, and every process adds its number


def is_local(name: str) -> bool:
    """Whether what may be a name on the Hub is a path of this machine, or looks like one of any machine."""
    if name in EMBEDDED_DATASETS:
        return False
    return name.startswith((".", "~", "/", "\\")) or bool(PureWindowsPath(name).drive) or Path(name).exists()


@dataclass(frozen=True, kw_only=True)
class ImageOptions(CheckedOptions):
    """Where images come from, and how they become square byte images of one size.

    Raises:
        ValueError: A value out of range, or options that contradict each other.
    """

    dataset_name: str | None = option(
        None,
        "Data set: 'digits' (scikit-learn's handwritten digits, 1797 grey 8x8 images, embedded) or a name on the Hub. "
        "Default: digits, unless train_data_dir is given.",
    )
    dataset_config_name: str | None = option(None, "Configuration of the Hub data set, where it has several.")
    dataset_split: str = option("train", "Split to train on.")
    train_data_dir: str | None = option(
        None,
        "Local data: a folder of images (sub-folders are classes), a Parquet file, a folder of Parquet files, or a "
        "folder written by datasets' save_to_disk.",
    )
    streaming: bool = option(
        False,
        "Read the data as they come instead of downloading and indexing them first; needs max_train_steps. Every "
        "process reads the whole stream, and decodes its own share.",
    )
    shuffle_buffer: int = option(
        10_000,
        "With streaming: images, as stored, that are held in memory to draw the next one from; 0: the order of the "
        "stream.",
        least=0,
    )
    image_column: str | None = option(None, "Column with the images. Default: the data's image column.")
    label_column: str | None = option(None, "Column with the classes. Default: the data's class column, if any.")
    num_classes: int | None = option(
        None,
        "Number of classes, where the class column holds plain integers. Default: the largest one plus 1.",
        least=1,
    )
    cache_dir: str | None = option(None, "Where datasets keeps downloads. Default: its own cache.")
    resolution: int | None = option(
        None, "Side of the training images in pixels. Default: the data's own size, if it is one.", least=2, most=16384
    )
    center_crop: bool = option(False, "Crop images that are not square in the middle; otherwise at random.")
    channels: int | None = option(
        None, "1 (grey) or 3 (RGB): convert images to it. Default: what the data has.", least=1, most=3
    )
    white_level: int | None = option(
        None,
        "Value of white in grey images of more than 8 bits (16-bit PNG and TIFF files), such as 4095 for 12-bit "
        "data in 16-bit files. Default: 65535.",
        least=1,
        most=2**31 - 1,
    )
    skip_broken_images: bool = option(
        False,
        "Leave out images that cannot be read, with a report; otherwise the first one is an error. With "
        "streaming every process decodes every image for it.",
    )
    cache_images: bool | None = option(
        None, "Keep all prepared images in memory as bytes. Default: where they need less than 1 GiB."
    )
    seed: int = option(0, "Seed of the order of a stream.", least=0, most=LARGEST_SEED_OF_NUMPY)

    @property
    def needs_labels(self) -> bool:
        """Whether whoever reads the images asks for their classes."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise ValueError(
                f"dataset_name={self.dataset_name!r} and train_data_dir={self.train_data_dir!r} exclude each other."
            )
        if self.channels == 2:
            raise ValueError("channels must be 1 or 3, got 2.")
