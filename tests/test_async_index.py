"""AsyncDelfIndex gives the answers of DelfIndex, on a Milvus server and on Milvus Lite, and never blocks its loop."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RgbImage, make_photo, the_same
from milvus_server import Server, servers
from model.models import write_tiny_model
from pymilvus import AsyncMilvusClient, MilvusClient

from delf_milvus import AsyncDelfIndex, DelfIndex, Settings
from delf_milvus.errors import CollectionError, DatabaseError, NotFoundError, UsageError
from delf_milvus.settings import ExtractSettings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    model = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")
    extract = ExtractSettings(scales=(0.5, 1.0), longest_side=320, stored_features=60, query_features=60)
    return Settings(model=str(model), extract=extract)


@pytest.fixture(params=["lite", *servers(pytest.mark.server)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Settings with a database and a collection of their own."""
    settings: Settings = request.getfixturevalue("settings")
    name = f"a{uuid.uuid4().hex[:12]}"
    if request.param == "lite":
        yield settings.model_copy(update={"uri": str(tmp_path / "photos.db"), "collection": name})
        return
    server: Server = request.getfixturevalue(f"{request.param}_server")
    yield settings.model_copy(update={"uri": server.uri, "collection": name})
    drop(server.uri, name)


def drop(uri: str, name: str) -> None:
    client = MilvusClient(uri, dedicated=True)
    for collection in client.list_collections():
        if collection.startswith(name):
            client.drop_collection(collection)
    client.close()


def cropped(seed: int) -> RgbImage:
    return np.ascontiguousarray(make_photo(seed)[20:220, 30:290])


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(main(), 120))


def test_answers_and_errors_are_those_of_the_synchronous_index(
    place: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("delf_milvus.store.reading._PAGE", 2)

    other = place.model_copy(update={"extract": place.extract.model_copy(update={"scales": (1.0,)})})

    async def twin() -> tuple[list[Any], list[str], dict[str, Any]]:
        async with await AsyncDelfIndex.open(settings=place) as index:
            empty = await index.search(cropped(0))
            assert (empty.matched, empty.hits) == (False, [])
            counts = await asyncio.gather(*(index.add(make_photo(s), f"{s}.png", {"seed": s}) for s in range(6)))
            assert min(counts) > 20
            for seed in (6, 7):
                await index.add(make_photo(seed), f"{seed}.png")
                assert [record.image_id for record in await index.list(f"{seed}")] == [f"{seed}.png"]
                assert len(await index.list()) == seed + 1
            await index.delete(["6.png", "7.png"])
            assert await index.delete(["5.png", "missing"]) == ["5.png"]
            with pytest.raises(NotFoundError):
                await index.show("5.png")
            assert (await index.show("4.png")).metadata == {"seed": 4}
            listed = [record.image_id for record in await index.list()]
            found = await asyncio.gather(
                *(index.search(cropped(s), top_k=3, include_unverified=True) for s in (0, 1, 2, 3)),
                index.search(cropped(1), box=(0, 0, 200, 150), include_unverified=True),
                index.search(np.full((64, 64, 3), 127, np.uint8), include_unverified=True),
            )
            pair = await index.match(cropped(2), make_photo(2))
            with pytest.raises(UsageError, match="at least 1"):
                await index.search(cropped(1), top_k=0)
            with pytest.raises(CollectionError, match="another model"):
                await AsyncDelfIndex.open(settings=other)
            return [*found, pair], listed, await index.status()

    *found, pair = (results := run(twin))[0]
    _, listed, status = results
    with DelfIndex.open(settings=place, create=False) as index:
        assert [record.image_id for record in index.list()] == listed == [f"{s}.png" for s in range(5)]
        expected = [index.search(cropped(s), top_k=3, include_unverified=True) for s in (0, 1, 2, 3)]
        expected.append(index.search(cropped(1), box=(0, 0, 200, 150), include_unverified=True))
        expected.append(index.search(np.full((64, 64, 3), 127, np.uint8), include_unverified=True))
        assert [[hit.to_dict() for hit in r.hits] for r in found] == [the_same(r.hits) for r in expected]
        assert found[0].hits
        assert found[0].to_dict().keys() == expected[0].to_dict().keys()
        assert found[0].timings.neighbours > 0
        assert pair.inliers == index.match(cropped(2), make_photo(2)).inliers
        assert (status["images"], status["collection"]) == (5, place.collection)


def test_images_that_only_have_votes_are_those_of_the_synchronous_index(place: Settings) -> None:
    few = place.model_copy(update={"search": place.search.model_copy(update={"candidates": 2})})

    async def searched() -> Any:
        async with await AsyncDelfIndex.open(settings=few) as index:
            for seed in range(4):
                await index.add(make_photo(seed), f"{seed}.png", {"seed": seed})
            return await index.search(cropped(1), include_unverified=True)

    found = run(searched)
    with DelfIndex.open(settings=few, create=False) as index:
        expected = index.search(cropped(1), include_unverified=True)
    assert [hit.to_dict() for hit in found.hits] == [hit.to_dict() for hit in expected.hits]
    assert sorted(hit.metadata["seed"] for hit in found.hits) == [0, 1, 2, 3]
    assert [hit.putatives for hit in found.hits[2:]] == [0, 0]


def test_a_second_look_is_that_of_the_synchronous_index(place: Settings) -> None:
    twice = place.model_copy(update={"search": place.search.model_copy(update={"expand": 2, "agreement": 1})})

    async def looked() -> list[Any]:
        async with await AsyncDelfIndex.open(settings=twice) as index:
            for seed in range(4):
                await index.add(make_photo(seed), f"{seed}.png")
            return [await index.search(cropped(seed), include_unverified=True) for seed in range(2)]

    found = run(looked)
    with DelfIndex.open(settings=twice, create=False) as index:
        expected = [index.search(cropped(seed), include_unverified=True) for seed in range(2)]
    assert [[hit.to_dict() for hit in r.hits] for r in found] == [[h.to_dict() for h in r.hits] for r in expected]
    with DelfIndex.open(settings=place, create=False) as index:
        once = [index.search(cropped(seed), include_unverified=True) for seed in range(2)]
    # Proof is that of the query itself, however many look with it.
    for wide, plain in zip(expected, once, strict=True):
        inliers = {hit.image_id: (hit.inliers, hit.transform) for hit in plain.hits}
        assert {hit.image_id: (hit.inliers, hit.transform) for hit in wide.hits} == inliers


def test_several_views_are_those_of_the_synchronous_index(place: Settings) -> None:
    views = place.model_copy(update={"search": place.search.model_copy(update={"parts": True, "turned": True})})

    async def searched() -> Any:
        async with await AsyncDelfIndex.open(settings=views) as index:
            for seed in range(4):
                await index.add(make_photo(seed), f"{seed}.png")
            return await index.search(np.rot90(cropped(1)), top_k=3, include_unverified=True)

    found = run(searched)
    with DelfIndex.open(settings=views, create=False) as index:
        expected = index.search(np.rot90(cropped(1)), top_k=3, include_unverified=True)
    assert len(found.hits) == 3
    assert [hit.to_dict() for hit in found.hits] == [hit.to_dict() for hit in expected.hits]


def test_the_loop_runs_on_while_threads_compute(place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with await AsyncDelfIndex.open(settings=place, threads=1) as index:
            await index.add(make_photo(1), "1.png")
            extracting, go_on = threading.Event(), threading.Event()
            queries = index._index.queries

            def slow(*arguments: Any) -> Any:
                extracting.set()
                # Set by the event loop alone: it would time out if the search kept the loop busy.
                assert go_on.wait(30)
                return queries(*arguments)

            monkeypatch.setattr(index._index, "queries", slow)
            if index._reads is None:
                monkeypatch.setattr(index._index, "search", lambda *a, **k: slow(*a)[0].result([]))
            searching = asyncio.ensure_future(index.search(cropped(1)))
            while not extracting.is_set():
                await asyncio.sleep(0.01)
            assert not searching.done()
            go_on.set()
            assert (await searching).query_features > 0

    run(main)


def test_searches_go_on_beside_a_writer_that_flushes(place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    # Milvus Lite's collections are released for the time of a flush.
    monkeypatch.setattr("delf_milvus.store.writing._FLUSHED", 1)

    async def main() -> None:
        async with await AsyncDelfIndex.open(settings=place) as index:
            await index.add(make_photo(0), "0.png")

            async def write() -> None:
                for seed in range(1, 6):
                    await index.add(make_photo(seed), f"{seed}.png")

            async def search() -> list[Any]:
                return [await index.search(cropped(0), include_unverified=True) for _ in range(8)]

            _, *found = await asyncio.gather(write(), search(), search())
            assert [one.hits[0].image_id for many in found for one in many] == ["0.png"] * 16

    run(main)


def test_a_cancelled_call_leaves_whole_images_and_a_usable_index(place: Settings) -> None:
    async def main() -> None:
        async with await AsyncDelfIndex.open(settings=place) as index:
            await index.add(make_photo(0), "0.png")
            for delay in (0.0, 0.02, 0.1, 0.2):
                tasks = [asyncio.ensure_future(index.search(cropped(0)))]
                tasks += [asyncio.ensure_future(index.add(make_photo(s), f"{s}.png")) for s in (0, 1, 2)]
                await asyncio.sleep(delay)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        # Closing waits for what had begun: until then "0.png" may be in the middle of being replaced.
        with DelfIndex.open(settings=place, create=False) as index2:
            assert index2.search(make_photo(0), include_unverified=True).hits[0].image_id == "0.png"
            records = index2.list()
            assert sum(record.feature_count for record in records) == index2.status()["features"]
            assert "0.png" in [record.image_id for record in records]

    run(main)


def test_closing_waits_for_a_write_and_refuses_what_comes_after(place: Settings) -> None:
    async def main() -> None:
        index = await AsyncDelfIndex.open(settings=place)
        writing = asyncio.ensure_future(index.add(make_photo(1), "1.png"))
        await asyncio.sleep(0)
        await asyncio.gather(index.aclose(), index.aclose())
        assert await writing > 0
        with pytest.raises(DatabaseError, match="closed"):
            await index.search(cropped(1))
        await index.aclose()

    run(main)
    with DelfIndex.open(settings=place, create=False) as index:
        assert [record.image_id for record in index.list()] == ["1.png"]


@pytest.mark.server
def test_a_client_that_was_handed_in_is_used_and_stays_open(milvus: Server, settings: Settings) -> None:
    name = f"a{uuid.uuid4().hex[:12]}"

    async def main() -> None:
        client = AsyncMilvusClient(milvus.uri)
        async with await AsyncDelfIndex.open(client=client, collection=name, settings=settings) as index:
            await index.add(make_photo(1), "1.png")
            # Somebody releases the collection: it is loaded again.
            await client.release_collection(f"{name}_features")
            assert (await index.search(make_photo(1), include_unverified=True)).hits[0].image_id == "1.png"
        assert f"{name}_images" in await client.list_collections()
        await client.close()

    try:
        run(main)
    finally:
        drop(milvus.uri, name)


def test_a_client_of_an_embedded_database_is_refused(tmp_path: Path, settings: Settings) -> None:
    async def main() -> None:
        client = AsyncMilvusClient(str(tmp_path / "photos.db"))
        with pytest.raises(UsageError, match="open its path"):
            await AsyncDelfIndex.open(client=client, settings=settings)
        await client.close()

    run(main)


def test_an_unreachable_server_and_no_threads_are_said_at_once() -> None:
    async def main() -> None:
        with pytest.raises(UsageError, match="threads"):
            await AsyncDelfIndex.open("http://127.0.0.1:9", threads=0)
        with pytest.raises(DatabaseError, match="Cannot reach"):
            await AsyncDelfIndex.open("http://127.0.0.1:9")

    run(main)
