"""Distances between sets of feature vectors.

What torchmetrics has is torchmetrics'; it is given the features themselves. Nothing here touches torch's
global random state, or other processes: whoever calls has gathered the vectors (``sync_on_compute=False``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

NEIGHBOURS = 3  # of precision and recall, as in the paper
CHUNK = 1024  # rows of a table of distances


@contextmanager
def _torchmetrics(seed: int = 0) -> Iterator[None]:
    """Random subsets the same every time, and no advice about memory."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", message=".*will save all extracted features", category=UserWarning)
        yield


class _AsTheyAre(nn.Identity):
    """torchmetrics' feature extractor for features that are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Squared Frechet distance of the Gaussians with the moments of two sets (Heusel et al. 2017, arXiv:1706.08500).

    |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)). With Inception features it is the FID.

    Args:
        features: Shape (N, D), N >= 2.
        reference: Shape (M, D), M >= 2.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    with _torchmetrics():
        metric = FrechetInceptionDistance(_AsTheyAre(features.shape[1]), sync_on_compute=False).set_dtype(torch.float64)
        metric.update(reference.double(), real=True)
        metric.update(features.double(), real=False)
        return float(metric.compute())


def kernel_distance(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """Kernel distance (KID, Binkowski et al. 2018, arXiv:1801.01401): unbiased squared MMD, kernel (x.y/D + 1)^3.

    Args:
        features: Shape (N, D).
        reference: Shape (M, D).

    Returns:
        Mean and standard deviation over 100 pairs of random subsets of min(1000, N, M) vectors.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    with _torchmetrics():
        size = min(1000, len(features), len(reference))
        metric = KernelInceptionDistance(
            _AsTheyAre(features.shape[1]), subset_size=size, sync_on_compute=False
        ).set_dtype(torch.float64)
        metric.update(reference.double(), real=True)
        metric.update(features.double(), real=False)
        mean, deviation = metric.compute()
        return float(mean), float(deviation)


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Inception score, exp E KL(p(y|x) || p(y)) (Salimans et al. 2016, arXiv:1606.03498), of any classifier.

    Args:
        logits: Shape (N, classes).

    Returns:
        Mean and standard deviation over ten parts.
    """
    from torchmetrics.image.inception import InceptionScore

    with _torchmetrics():
        metric = InceptionScore(_AsTheyAre(logits.shape[1]), splits=min(10, len(logits)), sync_on_compute=False)
        metric.update(logits)
        mean, deviation = metric.compute()
        return float(mean), float(deviation)


def precision_recall(features: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991).

    Precision is the fraction of ``features`` within the balls around the reference vectors that reach to their k-th
    neighbour in the reference; recall the same with the two sets exchanged. Take sets of equal size.

    Args:
        features: Shape (N, D), N > neighbours.
        reference: Shape (M, D), M > neighbours.
        neighbours: k.

    Raises:
        ValueError: A set that is too small.
    """
    if min(len(features), len(reference)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} images of each kind.")
    a, b = features.double(), reference.double()
    return _share_inside(a, b, _radii(b, neighbours)), _share_inside(b, a, _radii(a, neighbours))


def _radii(x: Tensor, k: int) -> Tensor:
    # A vector is its own nearest neighbour, so that k + 1 are counted.
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(CHUNK)])


def _share_inside(x: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in x.split(CHUNK)]
    return float(torch.cat(inside).double().mean())


def nearest_neighbours(images: Tensor, reference: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """The nearest reference images by pixels.

    Args:
        images: Bytes, shape (N, C, H, W).
        reference: Bytes, shape (M, C, H, W), M >= count.
        count: How many neighbours.

    Returns:
        Root mean square differences of pixels in [0, 1], nearest first, and indices; both of shape (N, count).
    """
    x, y = images.flatten(1).float() / 255.0, reference.flatten(1).float() / 255.0
    indices = torch.cat([torch.cdist(part, y).topk(count, largest=False).indices for part in x.split(CHUNK)])
    # cdist rounds small distances, and those of copies are what matters here.
    distances = torch.stack([(x - y[column]).square().mean(1).sqrt() for column in indices.T], 1)
    order = distances.argsort(dim=1, stable=True)
    return distances.gather(1, order), indices.gather(1, order)
