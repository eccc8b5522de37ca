"""Data whose score is known in closed form, and what samples of it are judged by.

Gaussian mixtures with full covariances, fitted to the 8x8 digits or to 6x6 colour patches of photographs; both ship
with scikit-learn. The network of every sampler is exact, so that only the sampler can be wrong.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

ROWS = 512  # of a batch evaluated at a time: the intermediate values stay in the processor's cache


class Mixture:
    """A Gaussian mixture with full covariances and its exact denoiser, float32 in and out."""

    def __init__(self, weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> None:
        self.weights, self.means, covariance = (
            torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, covariances)
        )
        self.variances, self.axes = torch.linalg.eigh(covariance)
        self.variances.clamp_(min=1e-6)
        self.components, self.dim = self.means.shape
        self.mean = self.weights @ self.means
        centred = self.means - self.mean
        outer = covariance + centred[:, :, None] * centred[:, None, :]
        self.covariance = (self.weights[:, None, None] * outer).sum(0)
        self._into = self.axes.permute(1, 0, 2).reshape(self.dim, -1)
        self._out = self.axes.transpose(1, 2).reshape(-1, self.dim)
        self._centre = torch.einsum("kd,kde->ke", self.means, self.axes)

    @property
    def spread(self) -> float:
        """Standard deviation of the data about their mean, over all dimensions."""
        return float((torch.trace(self.covariance) / self.dim).sqrt())

    def _standardise(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        """x_t in the axes of each component in units of its standard deviations, those, and log p_t per component."""
        std = torch.sqrt(alpha**2 * self.variances + sigma**2)
        into = (self._into / std.reshape(-1)).to(x)
        u = torch.addmm((-alpha * self._centre / std).reshape(-1).to(x), x, into)
        u = u.view(-1, self.components, self.dim)
        constant = torch.log(self.weights) - torch.log(std).sum(1) - 0.5 * self.dim * math.log(2 * math.pi)
        return u, std, constant.to(x) - 0.5 * u.square().sum(2)

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x_0 | x_t], shape (B, d)."""
        parts = []
        for rows in x.split(ROWS):
            u, std, logits = self._standardise(rows, alpha, sigma)
            posterior = torch.softmax(logits, 1)
            out = self._out * (alpha * self.variances / std).reshape(-1, 1)
            parts.append(torch.addmm(posterior @ self.means.to(x), (posterior[:, :, None] * u).flatten(1), out.to(x)))
        return torch.cat(parts)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of data, nats, shape (B,)."""
        return torch.cat([torch.logsumexp(self._standardise(rows.double(), 1.0, 0.0)[2], 1) for rows in x.split(ROWS)])

    def sample(self, n: int, seed: int) -> Tensor:
        """Exact samples, shape (n, d), float64."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.dim, dtype=torch.float64, generator=generator)
        z = self.variances[k].sqrt() * z
        return self.means[k] + torch.cat(
            [torch.einsum("nde,ne->nd", self.axes[a], b) for a, b in zip(k.split(ROWS), z.split(ROWS), strict=True)]
        )


class Scaled:
    """The data of a mixture times a number, and their exact denoiser."""

    def __init__(self, data: Mixture, scale: float) -> None:
        self.data, self.scale = data, scale

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[scale x_0 | x_t] at x_t = alpha scale x_0 + sigma noise, shape (B, d)."""
        return self.scale * self.data.denoise(x, self.scale * alpha, sigma)


def fitted(data: str) -> Mixture:
    """A mixture of 20 components fitted to ``digits`` (64 dimensions) or colour ``patches`` (108)."""
    from sklearn import datasets
    from sklearn.mixture import GaussianMixture

    if data == "digits":
        x = datasets.load_digits().data / 8.0 - 1.0
    else:
        rng, patches = np.random.default_rng(0), []
        for image in datasets.load_sample_images().images:
            for _ in range(6000):
                i, j = (int(rng.integers(0, size - 12)) for size in image.shape[:2])
                # Every second pixel, which is smoother than white noise and rougher than a gradient.
                patches.append(image[i : i + 12 : 2, j : j + 12 : 2].reshape(-1) / 127.5 - 1.0)
        x = np.stack(patches)
    fit = GaussianMixture(20, covariance_type="full", random_state=0, reg_covar=1e-3, max_iter=60).fit(x)
    return Mixture(fit.weights_, fit.means_, fit.covariances_)


def frechet(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Squared Frechet distance of two Gaussians, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64."""
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    distance = (mean - other_mean).square().sum() + torch.trace(covariance) + torch.trace(other_covariance)
    return float(distance - 2 * cross)


class MixtureJudge:
    """The distances of a sample set to the truth, and what exact samples score."""

    def __init__(self, data: Mixture, n: int, end_ratio: float = 0.01) -> None:
        self.data = data
        self.about = f"Mixture of {data.components} Gaussians in {data.dim} dimensions, exact score, {n} samples."
        reference = data.sample(100_000, seed=99)
        self.log_prob = float(data.log_prob(reference[:20_000]).mean())
        directions = torch.randn(data.dim, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        self.directions = directions / directions.norm(dim=0)
        quantiles = (reference @ self.directions).sort(0).values
        centre = ((torch.arange(n, dtype=torch.float64) + 0.5) / n * len(quantiles)).long()
        self.quantiles = quantiles[centre]
        floors = [self(data.sample(n, seed=100 + i)) for i in range(40)]
        self.floor = {key: float(np.mean([f[key] for f in floors])) for key in floors[0]}
        self.noise = {key: float(np.std([f[key] for f in floors], ddof=1)) for key in floors[0]}
        # Every sampler here ends with x0_hat at this sigma/alpha: what exact samples of that level score then.
        x = data.sample(n, seed=200)
        x = x + end_ratio * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(201))
        self.floor["nats_at_end"] = self(data.denoise(x, 1.0, end_ratio))["nats"]

    def __call__(self, x: Tensor) -> dict[str, float]:
        x = x.double()
        if not bool(torch.isfinite(x).all()):
            return {"fd": math.inf, "sw": math.inf, "nats": -math.inf}
        data, fd = self.data, self.fd(x)
        sw = ((x @ self.directions).sort(0).values - self.quantiles).square().mean().sqrt()
        nats = (data.log_prob(x).mean() - self.log_prob) / data.dim
        return {"fd": fd, "sw": float(sw), "nats": float(nats)}

    def fd(self, x: Tensor) -> float:
        """The Frechet distance alone."""
        x = x.double()
        return frechet(self.data.mean, self.data.covariance, x.mean(0), torch.cov(x.T))
