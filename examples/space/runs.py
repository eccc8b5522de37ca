"""What the demo computes: a loaded model, settings that are checked before a network call, runs that yield pictures.

Nothing here knows Gradio. Every run builds its own scheduler and pipeline around the one network, which holds no state:
users who sample at the same time do not disturb each other.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from PIL import Image, ImageOps
from torch import Tensor

from diffusers_sde import (
    ClassConditionalSDEPipeline,
    FlowSDEScheduler,
    InpaintSDEPipeline,
    SDEPipeline,
    SDEScheduler,
    SubVPSDEScheduler,
    VESDEScheduler,
    VPSDEScheduler,
    diagnose,
)

SDES: dict[str, type[SDEScheduler]] = {
    "VP": VPSDEScheduler,
    "VE": VESDEScheduler,
    "sub-VP": SubVPSDEScheduler,
    "rectified flow": FlowSDEScheduler,
}
REVERSE_SDE, PROBABILITY_FLOW = "reverse SDE", "probability-flow ODE"
INPAINT_POSTERIORS = ("repaint", "replacement", "mmps", "pigdm", "dps")
EACH_IN_TURN, ANY_CLASS = "each in turn", "any"
MAX_FRAMES = 24
MAX_IMAGES = 16


@dataclass(frozen=True)
class Model:
    """A pipeline and what the demo has to know of it.

    Attributes:
        name: Folder or repository.
        pipe: The pipeline as it was loaded; runs take its network and its scheduler's config.
        sde: Key in ``SDES`` of the path that the network was trained on.
        classes: Number of each class by its name, with ``any`` for the null class; empty for a network without.
    """

    name: str
    pipe: Any
    sde: str
    classes: dict[str, int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        config = self.pipe.unet.config
        height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
        return config.in_channels, height, width

    @property
    def null_class(self) -> int | None:
        """Number of the class that stands for any."""
        return self.pipe.config.get("null_class")

    def parts(self) -> dict[str, Any]:
        """What every pipeline is built from, but for its scheduler."""
        config = self.pipe.config
        return {
            "unet": self.pipe.unet,
            "data_min": config.get("data_min", -1.0),
            "data_max": config.get("data_max", 1.0),
        }

    def labels(self, choice: str | None, count: int) -> Tensor | None:
        """Class of each of ``count`` images, shape (count,); None for a network without classes."""
        if not self.classes:
            return None
        if choice != EACH_IN_TURN and choice not in self.classes:
            raise ValueError(f"class must be one of {EACH_IN_TURN}, {', '.join(self.classes)}, got {choice!r}.")
        numbers = [n for name, n in self.classes.items() if name != ANY_CLASS or choice == ANY_CLASS]
        chosen = numbers if choice == EACH_IN_TURN else [self.classes[choice]]
        return torch.tensor([chosen[i % len(chosen)] for i in range(count)], device=self.pipe.device)


def load_model(name: str) -> Model:
    """Load a saved pipeline by folder or repository.

    Raises:
        ValueError: It holds no network on images of one or three channels, or no scheduler here fits.
        OSError: There is no such folder or repository.
    """
    pipe = DiffusionPipeline.from_pretrained(name).to("cuda" if torch.cuda.is_available() else "cpu")
    config = getattr(getattr(pipe, "unet", None), "config", {})
    if config.get("in_channels") not in (1, 3) or not config.get("sample_size"):
        raise ValueError(f"{name} must hold a UNet2DModel on images of 1 or 3 channels and known size.")
    refused = diagnose(pipe).reasons
    fitting = [sde for sde, cls in SDES.items() if cls.__name__ not in refused]
    if not fitting:
        raise ValueError(f"No scheduler fits {name}:\n" + "\n".join(refused.values()))
    classes: dict[str, int] = {}
    if config.get("num_class_embeds") is not None:
        null_class = pipe.config.get("null_class")
        names = pipe.config.get("id2label") or {}
        classes = {names.get(str(n), str(n)): n for n in range(config["num_class_embeds"]) if n != null_class}
        classes |= {} if null_class is None else {ANY_CLASS: null_class}
    return Model(name, pipe, fitting[0], classes)


@dataclass(frozen=True)
class Settings:
    """A sampler, in the words of the schedulers' arguments; ``levels`` is ``num_inference_steps``."""

    sde: str
    dynamics: str = REVERSE_SDE
    stochasticity: float = 1.0
    predictor: str = "exponential"
    solver_order: int = 2
    corrector: str = "none"
    correct_steps: int = 1
    snr: float = 0.1
    time_grid: str = "sech"
    levels: int = 50

    def scheduler(self, model: Model) -> SDEScheduler:
        """A scheduler of its own for one run, laid out.

        Raises:
            ValueError: The network was trained on another path, or the choices do not go together.
        """
        scheduler: SDEScheduler = SDES[self.sde].from_config(
            model.pipe.scheduler.config,
            predictor=self.predictor,
            solver_order=int(self.solver_order),
            corrector=None if self.corrector == "none" else self.corrector,
            correct_steps=int(self.correct_steps),
            snr=self.snr,
            probability_flow=self.dynamics == PROBABILITY_FLOW,
            stochasticity=self.stochasticity,
            time_grid=self.time_grid,
        )
        scheduler.set_timesteps(int(self.levels))
        return scheduler


@dataclass(frozen=True)
class Frame:
    """Images in [0, 1], shape (B, C, H, W), after ``call`` of ``total`` network calls."""

    images: Tensor
    call: int
    total: int


def generate(
    model: Model,
    settings: Settings,
    count: int = 9,
    seed: int = 0,
    label: str | None = None,
    guidance_scale: float = 1.0,
    denoised: bool = False,
) -> Iterator[Frame]:
    """Frames of new images; the last one is the result.

    Args:
        model: The model.
        settings: The sampler.
        count: How many images.
        seed: Image i depends on ``seed + i`` alone.
        label: Name of a class, or "each in turn"; ignored for a network without classes.
        guidance_scale: Of classifier-free guidance, for a network with a null class.
        denoised: Show the network's estimate of the result instead of the noisy state, at one more call per frame.

    Raises:
        ValueError: An argument is out of range; nothing has been computed then.
    """
    scheduler = settings.scheduler(model)
    generators = _generators(model, count, seed)
    labels = model.labels(label, count)
    pipe: SDEPipeline
    arguments: dict[str, Any]
    if labels is None:
        pipe = SDEPipeline(scheduler=scheduler, **model.parts())
        arguments = {"batch_size": int(count)}
    else:
        pipe = ClassConditionalSDEPipeline(scheduler=scheduler, null_class=model.null_class, **model.parts())
        arguments = {"class_labels": labels, "guidance_scale": guidance_scale if model.null_class is not None else 1.0}
    arguments |= {"num_inference_steps": int(settings.levels), "generator": generators}
    return _frames(pipe, arguments, denoised, {} if labels is None else {"class_labels": labels})


def inpaint(
    model: Model,
    settings: Settings,
    image: Image.Image,
    mask: Image.Image,
    posterior: str = "repaint",
    count: int = 4,
    seed: int = 0,
    label: str | None = None,
    denoised: bool = False,
) -> Iterator[Frame]:
    """Frames of completions of one image; arguments as in ``generate``.

    Args:
        model: The model.
        settings: The sampler.
        image: At the network's size, as ``fit`` makes it.
        mask: Likewise; white where to paint.
        posterior: One of ``INPAINT_POSTERIORS``.
        count: How many completions.
        seed: Completion i depends on ``seed + i`` alone.
        label: Class of the completions, for a network with classes.
        denoised: As in ``generate``.

    Raises:
        ValueError: An argument is out of range, or the mask is empty; nothing has been computed then.
    """
    if mask.convert("L").getextrema()[1] < 128:
        raise ValueError("The mask covers no whole pixel of the network: paint over what is to be drawn anew.")
    scheduler = settings.scheduler(model)
    generators = _generators(model, count, seed)
    labels = model.labels(label, count)
    parts = model.parts()
    if labels is not None:
        parts["unet"] = OfClass(parts["unet"], labels)
    pipe = InpaintSDEPipeline(scheduler=scheduler, **parts)
    arguments = {
        "image": image,
        "mask_image": mask,
        "posterior": posterior,
        "num_samples": int(count),
        "num_inference_steps": int(settings.levels),
        "generator": generators,
    }
    return _frames(pipe, arguments, denoised, {})


class OfClass(torch.nn.Module):
    """A network with classes as an unconditional one: asked for the same labels, shape (B,), at every call."""

    def __init__(self, unet: Any, labels: Tensor) -> None:
        super().__init__()
        self.unet, self.labels = unet, labels
        self.config = FrozenDict({**unet.config, "num_class_embeds": None})
        self.dtype, self.device = unet.dtype, unet.device

    def forward(self, sample: Tensor, timestep: Tensor, **arguments: Any) -> Any:
        return self.unet(sample, timestep, class_labels=self.labels, **arguments)


def _generators(model: Model, count: int, seed: int) -> list[torch.Generator]:
    if count != int(count) or not 1 <= count <= MAX_IMAGES:
        raise ValueError(f"The number of images must be an integer in 1..{MAX_IMAGES}, got {count!r}.")
    if seed is None or seed != int(seed) or not 0 <= seed < 2**53:  # what a browser's number holds exactly
        raise ValueError(f"The seed must be an integer in [0, 2^53), got {seed!r}.")
    return [torch.Generator(model.pipe.device).manual_seed(int(seed) + i) for i in range(int(count))]


class _Stopped(Exception):
    """Nobody is looking any more."""


def _frames(
    pipe: SDEPipeline, arguments: dict[str, Any], denoised: bool, conditions: dict[str, Any]
) -> Iterator[Frame]:
    """Run a pipeline in a thread and yield what its callback sees, at most ``MAX_FRAMES`` frames, then the result.

    Closing the iterator stops the run at its next network call.
    """
    pipe.set_progress_bar_config(disable=True)
    events: queue.Queue[Frame | Exception] = queue.Queue()
    stopped = threading.Event()
    view = _view(pipe, denoised, conditions)
    before: list[Tensor] = []

    def on_step_end(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
        if stopped.is_set():
            raise _Stopped
        # A call gets the state that the one before has left, and knows its time.
        total = pipe.num_timesteps
        if before and index * MAX_FRAMES // total != (index - 1) * MAX_FRAMES // total:
            events.put(Frame(view(before[0], timestep), index, total))
        before[:] = [tensors["latents"]]
        return {}

    def work() -> None:
        try:
            images = pipe(**arguments, output_type="pt", callback_on_step_end=on_step_end).images
            events.put(Frame(images.cpu(), pipe.num_timesteps, pipe.num_timesteps))
        except Exception as error:  # whatever it is, the thread that waits has to hear of it
            events.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            event = events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if event.call == event.total:
                return
    finally:
        stopped.set()


def _view(pipe: SDEPipeline, denoised: bool, conditions: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """(state, timestep) -> images in [0, 1].

    The noisy state is shown as (x_t - alpha m) / sqrt(alpha^2 + (sigma/h)^2) + m for data in [m - h, m + h]: at the
    contrast of the data at every time, also where sigma is large.
    """
    scheduler, low, high = pipe.scheduler, pipe.config.data_min, pipe.config.data_max
    middle, half = (low + high) / 2, (high - low) / 2
    denoiser = scheduler.denoiser(pipe.unet, **conditions)

    def view(x: Tensor, timestep: Tensor) -> Tensor:
        t = scheduler.sde_time(timestep)
        if denoised:
            return pipe.postprocess(denoiser(x, t), "pt").cpu()
        alpha, sigma = float(scheduler.sde.alpha(t)), float(scheduler.sde.sigma(t))
        return pipe.postprocess((x - alpha * middle) / (alpha**2 + (sigma / half) ** 2) ** 0.5 + middle, "pt").cpu()

    return view


# ---------------------------------------------------------------------- pictures


def fit(image: Image.Image, shape: Sequence[int]) -> Image.Image:
    """The centre of a picture, averaged down to the network's channels and size; exact for a whole-number ``zoom``."""
    channels, height, width = shape
    return ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.BOX)


def painted(layers: Sequence[Image.Image], shape: Sequence[int]) -> Image.Image:
    """The mask at the network's size: white where strokes on transparent layers cover at least half of a pixel."""
    mask = Image.new("L", (shape[2], shape[1]))
    for layer in layers:
        covered = fit(layer.getchannel("A"), (1, *shape[1:])).point(lambda value: 255 * (value >= 128))
        mask.paste(255, mask=covered)
    return mask


def zoom(image: Image.Image, width: int, smooth: bool = False) -> Image.Image:
    """Enlarged by a whole number to at most ``width`` pixels: in squares, or smoothly, which is easier to read."""
    factor = max(1, width // image.width)
    resampling = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return image.resize((image.width * factor, image.height * factor), resampling)


def with_hole(image: Image.Image, mask: Image.Image) -> Image.Image:
    """What an inpainting run is given: the picture with its hole in orange."""
    given = image.convert("RGB")
    given.paste((255, 140, 0), mask=mask)
    return given


def picture(image: Tensor) -> Image.Image:
    """One image in [0, 1], shape (C, H, W), as PIL has it."""
    pixels = (255 * image).round().to(torch.uint8).movedim(0, -1).squeeze(-1)
    return Image.fromarray(pixels.numpy())


def sheet(images: Sequence[Image.Image], columns: int, width: int = 560, gap: int = 6) -> Image.Image:
    """Images of one size in rows, enlarged to fill about ``width`` pixels."""
    tiles = [zoom(image, width // columns - gap, smooth=True) for image in images]
    w, h = tiles[0].width + gap, tiles[0].height + gap
    page = Image.new("RGB", (columns * w + gap, -(-len(tiles) // columns) * h + gap), (128, 128, 128))
    for i, tile in enumerate(tiles):
        page.paste(tile, (i % columns * w + gap, i // columns * h + gap))
    return page
