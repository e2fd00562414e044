"""Who may ask the service, from where, and how often."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import make_photo
from service.serving import READ, WRITE, add, client_of, png, refusal, run, serving, settings_of

from delf_milvus.errors import UsageError
from delf_milvus.service.access import Keys, RateLimit, check_listening, check_same_site, is_loopback
from delf_milvus.service.door import OPEN
from delf_milvus.service.problems import RefusedError
from delf_milvus.settings import ServiceSettings

KEYS: dict[str, Any] = {"read_keys": f"{READ}, {READ}2", "write_keys": WRITE}


def test_reading_takes_a_read_key_and_writing_a_write_key(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with serving(settings_of(tmp_path, tiny_model, **KEYS)) as (service, nobody):
            async with client_of(service, READ) as reader, client_of(service, WRITE) as writer:
                assert (await add(writer, 1)).status_code == 201
                for client in (reader, writer):
                    assert (await client.post("/v1/search", content=png(make_photo(1)))).status_code == 200
                    for path in ("/v1/images", "/v1/images/1.png", "/v1/status", "/metrics"):
                        assert (await client.get(path)).status_code == 200
                refusal(await add(reader, 2), 403, "forbidden")
                refusal(await reader.delete("/v1/images/1.png"), 403, "forbidden")
                assert (await reader.get("/v1/status")).json()["service"]["may_write"] is False
                assert (await writer.delete("/v1/images/1.png")).status_code == 200
            for path in ("/v1/images", "/v1/images/1.png", "/v1/images/1.png/photo", "/v1/status", "/metrics"):
                answer = await nobody.get(path)
                refusal(answer, 401, "unauthorized")
                assert answer.headers["www-authenticate"] == "Bearer"
            for path in OPEN:
                assert (await nobody.get(path)).status_code == 200, path
            for given in (f"Bearer {READ}x", f"Bearer {READ[:-1]}", "Bearer ", f"Basic {READ}", READ, "Bearer \xe9"):
                headers = {"Authorization": given.encode("latin-1")}
                refusal(await nobody.get("/v1/status", headers=headers), 401, "unauthorized")

    run(main)


def test_read_keys_alone_let_nobody_write(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with serving(settings_of(tmp_path, tiny_model, read_keys=READ), READ) as (_, client):
            refusal(await add(client, 1), 403, "forbidden")

    run(main)


def test_a_key_in_both_lists_may_write_and_a_short_one_is_refused() -> None:
    assert Keys(ServiceSettings(read_keys=READ, write_keys=READ)).role(READ) == "write"
    assert not Keys(ServiceSettings(read_keys=" , "))
    with pytest.raises(UsageError, match="openssl"):
        Keys(ServiceSettings(read_keys="short"))


def test_no_key_is_logged_or_told(tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def main() -> str:
        async with serving(settings_of(tmp_path, tiny_model, **KEYS)) as (service, nobody):
            async with client_of(service, READ) as reader:
                told = (await reader.get("/v1/status")).text + (await reader.get("/metrics")).text
            return told + (await nobody.get("/v1/status", headers={"Authorization": "Bearer guessed-key-guess"})).text

    text = run(main) + "".join(str(record.__dict__) for record in caplog.records)
    assert "'event'" in text or "request" in text
    assert READ not in text
    assert WRITE not in text
    assert "guessed-key" not in text


def test_other_hosts_and_pages_of_other_sites_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with serving(settings_of(tmp_path, tiny_model)) as (_, client):
            for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8080", "", "[::2]"):
                refusal(await client.get("/v1/status", headers={"Host": host}), 403, "host_not_allowed")
                refusal(await client.get("/", headers={"Host": host}), 403, "host_not_allowed")
            for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:8080"):
                assert (await client.get("/v1/status", headers={"Host": host})).status_code == 200
            for headers in (
                {"Origin": "http://evil.example"},
                {"Origin": "null"},
                {"Origin": "http://127.0.0.1:9"},
                {"Sec-Fetch-Site": "cross-site"},
                {"Sec-Fetch-Site": "same-site"},
            ):
                answer = await client.post("/v1/search", content=png(make_photo(1)), headers=headers)
                refusal(answer, 403, "foreign_origin")
            own = {"Origin": "http://127.0.0.1:8080", "Sec-Fetch-Site": "same-origin"}
            assert (await client.post("/v1/search", content=png(make_photo(1)), headers=own)).status_code == 200
            # A link of another site may lead to the page, which says nothing.
            followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
            assert (await client.get("/", headers=followed)).status_code == 200
            # Health is asked for by address, from anywhere.
            assert (await client.get("/healthz", headers={"Host": "10.0.0.7"})).status_code == 200

    run(main)


def test_with_keys_any_name_of_the_host_will_do() -> None:
    check_same_site(httpx_headers({"host": "photos.example"}), None)
    with pytest.raises(RefusedError):
        check_same_site(httpx_headers({"host": "photos.example", "origin": "https://evil.example"}), None)
    check_same_site(httpx_headers({"host": "photos.example", "origin": "https://photos.example"}), None)


def httpx_headers(headers: dict[str, str]) -> Any:
    from starlette.datastructures import Headers

    return Headers(headers)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "photos.example", ""])
def test_listening_beyond_this_machine_takes_keys_or_a_word(host: str) -> None:
    with pytest.raises(UsageError, match="--insecure"):
        check_listening(ServiceSettings(host=host))
    check_listening(ServiceSettings(host=host, read_keys=READ))
    check_listening(ServiceSettings(host=host, insecure=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost"])
def test_this_machine_needs_neither(host: str) -> None:
    assert is_loopback(host)
    check_listening(ServiceSettings(host=host))


def test_a_client_that_asks_too_often_waits_and_others_do_not(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        settings = settings_of(tmp_path, tiny_model, **KEYS, requests_per_minute=3)
        async with serving(settings) as (service, nobody):
            reader, writer = client_of(service, READ), client_of(service, WRITE)
            async with reader, writer:
                for _ in range(3):
                    assert (await reader.get("/v1/images")).status_code == 200
                answer = await reader.get("/v1/images")
                refusal(answer, 429, "rate_limited")
                assert 1 <= int(answer.headers["retry-after"]) <= 20
                assert (await writer.get("/v1/images")).status_code == 200
                # Guessing keys counts for the address.
                kinds = [(await nobody.get("/v1/images")).status_code for _ in range(4)]
                assert kinds == [401, 401, 401, 429]
                assert (await reader.get("/healthz")).status_code == 200

    run(main)


def test_buckets_fill_with_time_and_are_of_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("delf_milvus.service.access.time.monotonic", lambda: now[0])
    monkeypatch.setattr("delf_milvus.service.access._CLIENTS", 10)
    rate = RateLimit(60)
    for _ in range(60):
        rate.take("a")
    with pytest.raises(RefusedError) as refused:
        rate.take("a")
    assert refused.value.retry_after == pytest.approx(1)
    now[0] = 1.0
    rate.take("a")
    with pytest.raises(RefusedError):
        rate.take("a")
    for number in range(100):
        rate.take(f"client {number}")
    assert len(rate._buckets) == 10
    for _ in range(1000):
        RateLimit(0).take("a")


def test_every_answer_tells_browsers_not_to_guess(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with serving(settings_of(tmp_path, tiny_model)) as (_, client):
            given = {"X-Request-ID": "trace-1.2_3"}
            for answer in (
                await client.get("/", headers=given),
                await client.get("/v1/status", headers=given),
                await client.get("/nowhere", headers=given),
                await client.get("/v1/status", headers={**given, "Host": "evil.example"}),
            ):
                policy = answer.headers["content-security-policy"]
                assert "default-src 'none'" in policy
                assert "unsafe" not in policy
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert answer.headers["x-request-id"] == "trace-1.2_3"
                assert "server" not in answer.headers
            for bad in ("x" * 65, "a b", 'a"b'):
                answer = await client.get("/healthz", headers={"X-Request-ID": bad})
                assert answer.headers["x-request-id"] != bad
            page = await client.get("/")
            etag = {"If-None-Match": page.headers["etag"]}
            assert (await client.get("/", headers=etag)).status_code == 304

    run(main)


def test_the_page_is_small_and_asks_nobody_else() -> None:
    folder = Path(__file__).parents[2] / "delf_milvus" / "service" / "page"
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    assert sum(len(text.encode()) for text in texts.values()) < 150_000
    for name, text in texts.items():
        for address in ("http://", "https://", "//cdn"):
            found = text.replace("http://www.w3.org/2000/svg", "")
            assert address not in found, name
    assert "<script>" not in texts["index.html"]
    assert "style=" not in texts["index.html"]
    assert " on" + "click=" not in texts["index.html"]
    assert "innerHTML" not in texts["app.js"]


def test_the_client_gets_the_door_s_answers(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with serving(settings_of(tmp_path, tiny_model, connections=1)) as (service, client):
            service.visits = 1
            answer = await client.get("/v1/status")
            refusal(answer, 503, "too_busy")
            assert (await client.get("/healthz")).status_code == 200
            service.visits = 0
            service.stopping = True
            refusal(await client.get("/v1/status"), 503, "stopping")

    run(main)
    assert httpx.codes.SERVICE_UNAVAILABLE == 503
