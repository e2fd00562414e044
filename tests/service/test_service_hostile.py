"""What strangers send to a service on purpose: requests of every kind that its own description allows or forbids, forms
in odd encodings, and bytes that are hardly HTTP."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import hypothesis
import pytest
from conftest import make_photo
from service.serving import Process, add, png, process, refusal, run, serving, settings_of

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis, of the extra test")

SECRET = "k" * 30


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("hostile")
    limits = {"REQUESTS_PER_MINUTE": "0", "MAX_PHOTO_BYTES": "300000", "HEAD_SECONDS": "2", "BODY_SECONDS": "3"}
    environment = {f"DELF_MILVUS_SERVICE__{name}": value for name, value in limits.items()}
    with process(folder, tiny_model, **environment) as started:
        started.ready()
        yield started


@pytest.mark.slow
def test_no_request_that_the_description_allows_or_forbids_makes_the_service_fail(served: Process) -> None:
    description = schemathesis.openapi.from_url(f"{served.address}/v1/openapi.json")
    operations = [found.ok() for found in description.get_all_operations()]
    assert {"/v1/search", "/v1/images", "/v1/images/{image_id}", "/v1/status"} <= {one.path for one in operations}
    modes = schemathesis.GenerationMode
    for operation in operations:
        for mode in (modes.POSITIVE, modes.NEGATIVE):
            # Not shrunk: over a network that takes minutes, and the failure names its request.
            @hypothesis.settings(
                max_examples=8,
                deadline=None,
                phases=[hypothesis.Phase.generate],
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def answered(case: Any) -> None:
                # What is longer than the head of a request may be ends in a closed connection, as it should.
                hypothesis.assume(len(f"{case.query} {case.headers} {case.path_parameters}") < 4000)
                case.call_and_validate(checks=[schemathesis.checks.not_a_server_error], timeout=60)

            # Of a path without anything to choose there is no wrong request.
            with contextlib.suppress(hypothesis.errors.Unsatisfiable, hypothesis.errors.InvalidArgument):
                answered()


@pytest.mark.parametrize(
    "charset",
    ["utf-16", "unicode_escape", "raw_unicode_escape", "undefined", "punycode", "idna", "utf-7", "rot13", "x" * 500],
)
def test_a_form_in_another_encoding_than_utf_8_is_refused(charset: str, tmp_path: Path, tiny_model: Path) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    photo = part % (b"photo", b'; filename="a.png"', png(make_photo(1, 64, 48)))
    body = part % (b"id", b"", rb"\ud800") + photo + part % (b"id", b"", b"b") + photo + b"--x--\r\n"

    async def main() -> None:
        async with serving(settings_of(tmp_path, tiny_model)) as (_, client):
            for kind in (
                f"multipart/form-data; boundary=x; charset={charset}",
                f'multipart/form-data; charset="{charset}";boundary=x',
            ):
                answer = await client.post("/v1/images", content=body, headers={"content-type": kind})
                refusal(answer, 415, "unsupported_media_type")
            # As text of UTF-8 the same id is harmless.
            kind = "multipart/form-data; boundary=x; charset=UTF-8"
            answer = await client.post("/v1/images", content=body, headers={"content-type": kind})
            assert answer.status_code == 201
            assert [one["image_id"] for one in answer.json()["stored"]] == [r"\ud800", "b"]

    run(main)


def exchanged(served: Process, data: bytes) -> bytes:
    """What a service answers to bytes on a connection, until it closes that, or the client has had its answer."""
    address = urlsplit(served.address)
    assert address.hostname is not None
    with socket.create_connection((address.hostname, address.port or 80), timeout=30) as connection:
        # It may answer and close before all of it is sent. To shut down what is closed already is no ConnectionError.
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65536):
                answer += piece
    return answer


HEAD = b"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\0" * 100_000,
        b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: y\r\n" * 50_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a\0b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil\r\n\r\n",
        b"GET /v1/images/%ff%fe%00..%2f..%2fetc HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 9" + b"9" * 400 + b"\r\n\r\nx",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\nx",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 100_000,
        HEAD + b"Content-Length: 100\r\n\r\nshort",
        HEAD + b"Expect: 100-continue\r\nContent-Length: 999999999\r\n\r\n",
        b"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        b"Content-Length: 700000\r\n\r\n--x\r\nContent-Disposition: " + b"a" * 699_900,
    ],
)
def test_bytes_that_are_hardly_http_end_in_a_refusal_or_a_closed_connection(served: Process, data: bytes) -> None:
    answer = exchanged(served, data)
    status = answer.split(b" ", 2)[1] if answer.startswith(b"HTTP/") else b""
    assert not status.startswith(b"5"), answer[:500]
    assert b"Traceback" not in answer
    assert answer.count(b"HTTP/1.1 200") <= 1
    assert httpx.get(f"{served.address}/healthz", timeout=30).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"GET / HT", HEAD + b"Content-Length: 1000\r\n\r\nsome"])
def test_a_client_that_stops_in_the_middle_is_hung_up_on(served: Process, sent: bytes) -> None:
    address = urlsplit(served.address)
    with socket.create_connection((address.hostname or "", address.port or 80), timeout=60) as connection:
        connection.sendall(sent)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
            if b"\r\n\r\n" in answer:
                break
    assert answer == b"" or b" 408 " in answer.split(b"\r\n")[0], answer


def test_no_address_of_a_stranger_is_fetched(tmp_path: Path, tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(1)
        address = f"http://127.0.0.1:{trap.getsockname()[1]}/photo.png"

        async def main() -> None:
            async with serving(settings_of(tmp_path, tiny_model, photos=[tmp_path], uploads=tmp_path / "up")) as (
                _,
                client,
            ):
                for data in ({"photo": address}, {"url": address}, {"uri": address}, {"id": address}):
                    for path in ("/v1/search", "/v1/images"):
                        answer = await client.post(path, data=data)
                        assert 400 <= answer.status_code < 500
                        answer = await client.post(path, json=data)
                        refusal(answer, 415, "unsupported_media_type")
                stored = await add(client, 1, address, link=address, photo=address)
                assert stored.status_code == 201
                quoted = address.replace("/", "%2F")
                assert (await client.get(f"/v1/images/{quoted}/photo")).content == png(make_photo(1))
                found = await client.post("/v1/search", content=png(make_photo(1)))
                assert found.json()["hits"][0]["image_id"] == address

        run(main)
        with pytest.raises(TimeoutError):
            trap.accept()


def test_neither_log_nor_metrics_nor_answers_tell_a_key(tmp_path: Path, tiny_model: Path) -> None:
    environment = {"DELF_MILVUS_SERVICE__WRITE_KEYS": SECRET, "DELF_MILVUS_SERVICE__READ_KEYS": "r" * 30}
    with process(tmp_path, tiny_model, **environment) as started:
        started.ready()
        with httpx.Client(base_url=started.address, headers={"Authorization": f"Bearer {SECRET}"}) as client:
            told = [
                client.get("/v1/status"),
                client.get("/metrics"),
                client.get("/v1/openapi.json"),
                client.post("/v1/search", content=b"no photo"),
                client.get("/v1/images", params={"filter": SECRET[:5] + " =="}),
                client.get("/v1/status", headers={"Authorization": f"Bearer {SECRET}x"}),
            ]
        started.running.terminate()
        started.ended()
    assert [one.status_code for one in told] == [200, 200, 200, 415, 200, 401]
    for text in [*(one.text + str(one.headers) for one in told), *started.lines]:
        assert SECRET not in text
        assert "r" * 30 not in text
