"""How the shortlist's scores and inliers become one order of the candidates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


INLIER_LEVEL = 40.0
"""Least level that inliers are divided by: where nothing matches, those of chance would count as much as a proof."""


def combined_scores(
    shortlisted: npt.ArrayLike, inliers: npt.ArrayLike, inlier_weight: float, best: int = 5, least: float = INLIER_LEVEL
) -> Floats:
    """Scores of the shortlist plus weighted inliers, (N,), these divided by their mean over the `best` largest.

    Either term alone ranks worse than their sum: votes see what geometry cannot model, inliers see what chance
    cannot arrange. Dividing makes the weight mean the same for photos with few and with many features. least: what the
    inliers are divided by at least.
    """
    return np.asarray(shortlisted, np.float64) + inlier_weight * relative(inliers, best, least)


def relative(values: npt.ArrayLike, best: int = 5, least: float = 0.0) -> Floats:
    """The values, (N,), divided by the mean of the `best` largest of them or by `least`, whichever is larger; zeros if
    neither is positive."""
    array = np.asarray(values, np.float64)
    if not len(array):
        return array
    level = max(float(np.sort(array)[-best:].mean()), least)
    return array / level if level > 0 else np.zeros_like(array)
