"""`delf-milvus serve` as a process: health beside heavy work, stopping, leaving, what is logged, what is refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from conftest import make_photo
from service.serving import READ, RUN, WRITE, Process, png, process

from delf_milvus import DelfIndex, Settings
from delf_milvus.service.server import bound
from delf_milvus.settings import ServiceSettings


def connected(running: Process) -> socket.socket:
    place = urlsplit(running.address)
    return socket.create_connection((place.hostname, place.port), timeout=30)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A service with the bundled model, whose photos take a while."""
    with process(tmp_path_factory.mktemp("bundled"), None, "--threads", "2") as running:
        running.ready()
        yield running


def test_health_is_told_at_once_while_photos_are_extracted(bundled: Process) -> None:
    photo = png(make_photo(1, 640, 480))
    done = threading.Event()

    def search(_: int) -> int:
        with httpx.Client(base_url=bundled.address, timeout=120) as client:
            return client.post("/v1/search", content=photo).status_code

    def watch() -> list[float]:
        seconds = []
        with httpx.Client(base_url=bundled.address, timeout=30) as client:
            while not done.is_set():
                started = time.perf_counter()
                assert client.get("/healthz").status_code == 200
                seconds.append(time.perf_counter() - started)
                time.sleep(0.02)
        return seconds

    with ThreadPoolExecutor(7) as pool:
        watching = pool.submit(watch)
        started = time.perf_counter()
        assert set(pool.map(search, range(6))) == {200}
        each = (time.perf_counter() - started) / 6
        done.set()
        seconds = watching.result()
    # None waited for a photo, let alone for all six.
    assert len(seconds) > 5
    assert statistics.median(seconds) < each / 4


def test_a_client_that_leaves_is_noticed_and_its_photo_not_computed(bundled: Process) -> None:
    photo = png(make_photo(2, 640, 480))
    head = f"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(photo)}\r\n\r\n".encode()
    before = len(bundled.log("request"))
    leaving = [connected(bundled) for _ in range(6)]
    for one in leaving:
        one.sendall(head + photo)
    time.sleep(0.3)
    for one in leaving:
        one.close()
    until = time.monotonic() + 60
    while time.monotonic() < until:
        told = httpx.get(f"{bundled.address}/v1/status", timeout=30).json()["service"]
        gone = [line for line in bundled.log("request")[before:] if line.get("error") == "client_gone"]
        if told["running"] == told["waiting"] == 0 and len(gone) == 6:
            break
        time.sleep(0.05)
    assert len(gone) == 6
    assert all(line["status"] == 499 for line in gone)
    text = httpx.get(f"{bundled.address}/metrics").text
    finished = next(
        line for line in text.splitlines() if line.startswith('delf_milvus_errors_total{kind="client_gone"}')
    )
    assert float(finished.split()[-1]) >= 6


def test_a_stop_waits_for_what_has_begun_and_keeps_it(tmp_path: Path) -> None:
    with process(tmp_path, None, "--uploads", "uploads") as running:
        running.ready()
        with ThreadPoolExecutor(2) as pool, httpx.Client(base_url=running.address, timeout=120) as client:
            photo = png(make_photo(3, 640, 480))
            adding = pool.submit(client.post, "/v1/images?id=kept", content=photo)
            until = time.monotonic() + 30
            while httpx.get(f"{running.address}/v1/status").json()["service"]["running"] == 0:
                assert time.monotonic() < until
                assert not adding.done()
            running.running.send_signal(signal.SIGTERM)
            assert adding.result().status_code == 201
        assert running.ended() == 0
        assert running.log("stopped")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{running.address}/healthz")
    settings = Settings(extract={"preset": "fast"})
    with DelfIndex.open(tmp_path / "photos.db", settings=settings, create=False) as index:
        assert [record.image_id for record in index.list()] == ["kept"]
        assert Path(index.show("kept").uri).read_bytes() == photo


def test_a_head_that_does_not_end_is_not_waited_for(tmp_path: Path, tiny_model: Path) -> None:
    with process(tmp_path, tiny_model, DELF_MILVUS_SERVICE__HEAD_SECONDS="0.5") as running:
        running.ready()
        with connected(running) as silent, connected(running) as slow:
            slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: a")
            for one in (silent, slow):
                started = time.monotonic()
                assert one.recv(1000) == b""
                assert time.monotonic() - started < 10
        # A second request on the same connection is held to it too, and a whole one is answered.
        with connected(running) as again:
            again.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            answer = b""
            while not answer.endswith(b"ok\n"):
                answer += again.recv(4000)
            assert b"200 OK" in answer
            again.sendall(b"GET /healthz HTTP/1.1\r\nHost: a")
            assert again.recv(1000) == b""


def test_a_large_body_is_refused_and_the_client_sees_why(tmp_path: Path, tiny_model: Path) -> None:
    with process(tmp_path, tiny_model, DELF_MILVUS_SERVICE__MAX_PHOTO_BYTES="100000") as running:
        running.ready()
        answer = httpx.post(f"{running.address}/v1/search", content=bytes(1_000_000), timeout=30)
        assert (answer.status_code, answer.json()["error"]["kind"]) == (413, "body_too_large")
        nonsense = connected(running)
        nonsense.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
        assert b"400" in nonsense.recv(4000)
        assert httpx.get(f"{running.address}/healthz").text == "ok\n"


def test_the_log_is_lines_of_json_without_secrets(tmp_path: Path, tiny_model: Path) -> None:
    keys = {"DELF_MILVUS_SERVICE__READ_KEYS": READ, "DELF_MILVUS_SERVICE__WRITE_KEYS": WRITE}
    with process(tmp_path, tiny_model, "--host", "0.0.0.0", **keys) as running:
        running.ready()
        port = urlsplit(running.address).port
        headers = {"Authorization": f"Bearer {READ}", "X-Request-ID": "mine"}
        address = f"http://127.0.0.1:{port}/v1/images/a%0Ab?secret=query"
        assert httpx.get(address, headers=headers).status_code == 404
        running.running.send_signal(signal.SIGINT)
        assert running.ended() == 0
    (line,) = [line for line in running.log("request") if line["id"] == "mine"]
    assert (line["method"], line["status"], line["error"]) == ("GET", 404, "not_found")
    assert line["seconds"] >= 0
    assert line["client"].startswith("key:")
    for text in running.lines:
        assert json.loads(text) if text.startswith("{") else "serves on" in text
        assert READ not in text
        assert "secret=query" not in text


def refused(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [*RUN, "--uri", "photos.db", "serve", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr


def test_what_makes_no_sense_is_refused_in_one_sentence(tmp_path: Path) -> None:
    for arguments, word in (
        (("--host", "0.0.0.0"), "--insecure"),
        (("--host", "no such host", "--insecure"), "--port"),
        (("--port", "70000"), "service.port"),
        (("--photos", "nowhere"), "nowhere"),
        (("--threads", "0"), "service.threads"),
    ):
        code, text = refused(tmp_path, *arguments)
        assert code == 2
        assert word in text
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, text = refused(tmp_path, "--port", str(taken.getsockname()[1]))
        assert (code, "another --port" in text) == (2, True)
    code, text = refused(tmp_path, DELF_MILVUS_SERVICE__READ_KEYS="short")
    assert (code, "openssl" in text) == (2, True)
    assert refused(tmp_path, DELF_MILVUS_URI="x", DELF_MILVUS_MODEL="none.safetensors")[0] == 4


def test_no_answer_waits_for_the_client_to_acknowledge_its_head() -> None:
    with bound(ServiceSettings(port=0)) as place, socket.create_connection(place.getsockname()):
        connection, _ = place.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
