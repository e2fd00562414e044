"""What is chosen first of a photo's features: spread, unlike each other, the same every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from store_samples import random_features

from delf_milvus.features import Features
from delf_milvus.store.choosing import spread


def rows_of(ordered: Features, features: Features) -> list[int]:
    """Where each of the ordered features was; all descriptors differ."""
    where = {row.tobytes(): number for number, row in enumerate(features.descriptors)}
    return [where[row.tobytes()] for row in ordered.descriptors]


def crowded(seed: int = 0) -> Features:
    """A photo of 640 x 480 whose 400 best features crowd a corner of 100 x 75, and 100 lesser ones lie anywhere; all of
    three kinds."""
    some = random_features(np.random.default_rng(seed), 500, around=3)
    locations = some.locations.copy()
    locations[:400] = locations[:400] * (100 / 640)
    return Features(locations, some.scales, some.attention, some.descriptors, 640, 480, some.global_descriptor)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), size=st.integers(0, 60), count=st.integers(1, 80))
def test_the_same_features_come_in_another_order_with_falling_scores(seed: int, size: int, count: int) -> None:
    features = random_features(np.random.default_rng(seed), size)
    ordered = spread(features, count)
    rows = rows_of(ordered, features)
    assert sorted(rows) == list(range(size))
    for name in ("locations", "scales", "descriptors"):
        np.testing.assert_array_equal(getattr(ordered, name), getattr(features, name)[rows])
    assert (ordered.attention <= features.attention[rows]).all()
    assert (ordered.attention > 0).all()
    np.testing.assert_array_equal(ordered.global_descriptor, features.global_descriptor)
    assert spread(features, count).digest == ordered.digest


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), few=st.integers(1, 30), many=st.integers(30, 60))
def test_a_smaller_number_is_the_first_part_of_a_larger_one(seed: int, few: int, many: int) -> None:
    features = random_features(np.random.default_rng(seed), 60, around=5)
    first, whole = (spread(features, count) for count in (few, many))
    np.testing.assert_array_equal(first.descriptors[:few], whole.descriptors[:few])


@settings(max_examples=25)
@given(scores=arrays.arrays(np.float32, 30, elements=st.floats(-100, 100, width=32)))
def test_scores_of_any_sign_are_ordered(scores: np.ndarray) -> None:
    some = random_features(np.random.default_rng(4), 30)
    falling = np.sort(scores)[::-1].copy()
    features = Features(some.locations, some.scales, falling, some.descriptors, 640, 480)
    ordered = spread(features, 10)
    assert rows_of(ordered, features)[0] == 0
    assert sorted(rows_of(ordered, features)) == list(range(30))


def test_what_is_chosen_covers_the_photo_where_the_best_scores_crowd_a_corner() -> None:
    features = crowded()
    cells = [len({tuple(cell) for cell in one.locations[:50] // 80}) for one in (features, spread(features, 50))]
    assert cells[0] <= 4
    assert cells[1] >= 15


def test_of_a_repeated_detail_few_are_chosen() -> None:
    """A burst: 60 windows that look the same side by side, stronger than 60 different details among them."""
    some = random_features(np.random.default_rng(7), 120)
    descriptors = some.descriptors.copy()
    descriptors[:60] = descriptors[0] + 0.05 * descriptors[:60]
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    locations = some.locations * 0.2
    features = Features(locations, some.scales, some.attention, descriptors, 640, 480)
    of_burst = sum(row < 60 for row in rows_of(spread(features, 40), features)[:40])
    assert of_burst < 10


@pytest.mark.parametrize("count", [1, 500, 4096])
def test_any_number_can_be_asked_for(count: int) -> None:
    assert len(spread(crowded(), count)) == 500
