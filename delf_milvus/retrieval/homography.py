"""A homography instead of an affine transform, for accepted matches of flat things seen at an angle.

Starting from the matches that the affine transform explains, least squares alternate with choosing the matches that
the last fit explains. A homography has two parameters more than an affine transform: on a few matches, or where it
bends the photo inside out, it is worth less, and there is none.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from delf_milvus.retrieval.frame import FRAME
from delf_milvus.retrieval.matching import Matches
from delf_milvus.retrieval.verification import Keypoints, Verification

Float64Array = npt.NDArray[np.float64]

LEAST = 12
"""Matches below which the two further parameters fit noise."""

FITS = 3

MAX_CHANGE = 4.0
"""Largest ratio of the denominators at the corners of the inliers' bounding box: nearer parts are shown this much
larger than farther ones."""


def refined(
    query: Keypoints, image: Keypoints, matches: Matches, verification: Verification, residual: float
) -> Float64Array | None:
    """(3, 3) homography from pixels of the query to pixels of the image, its last element 1; None where the affine
    transform explains as much.

    residual: most distance of an inlier, in pixels of an image with a longest side of 640.
    """
    if verification.transform is None:
        return None
    source = query.points[matches.query].astype(np.float64)
    target = image.points[matches.candidate].astype(np.float64)
    limit = residual * max(image.size) / FRAME
    mask, best, best_score = verification.mask, None, _score(verification.residuals.astype(np.float64), limit)
    for _ in range(FITS):
        if mask.sum() < LEAST:
            break
        found, _ = cv2.findHomography(source[mask], target[mask], 0)
        if found is None or not np.isfinite(found).all() or abs(found[2, 2]) < 1e-9:
            break
        found = found / found[2, 2]
        if not _sane(found, source[mask]):
            break
        distance = np.linalg.norm(_moved(found, source) - target, axis=1)
        mask = distance <= limit
        if (score := _score(distance, limit)) > best_score:
            best, best_score = found, score
    return best


def _score(distance: Float64Array, limit: float) -> float:
    """Like the number of inliers, but precise fits win."""
    return float(np.maximum(1 - (distance / limit) ** 2, 0).sum())


def _moved(homography: Float64Array, points: Float64Array) -> Float64Array:
    ends: Float64Array = cv2.perspectiveTransform(points[None], homography)[0]
    return ends


def _sane(homography: Float64Array, points: Float64Array) -> bool:
    """Whether it keeps the orientation over the points' bounding box, and the horizon far from it."""
    low, high = points.min(axis=0), points.max(axis=0)
    corners = np.array([low, (high[0], low[1]), high, (low[0], high[1])])
    depth = np.column_stack([corners, np.ones(4)]) @ homography[2]
    if depth.min() <= 0 or depth.max() > MAX_CHANGE * depth.min():
        return False
    return bool(np.linalg.det(homography) > 0)
