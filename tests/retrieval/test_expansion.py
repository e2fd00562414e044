"""Query expansion: features of proved answers join the query where they belong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from delf_milvus.features import Features
from delf_milvus.retrieval.expansion import expanded
from delf_milvus.retrieval.matching import match
from delf_milvus.retrieval.search import keypoints
from delf_milvus.retrieval.verification import Verification, verify_many

SIZE = (640, 480)
BOX = (0.0, 0.0, 640.0, 480.0)
ZOOM, SHIFT = 0.5, np.array([100.0, 60.0])
"""The image shows everything half as large."""


def features(locations: np.ndarray, descriptors: np.ndarray, scale: float = 1.0, seed: int = 0) -> Features:
    count = len(locations)
    attention = np.sort(np.random.default_rng(seed).uniform(1, 50, count))[::-1]
    unit = descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True)
    arrays = (locations, np.full(count, scale), attention, unit)
    return Features(*(np.ascontiguousarray(a, np.float32) for a in arrays), *SIZE)


@pytest.fixture
def pair() -> tuple[Features, Features, np.ndarray]:
    """A query, an image with the same 60 things and 40 more, and where those 40 lie in the query."""
    rng = np.random.default_rng(3)
    places = rng.uniform((20, 20), (620, 460), (60, 2))
    more = rng.uniform((20, 20), (620, 460), (40, 2))
    shared, extra = rng.normal(size=(60, 16)), rng.normal(size=(40, 16))
    query = features(places, shared)
    image = features(
        np.concatenate([places, more]) * ZOOM + SHIFT,
        np.concatenate([shared + 0.1 * rng.normal(size=shared.shape), extra]),
        ZOOM,
    )
    return query, image, more


def found(query: Features, image: Features):  # type: ignore[no-untyped-def]
    matches = match(query.descriptors, image.descriptors, 0.6)
    (verification,) = verify_many(keypoints(query), [keypoints(image)], [matches], residual=25.0, min_inliers=5)
    assert verification.inliers > 40
    return image, matches, verification


def test_what_only_the_image_shows_joins_where_it_lies_in_the_query(
    pair: tuple[Features, Features, np.ndarray],
) -> None:
    query, image, more = pair
    wide = expanded(query, [found(query, image)], BOX)
    assert len(wide) >= len(query) + 38
    assert (np.diff(wide.attention) <= 0).all()
    assert (wide.width, wide.height) == SIZE
    distance = np.linalg.norm(wide.locations[:, None] - more[None], axis=2).min(axis=0)
    assert np.quantile(distance, 0.9) < 12
    joined = np.linalg.norm(wide.locations[:, None] - query.locations[None], axis=2).min(axis=1) > 0.01
    np.testing.assert_allclose(wide.scales[joined], 1.0, rtol=0.1)


def test_matched_features_become_the_mean_of_both(pair: tuple[Features, Features, np.ndarray]) -> None:
    query, image, _ = pair
    one = found(query, image)
    wide = expanded(query, [one], BOX, most=0)
    assert len(wide) == len(query)
    _, matches, verification = one
    rows, columns = matches.query[verification.mask], matches.candidate[verification.mask]
    mean = query.descriptors[rows] + image.descriptors[columns]
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(wide.descriptors[rows], mean, atol=1e-5)
    untouched = np.setdiff1d(np.arange(len(query)), rows)
    np.testing.assert_allclose(wide.descriptors[untouched], query.descriptors[untouched], atol=1e-6)


def test_nothing_joins_from_outside_the_box_and_no_more_than_asked(
    pair: tuple[Features, Features, np.ndarray],
) -> None:
    query, image, _ = pair
    wide = expanded(query, [found(query, image)], (0.0, 0.0, 320.0, 480.0))
    joined = np.linalg.norm(wide.locations[:, None] - query.locations[None], axis=2).min(axis=1) > 0.01
    assert joined.any()
    assert (wide.locations[joined, 0] < 320).all()
    few = expanded(query, [found(query, image), found(query, image)], BOX, most=10)
    assert len(few) == len(query) + 10


def test_an_image_without_a_transform_changes_nothing(pair: tuple[Features, Features, np.ndarray]) -> None:
    query, image, _ = pair
    one = found(query, image)
    nothing: Verification = replace(one[2], transform=None)
    wide = expanded(query, [(image, one[1], nothing)], BOX)
    assert len(wide) == len(query)
    np.testing.assert_array_equal(wide.locations, query.locations)
    np.testing.assert_allclose(wide.descriptors, query.descriptors, atol=1e-6)
