"""How votes and inliers become one order of the candidates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

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
