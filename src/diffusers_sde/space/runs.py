"""What the page computes: models that are loaded once, and runs that return pictures as plain data.

Nothing here knows of a server. Every run builds its own scheduler and pipeline around one network, which holds no
state, so that visitors who sample at the same time do not disturb each other. Each public function refuses what is out
of range with a ValueError before it computes.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from PIL import Image
from torch import Tensor

from ..flow.codes import slerp
from ..pipelines import InpaintSDEPipeline, SDEPipeline
from ..pipelines.diagnostics import diagnose
from ..schedulers import FlowSDEScheduler, SDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler

SCHEDULERS = (VPSDEScheduler, VESDEScheduler, SubVPSDEScheduler, FlowSDEScheduler)
LEVELS = (6, 12, 25, 50)
SEEDS = 2**31
FORMING = 6  # images of each sampler that are seen to form
COMPLETIONS = 8
BETWEEN = 17
COMPARED = 24  # images of the model's own whose likelihood a drawing is compared with
FEW = 6  # network calls of the comparison at few calls
GUIDANCE = (1, 2, 3, 5)  # scales that may be asked for
GUIDED = 2  # the one that runs by class take if none is asked for: small networks draw a class vaguely without

# The three samplers of the paper. What is not named keeps the scheduler's default.
SAMPLERS: dict[str, dict[str, Any]] = {
    "sde": {},
    "pc": {"corrector": "langevin", "snr": 0.1},
    "ode": {"probability_flow": True},
}


class OfClasses(torch.nn.Module):
    """A network with classes as one without: image i of a batch is always asked for class i.

    With a ``scale`` other than 1 its answers are those of classifier-free guidance,
    e(null) + scale (e(class) - e(null)). That mixture of what a network predicts is the mixture of its estimates too,
    because one is affine in the other.

    Args:
        unet: The network.
        labels: Number of the class of each image; one number stands for all images.
        null_class: Number that stands for any class; None for a network without one.
        scale: Strength of the guidance.

    Raises:
        ValueError: ``scale`` is not 1 and there is no null class.
    """

    def __init__(self, unet: Any, labels: Sequence[int], null_class: int | None = None, scale: float = 1.0) -> None:
        if scale != 1.0 and null_class is None:
            raise ValueError(f"scale must be 1 for a network without a null class, got {scale!r}.")
        super().__init__()
        self.unet, self.labels, self.null_class, self.scale = unet, tuple(labels), null_class, scale
        self.config = FrozenDict({**unet.config, "num_class_embeds": None})
        self.dtype, self.device = unet.dtype, unet.device

    def forward(self, sample: Tensor, timestep: Tensor, **arguments: Any) -> Any:
        """What the network says for the classes."""
        labels = torch.tensor(self.labels, device=sample.device)
        labels = labels.expand(len(sample)) if len(labels) == 1 else labels
        if self.scale == 1.0 or self.null_class is None:
            return self.unet(sample, timestep, class_labels=labels, **arguments)
        both = torch.cat([labels, torch.full_like(labels, self.null_class)])
        found = self.unet(torch.cat([sample, sample]), timestep, class_labels=both, **arguments)
        output = found.sample if hasattr(found, "sample") else found[0]
        asked, any_class = output.chunk(2)
        mixed = torch.lerp(any_class, asked, self.scale)
        return type(found)(sample=mixed) if hasattr(found, "sample") else (mixed,)


@dataclass(frozen=True)
class Model:
    """A pipeline and what the page has to know of it.

    Attributes:
        name: A word for the page, such as "digits".
        pipe: The pipeline as it was loaded; runs take its network and the config of its scheduler.
        scheduler: The class of the schedulers that fit it.
        classes: Number of each class by its name; empty for a network without classes.
        fitted: Config of a sampler that was fitted to this network for ``FEW`` calls, if there is one.
    """

    name: str
    pipe: Any
    scheduler: type[SDEScheduler]
    classes: dict[str, int]
    fitted: dict[str, Any] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        config = self.pipe.unet.config
        height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
        return config.in_channels, height, width

    def classes_of(self, label: str, seeds: Sequence[int]) -> list[str]:
        """Name of the class of the image of each seed: ``label``, or all in turns where it is empty.

        The seed of an image alone decides. A network without classes has none to name.
        """
        if label and self.classes and label not in self.classes:
            raise ValueError(f"The class must be one of {', '.join(self.classes)}, got {label!r}.")
        names = list(self.classes)
        return [label or names[seed % len(names)] for seed in seeds] if names else []

    @property
    def null_class(self) -> int | None:
        """Number that stands for any class; None for a network without one."""
        null_class: int | None = self.pipe.config.get("null_class")
        return null_class if self.classes else None

    def network(self, label: str | None) -> Any:
        """The network for images of one class, or of any where ``label`` is empty and the network knows that."""
        if not self.classes:
            return self.pipe.unet
        number = self.classes[self.classes_of(label, [0])[0]] if label else self.null_class
        if number is None:
            raise ValueError(f"This model draws one class at a time: choose one of {', '.join(self.classes)}.")
        return OfClasses(self.pipe.unet, [number])

    def guided(self, label: str | None, seeds: Sequence[int], scale: Any = None) -> Any:
        """The network for one image of each seed: of the class ``label``, or in turns of all where it is empty.

        Args:
            label: Name of a class, or empty; see ``classes_of``.
            seeds: Seeds of the images.
            scale: Strength of classifier-free guidance, one of ``GUIDANCE``; None is ``GUIDED`` for a network with a
                null class and 1 for others.
        """
        able = self.null_class is not None
        if scale is None:
            scale = GUIDED if able else 1
        if isinstance(scale, bool) or scale not in (GUIDANCE if able else (1,)):
            allowed = f"one of {', '.join(map(str, GUIDANCE))}" if able else "1 for a model without a null class"
            raise ValueError(f"guidance must be {allowed}, got {scale!r}.")
        if not self.classes:
            return self.pipe.unet
        numbers = [self.classes[name] for name in self.classes_of(label or "", seeds)]
        return OfClasses(self.pipe.unet, numbers, self.null_class, float(scale))

    def sampler(self, levels: int, **options: Any) -> SDEScheduler:
        """A scheduler of its own for one run, laid out."""
        scheduler: SDEScheduler = self.scheduler.from_config(self.pipe.scheduler.config, **options)
        scheduler.set_timesteps(levels)
        return scheduler

    def pipeline(self, kind: type[SDEPipeline], label: str | None, **options: Any) -> Any:
        """A pipeline of its own for one run."""
        config = self.pipe.config
        pipe = kind(
            self.network(label),
            self.scheduler.from_config(self.pipe.scheduler.config, **options),
            data_min=config.get("data_min", -1.0),
            data_max=config.get("data_max", 1.0),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Unit noise, one image for each seed."""
        draws = [torch.randn(self.shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(draws).to(self.pipe.device)

    @cached_property
    def likelihoods(self) -> list[float]:
        """Bits per dimension of ``COMPARED`` images of the model's own, in increasing order; computed once."""
        x = self.noise(range(COMPARED))
        last = list(trace(self.sampler(25, **SAMPLERS["ode"]), self.network(None), x))[-1]
        return sorted(bits_of(self, quantized(self, last.sample)).tolist())


def load_model(name: str, source: str) -> Model:
    """Load a saved pipeline by folder or repository; a folder's ``fitted_6.json`` is its sampler for six calls.

    It computes in float32, whatever its weights were saved in.

    Raises:
        ValueError: It holds no network on images of one or three channels, or no scheduler here fits.
        OSError: There is no such folder or repository.
    """
    pipe = DiffusionPipeline.from_pretrained(source).to("cuda" if torch.cuda.is_available() else "cpu")
    config = getattr(getattr(pipe, "unet", None), "config", {})
    if config.get("in_channels") not in (1, 3) or not config.get("sample_size"):
        raise ValueError(f"{source} must hold a UNet2DModel on images of 1 or 3 channels and known size.")
    pipe.unet.float()
    refused = diagnose(pipe).reasons
    fitting = [cls for cls in SCHEDULERS if cls.__name__ not in refused]
    if not fitting:
        raise ValueError(f"No scheduler fits {source}:\n" + "\n".join(refused.values()))
    classes: dict[str, int] = {}
    if config.get("num_class_embeds") is not None:
        null_class = pipe.config.get("null_class")
        names = pipe.config.get("id2label") or {}
        classes = {str(names.get(str(n), n)): n for n in range(config["num_class_embeds"]) if n != null_class}
    path = Path(source) / f"fitted_{FEW}.json"
    fitted = dict(fitting[0].load_config(path)) if path.is_file() else None
    return Model(name, pipe, fitting[0], classes, fitted)


# ------------------------------------------------------------------ the loop


@dataclass(frozen=True)
class Moment:
    """One noise level of a run.

    Attributes:
        sigma: Noise-to-signal ratio sigma/alpha; 0 at the end.
        alpha: Factor of the data in the state.
        sample: The noisy state, shape (B, ...).
        guess: The network's estimate of the result, shape (B, ...).
    """

    sigma: float
    alpha: float
    sample: Tensor
    guess: Tensor


@torch.no_grad()
def trace(
    scheduler: SDEScheduler,
    network: Callable[..., Any],
    noise: Tensor,
    generators: list[torch.Generator] | None = None,
) -> Iterator[Moment]:
    """The loop of every diffusers pipeline; it yields what the first call at each noise level sees, and the result."""
    x, before = noise * scheduler.init_noise_sigma, None
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t)
        step: Any = scheduler.step(getattr(output, "sample", output), t, x, generator=generators)
        if before is None or t != before:
            time = scheduler.sde_time(t)
            alpha, sigma = float(scheduler.sde.alpha(time)), float(scheduler.sde.sigma(time))
            yield Moment(sigma / alpha, alpha, x, step.pred_original_sample)
        x, before = step.prev_sample, t
    yield Moment(0.0, 1.0, x, x)


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator for each seed."""
    return [torch.Generator().manual_seed(s) for s in seeds]


def checked_seed(value: Any) -> int:
    """A seed that a browser has sent."""
    return _whole("seed", value, 0, SEEDS)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or not low <= value < high:
        raise ValueError(f"{name} must be a whole number from {low} to {high - 1}, got {value!r}.")
    return int(value)


def _seeds(first: Any, count: int) -> range:
    first = checked_seed(first)
    return range(first, first + count)


def _levels(value: Any) -> int:
    if value not in LEVELS:
        raise ValueError(f"steps must be one of {', '.join(map(str, LEVELS))}, got {value!r}.")
    return int(value)


# ------------------------------------------------------------------ pictures as data


def pixels(model: Model, x: Tensor) -> Tensor:
    """Data in the network's range as floats in [0, 1]."""
    low, high = model.pipe.config.get("data_min", -1.0), model.pipe.config.get("data_max", 1.0)
    return ((x - low) / (high - low)).clamp(0.0, 1.0)


def quantized(model: Model, x: Tensor) -> Tensor:
    """Data in the network's range as bytes, shape (B, C, H, W)."""
    return (255.0 * pixels(model, x)).round().to(torch.uint8)


def at_contrast(model: Model, moment: Moment) -> Tensor:
    """The noisy state, in [0, 1], at the contrast of the data also where sigma is large.

    For data in [m - h, m + h] that is (x/alpha - m) / sqrt(1 + (sigma/(alpha h))^2) + m.
    """
    low, high = model.pipe.config.get("data_min", -1.0), model.pipe.config.get("data_max", 1.0)
    middle, half = (low + high) / 2.0, (high - low) / 2.0
    return pixels(model, (moment.sample / moment.alpha - middle) / math.hypot(1.0, moment.sigma / half) + middle)


def sprite(rows: Sequence[Tensor]) -> str:
    """Rows of images in [0, 1], each of shape (B, C, H, W), as one PNG in a data address, without gaps."""
    page = torch.cat([torch.cat(list(images), dim=2) for images in rows], dim=1)
    values = (255.0 * page).round().to(torch.uint8).movedim(0, -1).squeeze(-1)
    buffer = io.BytesIO()
    Image.fromarray(values.cpu().numpy()).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture(model: Model, address: str) -> Image.Image:
    """A picture that a browser has drawn, at the network's size.

    Raises:
        ValueError: It is no PNG in a data address or has another size.
    """
    head, _, body = str(address).partition(",")
    if head != "data:image/png;base64" or len(body) > 500_000:
        raise ValueError("A drawing must be a small PNG.")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(body, validate=True)), formats=("PNG",))
    except (ValueError, OSError) as error:
        raise ValueError("A drawing must be a small PNG.") from error
    channels, height, width = model.shape
    if image.size != (width, height):
        raise ValueError(f"A drawing must have {width} x {height} pixels, got {image.size[0]} x {image.size[1]}.")
    return image.convert("L" if channels == 1 else "RGB")


def _bytes(image: Image.Image, channels: int) -> Tensor:
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.reshape(image.height, image.width, channels).movedim(-1, 0)[None]


# ------------------------------------------------------------------ the runs


def describe(model: Model) -> dict[str, Any]:
    """What the page shows of a model before anything runs."""
    channels, height, width = model.shape
    return {
        "name": model.name,
        "channels": channels,
        "height": height,
        "width": width,
        "classes": list(model.classes),
        "any": not model.classes or model.null_class is not None,
        "guidance": list(GUIDANCE) if model.null_class is not None else [],
        "parameters": sum(p.numel() for p in model.pipe.unet.parameters()),
        "fitted": model.fitted is not None,
    }


def form(
    model: Model, seed: int = 0, label: str = "", steps: int = 25, guidance: int | None = None
) -> Iterator[dict[str, Any]]:
    """The same noise through the reverse SDE, predictor-corrector and the probability flow, one after the other."""
    seeds, steps = _seeds(seed, FORMING), _levels(steps)
    network = model.guided(label, seeds, guidance)
    x = model.noise(seeds)
    for name, options in SAMPLERS.items():
        scheduler = model.sampler(steps, **options)
        moments = list(trace(scheduler, network, x, generators_of(seeds)))
        yield {
            "sampler": name,
            "calls": len(scheduler.timesteps),
            "sigmas": [round(m.sigma, 5) for m in moments],
            "images": len(x),
            "classes": model.classes_of(label, seeds),
            "states": sprite([at_contrast(model, m) for m in moments]),
            "guesses": sprite([pixels(model, m.guess) for m in moments]),
        }


def complete(model: Model, image: str, hole: str, seed: int = 0, label: str = "") -> dict[str, Any]:
    """Eight completions of a drawing, by moment matching (MMPS).

    Pseudo-inverse guidance costs half as much, but leaves some noise in the hole where a network is as small as those
    that train in an hour.

    Args:
        model: The model.
        image: A PNG at the network's size.
        hole: Likewise; white where to draw anew.
        seed: Completion i depends on ``seed + i`` alone.
        label: Class of the completions, for a network with classes.
    """
    seed = checked_seed(seed)
    known, mask = picture(model, image), picture(model, hole).convert("L").point(lambda v: 255 * (v >= 128))
    if not mask.getbbox():
        raise ValueError("Nothing is to be drawn anew yet: paint over a part of the picture.")
    pipe = model.pipeline(InpaintSDEPipeline, label)
    generators = generators_of(range(seed, seed + COMPLETIONS))
    results = pipe(
        known,
        mask,
        posterior="mmps",
        num_samples=COMPLETIONS,
        num_inference_steps=25,
        generator=generators,
        output_type="pt",
    ).images
    return {"images": len(results), "sheet": sprite([results])}


@torch.no_grad()
def between(model: Model, seed: int = 0, other: int = 1, label: str = "", drawing: str | None = None) -> dict[str, Any]:
    """Images on the way from one latent code to another, all through the probability flow.

    Args:
        model: The model.
        seed: Seed of the first code.
        other: Seed of the second.
        label: Class of the images, for a network with classes.
        drawing: A PNG whose code, by the flow run forwards in time, takes the place of the first.
    """
    a, b = model.noise([checked_seed(seed)]), model.noise([checked_seed(other)])
    if drawing is not None:
        a = model.pipeline(SDEPipeline, label).encode(picture(model, drawing), rtol=1e-3, atol=1e-3)
    codes = slerp(a, b, torch.linspace(0.0, 1.0, BETWEEN)).reshape(BETWEEN, *model.shape)
    moments = list(trace(model.sampler(25, **SAMPLERS["ode"]), model.network(label), codes))
    return {"images": BETWEEN, "sheet": sprite([pixels(model, moments[-1].sample)]), "codes": sprite([_grey(codes)])}


def _grey(noise: Tensor) -> Tensor:
    """Unit noise as pictures: mean at one half, two standard deviations at black and white."""
    return (0.5 + 0.25 * noise).clamp(0.0, 1.0)


def bits_of(model: Model, images: Tensor) -> Tensor:
    """Bits per dimension of bytes, shape (B, C, H, W), under the unconditional model."""
    pipe = model.pipeline(SDEPipeline, "" if model.null_class is not None else _first(model))
    found = pipe.bits_per_dim(
        images, rtol=3e-3, atol=3e-3, generator=generators_of([0] * len(images)), dequantization="uniform"
    )
    return found.per_image.cpu()


def _first(model: Model) -> str:
    return next(iter(model.classes), "")


def likelihood(model: Model, image: str) -> dict[str, Any]:
    """Bits per dimension of a drawing, of an empty picture, of noise, and of what the model draws itself."""
    drawing = _bytes(picture(model, image), model.shape[0])
    noise = torch.randint(0, 256, drawing.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    empty = torch.zeros_like(drawing)
    found = bits_of(model, torch.cat([drawing, empty, noise])).tolist()
    return dict(zip(("drawing", "empty", "noise"), found, strict=True)) | {"own": model.likelihoods}


def few(model: Model, seed: int = 0, label: str = "") -> dict[str, Any]:
    """The same noise at ``FEW`` network calls by three samplers, and at 100 for comparison.

    Nothing is guided, because a sampler that was fitted to a network belongs to one strength of the guidance.
    """
    seeds = _seeds(seed, FORMING)
    network = model.guided(label, seeds, 1)
    x = model.noise(seeds)
    rows = {
        "first order": model.sampler(FEW, solver_order=1, gaussian_std=0.0, time_grid="uniform", **SAMPLERS["ode"]),
        "nothing set": model.sampler(FEW, **SAMPLERS["ode"]),
    }
    if model.fitted is not None:
        fitted = model.scheduler.from_config(model.fitted)
        fitted.set_timesteps(FEW)
        rows["fitted"] = fitted
    rows["100 calls"] = model.sampler(100, **SAMPLERS["ode"])
    results = {name: list(trace(s, network, x, generators_of(seeds)))[-1].sample for name, s in rows.items()}
    reference = results["100 calls"]
    return {
        "rows": [
            {
                "name": name,
                "calls": len(rows[name].timesteps),
                "error": round(float((result - reference).square().mean().sqrt()), 4),
                "sheet": sprite([pixels(model, result)]),
            }
            for name, result in results.items()
        ],
        "images": len(x),
        "classes": model.classes_of(label, seeds),
    }
