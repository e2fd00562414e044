"""Many at once: searchers beside a writer, many writers, calls that are cancelled, and processes that were forked."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import multiprocessing
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_photo, save_photo, the_same
from milvus_server import Server, servers
from pymilvus import MilvusClient
from store.store_samples import MODEL, random_items

from delf_milvus import AsyncDelfIndex, DelfIndex, Settings
from delf_milvus.errors import UsageError
from delf_milvus.features import Features
from delf_milvus.ingestion.pipeline import Progress
from delf_milvus.settings import ExtractSettings, SearchSettings, StoreSettings
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.fsck import FsckReport
from delf_milvus.store.keys import image_key

Evidence = dict[str, tuple[Any, ...]]


@pytest.fixture(params=["lite", *servers(pytest.mark.server)])
def place(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Path) -> Iterator[Settings]:
    """Settings with a database and a collection of their own, and the declared field `year`."""
    extract = ExtractSettings(scales=(0.5, 1.0), longest_side=320, stored_features=60, query_features=60)
    name = f"c{uuid.uuid4().hex[:12]}"
    settings = Settings(
        model=str(tiny_model),
        extract=extract,
        collection=name,
        store=StoreSettings(fields={"year": "integer=0"}, consistency="strong"),
        # The embedded database takes its time for each.
        search=SearchSettings(neighbours=40),
    )
    if request.param == "lite":
        yield settings.model_copy(update={"uri": str(tmp_path / "photos.db")})
        return
    server: Server = request.getfixturevalue(f"{request.param}_server")
    yield settings.model_copy(update={"uri": server.uri})
    client = MilvusClient(server.uri, dedicated=True)
    for collection in client.list_collections():
        if collection.startswith(name):
            client.drop_collection(collection)
    client.close()


def evidence(index: DelfIndex, query: Features) -> Evidence:
    """What a search finds of every image, without what depends on which others there are: rank, score, confidence."""
    hits = index.search(query, top_k=50, include_unverified=True).hits
    return {hit.image_id: (hit.inliers, hit.putatives, hit.transform, hit.metadata["year"]) for hit in hits}


def checked(settings: Settings) -> FsckReport:
    """What fsck says, in an index of its own."""
    with DelfIndex.open(settings=settings, create=False) as index:
        return index.store.fsck()


def test_searchers_beside_a_writer_see_an_image_whole_or_not_at_all(place: Settings) -> None:
    versions = (None, make_photo(10), make_photo(11))
    with DelfIndex.open(settings=place) as index:
        for seed in range(5):
            index.add(make_photo(seed), f"{seed}", {"year": 1})
        queries = [index.query(make_photo(seed)).features for seed in (0, 10, 11)]
        old = {"year": 1}
        alone = [the_same(index.search(query, filter=old).hits) for query in queries]
        # What each query finds of the changing image, in each of its versions; of the others it is always the same.
        allowed: list[set[tuple[Any, ...] | None]] = [set() for _ in queries]
        others: list[Evidence] = [{} for _ in queries]
        for photo in versions:
            _put(index, photo)
            for number, query in enumerate(queries):
                found = evidence(index, query)
                allowed[number].add(_hashable(found.pop("changing", None)))
                assert others[number] in ({}, found)
                others[number] = found
        assert all(len(one) == 3 for one in allowed)

        stop = threading.Event()

        def search(number: int) -> set[tuple[Any, ...] | None]:
            seen = set()
            for _ in range(4):
                found = evidence(index, queries[number])
                seen.add(_hashable(found.pop("changing", None)))
                assert found == others[number]
                again = index.search(queries[number], filter=old).hits
                assert [hit.to_dict() for hit in again] == alone[number]
            return seen

        def write() -> int:
            times = 0
            while not stop.is_set():
                _put(index, versions[times % 3])
                times += 1
            return times

        with ThreadPoolExecutor(4) as pool:
            writing = pool.submit(write)
            try:
                seen = [*pool.map(search, range(3))]
            finally:
                stop.set()
            assert writing.result()
        for one, those in zip(seen, allowed, strict=True):
            assert one <= those
    assert checked(place).findings == []


def test_readers_do_not_notice_that_the_properties_of_a_collection_change(place: Settings) -> None:
    """As a writer's notes do: a server loses sight of the collection for a moment, in one of 500 reads."""
    if "://" not in place.uri:
        pytest.skip("Milvus Lite has one writer, and no cache of collections")
    with DelfIndex.open(settings=place) as index:
        index.add(make_photo(0), "0", {"year": 7})
        # Other readings wait for the server's clock, and read too seldom.
        store = place.store.model_copy(update={"consistency": "eventually"})
    images = f"{place.collection}_images"
    with DelfIndex.open(settings=place.model_copy(update={"store": store})) as index:
        ends = time.monotonic() + 8

        def change(writer: int) -> None:
            client = MilvusClient(place.uri, dedicated=True)
            while time.monotonic() < ends:
                client.alter_collection_properties(images, properties={f"test{writer}": str(time.monotonic())})
            client.close()

        def read(_reader: int) -> None:
            while time.monotonic() < ends:
                assert index.store.stored([image_key("0")])[image_key("0")][0].metadata == {"year": 7}

        with ThreadPoolExecutor(6) as pool:
            writing = [pool.submit(change, writer) for writer in range(2)]
            reading = [pool.submit(read, reader) for reader in range(4)]
        for one in writing + reading:
            one.result()


def _put(index: DelfIndex, photo: Any) -> None:
    if photo is None:
        index.delete(["changing"])
    else:
        index.add(photo, "changing", {"year": 2})


def _hashable(found: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    return None if found is None else tuple(map(repr, found))


WRITERS = 5
ITEMS = random_items(1, 24, 30)


def share(writer: int) -> list[Any]:
    """What a writer stores: half of everything, in an order of its own, so that each image has several writers."""
    order = np.random.default_rng(writer).permutation(len(ITEMS))
    return [ITEMS[number] for number in order if (number + writer) % 2]


def write_share(uri: str, name: str, writer: int) -> None:
    with FeatureStore.open(uri, name, MODEL, StoreSettings(), max_features=100) as store:
        items = share(writer)
        for start in range(0, len(items), 4):
            store.write(items[start : start + 4])


def rows(uri: str, name: str) -> dict[str, list[dict[str, Any]]]:
    """Every row of both collections, all fields but the time of writing, in order of the keys."""
    client = MilvusClient(uri, dedicated=True)
    found = {}
    for kind, key in (("images", "image_key"), ("features", "feature_key")):
        listed = client.query(f"{name}_{kind}", filter=f"{key} >= 0", output_fields=["*"], consistency_level="Strong")
        for row in listed:
            row.pop("ingested_at", None)
        found[kind] = sorted(listed, key=lambda row: row[key])
    client.close()
    return found


@pytest.mark.server
def test_many_writers_of_overlapping_images_store_what_one_would_have(milvus: Server, name: str) -> None:
    serial = f"{name}_serial"
    for writer in range(WRITERS):
        write_share(milvus.uri, serial, writer)
    with FeatureStore.open(milvus.uri, name, MODEL, StoreSettings(), max_features=100) as store:
        store.create()
    # Started afresh, as processes of one's own are.
    spawning = multiprocessing.get_context("spawn")
    processes = [spawning.Process(target=write_share, args=(milvus.uri, name, writer)) for writer in range(3, WRITERS)]
    for process in processes:
        process.start()
    with ThreadPoolExecutor(3) as pool:
        for writing in [pool.submit(write_share, milvus.uri, name, writer) for writer in range(3)]:
            writing.result()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    expected = rows(milvus.uri, serial)
    assert len(expected["images"]) == len(ITEMS)
    assert len(expected["features"]) == 30 * len(ITEMS)
    np.testing.assert_equal(rows(milvus.uri, name), expected)
    with FeatureStore.open(milvus.uri, name, MODEL, StoreSettings()) as store:
        assert store.fsck().findings == []


def test_calls_that_are_cancelled_at_any_moment_leave_nothing_half_visible(place: Settings) -> None:
    async def main() -> None:
        async with await AsyncDelfIndex.open(settings=place) as index:
            await index.add(make_photo(0), "0")
            store, kinds = index._index.store, []
            for step in ("_delete_rows", "_write_features", "_write_images"):
                reached = asyncio.Event()
                tell = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, reached.set)
                original = getattr(store, step)

                def told(*arguments: Any, original: Any = original, tell: Any = tell) -> Any:
                    tell()
                    return original(*arguments)

                setattr(store, step, told)
                # Replaced while it is there, so that it must go before it comes back.
                adding = asyncio.ensure_future(index.add(make_photo(len(kinds) + 1), "0", {"year": len(kinds) + 1}))
                await reached.wait()
                adding.cancel()
                kinds.append(await asyncio.gather(adding, return_exceptions=True))
                delattr(store, step)
                while index._running:
                    await asyncio.sleep(0.01)
            assert [type(one) for (one,) in kinds] == [asyncio.CancelledError] * 3
            searching = asyncio.ensure_future(index.search(make_photo(3), include_unverified=True))
            await asyncio.sleep(0)
            searching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await searching

    asyncio.run(asyncio.wait_for(main(), 120))
    with DelfIndex.open(settings=place, create=False) as index:
        # What had begun was carried to its end, in order.
        assert index.show("0").metadata["year"] == 3
        assert index.search(make_photo(3), include_unverified=True).hits[0].image_id == "0"
        assert index.store.fsck().findings == []


def test_an_ingest_that_is_interrupted_keeps_whole_images_and_goes_on(place: Settings, tmp_path: Path) -> None:
    for seed in range(24):
        save_photo(tmp_path / "photos" / f"{seed:02}.png", make_photo(seed, 96, 96))

    def interrupt(progress: Progress) -> None:
        if progress.done == 18:
            raise KeyboardInterrupt

    with DelfIndex.open(settings=place) as index:
        report = index.ingest([tmp_path / "photos"], progress=interrupt)
        assert report.interrupted
        records = index.list()
        assert len(records) == report.added == 18
        checked = index.store.fsck()
        assert (checked.findings, checked.features) == ([], sum(record.feature_count for record in records))
        again = index.ingest([tmp_path / "photos"])
        assert (again.added, again.unchanged, again.interrupted) == (6, 18, False)
        assert index.store.fsck().findings == []


def in_child(function: Callable[[], object]) -> str:
    """What a forked process says of a call: its error, or "done". A signal ends it where it hangs."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        import signal

        signal.alarm(60)
        try:
            function()
            said = "done"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        said = answer.read().decode()
    _, status = os.waitpid(pid, 0)
    return said if status == 0 else f"ended with status {status}: {said}"


def use(settings: Settings) -> None:
    """What a process of its own does with the database of another one, on a server, or with one of its own."""
    with DelfIndex.open(settings=settings) as index:
        index.add(make_photo(2), "2")
        assert index.search(make_photo(2), include_unverified=True).hits[0].image_id == "2"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_index_in_a_forked_process_is_refused_in_one_sentence_and_a_spawned_one_works(
    place: Settings, tmp_path: Path
) -> None:
    elsewhere = place if place.uri.startswith("http") else place.model_copy(update={"uri": str(tmp_path / "own.db")})
    with DelfIndex.open(settings=place) as index:
        index.add(make_photo(1), "1")
        before = index.search(make_photo(1), include_unverified=True).hits[0].to_dict()
        for call in (
            index.list,
            lambda: index.search(make_photo(1)),
            lambda: index.match(make_photo(1), make_photo(1)),
            lambda: index.delete(["1"]),
            lambda: DelfIndex.open(settings=elsewhere),
        ):
            said = in_child(call)
            assert said.startswith(f"{UsageError.__name__}: "), said
            assert "start processes with the method spawn" in said
        # Nothing of this is closed or changed by what the forked process does.
        assert in_child(index._store.close) == "done"
        spawned = multiprocessing.get_context("spawn").Process(target=use, args=(elsewhere,))
        spawned.start()
        spawned.join(120)
        assert spawned.exitcode == 0
        assert index.search(make_photo(1), include_unverified=True).hits[0].to_dict()["inliers"] == before["inliers"]
