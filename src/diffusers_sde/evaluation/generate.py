"""A folder of images, or one npz file, drawn from a saved pipeline."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import nn

from ..basics.files import saving, write_whole
from ..basics.processes import lock_for_all
from .samplers import ImageSampler, as_sde_pipeline, launched_processes, load_pipeline
from .sampling import SamplingConfig

RECORD = "samples.json"
_NAME = re.compile(r"(\d{6,})\.png")
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
UNPACKED = ".images"  # folder in which the images of an npz file are collected until all are there


def generate(config: SamplingConfig) -> dict[str, Any]:
    """Draw images and write them; images that are there already are left as they are.

    Under ``accelerate launch`` the images are divided among the processes. Every file is written under another name
    first, so that an interruption leaves only whole files. A file that is broken nevertheless is drawn again.
    ``samples.json`` says what the folder holds.

    Returns:
        What ``samples.json`` holds: the model and its ``fingerprint``, ``sampler`` (the options that were changed),
        ``seed``, ``class_labels``, ``prompts``, and ``labels`` (of each image, or None), ``num_images``, and
        ``calls_per_image``, network calls for each image drawn in this run (None if there was nothing to draw).

    Raises:
        ValueError: A bad option, or a folder with other images, with more of them, or with files that cannot be read.
            ``FolderInUse``: another run is writing to it.
        OSError: The folder cannot be written.
    """
    process = launched_processes()
    config.make_sampler()  # refuses bad options, as far as it can, before anything is loaded
    with lock_for_all(Path(config.output_dir), process):
        return _generate(config, process)


def _generate(config: SamplingConfig, process: PartialState) -> dict[str, Any]:
    sampler, folder = config.make_sampler(), Path(config.output_dir)
    with process.main_process_first():
        pipe = as_sde_pipeline(load_pipeline(config.model)).to(process.device)
    draw = ImageSampler(pipe, sampler, config.seed, config.class_labels, config.prompts)
    record: dict[str, Any] = {
        "model": config.model,
        "fingerprint": fingerprint(pipe.unet),
        "sampler": dict(sampler.options),
        "seed": config.seed,
        "class_labels": None if config.class_labels is None else list(config.class_labels),
        "prompts": None if config.prompts is None else list(config.prompts),
    }
    packed = folder / "samples.npz"
    images = folder if config.format == "png" else folder / UNPACKED
    _check_record(folder / RECORD, record)
    shape = tuple(pipe.image_shape)
    count = _count(packed, shape)
    _check_surplus(folder, count if config.format == "npz" else 0, config)
    process.wait_for_everyone()  # nobody writes before everybody has looked
    if process.is_main_process:
        with saving(RECORD, folder):
            write_whole(folder / RECORD, partial(_write_json, record))
        images.mkdir(exist_ok=True)
    process.wait_for_everyone()

    complete = config.format == "npz" and count == config.num_images
    missing = [] if complete else [i for i in range(config.num_images) if not _is_whole(_file(images, i), shape)]
    process.wait_for_everyone()
    mine = missing[process.process_index :: process.num_processes]
    for numbers, batch in draw(mine, config.batch_size, progress_bar=process.is_main_process):
        for number, image in zip(numbers, batch.numpy(), strict=True):
            picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
            with saving(f"Image {number}", folder):
                write_whole(_file(images, number), partial(picture.save, format="PNG"))

    counts = gather_object([(draw.calls, draw.images)])
    drawn = sum(images for _, images in counts)
    labels = [draw.label(i) for i in range(config.num_images)]
    record |= {
        "num_images": config.num_images,
        "labels": None if labels[0] is None else labels,
        "calls_per_image": sum(calls for calls, _ in counts) / drawn if drawn else None,
    }
    if process.is_main_process:
        if config.format == "npz" and not complete:
            with saving("The images", folder):
                _pack(images, packed, config.num_images, record["labels"])
        if config.format == "npz":
            shutil.rmtree(images)
        with saving(RECORD, folder):
            write_whole(folder / RECORD, partial(_write_json, record))
    process.wait_for_everyone()
    return record


def fingerprint(unet: nn.Module) -> str:
    """A hash of a network's weights."""
    digest = hashlib.sha256()
    for name, value in unet.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _write_json(content: Any, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def _numbers(folder: Path) -> list[int]:
    """The numbers of the images in a folder."""
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))


def _check_record(path: Path, record: dict[str, Any]) -> None:
    folder = path.parent
    if not path.exists():
        if _numbers(folder) or (folder / "samples.npz").exists():
            raise ValueError(
                f"output_dir {str(folder)!r} holds images, but no {RECORD} that says of which model: choose another "
                "folder, or delete them."
            )
        return
    try:
        saved = json.loads(path.read_text())
        if not isinstance(saved, dict):
            raise ValueError(f"a dictionary is needed, got a {type(saved).__name__}")
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({error}): delete its folder, or choose another one."
        ) from error
    for name, value in record.items():
        if name != "model" and saved.get(name) != value:  # a model may move
            raise ValueError(
                f"output_dir {str(path.parent)!r} holds images of {name} {saved.get(name)!r}, and now it is {value!r}: "
                "choose another folder, or delete that one."
            )


def _check_surplus(folder: Path, packed: int, config: SamplingConfig) -> None:
    """Refuse a folder with more images than are asked for: people who read the folder would take all for samples."""
    numbers = _numbers(folder) if config.format == "png" else []
    found = max(packed, numbers[-1] + 1 if numbers else 0)
    if found > config.num_images:
        raise ValueError(
            f"output_dir {str(folder)!r} holds image{'s' * (found > 1)} up to number {found - 1}, more than num_images "
            f"{config.num_images}: ask for {found}, choose another folder, or delete those that are too many."
        )


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether a file is a complete image of this shape, (C, H, W). If it is not, it is drawn again."""
    try:
        content = path.read_bytes()
        Image.open(BytesIO(content)).verify()  # checks the checksums
        with Image.open(BytesIO(content)) as image:
            image.load()
            return content.endswith(PNG_END) and (len(image.getbands()), image.height, image.width) == shape
    except Exception:  # a decoder may raise anything
        return False


def _count(packed: Path, shape: tuple[int, ...]) -> int:
    """Number of images in an npz file; 0 where there is no such file."""
    if not packed.exists():
        return 0
    try:
        with np.load(packed) as arrays:
            images = arrays["arr_0"]
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1:] != (*shape[1:], shape[0]):
            raise ValueError(f"its arr_0 is {images.dtype} of shape {images.shape}")
    except Exception as error:  # the file may hold anything
        raise ValueError(
            f"{str(packed)!r} holds no images of this model ({error}): delete it, or choose another folder."
        ) from error
    return len(images)


def _pack(folder: Path, packed: Path, count: int, labels: list[int] | None) -> None:
    pixels = [np.asarray(Image.open(_file(folder, i))) for i in range(count)]
    stacked = np.stack(pixels).reshape(count, *pixels[0].shape[:2], -1)
    arrays = [stacked] if labels is None else [stacked, np.array(labels)]

    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, *arrays)

    write_whole(packed, save)
