"""The trace of the denoiser's Jacobian, tr(d x0_hat / dx), by which a flow changes densities.

There are three ways to get it, and all are unbiased:

* ``exact`` takes one derivative per dimension. It is for small dimensions and for tests.
* ``hutchinson`` takes v^T J v with probes v that are fixed for the whole solve (Skilling 1989; Hutchinson 1990;
  Grathwohl et al. 2019), as in the paper. The errors at successive points have the same sign and add up.
* ``resampled`` (the default) takes a fresh probe at every point. The errors at successive points are independent and
  average out, which divides the scatter by about the square root of the number of points, at the same cost. Inside a
  Runge-Kutta method fresh probes would destroy the error estimate; here the path, its error and its step sizes are
  those of the state alone, and the trace is a quadrature along it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..basics.checks import check_choice, check_integer
from ..basics.precision import finest, finest_dtype

TRACES = ("resampled", "hutchinson", "exact")
PROBES = ("rademacher", "gaussian")
DIFFERENTIATIONS = ("reverse", "forward")


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
    denoise: Callable[[Tensor], Tensor], x: Tensor, probes: Iterable[Tensor], differentiation: str = "reverse"
) -> tuple[Tensor, list[Tensor]]:
    """The denoiser and the products v . (J v) for several probes v, J = d x0_hat / dx of each sample.

    Args:
        denoise: x -> x0_hat, acting on each sample alone.
        x: Shape (B, ...).
        probes: The probes v, each of the shape of ``x``. They may be made on demand: two exist at a time.
        differentiation: ``reverse`` or ``forward``.

    Returns:
        x0_hat, and for every probe a tensor of shape (B,), float64 (float32 on mps).

    Raises:
        ValueError: The denoiser cannot be differentiated.
    """
    products: list[Tensor] = []
    wide = finest_dtype(x.device)
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
        remaining = iter(probes)
        following = next(remaining, None)
        while following is not None:
            probe, following = following, next(remaining, None)
            # The last product frees the graph while it is computed, which lowers the peak of the memory.
            (gradient,) = torch.autograd.grad(x0, x, probe.to(x0.dtype), retain_graph=following is not None)
            products.append((probe.to(wide) * gradient.to(wide)).flatten(1).sum(1))
    return x0.detach(), products


@dataclass
class TraceEstimator:
    """The function by which ``integrate`` learns tr(d x0_hat / dx) along the way.

    Args:
        options: How the trace is found.
        generators: One generator for each of all samples, from which its probes come; empty for the exact trace.
    """

    options: TraceOptions
    generators: Sequence[torch.Generator]
    _fixed: dict[int, Tensor] = field(default_factory=dict)

    @property
    def replicates(self) -> int:
        """Number of independent estimates per point."""
        return 1 if self.options.method == "exact" else self.options.num_probes

    @property
    def resampled(self) -> bool:
        """Whether the noise of different points is independent."""
        return self.options.method == "resampled"

    def __call__(
        self, denoise: Callable[[Tensor], Tensor], x: Tensor, samples: Sequence[int], gain: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The denoiser's output and estimates of its trace.

        Args:
            denoise: x -> x0_hat, acting on each row alone.
            x: Shape (B, ...).
            samples: Which of all samples the rows of ``x`` are.
            gain: The derivative that x0_hat has for isotropic Gaussian data, shape (B,), float64 on the host. It serves
                as a control variate for Gaussian probes.

        Returns:
            x0_hat, shape of ``x``, and the estimates, shape (B, replicates), float64 on the host.
        """
        options = self.options
        if options.method == "exact":
            # All probes together, one per dimension, would need d copies of x at once. They are made on demand instead.
            x0, products = jacobian_products(denoise, x, _unit_vectors(x), options.differentiation)
            return x0, torch.stack(products).sum(0).cpu().double()[:, None]
        drawn = torch.stack([self._draw(sample, x) for sample in samples], 1).to(device=x.device, dtype=x.dtype)
        x0, products = jacobian_products(denoise, x, drawn, options.differentiation)
        estimates = torch.stack([product.cpu().double() for product in products], 1)
        if options.probe == "gaussian":
            excess = finest(drawn.flatten(2)).square().sum(2).T.cpu().double() - x[0].numel()
            estimates = estimates - gain[:, None] * excess
        return x0, estimates

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


def _unit_vectors(x: Tensor) -> Iterator[Tensor]:
    """For every dimension the tensor of x's shape that is 1 there and 0 elsewhere, in all rows."""
    for i in range(x[0].numel()):
        vector = torch.zeros_like(x).flatten(1)
        vector[:, i] = 1.0
        yield vector.reshape(x.shape)
