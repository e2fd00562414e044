"""How votes and inliers become one order of the candidates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from delf_milvus.features import Features

Floats = npt.NDArray[np.float64]


def combined_scores(votes: npt.ArrayLike, inliers: npt.ArrayLike, inlier_weight: float, best: int = 5) -> Floats:
    """Votes plus weighted inliers, (N,), each divided by its mean over its own `best` largest values.

    Either term alone ranks worse than their sum: votes see what geometry cannot model, inliers see what chance
    cannot arrange. Dividing makes the weight mean the same for photos with few and with many features.
    """
    return relative(votes, best) + inlier_weight * relative(inliers, best)


def relative(values: npt.ArrayLike, best: int = 5) -> Floats:
    """The values, (N,), divided by the mean of the `best` largest of them; zeros if that is not positive."""
    array = np.asarray(values, np.float64)
    if not len(array):
        return array
    level = np.sort(array)[-best:].mean()
    return array / level if level > 0 else np.zeros_like(array)


def global_similarities(query: Features, images: Sequence[Features]) -> Floats:
    """Cosine similarity, (N,) and at least 0, of the query's global vector to that of each image.

    The vector is the mean of the local descriptors weighted by their attention, which is what the attention was trained
    to pool; what the images have in common is subtracted from all, for it tells none of them from another.
    """
    if not images:
        return np.empty(0)
    vectors = np.array([_pooled(one) for one in [query, *images]])
    vectors -= vectors[1:].mean(axis=0)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.asarray(np.maximum(vectors[1:] @ vectors[0], 0))


def _pooled(features: Features) -> Floats:
    total = features.attention.astype(np.float64) @ features.descriptors
    return np.asarray(total / max(float(np.linalg.norm(total)), 1e-12))
