"""Which answers show the same part of the query: a photo of several things has answers for each of them.

Answers are taken best first. One whose inliers lie where those of an earlier answer lie belongs to that one's region;
one that lies elsewhere begins a region of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]

GRID = 16
"""Cells of the query photo a side in which inliers are compared."""

SHARED = 0.5
"""Share of an answer's inliers that must lie in the region that it joins, or the other way round."""


def regions(points: Sequence[Float32Array], size: tuple[int, int]) -> list[int]:
    """The region of each answer, counted from 1 in order of appearance; 0 for an answer without inliers.

    points: for each answer, best first, its inliers in the query, (N, 2) pixels. size: (width, height) of the query.
    """
    found: list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]] = []
    numbers = []
    for inliers in points:
        if not len(inliers):
            numbers.append(0)
            continue
        counts = _counts(inliers, size)
        covered = _covered(counts)
        own = counts.sum()
        for number, (area, others) in enumerate(found, 1):
            if max(counts[area].sum() / own, others[covered].sum() / others.sum()) >= SHARED:
                numbers.append(number)
                break
        else:
            found.append((covered, counts))
            numbers.append(len(found))
    return numbers


def bounds(inliers: Float32Array) -> tuple[float, float, float, float] | None:
    """x0, y0, x1, y1 of the inliers (N, 2); None without any."""
    if not len(inliers):
        return None
    (x0, y0), (x1, y1) = inliers.min(axis=0).tolist(), inliers.max(axis=0).tolist()
    return x0, y0, x1, y1


def _counts(inliers: Float32Array, size: tuple[int, int]) -> npt.NDArray[np.float64]:
    cells = np.clip(inliers * (GRID / np.array(size)), 0, GRID - 1).astype(np.intp)
    counts = np.zeros((GRID, GRID))
    np.add.at(counts, (cells[:, 1], cells[:, 0]), 1.0)
    return counts


def _covered(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Cells with inliers, those right beside them, and what they enclose: the hull, one cell wider."""
    y, x = np.nonzero(counts)
    hull = cv2.convexHull(np.stack([x, y], axis=1).astype(np.int32))
    mask = cv2.fillConvexPoly(np.zeros(counts.shape, np.uint8), hull, 1)
    return cv2.dilate(mask, np.ones((3, 3), np.uint8)).astype(bool)
