r"""Exact log-density by the probability-flow ODE, and bits per dimension of quantised data.

By the instantaneous change of variables (Song et al. 2021, section 4.3 and appendix D.2)

    log p(x_0) = log prior(x_T) + int div(velocity) dt;

``ode`` writes the flow in variables whose linear part leaves the integral in closed form, and what remains is
tr(d x0_hat / dx) along the path. There are three ways to get the trace, and all are unbiased:

* ``exact`` takes one derivative per dimension. It is for small dimensions and for tests.
* ``hutchinson`` takes v^T J v with probes v that are fixed for the whole solve (Skilling 1989; Hutchinson 1990;
  Grathwohl et al. 2019), as in the paper. The errors at successive points have the same sign and add up.
* ``resampled`` (the default) takes a fresh probe at every point. The errors at successive points are independent and
  average out, which divides the scatter by about the square root of the number of points, at the same cost. Inside a
  Runge-Kutta method fresh probes would destroy the error estimate; here the path, its error and its step sizes are
  those of the state alone, and the trace is a quadrature along it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checks import check_choice, check_generators, check_integer, check_ordered, check_pair, check_tensor
from .ode import FlowCoordinates, FlowDenoiser, ODEOptions, check_state, integrate
from .sdes import SDE

TRACES = ("resampled", "hutchinson", "exact")
PROBES = ("rademacher", "gaussian")
DIFFERENTIATIONS = ("reverse", "forward")
DEQUANTIZATIONS = ("uniform", "truncated_normal", "none")
GRIDS = ("endpoints", "bins")

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class TraceOptions:
    """How tr(d x0_hat / dx) is found.

    Args:
        method: ``resampled``, ``hutchinson`` or ``exact``; see the head of this module.
        num_probes: Probes per point; their derivatives share one forward pass. ``exact`` does not use it.
        probe: ``rademacher`` (+1 or -1, which scatters least) or ``gaussian``. For Gaussian probes the derivative that
            x0_hat has for isotropic Gaussian data is a control variate; for Rademacher probes that part has no noise.
        differentiation: ``reverse`` (vector-Jacobian products, works with every network) or ``forward``
            (Jacobian-vector products, no stored activations; the network's operations must support forward mode).
    """

    method: str = "resampled"
    num_probes: int = 1
    probe: str = "rademacher"
    differentiation: str = "reverse"

    def __post_init__(self) -> None:
        for name, allowed in (("method", TRACES), ("probe", PROBES), ("differentiation", DIFFERENTIATIONS)):
            check_choice(name, getattr(self, name), allowed)
        object.__setattr__(self, "num_probes", check_integer("num_probes", self.num_probes, at_least=1))


def jacobian_products(
    denoise: Callable[[Tensor], Tensor], x: Tensor, probes: Sequence[Tensor], differentiation: str = "reverse"
) -> tuple[Tensor, list[Tensor]]:
    """The denoiser and the products v . (J v) for several probes v, J = d x0_hat / dx of each sample.

    Args:
        denoise: x -> x0_hat, acting on each sample alone.
        x: Shape (B, ...).
        probes: The probes v, each of the shape of ``x``.
        differentiation: ``reverse`` or ``forward``.

    Returns:
        x0_hat, and for every probe a float64 tensor of shape (B,).

    Raises:
        ValueError: The denoiser cannot be differentiated.
    """
    products: list[Tensor] = []
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    if differentiation == "forward":
        # The fused attention kernels have no forward derivative, but the plain one has.
        kernels = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        x0 = x
        with kernels:
            for probe in probes:
                x0, tangent = torch.func.jvp(denoise, (x,), (probe,))[:2]
                products.append((probe.to(wide) * tangent.to(wide)).flatten(1).sum(1))
        return x0.detach(), products
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = denoise(x)
        if not x0.requires_grad:
            raise ValueError(
                "the denoiser cannot be differentiated: it detaches its input or runs under torch.no_grad; use "
                "differentiation='forward', or a denoiser that does not."
            )
        for i, probe in enumerate(probes):
            (gradient,) = torch.autograd.grad(x0, x, probe.to(x0.dtype), retain_graph=i + 1 < len(probes))
            products.append((probe.to(wide) * gradient.to(wide)).flatten(1).sum(1))
    return x0.detach(), products


@dataclass
class _Trace:
    """The function that ``ode.integrate`` calls for estimates of tr(d x0_hat / dx), one column per replicate."""

    options: TraceOptions
    generators: Sequence[torch.Generator]
    _fixed: dict[int, Tensor] = field(default_factory=dict)

    @property
    def replicates(self) -> int:
        return 1 if self.options.method == "exact" else self.options.num_probes

    @property
    def resampled(self) -> bool:
        return self.options.method == "resampled"

    def _draw(self, sample: int, x: Tensor) -> Tensor:
        """All probes of one sample, shape (num_probes, ...), from its own generator."""
        if sample in self._fixed:
            return self._fixed[sample]
        shape, generator = (self.options.num_probes, *x.shape[1:]), self.generators[sample]
        if self.options.probe == "gaussian":
            probes = torch.randn(shape, generator=generator, device=generator.device)
        else:
            bits = torch.randint(0, 2, shape, generator=generator, device=generator.device, dtype=torch.int8)
            probes = 2 * bits - 1
        if not self.resampled:
            self._fixed[sample] = probes
        return probes

    def __call__(
        self, denoise: Callable[[Tensor], Tensor], x: Tensor, samples: Sequence[int], gain: Tensor
    ) -> tuple[Tensor, Tensor]:
        options = self.options
        if options.method == "exact":
            x0, trace = self._exact(denoise, x)
            return x0, trace[:, None]
        drawn = torch.stack([self._draw(sample, x) for sample in samples], 1).to(device=x.device, dtype=x.dtype)
        x0, products = jacobian_products(denoise, x, list(drawn), options.differentiation)
        estimates = torch.stack([product.cpu().double() for product in products], 1)
        if options.probe == "gaussian":
            excess = drawn.flatten(2).double().square().sum(2).T.cpu() - x[0].numel()
            estimates = estimates - gain[:, None] * excess
        return x0, estimates

    def _exact(self, denoise: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        def basis(i: int) -> Tensor:
            probe = torch.zeros_like(x).flatten(1)
            probe[:, i] = 1.0
            return probe.reshape(x.shape)

        # All probes together, one per dimension, would need d copies of x at once. They are made on demand instead.
        x0, products = jacobian_products(denoise, x, _OnDemand(basis, x[0].numel()), self.options.differentiation)
        return x0, torch.stack(products).sum(0)


class _OnDemand(Sequence[Tensor]):
    """A sequence whose items are made when they are asked for."""

    def __init__(self, make: Callable[[int], Tensor], length: int) -> None:
        self._make, self._length = make, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i):  # type: ignore[no-untyped-def]
        if not 0 <= i < self._length:
            raise IndexError(i)
        return self._make(i)


def sample_generators(x: Tensor, generator: Generators, purpose: str) -> list[torch.Generator]:
    """One generator per sample, whose numbers do not depend on the sample's place or batch mates.

    Args:
        x: Samples, shape (B, ...).
        generator: A list with one for each sample is returned as it is. One generator, or None for torch's global
            state, gives a seed; each sample's own generator is then seeded by it and by the sample's content.
        purpose: A word that keeps the numbers drawn for different uses apart.

    Raises:
        ValueError: A list whose length is not the batch size.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        check_generators(generator, len(x))
        return list(generator)
    device = torch.device("cpu") if generator is None else generator.device
    seed = int(torch.randint(0, 2**62, (), generator=generator, device=device))
    content = x.detach().to("cpu").contiguous()
    content = content if content.dtype in (torch.uint8, torch.float64) else content.float()
    generators = []
    for row in content:
        digest = hashlib.blake2b(f"{purpose} {seed} ".encode() + row.numpy().tobytes(), digest_size=7).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest, "big")))
    return generators


@dataclass(frozen=True)
class LogProb:
    """Log-densities.

    Attributes:
        value: log p(x) in nats, shape (B,), float64.
        standard_error: Standard error of ``value``, shape (B,). It covers the noise of the trace estimate, not the
            solver's error. It is 0 for the exact trace. For fixed probes it comes from the replicates, and is nan if
            there is only one. For resampled probes it comes from the scatter of the trace along the path, which needs
            no second probe.
        latents: The codes, which are unit noise, shape (B, ...).
        calls: Network calls of each sample, shape (B,). Every call is a forward pass with ``num_probes`` derivatives.
        t_min: SDE time of the density, which is that of x_t at this time: of data with noise sigma(t_min).
    """

    value: Tensor
    standard_error: Tensor
    latents: Tensor
    calls: Tensor
    t_min: float

    @property
    def per_dimension(self) -> Tensor:
        """Nats per dimension, shape (B,)."""
        return self.value / self.latents[0].numel()


def log_prob(
    denoiser: FlowDenoiser,
    sde: SDE,
    x: Tensor,
    trace: TraceOptions | None = None,
    options: ODEOptions | None = None,
    t_min: float | None = None,
    conditioning: Mapping[str, Tensor] | None = None,
    generator: Generators = None,
    progress: Callable[[int], object] | None = None,
) -> LogProb:
    """Log-density of continuous data under the probability flow, in nats.

    log p(x) = log prior(x_T) + log-determinant of the flow from t_min to t_max (Song et al. 2021, eq. 39), where the
    prior is N(0, prior_std^2 I) of the SDE. For quantised data see ``bits_per_dim``.

    Args:
        denoiser: (x_t, t, **conditioning) -> x0_hat. It must be differentiable and must not clip.
        sde: The SDE.
        x: Data, shape (B, ...), taken as the state at ``t_min``.
        trace: How the trace is found; see ``TraceOptions``.
        options: Settings of the solver.
        t_min: SDE time of the data; the SDE's own t_min if None.
        conditioning: Arguments of the denoiser with one row per sample, such as ``class_labels``.
        generator: Source of the probes: a list with one generator for each sample, or one generator, or None for
            torch's global state. In the last two cases the probes of a sample follow from the generator and from the
            sample's content, so that they do not depend on its batch mates.
        progress: Called with the number of samples that are done.

    Returns:
        The values with their standard errors, the latent codes and the calls.

    Raises:
        ValueError: Bad arguments.
        RuntimeError: The solver gives up; see ``ode.integrate``.
    """
    trace = TraceOptions() if trace is None else trace
    options = ODEOptions() if options is None else options
    t_min = sde.t_min if t_min is None else t_min
    x = check_state(x)
    generators = [] if trace.method == "exact" else sample_generators(x, generator, "probes")
    result = integrate(denoiser, sde, x, t_min, sde.t_max, options, _Trace(trace, generators), conditioning, progress)
    coordinates = FlowCoordinates(sde, t_min, sde.t_max, options.data_mean, options.data_std)
    end = result.solution.sample
    scales = x[0].numel() * (coordinates.log_scale(sde.t_max) - coordinates.log_scale(t_min))
    value = sde.prior_log_prob(end).to("cpu", torch.float64) + scales + result.log_density_change.mean(1)
    if trace.method == "exact":
        error = torch.zeros_like(value)
    elif trace.method == "resampled":
        error = result.variance.sqrt()
    elif trace.num_probes > 1:
        error = result.log_density_change.std(1) / math.sqrt(trace.num_probes)
    else:
        error = torch.full_like(value, math.nan)
    return LogProb(value, error, end / sde.prior_std, result.solution.calls, t_min)


# ---------------------------------------------------------------------- quantised data


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
        return (first + levels.to(torch.float64 if levels.device.type != "mps" else torch.float32) * self.width).float()

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
            exact = (images.double() - black) * ((self.levels - 1) / (white - black))
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
    """Normal noise cut off at +-half_width, float64, by inversion of its distribution function.

    Returns:
        The noise u, shape ``shape``, and log q(u) in nats per entry.
    """
    edge = half_width / std
    mass = math.erf(edge / math.sqrt(2.0))
    uniform = torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device=generator.device)
    unit = (math.sqrt(2.0) * torch.erfinv((2.0 * uniform - 1.0) * mass)).clamp(-edge, edge)
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
    denoiser: FlowDenoiser,
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
        RuntimeError: The solver gives up; see ``ode.integrate``.
    """
    quantization = Quantization() if quantization is None else quantization
    value_range = check_pair(
        "value_range", (quantization.low, quantization.high) if value_range is None else value_range
    )
    options = ODEOptions() if options is None else options
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
        x, log_q = _already_continuous(images, quantization, importance_samples), torch.zeros(count, 1).double()
        log_q -= dims * math.log(width)
        noise_generators = sample_generators(images, generator, "probes")
    else:
        levels = quantization.levels_of(images, value_range)
        centers = quantization.centers(levels).to(images.device)
        noise_generators = sample_generators(levels.double(), generator, "dequantisation")
        noise, densities = [], []
        for row, source in zip(centers, noise_generators, strict=True):
            shape = (importance_samples, *row.shape)
            if dequantization == "uniform":
                u = (torch.rand(shape, generator=source, dtype=torch.float64, device=source.device) - 0.5) * width
                log_density = torch.full_like(u, -math.log(width))
            else:
                u, log_density = truncated_normal(shape, sigma / alpha, 0.5 * width, source)
            noise.append(u.float())
            densities.append(log_density.flatten(1).sum(1))
        x = centers[:, None] + torch.stack(noise).to(centers.device)
        x, log_q = x.flatten(0, 1), torch.stack(densities).cpu()

    repeated = [source for source in noise_generators for _ in range(importance_samples)]
    if importance_samples > 1:
        # The draws of one image run side by side, so each needs a generator of its own, whatever the order.
        repeated = [_child(source) for source in repeated]
    spread = {name: value.repeat_interleave(importance_samples, 0) for name, value in (conditioning or {}).items()}
    result = log_prob(denoiser, sde, alpha * x, trace, options, t_min, spread, repeated, progress)
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
        position = (images.double() - quantization.low) * (count / (quantization.high - quantization.low)) - phase
        if bool(((position - position.round()).abs() < 1e-3).all()):
            raise ValueError(
                "images lie on the grid of quantised data, where a density is unbounded: they were not dequantised. "
                "Choose dequantization='uniform' or 'truncated_normal'."
            )
    return images
