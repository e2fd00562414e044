"""The reference code's files."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from featurefiles.samples import local_features, same, some_features
from hypothesis import given
from hypothesis import strategies as st

from delf_milvus.errors import InputError
from delf_milvus.featurefiles import delf
from delf_milvus.featurefiles.arrays import LocalFeatures


@given(some_features)
def test_a_written_file_comes_back(found: LocalFeatures) -> None:
    again = delf.parse(delf.serialised(found), "a file")
    assert np.array_equal(again.keypoints, found.keypoints)
    if len(found.keypoints):
        assert np.array_equal(again.descriptors, found.descriptors)
    ones = np.ones(len(found.keypoints), np.float32)
    assert np.array_equal(again.scores, ones if found.scores is None else found.scores)
    assert np.array_equal(again.scales, ones if found.scales is None else found.scales)


def test_the_reference_file_comes_back_to_the_last_byte(shared: Path, tmp_path: Path) -> None:
    source = shared / "reference" / "love.delf"
    found = delf.read(source)
    assert found.descriptors.shape == (546, 40)
    assert np.allclose(np.linalg.norm(found.descriptors, axis=1), 1, atol=1e-5)
    delf.write(tmp_path / "love.delf", found)
    assert (tmp_path / "love.delf").read_bytes() == source.read_bytes()
    # x and y, not y and x: a photo that is wider than high has keypoints beyond its height in x alone.
    height, width = cv2.imread(str(shared / "reference" / "love.jpg")).shape[:2]
    assert height < found.keypoints[:, 0].max() < width
    assert found.keypoints[:, 1].max() < height


@pytest.mark.parametrize("size", [1, 7, 100, 180, 205, 500])
def test_a_file_that_is_cut_short_is_refused(size: int) -> None:
    data = delf.serialised(local_features(0, 3, 40))
    assert size < len(data)
    with pytest.raises(InputError, match="feature file"):
        delf.parse(data[:size], "a file")


@given(st.binary(max_size=200))
def test_no_bytes_are_answered_with_anything_but_our_error(data: bytes) -> None:
    try:
        found = delf.parse(b"\x0a" + data, "a file")
        found.features(100, "a file")
    except InputError:
        pass


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"PK\x03\x04", "not a DelfFeatures message"),
        (b"\x0a\xff\xff\xff\xff\x7f", "damaged|more than"),
        (b"\x0a\xff\xff\xff\x7f" + b"x" * 100, "more than"),
        (b"\x0a\x80\x80\x80\x80\x80\x80\x01", "damaged"),
        (b"\x0a\x00", "without location"),
        (b"\x0a\x10" + b"x", "cut short"),
    ],
)
def test_damage_is_told(data: bytes, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        delf.parse(data, "a file")


def test_more_features_than_any_photo_has_are_refused() -> None:
    one = delf.serialised(local_features(0, 1, 1))
    with pytest.raises(InputError, match="more than 131,072 features"):
        delf.parse(one * ((1 << 17) + 1), "a file")


def test_descriptors_of_two_lengths_are_refused() -> None:
    data = delf.serialised(local_features(0, 1, 3)) + delf.serialised(local_features(0, 1, 4))
    with pytest.raises(InputError, match="differ in length"):
        delf.parse(data, "a file")


def test_size_and_extractor_are_what_a_file_cannot_say(tmp_path: Path) -> None:
    found = local_features(0, 4, 8, extractor="superpoint-v1")
    delf.write(tmp_path / "a.delf", found)
    again = delf.read(tmp_path / "a.delf")
    assert (again.image_size, again.extractor) == (None, "")
    assert not same(found, again)
    assert [path.name for path in tmp_path.iterdir()] == ["a.delf"]
