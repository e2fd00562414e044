"""A server that is slow, silent, away, cut off in the middle of an answer, frozen or full: every call ends.

It ends with a whole answer or one sentence; what was interrupted can be done again, and nothing is half-visible.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_photo, save_photo
from faulty_proxy import FaultyProxy
from milvus_server import Server, WheelServer
from model.models import write_tiny_model
from store_samples import MODEL, random_items

from delf_milvus import DelfIndex, Settings
from delf_milvus.errors import DatabaseError
from delf_milvus.ingestion.pipeline import Progress
from delf_milvus.settings import ExtractSettings, StoreSettings
from delf_milvus.store.connection import AwayError, DeadlineError
from delf_milvus.store.feature_store import FeatureStore

pytestmark = pytest.mark.server

ITEMS = random_items(1, 12, 40)
HASTY = StoreSettings(timeout=1.0, retry_seconds=0.5, consistency="strong")
PATIENT = StoreSettings(timeout=10.0, retry_seconds=30.0, consistency="strong")
ENDED_SECONDS = 60
"""Far beyond every deadline here: a thread that still runs then hangs."""

CALLS: dict[str, Callable[[FeatureStore], Any]] = {
    "search": lambda store: store.neighbours(ITEMS[3][1].descriptors, 5),
    "similar": lambda store: store.similar(ITEMS[3][1].global_descriptor, 3),
    "stored": lambda store: store.stored([ITEMS[3][0].key]),
    "list": lambda store: list(store.list()),
    "count": lambda store: store.count_images(),
    "status": lambda store: store.status(),
    "fsck": lambda store: store.fsck(),
    "write": lambda store: store.write(ITEMS[:2]),
    "delete": lambda store: store.delete([ITEMS[2][0].image_id]),
}


@pytest.fixture
def proxy(milvus: Server, name: str) -> Iterator[FaultyProxy]:
    """A proxy before a server that has the items."""
    with opened(milvus.uri, name, PATIENT) as store:
        store.write(ITEMS)
    with FaultyProxy(milvus.uri) as proxy:
        yield proxy


def opened(uri: str, name: str, settings: StoreSettings = PATIENT) -> FeatureStore:
    return FeatureStore.open(uri, name, MODEL, settings, max_features=100)


def hurried(stores: Iterable[FeatureStore]) -> None:
    """From here on these wait as `HASTY` says; a machine under load may need longer for what comes before."""
    for store in stores:
        store._db.timeout, store._db.retry_seconds = HASTY.timeout, HASTY.retry_seconds


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns or raises."""
    try:
        return call()
    except Exception as error:
        return error


def outcomes(calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """What calls, made at once, return or raise; fails for one that does not end."""
    found: dict[str, Any] = {}
    threads = {
        name: threading.Thread(target=lambda name=name, call=call: found.__setitem__(name, outcome(call)), daemon=True)
        for name, call in calls.items()
    }
    for thread in threads.values():
        thread.start()
    for thread in threads.values():
        thread.join(ENDED_SECONDS)
    assert [name for name, thread in threads.items() if thread.is_alive()] == []
    return found


def whole(milvus: Server, name: str) -> None:
    """What is stored is whole, and writing everything again makes it as if nothing had happened."""
    with opened(milvus.uri, name, PATIENT) as store:
        assert {finding.kind for finding in store.fsck().findings} <= {"orphan_features"}
        store.write(ITEMS)
        report = store.fsck()
    assert (report.findings, report.images, report.features) == ([], len(ITEMS), 40 * len(ITEMS))


def test_every_call_ends_when_nothing_comes_back(proxy: FaultyProxy, milvus: Server, name: str) -> None:
    with contextlib.ExitStack() as stack:
        stores = {call: stack.enter_context(opened(proxy.uri, name)) for call in CALLS}
        expected = {call: outcome(lambda call=call: CALLS[call](stores[call])) for call in ("search", "list", "count")}
        hurried(stores.values())
        proxy.silent = True
        calls = {call: lambda call=call: CALLS[call](stores[call]) for call in CALLS}
        found = outcomes(calls | {"open": lambda: opened(proxy.uri, name, HASTY)})
        for call, error in found.items():
            assert isinstance(error, DeadlineError), (call, error)
            assert "did not answer within 1 s while " in str(error)
        proxy.silent = False
        # Who waits a while has an answer from the same stores, and the right one.
        for call, answer in expected.items():
            stores[call]._db.timeout, stores[call]._db.retry_seconds = PATIENT.timeout, PATIENT.retry_seconds
            np.testing.assert_equal(CALLS[call](stores[call]), answer)
    whole(milvus, name)


def test_every_call_ends_when_nobody_listens_and_tries_again_for_as_long_as_it_was_told(
    proxy: FaultyProxy, milvus: Server, name: str
) -> None:
    with contextlib.ExitStack() as stack:
        stores = {call: stack.enter_context(opened(proxy.uri, name)) for call in CALLS}
        patient = stack.enter_context(opened(proxy.uri, name, PATIENT))
        expected = patient.neighbours(ITEMS[3][1].descriptors, 5)
        hurried(stores.values())
        proxy.refusing = True
        proxy.cut()
        found = outcomes({call: lambda call=call: CALLS[call](stores[call]) for call in CALLS})
        for call, error in found.items():
            assert isinstance(error, AwayError), (call, error)
            assert "Cannot reach the database" in str(error)
        refused = proxy.refused
        assert refused
        with ThreadPoolExecutor(1) as pool:
            searching = pool.submit(patient.neighbours, ITEMS[3][1].descriptors, 5)
            while proxy.refused < refused + 2:
                assert not searching.done()
            proxy.refusing = False
            np.testing.assert_equal(searching.result(ENDED_SECONDS), expected)
    whole(milvus, name)


def test_an_answer_that_is_cut_off_anywhere_is_asked_for_again_and_never_told_in_part(
    proxy: FaultyProxy, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several requests make up one answer.
    monkeypatch.setattr("delf_milvus.store.reading._QUERIES", 16)
    monkeypatch.setattr("delf_milvus.store.reading._KEYS", 5)
    monkeypatch.setattr("delf_milvus.store.reading._PAGE", 5)
    keys = [record.key for record, _ in ITEMS]

    def asked(store: FeatureStore) -> tuple[Any, ...]:
        stored = store.stored(keys, globally=True)
        listed = [record.image_id for record in store.list()]
        return store.neighbours(ITEMS[3][1].descriptors, 5), {key: one[0] for key, one in stored.items()}, listed

    with opened(proxy.uri, name, PATIENT) as store:
        expected = asked(store)
        assert len(expected[1]) == len(expected[2]) == len(ITEMS)
        before = proxy.passed
        asked(store)
        answer = proxy.passed - before
        for part in (0.01, 0.2, 0.4, 0.6, 0.8):
            cuts = proxy.cuts
            proxy.cut_after = int(part * answer / 2)
            np.testing.assert_equal(asked(store), expected)
            assert proxy.cuts == cuts + 1
    with opened(proxy.uri, name, HASTY.model_copy(update={"retry_seconds": 0.0})) as hasty:
        asked(hasty)
        for part in (0.1, 0.5):
            proxy.cut_after = int(part * answer / 2)
            found = outcome(lambda: asked(hasty))
            # pymilvus tries some requests again by itself: then it is whole.
            if not isinstance(found, DatabaseError):
                np.testing.assert_equal(found, expected)


def test_writes_that_are_cut_off_anywhere_leave_each_row_once(proxy: FaultyProxy, milvus: Server, name: str) -> None:
    new = random_items(2, 6, 40, "new")
    with opened(proxy.uri, name, PATIENT) as store:
        for count in (1, 100, 300, 600):
            proxy.cut_after = count
            store.write([*ITEMS[:2], *new])
            proxy.heal()
            report = store.fsck()
            assert (report.findings, report.images, report.features) == ([], 18, 18 * 40)
            proxy.cut_after = count
            assert len(store.delete([record.image_id for record, _ in new])) <= len(new)
            proxy.heal()
            assert not set(store.records([record.image_id for record, _ in new]))
    whole(milvus, name)


def test_a_slow_network_gives_the_same_answers(proxy: FaultyProxy, name: str) -> None:
    with opened(proxy.uri, name, PATIENT) as store:
        expected = [CALLS[call](store) for call in ("search", "similar", "list")]
        proxy.latency = 0.05
        np.testing.assert_equal([CALLS[call](store) for call in ("search", "similar", "list")], expected)


def test_a_frozen_server_is_not_waited_for_and_goes_on_where_it_was(wheel_server: WheelServer, name: str) -> None:
    with opened(wheel_server.uri, name, PATIENT) as store:
        store.write(ITEMS)
    with contextlib.ExitStack() as stack:
        stores = {call: stack.enter_context(opened(wheel_server.uri, name)) for call in CALLS}
        for call in ("search", "stored"):
            CALLS[call](stores[call])
        hurried(stores.values())
        os.kill(wheel_server.pid, signal.SIGSTOP)
        try:
            found = outcomes({call: lambda call=call: CALLS[call](stores[call]) for call in CALLS})
        finally:
            os.kill(wheel_server.pid, signal.SIGCONT)
        assert {type(error) for error in found.values()} == {DeadlineError}, found
    whole(wheel_server, name)


def test_an_ingest_that_loses_its_server_says_so_and_goes_on_when_it_is_run_again(
    proxy: FaultyProxy, milvus: Server, name: str, tmp_path: Path
) -> None:
    photos = 40
    for seed in range(photos):
        save_photo(tmp_path / "photos" / f"{seed:02}.png", make_photo(seed, 64, 64))
    settings = Settings(
        uri=milvus.uri,
        collection=f"{name}_ingest",
        model=str(write_tiny_model(tmp_path / "tiny.safetensors")),
        extract=ExtractSettings(scales=(1.0,), longest_side=64, stored_features=16, query_features=16),
        store=PATIENT,
    )
    with DelfIndex.open(settings=settings) as index:
        index.add(make_photo(0, 64, 64), "00.png")

    def lose(progress: Progress) -> None:
        proxy.silent = progress.done >= 20

    with DelfIndex.open(settings=settings.model_copy(update={"uri": proxy.uri})) as index:
        hurried([index.store])
        index.store._db.timeout = 3.0
        with pytest.raises(DatabaseError, match="did not answer within 3 s"):
            index.ingest([tmp_path / "photos"], progress=lose)
        proxy.heal()
    with DelfIndex.open(settings=settings) as index:
        seen = index.list()
        assert 1 <= len(seen) < photos
        report = index.ingest([tmp_path / "photos"])
        assert (report.failed, report.added + report.updated + report.unchanged) == (0, photos)
        assert report.unchanged >= len(seen) - 1
        checked = index.store.fsck()
        assert (checked.findings, checked.images) == ([], photos)
        assert sum(record.feature_count for record in index.list()) == checked.features


def test_a_server_that_takes_no_more_says_so_and_still_answers(
    wheel_server: WheelServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = random_items(2, 2, 40, "new")
    with opened(wheel_server.uri, name, PATIENT) as store:
        store.write(ITEMS)
        with wheel_server.refusing_writes():
            refused = outcome(lambda: None)
            while refused is None:
                refused = outcome(lambda: store.write(new))
            assert re.search(r"takes no more while \w+: .*; make room there or raise its limits", str(refused))
            # It is told at once, not waited for.
            assert not isinstance(refused, AwayError | DeadlineError)
            assert store.neighbours(ITEMS[3][1].descriptors, 5)[0].shape == (40, 5)
            assert {finding.kind for finding in store.fsck().findings} <= {"orphan_features"}
            assert not set(store.stored([record.key for record, _ in ITEMS])) - {record.key for record, _ in ITEMS}
        done = outcome(lambda: store.write(new))
        while done is not None:
            assert "takes no more" in str(done)
            done = outcome(lambda: store.write(new))
    whole_with = [*ITEMS, *new]
    with opened(wheel_server.uri, name, PATIENT) as store:
        report = store.fsck()
        assert (report.findings, report.images, report.features) == ([], len(whole_with), 40 * len(whole_with))
