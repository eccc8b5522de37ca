"""Posterior sampling for linear measurements: denoisers that also know y = A x_0 + noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..basics.checks import check_choice, check_integer, check_number, check_tensor
from ..networks.denoisers import Denoiser
from ..sdes import SDE, expand_like
from .common import bounded_path, check_chunk_size, check_scale, isotropic_variance
from .operators import LinearOperator, check_noise_std, conjugate_gradients


def dps(
    denoiser: Denoiser,
    sde: SDE,
    operator: LinearOperator,
    y: Tensor,
    noise_std: float = 0.0,
    scale: float = 1.0,
    chunk_size: int | None = None,
) -> Denoiser:
    """Diffusion posterior sampling: follow the gradient of the norm of y - A x0_hat, not of its square.

    The method does not say how large the gradient is; Chung et al. choose a factor for their thousand steps. Here the
    factor is scale sqrt(m) sigma for m measurements, which moves x0_hat by about scale sigma/alpha in every measured
    direction on every grid. ``noise_std`` is not used, so that the method fits the noise in the measurements too.

    Args:
        denoiser: The unconditional one.
        sde: Its SDE.
        operator: A.
        y: Measurements, shape (B, ...).
        noise_std: Ignored.
        scale: Strength.
        chunk_size: Samples per backward pass; None for all.

    Reference:
        Chung et al. 2023, arXiv:2209.14687, algorithm 1.
    """
    check_scale("scale", scale)
    check_chunk_size(chunk_size)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        t, _, sigma = bounded_path(sde, t, x)
        x0_hat, vjp = denoise_with_vjp(denoiser, x, t, chunk_size)
        r = operator.residual(y, x0_hat)
        weight = operator.measurements(r).sqrt() / r.flatten(1).norm(dim=1).clamp(min=1e-12)
        return x0_hat + scale * sigma * vjp(operator.adjoint(expand_like(weight, r) * r))

    return denoise


def pigdm(
    denoiser: Denoiser,
    sde: SDE,
    operator: LinearOperator,
    y: Tensor,
    noise_std: float = 0.0,
    data_std: float = 1.0,
    chunk_size: int | None = None,
) -> Denoiser:
    """Pseudo-inverse guidance: x_0 given x_t is taken for N(x0_hat, v I), v = (1/data_std^2 + alpha^2/sigma^2)^-1.

    It is exact for data that are isotropic with this standard deviation.

    Args:
        denoiser: The unconditional one.
        sde: Its SDE.
        operator: A.
        y: Measurements, shape (B, ...).
        noise_std: Standard deviation of the measurement noise; 0 leads to the pseudo-inverse.
        data_std: Standard deviation of the data.
        chunk_size: Samples per backward pass; None for all.

    Reference:
        Song et al. 2023 (ICLR), "Pseudoinverse-guided diffusion models for inverse problems", with r_t^2 = v.
    """
    check_noise_std(noise_std)
    check_scale("data_std", data_std, positive=True)
    check_chunk_size(chunk_size)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        t, alpha, sigma = bounded_path(sde, t, x)
        x0_hat, vjp = denoise_with_vjp(denoiser, x, t, chunk_size)
        v = isotropic_variance(alpha, sigma, data_std)
        u = operator.solve_gram(operator.residual(y, x0_hat), noise_std**2 / v) / v
        return x0_hat + sigma**2 / alpha * vjp(operator.adjoint(u))

    return denoise


def mmps(
    denoiser: Denoiser,
    sde: SDE,
    operator: LinearOperator,
    y: Tensor,
    noise_std: float = 0.0,
    iterations: int = 3,
    rtol: float = 1e-5,
    chunk_size: int | None = None,
) -> Denoiser:
    """Moment matching: x_0 given x_t is a Gaussian with the true covariance (sigma^2 / alpha) d x0_hat / d x_t.

    The system (A V A^T + noise_std^2 I) u = y - A x0_hat is solved by conjugate gradients, and each iteration is one
    backward pass. A few iterations suffice, and stopping early regularises the solution. The method is exact for
    Gaussian data.

    Args:
        denoiser: The unconditional one.
        sde: Its SDE.
        operator: A.
        y: Measurements, shape (B, ...).
        noise_std: Standard deviation of the measurement noise.
        iterations: Conjugate-gradient iterations, at most.
        rtol: Relative residual at which a sample stops.
        chunk_size: Samples per backward pass; None for all.

    Reference:
        Rozet et al. 2024, arXiv:2405.13712, "moment matching posterior sampling".
    """
    check_noise_std(noise_std)
    iterations = check_integer("iterations", iterations, at_least=1)
    check_number("rtol", rtol, above=0.0, below=1.0)
    check_chunk_size(chunk_size)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        t, alpha, sigma = bounded_path(sde, t, x)
        x0_hat, vjp = denoise_with_vjp(denoiser, x, t, chunk_size)

        def covariance(v: Tensor) -> Tensor:
            return sigma**2 / alpha * vjp(v)

        u = conjugate_gradients(
            lambda v: operator.apply(covariance(operator.adjoint(v))) + noise_std**2 * v,
            operator.residual(y, x0_hat),
            iterations,
            rtol,
        )
        return x0_hat + covariance(operator.adjoint(u))

    return denoise


def gaussian(
    denoiser: Denoiser,
    sde: SDE,
    operator: LinearOperator,
    y: Tensor,
    noise_std: float = 0.0,
    covariance: Tensor | float = 1.0,
) -> Denoiser:
    """Treat the data as Gaussian with a known covariance C: V = C (I + (alpha/sigma)^2 C)^-1, without gradients.

    It is exact for Gaussian data. It forms A as a matrix, so it is for small data only.

    Args:
        denoiser: The unconditional one.
        sde: Its SDE.
        operator: A, the same for all samples.
        y: Measurements, shape (B, ...).
        noise_std: Standard deviation of the measurement noise.
        covariance: C, shape (d, d), or the variance of isotropic data.
    """
    check_noise_std(noise_std)
    if operator.batch_size is not None:
        raise ValueError(f"method 'gaussian' needs one operator for all samples, got {operator.batch_size} masks.")
    a = operator.matrix()
    if not isinstance(covariance, Tensor):
        covariance = torch.tensor(check_number("covariance", covariance, at_least=0.0), dtype=torch.float64)
    c = check_tensor("covariance", covariance, tuple(covariance.shape)).to("cpu", torch.float64)
    c = c * torch.eye(a.shape[1], dtype=torch.float64) if c.ndim == 0 else c
    if c.shape != (a.shape[1], a.shape[1]):
        raise ValueError(f"covariance must have shape {(a.shape[1], a.shape[1])}, got {tuple(c.shape)}.")
    values, axes = torch.linalg.eigh(c)
    along = a @ axes

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        t, _, _ = bounded_path(sde, t, x)
        x0_hat = denoiser(x, t)
        variance = values / (1.0 + torch.exp(sde.log_snr(t).double().cpu()).unsqueeze(-1) * values)
        gram = (along * variance.unsqueeze(-2)) @ along.T + noise_std**2 * torch.eye(len(a), dtype=torch.float64)
        r = operator.residual(y, x0_hat).flatten(1)
        # Masks make rows of A zero, and the residual is zero there too. The pseudo-inverse leaves these rows out.
        u = (torch.linalg.pinv(gram, hermitian=True) @ r.cpu().double().unsqueeze(-1)).squeeze(-1)
        shift = ((u @ along) * variance) @ axes.T
        return x0_hat + shift.to(x0_hat).reshape(x.shape)

    return denoise


POSTERIOR_METHODS: dict[str, Callable[..., Denoiser]] = {"dps": dps, "pigdm": pigdm, "mmps": mmps, "gaussian": gaussian}


def posterior_denoiser(
    denoiser: Denoiser,
    sde: SDE,
    operator: LinearOperator,
    y: Tensor,
    noise_std: float = 0.0,
    method: str = "mmps",
    **options: Any,
) -> Denoiser:
    """The denoiser E[x_0 | x_t, y] of data measured as y = A x_0 + noise_std z.

    Args:
        denoiser: The unconditional one, (x_t, t) -> x0_hat.
        sde: Its SDE.
        operator: A.
        y: Measurements, shape (B, *measurement_shape).
        noise_std: Standard deviation of the measurement noise, in units of the data.
        method: A name in ``POSTERIOR_METHODS``.
        **options: Arguments of the method's function; unknown ones raise a TypeError.

    Raises:
        ValueError: An unknown method, or values out of range.
    """
    check_choice("method", method, POSTERIOR_METHODS)
    return POSTERIOR_METHODS[method](denoiser, sde, operator, y, noise_std, **options)


def denoise_with_vjp(
    denoiser: Denoiser, x: Tensor, t: Tensor, chunk_size: int | None = None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """x0_hat and v -> J^T v with J = d x0_hat / d x_t, sample by sample; works under no_grad and inference_mode.

    Args:
        denoiser: (x_t, t) -> x0_hat; with ``chunk_size`` it is called with parts of the batch.
        x: State, shape (B, ...).
        t: Time, shape () or (B,).
        chunk_size: Samples whose activations are kept at a time. None keeps those of the whole batch for as long as the
            returned function exists.

    Returns:
        x0_hat and the function, both without a graph.
    """
    chunk_size = check_chunk_size(chunk_size)

    def graph(part: slice) -> tuple[Tensor, Tensor]:
        at = x[part].detach().clone().requires_grad_()
        return at, denoiser(at, t[part] if t.ndim else t)

    if chunk_size is None or chunk_size >= len(x):
        with torch.inference_mode(False), torch.enable_grad():
            at, output = graph(slice(None))

        def whole(v: Tensor) -> Tensor:
            with torch.inference_mode(False):
                return torch.autograd.grad(output, at, v.detach().clone(), retain_graph=True)[0]

        return output.detach(), whole

    parts = [slice(i, i + chunk_size) for i in range(0, len(x), chunk_size)]

    def in_parts(v: Tensor) -> Tensor:
        gradients = []
        with torch.inference_mode(False), torch.enable_grad():
            for part in parts:
                at, output = graph(part)
                gradients.append(torch.autograd.grad(output, at, v[part].detach().clone())[0])
        return torch.cat(gradients)

    with torch.no_grad():
        return torch.cat([denoiser(x[part], t[part] if t.ndim else t) for part in parts]), in_parts
