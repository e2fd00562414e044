"""NumPy archives of features."""

from __future__ import annotations

import io
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import make_photo
from featurefiles.samples import local_features, same, sift, some_features
from hypothesis import given, settings
from hypothesis import strategies as st

from delf_milvus.errors import InputError
from delf_milvus.featurefiles import npz
from delf_milvus.featurefiles.arrays import LocalFeatures


def archived(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


@settings(deadline=None)
@given(found=some_features)
def test_a_written_file_comes_back(found: LocalFeatures, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    npz.write(path, found)
    assert same(npz.read(path), found)


@settings(deadline=None)
@given(st.sampled_from([np.float16, np.float32, np.float64, np.uint8, np.int32]), st.booleans(), st.booleans())
def test_any_kind_of_number_and_order_is_read(kind: Any, compressed: bool, fortran: bool) -> None:
    keypoints, descriptors = np.arange(12).reshape(6, 2).astype(kind), np.arange(1, 25).reshape(6, 4).astype(kind)
    if fortran:
        descriptors = np.asfortranarray(descriptors)
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, keypoints=keypoints, descriptors=descriptors)
    found = npz.parse(stream.getvalue(), "a file")
    assert np.array_equal(found.keypoints, keypoints)
    assert np.array_equal(found.descriptors, descriptors)
    assert found.keypoints.dtype == found.descriptors.dtype == np.float32


def test_opencv_matches_the_arrays_of_a_written_file(tmp_path: Path) -> None:
    photo = make_photo(3)
    npz.write(tmp_path / "a.npz", sift(photo))
    npz.write(tmp_path / "b.npz", sift(np.ascontiguousarray(photo[10:, 20:])))
    with np.load(tmp_path / "a.npz") as first, np.load(tmp_path / "b.npz") as second:
        matches = cv2.BFMatcher(cv2.NORM_L2, crossCheck=True).match(first["descriptors"], second["descriptors"])
        moved = [first["keypoints"][m.queryIdx] - second["keypoints"][m.trainIdx] for m in matches]
        assert first["image_size"].tolist() == [photo.shape[1], photo.shape[0]]
    assert np.allclose(np.median(moved, axis=0), (20, 10), atol=0.5)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_a_file_that_is_cut_short_is_refused(share: float) -> None:
    data = archived(keypoints=np.ones((9, 2)), descriptors=np.ones((9, 4)))
    with pytest.raises(InputError, match=r"not an \.npz archive, or it is damaged"):
        npz.parse(data[: int(share * len(data))], "a file")


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"descriptors": np.ones((2, 4))}, "no array keypoints"),
        ({"keypoints": np.ones((2, 2))}, "no array descriptors"),
        ({"keypoints": np.ones((2, 2)), "descriptors": np.ones(4)}, "are of shape"),
        ({"keypoints": np.ones((2, 2)), "descriptors": np.full((2, 4), "x")}, "not numbers"),
        ({"keypoints": np.ones((2, 2)), "descriptors": np.ones((2, 4)) + 1j}, "not numbers"),
        ({"image_size": np.ones(3)}, "width and height"),
        ({"image_size": np.array([np.nan, 1])}, "width and height"),
        ({"extractor": np.ones(3)}, "extractor is not a text"),
        ({"extractor": np.array("x" * 5000)}, "extractor is not a text"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays: dict[str, Any], problem: str) -> None:
    if not {"keypoints", "descriptors"} & set(arrays):
        arrays = {"keypoints": np.ones((2, 2)), "descriptors": np.ones((2, 4)), **arrays}
    with pytest.raises(InputError, match=problem):
        npz.parse(archived(**arrays), "a file")


class Trap:
    """Tells when it is unpickled."""

    sprung = False

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return setattr, (Trap, "sprung", True)


def test_a_pickle_is_refused_and_never_run() -> None:
    data = archived(keypoints=np.ones((1, 2)), descriptors=np.array([[Trap()]], object))
    with pytest.raises(InputError, match="pickled objects"):
        npz.parse(data, "a file")
    assert not Trap.sprung


@pytest.mark.parametrize("shape", ["(1000000000000, 128)", "(4, 128)", "(2, -4)", "(0, 128)"])
def test_a_header_is_not_believed(shape: str) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        entry = io.BytesIO()
        np.save(entry, np.ones((4, 2), np.float32))
        archive.writestr("keypoints.npy", entry.getvalue())
        body = np.ones((4, 4), np.float32).tobytes()
        archive.writestr("descriptors.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body)
    with pytest.raises(InputError, match=r"another size than their header says|damaged"):
        npz.parse(stream.getvalue(), "a file")


def test_a_small_archive_of_a_huge_array_is_refused_before_it_is_unpacked() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("keypoints.npy", b"\x93NUMPY")
        with archive.open("descriptors.npy", "w", force_zip64=True) as entry:
            for _ in range(257):
                entry.write(bytes(1 << 20))
    assert len(stream.getvalue()) < 1 << 20
    # Both orders of the arrays meet a refusal; the large one must be told by its size.
    data = stream.getvalue()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, pytest.raises(InputError, match="more than 268,435,456"):
        npz.array(archive, "descriptors", "a file")


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_are_answered_with_anything_but_our_error(data: bytes) -> None:
    with pytest.raises(InputError):
        npz.parse(data, "a file")


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_damaged_bytes_raise_nothing_but_our_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(archived(keypoints=np.ones((9, 2), np.float32), descriptors=np.ones((9, 4), np.float32)))
    for place in rng.integers(0, len(data), 3):
        data[place] = rng.integers(0, 256)
    with suppress(InputError):
        npz.parse(bytes(data), "a file").features(10, "a file")


def test_what_is_there_stays_until_the_new_file_is_whole(tmp_path: Path) -> None:
    npz.write(tmp_path / "a.npz", local_features(0, 3, 4))
    npz.write(tmp_path / "a.npz", local_features(1, 3, 4))
    assert same(npz.read(tmp_path / "a.npz"), local_features(1, 3, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '''",
        "{'descr': (), 'fortran_order': False, 'shape': (1,)}",
        "{'descr': [()], 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True, -1)}",
        "-" * 9000 + "1",
        "[" * 9000,
        "\x00",
    ],
)
def test_headers_that_trip_pythons_own_parser_are_refused(header: str) -> None:
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("keypoints.npy", array)
        archive.writestr("descriptors.npy", array)
    with pytest.raises(InputError, match="cannot be used as a feature file"):
        npz.parse(stream.getvalue(), "a file")


def test_an_extractor_that_is_nested_too_deeply_is_refused() -> None:
    stream = io.BytesIO()
    np.savez(stream, keypoints=np.zeros((1, 2)), descriptors=np.ones((1, 4)), extractor='{"a":' + "[" * 4000)
    with pytest.raises(ValueError, match="not a model fingerprint"):
        assert npz.parse(stream.getvalue(), "a file").fingerprint
