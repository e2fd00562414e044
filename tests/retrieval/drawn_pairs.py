"""Synthetic pairs of photos with a known transform, made the way DELF sees them.

Keypoints lie on the grids of an image pyramid, a feature's scale is quantised to the pyramid's steps and sometimes one
step off, and inliers are as far from the truth as a grid cell is wide.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from delf_milvus.retrieval.verification import Keypoints

PYRAMID = np.array([0.5, 0.7071, 1.0, 1.4142])
STRIDE = 16


class Scene(NamedTuple):
    """Matches in falling similarity; rows of both keypoint sets correspond. `truth` is (3, 3), query to image."""

    query: Keypoints
    image: Keypoints
    inlier: np.ndarray
    truth: np.ndarray


def on_grid(points, scales):
    """Points moved to the nearest keypoint that their pyramid level has."""
    step = (STRIDE * scales)[:, None]
    return np.rint(points / step) * step


def project(homography, points):
    """(N, 2) points through a (3, 3) homography."""
    mapped = np.column_stack([points, np.ones(len(points))]) @ homography.T
    return mapped[:, :2] / mapped[:, 2:]


def jacobian_scale(homography, points):
    """Local change of scale at each point."""
    step = 1.0
    centre = project(homography, points)
    dx = project(homography, points + np.array([step, 0])) - centre
    dy = project(homography, points + np.array([0, step])) - centre
    return np.sqrt(np.abs(dx[:, 0] * dy[:, 1] - dx[:, 1] * dy[:, 0])) / step


def random_truth(rng, *, rotation=0.0, scale=None, shear=0.1, perspective=0.0, size=(640, 480)):
    """A homography around the photo's centre: rotation in degrees, scale (default log-uniform in 0.5 to 2)."""
    scale = 2 ** rng.uniform(-1, 1) if scale is None else scale
    angle = np.deg2rad(rotation)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = scale * turn @ (np.eye(2) + rng.uniform(-shear, shear, (2, 2)))
    centre = np.array(size) / 2
    truth = np.eye(3)
    truth[:2, :2] = linear
    truth[:2, 2] = centre + rng.uniform(-40, 40, 2) - linear @ centre
    warp = np.eye(3)
    warp[2, :2] = rng.uniform(-perspective, perspective, 2) / np.array(size)
    shift = np.eye(3)
    shift[:2, 2] = -centre
    return truth @ np.linalg.inv(shift) @ warp @ shift


def scene(rng, matches, inlier_ratio, truth, *, size=(640, 480), noise=3.0, level_error=0.3, extent=1.0, bias=0.3):
    """A pair of photos of one size.

    noise: standard deviation, pixels, before points snap to their grid. level_error: share of the inliers that are
    seen one pyramid level off. extent: inliers lie in a window of the query of that share of its sides.
    """
    inliers = round(matches * inlier_ratio)
    query_scales = 1 / rng.choice(PYRAMID, matches)
    query_points = on_grid(rng.uniform((0, 0), size, (matches, 2)), query_scales)
    corner = rng.uniform(0, 1 - extent + 1e-9, 2) * size
    window = corner + rng.uniform(0, extent, (max(inliers * 30, 1), 2)) * size
    scales = 1 / rng.choice(PYRAMID, len(window))
    window = on_grid(window, scales)
    seen = project(truth, window)
    window_in = ((seen >= 0) & (seen < size) & (window >= 0) & (window < size)).all(axis=1)
    assert window_in.sum() >= inliers, "the transform leaves too little of the photo"
    rows = np.flatnonzero(window_in)[:inliers]
    query_points[:inliers], query_scales[:inliers] = window[rows], scales[rows]

    image_scales = 1 / rng.choice(PYRAMID, matches)
    image_points = on_grid(rng.uniform((0, 0), size, (matches, 2)), image_scales)
    ideal = query_scales[:inliers] * jacobian_scale(truth, query_points[:inliers])
    level = np.rint(np.log2(np.maximum(ideal, 1e-6)) * 2) + rng.choice(
        [-1, 0, 1], inliers, p=[level_error / 2, 1 - level_error, level_error / 2]
    )
    image_scales[:inliers] = 2 ** (np.clip(level, -1, 2) / 2)
    exact = seen[rows] + rng.normal(0, noise, (inliers, 2))
    image_points[:inliers] = on_grid(exact, image_scales[:inliers])

    # Inliers are the more similar ones, on the whole.
    order = np.argsort(-(rng.random(matches) + bias * (np.arange(matches) < inliers)), kind="stable")
    return Scene(
        Keypoints(query_points[order].astype(np.float32), query_scales[order].astype(np.float32), size),
        Keypoints(image_points[order].astype(np.float32), image_scales[order].astype(np.float32), size),
        order < inliers,
        truth,
    )


def transform_error(transform, scene):
    """Median distance, in pixels of the image, between the found and the true position of the true inliers."""
    points = scene.query.points[scene.inlier].astype(np.float64)
    found = points @ transform[:, :2].T + transform[:, 2]
    return float(np.median(np.linalg.norm(found - project(scene.truth, points), axis=1)))
