"""Bulk import, and moves between Milvus Lite and a server, on a real Milvus server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from file_imports import new_storage
from milvus_server import Server
from store_samples import MODEL, random_features, random_items
from test_transfer import answers, varied_items

from delf_milvus.errors import DatabaseError, UsageError
from delf_milvus.settings import StoreSettings
from delf_milvus.store import bulk
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.keys import split_keys
from delf_milvus.store.records import ImageRecord
from delf_milvus.store.transfer import export_collection, import_collection

Opener = Callable[..., FeatureStore]


@pytest.fixture
def storage(milvus: Server) -> Path:
    return new_storage(milvus)


@pytest.fixture
def opened(milvus: Server, name: str, storage: Path) -> Iterator[Opener]:
    """Opens the store of one new collection; by default, writes of 1000 rows go as files."""
    stores: list[FeatureStore] = []

    def open_store(**settings: object) -> FeatureStore:
        values = {"bulk_storage": str(storage), "bulk_from": 1000, **settings}
        stores.append(FeatureStore.open(milvus.uri, name, MODEL, StoreSettings(**values), max_features=100))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def counted(store: FeatureStore) -> tuple[int, int]:
    return store.count_images(), store.count_features()


@pytest.mark.server
@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_large_write_goes_as_files_and_is_found_when_it_returns(
    opened: Opener, storage: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What exists already is upserted: an import would leave it there twice."""
    if kind == "parquet":
        monkeypatch.setattr(bulk, "_PARQUET_FROM", (2, 3))
    started: list[list[str]] = []
    start = bulk._Storage.put
    monkeypatch.setattr(
        bulk._Storage, "put", lambda *arguments: (found := start(*arguments), started.append(found[1]))[0]
    )
    items = random_items(1, 20, 100)
    store = opened()
    store.write(items[:2])
    assert started == []
    store.write([(items[0][0], items[3][1].top(40)), *items[2:]])
    assert len(started) == 1
    assert {Path(path).suffix[1:] for path in started[0]} == {kind}
    assert list(storage.iterdir()) == []
    assert counted(store) == (20, 1940)
    keys, similarities = store.neighbours(items[7][1].descriptors, 1)
    assert (split_keys(keys)[0] == items[7][0].key).mean() > 0.95
    assert np.allclose(similarities[split_keys(keys)[0] == items[7][0].key], 1, atol=1e-5)
    if kind == "npy":
        # Deleted, the same keys may be imported again; written again, they are upserted.
        assert len(store.delete([record.image_id for record, _ in items])) == 20
        assert counted(store) == (0, 0)
        store.write(items)
        assert len(started) == 2
        assert counted(store) == (20, 2000)
        store.write(items)
        assert len(started) == 2
        assert counted(store) == (20, 2000)


@pytest.mark.server
def test_a_writer_killed_during_an_import_leaves_no_image_and_the_next_one_no_duplicate(
    opened: Opener, milvus: Server, name: str, storage: Path
) -> None:
    code = """
        import os, sys
        sys.path.insert(0, sys.argv[1])
        from store_samples import MODEL, random_items
        from delf_milvus.settings import StoreSettings
        from delf_milvus.store.bulk import BulkImport
        from delf_milvus.store.feature_store import FeatureStore
        settings = StoreSettings(bulk_storage=sys.argv[4], bulk_from=1000)
        store = FeatureStore.open(sys.argv[2], sys.argv[3], MODEL, settings, max_features=100)
        BulkImport.finish = lambda self: os.kill(os.getpid(), 9)
        store.write(random_items(1, 20, 100))
    """
    here = str(Path(__file__).parent)
    program = [sys.executable, "-c", textwrap.dedent(code), here, milvus.uri, name, str(storage)]
    assert subprocess.run(program, check=False).returncode == -signal.SIGKILL
    assert len(list(storage.iterdir())) == 1
    store = opened()
    assert store.count_images() == 0
    assert list(store.list()) == []
    items = random_items(1, 20, 100)
    store.write([(items[0][0], items[0][1].top(60)), *items[1:]])
    assert counted(store) == (20, 1960)
    assert [len(features) for _, features in store.stored([items[0][0].key, items[1][0].key]).values()] == [60, 100]
    old = time.time() - 3 * 24 * 3600
    for path in storage.rglob("*.npy"):
        os.utime(path, (old, old))
    again = opened()
    again.write(items[:1])
    assert list(storage.iterdir()) == []


@pytest.mark.server
def test_a_write_that_fails_after_its_import_began_is_made_good_by_the_next(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = random_items(1, 20, 100)
    store = opened()
    store.write(items[:1])
    with monkeypatch.context() as patch:
        patch.setattr(bulk.BulkImport, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.write(items[1:])
    assert store.count_images() == 1
    store.write(items)
    assert counted(store) == (20, 2000)


@pytest.mark.server
def test_two_writers_that_import_the_same_new_images(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that ends last is told, and what is there twice can be mended."""
    items = random_items(7, 13, 90)
    one, other = opened(), opened()
    one.write(items[:1])  # so that the collection exists
    begun = threading.Barrier(2)
    start = bulk.BulkImport.start

    def together(self: bulk.BulkImport, *arguments: Any) -> None:
        begun.wait(60)
        start(self, *arguments)

    monkeypatch.setattr(bulk.BulkImport, "start", together)
    with ThreadPoolExecutor(2) as pool:
        outcomes = [pool.submit(store.write, items[1:]).exception for store in (one, other)]
        problems = [problem for outcome in outcomes if (problem := outcome())]
    monkeypatch.undo()
    assert problems
    assert all("rows are there twice: run `delf-milvus fsck --repair`" in str(problem) for problem in problems)
    one.fsck(repair=True)
    one.write(items)
    assert one.fsck().findings == []
    assert counted(one) == (13, 13 * 90)


@pytest.mark.server
def test_a_storage_that_the_server_does_not_see_is_one_sentence_and_nothing_is_stored(
    opened: Opener, storage: Path
) -> None:
    store = opened(bulk_path="/nowhere/at/all")
    for _ in range(2):
        with pytest.raises(DatabaseError, match=r"check that store\.bulk_path is the name") as error:
            store.write(random_items(1, 20, 100))
        assert "\n" not in str(error.value)
        assert counted(store) == (0, 0)
        assert list(storage.iterdir()) == []
    store.write(random_items(1, 2, 100))
    assert counted(store) == (2, 200)


@pytest.mark.server
def test_a_storage_that_is_absent_is_one_sentence(opened: Opener, storage: Path) -> None:
    store = opened(bulk_storage=str(storage / "absent"))
    with pytest.raises(UsageError, match=r"store\.bulk_storage .*absent' cannot be used"):
        store.write(random_items(1, 1, 10))
    assert counted(store) == (0, 0)


@pytest.mark.parametrize("location", ["gs://bucket/x", "http://host/x", "s3://", "s3:///x"])
def test_storages_other_than_folders_and_buckets_are_refused(location: str) -> None:
    with pytest.raises(ValueError, match="s3://bucket/prefix"):
        StoreSettings(bulk_storage=location)


def test_milvus_lite_imports_no_files(tmp_path: Path) -> None:
    settings = StoreSettings(bulk_storage=str(tmp_path / "absent"), bulk_from=1)
    with FeatureStore.open(str(tmp_path / "a.db"), "delf", MODEL, settings) as store:
        store.write(random_items(1, 2, 10))
        assert counted(store) == (2, 20)


@pytest.mark.parametrize(
    ("location", "path", "seen"),
    [
        ("s3://bucket/some/prefix", "", "some/prefix/x"),
        ("s3://bucket", "", "x"),
        ("s3://bucket/some/", "files/else/", "files/else/x"),
    ],
)
def test_a_server_calls_files_in_its_bucket_by_their_key(
    location: str, path: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bucket itself is kept in memory: what is asked is how its objects are called."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    files = MemoryFileSystem()
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (files, url.partition("://")[2]))
    place = bulk._Storage(StoreSettings(bulk_storage=location, bulk_path=path))
    store = random_items(1, 1, 30)[0]
    from delf_milvus.store.records import feature_columns
    from delf_milvus.store.schema import features_spec

    spec = features_spec(MODEL.dim)
    columns = feature_columns(store[0].key, store[1], spec, {})
    folder, names = place.put("x", spec, columns, False)
    assert names[0] == f"{seen}/feature_key.npy"
    with files.open(f"{folder}/descriptor.npy") as file:
        np.testing.assert_array_equal(np.load(file), columns["descriptor"])
    place.tidy("x")
    assert files.exists(folder)
    place.remove(folder)
    assert not files.exists(folder)


@pytest.mark.server
def test_a_collection_moves_to_a_server_and_back_unchanged(opened: Opener, tmp_path: Path) -> None:
    items = varied_items()
    with FeatureStore.open(str(tmp_path / "a.db"), "delf", MODEL, StoreSettings(), max_features=100) as lite:
        lite.write(items)
        export_collection(lite, tmp_path / "one")
        before = answers(lite, items)
    server = opened()
    assert import_collection(server, tmp_path / "one").added == len(items)
    assert answers(server, items) == before
    again = import_collection(server, tmp_path / "one")
    assert (again.unchanged, again.features) == (len(items), 0)
    export_collection(server, tmp_path / "two")
    with FeatureStore.open(str(tmp_path / "b.db"), "delf", None, StoreSettings()) as lite:
        import_collection(lite, tmp_path / "two")
        assert answers(lite, items) == before


@pytest.mark.server
def test_a_server_killed_during_export_and_import_loses_nothing(
    opened: Opener, milvus: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = random_items(2, 15, 100)
    store = opened(timeout=5)
    store.write(items)
    with pytest.raises(DatabaseError) as error:
        export_collection(store, tmp_path / "export", progress=lambda done, total: milvus.kill())
    assert "\n" not in str(error.value)
    assert list((tmp_path / "export").iterdir()) == []
    store.close()
    milvus.restart()
    store = opened()
    assert export_collection(store, tmp_path / "export").features == 1500
    store.delete([record.image_id for record, _ in items])

    start = bulk.BulkImport.start

    def killing(self: bulk.BulkImport, *arguments: object) -> None:
        start(self, *arguments)
        milvus.kill()

    with monkeypatch.context() as patch:
        patch.setattr(bulk.BulkImport, "start", killing)
        store = opened(timeout=5)
        with pytest.raises(DatabaseError) as error:
            import_collection(store, tmp_path / "export")
        assert "\n" not in str(error.value)
        store.close()
    milvus.restart()
    store = opened()
    assert store.count_images() == 0
    assert import_collection(store, tmp_path / "export").added == 15
    assert counted(store) == (15, 1500)
    store.write([(ImageRecord("later"), random_features(np.random.default_rng(1), 10))])
    assert counted(store) == (16, 1510)
