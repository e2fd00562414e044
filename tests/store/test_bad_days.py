"""Servers that die, and neighbours that interfere: nothing acknowledged is lost, one sentence says what happened."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_photo, save_photo
from milvus_server import Server
from pymilvus import DataType, MilvusClient
from store_samples import MODEL, random_items

from delf_milvus.errors import CollectionError, DatabaseError
from delf_milvus.settings import StoreSettings
from delf_milvus.store import columns, connection, writing
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.keys import split_keys

pytestmark = pytest.mark.server

RUN = [sys.executable, "-c", "from delf_milvus.cli.main import run; run()"]
PHOTOS = 24
Opener = Callable[..., FeatureStore]


@pytest.fixture
def opened(milvus: Server, name: str) -> Iterator[Opener]:
    stores: list[FeatureStore] = []

    def open_store(retry_seconds: float = 0.5, **options: object) -> FeatureStore:
        settings = StoreSettings(retry_seconds=retry_seconds)
        arguments = {"fingerprint": MODEL, "settings": settings, "max_features": 100, **options}
        stores.append(FeatureStore.open(milvus.uri, name, **arguments))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def ingest(milvus: Server, name: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RUN, "--json", "--uri", milvus.uri, "--collection", f"{name}_cli", "ingest", "photos"],
        cwd=folder,
        env={**os.environ, "DELF_MILVUS_EXTRACT__PRESET": "fast", "DELF_MILVUS_STORE__RETRY_SECONDS": "0.5"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_server_killed_while_it_is_written_to(opened: Opener, name: str, milvus: Server, tmp_path: Path) -> None:
    for seed in range(PHOTOS):
        save_photo(tmp_path / "photos" / f"{seed:03d}.png", make_photo(seed))
    items = random_items(1, 60, 40)
    acknowledged: list[str] = []
    failures: list[Exception] = []
    store = opened()

    def write_on() -> None:
        try:
            for item in itertools.cycle(items):
                store.write([item])
                acknowledged.append(item[0].image_id)
        except Exception as failure:
            failures.append(failure)

    writer = threading.Thread(target=write_on)
    writer.start()
    process = ingest(milvus, name, tmp_path)
    client = MilvusClient(milvus.uri)
    deadline = time.monotonic() + 60
    while not client.has_collection(f"{name}_cli_images") and time.monotonic() < deadline:
        time.sleep(0.05)
    client.close()
    milvus.kill()
    writer.join()
    assert acknowledged
    (failure,) = failures
    assert isinstance(failure, DatabaseError)
    assert "Cannot reach the database at http" in str(failure)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, (out, err)
    assert err.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in err

    milvus.restart()
    store = opened(create=False)
    assert set(acknowledged) <= {record.image_id for record in store.list()}
    report = store.fsck()
    assert {finding.kind for finding in report.findings} <= {"orphan_features"}
    store.write(items)
    report = store.fsck()
    assert (report.findings, report.images, report.features) == ([], len(items), 40 * len(items))
    again = ingest(milvus, name, tmp_path)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    counts = json.loads(out)
    assert counts["added"] + counts["unchanged"] == PHOTOS
    with FeatureStore.open(milvus.uri, f"{name}_cli", None, StoreSettings(), create=False) as cli:
        assert cli.fsck().findings == []
        assert cli.count_images() == PHOTOS


def test_a_server_killed_while_it_builds_an_index_or_searches(
    opened: Opener, milvus: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = random_items(2, 20, 100)
    store = opened(index_from=1000)
    store.write(items)
    create = store._client.create_index

    def killed(*arguments: object, **options: object) -> None:
        threading.Timer(0.05, milvus.kill).start()
        time.sleep(0.1)
        create(*arguments, **options)

    monkeypatch.setattr(store._client, "create_index", killed)
    started = time.monotonic()
    with pytest.raises(DatabaseError, match=r"Cannot reach the database at .* while building the index IVF_PQ"):
        store.ensure_index()
    with pytest.raises(DatabaseError, match="Cannot reach the database"):
        store.neighbours(items[3][1].descriptors, 3)
    assert time.monotonic() - started < 15
    monkeypatch.undo()

    # A store with more patience does not notice.
    patient = StoreSettings(retry_seconds=90, timeout=60)
    store._db.retry_seconds = patient.retry_seconds
    restarter = threading.Thread(target=milvus.restart)
    restarter.start()
    found = split_keys(store.neighbours(items[3][1].descriptors, 3)[0])[0]
    assert np.mean((found == items[3][0].key).any(axis=1)) > 0.9
    restarter.join()
    store.ensure_index()
    status = store.status()
    assert (status.index_used, status.images, status.features) == ("IVF_PQ", 20, 2000)
    assert store.fsck().findings == []


def test_collections_that_somebody_drops_or_replaces(opened: Opener, name: str, milvus: Server) -> None:
    items = random_items(3, 2, 10)
    store = opened()
    store.write(items)
    client = MilvusClient(milvus.uri)
    client.drop_collection(f"{name}_features")
    with pytest.raises(CollectionError, match="is gone while searching for neighbours: somebody else dropped it"):
        store.neighbours(items[0][1].descriptors, 3)
    with pytest.raises(CollectionError, match=r"is gone while .*: somebody else dropped it; ingest again"):
        store.write(random_items(4, 1, 10, "new"))
    replaced = MilvusClient.create_schema()
    replaced.add_field("id", DataType.INT64, is_primary=True)
    replaced.add_field("other", DataType.FLOAT_VECTOR, dim=8)
    client.create_collection(f"{name}_features", schema=replaced)
    client.close()
    with pytest.raises(DatabaseError, match="failed while reading images: field feature_key not exist"):
        store.write(random_items(4, 1, 10, "new"))
    with pytest.raises(CollectionError, match="was made by other software; choose another name"):
        opened()


def test_two_writers_of_the_same_images_leave_them_whole(opened: Opener) -> None:
    items = random_items(5, 12, 30)
    stores = [opened(), opened()]
    stores[0].write(items[:1])
    failures: list[BaseException] = []

    def write(store: FeatureStore, order: int) -> None:
        try:
            for start in range(0, 12, 3)[::order]:
                store.write(items[start : start + 3])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=pair) for pair in zip(stores, (1, -1), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    report = stores[0].fsck()
    assert (report.findings, report.images, report.features) == ([], 12, 360)
    for record, features in stores[1].stored([record.key for record, _ in items]).values():
        assert record.feature_count == len(features) == 30
        assert np.isfinite(features.locations).all()


def test_two_writers_that_insert_the_same_new_images_at_once_leave_each_row_once(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New rows are inserted, which replaces nothing: both writers have found the images absent before either writes."""
    items = random_items(6, 5, 30)
    stores = [opened(), opened()]
    stores[0].write(items[:1])
    absent = threading.Barrier(2)
    write_features = writing.StoreWriter._write_features

    def together(self: writing.StoreWriter, *arguments: Any) -> None:
        absent.wait(60)
        write_features(self, *arguments)

    monkeypatch.setattr(writing.StoreWriter, "_write_features", together)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda store: store.write(items[1:]), stores))
    report = stores[0].fsck()
    assert (report.findings, report.images, report.features) == ([], 5, 150)


@pytest.mark.parametrize("new", [True, False])
def test_a_write_whose_answer_was_lost_is_done_again_once(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, new: bool
) -> None:
    items = random_items(8, 3, 30)
    store = opened(retry_seconds=10)
    store.write(items[:1] if new else items)
    send, lost = columns._send, []

    def losing(*arguments: Any, **options: Any) -> None:
        send(*arguments, **options)
        if not lost:
            lost.append(arguments)
            raise connection.AwayError("The answer was lost.")

    monkeypatch.setattr(columns, "_send", losing)
    store.write(items)
    assert lost
    report = store.fsck()
    assert (report.findings, report.images, report.features) == ([], 3, 90)


def test_a_server_that_is_too_old_is_said_before_anything_is_done(
    opened: Opener, name: str, milvus: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_OLDEST_SERVER", (99, 1))
    with pytest.raises(DatabaseError, match=r"is Milvus 2\..*, which is too old: update it to Milvus 99\.1 or newer"):
        opened()
    client = MilvusClient(milvus.uri)
    assert not any(collection.startswith(name) for collection in client.list_collections())
    client.close()
