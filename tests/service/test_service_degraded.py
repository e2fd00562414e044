"""A service whose database hangs or is gone: 503 with Retry-After, at once once the breaker is open, and back again."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import make_photo
from faulty_proxy import FaultyProxy
from milvus_server import Server
from pymilvus import MilvusClient
from service.serving import add, cropped, png, refusal, run, serving, settings_of

from delf_milvus import DelfIndex, Settings
from delf_milvus.service.core import Service, limited

pytestmark = pytest.mark.server


@pytest.fixture
def proxy(milvus: Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(milvus.uri) as proxy:
        yield proxy


@pytest.fixture
def hasty(milvus: Server, proxy: FaultyProxy, tmp_path: Path, tiny_model: Path) -> Iterator[Settings]:
    """Settings of a service behind the proxy; three photos are stored."""
    settings = settings_of(tmp_path, tiny_model, breaker_failures=2, breaker_seconds=1000.0, request_seconds=30)
    name = f"d{uuid.uuid4().hex[:12]}"
    direct = settings.model_copy(update={"uri": milvus.uri, "collection": name})
    with DelfIndex.open(settings=direct) as index:
        for seed in range(3):
            index.add(make_photo(seed), f"{seed}.png")
    store = settings.store.model_copy(update={"consistency": "strong"})
    yield direct.model_copy(update={"uri": proxy.uri, "store": store})
    client = MilvusClient(milvus.uri, dedicated=True)
    for collection in client.list_collections():
        if collection.startswith(name):
            client.drop_collection(collection)
    client.close()


async def searched(client: httpx.AsyncClient) -> dict[str, object]:
    answer = await client.post("/v1/search", content=png(cropped(1)), params={"verified_only": False})
    assert answer.status_code == 200, answer.text
    return {key: value for key, value in answer.json().items() if key != "timings"}


def hurry(service: Service) -> None:
    """From here on it waits two seconds for its database; a machine under load may need longer before."""
    database, reads = service.index._index.store.connection, service.index._reads
    assert reads is not None
    database.timeout = reads._timeout = 2.0
    database.retry_seconds = 0.2


def patient(service: Service) -> None:
    """The opposite."""
    database, reads = service.index._index.store.connection, service.index._reads
    assert reads is not None
    database.timeout = reads._timeout = 10.0


async def opened(service: Service, client: httpx.AsyncClient, kind: str) -> None:
    """Ask until the breaker is open: each answer before is an error that says when to come back."""
    while service.breaker.state != "open":
        answers = await asyncio.gather(
            client.post("/v1/search", content=png(cropped(1))), client.get("/v1/images"), client.get("/v1/status")
        )
        for answer in answers:
            refusal(answer, 503, kind)
            assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("fault", ["silent", "refusing"])
def test_a_database_that_fails_is_left_alone_and_taken_up_again(
    hasty: Settings, proxy: FaultyProxy, fault: str
) -> None:
    async def main() -> None:
        async with serving(hasty) as (service, client):
            expected = await searched(client)
            assert (await client.get("/readyz")).json()["breaker"] == "closed"
            hurry(service)
            setattr(proxy, fault, True)
            if fault == "refusing":
                proxy.cut()
            await opened(service, client, "database_unavailable")
            asked = service.index._running.copy()
            for _ in range(3):
                for answer in (
                    await client.post("/v1/search", content=png(cropped(1))),
                    await add(client, 5),
                    await client.get("/v1/images"),
                    await client.delete("/v1/images/0.png"),
                ):
                    refusal(answer, 503, "database_unavailable")
                    assert int(answer.headers["retry-after"]) > 900
                ready = await client.get("/readyz")
                assert (ready.status_code, ready.json()["database"], ready.json()["breaker"]) == (503, False, "open")
            # Nothing was asked of it meanwhile.
            assert set(service.index._running) <= asked
            assert (await client.get("/healthz")).status_code == 200
            lines = (await client.get("/metrics")).text.splitlines()
            assert "delf_milvus_breaker_open 1.0" in lines
            assert f"delf_milvus_breaker_openings {float(service.breaker.opened)}" in lines
            proxy.heal()
            patient(service)
            service.breaker._until = time.monotonic()
            while (await client.get("/readyz")).status_code != 200:
                # gRPC may need a moment until it has connected again.
                service.breaker._until = time.monotonic()
                await asyncio.sleep(0.05)
            assert service.breaker.state == "closed"
            assert await searched(client) == expected
            assert [image["image_id"] for image in (await client.get("/v1/images")).json()["images"]] == [
                f"{seed}.png" for seed in range(3)
            ]
            assert "delf_milvus_breaker_open 0.0" in (await client.get("/metrics")).text.splitlines()

    run(main)


def test_a_request_tries_a_database_that_cooled_down_and_the_others_wait_for_its_answer(
    hasty: Settings, proxy: FaultyProxy
) -> None:
    async def main() -> None:
        async with serving(hasty) as (service, client):
            expected = await searched(client)
            hurry(service)
            proxy.silent = True
            await opened(service, client, "database_unavailable")
            service.breaker._until = time.monotonic()
            trial = asyncio.ensure_future(client.get("/v1/images"))
            while service.breaker.state != "trying":
                await asyncio.sleep(0.01)
            refusal(await client.get("/v1/images"), 503, "database_unavailable")
            openings = service.breaker.opened
            refusal(await trial, 503, "database_unavailable")
            assert (service.breaker.state, service.breaker.opened) == ("open", openings + 1)
            proxy.heal()
            patient(service)
            service.breaker._until = time.monotonic()
            assert await searched(client) == expected
            assert service.breaker.state == "closed"

    run(main)


def test_a_database_that_answers_later_than_a_request_may_take_is_a_504_and_a_failure(
    hasty: Settings, proxy: FaultyProxy
) -> None:
    brief = hasty.service.model_copy(update={"request_seconds": 1.0, "breaker_failures": 1})

    async def main() -> None:
        async with serving(hasty) as (service, client):
            await searched(client)
            service.settings = brief
            service.breaker._most = 1
            proxy.silent = True
            answer = await client.get("/v1/images")
            refusal(answer, 504, "timeout")
            assert int(answer.headers["retry-after"]) >= 1
            assert service.breaker.state == "open"

    run(main)


def test_a_service_waits_for_its_database_no_longer_than_a_client_for_it(tmp_path: Path, tiny_model: Path) -> None:
    settings = settings_of(tmp_path, tiny_model, request_seconds=20)
    assert settings.store.timeout == 60
    store = limited(settings).store
    assert (store.timeout, store.retry_seconds) == (10.0, 10.0)
    hurried = settings.model_copy(update={"store": settings.store.model_copy(update={"timeout": 3.0})})
    assert limited(hurried).store.timeout == 3.0
