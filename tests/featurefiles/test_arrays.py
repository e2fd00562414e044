"""What is believed of a feature file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from featurefiles.samples import local_features, some_features
from hypothesis import given, settings
from hypothesis import strategies as st
from store.store_samples import random_features

from delf_milvus.errors import InputError
from delf_milvus.featurefiles.arrays import LocalFeatures, maker
from delf_milvus.features import Features, Fingerprint


@settings(deadline=None)
@given(some_features, st.integers(0, 40))
def test_the_best_scores_are_kept_and_descriptors_have_unit_norm(found: LocalFeatures, count: int) -> None:
    features = found.features(count, "a file")
    assert len(features) == min(count, len(found.keypoints))
    order = range(len(found.keypoints)) if found.scores is None else np.argsort(-found.scores, kind="stable")
    kept = list(order)[:count]
    assert np.array_equal(features.locations, found.keypoints[kept])
    norms = np.linalg.norm(found.descriptors[kept], axis=1, keepdims=True)
    assert np.allclose(features.descriptors * norms, found.descriptors[kept], atol=1e-5)


def test_what_a_file_lacks_has_its_defaults() -> None:
    found = local_features(0, 20, 8, optional=False)
    features = found.features(10, "a file")
    assert np.array_equal(features.locations, found.keypoints[:10])
    assert (features.scales == 1).all()
    assert (features.attention == 1).all()
    assert features.width == int(np.ceil(found.keypoints[:, 0].max())) + 1
    assert features.height == int(np.ceil(found.keypoints[:, 1].max())) + 1


def test_our_own_features_come_back_to_the_last_bit() -> None:
    features = random_features(np.random.default_rng(0), 50, 40)
    again = LocalFeatures.of(features).features(50, "a file")
    for name in ("locations", "scales", "attention", "descriptors"):
        assert np.array_equal(getattr(again, name), getattr(features, name)), name
    assert (again.width, again.height, again.digest) == (features.width, features.height, features.digest)


def test_descriptors_of_norm_zero_are_left_out() -> None:
    found = local_features(0, 5, 8)
    found.descriptors[[1, 3]] = 0
    found.descriptors[2] = 1e-30
    features = found.features(5, "a file")
    assert len(features) == 3
    assert np.allclose(np.linalg.norm(features.descriptors, axis=1), 1)
    # They take no place of others.
    assert len(found.features(3, "a file")) == 3


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"keypoints": np.full((5, 2), np.nan, np.float32)}, "keypoints hold values that are not finite"),
        ({"descriptors": np.full((5, 8), np.inf, np.float32)}, "descriptors hold values that are not finite"),
        ({"scores": np.full(5, np.nan, np.float32)}, "scores hold values"),
        ({"scales": np.zeros(5, np.float32)}, "not all positive"),
        ({"scores": np.ones(4, np.float32)}, "scores are of shape"),
        ({"keypoints": np.ones((5, 3), np.float32)}, "keypoints are of shape"),
        ({"descriptors": np.ones((4, 8), np.float32)}, "descriptors are of shape"),
        ({"descriptors": np.ones((5, 0), np.float32)}, "0 components"),
        ({"descriptors": np.ones((5, 5000), np.float32)}, "5,000 components"),
        ({"image_size": (0, 480)}, "0 x 480 pixels is impossible"),
        ({"image_size": (1 << 40, 480)}, "is impossible"),
        ({"image_size": (10, 10), "keypoints": np.full((5, 2), 30, np.float32)}, "outside of the photo of 10 x 10"),
        ({"keypoints": np.full((5, 2), -5000, np.float32), "image_size": None}, "outside of the photo"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError, match="a file cannot be used as a feature file") as caught:
        replace(local_features(0, 5, 8), **changes).features(5, "a file")
    assert problem in str(caught.value)


def test_who_made_features() -> None:
    named = maker("superpoint-v1", 256)
    assert (named.made_elsewhere, named.dim) == ("superpoint-v1", 256)
    ours = Fingerprint("0" * 64, "attention", 40, 640, (0.5, 1.0), 16)
    assert ours.made_elsewhere == ""
    assert maker(ours.to_json(), 40) == ours
    with pytest.raises(ValueError, match="40 components, and it has 41"):
        maker(ours.to_json(), 41)
    for wrong in ("", "a\nb", "../x", "x" * 101, "{}", "{nonsense"):
        with pytest.raises(ValueError, match=r"."):
            maker(wrong, 40)


def test_features_have_room_for_the_largest_file() -> None:
    found = local_features(0, 5000, 4)
    assert isinstance(found.features(4096, "a file"), Features)


def test_a_global_descriptor_has_unit_norm_and_one_of_norm_zero_is_none() -> None:
    found = local_features(0, 5, 8, whole=6)
    assert found.global_descriptor is not None
    features = found.features(5, "a file")
    norm = np.linalg.norm(found.global_descriptor)
    np.testing.assert_allclose(features.global_descriptor * norm, found.global_descriptor, atol=1e-5)
    assert maker("superpoint-v1", 8, 6).global_dim == 6
    zero = replace(found, global_descriptor=np.zeros(6, np.float32))
    assert len(zero.features(5, "a file").global_descriptor) == 0
    for bad in (np.full(6, np.nan, np.float32), np.ones((2, 3), np.float32)):
        with pytest.raises(InputError, match="global_descriptor"):
            replace(found, global_descriptor=bad).features(5, "a file")
