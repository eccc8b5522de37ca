"""Measurements of images whose latents are drawn: y = A D(x_0) + noise, with the decoder D of an autoencoder.

Such a measurement is not linear in x_0. Posterior methods see it linearised around the current estimate, with the
residual y - A D(x0_hat) as it is and the Jacobian D' of the decoder at x0_hat,

    A D(x_0) ~ A D(x0_hat) + A D'(x_0 - x0_hat),

which is a Gauss-Newton step where the method is a Gaussian one. Activations of the decoder, and of the encoder where it
is used, are those of one chunk of samples at a time; the decoder runs again for each product with its Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .common import check_chunk_size
from .operators import LinearOperator, conjugate_gradients

GRAM_ITERATIONS = 10  # each costs a product with the decoder's Jacobian and one with its transpose
ImageMap = Callable[[Tensor], Tensor]
"""(B, ...) -> (B, ...), sample by sample; a gradient passes."""


class DecodedOperator(LinearOperator):
    """A linear measurement of decoded latents, A D(x_0).

    Args:
        operator: A, of images.
        data_shape: Shape of the latents of one image.
        decode: D, from latents to images.
        encode: E, from images to latents, for methods that use it.
        chunk_size: Samples whose activations are kept at a time; None for all.
    """

    def __init__(
        self,
        operator: LinearOperator,
        data_shape: tuple[int, ...],
        decode: ImageMap,
        encode: ImageMap,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(data_shape)
        self.operator, self.decode, self.encode = operator, decode, encode
        self.chunk_size = check_chunk_size(chunk_size)

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        """Shape of one measurement, without the batch axis."""
        return self.operator.measurement_shape

    @property
    def batch_size(self) -> int | None:
        """Number of samples that A is made for; None where it is the same for all."""
        return self.operator.batch_size

    def select(self, index: Tensor) -> DecodedOperator:
        """Return the operator for the samples ``index`` of the batch."""
        return self._with(self.operator.select(index))

    def _with(self, operator: LinearOperator) -> DecodedOperator:
        return DecodedOperator(operator, self.data_shape, self.decode, self.encode, self.chunk_size)

    def apply(self, x: Tensor) -> Tensor:
        """Return A D(x), which is not linear in x."""
        with torch.no_grad():
            return self.operator.apply(torch.cat([self.decode(part) for part in x.split(self._chunk(x))]))

    def adjoint(self, y: Tensor) -> Tensor:
        """Refuse: there is an adjoint around an estimate only; see ``at``."""
        raise ValueError("DecodedOperator has an adjoint around an estimate only: operator.at(x0_hat).adjoint(y).")

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the misfit y - A D(x), zero where nothing is measured."""
        with torch.no_grad():
            return self.operator.residual(y, torch.cat([self.decode(part) for part in x.split(self._chunk(x))]))

    def measurements(self, y: Tensor) -> Tensor:
        """Count the numbers that were measured of each sample, shape (B,)."""
        return self.operator.measurements(y)

    def at(self, x0_hat: Tensor) -> LinearOperator:
        """Return the operator linearised around an estimate, shape (B, *data_shape)."""
        return LinearizedOperator(self, x0_hat)

    def glued_ascent(self, y: Tensor, x0_hat: Tensor, ratio: Tensor) -> Tensor:
        """Return -grad (|y - A D(x)| + ratio |x - E(D(x) + A^+ (y - A D(x)))|) at x = x0_hat, sample by sample.

        Args:
            y: Measurements, shape (B, ...).
            x0_hat: Latents, shape (B, *data_shape).
            ratio: Weight of the second term, shape (B,).
        """
        parts = []
        for rows in torch.arange(len(x0_hat), device=x0_hat.device).split(self._chunk(x0_hat)):
            operator = self.operator.select(rows) if self.batch_size is not None else self.operator
            with torch.inference_mode(False), torch.enable_grad():
                x, measured = x0_hat[rows].detach().clone().requires_grad_(), y[rows].detach().clone()
                image = self.decode(x)
                r = operator.residual(measured, image)
                glued = self.encode(image + operator.pseudo_inverse(r))
                loss = r.flatten(1).norm(dim=1) + ratio[rows].clone() * (x - glued).flatten(1).norm(dim=1)
                parts.append(-torch.autograd.grad(loss.sum(), x)[0])
        return torch.cat(parts)

    def _chunk(self, x: Tensor) -> int:
        return self.chunk_size or max(1, len(x))


class LinearizedOperator(LinearOperator):
    """A D' with the Jacobian D' of a decoder at an estimate; its residual is that of the decoded estimate.

    Args:
        measured: The measurement of decoded latents.
        center: The estimate, shape (B, *data_shape).
    """

    def __init__(self, measured: DecodedOperator, center: Tensor) -> None:
        super().__init__(measured.data_shape)
        self._measured, self._center = measured, center

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        """Shape of one measurement, without the batch axis."""
        return self._measured.measurement_shape

    @property
    def batch_size(self) -> int | None:
        """The estimate is of so many samples."""
        return len(self._center)

    def select(self, index: Tensor) -> LinearizedOperator:
        """Return the operator for the samples ``index`` of the batch."""
        return LinearizedOperator(self._measured.select(index), self._center[index.to(self._center.device)])

    def apply(self, x: Tensor) -> Tensor:
        """Return A D' x."""
        chunk = self._measured._chunk(self._center)
        pairs = zip(self._center.split(chunk), x.split(chunk), strict=True)
        return self._measured.operator.apply(torch.cat([self._along(*pair) for pair in pairs]))

    def _along(self, center: Tensor, direction: Tensor) -> Tensor:
        """Return D' of a direction, as the derivative by u of <D'^T u, direction>.

        Layers know their second derivatives more often than derivatives along a direction; fused attention knows
        neither.
        """
        with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            at = center.detach().clone().requires_grad_()
            image = self._measured.decode(at)
            u = torch.zeros_like(image, requires_grad=True)
            (back,) = torch.autograd.grad(image, at, u, create_graph=True)
            return torch.autograd.grad(back, u, direction.detach().clone())[0]

    def adjoint(self, y: Tensor) -> Tensor:
        """Return D'^T A^T y."""
        chunk = self._measured._chunk(self._center)
        parts = []
        for center, v in zip(self._center.split(chunk), self._measured.operator.adjoint(y).split(chunk), strict=True):
            with torch.inference_mode(False), torch.enable_grad():
                at = center.detach().clone().requires_grad_()
                parts.append(torch.autograd.grad(self._measured.decode(at), at, v.detach().clone())[0])
        return torch.cat(parts)

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y - A D(x) for the estimate itself, and its linearisation for other x."""
        r = self._measured.residual(y, self._center)
        return r if x is self._center else r - self.apply(x - self._center)

    def solve_gram(self, y: Tensor, shift: Tensor | float) -> Tensor:
        """Return (A D' D'^T A^T + shift I)^-1 y, as far as ``GRAM_ITERATIONS`` of conjugate gradients lead."""
        return conjugate_gradients(lambda v: self.apply(self.adjoint(v)) + shift * v, y, GRAM_ITERATIONS, rtol=1e-4)

    def measurements(self, y: Tensor) -> Tensor:
        """Count the numbers that were measured of each sample, shape (B,)."""
        return self._measured.measurements(y)
