"""scripts/sample.py: a folder of images or one npz file from a saved pipeline."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
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
from ..basics.options import LARGEST_SEED, check_options, fail, option, parser_of
from ..basics.processes import lock_for_all
from ..pipelines.runs import METHODS
from ..sampling.correctors import CORRECTORS
from ..sampling.predictors import PREDICTORS
from .samplers import ImageSampler, Sampler, as_sde_pipeline, launched_processes, load_pipeline, parse_value

FORMATS = ("png", "npz")
RECORD = "samples.json"
_NAME = re.compile(r"(\d{6,})\.png")
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
UNPACKED = ".images"  # folder in which the images of an npz file are collected until all are there


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What to draw; each field is the option of ``scripts/sample.py`` with the same name.

    Raises:
        ValueError: A value out of range or an unknown name.
    """

    model: str = option(MISSING, "Folder or Hub name of a pipeline.")
    output_dir: str = option(MISSING, "Where the images go. A folder with a part of the same images is completed.")
    num_images: int = option(MISSING, "How many images.", least=1)
    format: str = option(
        "png", "One PNG file per image, or one file samples.npz: arr_0, bytes (N, H, W, C).", choices=FORMATS
    )
    batch_size: int = option(64, "Images in one network call.", least=1)
    seed: int = option(0, "Seed of the set of images.", least=0, most=LARGEST_SEED)
    class_labels: tuple[str, ...] | None = option(
        None, "Classes, numbers or names, that images have in turn. Default: all classes."
    )

    scheduler: str | None = option(None, "Scheduler class of this package or of diffusers. Default: the model's own.")
    num_inference_steps: int | None = option(None, "Noise levels. Default: 100.", least=1)
    predictor: str | None = option(None, "Default here and below: the model's own.", choices=tuple(PREDICTORS))
    corrector: str | None = option(None, "MCMC at each noise level.", choices=("none", *CORRECTORS))
    correct_steps: int | None = option(None, "Corrector steps per noise level.", least=1)
    snr: float | None = option(None, "Signal-to-noise ratio of the corrector's step size.", above=0.0)
    probability_flow: bool | None = option(None, "The probability-flow ODE instead of the reverse SDE.")
    stochasticity: float | None = option(None, "Eta of the reverse SDE: 1 is Anderson's, 0 the ODE.", least=0.0)
    solver_order: int | None = option(None, "Order of the exponential predictor.", least=1, most=3)
    time_grid: str | None = option(None, "sech, log_snr, karras, uniform, or none for timestep_spacing.")
    sampling_eps: float | None = option(None, "Last SDE time.", above=0.0)
    method: str | None = option(
        None, "'ode' or 'sde': the probability flow or the reverse SDE with adaptive steps.", choices=METHODS
    )
    rtol: float | None = option(None, "Relative tolerance of --method ode or sde.", above=0.0)
    atol: float | None = option(None, "Absolute tolerance of --method ode or sde.", above=0.0)
    guidance_scale: float | None = option(None, "Classifier-free guidance; 1 is none.", least=0.0)
    classifier_guidance_scale: float | None = option(None, "Guidance by the pipeline's classifier.", least=0.0)
    sampler: str | None = option(
        None, "Any further argument of the scheduler: 'key=value,key=value', such as 'rho=5,denoise_final=false'."
    )

    def __post_init__(self) -> None:
        if isinstance(self.class_labels, (list, tuple)):  # numbers are allowed; the command line gives words only
            object.__setattr__(self, "class_labels", tuple(str(label) for label in self.class_labels))
        check_options(self)

    def make_sampler(self) -> Sampler:
        """The sampler that the options describe."""
        names = [f.name for f in fields(self)]
        own = names[names.index("scheduler") : names.index("sampler")]
        given = {name: value for name in own if (value := getattr(self, name)) is not None}
        options = {name: parse_value(value) if isinstance(value, str) else value for name, value in given.items()}
        more = Sampler.parse(f"sample.py: {self.sampler or ''}").options
        twice = sorted(set(options) & set(more))
        if twice:
            raise ValueError(f"sampler repeats {', '.join(twice)}, which is given as an option of its own.")
        return Sampler("command line", {**options, **more})


def generate(config: SamplingConfig) -> dict[str, Any]:
    """Draw images and write them; images that are there already are left as they are.

    Under ``accelerate launch`` the images are divided among the processes. Every file is written under another name
    first, so that an interruption leaves only whole files. A file that is broken nevertheless is drawn again.
    ``samples.json`` says what the folder holds.

    Returns:
        What ``samples.json`` holds: the model and its ``fingerprint``, ``sampler`` (the options that were changed),
        ``seed``, ``class_labels`` and ``labels`` (of each image, or None), ``num_images``, and ``calls_per_image``,
        network calls for each image drawn in this run (None if there was nothing to draw).

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
    draw = ImageSampler(pipe, sampler, config.seed, config.class_labels)
    record: dict[str, Any] = {
        "model": config.model,
        "fingerprint": fingerprint(pipe.unet),
        "sampler": dict(sampler.options),
        "seed": config.seed,
        "class_labels": None if config.class_labels is None else list(config.class_labels),
    }
    packed = folder / "samples.npz"
    images = folder if config.format == "png" else folder / UNPACKED
    _check_record(folder / RECORD, record)
    shape = tuple(pipe.sample_shape)
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


def parse_args(argv: Sequence[str] | None = None) -> SamplingConfig:
    """The configuration that a command line describes.

    Raises:
        ValueError: See ``SamplingConfig``.
        SystemExit: An unknown option or a value that is not of its type.
    """
    parser = parser_of(
        SamplingConfig,
        prog="sample.py",
        description="Draw images from a saved pipeline, each from a seed of its own. Start the command again to go on "
        "after an interruption.",
    )
    return SamplingConfig(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> None:
    """Sample as the command line says; mistakes end in one line and exit code 2."""
    try:
        record = generate(parse_args(argv))
    except (ValueError, OSError) as error:
        raise fail("sample.py", error) from None
    if launched_processes().is_main_process and record["calls_per_image"] is not None:
        print(f"{record['num_images']} images, {record['calls_per_image']:g} network calls each.")
