"""The probability flow of a diffusers pipeline: likelihood, latent codes, interpolation, adaptive sampling.

The file is long because all of it is one front with typed arguments; the mathematics is in ``flow``.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils import logging
from torch import Tensor
from tqdm.auto import tqdm

from ..basics.checks import check_conditioning, check_integer, check_number, check_ordered, check_tensor
from ..basics.networks import traits_of
from ..basics.noise import Generators
from ..flow.codes import decode, encode, interpolate, sample_flow, state_of_codes
from ..flow.likelihood import LogProb, log_prob
from ..flow.quantized import BitsPerDim, Quantization, bits_per_dim
from ..flow.solver import ODEOptions
from ..flow.trace import TraceOptions
from ..images.arrays import as_batch, from_network, in_network_range
from ..networks.denoisers import Denoiser, with_timestep
from ..sampling.editing import edit
from ..sampling.observation import HIGH_ORDER, posterior_mean, posterior_samples
from ..sampling.predictors import get_predictor
from ..sampling.solution import Solution
from ..schedulers import SCHEDULERS, SDEScheduler
from ..schedulers.families import fitting_class
from ..schedulers.stock_configs import config_of
from .encoders import Latents, downsampling_of

logger = logging.get_logger(__name__)


class ProbabilityFlow:
    """The normalising flow that a diffusers pipeline's network and scheduler define.

    It takes pipelines of this package and stock ones: ``DDPMPipeline``, ``DDIMPipeline``, ``LDMPipeline`` and whatever
    else has a ``unet`` or ``transformer`` that predicts one value per channel, and a scheduler whose config names an
    SDE. The pipeline is not changed: what its stock scheduler says is read into a new scheduler of this package.

    Args:
        pipe: The pipeline.
        data_min: Value of black in the network's data; read from the pipeline's config if None, else -1.
        data_max: Value of white; likewise, else 1.
        t_min: Smallest SDE time the network is evaluated at; if None the SDE's own, or the first entry of the table
            for networks that know only the times of a DDPM table.
        denoiser: (x_t, t, **conditioning) -> x0_hat, such as a guided one, instead of the network. A network with
            classes and a null class is unconditional unless ``conditioning`` says otherwise.

    Attributes:
        sde: The SDE.
        is_latent: Whether the network works on the latents of an autoencoder. The density is then one of latents, not
            of images, and bits per dimension do not exist.

    Raises:
        ValueError: The pipeline does not fit, and why.

    Example:
        ```py
        flow = ProbabilityFlow(DDPMPipeline.from_pretrained("google/ddpm-cifar10-32"))
        print(flow.bits_per_dim(images, generator=torch.manual_seed(0)).mean)
        ```
    """

    def __init__(
        self,
        pipe: Any,
        data_min: float | None = None,
        data_max: float | None = None,
        t_min: float | None = None,
        denoiser: Denoiser | None = None,
    ) -> None:
        network = network_of(pipe)
        channels = [getattr(network.config, key, None) for key in ("in_channels", "out_channels")]
        if None not in channels and channels[0] != channels[1] and not traits_of(network).returns_variance:
            raise ValueError(
                f"the network has {channels[0]} input and {channels[1]} output channels: one that takes a condition by "
                "concatenation defines no probability flow by itself."
            )
        _check_deterministic(network)
        self.network, self.scheduler = network, own_or_fitting_scheduler(pipe)
        self._guided, self._unconditional = denoiser, getattr(pipe, "unconditional", None)
        self.sde = self.scheduler.sde
        encoder = getattr(pipe, "encoder", None)
        self._encoder = encoder if isinstance(encoder, Latents) else None
        self.is_latent = any(getattr(pipe, name, None) is not None for name in ("vae", "vqvae", "movq"))
        data_min = getattr(pipe.config, "data_min", -1.0) if data_min is None else data_min
        data_max = getattr(pipe.config, "data_max", 1.0) if data_max is None else data_max
        self.data_min, self.data_max = check_ordered("data_min", data_min, "data_max", data_max)
        if t_min is None:
            t_min = self.sde.t_min
            if self.scheduler.conditioning.name == "discrete":
                t_min = max(t_min, 1.0 / self.scheduler.conditioning.num_train_timesteps)
        self.t_min = check_number("t_min", t_min, above=0.0, below=self.sde.t_max)
        alpha, sigma = self.sde.alpha(self.sde.t_max), self.sde.sigma(self.sde.t_max)
        parametrization = self.scheduler.parametrization
        if not parametrization.determines_data(alpha, sigma):
            raise ValueError(
                f"prediction_type {self.scheduler.config.prediction_type!r} ({type(parametrization).__name__}) does "
                f"not determine the data at t = {self.sde.t_max:g}, where this SDE has no signal left: its "
                "probability flow has no beginning."
            )
        self.device = getattr(pipe, "_execution_device", getattr(pipe, "device", torch.device("cpu")))

    def __repr__(self) -> str:
        data = "latents" if self.is_latent else f"data in [{self.data_min:g}, {self.data_max:g}]"
        network = type(self.network).__name__ + (", guided" if self._guided is not None else "")
        return f"ProbabilityFlow({network}, {self._sde_in_words()}, {data}, t_min={self.t_min:g})"

    def _sde_in_words(self) -> str:
        """The SDE with its numbers, or its class alone where they are a table."""
        text = repr(self.sde)
        return text if len(text) < 200 else type(self.sde).__name__

    def _repr_html_(self) -> str:
        """A small table, which notebooks show."""
        facts = {
            "network": type(self.network).__name__,
            "SDE": self._sde_in_words(),
            "predicts": str(self.scheduler.config.prediction_type),
            "works on": "latents" if self.is_latent else f"data in [{self.data_min:g}, {self.data_max:g}]",
            "t_min": f"{self.t_min:g}",
            "guided": "yes" if self._guided is not None else "no",
        }
        rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
        return f"<p>ProbabilityFlow</p><table>{rows}</table>"

    def denoiser(self, x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
        """x0_hat of the network, in the precision of ``x``; see ``SDEScheduler.denoiser``."""
        if self._guided is not None:
            return self._guided(x, t, **conditioning)
        if not conditioning and self._unconditional is not None:
            conditioning = self._unconditional(len(x))
        dtype = getattr(self.network, "dtype", x.dtype)

        def network(x: Tensor, timestep: Tensor, **kwargs: Any) -> Tensor:
            kwargs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in kwargs.items()}
            output = with_timestep(self.network, x.to(dtype), timestep.float(), **kwargs)
            return (output if isinstance(output, Tensor) else output[0]).to(x.dtype)

        return self.scheduler.denoiser(network, **conditioning)(x, t)

    def sampling_denoiser(self, x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
        """x0_hat at the scheduler's ``temperature``, for samples; likelihoods and codes take ``denoiser``."""
        return self.scheduler.tempered(self.denoiser)(x, t, **conditioning)

    def options(
        self, rtol: float = 3e-4, atol: float = 3e-4, max_calls: int = 5000, batch_size: int = 64
    ) -> ODEOptions:
        """Settings of the solver, with the scale of this pipeline's data: a quarter of its range, or 1 for latents.

        The default tolerance is for the density of networks, which are rough in time below some scale: 3e-4 was above
        that roughness in those tried, and costs 20 to 30 calls. A tighter one resolves the roughness, at the price of
        hundreds of calls; ``encode`` and ``decode`` need it to invert each other closely.
        """
        mean, std = (0.0, 1.0) if self.is_latent else self._moments
        return ODEOptions(rtol, atol, max_calls, batch_size, mean, std)

    @property
    def _moments(self) -> tuple[float, float]:
        return 0.5 * (self.data_min + self.data_max), 0.25 * (self.data_max - self.data_min)

    # ------------------------------------------------------------------ density

    def log_prob(
        self,
        x: Any,
        trace: TraceOptions | None = None,
        options: ODEOptions | None = None,
        conditioning: Mapping[str, Tensor] | None = None,
        generator: Generators = None,
        progress_bar: bool = False,
    ) -> LogProb:
        """Log-density in nats of continuous data in the network's range, or of latents; see ``flow.log_prob``.

        Args:
            x: Floating-point tensor, shape (B, C, H, W). For a latent model these are latents, scaled as the network
                sees them, and the number is a density of latents.
            trace: How the trace is found.
            options: From ``self.options(...)``.
            conditioning: Arguments of the network with one row per sample, such as ``class_labels``.
            generator: Source of the probes.
            progress_bar: Whether to show one.

        Returns:
            Values, standard errors, latent codes, calls.

        Raises:
            ValueError: Bad arguments.
            SolverError: The solver gives up.
        """
        x = self._state(x, "x")
        with Progress(progress_bar, len(x), "log-density") as progress:
            result = log_prob(
                self.denoiser,
                self.sde,
                x,
                trace=trace,
                options=self._or_default(options),
                t_min=self.t_min,
                conditioning=self._conditioning(conditioning),
                generator=generator,
                progress=progress,
            )
        log_cost("log-density", result.calls, result.calls.numel())
        return result

    def bits_per_dim(
        self,
        images: Any,
        value_range: tuple[float, float] | None = None,
        dequantization: str = "uniform",
        importance_samples: int = 1,
        bit_depth: int = 8,
        grid: str = "endpoints",
        trace: TraceOptions | None = None,
        options: ODEOptions | None = None,
        conditioning: Mapping[str, Tensor] | None = None,
        generator: Generators = None,
        progress_bar: bool = False,
    ) -> BitsPerDim:
        """Bits per dimension of images; see ``flow.bits_per_dim``.

        Args:
            images: PIL images; uint8 arrays (B, H, W, C) or (B, H, W); integer tensors (B, C, H, W); or
                floating-point tensors on the grid of such images.
            value_range: (black, white) of floating-point ``images``; the network's range if None.
            dequantization: ``uniform``, ``truncated_normal`` or ``none``.
            importance_samples: Dequantisations per image.
            bit_depth: 8 for ordinary images.
            grid: Where the levels lie in the network's range: ``endpoints`` or ``bins``; see ``Quantization``.
            trace: How the trace is found.
            options: From ``self.options(...)``.
            conditioning: Arguments of the network with one row per image, such as ``class_labels``.
            generator: Source of dequantisation noise and probes.
            progress_bar: Whether to show one.

        Returns:
            The mean with its standard error, and the values of the images.

        Raises:
            ValueError: Bad arguments, or a latent model.
            SolverError: The solver gives up.
        """
        if self.is_latent:
            raise ValueError(
                "this pipeline's network models latents: it has a density of latents (log_prob, latent_bits_per_dim), "
                "but no bits per dimension of images."
            )
        quantization = Quantization(self.data_min, self.data_max, bit_depth, grid)
        importance_samples = check_integer("importance_samples", importance_samples, at_least=1)
        images = self._shaped(as_batch(images), "images").to(self.device)
        with Progress(progress_bar, len(images) * importance_samples, "bits/dim") as progress:
            result = bits_per_dim(
                self.denoiser,
                self.sde,
                images,
                quantization=quantization,
                value_range=value_range,
                dequantization=dequantization,
                importance_samples=importance_samples,
                trace=trace,
                options=self._or_default(options),
                t_min=self.t_min,
                conditioning=self._conditioning(conditioning),
                generator=generator,
                progress=progress,
            )
        log_cost("bits/dim", result.calls, len(images) * importance_samples)
        return result

    def latent_bits_per_dim(
        self,
        x: Any,
        trace: TraceOptions | None = None,
        options: ODEOptions | None = None,
        conditioning: Mapping[str, Tensor] | None = None,
        generator: Generators = None,
        progress_bar: bool = False,
    ) -> Tensor:
        """Return -log2 p(x_0) / d of the d latents x_0 of each image, shape (B,).

        It is a density of latents as the network sees them, which compares networks on the same autoencoder. It is no
        number of bits per pixel, and can be negative. Arguments are those of ``log_prob``; images are encoded.

        Raises:
            ValueError: A network on pixels, which has ``bits_per_dim``, or bad arguments.
            SolverError: The solver gives up.
        """
        if not self.is_latent:
            raise ValueError("this pipeline's network models pixels: it has bits_per_dim.")
        x = self._state(x)
        values = self.log_prob(x, trace, options, conditioning, generator, progress_bar).value
        return -values / (x[0].numel() * math.log(2.0))

    # ------------------------------------------------------------------ codes

    def encode(
        self,
        x: Any,
        options: ODEOptions | None = None,
        conditioning: Mapping[str, Tensor] | None = None,
        progress_bar: bool = False,
    ) -> Solution:
        """Latent codes of images or latents, unit noise of shape (B, C, H, W); see ``flow.encode``.

        The default tolerance costs 20 to 30 network calls an image; see ``options`` for closer round trips.
        """
        x = self._state(x)
        with Progress(progress_bar, len(x), "encode") as progress:
            solution = encode(
                self.denoiser,
                self.sde,
                x,
                options=self._or_default(options),
                t_min=self.t_min,
                conditioning=self._conditioning(conditioning),
                progress=progress,
            )
        log_cost("encode", solution.calls, solution.calls.numel())
        return solution

    def decode(
        self,
        latents: Tensor,
        options: ODEOptions | None = None,
        temperature: float = 1.0,
        conditioning: Mapping[str, Tensor] | None = None,
        progress_bar: bool = False,
    ) -> Solution:
        """Data of latent codes, in the network's range; see ``flow.decode``."""
        latents = self._shaped(latents, "latents")
        with Progress(progress_bar, len(latents), "decode") as progress:
            solution = decode(
                self.denoiser,
                self.sde,
                latents.to(self.device),
                options=self._or_default(options),
                t_min=self.t_min,
                temperature=temperature,
                conditioning=self._conditioning(conditioning),
                progress=progress,
            )
        log_cost("decode", solution.calls, solution.calls.numel())
        return solution

    def sample(
        self,
        latents: Tensor,
        options: ODEOptions | None = None,
        denoise_final: bool = True,
        t_min: float | None = None,
        temperature: float = 1.0,
        conditioning: Mapping[str, Tensor] | None = None,
        progress_bar: bool = False,
    ) -> Solution:
        """Samples from unit noise by the adaptive solver; see ``flow.sample_flow``.

        The flow stops where the scheduler's ``sampling_sigma`` or ``sampling_eps`` says, unless ``t_min`` is given.
        ``temperature`` is a factor on the latents, below 1 for samples that are more typical and less diverse. The
        scheduler's own ``temperature``, a factor on the variance of the samples, acts beside it.
        """
        t_min = max(self.scheduler.stated_last_time(), self.t_min) if t_min is None else t_min
        latents = self._shaped(latents, "latents")
        with Progress(progress_bar, len(latents), "sample") as progress:
            return sample_flow(
                self.sampling_denoiser,
                self.sde,
                state_of_codes(self.sde, latents.to(self.device), temperature),
                options=self._or_default(options),
                t_min=t_min,
                denoise_final=denoise_final,
                conditioning=self._conditioning(conditioning),
                progress=progress,
            )

    def interpolate(
        self, a: Any, b: Any, num: int = 8, options: ODEOptions | None = None, progress_bar: bool = False
    ) -> Solution:
        """Between images or latents ``a`` and ``b``, shape (B, num, C, H, W); see ``flow.interpolate``."""
        num = check_integer("num", num, at_least=2)
        a, b = self._state(a, "a"), self._state(b, "b")
        with Progress(progress_bar, len(a) * (2 + num), "interpolate") as progress:
            solution = interpolate(
                self.denoiser,
                self.sde,
                a,
                b,
                num=num,
                options=self._or_default(options),
                t_min=self.t_min,
                progress=progress,
            )
        log_cost("interpolate", solution.calls, solution.calls.numel())
        return solution

    def edit(
        self,
        x: Any,
        strength: float = 0.5,
        num_steps: int = 50,
        generator: Generators = None,
    ) -> Tensor:
        """Variations of images or latents by the reverse SDE; see ``sampling.edit``."""
        t_min = max(self.scheduler.stated_last_time(), self.t_min)
        with torch.no_grad():
            return edit(
                self.denoiser,
                self.sde,
                self._state(x),
                strength=strength,
                num_steps=num_steps,
                t_min=t_min,
                generator=generator,
            )

    def denoise(
        self,
        x: Any,
        sigma: float,
        num_samples: int | None = None,
        num_steps: int = 50,
        conditioning: Mapping[str, Tensor] | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """E[x_0 | y] or samples of p(x_0 | y) for images or latents y = x_0 + sigma n; see ``sampling.observation``.

        Samples take the scheduler's predictor with stochasticity 1, or ``exponential`` where it integrates no SDE. The
        temperature is 1, and there is no corrector.

        Args:
            x: The observations y, (B, C, H, W): images, whose integers are scaled to the network's range, or
                floating-point numbers in it.
            sigma: Standard deviation of their noise, in units of the network's range.
            num_samples: Samples for each observation; None for the mean, which costs one network call.
            num_steps: Noise levels of the samples.
            conditioning: Arguments of the network with one row per observation, such as ``class_labels``.
            generator: Source of the samples: one generator, or one for each sample.

        Returns:
            The means, shape (B, C, H, W), or the samples, those of the first observation first, shape
            (B * num_samples, C, H, W), in the network's range.

        Raises:
            ValueError: A noise that the SDE does not pass, or another bad argument.
        """
        y = self._state(x, "image")
        rows = check_conditioning(self._conditioning(conditioning), len(y))
        if num_samples is None:
            return posterior_mean(partial(self.denoiser, **rows), self.sde, y, sigma, self.t_min)
        num_samples = check_integer("num_samples", num_samples, at_least=1)
        rows = {name: value.repeat_interleave(num_samples, dim=0) for name, value in rows.items()}
        rule = get_predictor(self.scheduler.config.predictor).from_config(self.scheduler.config)
        return posterior_samples(
            partial(self.denoiser, **rows),
            self.sde,
            y,
            sigma,
            num_samples=num_samples,
            num_steps=num_steps,
            t_min=self.t_min,
            predictor=HIGH_ORDER if rule.deterministic or not rule.calls else rule,
            generator=generator,
        )

    # ------------------------------------------------------------------ inputs

    def data_of(self, images: Any) -> Tensor:
        """The network's data of images, float32 (B, C, H, W): scaled integers, or the latents of an autoencoder."""
        return self._state(images)

    def images_of(self, x: Tensor) -> Tensor:
        """Images in [0, 1] of the network's data, shape (B, C, H, W).

        Raises:
            ValueError: The data are latents, and the pipeline has no autoencoder of ours.
        """
        if not self.is_latent:
            return from_network(x, self.data_min, self.data_max)
        if self._encoder is None:
            raise ValueError("this pipeline's network models latents: decode them by its autoencoder.")
        return self._encoder.decode(x)

    def _or_default(self, options: ODEOptions | None) -> ODEOptions:
        return self.options() if options is None else options

    def _conditioning(self, conditioning: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in (conditioning or {}).items()}

    def _shaped(self, x: Any, name: str) -> Tensor:
        """Return the tensor, if it has a shape that the network takes and its numbers are finite."""
        check_tensor(name, x)
        check_sides(self.network, tuple(x.shape), name)
        return x

    def _state(self, x: Any, name: str = "images") -> Tensor:
        """Return data in the network's range, on its device: integers are scaled, other numbers are left alone."""
        x = as_batch(x, name)
        if self.is_latent and not x.is_floating_point():
            x = self._encoded(x, name)
        x = self._shaped(x, name).to(self.device)
        if x.is_floating_point():
            self._warn_about_range(x, name)
        return in_network_range(x, self.data_min, self.data_max, name)

    def _encoded(self, images: Tensor, name: str) -> Tensor:
        """Return the latents of images, integers 0..255, as the network sees them."""
        if self._encoder is None:
            raise ValueError("this pipeline's network models latents: encode the images by its autoencoder first.")
        factor, channels = downsampling_of(self._encoder.vae), self._encoder.image_shape((1, 1, 1))[0]
        check_tensor(name, images, (None, channels, None, None))
        if any(side % factor for side in images.shape[2:]):
            raise ValueError(f"{name} must have sides that are multiples of {factor}, got {tuple(images.shape[2:])}.")
        in_network_range(images, -1.0, 1.0, name)  # refuses other integers than 0..255
        return self._encoder.encode(images.to(self.device))

    def _warn_about_range(self, x: Tensor, name: str) -> None:
        """Warn where data are as far from the network's range as bytes are."""
        low, high, width = float(x.min()), float(x.max()), self.data_max - self.data_min
        if not self.is_latent and (low < self.data_min - 4.0 * width or high > self.data_max + 4.0 * width):
            logger.warning(
                f"{name}: the values reach from {low:g} to {high:g}, but the network's data lie in [{self.data_min:g}, "
                f"{self.data_max:g}]. Floating-point data are taken as they are: pass images as uint8, or scale them."
            )


def check_sides(network: Any, shape: tuple[int, ...], name: str) -> None:
    """Raise a ValueError unless the network takes samples of this shape.

    What a U-Net cannot halve it cannot join again, and the positions of a transformer's patches are those of one size.
    """
    traits = traits_of(network)
    if not isinstance(network, ModelMixin) or traits.divisor is None:
        return
    if len(shape) != 4 or shape[1] != traits.channels:
        raise ValueError(
            f"{name} must have shape (B, {traits.channels}, H, W), {traits.channels} channels, got {shape}."
        )
    if traits.fixed_sides and shape[2:] != traits.sides:
        raise ValueError(f"{name} must have sides {traits.sides}, those of the transformer, got {shape[2:]}.")
    if any(side % traits.divisor for side in shape[2:]):
        raise ValueError(
            f"{name} must have sides that are multiples of {traits.divisor}, since the network halves them "
            f"{traits.divisor.bit_length() - 1} times, got {shape[2]} x {shape[3]}."
        )


def _check_deterministic(network: Any) -> None:
    """Refuse dropout and batch norm in training mode, with which the network is not a function of its input."""
    if not isinstance(network, torch.nn.Module):
        return
    random = (torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._BatchNorm)
    for module in network.modules():
        if module.training and isinstance(module, random) and getattr(module, "p", 1.0) > 0.0:
            raise ValueError("the network is in training mode and has dropout or batch norm: call its eval() first.")


def network_of(pipe: Any) -> Any:
    """The network of a pipeline, a unet or a transformer.

    Raises:
        ValueError: It has none.
    """
    network = getattr(pipe, "unet", None)
    network = getattr(pipe, "transformer", None) if network is None else network
    if network is None:
        raise ValueError(f"pipe must be a pipeline with a unet or a transformer, got {type(pipe).__name__}.")
    return network


def scheduler_of(pipe: Any) -> Any:
    """The scheduler of a pipeline, any one that has a config.

    Raises:
        ValueError: It has none.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if not hasattr(scheduler, "config"):
        raise ValueError(f"pipe must be a pipeline with a scheduler, got {type(pipe).__name__}.")
    return scheduler


def own_or_fitting_scheduler(pipe: Any) -> SDEScheduler:
    """The scheduler of a pipeline if it is ours, or our scheduler of the same path.

    Raises:
        ValueError: It has none.
    """
    scheduler = scheduler_of(pipe)
    if isinstance(scheduler, SDEScheduler):
        return scheduler
    config = config_of(scheduler)
    fitting: SDEScheduler = SCHEDULERS[fitting_class(config)].from_config(config)
    return fitting


def log_cost(what: str, calls: Tensor, samples: int) -> None:
    """Log what an adaptive solution cost.

    Args:
        what: What was found, such as ``codes``.
        calls: Network calls of each image, all its samples together, shape (B,).
        samples: How many samples were solved for.
    """
    total = int(calls.sum())
    logger.info(f"{what}: {samples} samples, {total / samples:.0f} network calls each, {total} together.")


class Progress:
    """A bar that counts samples, or nothing."""

    def __init__(self, show: bool, total: int, description: str) -> None:
        self._bar = tqdm(total=total, desc=description) if show else None

    def __enter__(self) -> Callable[[int], object] | None:
        return None if self._bar is None else self._bar.update

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
