"""A sampler as words on a command line, and images by their numbers.

Image number i is drawn with a random generator of its own, seeded by (seed, i), and its class is that of i modulo the
number of classes, its prompt that of i modulo the number of prompts. A set of images therefore does not depend on the
batch size, on the number of processes or on interruptions, except for the rounding of the network, which may differ by
batch size.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from .. import schedulers
from ..basics.checks import check_integer
from ..basics.networks import denoises_images
from ..basics.options import one_line
from ..images.arrays import to_bytes
from ..pipelines import ClassConditionalSDEPipeline, SDEPipeline, TextSDEPipeline
from ..pipelines.runs import METHODS

CALL_OPTIONS = ("num_inference_steps", "method", "rtol", "atol", "guidance_scale", "classifier_guidance_scale")
GUIDANCE = (("guidance_scale", 1.0), ("classifier_guidance_scale", None))
_CONSTANTS = {"none": None, "true": True, "false": False}


def parse_value(text: str) -> Any:
    """The None, boolean or number that the text spells, or else the text itself."""
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def launched_processes() -> PartialState:
    """The processes that accelerate launched; PartialState by itself would not see those on CPUs."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@dataclass(frozen=True)
class Sampler:
    """Changes to a pipeline's own sampler, with a name.

    Args:
        label: Name in tables and files.
        options: Arguments of the scheduler (``predictor``, ``corrector``, ``snr``, ``time_grid``, ...), of the
            pipeline's call (``num_inference_steps``, ``method``, ``rtol``, ``atol``, ``guidance_scale``), or
            ``scheduler``, the name of a scheduler class of this package or of diffusers. Without options it is the
            pipeline's own sampler.
    """

    label: str
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> Sampler:
        """A sampler from ``label: key=value, key=value``; without a colon the whole text is the label.

        Raises:
            ValueError: A part is not of the form key=value.
        """
        label, colon, rest = text.partition(":")
        if not colon:
            rest = text if "=" in text else ""
        options: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in rest.split(","))):
            key, equals, value = (word.strip() for word in part.partition("="))
            if not (equals and key and value) or key in options:
                raise ValueError(f"sampler {text!r}: {part!r} must be key=value, and each key may stand once.")
            options[key] = parse_value(value)
        return cls(label.strip(), options)


def load_pipeline(model: str) -> DiffusionPipeline:
    """A pipeline from a folder or from the Hub.

    Raises:
        ValueError: The files are not those of a pipeline.
        OSError: There is no such folder or repository.
    """
    try:
        return DiffusionPipeline.from_pretrained(model)
    except (ValueError, OSError):
        raise
    except Exception as error:  # files that do not belong to a pipeline may raise anything
        raise ValueError(f"model {model!r} cannot be loaded: {type(error).__name__}: {error}") from error


def as_sde_pipeline(pipe: DiffusionPipeline) -> SDEPipeline:
    """Return a pipeline of this package as it is, and any other one that denoises images as an ``SDEPipeline``.

    Raises:
        ValueError: Its network is not called as ``unet(images, timestep)``, with nothing else.
    """
    if isinstance(pipe, SDEPipeline):
        return pipe
    unet: Any = getattr(pipe, "unet", None)
    if not denoises_images(unet):
        raise ValueError(
            f"model is a {type(pipe).__name__}: a pipeline is needed whose network, unet, is called as (images, "
            "timestep) with nothing else, such as one with a UNet2DModel."
        )
    return SDEPipeline(unet, pipe.scheduler)


class ImageSampler:
    """Draws images by their numbers; building it checks the options, calling it does the work.

    Args:
        pipe: The pipeline, which is left as it is.
        sampler: What to change about its sampler.
        seed: Any integer >= 0; sets of different seeds have no image in common.
        class_labels: Classes (numbers or names) that the images have in turn, for a class-conditional pipeline; all
            classes if None.
        prompts: Captions that the images have in turn, for a pipeline that is told captions; the empty one if None.

    Attributes:
        calls: Network calls so far, counted for each image. Both halves of guidance and rejected steps are included.
        images: Number of images drawn so far.

    Raises:
        ValueError: An option that neither the scheduler nor the pipeline has, or a bad value; the sampler is named.
    """

    def __init__(
        self,
        pipe: SDEPipeline,
        sampler: Sampler,
        seed: int = 0,
        class_labels: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> None:
        self._prompts = None if prompts is None else list(prompts)
        self.pipe, self.sampler, self.seed = pipe, sampler, seed
        self.calls = self.images = 0
        try:
            self._classes = _classes(pipe, class_labels)
            if prompts is not None and not isinstance(pipe, TextSDEPipeline):
                raise ValueError("prompts need a pipeline that is told captions, and this one is not.")
            self._arguments, self._scheduler = self._configure(dict(sampler.options))
        except ValueError as error:
            raise ValueError(f"sampler {sampler.label!r}: {error}") from error
        except Exception as error:  # diffusers' schedulers check no types, so a wrong one may raise anything
            given = ", ".join(f"{name}={value!r}" for name, value in sampler.options.items())
            raise ValueError(
                f"sampler {sampler.label!r}: one of {given} is of the wrong type ({one_line(error)})."
            ) from error

    def _configure(self, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        arguments = {name: options.pop(name) for name in CALL_OPTIONS if name in options}
        accepted = inspect.signature(self.pipe.__call__).parameters
        for name, value in arguments.items():
            if name not in accepted:
                raise ValueError(f"{type(self.pipe).__name__} takes no {name}.")
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name in ("rtol", "atol") and not (is_number and value > 0):
                raise ValueError(f"{name} must be a number > 0, got {value!r}.")
        if arguments.get("method", "scheduler") not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {arguments['method']!r}.")
        if self._classes is not None:
            self.pipe.denoiser(*(arguments.get(name, d) for name, d in GUIDANCE))  # refuses what it cannot do
        if isinstance(self.pipe, TextSDEPipeline):
            if self._prompts is None:
                self.pipe.unconditional(1)  # refuses a network that knows no empty caption
            some = (self._prompts or [""])[:1]  # not all of them, whose embeddings may be large
            self.pipe.denoiser(some, arguments.get("guidance_scale", 1.0))
        if "predictor" in options and options["predictor"] is None:
            options["predictor"] = "none"
        own = self.pipe.scheduler
        name = options.pop("scheduler", None)
        wanted: Any = type(own)
        if name is not None:
            wanted = getattr(schedulers, str(name), getattr(diffusers, str(name), None))
        if not hasattr(wanted, "set_timesteps"):
            raise ValueError(f"scheduler must be a class of this package or of diffusers, got {name!r}.")
        if not issubclass(wanted, schedulers.SDEScheduler):  # ours say so themselves
            unknown = sorted(set(options) - set(inspect.signature(wanted.__init__).parameters))
            if unknown:
                raise ValueError(f"{wanted.__name__} has no argument {', '.join(unknown)}.")
        scheduler = wanted.from_config(own.config, **options)
        scheduler.set_timesteps(arguments.get("num_inference_steps", accepted["num_inference_steps"].default))
        return arguments, scheduler

    def label(self, number: int) -> int | None:
        """Class of image ``number``; None for an unconditional pipeline."""
        return None if self._classes is None else self._classes[number % len(self._classes)]

    def prompt(self, number: int) -> str | None:
        """Caption of image ``number``; None where no prompts are given."""
        return None if self._prompts is None else self._prompts[number % len(self._prompts)]

    def __call__(
        self, numbers: Sequence[int], batch_size: int = 64, progress_bar: bool = False
    ) -> Iterator[tuple[list[int], Tensor]]:
        """The images of the given numbers, batch by batch.

        Args:
            numbers: Numbers of the images.
            batch_size: Images in one network call.
            progress_bar: Whether to show a progress bar.

        Yields:
            The numbers of a batch, and its images as bytes, shape (B, C, H, W), on the CPU.
        """
        pipe = copy.copy(self.pipe)  # with a scheduler and a progress bar of its own; the original stays as it is
        pipe.scheduler = self._scheduler
        pipe.set_progress_bar_config(disable=True)

        def count(module: Any, arguments: tuple, keywords: dict[str, Any]) -> None:
            self.calls += len(arguments[0] if arguments else keywords["sample"])

        hook = pipe.unet.register_forward_pre_hook(count, with_kwargs=True)
        title = f"Sampling ({self.sampler.label})"
        progress = tqdm(total=len(numbers), desc=title, unit="image", disable=not progress_bar)
        try:
            for start in range(0, len(numbers), batch_size):
                batch = list(numbers[start : start + batch_size])
                generators = [generator_of(self.seed, number) for number in batch]
                # The noise is drawn here, because a pipeline whose network is not float32 would draw other noise.
                latents = torch.stack([torch.randn(pipe.sample_shape, generator=g) for g in generators])
                told: dict[str, Any] = {}
                if self._classes is not None:
                    told["class_labels"] = torch.tensor([self.label(number) for number in batch])
                if self._prompts is not None:
                    told["prompt"] = [self.prompt(number) for number in batch]
                images = self._draw(pipe, latents.to(pipe.device), generators, told)
                self.images += len(batch)
                progress.update(len(batch))
                yield batch, to_bytes(images, 0.0)
        finally:
            progress.close()
            hook.remove()

    def _draw(
        self, pipe: SDEPipeline, latents: Tensor, generators: list[torch.Generator], told: dict[str, Any]
    ) -> Tensor:
        """Images in [0, 1], shape (B, C, H, W)."""
        arguments = {**self._arguments, **told}
        images = pipe(latents=latents, generator=generators, output_type="pt", return_dict=False, **arguments)[0]
        return images


def draw_images(
    sampler: ImageSampler, count: int, batch_size: int, process: PartialState, progress_bar: bool = False
) -> tuple[Tensor, float]:
    """Draw images 0 to ``count`` - 1 by all processes together. All processes must call it.

    Returns:
        The images on every process, bytes of shape (count, C, H, W), and network calls per image.
    """
    mine = range(count)[process.process_index :: process.num_processes]
    parts = list(sampler(mine, batch_size, progress_bar and process.is_main_process))
    gathered = gather_object([(parts, sampler.calls)])
    numbers = torch.tensor([number for parts, _ in gathered for batch, _ in parts for number in batch])
    images = torch.cat([images for parts, _ in gathered for _, images in parts])
    return images[numbers.argsort()], sum(calls for _, calls in gathered) / count


def generator_of(seed: int, number: int) -> torch.Generator:
    """The generator of image ``number``, on the CPU, so that every device draws the same noise."""
    state = np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def _classes(pipe: SDEPipeline, class_labels: Iterable[int | str] | None) -> list[int] | None:
    if not isinstance(pipe, ClassConditionalSDEPipeline):
        if class_labels is not None:
            raise ValueError("class_labels need a class-conditional pipeline, and this one is not.")
        return None
    if class_labels is not None:
        return [_class_number(pipe, label) for label in class_labels]
    return [n for n in range(pipe.num_classes) if n != pipe.config.null_class]


def _class_number(pipe: ClassConditionalSDEPipeline, label: int | str) -> int:
    """The number of a class by its name or number; "3" is read as a number, unless a class has this name."""
    names = pipe.labels
    number = names.get(label, parse_value(label)) if isinstance(label, str) else label
    if isinstance(number, str):
        known = ", ".join(names) or "none: this pipeline's classes have no names"
        raise ValueError(f"class_labels holds {label!r}, but the names are {known}.")
    number = check_integer("class_labels", number, at_least=0, at_most=pipe.num_classes - 1)
    if number == pipe.config.null_class:
        raise ValueError(f"class_labels must not hold {label!r}, the null class, which stands for any class.")
    return number
