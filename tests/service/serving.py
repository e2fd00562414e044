"""A service for tests: in this process over ASGI, or as a process of its own, with a tiny model and Milvus Lite."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
from conftest import RgbImage, make_photo

from delf_milvus import AsyncDelfIndex, Settings
from delf_milvus.service.app import create_app
from delf_milvus.service.core import SPARE_THREADS, Service, limited
from delf_milvus.settings import ExtractSettings, ServiceSettings, StoreSettings

READ, WRITE = "r" * 20, "w" * 20
HERE = "http://127.0.0.1:8080"
RUN = [sys.executable, "-c", "from delf_milvus.cli.main import run; run()"]


def png(photo: RgbImage) -> bytes:
    """The photo as the bytes of a file."""
    return cv2.imencode(".png", cv2.cvtColor(photo, cv2.COLOR_RGB2BGR))[1].tobytes()


def cropped(seed: int) -> RgbImage:
    return np.ascontiguousarray(make_photo(seed)[20:220, 30:290])


def settings_of(folder: Path, model: Path, **service: Any) -> Settings:
    """Settings of a small service whose database lies in a folder."""
    return Settings(
        uri=str(folder / "photos.db"),
        model=str(model),
        extract=ExtractSettings(scales=(0.5, 1.0), longest_side=320, stored_features=60, query_features=60),
        store=StoreSettings(fields={"year": "integer=0"}),
        service=ServiceSettings(**service),
    )


@contextlib.asynccontextmanager
async def serving(settings: Settings, key: str = "") -> AsyncIterator[tuple[Service, httpx.AsyncClient]]:
    """A service, its model loaded, and a client of it; both over no network."""
    threads = settings.service.threads + SPARE_THREADS
    async with await AsyncDelfIndex.open(settings=limited(settings), threads=threads) as index:
        service = Service(index)
        await service.load_model()
        async with client_of(service, key) as client:
            yield service, client
        await service.aclose()


def client_of(service: Service, key: str = "") -> httpx.AsyncClient:
    """A client of a service in this process."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(create_app(service))
    return httpx.AsyncClient(transport=transport, base_url=HERE, headers=headers, timeout=60)


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(main(), 120))


async def add(client: httpx.AsyncClient, seed: int, image_id: str = "", **metadata: Any) -> httpx.Response:
    """Store a generated photo."""
    return await client.post(
        "/v1/images",
        files={"photo": (f"{seed}.png", png(make_photo(seed)))},
        data={"id": image_id or f"{seed}.png", "metadata": json.dumps(metadata)},
    )


def refusal(response: httpx.Response, status: int, kind: str) -> str:
    """The sentence of an answer that is an error; fails where it is another or of another shape."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    assert response.json()["error"].keys() == {"kind", "message"}
    assert response.json()["error"]["kind"] == kind
    message: str = response.json()["error"]["message"]
    assert "Traceback" not in message
    assert message.endswith(".")
    return message


class SlowSearches:
    """Makes the searches of a service wait for `go_on`, one thread each; `begun` counts them."""

    def __init__(self, service: Service) -> None:
        self.go_on = threading.Event()
        self.begun = 0
        self.order: list[bytes] = []
        index = service.index._index
        search = index.search

        def slow(photo: bytes, *arguments: Any, **options: Any) -> Any:
            self.begun += 1
            self.order.append(photo)
            assert self.go_on.wait(20)
            return search(photo, *arguments, **options)

        index.search = slow  # type: ignore[assignment]

    async def until(self, begun: int) -> None:
        """Wait until so many have begun."""
        while self.begun < begun:
            await asyncio.sleep(0.005)


class Process:
    """`delf-milvus serve` as a process."""

    def __init__(self, folder: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        self.folder = folder
        command = [*RUN, "--uri", "photos.db", "serve", "--port", "0", *arguments]
        self.running = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self.address = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.running.stderr is not None
        for line in self.running.stderr:
            self.lines.append(line.rstrip("\n"))
            if not self.address and "serves on" in line:
                self.address = line.split("serves on ")[1].split()[0]

    def ready(self) -> None:
        """Wait until it can search."""
        until = time.monotonic() + 90
        while time.monotonic() < until:
            assert self.running.poll() is None, self.lines
            with contextlib.suppress(httpx.HTTPError):
                if self.address and httpx.get(f"{self.address}/readyz").status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(self.lines)

    def ended(self, seconds: float = 60) -> int:
        """Wait for its end; its exit code."""
        code = self.running.wait(seconds)
        self._reader.join(10)
        return code

    def log(self, event: str) -> list[dict[str, Any]]:
        """The log's lines of an event."""
        found = [json.loads(line) for line in self.lines if line.startswith("{")]
        return [line for line in found if line["event"] == event]


@contextlib.contextmanager
def process(folder: Path, model: Path | None = None, *arguments: str, **environment: str) -> Iterator[Process]:
    """A service as a process, with the tiny model, or the bundled one in the fast preset."""
    given = {"DELF_MILVUS_EXTRACT__PRESET": "fast", "OMP_WAIT_POLICY": "PASSIVE"}
    if model is not None:
        given |= {
            "DELF_MILVUS_MODEL": str(model),
            "DELF_MILVUS_EXTRACT__SCALES": "[0.5, 1.0]",
            "DELF_MILVUS_EXTRACT__LONGEST_SIDE": "320",
            "DELF_MILVUS_STORE__FIELDS": '{"year": "integer=0"}',
        }
    started = Process(folder, arguments, given | environment)
    try:
        yield started
    finally:
        started.running.kill()
        started.ended()
