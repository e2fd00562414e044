"""The invariants of Features and of the fingerprint."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delf_milvus.errors import UsageError
from delf_milvus.features import MAX_FEATURES, Features, Fingerprint, clipped_box


def features(count: int = 10, seed: int = 0) -> Features:
    rng = np.random.default_rng(seed)
    descriptors = rng.normal(size=(count, 8)).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True) if count else 1
    return Features(
        rng.uniform(0, 100, (count, 2)).astype(np.float32),
        rng.uniform(0.5, 2, count).astype(np.float32),
        np.sort(rng.uniform(0, 1, count).astype(np.float32))[::-1].copy(),
        descriptors,
        100,
        100,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"locations": np.zeros((10, 3), np.float32)}, "locations"),
        ({"locations": np.zeros((10, 2))}, "float32"),
        ({"scales": np.zeros(10, np.float32)}, "positive"),
        ({"scales": np.ones(9, np.float32)}, "scales"),
        ({"attention": np.arange(10, dtype=np.float32)}, "falling"),
        ({"attention": np.full(10, np.nan, np.float32)}, "finite"),
        ({"descriptors": np.ones((10, 8), np.float32)}, "unit"),
        ({"width": 0}, "pixel"),
        ({"global_descriptor": np.ones(4, np.float32)}, "unit"),
        ({"global_descriptor": np.full(4, np.nan, np.float32)}, "unit"),
        ({"global_descriptor": np.ones(1)}, "float32"),
        ({"global_descriptor": np.ones((1, 1), np.float32)}, "vector"),
    ],
)
def test_what_breaks_an_invariant_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(features(), **change)  # type: ignore[arg-type]


def test_more_features_than_a_key_can_number_are_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        features(MAX_FEATURES + 1)


def test_top_keeps_the_first_and_never_fails() -> None:
    assert len(features().top(3)) == 3
    assert len(features().top(99)) == 10
    assert len(features(0).top(3)) == 0


@given(st.tuples(*[st.floats(-1e300, 1e300)] * 4))
def test_a_clipped_box_lies_in_the_photo_and_covers_what_the_box_covers_of_it(
    box: tuple[float, float, float, float],
) -> None:
    try:
        x0, y0, x1, y1 = clipped_box(box, 100, 60)
    except UsageError:
        assert min(box[2], 100) <= max(box[0], 0) or min(box[3], 60) <= max(box[1], 0)
    else:
        assert 0 <= x0 < x1 <= 100
        assert 0 <= y0 < y1 <= 60
        assert x0 <= max(box[0], 0) < x0 + 1
        assert y1 >= min(box[3], 60) > y1 - 1


FINGERPRINT = Fingerprint("ab" * 32, "attention", 40, 640, (0.5, 1.0), 16)


def test_a_fingerprint_survives_json() -> None:
    assert Fingerprint.from_json(FINGERPRINT.to_json()) == FINGERPRINT


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weights": 1}', "null"])
def test_text_that_is_no_fingerprint_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        Fingerprint.from_json(text)


def test_differences_name_what_differs() -> None:
    (difference,) = FINGERPRINT.differences(replace(FINGERPRINT, scales=(1.0,)))
    assert difference.startswith("scales:")
    assert FINGERPRINT.short != replace(FINGERPRINT, dim=128).short
