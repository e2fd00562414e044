"""Pairs with a known geometry."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import make_photo, save_photo

from delf_milvus.errors import InputError, UsageError
from delf_milvus.evaluation.pairs import Matched, Pair, PairsConfig, judge_pair, read_pairs, run_pairs
from delf_milvus.matcher import PhotoMatcher
from delf_milvus.settings import Settings

IDENTITY = (1.0, 0, 0, 0, 1, 0, 0, 0, 1)
ROWS = (0.0, 0, 0, 0, 0, -1, 0, 1, 0)


def test_csv_and_jsonl_say_the_same(tmp_path: Path) -> None:
    csv, jsonl = tmp_path / "pairs.csv", tmp_path / "pairs.jsonl"
    csv.write_text("a,b,homography,fundamental\n1.jpg,sub/2.jpg,1 0 0 0 1 0 0 0 1,\n1.jpg,3.jpg,,0 0 0 0 0 -1 0 1 0\n")
    rows = [
        {"a": "1.jpg", "b": "sub/2.jpg", "homography": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]},
        {"a": "1.jpg", "b": "3.jpg", "fundamental": list(ROWS)},
    ]
    jsonl.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert read_pairs(csv) == read_pairs(jsonl)
    first, second = read_pairs(csv)
    assert first == Pair("1.jpg sub/2.jpg", tmp_path / "1.jpg", tmp_path / "sub" / "2.jpg", IDENTITY, None)
    assert second.fundamental == ROWS


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"a": "1.jpg", "homography": list(IDENTITY)}, "line 1: it must have a and b"),
        ({"a": "1.jpg", "b": "2.jpg"}, "either homography or fundamental"),
        ({"a": "1.jpg", "b": "2.jpg", "homography": [1, 2]}, "must be nine numbers"),
        ({"a": "1.jpg", "b": "2.jpg", "homography": [0] * 9}, "not all of them 0"),
        ({"a": "1.jpg", "b": "2.jpg", "homography": "1 0 0 0 1 0 0 0 x"}, "must be nine numbers"),
        ({"a": "1.jpg", "b": "2.jpg", "homography": [1] * 9}, "no inverse"),
        ([1], "not a JSON object"),
    ],
)
def test_what_is_no_pair_is_said_with_its_line(tmp_path: Path, row: Any, words: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match=words):
        read_pairs(path)


def test_what_is_no_file_of_pairs_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must end with"):
        read_pairs(tmp_path / "pairs.txt")
    with pytest.raises(InputError, match="does not exist"):
        read_pairs(tmp_path / "pairs.csv")
    path = tmp_path / "pairs.csv"
    path.write_text("a,b,homography\n")
    with pytest.raises(InputError, match="has no pair"):
        read_pairs(path)
    path.write_text("a,b,homography\n1,2,1 0 0 0 1 0 0 0 1\n1,2,1 0 0 0 1 0 0 0 1\n")
    with pytest.raises(InputError, match="comes twice"):
        read_pairs(path)
    path.write_text("a,b,homography\n1,2\n")
    with pytest.raises(InputError, match="line 2: it does not have 3 values"):
        read_pairs(path)


def test_the_figures_of_a_pair_by_hand() -> None:
    pair = Pair("", Path(), Path(), IDENTITY, None)
    matched = Matched((100, 50), [[1, 0, 2], [0, 1, 0]], [[0, 0], [5, 5], [9, 9]], [[0, 3], [5, 15.5], [9, 9]], 0.1)
    assert judge_pair(pair, matched, 10) == {
        "nothing found": 0,
        "right matches": 2,
        "matching precision": pytest.approx(2 / 3),
        "corner error": pytest.approx(2),
        "AUC@3 px": pytest.approx(1 / 3),
        "AUC@5 px": pytest.approx(3 / 5),
        "AUC@10 px": pytest.approx(4 / 5),
        "seconds": 0.1,
    }
    nothing = judge_pair(pair, Matched((100, 50), None, [], [], 0.1), 10)
    assert (nothing["nothing found"], nothing["right matches"], nothing["AUC@10 px"]) == (1, 0, 0)
    assert not {"matching precision", "corner error"} & nothing.keys()
    by_lines = judge_pair(Pair("", Path(), Path(), None, ROWS), matched, 3)
    # The rows differ by 3, 10.5 and 0 pixels.
    assert by_lines["right matches"] == 2
    assert "AUC@3 px" not in by_lines


def test_pairs_are_matched_once_and_judged_by_the_truth(tmp_path: Path) -> None:
    photo = make_photo(1, 480, 360)
    turn = np.array([[0.9, 0.05, 20.0], [-0.04, 0.95, 10.0], [5e-5, 0, 1]])
    save_photo(tmp_path / "a.png", photo)
    save_photo(tmp_path / "b.png", cv2.warpPerspective(photo, turn, (480, 360)))  # type: ignore[arg-type]
    save_photo(tmp_path / "other.png", make_photo(9))
    file = tmp_path / "pairs.jsonl"
    shifted = turn + np.array([[0, 0, 80], [0, 0, 0], [0, 0, 0]])
    rows = [
        {"a": "a.png", "b": "b.png", "homography": turn.ravel().tolist()},
        {"a": "b.png", "b": "a.png", "homography": np.linalg.inv(shifted).ravel().tolist()},
        {"a": "a.png", "b": "missing.png", "homography": turn.ravel().tolist()},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    matcher = PhotoMatcher(Settings(extract={"preset": "fast"}))  # type: ignore[arg-type]
    counted: list[tuple[int, int, int]] = []
    report = run_pairs(matcher, PairsConfig(file, tmp_path / "out"), lambda *count: counted.append(count))
    assert counted == [(1, 3, 0), (2, 3, 0), (3, 3, 1)]
    good, bad = report.queries["a.png b.png"], report.queries["b.png a.png"]
    assert isinstance(good["matching precision"], float)
    # Keypoints lie on a grid of 16 pixels, and a match is right within 10.
    assert good["matching precision"] > 0.7
    assert isinstance(good["corner error"], float)
    assert good["corner error"] < 12
    assert bad["matching precision"] == 0
    assert [failure.path for failure in report.failures] == ["a.png missing.png"]
    assert report.data.judged == 2
    assert report.figures["matching precision"][3] == 2
    assert (tmp_path / "out" / "corner_errors.png").is_file()
    lines = (tmp_path / "out" / "pairs.jsonl").read_text()
    stricter = run_pairs(matcher, PairsConfig(file, tmp_path / "out", threshold=0.01))
    assert (tmp_path / "out" / "pairs.jsonl").read_text() == lines
    assert stricter.queries["a.png b.png"]["right matches"] < good["right matches"]
    assert not any(math.isinf(value) for one in report.queries.values() for value in one.values())  # type: ignore[arg-type]
    limited = run_pairs(matcher, PairsConfig(file, tmp_path / "out", limit=1))
    assert limited.notes == ["1 of 3 pairs were judged, evenly spread."]
