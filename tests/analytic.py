"""Exact models: Gaussian and Gaussian-mixture data, for which p_t, its score and its denoiser are known in closed form.

With x_t = alpha x_0 + sigma eps a component N(m, C) of the data becomes N(alpha m, alpha^2 C + sigma^2 I) and
E[x_0 | x_t] = m + alpha C (alpha^2 C + sigma^2 I)^-1 (x_t - alpha m). Nothing here uses a sampler, a parametrisation or
anything else of the package but alpha(t) and sigma(t). All in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from diffusers_sde.sampling.rows import Plan
from diffusers_sde.sdes import SDE


def _float64(value):
    return torch.as_tensor(value, dtype=torch.float64)


class GaussianMixture:
    """A mixture with full covariances; one component is a Gaussian.

    Args:
        weights: Shape (K,), they are normalised.
        means: Shape (K, d).
        covariances: Shape (K, d, d), or (K, d) for diagonal ones.
    """

    def __init__(self, weights, means, covariances):
        weights, self.means, covariances = _float64(weights), _float64(means), _float64(covariances)
        self.weights = weights / weights.sum()
        self.covariances = torch.diag_embed(covariances) if covariances.ndim == 2 else covariances
        self.eigenvalues, self.axes = torch.linalg.eigh(self.covariances)

    @classmethod
    def gaussian(cls, mean, covariance):
        """One component: mean (d,), covariance (d, d) or (d,)."""
        return cls([1.0], _float64(mean)[None], _float64(covariance)[None])

    def _components(self, x, alpha, sigma):
        """Along the axes of each component: coordinates and variances of x_t, and log w_k + log N_k(x_t), shape (B,
        K)."""
        alpha, sigma = (_float64(v).reshape(-1, 1) for v in (alpha, sigma))
        x = x.to(torch.float64).flatten(1)
        along, variance, logits = [], [], []
        for weight, mean, axes, eigenvalues in zip(self.weights, self.means, self.axes, self.eigenvalues, strict=True):
            along.append((x - alpha * mean) @ axes)
            variance.append(alpha**2 * eigenvalues + sigma**2)
            exponent = (along[-1].square() / variance[-1]).sum(1)
            logits.append(torch.log(weight) - 0.5 * (exponent + torch.log(2 * math.pi * variance[-1]).sum(1)))
        return alpha, along, variance, torch.stack(logits, 1)

    def denoise(self, x, alpha, sigma):
        """E[x_0 | x_t], shape of x (B, ...); alpha and sigma of shape () or (B,)."""
        alpha, along, variance, logits = self._components(x, alpha, sigma)
        posterior = torch.softmax(logits, 1)
        estimate = posterior @ self.means
        for k, (axes, eigenvalues) in enumerate(zip(self.axes, self.eigenvalues, strict=True)):
            gain = alpha * eigenvalues / variance[k]
            estimate = estimate + posterior[:, k, None] * ((along[k] * gain) @ axes.T)
        return estimate.reshape(x.shape).to(x.dtype)

    def denoiser(self, sde: SDE):
        """(x_t, SDE time) -> E[x_0 | x_t]."""
        return lambda x, t: self.denoise(x, sde.alpha(_float64(t)), sde.sigma(_float64(t)))

    def log_prob(self, sde: SDE, x, t):
        """Exact log p_t(x), nats, shape (B,)."""
        t = _float64(t)
        return torch.logsumexp(self._components(x, sde.alpha(t), sde.sigma(t))[-1], 1)

    def responsibilities(self, x):
        """Posterior probability of each component for data x, shape (B, K)."""
        return torch.softmax(self._components(x, 1.0, 0.0)[-1], 1)

    def sample(self, n, generator):
        """n exact samples of the data, shape (n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[k] + torch.einsum("nde,ne->nd", self.axes[k], self.eigenvalues[k].sqrt() * z)

    def sample_marginal(self, sde: SDE, t, n, generator):
        """n exact samples of p_t, shape (n, d)."""
        x0 = self.sample(n, generator)
        return sde.alpha(t) * x0 + sde.sigma(t) * torch.randn(x0.shape, dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class PointwiseGaussian:
    """Independent Gaussian pixels N(mean, std^2); every operation is elementwise, so a sample cannot see its mates.

    Attributes:
        mean: A number, or a tensor that broadcasts against the samples.
        std: Likewise.
    """

    mean: float | torch.Tensor = 0.3
    std: float | torch.Tensor = 0.6

    def denoise(self, x, alpha, sigma):
        """E[x_0 | x_t]; alpha and sigma of shape () or (B,)."""
        alpha, sigma = (v.reshape(v.shape + (1,) * (x.ndim - v.ndim)) for v in (_float64(alpha), _float64(sigma)))
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return (self.mean + gain * (x.to(torch.float64) - alpha * self.mean)).to(x.dtype)

    def denoiser(self, sde: SDE):
        """(x_t, SDE time) -> E[x_0 | x_t]."""
        return lambda x, t: self.denoise(x, sde.alpha(_float64(t)), sde.sigma(_float64(t)))


# ---------------------------------------------------------------------- the law of a sampler, without Monte Carlo


def marginal_moments(sde: SDE, t, mean0, std0):
    """Mean and variance of p_t for one-dimensional data N(mean0, std0^2)."""
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    return alpha * mean0, alpha**2 * std0**2 + sigma**2


def exact_reverse_gain(sde: SDE, t, s, std0, stochasticity):
    """d E[x_s | x_t] / d x_t under the exact reverse SDE dx = [f x - (1+eta^2)/2 g^2 score] dt + eta g dw.

    The drift is (1 - eta^2) times the probability flow's plus eta^2 times Anderson's. The flow maps x_t to x_s by the
    ratio S_s / S_t of standard deviations; Anderson's is the time reversal of the forward process, for which
    E[x_s | x_t] has slope Cov(x_s, x_t) / S_t^2 = (alpha_t / alpha_s) S_s^2 / S_t^2.
    """
    var_t, var_s = marginal_moments(sde, t, 0.0, std0)[1], marginal_moments(sde, s, 0.0, std0)[1]
    flow = math.sqrt(var_s / var_t)
    anderson = float(sde.alpha(t) / sde.alpha(s)) * var_s / var_t
    return flow ** (1 - stochasticity**2) * anderson ** (stochasticity**2)


def push_gaussian(plan: Plan, sde: SDE, mean0, std0, mean, variance, memory_gains=()):
    """Mean and variance after a plan, exactly, for one-dimensional data N(mean0, std0^2).

    The denoiser is affine, D = mean0 + k (x - alpha mean0), so each row is an affine map of the state (x, what is
    stored) plus noise, and a Gaussian stays one. A plan treats the dimensions of a Gaussian with any covariance
    independently along its principal axes, so the scalar case is the general one.

    Args:
        plan: A plan on x0_hat (not folded), without Langevin rows.
        sde: Its SDE.
        mean0: Mean of the data.
        std0: Standard deviation of the data.
        mean: Of the starting state.
        variance: Of the starting state.
        memory_gains: For a start with a history: the k-th last remembered D is mean0 + memory_gains[k] (x - alpha
            mean0)
            with x the starting state and alpha at its time.

    Returns:
        Mean and variance of the result.
    """
    times = torch.tensor([row.t for row in plan.rows], dtype=torch.float64)
    alphas, sigmas = sde.alpha(times).numpy(), sde.sigma(times).numpy()
    size = 1 + max(plan.memory, len(memory_gains))
    mu, loading = np.zeros(size), np.zeros(size)
    mu[0], loading[0] = mean, 1.0
    for k, gain in enumerate(memory_gains):
        mu[1 + k], loading[1 + k] = mean0 + gain * (mean - alphas[0] * mean0), gain
    covariance = variance * np.outer(loading, loading)
    for row, alpha, sigma in zip(plan.rows, alphas, sigmas, strict=True):
        assert row.langevin is None, "a Langevin row is not affine"
        gain = alpha * std0**2 / (alpha**2 * std0**2 + sigma**2)
        offset = mean0 * (1.0 - gain * alpha)
        step, shift = np.eye(size), np.zeros(size)
        step[0, 0], shift[0] = row.x + row.model * gain, row.model * offset
        for k, weight in enumerate(row.history):
            step[0, 1 + k] = weight
        noise = np.zeros(size)
        noise[0] = row.noise
        if row.keep is not None and size > 1:
            step[1:] = np.eye(size)[np.arange(size - 1)]
            step[1] = 0.0
            step[1, 0], shift[1] = row.keep.x + row.keep.model * gain, row.keep.model * offset
            for k, weight in enumerate(row.keep.history):
                step[1, 1 + k] = weight
            noise[1] = row.keep.noise
        mu, covariance = step @ mu + shift, step @ covariance @ step.T + np.outer(noise, noise)
    return mu[0], covariance[0, 0]


def convergence_order(errors, ns):
    """Slope of -log error against log n, from the two finest grids, with the leading correction removed if there are
    three.

    With error(n) = c n^-p (1 + b/n) the slopes between successive doublings are p + O(1/n): one Richardson step.
    """
    slopes = [
        -math.log(abs(e2) / abs(e1)) / math.log(n2 / n1)
        for e1, e2, n1, n2 in zip(errors, errors[1:], ns, ns[1:], strict=False)
    ]
    return slopes[-1] if len(slopes) == 1 else 2 * slopes[-1] - slopes[-2]


def z_threshold(false_alarm, comparisons=1):
    """Two-sided standard-normal threshold: some of ``comparisons`` true hypotheses exceeds it with this probability."""
    return NormalDist().inv_cdf(1.0 - 0.5 * false_alarm / comparisons)
