"""Milvus Lite is told to make segments of what is written, and readers notice nothing of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from store_samples import MODEL, random_items

from delf_milvus.settings import StoreSettings
from delf_milvus.store import writing
from delf_milvus.store.feature_store import FeatureStore

ITEMS = random_items(1, 30, 20)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FeatureStore]:
    """A store that flushes after 200 rows."""
    monkeypatch.setattr(writing, "_FLUSHED", 200)
    with FeatureStore.open(str(tmp_path / "photos.db"), "delf", MODEL, StoreSettings(), max_features=100) as opened:
        yield opened


def segments(folder: Path, kind: str) -> int:
    """Files of rows of one of the two collections."""
    return sum(f"_{kind}" in str(path.parent) for path in folder.rglob("data_*.parquet"))


def test_what_is_written_becomes_segments_every_so_many_rows(store: FeatureStore, tmp_path: Path) -> None:
    store.write(ITEMS[:9])
    assert (segments(tmp_path, "features"), segments(tmp_path, "images")) == (0, 0)
    store.write(ITEMS[9:11])
    assert (segments(tmp_path, "features"), segments(tmp_path, "images")) == (1, 1)
    store.write(ITEMS[11:20])
    assert segments(tmp_path, "features") == 1
    # What goes counts as what comes.
    store.delete([record.image_id for record, _ in ITEMS[11:13]])
    assert segments(tmp_path, "features") == 2
    assert store.fsck().clean
    assert store.count_images() == 18
    for record, features in (ITEMS[0], ITEMS[15]):
        keys, _ = store.neighbours(features.descriptors[:1], 1)
        assert keys[0, 0] >> 12 == record.key


def test_an_index_of_lists_gets_segments_that_it_can_be_trained_with(store: FeatureStore, tmp_path: Path) -> None:
    store.write(ITEMS)
    store.build_index("IVF_SQ8")
    store.neighbours(ITEMS[0][1].descriptors, 1)
    assert store._indexing.least_segment >= 39 * 16
    before = segments(tmp_path, "features")
    store.write(random_items(2, 15, 20, "new"))
    assert segments(tmp_path, "features") == before


def test_a_search_beside_a_flush_sees_all_rows(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from milvus_lite.engine import collection

    flush = collection.execute_flush
    under_way = threading.Event()
    loaded: list[str] = []

    def slowly(*arguments: Any, **options: Any) -> Any:
        states = [store._client.get_load_state(name)["state"].name for name in ("delf_features", "delf_images")]
        loaded.append(states[len(loaded)])
        under_way.set()
        time.sleep(0.3)
        return flush(*arguments, **options)

    monkeypatch.setattr(collection, "execute_flush", slowly)
    store.write(ITEMS[:5])
    record, features = ITEMS[2]
    expected = store.neighbours(features.descriptors, 3)
    writer = threading.Thread(target=store.write, args=[ITEMS[5:11]])
    writer.start()
    assert under_way.wait(30)
    keys, _ = store.neighbours(features.descriptors, 3)
    assert (keys[:, 0] >> 12 == record.key).all()
    assert (keys[:, 0] == expected[0][:, 0]).all()
    assert set(store.stored([record.key])) == {record.key}
    assert {one.image_id for one, _ in ITEMS[:11]} == {one.image_id for one in store.list()}
    writer.join()
    # Where they are not, a search that began before may read the rows neither where they were nor where they are.
    assert loaded == ["NotLoad", "NotLoad"]
