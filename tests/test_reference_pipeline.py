"""The reference for comparisons does what the example's steps say."""

from __future__ import annotations

import numpy as np
from reference_pipeline import RADIUS, match, verify


def test_the_neighbours_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    query = rng.normal(size=(60, 8))
    candidate = np.concatenate([query[:40] + rng.normal(0, 0.15, (40, 8)), rng.normal(size=(50, 8))])
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    candidate /= np.linalg.norm(candidate, axis=1, keepdims=True)
    distance = np.linalg.norm(query[:, None] - candidate[None], axis=2)
    rows, columns = match(query, candidate)
    assert rows.tolist() == np.flatnonzero(distance.min(axis=1) < RADIUS).tolist()
    assert columns.tolist() == distance.argmin(axis=1)[rows].tolist()
    assert len(rows) < len(query)


def test_an_affine_transform_among_wrong_matches_is_found_and_the_seed_repeats_it() -> None:
    rng = np.random.default_rng(1)
    truth = np.array([[0.9, 0.2, 30], [-0.1, 1.1, 20]])
    query, image = rng.uniform(0, 400, (60, 2)), rng.uniform(0, 400, (60, 2))
    image[:30] = query[:30] @ truth[:, :2].T + truth[:, 2]
    fit = verify(query, image, trials=300, seed=2)
    assert fit.mask[:30].all()
    assert fit.inliers == fit.mask.sum() < 40
    assert fit.transform is not None
    moved = query[:30] @ fit.transform[:, :2].T + fit.transform[:, 2]
    assert np.linalg.norm(moved - image[:30], axis=1).max() < 20
    again = verify(query, image, trials=300, seed=2)
    assert again.transform is not None
    assert again.transform.tobytes() == fit.transform.tobytes()


def test_too_few_or_degenerate_matches_score_nothing() -> None:
    none = np.empty((0, 8))
    assert [len(part) for part in match(none, none)] == [0, 0]
    assert verify(np.zeros((3, 2)), np.zeros((3, 2))).inliers == 0
    same = np.full((20, 2), 5.0)
    fit = verify(same, same, trials=20)
    assert (fit.transform is None) == (fit.inliers == 0)
