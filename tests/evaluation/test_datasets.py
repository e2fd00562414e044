"""From folders and published files to queries and what is right for them, and the figures of given answers."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from delf_milvus.errors import InputError, UsageError
from delf_milvus.evaluation.dataset import Answer, DataSet, Found, Query, Truth, chosen, evenly
from delf_milvus.evaluation.folders import FoldersConfig, folders_set
from delf_milvus.evaluation.landmarks import LandmarksConfig, landmarks_set, read_labels
from delf_milvus.evaluation.report import summed_up
from delf_milvus.evaluation.revisited import RevisitedConfig, read_ground_truth, revisited_set


def touch(folder: Path, *names: str) -> Path:
    """Files by these names: photos that nobody reads."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def answer(*names: str, verified: int = 0, confidence: float = 0.5) -> Answer:
    """A ranking, the first of which are verified."""
    return Answer(tuple(Found(name, rank < verified, 10 - rank, confidence) for rank, name in enumerate(names)), 0.5)


def query(data: DataSet, name: str) -> Query:
    return next(one for one in data.queries if one.name == name)


# Choosing queries


@pytest.mark.parametrize(("count", "limit"), [(10, 3), (10, 10), (10, 99), (7, 5), (1000, 7)])
def test_a_limit_spreads_the_queries_evenly_and_always_alike(count: int, limit: int) -> None:
    queries = [Query(f"{number:04d}", Path(), Truth()) for number in range(count)]
    drawn = evenly(queries, limit)
    assert drawn == evenly(queries, limit)
    places = [int(one.name) for one in drawn]
    assert len(set(places)) == min(count, limit)
    assert places == sorted(places)
    assert np.diff([-1, *places, count]).max() <= 2 * -(-count // limit)


def test_a_limit_counts_for_queries_with_and_without_a_match() -> None:
    queries = [Query(str(n), Path(), Truth(frozenset("x" if n % 3 else ""))) for n in range(30)]
    drawn = chosen(queries, 4)
    assert sum(bool(one.truth.relevant) for one in drawn) == 4
    assert len(drawn) == 8


# Folders


def test_an_instance_is_the_first_folder(tmp_path: Path) -> None:
    touch(tmp_path / "d", "a/1.jpg", "a/deep/2.jpg", "b/3.jpg", "b/4.jpg", "alone/5.jpg", "6.jpg")
    data = folders_set(FoldersConfig(tmp_path / "d"))
    assert {one.name: set(one.truth.relevant) for one in data.queries} == {
        "a/1.jpg": {"a/deep/2.jpg"},
        "a/deep/2.jpg": {"a/1.jpg"},
        "b/3.jpg": {"b/4.jpg"},
        "b/4.jpg": {"b/3.jpg"},
    }
    assert len(data.photos) == 6
    assert data.notes == ["2 photos of d are alone in their instance, and only distract."]
    by_parent = folders_set(FoldersConfig(tmp_path / "d", "parent"))
    assert {one.name for one in by_parent.queries} == {"b/3.jpg", "b/4.jpg"}


def test_a_group_is_so_many_photos_in_a_row(tmp_path: Path) -> None:
    touch(tmp_path, *(f"ukbench{n:05d}.jpg" for n in range(8)))
    data = folders_set(FoldersConfig(tmp_path, group=4))
    assert query(data, "ukbench00005.jpg").truth == Truth(
        frozenset(f"ukbench{n:05d}.jpg" for n in (4, 6, 7)), frozenset({"ukbench00005.jpg"})
    )
    touch(tmp_path, "ukbench00008.jpg")
    with pytest.raises(InputError, match="9 photos, no multiple of 4"):
        folders_set(FoldersConfig(tmp_path, group=4))


def test_distractors_are_stored_and_queries_without_a_match_are_not(tmp_path: Path) -> None:
    touch(tmp_path, "d/a/1.jpg", "d/a/2.jpg", "d/noise/3.jpg", "d/strangers/4.jpg", "more/a/1.jpg")
    data = folders_set(
        FoldersConfig(
            tmp_path / "d",
            distractors=(tmp_path / "d" / "noise", tmp_path / "more"),
            no_match=(tmp_path / "d" / "strangers",),
        )
    )
    assert [photo.image_id for photo in data.photos] == ["a/1.jpg", "a/2.jpg", "noise/3.jpg", "more/a/1.jpg"]
    assert [one.name for one in data.queries] == ["a/1.jpg", "a/2.jpg", "strangers/4.jpg"]
    assert not query(data, "strangers/4.jpg").truth.relevant
    for changes in ({"distractors": (tmp_path / "more", tmp_path / "d" / ".." / "more")}, {"no_match": (tmp_path,)}):
        config: dict[str, Any] = {"distractors": (tmp_path / "more",), **changes}
        with pytest.raises(UsageError):
            folders_set(FoldersConfig(tmp_path / "d", **config))


def test_folders_without_two_photos_of_a_thing_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.jpg", "a/3.jpg")
    with pytest.raises(InputError, match="--group N"):
        folders_set(FoldersConfig(tmp_path))
    with pytest.raises(InputError, match="not a folder"):
        folders_set(FoldersConfig(tmp_path / "nowhere"))


def test_the_figures_of_folders_by_hand(tmp_path: Path) -> None:
    touch(tmp_path / "d", *(f"{n}.jpg" for n in range(8)))
    touch(tmp_path / "strangers", "s.jpg")
    data = folders_set(FoldersConfig(tmp_path / "d", group=4, no_match=(tmp_path / "strangers",)))
    found = data.judge(query(data, "0.jpg"), answer("0.jpg", "1.jpg", "5.jpg", "2.jpg", "3.jpg", verified=3))
    # Without the query: right, wrong, right, right.
    expected = (1 + (1 / 2 + 2 / 3) / 2 + (2 / 3 + 3 / 4) / 2) / 3
    assert found["mAP"] == pytest.approx(expected)
    assert found == {
        "mAP": found["mAP"],
        "N-S": 3,
        "recall@1": 1,
        "recall@5": 1,
        "recall@10": 1,
        "precision@1": 1,
        "precision@5": pytest.approx(2 / 3),
        "precision@10": pytest.approx(2 / 3),
        "accepted": 1,
        "wrong accepted": 1,
        "calibration error": (0.5, 1, 1),
        "seconds": 0.5,
    }
    stranger = query(data, "strangers/s.jpg")
    assert data.judge(stranger, answer("4.jpg")) == {
        "false alarms": 0,
        "calibration error": (0.5, 0, 0),
        "seconds": 0.5,
    }
    assert data.judge(stranger, answer("4.jpg", verified=1))["false alarms"] == 1
    nothing = data.judge(query(data, "0.jpg"), answer())
    assert (nothing["mAP"], nothing["N-S"], nothing["accepted"]) == (0, 0, 0)
    assert nothing["calibration error"] == (0, 0, 1)
    assert list(data.about) == [
        *("mAP", "N-S", "recall@1", "recall@5", "recall@10", "precision@1", "precision@5", "precision@10"),
        *("accepted", "wrong accepted", "false alarms", "calibration error", "seconds"),
    ]  # fmt: skip


# Revisited

GROUND_TRUTH: dict[str, Any] = {
    "imlist": ["i0", "i1", "i2", "i3", "i4"],
    "qimlist": ["q0", "q1"],
    "gnd": [
        {"bbx": [1.5, 2.0, 30.0, 40.0], "easy": [0], "hard": [1, 2], "junk": [3]},
        {"bbx": [0, 0, 10, 10], "easy": [4], "hard": [], "junk": []},
    ],
}


def ground_truth(folder: Path, values: Any = GROUND_TRUTH) -> Path:
    path = folder / "gnd_test.json"
    path.write_text(json.dumps(values))
    return path


def revisited(folder: Path) -> DataSet:
    touch(folder / "jpg", *(f"{name}.jpg" for name in (*GROUND_TRUTH["imlist"], *GROUND_TRUTH["qimlist"])))
    return revisited_set(RevisitedConfig(ground_truth(folder), folder / "jpg"))


def test_the_levels_say_what_is_right_and_what_is_junk(tmp_path: Path) -> None:
    data = revisited(tmp_path)
    one = query(data, "q0")
    assert one.box == (1.5, 2, 30, 40)
    assert {name: (set(truth.relevant), set(truth.junk)) for name, truth in one.levels.items()} == {
        "easy": ({"i0"}, {"i1", "i2", "i3"}),
        "medium": ({"i0", "i1", "i2"}, {"i3"}),
        "hard": ({"i1", "i2"}, {"i0", "i3"}),
    }
    assert [photo.image_id for photo in data.photos] == [f"i{n}.jpg" for n in range(5)]
    assert data.withheld == {"q0", "q1"}
    assert data.name == "test"
    assert data.name_of("deep/i0.jpg") == "i0"


def test_the_figures_of_the_protocol_by_hand(tmp_path: Path) -> None:
    data = revisited(tmp_path)
    found = data.judge(query(data, "q0"), answer("i3", "i1", "i4", "i0", "i2", verified=2))
    # Easy: i4 i0. Medium: i1 i4 i0 i2. Hard: i1 i4 i2.
    assert found["mAP easy"] == pytest.approx((0 + 1 / 2) / 2)
    assert found["mAP medium"] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2 + (2 / 3 + 3 / 4) / 2) / 3)
    assert found["mAP hard"] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert [found[f"mP@{k} medium"] for k in (1, 5, 10)] == [1, 3 / 4, 3 / 4]
    assert [found[f"mP@{k} easy"] for k in (1, 5, 10)] == [0, 1 / 2, 1 / 2]
    assert found["accepted"] == 1
    other = data.judge(query(data, "q1"), answer("i4"))
    assert (other["mAP easy"], other["mAP medium"]) == (1, 1)
    assert "mAP hard" not in other
    figures = summed_up({"q0": found, "q1": other}, data.about)
    assert figures["mAP hard"][3] == 1
    assert figures["mAP easy"][0] == pytest.approx((0.25 + 1) / 2)


def plain_protocol(ranks: list[int], positive: list[int], junk: list[int], k: int) -> tuple[float, float]:
    """AP and precision at k out of the places of positives, the way the published description goes: shifted by the junk
    before them, then trapezoids between the recalls."""
    places = [place for place, image in enumerate(ranks) if image in positive]
    bad = [place for place, image in enumerate(ranks) if image in junk]
    places = [place - sum(one < place for one in bad) for place in places]
    area = 0.0
    for number, place in enumerate(places):
        before = 1.0 if place == 0 else number / place
        area += (before + (number + 1) / (place + 1)) / (2 * len(positive))
    last = min(max(places) + 1, k)
    return area, sum(place + 1 <= last for place in places) / last


def test_whole_rankings_score_as_the_protocol_says(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    data = revisited(tmp_path)
    entry = GROUND_TRUTH["gnd"][0]
    levels = {
        "easy": (entry["easy"], entry["hard"] + entry["junk"]),
        "medium": (entry["easy"] + entry["hard"], entry["junk"]),
        "hard": (entry["hard"], entry["easy"] + entry["junk"]),
    }
    for _ in range(60):
        ranks = random.permutation(5).tolist()
        found = data.judge(query(data, "q0"), answer(*(f"i{number}" for number in ranks)))
        for level, (positive, junk) in levels.items():
            for k in (1, 5, 10):
                area, precision = plain_protocol(ranks, positive, junk, k)
                assert found[f"mAP {level}"] == pytest.approx(area)
                assert found[f"mP@{k} {level}"] == pytest.approx(precision)


def test_a_pickle_and_json_say_the_same(tmp_path: Path) -> None:
    values = {
        **GROUND_TRUTH,
        "gnd": [
            {"bbx": np.array(e["bbx"], np.float64), **{n: np.array(e[n], np.int64) for n in ("easy", "hard", "junk")}}
            for e in GROUND_TRUTH["gnd"]
        ],
    }
    path = tmp_path / "gnd_test.pkl"
    path.write_bytes(pickle.dumps(values, 2))
    assert read_ground_truth(path) == read_ground_truth(ground_truth(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"imlist": None}, "no list"),
        ({"gnd": []}, "0 entries for 2 queries"),
        ({"imlist": ["i0"] * 5}, "comes twice"),
        ({"gnd": [{}, {}]}, "lacks 'bbx'"),
        ({"gnd": [{**GROUND_TRUTH["gnd"][0], "bbx": [0, 0, 0, 0]}] * 2}, "is no box"),
        ({"gnd": [{**GROUND_TRUTH["gnd"][0], "easy": [5]}] * 2}, "none of its 5 images"),
        ({"gnd": [{**GROUND_TRUTH["gnd"][0], "easy": [1]}] * 2}, "of two kinds"),
    ],
)
def test_what_is_no_ground_truth_is_said(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_ground_truth(ground_truth(tmp_path, {**GROUND_TRUTH, **change}))


class Attack:
    def __reduce__(self) -> Any:
        return print, ("harmed",)


def test_a_pickle_that_calls_something_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps({**GROUND_TRUTH, "imlist": Attack()}))
    with pytest.raises(InputError, match=r"asks for builtins\.print") as caught:
        read_ground_truth(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"?")
    with pytest.raises(InputError, match="neither a pickle nor"):
        read_ground_truth(path)
    missing = tmp_path / "jpg"
    missing.mkdir()
    with pytest.raises(InputError, match="none of the 2 query photos"):
        revisited_set(RevisitedConfig(ground_truth(tmp_path), missing))


# Google Landmarks


def landmarks(folder: Path, **more: Any) -> DataSet:
    touch(folder / "test", "0/q1.jpg", "q2.jpg", "q3.jpg", "q4.jpg")
    touch(folder / "index", "a/b/x1.jpg", "x2.jpg", "x3.jpg", "y1.jpg")
    (folder / "retrieval.csv").write_text("id,images,Usage\nq1,x1 x2 x3,Public\nq2,x1 y1,Private\nq9,None,Ignored\n")
    (folder / "recognition.csv").write_text(
        "id,landmarks,Usage\nq1,7,Public\nq2,8 9,Private\nq3,,Private\nq4,5,Public\n"
    )
    (folder / "labels.csv").write_text("id,url,landmark_id\nx1,u,7\nx2,u,7\nx3,u,7\ny1,u,8\n")
    return landmarks_set(LandmarksConfig(folder / "test", folder / "index", **more))


def test_retrieval_scores_the_published_example(tmp_path: Path) -> None:
    data = landmarks(tmp_path, retrieval=tmp_path / "retrieval.csv")
    assert [one.name for one in data.queries] == ["q1", "q2"]
    values = {
        "q1": data.judge(query(data, "q1"), answer("x1", "x2", "y1")),
        "q2": data.judge(query(data, "q2"), answer("x3", "x1")),
    }
    assert summed_up(values, data.about)["mAP@100"][0] == pytest.approx(0.458333, abs=1e-6)


def test_recognition_scores_the_published_examples(tmp_path: Path) -> None:
    data = landmarks(tmp_path, recognition=tmp_path / "recognition.csv", labels=tmp_path / "labels.csv")
    answers = {
        "q1": answer("x1", confidence=0.9, verified=1),  # right, the second in order
        "q2": answer("x2", "y1", confidence=0.1, verified=1),  # wrong
        "q3": answer("y1", confidence=0.95, verified=1),  # shows no landmark
        "q4": answer(),
    }
    values = {name: data.judge(query(data, name), one) for name, one in answers.items()}
    figures = summed_up(values, data.about)
    assert figures["GAP"][0] == pytest.approx(1 / 2 / 3)
    assert figures["GAP"][3] == 4
    assert figures["recognised"][0] == pytest.approx(1 / 3, abs=1e-6)
    assert figures["false alarms"][0] == 1
    # q4 shows a landmark that no stored photo has: it cannot be accepted, and is no false alarm either.
    assert figures["accepted"][3] == 2
    answers["q3"] = answer("y1", confidence=0.2)
    values = {name: data.judge(query(data, name), one) for name, one in answers.items()}
    assert summed_up(values, data.about)["GAP"][0] == pytest.approx(0.333333, abs=1e-6)


def test_usage_and_missing_photos_leave_queries_out(tmp_path: Path) -> None:
    data = landmarks(tmp_path, retrieval=tmp_path / "retrieval.csv", usage="private")
    assert [one.name for one in data.queries] == ["q2"]
    (tmp_path / "test" / "q2.jpg").unlink()
    data = landmarks_set(LandmarksConfig(tmp_path / "test", tmp_path / "index", retrieval=tmp_path / "retrieval.csv"))
    assert data.notes == ["1 of 2 queries have no photo here, and are left out."]


def test_labels_are_read_by_image_or_by_landmark(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("landmark_id,images\n7,x1 x2\n8,y1\n")
    assert read_labels(path) == {"x1": "7", "x2": "7", "y1": "8"}
    path.write_text("id,landmark_id\nx1,7\nx1,8\n")
    with pytest.raises(InputError, match="line 3: the image x1 has another landmark"):
        read_labels(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must name the columns"),
        ("id,pictures\n", "lacks images"),
        ("id,images\nq1\n", "line 2"),
        ("id,images\nq1,x\nq1,y\n", "q1 comes twice"),
        ("id,images\n", "has no query"),
        ('id,images\nq1,"x\n', "is not CSV"),
    ],
)
def test_what_is_no_solution_is_said_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    touch(tmp_path / "test", "q1.jpg")
    (tmp_path / "solution.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        landmarks_set(LandmarksConfig(tmp_path / "test", retrieval=tmp_path / "solution.csv"))


def test_a_solution_is_needed_and_labels_for_recognition(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Give a solution"):
        landmarks_set(LandmarksConfig(tmp_path))
    with pytest.raises(UsageError, match="--labels"):
        landmarks_set(LandmarksConfig(tmp_path, recognition=tmp_path))
