r"""Conditional denoisers by Bayes' rule: grad log p_t(x | y) = grad log p_t(x) + grad log p_t(y | x).

With Tweedie's formula, x0_hat = (x_t + sigma^2 score) / alpha, this reads

    E[x_0 | x_t, y] = E[x_0 | x_t] + (sigma^2 / alpha) grad log p_t(y | x_t),

so guidance turns a denoiser into another denoiser, and predictor-corrector sampling, the ODE and the likelihood take
the new one like any other (Song et al. 2021, eq. 14 and appendix I). Where alpha vanishes, both factors are taken at
the time where sigma / alpha = 1000.

Linear measurements y = A x_0 + noise have p_t(y | x_t) = E[N(y; A x_0, noise_std^2 I) | x_t], which every method
approximates by a Gaussian of its own. With r = y - A x0_hat, J = d x0_hat / d x_t and S = noise_std^2 I they shift
x0_hat by

    dps       scale sqrt(m) sigma J^T A^T r / |r|, m the number of measurements;
    pigdm     (sigma^2/alpha) J^T A^T (v A A^T + S)^-1 r,  v = 1 / (1/data_std^2 + alpha^2/sigma^2);
    mmps      V A^T (A V A^T + S)^-1 r with V = (sigma^2/alpha) J, the true covariance of x_0 given x_t;
    gaussian  the same with V of Gaussian data with a given covariance.

Beside one call of the denoiser, ``dps`` and ``pigdm`` cost one backward pass, ``mmps`` costs one for each iteration of
its solver and one more, and ``gaussian`` costs nothing.

A method is one function ``(denoiser, sde, operator, y, noise_std, **options) -> denoiser`` and one line in
``POSTERIOR_METHODS``. Replacement and resampling move the sample and not its estimate, so they are ways to execute a
plan: ``Replacement`` and ``resampled``. ``smc_sample`` corrects the approximation with weighted particles.

A backward pass keeps the activations of the network in memory for the whole batch. ``chunk_size`` limits this to so
many samples at a time, and costs one more forward pass per backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check_choice, check_integer, check_number, check_pair, check_tensor
from .noise import standard_normal_like
from .operators import LinearOperator, check_noise_std, conjugate_gradients
from .plans import Plan, Row, advance, memorise
from .sdes import SDE, as_time, expand_like

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t of shape (B, ...), t of shape () or (B,)) -> x0_hat = E[x_0 | x_t], shape (B, ...)."""

Generators = torch.Generator | Sequence[torch.Generator] | None

LARGEST_SCALE = 1e6  # of guidance: far larger than is useful, and float32 can still hold the guided estimate
LARGEST_RATIO = 1000.0  # sigma / alpha beyond which x_t says nothing about x_0


# ---------------------------------------------------------------------- classes


def classifier_guidance(
    denoiser: Denoiser, sde: SDE, log_prob: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0
) -> Denoiser:
    """Guide by a classifier of noisy data: x0_hat + scale (sigma^2 / alpha) grad log p_t(y | x_t).

    Args:
        denoiser: The unconditional one.
        sde: Its SDE.
        log_prob: (x_t, t) -> log p_t(y | x_t) in nats, shape (B,), differentiable. It must know the noise level.
        scale: 1 is Bayes' rule; larger values sharpen p_t(y | x_t) to its power.

    Reference:
        Song et al. 2021, eq. 14 and appendix I.1; scale: Dhariwal & Nichol 2021, arXiv:2105.05233, section 4.
    """
    check_scale("scale", scale)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        t, alpha, sigma = _path(sde, t, x)
        x0_hat = denoiser(x, t)
        if scale == 0.0:
            return x0_hat
        # The log-likelihood needs second derivatives, and fused attention kernels have none.
        again = torch.is_grad_enabled() and x.requires_grad
        kernels = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH) if again else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), kernels:
            at = x if again else x.detach().clone().requires_grad_()
            gradient = torch.autograd.grad(log_prob(at, t).sum(), at, create_graph=again)[0]
        return x0_hat + scale * sigma**2 / alpha * gradient

    return denoise


def classifier_free_guidance(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
    condition: Tensor,
    null_condition: Tensor,
    scale: float = 1.0,
) -> Denoiser:
    """Guide by the difference of a conditional and an unconditional estimate, both from one batched call.

    x0_hat = x0_hat(null) + scale (x0_hat(condition) - x0_hat(null)), which with exact denoisers is classifier guidance
    with the same scale. Scale 1 calls the conditional half only, and scale 0 the unconditional half only.

    Args:
        denoiser: (x_t, t, condition) -> x0_hat.
        condition: The conditions, one row per sample, shape (B, ...).
        null_condition: The value that the network takes for "no condition", broadcastable to ``condition``.
        scale: 0 is unconditional, 1 conditional, larger values push away from the unconditional estimate.

    Reference:
        Ho & Salimans 2022, arXiv:2207.12598, eq. 6, with scale = 1 + w.
    """
    check_scale("scale", scale)
    null_condition = torch.as_tensor(null_condition).to(condition).expand_as(condition)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if len(condition) != len(x):
            raise ValueError(f"condition has {len(condition)} rows, but the batch has {len(x)} samples.")
        if scale in (0.0, 1.0):
            return denoiser(x, t, condition if scale == 1.0 else null_condition)
        both = denoiser(torch.cat([x, x]), torch.cat([t, t]) if t.ndim else t, torch.cat([condition, null_condition]))
        conditional, unconditional = both.chunk(2)
        return torch.lerp(unconditional, conditional, scale)

    return denoise


def guidance_interval(inside: Denoiser, outside: Denoiser, sde: SDE, interval: tuple[float, float] | None) -> Denoiser:
    """``inside`` where sigma/alpha lies in the interval, ``outside`` elsewhere; ``inside`` everywhere for None.

    Args:
        inside: The guided denoiser.
        outside: The conditional denoiser without guidance. Of the two, only the one that is needed is called.
        sde: Their SDE.
        interval: Smallest and largest noise-to-signal ratio sigma/alpha, in units of the data; the same numbers mean
            the same noise for every SDE.

    Reference:
        Kynkäänniemi et al. 2024, arXiv:2404.07724.
    """
    check_interval(interval)
    if interval is None:
        return inside
    low, high = interval

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        ratio = torch.exp(-0.5 * sde.log_snr(t))
        within = (ratio >= low) & (ratio <= high)
        if bool(within.all()):
            return inside(x, t)
        if not bool(within.any()):
            return outside(x, t)
        return torch.where(expand_like(within, x).to(x.device), inside(x, t), outside(x, t))

    return denoise


# ---------------------------------------------------------------------- linear measurements


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
        t, _, sigma = _path(sde, t, x)
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
        t, alpha, sigma = _path(sde, t, x)
        x0_hat, vjp = denoise_with_vjp(denoiser, x, t, chunk_size)
        v = _isotropic_variance(alpha, sigma, data_std)
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
        t, alpha, sigma = _path(sde, t, x)
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
        t, _, _ = _path(sde, t, x)
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


# ---------------------------------------------------------------------- replacement and resampling


class Replacement:
    """Inpainting by replacement: after each row the known entries are drawn anew from p(x_s | x_0 known).

    x_s <- mask (alpha_s known + sigma_s z) + (1 - mask) x_s, at the time s at which the row has arrived, and the known
    values themselves at the end. The paper's code adds noise for the time before the step instead, and the mean that it
    returns at the end still has noise in the hole. The method is not exact even with a perfect score, because the hole
    is drawn without knowing what its surroundings will become.

    Args:
        sde: The SDE.
        known: Data, shape (B, ...); its values where the mask is 0 do not matter.
        mask: 1 where the data are known, broadcastable to ``known``.
        generator: Source of z.

    Reference:
        Song et al. 2021, appendix I.2.
    """

    def __init__(self, sde: SDE, known: Tensor, mask: Tensor, generator: Generators = None) -> None:
        self.sde, self.known, self.generator = sde, known, generator
        self.mask = mask.to(known.device).bool().expand_as(known)

    def __call__(self, x: Tensor, s: float | None) -> Tensor:
        """x with its known entries drawn for the time ``s``; None is the data."""
        return torch.where(self.mask, self.at(s).to(x), x)

    def at(self, s: float | None) -> Tensor:
        """A draw of alpha_s known + sigma_s z, shape (B, ...)."""
        if s is None:
            return self.known
        z = standard_normal_like(self.known, self.generator).to(self.known)
        return self.known * float(self.sde.alpha(s)) + z * float(self.sde.sigma(s))


def resampled(rows: Sequence[Row], resamplings: int, jump_length: int = 1) -> Iterator[tuple[int, float | None]]:
    """The order in which RePaint visits a plan's rows: every ``jump_length`` levels it goes back and does them again.

    Replacement draws the known pixels and the hole independently. They come to agree when the whole image is noised
    back to the earlier time and denoised again.

    Args:
        rows: Rows without ``history`` or ``remember``, because a jump breaks the path that multistep rows look back on.
        resamplings: How often each stretch is done; 1 is plain replacement.
        jump_length: Levels per stretch.

    Yields:
        The index of the next row, and the SDE time to which the sample is noised after this row, or None if there is no
        jump. The noising starts from the row's ``s``.

    Raises:
        ValueError: Bad numbers, or rows that look back.

    Reference:
        Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1; jumps of several levels are its appendix's.
    """
    resamplings = check_integer("resamplings", resamplings, at_least=1)
    jump_length = check_integer("jump_length", jump_length, at_least=1)
    if resamplings > 1 and any(row.history or row.remember for row in rows):
        raise ValueError(
            "resampling needs a sampler without memory: set solver_order=1 and solver_correction=False, or another "
            "predictor."
        )
    # A level begins with the first call at its time. A second stage may be called at the time of the next level, which
    # is the time it leads to; it does not begin that level.
    starts = [0]
    for i, row in enumerate(rows):
        if row.t < rows[starts[-1]].t and (row.is_corrector or row.s != row.t):
            starts.append(i)
    # The last stretch, which ends with the data, is made once.
    for k in range(0, len(starts), jump_length):
        begin = starts[k]
        end = starts[k + jump_length] if k + jump_length < len(starts) else len(rows)
        repeats = resamplings if end < len(rows) else 1
        for repeat in range(repeats):
            for i in range(begin, end):
                yield i, rows[begin].t if i == end - 1 and repeat < repeats - 1 else None


def renoise(sde: SDE, x: Tensor, s: float, t: float, generator: Generators = None) -> Tensor:
    """Draw from the transition kernel p(x_t | x_s), s < t, which goes back to more noise."""
    a, v = sde.transition(s, t)
    return x * float(a) + standard_normal_like(x, generator).to(x) * math.sqrt(float(v))


@torch.no_grad()
def sample_inpainting(
    plan: Plan,
    denoiser: Denoiser,
    x: Tensor,
    replacement: Replacement,
    generator: Generators = None,
    resamplings: int = 1,
    jump_length: int = 1,
) -> Tensor:
    """Execute a plan with known entries replaced after every row, and RePaint's resampling where asked for.

    Args:
        plan: From ``make_plan``.
        denoiser: (x, t) -> x0_hat.
        x: Start, drawn from the prior, shape (B, ...).
        replacement: The known entries. If it has a generator of its own, the rows draw the same noise as without it.
        generator: Source of the rows' noise.
        resamplings: See ``resampled``.
        jump_length: See ``resampled``.

    Returns:
        The sample, with the known entries exact where the plan ends with the data.
    """
    memory: list[Tensor] = []
    x = replacement(x, plan.rows[0].t)
    for i, back_to in resampled(plan.rows, resamplings, jump_length):
        row = plan.rows[i]
        output = denoiser(x, torch.tensor(row.t, dtype=torch.float64, device=x.device))
        estimate = memorise(row, x, (x * row.skip).add_(output, alpha=row.out)) if row.remember else None
        x = advance(row, x, output, memory, lambda: standard_normal_like(output, generator))  # noqa: B023
        if estimate is not None:
            memory = [estimate, *memory][: plan.memory]
        x = replacement(x, row.s)
        if back_to is not None and row.s is not None:
            x = renoise(replacement.sde, x, row.s, back_to, replacement.generator)
    return x


# ---------------------------------------------------------------------- particles


@dataclass(frozen=True)
class Particles:
    """A weighted sample of the posterior.

    Attributes:
        samples: Shape (B, K, ...).
        log_weights: Logarithms of the normalised weights, shape (B, K).
        log_evidence: Estimate of log p(y) in nats, whose exponential is unbiased, shape (B,).
        effective: Smallest effective number of particles, 1 / sum w^2, in the course of the run, shape (B,).
    """

    samples: Tensor
    log_weights: Tensor
    log_evidence: Tensor
    effective: Tensor

    def draw(self, generator: Generators = None) -> Tensor:
        """One particle of each problem, chosen by weight, shape (B, ...)."""
        chosen = _systematic(self.log_weights, 1, generator)[:, 0]
        return self.samples[torch.arange(len(chosen), device=chosen.device), chosen]

    def mean(self) -> Tensor:
        """Estimate of E[x_0 | y], shape (B, ...)."""
        weights = expand_like(self.log_weights.exp(), self.samples).to(self.samples)
        return (weights * self.samples).sum(1)


@torch.no_grad()
def smc_sample(
    plan: Plan,
    denoiser: Denoiser,
    sde: SDE,
    operator: LinearOperator,
    y: Tensor,
    noise_std: float,
    particles: int = 16,
    generator: torch.Generator | None = None,
    data_std: float = 1.0,
    resample_below: float = 0.5,
    chunk_size: int | None = None,
) -> Particles:
    r"""Sample the posterior by sequential Monte Carlo: exact as the number of particles grows.

    Particles move by the plan's rows with the denoiser of ``pigdm``, and their weights correct its error. With the
    twisting functions psi_t(x) = N(y; A x0_hat, noise_std^2 I + v A A^T) the weights are

        w_s = w_t  p(x_s | x_t) psi_s(x_s) / (q(x_s | x_t) psi_t(x_t)),

    where p is the unguided row and q the guided one. The last psi is the likelihood itself. The particles converge to
    the law of the *plan* given y, and what separates this from the law of the SDE vanishes as the plan gets finer.

    Args:
        plan: Rows with noise and without memory, ending with the data: the reverse SDE by ``ancestral``,
            ``reverse_diffusion``, ``euler_maruyama`` or first-order ``exponential``.
        denoiser: The unconditional one; called with up to B K samples and t of shape ().
        sde: Its SDE.
        operator: A.
        y: Measurements of B problems, shape (B, ...).
        noise_std: Standard deviation of the measurement noise. It must be positive, because without noise no particle
            has any weight.
        particles: K, the number of particles per problem.
        generator: Source of all noise.
        data_std: See ``pigdm``. It changes the efficiency, not the law that is sampled.
        resample_below: Particles are resampled where their effective number is below this fraction of K.
        chunk_size: Samples per backward pass; None for all.

    Returns:
        Weighted particles and the evidence.

    Raises:
        ValueError: A plan that does not fit, or values out of range.

    Reference:
        Wu et al. 2023, arXiv:2306.17775, algorithm 1.
    """
    check_noise_std(noise_std)
    if noise_std == 0.0:
        raise ValueError("noise_std must be positive for smc_sample, got 0: without noise no particle has any weight.")
    check_scale("data_std", data_std, positive=True)
    particles = check_integer("particles", particles, at_least=1)
    check_number("resample_below", resample_below, at_least=0.0, at_most=1.0)
    check_chunk_size(chunk_size)
    *moves, last = plan.rows
    if last.s is not None or last.x != 0.0 or any(r.noise == 0.0 or r.history or r.langevin for r in moves):
        raise ValueError(
            "smc_sample needs a plan that ends with the data and whose other rows have noise and no memory or "
            "corrector: stochasticity 1, solver_order 1, no solver_correction."
        )
    problems, k = len(y), particles
    index = torch.arange(problems, device=y.device).repeat_interleave(k)
    each, targets = operator.select(index), y[index]
    x = standard_normal_like(targets.new_zeros(problems * k, *operator.data_shape), generator).to(y) * sde.prior_std
    log_weights = torch.zeros(problems, k, dtype=torch.float64, device=y.device)
    log_evidence = torch.zeros(problems, dtype=torch.float64, device=y.device)
    effective = torch.full_like(log_evidence, float(k))
    previous = torch.zeros_like(log_weights)
    for row in plan.rows:
        t, alpha, sigma = _path(sde, torch.tensor(row.t, dtype=torch.float64, device=x.device), x)
        x0_hat, vjp = denoise_with_vjp(denoiser, x, t, chunk_size)
        v = _isotropic_variance(alpha, sigma, data_std)
        r = each.residual(targets, x0_hat)
        u = each.solve_gram(r, noise_std**2 / v) / v
        log_twist = (-0.5 * (r * u).flatten(1).sum(1).double()).reshape(problems, k)
        log_weights = log_weights + log_twist - previous
        if row is last:
            m = each.measurements(targets).double()
            square = r.double().flatten(1).square().sum(1)
            likelihood = -0.5 * square / noise_std**2 - 0.5 * m * math.log(2.0 * math.pi * noise_std**2)
            log_weights = log_weights + likelihood.reshape(problems, k) - log_twist
            x = x0_hat * last.model
            break
        size = 1.0 / torch.softmax(log_weights, 1).square().sum(1)
        effective = torch.minimum(effective, size)
        shift = sigma**2 / alpha * vjp(each.adjoint(u))
        again = size < resample_below * k
        if bool(again.any()):
            stay = torch.arange(k, device=x.device).expand(problems, k)
            chosen = torch.where(again[:, None], _systematic(log_weights, k, generator), stay)
            level = torch.logsumexp(log_weights, 1) - math.log(k)
            log_evidence = log_evidence + torch.where(again, level, 0.0)
            log_weights = torch.where(again[:, None], 0.0, log_weights)
            log_twist = log_twist.gather(1, chosen)
            flat = (chosen + k * torch.arange(problems, device=x.device)[:, None]).flatten()
            x, x0_hat, shift = x[flat], x0_hat[flat], shift[flat]
        z = standard_normal_like(x, generator).to(x)
        # p / q for x_s = mean_p + model shift + noise z: mean_q is mean_p + model shift.
        offset = (row.model / row.noise) * shift
        ratio = -0.5 * ((z + offset).square() - z.square()).double().flatten(1).sum(1)
        log_weights = log_weights + ratio.reshape(problems, k)
        x = row.x * x + row.model * (x0_hat + shift) + row.noise * z
        previous = log_twist
    total = torch.logsumexp(log_weights, 1)
    log_weights = log_weights - total[:, None]
    effective = torch.minimum(effective, 1.0 / log_weights.exp().square().sum(1))
    log_evidence = log_evidence + total - math.log(k)
    return Particles(x.reshape(problems, k, *operator.data_shape), log_weights, log_evidence, effective)


def _systematic(log_weights: Tensor, n: int, generator: Generators) -> Tensor:
    """Draw n indices by each row's weights from one uniform number (systematic resampling), int64 (B, n)."""
    u = [
        torch.rand(1, generator=g, dtype=torch.float64, device="cpu" if g is None else g.device)
        for g in (generator if isinstance(generator, Sequence) else [generator] * len(log_weights))
    ]
    points = (torch.cat(u).to(log_weights.device)[:, None] + torch.arange(n, device=log_weights.device)) / n
    edges = torch.softmax(log_weights.double(), 1).cumsum(1)
    return torch.searchsorted(edges / edges[:, -1:], points).clamp(max=log_weights.shape[1] - 1)


def _path(sde: SDE, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Time, alpha and sigma, broadcastable against x; sigma/alpha is limited to ``LARGEST_RATIO``."""
    t = as_time(t)
    lowest = -2.0 * math.log(LARGEST_RATIO)
    # This runs at every call, so the cheap condition comes first: does alpha vanish at t_max?
    if float(sde.log_snr(sde.t_max)) < -60.0 and bool((sde.log_snr(t) < lowest).any()):
        t = torch.minimum(t, sde.time_of(torch.tensor(lowest, dtype=torch.float64)).to(t))
    alpha, sigma = (expand_like(v, x).to(x) for v in (sde.alpha(t), sde.sigma(t)))
    return t, alpha, sigma


def _isotropic_variance(alpha: Tensor, sigma: Tensor, data_std: float) -> Tensor:
    """Variance of x_0 given x_t for isotropic Gaussian data."""
    return sigma**2 * data_std**2 / (sigma**2 + alpha**2 * data_std**2)


def check_interval(interval: tuple[float, float] | None) -> None:
    """Raise a ValueError unless this is an interval of noise-to-signal ratios, or None."""
    if interval is not None:
        check_pair("guidance_interval (sigma/alpha)", interval, at_least=0.0)


def check_scale(name: str, value: float, positive: bool = False) -> float:
    """Check a factor on a guiding term, which may be 0, or with ``positive`` a scale of the data, which may not.

    Raises:
        ValueError: It is negative, not finite, or so large that float32 would overflow.
    """
    return check_number(name, value, 0.0 if positive else None, None if positive else 0.0, at_most=LARGEST_SCALE)


def check_chunk_size(chunk_size: int | None) -> int | None:
    """Samples per backward pass, or None for all; a ValueError for anything else."""
    return None if chunk_size is None else check_integer("chunk_size", chunk_size, at_least=1)
