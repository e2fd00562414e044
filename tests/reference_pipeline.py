"""Matching and verification by the steps of the official DELF example, written for reading.

The example (tensorflow/models, research/delf) compares two photos so:

1. each query descriptor is matched with its nearest neighbour in the candidate, by a k-d tree, where that is nearer
   than 0.8; several query features may share one neighbour;
2. RANSAC fits an affine transform: 1000 trials of three matches each, an inlier lies within 20 pixels;
3. the score of the pair is the number of inliers.

The package computes the same differently (mutual neighbours, proposals by the keypoints' scales, inliers counted by
place); this is what it is compared with, for accuracy and for speed. Results depend on the seed, so it is given.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree
from skimage.measure import ransac
from skimage.transform import AffineTransform

from delf_milvus.features import Features

RADIUS = 0.8
"""Euclidean distance of two unit descriptors; a cosine similarity of 0.68."""

RESIDUAL = 20.0
"""Pixels of the candidate."""

TRIALS = 1000
SAMPLES = 3

LEAST = 4
"""Putative matches below which the score is 0: through three, an affine transform passes always."""

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.intp]


class Fit(NamedTuple):
    """What RANSAC found.

    mask: (M,) bool, the inliers. transform: (2, 3) float64, from query to candidate; None without inliers.
    """

    mask: npt.NDArray[np.bool_]
    transform: npt.NDArray[np.float64] | None

    @property
    def inliers(self) -> int:
        """The score of the pair."""
        return int(self.mask.sum())


def match(query: FloatArray, candidate: FloatArray, radius: float = RADIUS) -> tuple[IntArray, IntArray]:
    """Rows (M,) of the query's descriptors (Q, D), and (M,) of their neighbours among the candidate's (C, D)."""
    if len(query) == 0 or len(candidate) == 0:
        return np.empty(0, np.intp), np.empty(0, np.intp)
    _, nearest = cKDTree(candidate).query(query, distance_upper_bound=radius)
    matched = np.flatnonzero(nearest < len(candidate))  # the tree says len(candidate) where nothing is near enough
    return matched, nearest[matched]


def verify(
    query_points: FloatArray,
    candidate_points: FloatArray,
    residual: float = RESIDUAL,
    *,
    trials: int = TRIALS,
    seed: int = 0,
) -> Fit:
    """RANSAC with an affine transform over matches: points (M, 2) and (M, 2); residual in pixels of the candidate."""
    nothing = Fit(np.zeros(len(query_points), np.bool_), None)
    if len(query_points) < LEAST:
        return nothing
    with warnings.catch_warnings():
        # Of samples that lie on a line, and of finding no inlier at all: both are answers here.
        warnings.simplefilter("ignore")
        model, mask = ransac(
            (np.asarray(query_points, np.float64), np.asarray(candidate_points, np.float64)),
            AffineTransform,
            min_samples=SAMPLES,
            residual_threshold=residual,
            max_trials=trials,
            rng=seed,
        )
    if mask is None or not model:
        return nothing
    return Fit(np.asarray(mask, np.bool_), np.asarray(model.params[:2], np.float64))


def compare(query: Features, candidate: Features, residual: float = RESIDUAL, *, seed: int = 0) -> Fit:
    """The whole comparison of two photos; `mask` belongs to the putative matches of `match`."""
    rows, columns = match(query.descriptors, candidate.descriptors)
    return verify(query.locations[rows], candidate.locations[columns], residual, seed=seed)
