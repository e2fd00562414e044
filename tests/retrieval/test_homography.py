"""Homographies of accepted matches."""

from __future__ import annotations

import numpy as np
import pytest
from drawn_pairs import project

from delf_milvus.retrieval.homography import refined
from delf_milvus.retrieval.matching import Matches
from delf_milvus.retrieval.verification import Keypoints, Verification, verify_many

SIZE = (640, 480)
TILTED = np.array([[0.9, 0.05, 30.0], [-0.03, 1.0, 20.0], [7e-4, 1e-4, 1.0]])


def scene(homography: np.ndarray, count: int = 200, noise: float = 2.0, wrong: int = 40, seed: int = 0):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    query = rng.uniform((0, 0), SIZE, (count, 2))
    image = project(homography, query) + rng.normal(0, noise, query.shape)
    image[:wrong] = rng.uniform((0, 0), SIZE, (wrong, 2))
    order = np.arange(count)[::-1]
    matches = Matches(order, order, np.linspace(1, 0.6, count, dtype=np.float32))
    sides = [Keypoints(p.astype(np.float32), np.ones(count, np.float32), SIZE) for p in (query, image)]
    return *sides, matches


def verified(query: Keypoints, image: Keypoints, matches: Matches) -> Verification:
    return verify_many(query, [image], [matches], residual=25.0, min_inliers=5)[0]


@pytest.mark.parametrize("seed", range(5))
def test_a_plane_seen_at_an_angle_is_fitted_better_than_by_the_affine_transform(seed: int) -> None:
    query, image, matches = scene(TILTED, seed=seed)
    affine = verified(query, image, matches)
    found = refined(query, image, matches, affine, 25.0)
    assert found is not None
    assert affine.transform is not None
    corners = np.array([(0, 0), (639, 0), (639, 479), (0, 479)], float)
    truth = project(TILTED, corners)
    error = np.linalg.norm(project(found, corners) - truth, axis=1).mean()
    affine_error = np.linalg.norm(corners @ affine.transform[:, :2].T + affine.transform[:, 2] - truth, axis=1).mean()
    assert error < 6
    assert affine_error > 3 * error


def test_the_same_bytes_on_every_run() -> None:
    query, image, matches = scene(TILTED)
    affine = verified(query, image, matches)
    first = refined(query, image, matches, affine, 25.0)
    assert first is not None
    assert all(np.array_equal(first, refined(query, image, matches, affine, 25.0)) for _ in range(5))  # type: ignore[arg-type]


def test_too_few_matches_give_none() -> None:
    query, image, matches = scene(TILTED, count=10, wrong=0)
    assert refined(query, image, matches, verified(query, image, matches), 25.0) is None


def test_without_a_transform_there_is_none() -> None:
    query, image, matches = scene(TILTED, count=2, wrong=0)
    assert refined(query, image, matches, verified(query, image, matches), 25.0) is None


def test_a_fit_that_turns_the_photo_inside_out_is_refused() -> None:
    """The horizon runs through the photo: what lies beyond it would be shown in front."""
    folded = np.array([[1.0, 0, 0], [0, 1.0, 0], [-2.6e-3, 0, 1.0]])
    query, image, matches = scene(folded, wrong=0)
    inside = np.abs(image.points).max(axis=1) < 2000
    rows = np.flatnonzero(inside)
    matches = Matches(rows, rows, np.linspace(1, 0.6, len(rows), dtype=np.float32))
    everything = Verification(
        len(rows), np.ones(len(rows), bool), np.eye(2, 3), np.full(len(rows), 1e9, np.float32), 1, 1.0
    )
    assert refined(query, image, matches, everything, 25.0) is None
