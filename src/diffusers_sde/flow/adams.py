"""Weights of the Adams methods on nodes of any spacing."""

from __future__ import annotations

import numpy as np

HIGHEST_ORDER = 5  # most earlier points that a predictor uses; 4 and 6 need no fewer calls for the same error


def adams_weights(nodes: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Weights w with sum_j w_j p(nodes_j) = int_0^1 p for polynomials p through the first ``count`` nodes.

    Args:
        nodes: Distinct nodes, shape (B, P).
        count: How many of the nodes each row uses, shape (B,); the weights of the others are 0.

    Returns:
        Weights, shape (B, P).
    """
    rows, points = nodes.shape
    power = np.arange(points)
    used = power[None, :] < count[:, None]
    # The nodes are scaled by the farthest one, so that their powers stay of the order of one for the shortest steps
    # too.
    scale = np.where(used, np.abs(nodes), 0.0).max(1, initial=1.0)[:, None]
    table = np.where(used, nodes / scale, 0.0)[:, None, :] ** power[None, :, None]
    table = np.where(used[:, :, None], table * used[:, None, :], np.eye(points)[None])
    moments = np.where(used, scale ** -power[None, :] / (power[None, :] + 1.0), 0.0)
    return np.linalg.solve(table, moments[:, :, None])[:, :, 0]
