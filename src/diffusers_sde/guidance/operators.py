"""Linear measurements y = A x + noise: inpainting, colourisation, super-resolution, deblurring, or any linear map.

Everything that a posterior sampler asks of a measurement is here, and all of it follows from two methods:

    apply(x) = A x,      adjoint(y) = A^T y,      <A x, y> = <x, A^T y> for all x and y.

**A new operator is one class with these two methods.** One that knows its singular values also gives ``solve_gram``,
(A A^T + shift I)^-1 y, which is otherwise found by conjugate gradients. ``check_adjoint`` compares the two methods with
each other; a wrong adjoint gives plausible pictures of the wrong posterior.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..basics.checks import check_choice, check_integer, check_number, check_shape, check_tensor
from ..basics.noise import Generators, standard_normal_like

BOUNDARIES = ("zero", "reflect", "circular")


class LinearOperator(ABC):
    """A linear map A from data, shape (B, *data_shape), to measurements, shape (B, *measurement_shape).

    Measurements of masks keep the shape of the data, so that every image of a batch can have its own mask; entries that
    are not measured are ignored in ``y`` and zero in ``apply``.

    Args:
        data_shape: Shape of one sample, without the batch axis.
    """

    def __init__(self, data_shape: Sequence[int]) -> None:
        self.data_shape = check_shape("data_shape", data_shape)

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Return A x, shape (B, *measurement_shape), for x of shape (B, *data_shape)."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Return A^T y, shape (B, *data_shape), for y of shape (B, *measurement_shape)."""

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        """Shape of one measurement, without the batch axis."""
        return tuple(self.apply(torch.zeros(1, *self.data_shape)).shape[1:])

    @property
    def batch_size(self) -> int | None:
        """Number of samples that the operator is made for; None where it is the same for all."""
        return None

    def select(self, index: Tensor) -> LinearOperator:
        """Return the operator for the samples ``index``, int64 (B,), of the batch; they may repeat."""
        return self

    def at(self, x0_hat: Tensor) -> LinearOperator:
        """Return the operator around an estimate, shape (B, *data_shape), which for a linear one is itself."""
        return self

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the misfit y - A x, zero where nothing is measured."""
        return y - self.apply(x)

    def measurements(self, y: Tensor) -> Tensor:
        """Count the numbers that were measured of each sample, shape (B,)."""
        return torch.full((len(y),), float(y[0].numel()), dtype=y.dtype, device=y.device)

    def measure(
        self,
        x: Tensor,
        noise_std: float = 0.0,
        generator: Generators = None,
    ) -> Tensor:
        """Simulate a measurement A x + noise_std z with unit noise z, shape (B, *measurement_shape).

        Args:
            x: Data, shape (B, *data_shape).
            noise_std: Standard deviation of the measurement noise, in units of the data.
            generator: One generator, or one for each sample.
        """
        check_noise_std(noise_std)
        y = self.apply(x)
        if noise_std == 0.0:
            return y
        return self.residual(y + noise_std * standard_normal_like(y, generator).to(y), torch.zeros_like(x))

    def solve_gram(self, y: Tensor, shift: Tensor | float) -> Tensor:
        """Return (A A^T + shift I)^-1 y, by the pseudo-inverse where shift is 0; it has the shape of ``y``.

        Args:
            y: Measurements, shape (B, *measurement_shape).
            shift: Number >= 0 in units of A A^T, or one for each sample, shape (B, 1, ...).
        """
        return conjugate_gradients(lambda v: self.apply(self.adjoint(v)) + shift * v, y, iterations=200, rtol=1e-6)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """Return A^+ y = A^T (A A^T)^+ y, the smallest x with the least |y - A x|; shape (B, *data_shape)."""
        return self.adjoint(self.solve_gram(y, 0.0))

    def matrix(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
        """Return A as a matrix, shape (measurements, data), of the first sample; for small problems and tests."""
        d = math.prod(self.data_shape)
        basis = torch.eye(d, dtype=dtype, device=device).reshape(d, *self.data_shape)
        own = self.select(torch.zeros(d, dtype=torch.int64))
        return own.apply(basis).flatten(1).T

    def check_adjoint(self, samples: int = 4, rtol: float = 1e-4) -> None:
        """Compare <A x, y> with <x, A^T y> for random x and y.

        A wrong adjoint passes with probability 0: the difference is a non-zero quadratic form of Gaussian numbers.

        Args:
            samples: How many pairs to try; ignored for an operator with a batch of its own.
            rtol: Largest difference allowed, relative to |A x| |y|.

        Raises:
            ValueError: The two differ, ``adjoint`` returns another shape, or ``apply`` is not linear.
        """
        name = type(self).__name__
        generator = torch.Generator().manual_seed(0)
        n = self.batch_size or samples
        x = torch.randn(n, *self.data_shape, generator=generator)
        ax = self.apply(x)
        shifted = self.apply(2.0 * x + 1.0) - 2.0 * ax - self.apply(torch.ones_like(x))
        if not bool(shifted.double().norm() <= rtol * (ax.double().norm() + 1.0)):
            raise ValueError(f"{name}.apply is not linear: A (2 x + 1) differs from 2 A x + A 1.")
        y = torch.randn(ax.shape, generator=generator)
        aty = self.adjoint(y)
        if aty.shape != x.shape:
            raise ValueError(f"{name}.adjoint must return shape {tuple(x.shape)}, got {tuple(aty.shape)}.")
        left, right = ((a.double() * b.double()).flatten(1).sum(1) for a, b in ((ax, y), (x, aty)))
        scale = ax.double().flatten(1).norm(dim=1) * y.double().flatten(1).norm(dim=1)
        scale = scale + x.double().flatten(1).norm(dim=1) * aty.double().flatten(1).norm(dim=1)
        worst = int(((left - right).abs() - rtol * scale).argmax())
        if not bool(((left - right).abs() <= rtol * scale).all()):
            raise ValueError(
                f"{name}.adjoint is not the adjoint of {name}.apply: <A x, y> = {float(left[worst]):.6g}, but "
                f"<x, A^T y> = {float(right[worst]):.6g}."
            )


class LinearMap(LinearOperator):
    """Any linear map, from a function and its adjoint.

    Args:
        function: x, shape (B, *data_shape) -> A x.
        data_shape: Shape of one sample.
        adjoint: y -> A^T y; None derives it from ``function`` by differentiation.

    Raises:
        ValueError: ``adjoint`` is not the adjoint of ``function``, or ``function`` is not linear.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        data_shape: Sequence[int],
        adjoint: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(data_shape)
        self._function, self._adjoint = function, adjoint
        self.check_adjoint()

    def apply(self, x: Tensor) -> Tensor:
        """Return A x."""
        return self._function(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Return A^T y."""
        if self._adjoint is not None:
            return self._adjoint(y)
        at = torch.zeros(len(y), *self.data_shape, dtype=y.dtype, device=y.device)
        return torch.func.vjp(self._function, at)[1](y)[0]


class Mask(LinearOperator):
    """Inpainting: the entries of x where the mask is 1.

    Args:
        mask: 1 or True where the data are known, 0 where they are not; shape (H, W), (C, H, W) or (B, C, H, W) with
            axes that broadcast.
        data_shape: Shape of one sample.

    Raises:
        ValueError: Values other than 0 and 1, or a shape that does not broadcast to the data's.
    """

    def __init__(self, mask: Tensor, data_shape: Sequence[int]) -> None:
        super().__init__(data_shape)
        if isinstance(mask, (np.ndarray, list, tuple)) and np.asarray(mask).dtype.kind in "biuf":
            mask = torch.from_numpy(np.array(mask))
        check_tensor("mask", mask)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask must hold only 0 and 1; threshold it first.")
        mask = mask.reshape((1,) * (len(self.data_shape) + 1 - mask.ndim) + tuple(mask.shape))
        if mask.ndim != len(self.data_shape) + 1 or any(
            m not in (1, n) for m, n in zip(mask.shape[1:], self.data_shape, strict=True)
        ):
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} does not broadcast to a batch of {self.data_shape}: mask and image "
                "must have the same height and width."
            )
        self.mask = mask.expand(-1, *self.data_shape).bool()

    @property
    def batch_size(self) -> int | None:
        """Number of masks; None where all samples share one."""
        return len(self.mask) if len(self.mask) > 1 else None

    def select(self, index: Tensor) -> LinearOperator:
        """Return the operator with the masks of these samples."""
        return self if self.batch_size is None else Mask(self.mask[index.to(self.mask.device)], self.data_shape)

    def apply(self, x: Tensor) -> Tensor:
        """Return the data x where they are known, 0 elsewhere."""
        return torch.where(self.mask.to(x.device), x, torch.zeros_like(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """Return A^T y = A y; a projection is its own adjoint."""
        return self.apply(y)

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the misfit y - x where y is known, 0 elsewhere."""
        return self.apply(y - x)

    def measurements(self, y: Tensor) -> Tensor:
        """Count the known entries of each sample, shape (B,)."""
        return self.mask.flatten(1).sum(1).to(y).expand(len(y))

    def solve_gram(self, y: Tensor, shift: Tensor | float) -> Tensor:
        """Divide by 1 + shift where y is known, and return 0 elsewhere."""
        return self.apply(y) / (1.0 + shift)


class ChannelMixture(LinearOperator):
    """Every pixel measured through the same matrix over channels: colourisation, or a few known colour axes.

    Args:
        weights: Shape (measured channels, channels).
        data_shape: Shape of one image, (C, H, W).
    """

    def __init__(self, weights: Tensor | Sequence[Sequence[float]], data_shape: Sequence[int]) -> None:
        super().__init__(data_shape)
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        if self.weights.ndim != 2 or self.weights.shape[1] != self.data_shape[0]:
            raise ValueError(
                f"weights must have shape (measured channels, {self.data_shape[0]}), got {tuple(self.weights.shape)}."
            )
        self._eigenvalues, self._axes = torch.linalg.eigh(self.weights @ self.weights.T)

    def apply(self, x: Tensor) -> Tensor:
        """Return the weighted sums of channels, shape (B, measured channels, H, W)."""
        return torch.einsum("mc,bc...->bm...", self.weights.to(x), x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Spread the measured channels over all channels."""
        return torch.einsum("mc,bm...->bc...", self.weights.to(y), y)

    def solve_gram(self, y: Tensor, shift: Tensor | float) -> Tensor:
        """Solve by the eigenvectors of the small matrix of channels."""
        axes = self._axes.to(y)
        values = self._eigenvalues.reshape(-1, *[1] * (y.ndim - 2))
        return torch.einsum("mn,bn...->bm...", axes, _divide(torch.einsum("nm,bn...->bm...", axes, y), values, shift))


class Grayscale(ChannelMixture):
    """Colourisation: the grey image of a colour image.

    The paper measures along the first vector of an orthogonal basis of colours, grey, (1, 1, 1)/sqrt(3); that is
    ``weights=None``. Luma is (0.299, 0.587, 0.114).

    Args:
        data_shape: Shape of one image, (C, H, W).
        weights: Weight of each channel; None for 1 / sqrt(C), of unit length.

    Reference:
        Song et al. 2021, appendix I.3.
    """

    def __init__(self, data_shape: Sequence[int], weights: Sequence[float] | None = None) -> None:
        channels = check_shape("data_shape", data_shape)[0]
        super().__init__([[channels**-0.5] * channels if weights is None else list(weights)], data_shape)


class Downsampling(LinearOperator):
    """Super-resolution: averages over squares of ``factor`` by ``factor`` pixels.

    A A^T = I / factor^2, so that the pseudo-inverse repeats every pixel.

    Args:
        factor: Side of the squares; divides height and width.
        data_shape: Shape of one image, (C, H, W).
    """

    def __init__(self, factor: int, data_shape: Sequence[int]) -> None:
        super().__init__(data_shape)
        self.factor = check_integer("factor", factor, at_least=1)
        if len(self.data_shape) != 3:
            raise ValueError(f"data_shape must be (C, H, W), got {self.data_shape}.")
        if any(n % self.factor for n in self.data_shape[1:]):
            raise ValueError(f"factor must divide height and width of (C, H, W) = {self.data_shape}, got {factor!r}.")

    def apply(self, x: Tensor) -> Tensor:
        """Return the averages, shape (B, C, H / factor, W / factor)."""
        return F.avg_pool2d(x, self.factor)

    def adjoint(self, y: Tensor) -> Tensor:
        """Repeat every pixel and divide by factor^2."""
        repeated = y.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)
        return repeated / self.factor**2

    def solve_gram(self, y: Tensor, shift: Tensor | float) -> Tensor:
        """Divide by 1 / factor^2 + shift."""
        return y / (self.factor**-2 + shift)


class GaussianBlur(LinearOperator):
    """Convolution with a Gaussian: rows and columns are each multiplied by a matrix, y = R x C^T.

    Args:
        std: Standard deviation of the kernel in pixels.
        data_shape: Shape of one image, (C, H, W).
        boundary: What lies outside the image: ``zero`` is black in the middle of a symmetric range, ``reflect`` mirrors
            the image at its edge, ``circular`` repeats it.
        truncate: The kernel ends after this many standard deviations; its weights sum to 1.
    """

    def __init__(self, std: float, data_shape: Sequence[int], boundary: str = "reflect", truncate: float = 4.0) -> None:
        super().__init__(data_shape)
        std, truncate = check_number("std", std, above=0.0), check_number("truncate", truncate, above=0.0)
        check_choice("boundary", boundary, BOUNDARIES)
        if len(self.data_shape) != 3:
            raise ValueError(f"data_shape must be (C, H, W), got {self.data_shape}.")
        radius = max(1, math.ceil(truncate * std))
        self.rows, self.columns = (_blur_matrix(n, std, radius, boundary) for n in self.data_shape[1:])
        self._row_svd, self._column_svd = torch.linalg.svd(self.rows), torch.linalg.svd(self.columns)

    def apply(self, x: Tensor) -> Tensor:
        """Return the blurred image, same shape."""
        return self.rows.to(x) @ x @ self.columns.T.to(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Blur again: both matrices are symmetric, whatever the boundary."""
        return self.apply(y)

    def solve_gram(self, y: Tensor, shift: Tensor | float) -> Tensor:
        """Solve by the singular vectors of rows and columns."""
        (u, s, _), (v, r, _) = self._row_svd, self._column_svd
        u, v = u.to(y), v.to(y)
        return u @ _divide(u.T @ y @ v, (s[:, None] * r).square(), shift) @ v.T


OPERATORS: dict[str, type[LinearOperator]] = {
    "mask": Mask,
    "channels": ChannelMixture,
    "grayscale": Grayscale,
    "downsampling": Downsampling,
    "blur": GaussianBlur,
    "map": LinearMap,
}


def check_noise_std(noise_std: float) -> None:
    """Raise a ValueError unless the standard deviation of the measurement noise is a number >= 0."""
    check_number("noise_std", noise_std, at_least=0.0, at_most=1e12)  # its square is a number of float32


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], b: Tensor, iterations: int, rtol: float = 1e-6) -> Tensor:
    """Solve M x = b of each sample for symmetric positive semidefinite M, from x = 0; b in the range of M.

    Args:
        matrix: v -> M v, sample by sample, shape (B, ...).
        b: Right-hand sides, shape (B, ...).
        iterations: At most so many products with M. In exact arithmetic the number of different eigenvalues suffices.
        rtol: Size of a sample's residual relative to b at which the sample is done and left alone.

    Returns:
        x, shape of ``b``. A direction in which M is not positive (an approximate M) ends the sample's iteration.
    """

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(1).reshape(-1, *[1] * (b.ndim - 1))

    x, r = torch.zeros_like(b), b
    p, rr = r, dot(r, r)
    stop = rr * rtol**2
    alive = rr > 0
    for _ in range(iterations):
        if not bool(alive.any()):
            break
        mp = matrix(p)
        curvature = dot(p, mp)
        alive = alive & (curvature > 0)
        step = torch.where(alive, rr / torch.where(alive, curvature, 1.0), 0.0)
        x, r = x + step * p, r - step * mp
        new = dot(r, r)
        p = r + torch.where(alive, new / torch.where(rr > 0, rr, 1.0), 0.0) * p
        rr = torch.where(alive, new, rr)
        alive = alive & (rr > stop)
    return x


def _divide(y: Tensor, eigenvalues: Tensor, shift: Tensor | float) -> Tensor:
    """Divide y by eigenvalues + shift; 0 where the divisor is lost in the round-off of y's precision."""
    divisor = eigenvalues.to(y) + shift
    lost = divisor <= torch.finfo(y.dtype).eps * eigenvalues.to(y).max()
    return torch.where(lost, 0.0, y / torch.where(lost, 1.0, divisor))


def _blur_matrix(n: int, std: float, radius: int, boundary: str) -> Tensor:
    """Return the matrix whose row i holds the weights of the pixels that make pixel i, (n, n), float64."""
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets.double() / std).square())
    kernel = kernel / kernel.sum()
    source = torch.arange(n)[:, None] + offsets
    inside = (source >= 0) & (source < n)
    if boundary == "reflect":  # d c b a | a b c d | d c b a, of period 2 n
        source = source % (2 * n)
        source = torch.where(source < n, source, 2 * n - 1 - source)
    weights = kernel.expand(n, -1)
    if boundary == "zero":
        weights = weights * inside
    matrix = torch.zeros(n, n, dtype=torch.float64)
    return matrix.scatter_add(1, source % n, weights)
