"""Compaction, the progress of an index, its memory; and calls that are repeated."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import grpc
import pytest
from milvus_server import Server
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException
from store_samples import MODEL, random_items

from delf_milvus.errors import CollectionError, DatabaseError
from delf_milvus.settings import StoreSettings
from delf_milvus.store import connection
from delf_milvus.store.connection import AwayError, Connection, DeadlineError
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.profiles import ROW_OVERHEAD


def test_an_embedded_database_compacts_by_itself(tmp_path: Path) -> None:
    with FeatureStore.open(str(tmp_path / "photos.db"), "delf", MODEL, StoreSettings(), max_features=100) as store:
        with pytest.raises(CollectionError, match="delf-milvus ingest"):
            store.compact()
        store.write(random_items(1, 3, 50))
        report = store.compact()
        assert "by itself" in report.what
        status = store.status()
        assert (status.indexed_rows, status.index_total_rows, status.memory_bytes) == (
            150,
            150,
            150 * (64 + ROW_OVERHEAD),
        )
        assert status.pymilvus[0].isdigit()


@pytest.mark.server
def test_a_server_compacts_and_tells_its_progress(milvus: Server) -> None:
    name = f"t{uuid.uuid4().hex[:12]}"
    told: list[str] = []
    with FeatureStore.open(milvus.uri, name, MODEL, StoreSettings(), max_features=100) as store:
        items = random_items(1, 4, 50)
        store.write(items)
        store.ensure_index()
        store.delete([record.image_id for record, _ in items[:2]])
        report = store.compact(told.append)
        assert report.segments_before is not None
        assert report.segments_after is not None
        assert report.what.startswith("Compacted")
        assert all(text.startswith((f"compacting {name}", "indexing what was merged")) for text in told)
        assert (store.count_images(), store.count_features()) == (2, 100)
        status = store.status()
        assert status.indexed_rows == status.index_total_rows > 0
    client = MilvusClient(milvus.uri)
    for suffix in ("features", "images"):
        client.drop_collection(f"{name}_{suffix}")
    client.close()


@pytest.mark.server
def test_what_was_merged_is_indexed_and_searched_when_compact_returns(milvus: Server) -> None:
    name = f"t{uuid.uuid4().hex[:12]}"
    settings = StoreSettings(profile="IVF_SQ8", nlist=16)
    with FeatureStore.open(milvus.uri, name, MODEL, settings, max_features=500) as store:
        for part in ("a", "b"):
            store.write(random_items(ord(part), 6, 500, part))
            store.build_index()
        report = store.compact()
        after = store.index_status()
    assert (after.segments, after.segment_rows) == (1, 6000)
    assert (after.index, after.state) == ("IVF_SQ8", "Finished")
    assert after.indexed_rows == after.total_rows == 6000
    client = MilvusClient(milvus.uri)
    described = client.describe_index(f"{name}_features", "descriptor")
    assert (described["pending_index_rows"], described["indexed_rows"]) == (0, 6000)
    assert report.segments_before is not None
    assert report.segments_after is not None
    assert report.segments_after < report.segments_before
    for suffix in ("features", "images"):
        client.drop_collection(f"{name}_{suffix}")
    client.close()


class Late(grpc.RpcError):
    """What gRPC raises for an answer that did not come in time."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.DEADLINE_EXCEEDED

    def details(self) -> str:
        return "Deadline Exceeded"


class Failing:
    """A call that fails with one error after the other, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self, *, timeout: float) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return f"answered within {timeout:g}"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Connection:
    opened = connection.connect(str(tmp_path_factory.mktemp("calls") / "photos.db"), "", StoreSettings(timeout=7))
    opened.retry_seconds = 1.0
    yield opened
    opened.close()


AWAY = MilvusException(2, "Fail connecting to server")
MOVING = MilvusException(503, "channel not available")
STARTING = MilvusException(65535, "unrecoverable error")
ENDING = MilvusException(1, "service not ready[standalone=1]: Abnormal")
CHANGING = MilvusException(65535, "can't find collection name default:photos_images")


def test_a_database_that_comes_back_in_time_is_not_noticed(database: Connection) -> None:
    call = Failing(AWAY, MOVING, STARTING)
    assert database.call("reading", call) == "answered within 7"
    assert call.calls == 4
    for error in (ENDING, CHANGING):
        call = Failing(error)
        assert database.call("reading", call) == "answered within 7"
        assert call.calls == 2


def test_one_that_stays_away_is_said_within_the_time_that_the_settings_give(
    database: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    started = time.monotonic()
    call = Failing(*[AWAY] * 1000)
    with pytest.raises(AwayError, match=r"Cannot reach the database at .* while reading: is it running"):
        database.call("reading", call)
    assert call.calls > 2
    assert time.monotonic() - started < 2
    assert [record.message.endswith("Trying again.") for record in caplog.records] == [True]


def test_a_late_answer_is_waited_for_once_more(database: Connection) -> None:
    call = Failing(Late())
    assert database.call("reading", call) == "answered within 7"
    call = Failing(*[Late()] * 5)
    with pytest.raises(DeadlineError, match="did not answer within 7 s while reading"):
        database.call("reading", call)
    assert call.calls == 2


def test_other_failures_are_not_repeated(database: Connection) -> None:
    call = Failing(*[MilvusException(1100, "invalid expression")] * 5)
    with pytest.raises(DatabaseError, match="invalid expression"):
        database.call("reading", call)
    assert call.calls == 1
