"""A few vectors that lie near all of many. Knows no tiles and no detector."""

import numpy as np
from jaxtyping import Float32, Int64
from sklearn.random_projection import GaussianRandomProjection

PROJECTED = 128
"""Distances are measured in so many dimensions: nearly the same (Johnson and Lindenstrauss), in less time."""


def coreset(vectors: Float32[np.ndarray, "row d"], most: int, *, seed: int) -> Int64[np.ndarray, " _"]:
    """Positions of at most `most` vectors, ascending, such that every other one has one of them nearby.

    Begins anywhere and takes the vector farthest from all those taken, again and again: the greedy choice of Roth et
    al., "Towards Total Recall in Industrial Anomaly Detection" (CVPR 2022), algorithm 1. Rare kinds get their place, so
    what is left tells where normal tissue lies, and no longer how dense it is there. All of them where there is room.
    Time grows with `most` times the number of vectors: 2,000 of 10,000 take a fifth of a second.
    """
    if len(vectors) <= most:
        return np.arange(len(vectors))
    points = _projected(vectors, seed)
    squares = np.einsum("ij,ij->i", points, points)
    far = np.full(len(points), np.inf, np.float32)
    chosen = np.empty(most, np.int64)
    latest = int(np.random.default_rng(seed).integers(len(points)))
    for i in range(most):
        chosen[i] = latest
        np.minimum(far, squares + squares[latest] - 2 * (points @ points[latest]), out=far)
        far[latest] = -np.inf  # never again, even where all others are equal to it
        latest = int(far.argmax())
    return np.sort(chosen)


def _projected(vectors: Float32[np.ndarray, "row d"], seed: int) -> Float32[np.ndarray, "row _"]:
    if vectors.shape[1] <= PROJECTED:
        return vectors
    projected = GaussianRandomProjection(PROJECTED, random_state=seed).fit_transform(vectors)
    return np.asarray(projected, np.float32)
