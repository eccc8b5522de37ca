"""Sequential Monte Carlo: posterior samples that are right in the limit of many particles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..basics.checks import check_integer, check_number
from ..basics.noise import Generators, standard_normal_like
from ..basics.precision import finest, finest_dtype, on_device, uniform_numbers
from ..networks.denoisers import Denoiser
from ..sampling.rows import Plan, mean
from ..sdes import SDE, expand_like
from .common import bounded_path, check_chunk_size, check_scale, isotropic_variance
from .gradients import denoise_with_vjp
from .methods import PosteriorMethod, PosteriorProblem, PosteriorRun
from .operators import LinearOperator, check_noise_std


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
        """Draw one particle of each problem by weight, shape (B, ...)."""
        chosen = _systematic(self.log_weights, 1, generator)[:, 0]
        return self.samples[torch.arange(len(chosen), device=chosen.device), chosen]

    def mean(self) -> Tensor:
        """Estimate E[x_0 | y], shape (B, ...)."""
        weights = expand_like(self.log_weights.exp(), self.samples).to(self.samples)
        return (weights * self.samples).sum(1)


@dataclass(frozen=True)
class SMC(PosteriorMethod):
    r"""Sequential Monte Carlo is exact as the number of particles grows, where the other methods approximate.

    Particles move by the rows of a plan with the denoiser of ``PiGDM``, and their weights correct its error. With the
    twisting functions psi_t(x) = N(y; A x0_hat, noise_std^2 I + v A A^T) the weights are

        w_s = w_t  p(x_s | x_t) psi_s(x_s) / (q(x_s | x_t) psi_t(x_t)),

    where p is the unguided row and q the guided one. The last psi is the likelihood itself. The particles converge to
    the law of the *plan* given y, and what separates this from the law of the SDE vanishes as the plan gets finer.

    Args:
        particles: K, the number of particles per problem.
        data_std: See ``PiGDM``. It changes the efficiency, not the law that is sampled.
        resample_below: Particles are resampled where their effective number is below this fraction of K.
        chunk_size: Samples per backward pass; None for all.

    Raises:
        ValueError: An option is out of range.

    Reference:
        Wu et al. 2023, arXiv:2306.17775, algorithm 1.
    """

    particles: int = 16
    data_std: float = 1.0
    resample_below: float = 0.5
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "particles", check_integer("particles", self.particles, at_least=1))
        check_scale("data_std", self.data_std, positive=True)
        check_number("resample_below", self.resample_below, at_least=0.0, at_most=1.0)
        check_chunk_size(self.chunk_size)

    @classmethod
    def for_data(cls, std: float) -> SMC:
        """Return the method for data of the standard deviation ``std``."""
        return cls(data_std=std)

    def draw(self, problem: PosteriorProblem, run: PosteriorRun) -> Tensor:
        """Draw one particle for each measurement, by weight from K of its own, shape (B, *data_shape)."""
        p, generator = problem, run.generator
        particles = self.sample(run.own_plan(), p.denoiser, p.sde, p.operator, p.y, p.noise_std, generator)
        return particles.draw(generator)

    @torch.no_grad()
    def sample(
        self,
        plan: Plan,
        denoiser: Denoiser,
        sde: SDE,
        operator: LinearOperator,
        y: Tensor,
        noise_std: float,
        generator: Generators = None,
    ) -> Particles:
        """Draw weighted particles of the posterior.

        Args:
            plan: Rows with noise and without memory, ending with the data: the reverse SDE by ``ancestral``,
                ``reverse_diffusion``, ``euler_maruyama`` or first-order ``exponential``.
            denoiser: The unconditional one; called with up to B K samples and t of shape ().
            sde: Its SDE.
            operator: A.
            y: Measurements of B problems, shape (B, ...).
            noise_std: Standard deviation of the measurement noise. It must be positive, because without noise no
                particle has any weight.
            generator: One generator, the source of all noise.

        Returns:
            Weighted particles and the evidence.

        Raises:
            ValueError: A plan that does not fit, or values out of range.
        """
        check_noise_std(noise_std)
        if noise_std == 0.0:
            raise ValueError("noise_std must be positive for SMC, got 0: without noise no particle has any weight.")
        *moves, last = plan.rows
        if last.s is not None or last.x != 0.0 or any(r.noise == 0.0 or r.history or r.langevin for r in moves):
            raise ValueError(
                "plan must be one that ends with the data and whose other rows have noise and no memory or "
                "corrector: stochasticity 1, solver_order 1, no solver_correction."
            )
        problems, k = len(y), self.particles
        index = torch.arange(problems, device=y.device).repeat_interleave(k)
        each, targets = operator.select(index), y[index]
        x = standard_normal_like(targets.new_zeros(problems * k, *operator.data_shape), generator).to(y) * sde.prior_std
        log_weights = torch.zeros(problems, k, dtype=finest_dtype(y.device), device=y.device)
        log_evidence = torch.zeros(problems, dtype=finest_dtype(y.device), device=y.device)
        effective = torch.full_like(log_evidence, float(k))
        previous = torch.zeros_like(log_weights)
        for row in plan.rows:
            t, alpha, sigma = bounded_path(sde, on_device(row.t, x.device), x)
            x0_hat, vjp = denoise_with_vjp(denoiser, x, t, self.chunk_size)
            v = isotropic_variance(alpha, sigma, self.data_std)
            around = each.at(x0_hat)
            r = around.residual(targets, x0_hat)
            u = around.solve_gram(r, noise_std**2 / v) / v
            log_twist = (-0.5 * finest((r * u).flatten(1).sum(1))).reshape(problems, k)
            log_weights = log_weights + log_twist - previous
            if row is last:
                m = finest(each.measurements(targets))
                square = finest(r).flatten(1).square().sum(1)
                likelihood = -0.5 * square / noise_std**2 - 0.5 * m * math.log(2.0 * math.pi * noise_std**2)
                log_weights = log_weights + likelihood.reshape(problems, k) - log_twist
                x = x0_hat * last.model
                break
            size = 1.0 / torch.softmax(log_weights, 1).square().sum(1)
            effective = torch.minimum(effective, size)
            shift = sigma**2 / alpha * vjp(around.adjoint(u))
            again = size < self.resample_below * k
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
            ratio = -0.5 * finest((z + offset).square() - z.square()).flatten(1).sum(1)
            log_weights = log_weights + ratio.reshape(problems, k)
            x = mean(row, x, x0_hat + shift, ()) + row.noise * z
            previous = log_twist
        total = torch.logsumexp(log_weights, 1)
        log_weights = log_weights - total[:, None]
        effective = torch.minimum(effective, 1.0 / log_weights.exp().square().sum(1))
        log_evidence = log_evidence + total - math.log(k)
        return Particles(x.reshape(problems, k, *operator.data_shape), log_weights, log_evidence, effective)


def _systematic(log_weights: Tensor, n: int, generator: Generators) -> Tensor:
    """Draw n indices by each row's weights from one uniform number (systematic resampling), int64 (B, n)."""
    u = [
        uniform_numbers(1, g)
        for g in (generator if isinstance(generator, Sequence) else [generator] * len(log_weights))
    ]
    points = (torch.cat(u).to(log_weights)[:, None] + torch.arange(n, device=log_weights.device)) / n
    edges = torch.softmax(finest(log_weights), 1).cumsum(1)
    return torch.searchsorted(edges / edges[:, -1:], points).clamp(max=log_weights.shape[1] - 1)
