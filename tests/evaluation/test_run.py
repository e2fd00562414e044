"""A whole evaluation on tiny collections."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_photo, save_photo
from PIL import Image

from delf_milvus import DelfIndex, Settings
from delf_milvus.errors import InputError
from delf_milvus.evaluation.folders import FoldersConfig, folders_set
from delf_milvus.evaluation.report import EvaluationReport
from delf_milvus.evaluation.revisited import RevisitedConfig, revisited_set
from delf_milvus.evaluation.run import RunConfig, run

FAST = Settings(extract={"preset": "fast"}, search={"neighbours": 20})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two views of each of four scenes, a distractor, and a query without a match."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(4):
        photo = make_photo(seed)
        save_photo(folder / "data" / f"scene{seed}" / "whole.png", photo)
        save_photo(folder / "data" / f"scene{seed}" / "part.png", np.ascontiguousarray(photo[20:230, 20:300]))
    save_photo(folder / "noise" / "4.png", make_photo(4))
    save_photo(folder / "strangers" / "5.png", make_photo(5))
    return folder


@pytest.fixture
def index(tmp_path: Path) -> Iterator[DelfIndex]:
    with DelfIndex.open(tmp_path / "photos.db", settings=FAST) as index:
        yield index


def config(photos: Path, **more: Any) -> FoldersConfig:
    return FoldersConfig(photos / "data", distractors=(photos / "noise",), no_match=(photos / "strangers",), **more)


class Counting:
    """Searches that went to the index."""

    def __init__(self, index: DelfIndex, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.stop_after = 10**9
        search = index.search

        def counted(image: Any, *arguments: Any, **more: Any) -> Any:
            if len(self.names) >= self.stop_after:
                raise KeyboardInterrupt
            self.names.append(Path(image).name)
            return search(image, *arguments, **more)

        monkeypatch.setattr(index, "search", counted)


def test_folders_are_ingested_searched_and_judged(photos: Path, index: DelfIndex, tmp_path: Path) -> None:
    said: list[str] = []
    report = run(index, folders_set(config(photos)), RunConfig(tmp_path / "out"), said.append)
    assert said[0].startswith("9 photos added, 0 updated, 0 unchanged, 0 failed")
    assert [image.image_id for image in index.list()] == sorted(
        [*(f"scene{n}/{view}.png" for n in range(4) for view in ("part", "whole")), "noise/4.png"]
    )
    assert report.figures["mAP"][0] == 1
    assert report.figures["recall@1"] == (1, 1, 1, 8)
    assert report.figures["false alarms"][3] == 1
    assert (report.data.queries, report.data.no_match, report.data.judged) == (9, 1, 9)
    assert report.notes == []
    assert report.collection is not None
    assert (report.collection["images"], report.collection["search"]["index"]) == (9, "FLAT")
    assert EvaluationReport.read(tmp_path / "out") == report
    assert str(tmp_path) not in (tmp_path / "out" / "report.json").read_text()
    for name in ("precision_recall.png", "inliers.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size == (960, 600)


def test_a_second_run_searches_only_for_what_is_new(
    photos: Path, index: DelfIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    shutil.copytree(photos / "data", own)
    searches = Counting(index, monkeypatch)
    searches.stop_after = 3
    out = RunConfig(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run(index, folders_set(FoldersConfig(own)), out, lambda _: None)
    assert len(searches.names) == 3
    assert not (tmp_path / "out" / "report.json").exists()
    journal = tmp_path / "out" / "queries.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    searches.stop_after = 10**9
    said: list[str] = []
    first = run(index, folders_set(FoldersConfig(own)), out, said.append)
    assert said[0].startswith("0 photos added, 0 updated, 8 unchanged")
    assert len(searches.names) == 3 + 6
    again = run(index, folders_set(FoldersConfig(own)), RunConfig(out.out, limit=3), lambda _: None)
    assert len(searches.names) == 9
    assert again.notes == ["3 of 8 queries were judged, evenly spread."]
    assert all(again.queries[name] == first.queries[name] for name in again.queries)
    # Another collection, or another setting, is another result.
    save_photo(own / "scene9" / "new.png", make_photo(9))
    run(index, folders_set(FoldersConfig(own)), out, lambda _: None)
    assert len(searches.names) == 9 + 8
    verify = index.settings.verify.model_copy(update={"min_inliers": 6})
    index.settings = index.settings.model_copy(update={"verify": verify})
    run(index, folders_set(FoldersConfig(own)), out, lambda _: None)
    assert len(searches.names) == 9 + 8 + 8


def test_an_index_that_has_the_photos_is_searched_as_it_is(photos: Path, index: DelfIndex, tmp_path: Path) -> None:
    index.ingest([photos / "data", photos / "noise"])
    index.delete(["scene0/whole.png"])
    report = run(index, folders_set(FoldersConfig(photos / "data")), RunConfig(tmp_path / "out", False), print)
    assert report.notes == [
        "1 of 8 images are not in the collection, and count as never found.",
        "1 further images of the collection match nothing, and only distract.",
    ]
    assert report.figures["recall@1"][0] == pytest.approx(7 / 8)
    assert index.status()["images"] == 8


def test_a_collection_of_other_photos_is_refused(photos: Path, index: DelfIndex, tmp_path: Path) -> None:
    index.add(make_photo(3), "another")
    with pytest.raises(InputError, match="has none of the 8 images"):
        run(index, folders_set(FoldersConfig(photos / "data")), RunConfig(tmp_path / "out", False), print)


def test_photos_that_cannot_be_read_are_listed_and_stop_nothing(photos: Path, index: DelfIndex, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(photos / "data", own)
    (own / "scene0" / "part.png").write_bytes(b"no photo")
    report = run(index, folders_set(FoldersConfig(own)), RunConfig(tmp_path / "out"), lambda _: None)
    assert {Path(failure.path).name for failure in report.failures} == {"part.png"}
    assert report.data.judged == 7
    assert report.notes == ["1 of 8 images are not in the collection, and count as never found."]
    # It is tried again in the next run.
    shutil.copy(photos / "data" / "scene0" / "part.png", own / "scene0" / "part.png")
    assert run(index, folders_set(FoldersConfig(own)), RunConfig(tmp_path / "out"), lambda _: None).data.judged == 8


def test_the_revisited_protocol_crops_its_queries(
    index: DelfIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        save_photo(tmp_path / "jpg" / f"i{seed}.png", make_photo(seed))
    # Two scenes beside each other: the box says which is asked for.
    save_photo(tmp_path / "jpg" / "q.png", np.hstack([make_photo(0), make_photo(1)]))
    truth = {
        "imlist": ["i0", "i1", "i2"],
        "qimlist": ["q"],
        "gnd": [{"bbx": [320, 0, 640, 240], "easy": [1], "hard": [], "junk": [2]}],
    }
    (tmp_path / "gnd_tiny.json").write_text(json.dumps(truth))
    data = revisited_set(RevisitedConfig(tmp_path / "gnd_tiny.json", tmp_path / "jpg"))
    report = run(index, data, RunConfig(tmp_path / "out"), lambda _: None)
    assert [image.image_id for image in index.list()] == ["i0.png", "i1.png", "i2.png"]
    assert report.figures["mAP easy"][:1] == report.figures["mAP medium"][:1] == (1,)
    assert "mAP hard" not in report.figures
    # A collection that has the query photos too does not count them.
    index.add(tmp_path / "jpg" / "q.png", "q.png")
    same = run(index, data, RunConfig(tmp_path / "out", False), lambda _: None)
    assert same.figures["mAP easy"][0] == 1
    assert same.notes == []
