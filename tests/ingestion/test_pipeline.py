"""From folders to rows: what changes, what does not, and what happens on a bad day."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_photo, save_photo

from delf_milvus import DelfIndex, Settings
from delf_milvus.errors import DatabaseError, InputError, UsageError
from delf_milvus.ingestion.pipeline import Outcome, Outcomes, Progress, Work, ingest_files
from delf_milvus.ingestion.scan import Photo, Scan
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.keys import image_key

FAST = Settings(extract={"preset": "fast"})  # type: ignore[arg-type]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for seed in range(4):
        save_photo(tmp_path / "photos" / f"{seed}.png", make_photo(seed, 160, 120))
    return tmp_path / "photos"


@pytest.fixture
def index(tmp_path: Path) -> Iterator[DelfIndex]:
    with DelfIndex.open(tmp_path / "photos.db", settings=FAST) as opened:
        yield opened


def ids(index: DelfIndex) -> list[str]:
    return [record.image_id for record in index.list()]


def test_a_second_run_changes_nothing_and_loads_no_photo(index: DelfIndex, photos: Path) -> None:
    first = index.ingest([photos])
    before = [record.to_dict() for record in index.list()]
    second = index.ingest([photos])
    assert (first.added, first.unchanged) == (4, 0)
    assert (second.added, second.updated, second.unchanged, second.features) == (0, 0, 4, 0)
    assert [record.to_dict() for record in index.list()] == before


def test_a_changed_photo_is_updated_and_a_touched_one_is_not(index: DelfIndex, photos: Path) -> None:
    index.ingest([photos])
    save_photo(photos / "1.png", make_photo(50, 160, 120))
    (photos / "2.png").touch()
    report = index.ingest([photos])
    assert (report.updated, report.unchanged) == (1, 3)
    assert index.search(make_photo(50, 160, 120)).hits[0].image_id == "1.png"
    assert not index.search(make_photo(1, 160, 120)).matched


def test_prune_removes_what_left_the_disk_and_only_of_that_root(index: DelfIndex, photos: Path, tmp_path: Path) -> None:
    save_photo(tmp_path / "other" / "x.png", make_photo(9, 160, 120))
    index.ingest([photos])
    index.ingest([tmp_path / "other"], id_prefix="other/")
    index.add(make_photo(8, 160, 120), "added by hand")
    (photos / "0.png").unlink()
    (tmp_path / "other" / "x.png").unlink()
    assert index.ingest([photos]).removed == 0
    assert index.ingest([photos], prune=True, dry_run=True).removed == 1
    assert "0.png" in ids(index)
    assert index.ingest([photos], prune=True).removed == 1
    assert ids(index) == ["1.png", "2.png", "3.png", "added by hand", "other/x.png"]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(index: DelfIndex, photos: Path) -> None:
    (photos / "bad.jpg").write_bytes(b"no photo")
    report = index.ingest([photos], dry_run=True)
    assert (report.added, report.failed, report.features) == (4, 1, 0)
    assert index.status()["images"] == 0
    assert index.status()["exists"] is False


def test_a_photo_that_fails_is_listed_and_stops_nothing(index: DelfIndex, photos: Path) -> None:
    (photos / "0_bad.jpg").write_bytes(b"no photo")
    (photos / "empty.png").write_bytes(b"")
    whole = (photos / "1.png").read_bytes()
    (photos / "truncated.png").write_bytes(whole[: len(whole) // 2])
    report = index.ingest([photos])
    assert report.added == 4
    assert sorted(Path(f.path).name for f in report.failures) == ["0_bad.jpg", "empty.png", "truncated.png"]
    assert all(f.error and "\n" not in f.error for f in report.failures)


def test_on_error_stop_ends_at_the_first_failure_and_keeps_what_was_stored(tmp_path: Path, photos: Path) -> None:
    (photos / "2_bad.jpg").write_bytes(b"no photo")
    settings = FAST.model_copy(update={"ingest": FAST.ingest.model_copy(update={"on_error": "stop"})})
    with DelfIndex.open(tmp_path / "stop.db", settings=settings) as index:
        report = index.ingest([photos])
        assert report.failed == 1
        assert ids(index) == ["0.png", "1.png", "2.png"]


def test_a_stopped_run_prunes_nothing(tmp_path: Path, photos: Path) -> None:
    settings = FAST.model_copy(update={"ingest": FAST.ingest.model_copy(update={"on_error": "stop"})})
    with DelfIndex.open(tmp_path / "stop.db", settings=settings) as index:
        index.ingest([photos])
        (photos / "0.png").unlink()
        (photos / "1.png").write_bytes(b"no photo")
        report = index.ingest([photos], prune=True)
        assert (report.stopped, report.removed) == (True, 0)
        assert "0.png" in ids(index)


def test_a_photo_that_breaks_the_network_is_listed_and_stops_nothing(
    index: DelfIndex, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = index._matcher.extractor
    whole = extractor.extract

    def fails_once(pixels, count, box=None):  # type: ignore[no-untyped-def]
        monkeypatch.setattr(extractor, "extract", whole)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore of it")

    monkeypatch.setattr(extractor, "extract", fails_once)
    report = index.ingest([photos])
    assert (report.added, report.failed) == (3, 1)
    assert "allocate memory" in report.failures[0].error
    assert "\n" not in report.failures[0].error
    assert index.ingest([photos]).added == 1


def test_ctrl_c_keeps_what_is_extracted_and_the_next_run_goes_on(index: DelfIndex, photos: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    first = index.ingest([photos], progress=interrupt)
    assert first.interrupted
    assert first.added == len(ids(index)) == 2
    second = index.ingest([photos])
    assert (second.added, second.unchanged, second.interrupted) == (2, 2, False)


def test_progress_reaches_the_total(index: DelfIndex, photos: Path) -> None:
    seen: list[Progress] = []
    index.ingest([photos], progress=seen.append)
    assert [p.done for p in seen] == [0, 1, 2, 3, 4]
    assert {p.total for p in seen} == {4}


def test_a_photo_with_too_few_features_is_stored_and_said(index: DelfIndex, tmp_path: Path) -> None:
    save_photo(tmp_path / "small" / "dot.png", make_photo(1, 8, 8))
    report = index.ingest([tmp_path / "small"])
    assert (report.added, report.sparse) == (1, ["dot.png"])
    assert index.show("dot.png").feature_count == 0


def test_ids_and_metadata_come_from_a_listing(index: DelfIndex, photos: Path, tmp_path: Path) -> None:
    listing = tmp_path / "ids.csv"
    listing.write_text("path,id,place\n0.png,first,Huế\n3.png,,Petra\n")
    assert index.ingest([photos], ids_from=listing).added == 2
    assert ids(index) == ["3.png", "first"]
    assert dict(index.show("first").metadata) == {"place": "Huế"}
    listing.write_text("path,id,place\n0.png,first,Sapa\n3.png,,Petra\n")
    report = index.ingest([photos], ids_from=listing)
    assert (report.updated, report.unchanged) == (1, 1)
    assert dict(index.show("first").metadata) == {"place": "Sapa"}


def test_two_roots_with_the_same_relative_path_need_a_prefix(index: DelfIndex, photos: Path, tmp_path: Path) -> None:
    save_photo(tmp_path / "second" / "1.png", make_photo(30, 160, 120))
    with pytest.raises(UsageError, match="--id-prefix"):
        index.ingest([photos, tmp_path / "second"])
    # In two runs it must not be quietly overwritten either.
    index.ingest([photos])
    report = index.ingest([tmp_path / "second"])
    assert (report.updated, report.failed) == (0, 1)
    assert "--id-prefix" in report.failures[0].error
    assert index.search(make_photo(1, 160, 120)).hits[0].image_id == "1.png"
    assert index.ingest([tmp_path / "second"], id_prefix="second/").added == 1


def test_a_moved_folder_is_recognised(index: DelfIndex, photos: Path, tmp_path: Path) -> None:
    index.ingest([photos])
    shutil.move(photos, tmp_path / "moved")
    report = index.ingest([tmp_path / "moved"])
    assert (report.updated, report.added, report.features) == (4, 0, 0)
    assert index.show("1.png").uri == str(tmp_path / "moved" / "1.png")
    assert index.search(make_photo(1, 160, 120)).hits[0].image_id == "1.png"
    assert index.ingest([tmp_path / "moved"]).unchanged == 4


def test_a_missing_folder_is_an_input_error(index: DelfIndex, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        index.ingest([tmp_path / "nowhere"])


def test_a_database_that_fails_stops_the_run(tmp_path: Path, photos: Path) -> None:
    index = DelfIndex.open(tmp_path / "closed.db", settings=FAST)
    index.close()
    with pytest.raises(DatabaseError):
        index.ingest([photos])


def test_batches_of_new_images_grow_while_the_database_is_behind_and_those_of_changed_ones_do_not(
    index: DelfIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add(make_photo(0, 160, 120), "0")  # so that the collection exists
    _, stored = index.store.stored([image_key("0", "")]).popitem()
    features = stored[1].top(5)
    photos = [Photo(Path(f"{number}.png"), str(number), tmp_path) for number in range(1, 401)]
    sizes: list[int] = []
    let_go = threading.Event()
    write = FeatureStore.write

    def slow(self: FeatureStore, items: Any) -> None:
        sizes.append(len(items))
        let_go.wait(60)
        write(self, items)

    def engine(works: Iterable[Work]) -> Outcomes:
        for number, work in enumerate(works, start=1):
            if number == 280:
                let_go.set()
            yield work.photo, Outcome(work.described("ab" * 32), features, work.stored is not None, False)

    monkeypatch.setattr(FeatureStore, "write", slow)
    scanned = Scan(photos, [], [tmp_path])
    assert ingest_files(scanned, index.store, engine, FAST).added == 400
    assert sizes[0] == 16
    assert 100 < max(sizes) <= 256
    assert sum(sizes) == 400
    assert index.store.count_images() == 401
    sizes.clear()
    assert ingest_files(scanned, index.store, engine, FAST).updated == 400
    assert sizes == [16] * 25
