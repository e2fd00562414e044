"""Feature files on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli.test_commands import call
from conftest import make_photo, save_photo
from featurefiles.samples import sift

from delf_milvus.featurefiles import npz


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SIFT features of four photos in a folder, of a query and of a stranger; ingested."""
    folder = tmp_path_factory.mktemp("features")
    (folder / "sift" / "more").mkdir(parents=True)
    for seed in range(4):
        npz.write(
            folder / "sift" / ("more" if seed == 3 else ".") / f"{seed}.png.npz", sift(make_photo(seed, 640, 480))
        )
    npz.write(folder / "query.npz", sift(np.ascontiguousarray(make_photo(2, 640, 480)[20:460, 30:620])))
    save_photo(folder / "photo.png", make_photo(2))
    told = call(folder, "--json", "ingest", "--features", "sift", "--features-name", "sift-opencv")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["added"] == 4
    return folder


def test_search_with_features(workplace: Path) -> None:
    told = call(workplace, "--json", "search", "--features", "query.npz")
    assert told.returncode == 0, told.stderr
    result = json.loads(told.stdout)
    assert (result["query"], result["matched"], result["calibrated"]) == ("query.npz", True, False)
    assert result["hits"][0]["image_id"] == "2.png"
    assert "calibrate" in told.stderr
    quiet = call(workplace, "-q", "search", "--features", "query.npz")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    explained = call(workplace, "-q", "search", "--features", "query.npz", "--explain", "2.png")
    assert explained.returncode == 0


def test_status_says_who_made_the_features(workplace: Path) -> None:
    told = call(workplace, "--json", "status")
    assert json.loads(told.stdout)["made_elsewhere"] == "sift-opencv"
    assert "sift-opencv" in told.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["search", "photo.png"], 4, "made elsewhere"),
        (["ingest", "photo.png"], 4, "made elsewhere"),
        (["reindex"], 4, "made elsewhere"),
        (["calibrate", ".", "--out", "c.json"], 4, "made elsewhere"),
        (["search", "--features", "photo.png"], 2, "is not a feature file"),
        (["search", "--features", "missing.npz"], 5, "does not exist"),
        (["search", "--features", "query.npz", "--out", "pictures"], 2, "leave --out out"),
        (["ingest", "sift", "--features-name", "x"], 2, "give --features too"),
        (["--collection", "new", "ingest", "--features", "sift"], 2, "--features-name"),
        (["--collection", "new", "ingest", "--features", "missing", "--features-name", "x"], 5, "does not exist"),
        (["extract", "photo.png", "--out", "f", "--format", "mat"], 2, "--format is one of"),
        (["extract", "missing.png", "--out", "f"], 5, "does not exist"),
    ],
)
def test_mistakes_are_one_sentence(workplace: Path, arguments: list[str], code: int, problem: str) -> None:
    told = call(workplace, *arguments)
    assert (told.returncode, told.stderr.count("\n")) == (code, 1), told.stderr
    assert problem in told.stderr


def test_calibrating_with_stored_features(workplace: Path) -> None:
    # Four images are too few to measure anything: it comes to the collection's size, not to its model.
    told = call(workplace, "calibrate", "--out", "c.json")
    assert (told.returncode, "4 images" in told.stderr) == (5, True), told.stderr


def test_extract_resumes_lists_failures_and_guards_its_files(tmp_path: Path) -> None:
    for seed in range(2):
        save_photo(tmp_path / "photos" / f"{seed}.png", make_photo(seed))
    (tmp_path / "photos" / "bad.png").write_bytes(b"nothing")
    first = call(tmp_path, "--json", "extract", "photos", "--out", "f", "--count", 100)
    report = json.loads(first.stdout)
    assert first.returncode == 1
    assert (report["extracted"], report["skipped"], report["failed"], report["features"]) == (2, 0, 1, 200)
    with np.load(tmp_path / "f" / "0.png.npz") as arrays:
        names = {"descriptors", "extractor", "global_descriptor", "image_size", "keypoints", "scales", "scores"}
        assert set(arrays) == names
        assert arrays["descriptors"].shape == (100, 40)
    (tmp_path / "f" / "1.png.npz").write_bytes(b"cut short")
    again = json.loads(call(tmp_path, "--json", "extract", "photos", "--out", "f").stdout)
    assert (again["extracted"], again["skipped"]) == (1, 1)
    other = call(tmp_path, "extract", "photos/0.png", "--out", "f", "--preset", "paper")
    assert (other.returncode, "another model or preset" in other.stderr) == (2, True)
    elsewhere = call(tmp_path, "extract", "photos/0.png", "--out", "photos/0.png/x")
    assert (elsewhere.returncode, "cannot be written" in elsewhere.stderr) == (5, True), elsewhere.stderr
