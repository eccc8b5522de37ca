"""Linear measurements of Gaussian mixtures: the true posterior, and how far a sample is from it."""

from __future__ import annotations

import torch
from analytic import GaussianMixture

from diffusers_sde import make_plan
from diffusers_sde.guidance.operators import LinearMap
from diffusers_sde.sampling.time_grids import get_time_grid
from diffusers_sde.sdes import VESDE


def posterior(data: GaussianMixture, a, y, noise_std) -> tuple[GaussianMixture, float]:
    """Law of x_0 given y = a x_0 + noise_std z, again a mixture, and the evidence log p(y); y of shape (m,)."""
    means, covariances, logits = [], [], []
    for weight, mean, covariance in zip(data.weights, data.means, data.covariances, strict=True):
        gram = a @ covariance @ a.T + noise_std**2 * torch.eye(len(a), dtype=torch.float64)
        gain = covariance @ a.T @ torch.linalg.inv(gram)
        means.append(mean + gain @ (y - a @ mean))
        covariances.append(covariance - gain @ a @ covariance)
        law = torch.distributions.MultivariateNormal(a @ mean, gram)
        logits.append(weight.log() + law.log_prob(y))
    logits = torch.stack(logits)
    return GaussianMixture(torch.softmax(logits, 0), torch.stack(means), torch.stack(covariances)), float(
        torch.logsumexp(logits, 0)
    )


def moments(mixture: GaussianMixture):
    """Mean (d,) and covariance (d, d) of a mixture."""
    mean = mixture.weights @ mixture.means
    offset = mixture.means - mean
    spread = mixture.covariances + offset[:, :, None] * offset[:, None, :]
    return mean, torch.einsum("k,kde->de", mixture.weights, spread)


def errors(samples, truth: GaussianMixture, weights=None):
    """Errors of mean and covariance in units of the true standard deviation, and of the weights of the components."""
    mean, covariance = moments(truth)
    weights = torch.full((len(samples),), 1.0 / len(samples), dtype=torch.float64) if weights is None else weights
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance))
    z = (samples.double() - mean) @ whiten.T
    of_mean = weights @ z
    of_covariance = torch.einsum("n,nd,ne->de", weights, z - of_mean, z - of_mean)
    shares = weights @ truth.responsibilities(samples)
    return {
        "mean": float(of_mean.norm()),
        "covariance": float(torch.linalg.matrix_norm(of_covariance - torch.eye(len(mean)), 2)),
        "weights": float((shares - truth.weights).abs().max()),
    }


def log_snr_plan(sde, n, stochasticity=1.0, predictor="exponential", **corrector):
    """A plan on a grid uniform in log-SNR; by default of first order and without memory."""
    end = 1e-5 if isinstance(sde, VESDE) else 1e-3
    times = get_time_grid("log_snr", sde, n, sde.t_max, end)
    return make_plan(sde, times, predictor, stochasticity=stochasticity, **corrector)


def _float64(value):
    return torch.tensor(value, dtype=torch.float64)


# Four correlated dimensions, two measurements. The mixture's components are told apart by the measurement only in part.
A = _float64([[1.0, 0.5, -0.3, 0.2], [0.0, 0.8, 0.6, -0.4]])
OPERATOR = LinearMap(lambda x: x @ A.T.to(x), (4,))
Y, NOISE_STD = _float64([0.4, -0.2]), 0.2
COVARIANCE = _float64([[0.35, 0.2, 0.05, 0], [0.2, 0.3, 0.1, 0.05], [0.05, 0.1, 0.2, -0.1], [0, 0.05, -0.1, 0.25]])
GAUSSIAN = GaussianMixture.gaussian([0.3, -0.2, 0.5, 0.1], COVARIANCE)
MIXTURE = GaussianMixture(
    [0.5, 0.3, 0.2],
    [[0.8, 0.0, -0.5, 0.6], [-0.6, 0.9, 0.2, -0.7], [0.2, -0.8, 0.9, 0.0]],
    torch.stack([0.3 * COVARIANCE, 0.15 * COVARIANCE.flip(0, 1), torch.diag(_float64([0.1, 0.05, 0.08, 0.12]))]),
)
