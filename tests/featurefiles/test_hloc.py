"""hloc's HDF5 files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from featurefiles.samples import local_features, same, some_features
from hypothesis import given, settings

from delf_milvus.errors import InputError, NotFoundError
from delf_milvus.featurefiles import hloc, reading
from delf_milvus.featurefiles.arrays import LocalFeatures

h5py = pytest.importorskip("h5py", reason="needs the extra hloc")


@settings(deadline=None)
@given(found=some_features)
def test_a_written_photo_comes_back(found: LocalFeatures, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("hloc") / "features.h5"
    hloc.write(path, "db/a.jpg", found)
    hloc.write(path, "db/b.jpg", local_features(7, 3, found.descriptors.shape[1], extractor=found.extractor))
    assert hloc.names(path) == ["db/a.jpg", "db/b.jpg"]
    assert same(hloc.read(path, "db/a.jpg"), found)


def test_a_written_file_is_what_hloc_reads(tmp_path: Path) -> None:
    found = local_features(0, 6, 40)
    hloc.write(tmp_path / "f.h5", "db/day/a.jpg", found, uncertainty=4.6)
    with h5py.File(tmp_path / "f.h5", "r") as file:
        group = file["db/day/a.jpg"]
        assert group["descriptors"].shape == (40, 6)
        assert np.array_equal(group["descriptors"].__array__().T, found.descriptors)
        assert np.array_equal(group["keypoints"].__array__(), found.keypoints)
        assert group["scores"].shape == (6,)
        assert group["image_size"].__array__().tolist() == [640, 480]
        assert group["keypoints"].attrs["uncertainty"] == pytest.approx(4.6)
        visited: list[str] = []
        file.visititems(lambda _, thing: visited.append(thing.parent.name) if isinstance(thing, h5py.Dataset) else None)
        assert {name.strip("/") for name in visited} == {"db/day/a.jpg"}


def test_what_hloc_writes_is_read(tmp_path: Path) -> None:
    # In half precision, with no entry of ours, beside global descriptors and matches.
    with h5py.File(tmp_path / "f.h5", "w", libver="latest") as file:
        group = file.create_group("db/a.jpg")
        group.create_dataset("keypoints", data=np.array([[1.5, 2], [30, 40.25]], np.float16))
        group.create_dataset("scores", data=np.array([0.25, 0.5], np.float16))
        group.create_dataset("descriptors", data=np.eye(4, 2, dtype=np.float16))
        group.create_dataset("image_size", data=np.array([640, 480]))
        file.create_group("db/b.jpg").create_dataset("global_descriptor", data=np.ones(8))
    assert hloc.names(tmp_path / "f.h5") == ["db/a.jpg"]
    features = hloc.read(tmp_path / "f.h5", "db/a.jpg").features(10, "a file")
    assert features.locations.tolist() == [[30, 40.25], [1.5, 2]]
    assert features.descriptors.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert (features.width, features.height, features.scales.tolist()) == (640, 480, [1, 1])


def test_the_digest_is_of_one_photo(tmp_path: Path) -> None:
    hloc.write(tmp_path / "f.h5", "a", local_features(0, 3, 4))
    before = hloc.read_with_digest(tmp_path / "f.h5", "a")[1]
    hloc.write(tmp_path / "f.h5", "b", local_features(1, 3, 4))
    assert hloc.read_with_digest(tmp_path / "f.h5", "a")[1] == before
    hloc.write(tmp_path / "f.h5", "a", local_features(2, 3, 4))
    assert hloc.read_with_digest(tmp_path / "f.h5", "a")[1] != before


def test_photos_that_are_not_there(tmp_path: Path) -> None:
    hloc.write(tmp_path / "f.h5", "db/a.jpg", local_features(0, 3, 4))
    for name in ("db/b.jpg", "", "/", "..", "db/a.jpg/keypoints", "db/a.jpg/keypoints/x"):
        with pytest.raises(NotFoundError, match="no photo of that name"):
            hloc.read(tmp_path / "f.h5", name)
    with h5py.File(tmp_path / "f.h5", "a") as file:
        file["db"].create_dataset("keypoints", data=np.ones((1, 2)))
    with pytest.raises(InputError, match="no data set descriptors"):
        hloc.read(tmp_path / "f.h5", "db")


@pytest.mark.parametrize("size", [0, 50, 500, 1500])
def test_a_file_that_is_cut_short_is_refused(size: int, tmp_path: Path) -> None:
    hloc.write(tmp_path / "f.h5", "a", local_features(0, 30, 8))
    data = (tmp_path / "f.h5").read_bytes()
    assert size < len(data)
    (tmp_path / "f.h5").write_bytes(data[:size])
    with pytest.raises(InputError, match="damaged"):
        hloc.names(tmp_path / "f.h5")


def test_nothing_outside_of_the_file_is_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.ones(8, np.float32).tobytes())
    hloc.write(tmp_path / "other.h5", "a", local_features(0, 4, 2))
    with h5py.File(tmp_path / "f.h5", "w") as file:
        group = file.create_group("external")
        group.create_dataset("keypoints", (4, 2), "f4", external=[(str(secret), 0, 32)])
        group.create_dataset("descriptors", data=np.ones((2, 4), np.float32))
        file["linked"] = h5py.ExternalLink("other.h5", "/a")
        file.create_group("part")["keypoints"] = h5py.ExternalLink("other.h5", "/a/keypoints")
        file["part"].create_dataset("descriptors", data=np.ones((2, 4), np.float32))
        layout = h5py.VirtualLayout((4, 2), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "a/keypoints", (4, 2))
        file.create_group("virtual").create_virtual_dataset("keypoints", layout)
        file["virtual"].create_dataset("descriptors", data=np.ones((2, 4), np.float32))
    for name, problem in (("external", "another file"), ("part", "link to elsewhere"), ("virtual", "another file")):
        with pytest.raises(InputError, match=problem):
            hloc.read(tmp_path / "f.h5", name)
    with pytest.raises(NotFoundError):
        hloc.read(tmp_path / "f.h5", "linked")
    assert set(hloc.names(tmp_path / "f.h5")) <= {"external", "virtual", "part"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"descriptors": ((1 << 14, 1 << 14), "f4")}, "more than 268,435,456 bytes"),
        ({"keypoints": ((1 << 40, 2), "f4")}, "more than 268,435,456 bytes"),
        ({"descriptors": ((4,), "f4")}, "are of shape"),
        ({"scores": ((4,), "S8")}, "not numbers"),
        ({"image_size": ((3,), "i8")}, "width and height"),
    ],
)
def test_claims_are_not_believed(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        group = file.create_group("a")
        shapes: dict[str, Any] = {"keypoints": ((4, 2), "f4"), "descriptors": ((8, 4), "f4"), **changes}
        for name, (shape, kind) in shapes.items():
            # Chunked: nothing of it is stored until it is written.
            group.create_dataset(name, shape, kind, chunks=tuple(min(side, 64) for side in shape))
    assert (tmp_path / "f.h5").stat().st_size < 1 << 20
    with pytest.raises(InputError, match=problem):
        hloc.read(tmp_path / "f.h5", "a")


def test_an_extractor_that_is_no_text_is_refused(tmp_path: Path) -> None:
    for value in (np.ones(3), "x" * 5000):
        hloc.write(tmp_path / "f.h5", "a", local_features(0, 3, 4))
        with h5py.File(tmp_path / "f.h5", "a") as file:
            file.attrs["extractor"] = value
        with pytest.raises(InputError, match="extractor is not a text"):
            hloc.read(tmp_path / "f.h5", "a")


def endless(path: Path) -> Path:
    """A file in whose heap of texts a piece has no length: HDF5 2.0 reads it for ever."""
    hloc.write(path, "a", local_features(0, 3, 4, extractor="superpoint-v1"))
    data = bytearray(path.read_bytes())
    heap = data.index(b"GCOL")
    # The first piece of the heap: number, references, reserved, then its length.
    assert data[heap + 32 : heap + 45] == b"superpoint-v1"
    data[heap + 16 : heap + 18] = (7).to_bytes(2, "little")
    data[heap + 24 : heap + 32] = bytes(8)
    data[heap + 32 :] = bytes(len(data) - heap - 32)
    path.write_bytes(data)
    return path


def test_a_file_that_the_library_does_not_read_to_an_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hloc.write(tmp_path / "good.h5", "a", local_features(0, 3, 4))
    assert hloc.names(tmp_path / "good.h5") == ["a"]
    monkeypatch.setattr(reading, "SECONDS", 3.0)
    with pytest.raises(InputError, match="damaged"):
        hloc.read(endless(tmp_path / "bad.h5"), "a")
    monkeypatch.setattr(reading, "SECONDS", 60.0)
    assert len(hloc.read(tmp_path / "good.h5", "a").keypoints) == 3


def test_a_crash_of_the_library_is_a_damaged_file_and_the_next_is_read(tmp_path: Path) -> None:
    hloc.write(tmp_path / "f.h5", "a", local_features(0, 3, 4))
    assert hloc.names(tmp_path / "f.h5") == ["a"]
    assert reading._reader is not None
    reading._reader._process.kill()
    reading._reader._process.wait()
    with pytest.raises(InputError, match="crashed"):
        hloc.names(tmp_path / "f.h5")
    assert hloc.names(tmp_path / "f.h5") == ["a"]


def test_many_threads_ask_the_one_process(tmp_path: Path) -> None:
    for number in range(8):
        hloc.write(tmp_path / "f.h5", f"{number}.jpg", local_features(number, number + 1, 4))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: hloc.read(tmp_path / "f.h5", f"{number % 8}.jpg"), range(40)))
    assert [len(one.keypoints) for one in found] == [number % 8 + 1 for number in range(40)]
