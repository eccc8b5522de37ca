"""Bits per dimension of quantised data, such as images of bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..basics.checks import check_choice, check_integer, check_ordered, check_pair, check_tensor
from ..basics.noise import Generators, sample_generators
from ..basics.precision import finest, uniform_numbers
from ..networks.denoisers import Denoiser
from ..sdes import SDE
from .likelihood import log_prob
from .solver import ODEOptions
from .trace import TraceOptions

DEQUANTIZATIONS = ("uniform", "truncated_normal", "none")
GRIDS = ("endpoints", "bins")


@dataclass(frozen=True)
class Quantization:
    """How whole numbers 0 .. 2^bit_depth - 1 stand for intensities in the network's range.

    Args:
        low: Value of black in the network's data.
        high: Value of white.
        bit_depth: 8 for ordinary images.
        grid: With ``endpoints``, level k stands for low + (high - low) k / (2^b - 1), as ``ToTensor`` and this
            package's training have it, and the bin around it is (high - low) / (2^b - 1) wide. With ``bins``, the
            paper's convention, 2^b bins fill [low, high], level k stands for the centre of its bin, and a bin is
            (high - low) / 2^b wide.
    """

    low: float = -1.0
    high: float = 1.0
    bit_depth: int = 8
    grid: str = "endpoints"

    def __post_init__(self) -> None:
        check_ordered("low", self.low, "high", self.high)
        object.__setattr__(self, "bit_depth", check_integer("bit_depth", self.bit_depth, at_least=1, at_most=16))
        check_choice("grid", self.grid, GRIDS)

    @property
    def levels(self) -> int:
        """2^bit_depth."""
        return int(2**self.bit_depth)

    @property
    def width(self) -> float:
        """Width of a bin in units of the network's data."""
        return (self.high - self.low) / (self.levels - (1 if self.grid == "endpoints" else 0))

    @property
    def offset(self) -> float:
        """-log2(width), added to -log2 p(x) / d to give bits per dimension; 7 for the paper's bins in [-1, 1]."""
        return -math.log2(self.width)

    def centers(self, levels: Tensor) -> Tensor:
        """The middle of the bins of integer ``levels``, float32."""
        first = self.low + (0.5 * self.width if self.grid == "bins" else 0.0)
        return (first + finest(levels) * self.width).float()

    def levels_of(self, images: Tensor, value_range: tuple[float, float]) -> Tensor:
        """Integer levels of images, int64.

        Args:
            images: Integers 0 .. 2^bit_depth - 1, or floating-point numbers low + (high - low) k / (2^b - 1) with the
                ends of ``value_range``.
            value_range: (black, white) of floating-point ``images``.

        Raises:
            ValueError: Values outside the range, not finite, or off the grid.
        """
        if not images.is_floating_point():
            levels = images.long()
        else:
            black, white = check_pair("value_range", value_range)
            if not bool(torch.isfinite(images).all()):
                raise ValueError("images must be finite.")
            exact = (finest(images) - black) * ((self.levels - 1) / (white - black))
            levels = exact.round().long()
            slack = 1e-3 * (self.levels - 1)
            if not bool(((exact >= -slack) & (exact <= self.levels - 1 + slack)).all()):
                raise ValueError(
                    f"images must lie in value_range = {value_range!r}, got values from {float(images.min()):g} to "
                    f"{float(images.max()):g}."
                )
            if not bool(((exact - levels).abs() < 0.05).all()):
                raise ValueError(
                    f"images are not on the grid of {self.bit_depth}-bit images, so bits per dimension have no meaning "
                    "for them. Round them to it, or give continuous data with dequantization='none' or to log_prob."
                )
        if not bool(((levels >= 0) & (levels < self.levels)).all()):
            raise ValueError(
                f"integer images must lie in 0..{self.levels - 1} (bit_depth {self.bit_depth}), got values from "
                f"{int(levels.min())} to {int(levels.max())}."
            )
        return levels


def truncated_normal(
    shape: Sequence[int], std: float, half_width: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Normal noise cut off at +-half_width, by inversion of its distribution function, float64 (float32 on mps).

    Returns:
        The noise u, shape ``shape``, and log q(u) in nats per entry.
    """
    edge = half_width / std
    mass = math.erf(edge / math.sqrt(2.0))
    drawn = uniform_numbers(tuple(shape), generator)
    unit = (math.sqrt(2.0) * torch.erfinv((2.0 * drawn - 1.0) * mass)).clamp(-edge, edge)
    return std * unit, -0.5 * unit.square() - math.log(std * math.sqrt(2.0 * math.pi) * mass)


@dataclass(frozen=True)
class BitsPerDim:
    """Bits per dimension of quantised data.

    Attributes:
        mean: Mean over all images.
        standard_error: Standard error of ``mean``: the spread between images divided by the root of their number, which
            contains the noise of traces and dequantisation. It is nan for a single image.
        per_image: Bits per dimension of each image, shape (B,), float64.
        per_image_error: The noise of the trace estimate in ``per_image``, shape (B,).
        calls: Network calls per image, all dequantisations together, shape (B,).
        t_min: SDE time at which the density was taken.
        dequantization: Name of the dequantisation.
        importance_samples: Dequantisations per image.
    """

    mean: float
    standard_error: float
    per_image: Tensor
    per_image_error: Tensor
    calls: Tensor
    t_min: float
    dequantization: str
    importance_samples: int


def bits_per_dim(
    denoiser: Denoiser,
    sde: SDE,
    images: Tensor,
    quantization: Quantization | None = None,
    value_range: tuple[float, float] | None = None,
    dequantization: str = "uniform",
    importance_samples: int = 1,
    trace: TraceOptions | None = None,
    options: ODEOptions | None = None,
    t_min: float | None = None,
    conditioning: Mapping[str, Tensor] | None = None,
    generator: Generators = None,
    progress: Callable[[int], object] | None = None,
) -> BitsPerDim:
    """Negative log-likelihood of quantised data, in bits per dimension: an upper bound on the model's exact value.

    With noise u ~ q inside a bin, log P(k) >= E[log p(x_k + u) - log q(u)] (Theis et al. 2016, arXiv:1511.01844; Ho et
    al. 2019, arXiv:1902.00275), and with K draws log P(k) >= E[log mean_i p(x_k + u_i)/q(u_i)], which tightens with K
    (Burda et al. 2016, arXiv:1509.00519). p is the density of x_t / alpha at t_min.

    Args:
        denoiser: (x_t, t, **conditioning) -> x0_hat.
        sde: The SDE.
        images: Integers 0 .. 2^bit_depth - 1, or floating-point numbers on that grid, shape (B, ...). With
            ``dequantization="none"``: continuous data in the network's own range.
        quantization: The network's range, the bit depth and the grid.
        value_range: (black, white) of floating-point ``images``; the network's range if None.
        dequantization: ``uniform`` in the bin; ``truncated_normal`` with standard deviation sigma/alpha at t_min, cut
            off at the bin's edges, for networks that were trained on undequantised images (Zheng et al. 2023,
            arXiv:2305.03935); ``none`` if you have dequantised the images yourself, uniformly.
        importance_samples: K, the number of draws per image. Noise in log p raises the estimate of log P(k) for K > 1,
            so use several probes then.
        trace: How the trace is found.
        options: Settings of the solver.
        t_min: SDE time of the data; the SDE's own t_min if None.
        conditioning: Arguments of the denoiser with one row per image.
        generator: Source of dequantisation noise and probes; see ``log_prob``.
        progress: Called with the number of solves that are done, B K in all.

    Returns:
        The mean with its standard error, and the values of the images.

    Raises:
        ValueError: Bad arguments, such as images on the grid with ``dequantization="none"``.
        SolverError: The solver gives up; see ``integrate``.
    """
    quantization = Quantization() if quantization is None else quantization
    value_range = check_pair(
        "value_range", (quantization.low, quantization.high) if value_range is None else value_range
    )
    t_min = sde.t_min if t_min is None else t_min
    check_choice("dequantization", dequantization, DEQUANTIZATIONS)
    importance_samples = check_integer("importance_samples", importance_samples, at_least=1)
    check_tensor("images", images)
    if images.ndim < 2 or images.dtype == torch.bool:
        raise ValueError("images must be a tensor of shape (B, ...) of integers or floating-point numbers.")
    count, width = len(images), quantization.width
    dims = images[0].numel()
    alpha, sigma = float(sde.alpha(t_min)), float(sde.sigma(t_min))

    if dequantization == "none":
        x = _already_continuous(images, quantization, importance_samples)
        log_q = torch.full((count, 1), -dims * math.log(width), dtype=torch.float64)
        generators = sample_generators(images, generator, "probes")
    else:
        levels = quantization.levels_of(images, value_range)
        centers = quantization.centers(levels).to(images.device)
        generators = sample_generators(levels.cpu().double(), generator, "dequantisation")
        std = None if dequantization == "uniform" else sigma / alpha
        noise, log_q = _noise_in_bins(centers, importance_samples, width, std, generators)
        x = (centers[:, None] + noise).flatten(0, 1)

    repeated = [source for source in generators for _ in range(importance_samples)]
    if importance_samples > 1:
        # The draws of one image run side by side, so each needs a generator of its own, whatever the order.
        repeated = [_child(source) for source in repeated]
    spread = {name: value.repeat_interleave(importance_samples, 0) for name, value in (conditioning or {}).items()}
    result = log_prob(
        denoiser,
        sde,
        alpha * x,
        trace=trace,
        options=options,
        t_min=t_min,
        conditioning=spread,
        generator=repeated,
        progress=progress,
    )
    shape = (count, importance_samples)
    log_weights = result.value.reshape(shape) + dims * math.log(alpha) - log_q
    value = torch.logsumexp(log_weights, 1) - math.log(importance_samples)
    shares = torch.softmax(log_weights, 1)
    error = (shares * result.standard_error.reshape(shape)).square().sum(1).sqrt()
    nats = dims * math.log(2.0)
    per_image = -value / nats
    standard_error = float(per_image.std()) / math.sqrt(count) if count > 1 else math.nan
    return BitsPerDim(
        mean=float(per_image.mean()),
        standard_error=standard_error,
        per_image=per_image,
        per_image_error=error / nats,
        calls=result.calls.reshape(shape).sum(1),
        t_min=t_min,
        dequantization=dequantization,
        importance_samples=importance_samples,
    )


def _noise_in_bins(
    centers: Tensor, draws: int, width: float, std: float | None, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """Noise that fills the bins around ``centers``, and its log-density.

    Args:
        centers: Middles of the bins, shape (B, ...).
        draws: K, the number of draws per image.
        width: Width of a bin.
        std: Standard deviation of truncated normal noise; None for uniform noise.
        generators: One for each image.

    Returns:
        The noise, shape (B, K, ...), float32 on the device of ``centers``, and log q in nats of each draw, shape (B,
        K), float64 on the host.
    """
    noise, densities = [], []
    for row, source in zip(centers, generators, strict=True):
        shape = (draws, *row.shape)
        if std is None:
            u = (uniform_numbers(shape, source) - 0.5) * width
            log_density = torch.full_like(u, -math.log(width))
        else:
            u, log_density = truncated_normal(shape, std, 0.5 * width, source)
        noise.append(u.float())
        densities.append(log_density.flatten(1).sum(1))
    return torch.stack(noise).to(centers.device), torch.stack(densities).cpu().double()


def _child(generator: torch.Generator) -> torch.Generator:
    """A generator seeded by the next number of another."""
    seed = int(torch.randint(0, 2**62, (), generator=generator, device=generator.device))
    return torch.Generator(generator.device).manual_seed(seed)


def _already_continuous(images: Tensor, quantization: Quantization, importance_samples: int) -> Tensor:
    """Check the data for ``dequantization="none"`` and return them."""
    if importance_samples != 1:
        raise ValueError(f"importance_samples must be 1 with dequantization='none', got {importance_samples!r}.")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: choose a dequantization, 'uniform' or 'truncated_normal'.")
    if not bool(torch.isfinite(images).all()):
        raise ValueError("images must be finite.")
    margin = 0.51 * quantization.width
    if bool((images < quantization.low - margin).any()) or bool((images > quantization.high + margin).any()):
        raise ValueError(
            f"images must lie in the network's range [{quantization.low:g}, {quantization.high:g}], got values from "
            f"{float(images.min()):g} to {float(images.max()):g}."
        )
    grids = [(quantization.levels - 1, 0.0), (quantization.levels, 0.0), (quantization.levels, 0.5)]
    for count, phase in grids:
        position = (finest(images) - quantization.low) * (count / (quantization.high - quantization.low)) - phase
        if bool(((position - position.round()).abs() < 1e-3).all()):
            raise ValueError(
                "images lie on the grid of quantised data, where a density is unbounded: they were not dequantised. "
                "Choose dequantization='uniform' or 'truncated_normal'."
            )
    return images
