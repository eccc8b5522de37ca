"""Posterior sampling for linear measurements: denoisers that also know y = A x_0 + noise.

With r = y - A x0_hat, J = d x0_hat / d x_t and S = noise_std^2 I, every method here adds to x0_hat a shift that comes
from a Gaussian approximation of p_t(y | x_t); the docstring of each class gives it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..basics.checks import check_choice, check_integer, check_number, check_tensor
from ..networks.denoisers import Denoiser
from ..sdes import SDE, expand_like
from .common import bounded_path, check_chunk_size, check_scale, isotropic_variance
from .decoding import DecodedOperator
from .gradients import denoise_with_vjp
from .methods import GuidingMethod, PosteriorMethod
from .operators import LinearOperator, check_noise_std, conjugate_gradients
from .particles import SMC


@dataclass(frozen=True)
class DPS(GuidingMethod):
    """Diffusion posterior sampling follows the gradient of the norm of y - A x0_hat, not of its square.

    x0_hat is shifted by scale sqrt(m) sigma J^T A^T r / |r|, where m is the number of measurements. The method itself
    does not say how large the gradient is; Chung et al. choose a factor for their thousand steps. The factor used here
    moves x0_hat by about scale sigma/alpha in every measured direction on every grid. ``noise_std`` is not used, so
    that the method fits the noise in the measurements too.

    Args:
        scale: Strength.
        chunk_size: Samples per backward pass; None for all.

    Raises:
        ValueError: An option is out of range.

    Reference:
        Chung et al. 2023, arXiv:2209.14687, algorithm 1.
    """

    scale: float = 1.0
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_scale("scale", self.scale)
        check_chunk_size(self.chunk_size)

    def __call__(
        self, denoiser: Denoiser, sde: SDE, operator: LinearOperator, y: Tensor, noise_std: float = 0.0
    ) -> Denoiser:
        """Return the guided denoiser; see ``GuidingMethod``. ``noise_std`` is ignored."""
        check_noise_std(noise_std)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            t, _, sigma = bounded_path(sde, t, x)
            x0_hat, vjp = denoise_with_vjp(denoiser, x, t, self.chunk_size)
            around = operator.at(x0_hat)
            r = around.residual(y, x0_hat)
            weight = around.measurements(r).sqrt() / r.flatten(1).norm(dim=1).clamp(min=1e-12)
            return x0_hat + self.scale * sigma * vjp(around.adjoint(expand_like(weight, r) * r))

        return denoise


@dataclass(frozen=True)
class PSLD(GuidingMethod):
    """Posterior sampling in latents adds to ``DPS`` that the estimate is a latent that encoding gives back.

    With the decoder D and the encoder E, and m and d the numbers of measurements and of latents, x0_hat is shifted by

        -scale sqrt(m) sigma J^T grad (|y - A D(x0_hat)| + gluing sqrt(d/m) |x0_hat - E(x_y)|),
        x_y = D(x0_hat) + A^+ (y - A D(x0_hat)),

    where x_y is the decoded image with what was measured put in. Many latents that the decoder maps to images which
    agree with y are not latents of any image; the second term, called gluing, prefers those that are. It is only for
    measurements of images whose latents are drawn.

    Args:
        scale: Strength, as in ``DPS``.
        gluing: Weight of the second term; 0 is ``DPS``.
        chunk_size: Samples per backward pass, of the network and of the autoencoder; None for all.

    Raises:
        ValueError: An option is out of range.

    Reference:
        Rout et al. 2023, arXiv:2307.00619, algorithm 2.
    """

    scale: float = 1.0
    gluing: float = 0.1
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_scale("scale", self.scale)
        check_scale("gluing", self.gluing)
        check_chunk_size(self.chunk_size)

    def __call__(
        self, denoiser: Denoiser, sde: SDE, operator: LinearOperator, y: Tensor, noise_std: float = 0.0
    ) -> Denoiser:
        """Return the guided denoiser; see ``GuidingMethod``. ``noise_std`` is ignored."""
        check_noise_std(noise_std)
        if not isinstance(operator, DecodedOperator):
            raise ValueError(
                "posterior 'psld' is for measurements of images whose latents are drawn, got an operator on the "
                "network's own data."
            )

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            t, _, sigma = bounded_path(sde, t, x)
            x0_hat, vjp = denoise_with_vjp(denoiser, x, t, self.chunk_size)
            m = operator.measurements(y)
            ratio = self.gluing * (x0_hat[0].numel() / m).sqrt()
            ascent = operator.glued_ascent(y, x0_hat, ratio)
            return x0_hat + self.scale * sigma * vjp(expand_like(m.sqrt(), x0_hat) * ascent)

        return denoise


@dataclass(frozen=True)
class PiGDM(GuidingMethod):
    """Pseudo-inverse guidance takes x_0 given x_t for N(x0_hat, v I), v = (1/data_std^2 + alpha^2/sigma^2)^-1.

    x0_hat is shifted by (sigma^2/alpha) J^T A^T (v A A^T + S)^-1 r, which for S = 0 has the pseudo-inverse of A A^T.
    The method is exact for data that are isotropic with this standard deviation.

    Args:
        data_std: Standard deviation of the data.
        chunk_size: Samples per backward pass; None for all.

    Raises:
        ValueError: An option is out of range.

    Reference:
        Song et al. 2023 (ICLR), "Pseudoinverse-guided diffusion models for inverse problems", with r_t^2 = v.
    """

    data_std: float = 1.0
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_scale("data_std", self.data_std, positive=True)
        check_chunk_size(self.chunk_size)

    @classmethod
    def for_data(cls, std: float) -> PiGDM:
        """Return the method for data of the standard deviation ``std``."""
        return cls(data_std=std)

    def __call__(
        self, denoiser: Denoiser, sde: SDE, operator: LinearOperator, y: Tensor, noise_std: float = 0.0
    ) -> Denoiser:
        """Return the guided denoiser; see ``GuidingMethod``."""
        check_noise_std(noise_std)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            t, alpha, sigma = bounded_path(sde, t, x)
            x0_hat, vjp = denoise_with_vjp(denoiser, x, t, self.chunk_size)
            v, around = isotropic_variance(alpha, sigma, self.data_std), operator.at(x0_hat)
            u = around.solve_gram(around.residual(y, x0_hat), noise_std**2 / v) / v
            return x0_hat + sigma**2 / alpha * vjp(around.adjoint(u))

        return denoise


@dataclass(frozen=True)
class MMPS(GuidingMethod):
    """Moment matching takes x_0 given x_t for a Gaussian with its true covariance, V = (sigma^2/alpha) J.

    x0_hat is shifted by V A^T (A V A^T + S)^-1 r. The system is solved by conjugate gradients, and each iteration is
    one backward pass. A few iterations suffice, and stopping early regularises the solution. The method is exact for
    Gaussian data.

    Args:
        iterations: Conjugate-gradient iterations, at most.
        rtol: Relative residual at which a sample stops.
        chunk_size: Samples per backward pass; None for all.

    Raises:
        ValueError: An option is out of range.

    Reference:
        Rozet et al. 2024, arXiv:2405.13712, "moment matching posterior sampling".
    """

    iterations: int = 3
    rtol: float = 1e-5
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "iterations", check_integer("iterations", self.iterations, at_least=1))
        check_number("rtol", self.rtol, above=0.0, below=1.0)
        check_chunk_size(self.chunk_size)

    def __call__(
        self, denoiser: Denoiser, sde: SDE, operator: LinearOperator, y: Tensor, noise_std: float = 0.0
    ) -> Denoiser:
        """Return the guided denoiser; see ``GuidingMethod``."""
        check_noise_std(noise_std)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            t, alpha, sigma = bounded_path(sde, t, x)
            x0_hat, vjp = denoise_with_vjp(denoiser, x, t, self.chunk_size)
            around = operator.at(x0_hat)

            def covariance(v: Tensor) -> Tensor:
                return sigma**2 / alpha * vjp(v)

            u = conjugate_gradients(
                lambda v: around.apply(covariance(around.adjoint(v))) + noise_std**2 * v,
                around.residual(y, x0_hat),
                self.iterations,
                self.rtol,
            )
            return x0_hat + covariance(around.adjoint(u))

        return denoise


@dataclass(frozen=True, eq=False)
class GaussianPosterior(GuidingMethod):
    """Treat the data as Gaussian with a known covariance C, without gradients.

    x0_hat is shifted by V A^T (A V A^T + S)^-1 r with V = C (I + (alpha/sigma)^2 C)^-1. The method is exact for
    Gaussian data. It forms A as a matrix, so it is for small data only.

    Args:
        covariance: C, shape (d, d), or the variance of isotropic data.

    Raises:
        ValueError: The covariance is no square matrix of finite numbers and no variance.
    """

    covariance: Tensor | float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.covariance, Tensor) and self.covariance.ndim > 0:
            check_tensor("covariance", self.covariance, (len(self.covariance),) * 2)
        else:
            check_number("covariance", self.covariance, at_least=0.0)

    @classmethod
    def for_data(cls, std: float) -> GaussianPosterior:
        """Return the method for isotropic data of the standard deviation ``std``."""
        return cls(covariance=std**2)

    def __call__(
        self, denoiser: Denoiser, sde: SDE, operator: LinearOperator, y: Tensor, noise_std: float = 0.0
    ) -> Denoiser:
        """Return the guided denoiser; see ``GuidingMethod``. The operator must be the same for all samples."""
        check_noise_std(noise_std)
        if isinstance(operator, DecodedOperator):
            raise ValueError("posterior 'gaussian' is for linear measurements, and a decoder is not linear.")
        if operator.batch_size is not None:
            raise ValueError(
                f"operator must be the same for all samples with GaussianPosterior, got {operator.batch_size} masks."
            )
        a = operator.matrix()
        d = a.shape[1]
        c = torch.as_tensor(self.covariance).detach().cpu().double()
        c = c * torch.eye(d, dtype=torch.float64) if c.ndim == 0 else c
        if c.shape != (d, d):
            raise ValueError(f"covariance must have shape {(d, d)}, got {tuple(c.shape)}.")
        values, axes = torch.linalg.eigh(c)
        along = a @ axes

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            t, _, _ = bounded_path(sde, t, x)
            x0_hat = denoiser(x, t)
            variance = values / (1.0 + torch.exp(sde.log_snr(t).cpu().double()).unsqueeze(-1) * values)
            gram = (along * variance.unsqueeze(-2)) @ along.T + noise_std**2 * torch.eye(len(a), dtype=torch.float64)
            r = operator.residual(y, x0_hat).flatten(1)
            # Masks make rows of A zero, and the residual is zero there too. The pseudo-inverse leaves these rows out.
            u = (torch.linalg.pinv(gram, hermitian=True) @ r.cpu().double().unsqueeze(-1)).squeeze(-1)
            shift = ((u @ along) * variance) @ axes.T
            return x0_hat + shift.to(x0_hat).reshape(x.shape)

        return denoise


POSTERIOR_METHODS: dict[str, type[PosteriorMethod]] = {
    "dps": DPS,
    "psld": PSLD,
    "pigdm": PiGDM,
    "mmps": MMPS,
    "gaussian": GaussianPosterior,
    "smc": SMC,
}


def posterior_method(
    name: str, options: Mapping[str, Any] | None = None, data_std: float | None = None, argument: str = "options"
) -> PosteriorMethod:
    """Return the posterior method of this name.

    Args:
        name: A name in ``POSTERIOR_METHODS``.
        options: Values of its fields that are to differ from the defaults.
        data_std: Standard deviation of the data, on which some defaults depend; None for the defaults of the class.
        argument: What a message calls ``options``.

    Raises:
        ValueError: An unknown name or option, or a value out of range.
    """
    check_choice("posterior", name, POSTERIOR_METHODS)
    method = POSTERIOR_METHODS[name]
    known = [field.name for field in fields(method)]
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"{argument} must be a dictionary of {', '.join(known)}, or None, got {options!r}.")
    unknown = [key for key in options or {} if key not in known]
    if unknown:
        close = {key: difflib.get_close_matches(str(key), known, 1) for key in unknown}
        hints = ", ".join(repr(key) + (f" (did you mean {c[0]!r}?)" if c else "") for key, c in close.items())
        raise ValueError(f"{argument} of {name!r} may hold {', '.join(known)}, got {hints}.")
    default = method() if data_std is None else method.for_data(data_std)
    return replace(default, **(options or {}))


def posterior_denoiser(
    denoiser: Denoiser,
    sde: SDE,
    operator: LinearOperator,
    y: Tensor,
    noise_std: float = 0.0,
    method: str = "mmps",
    **options: Any,
) -> Denoiser:
    """Return the denoiser E[x_0 | x_t, y] of data measured as y = A x_0 + noise_std z.

    Args:
        denoiser: The unconditional one, (x_t, t) -> x0_hat.
        sde: Its SDE.
        operator: A.
        y: Measurements, shape (B, *measurement_shape).
        noise_std: Standard deviation of the measurement noise, in units of the data.
        method: The name in ``POSTERIOR_METHODS`` of a ``GuidingMethod``.
        **options: Fields of the method's class.

    Raises:
        ValueError: An unknown method or option, or values out of range.
    """
    check_choice("method", method, [k for k, cls in POSTERIOR_METHODS.items() if issubclass(cls, GuidingMethod)])
    guide = cast(GuidingMethod, posterior_method(method, options))
    return guide(denoiser, sde, operator, y, noise_std)
