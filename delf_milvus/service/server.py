"""Running the service: open the index, listen, load the model, and stop without breaking anything off.

Stopping (SIGTERM, SIGINT): no new connections, requests that have begun end within `drain_seconds`, then the index is
brought up to date and the database released. A second signal does not wait for the requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from delf_milvus.async_index import AsyncDelfIndex
from delf_milvus.errors import UsageError
from delf_milvus.service.access import check_listening
from delf_milvus.service.app import create_app
from delf_milvus.service.core import SPARE_THREADS, Service, limited
from delf_milvus.settings import ServiceSettings, Settings

log = logging.getLogger(__name__)

_SWITCH_SECONDS = 0.001
"""How long a thread may keep the interpreter from the others: the event loop waits for each that computes."""


async def serve(settings: Settings, listening: Callable[[str], None] | None = None) -> None:
    """Serve until a signal comes. listening: called with the address of the page once connections are accepted.

    Raises UsageError for settings that make no sense and an address that is taken, and what opening an index raises.
    """
    service = settings.service
    check_listening(service)
    sys.setswitchinterval(min(_SWITCH_SECONDS, sys.getswitchinterval()))
    # Taken first: an index is not opened for an address in use.
    with bound(service) as place:
        opening = AsyncDelfIndex.open(settings=limited(settings), threads=service.threads + SPARE_THREADS)
        async with await opening as index:
            await _run(Service(index), place, listening)


async def _run(service: Service, place: socket.socket, listening: Callable[[str], None] | None) -> None:
    settings = service.settings
    config = uvicorn.Config(
        create_app(service),
        http=_protocol(settings.head_seconds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies or None,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
    server = _Server(config)
    loading = asyncio.ensure_future(_loaded(service, server))
    with _on_signals(service, server):
        serving = asyncio.ensure_future(server.serve(sockets=[place]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        address = _address(place)
        log.info("listening", extra={"fields": {"address": address, "version": service.version}})
        if listening is not None:
            listening(address)
        await serving
        service.stopping = True
        await loading
        await service.aclose()
    log.info("stopped")


async def _loaded(service: Service, server: uvicorn.Server) -> None:
    """Load the model; a service without it ends."""
    try:
        await service.load_model()
    except BaseException:
        server.should_exit = True
        raise
    # Of what is loaded nothing ends before the service does. Without this, every full collection walks through all of
    # it while no thread runs: 0.15 s in which no health check is answered.
    gc.collect()
    gc.freeze()
    log.info("ready")


class _Server(uvicorn.Server):
    """The signals are ours: uvicorn's way ends the process before the index is closed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


@contextlib.contextmanager
def _on_signals(service: Service, server: uvicorn.Server) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.force_exit = server.should_exit
        server.should_exit = service.stopping = True

    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        for one in signals:
            loop.add_signal_handler(one, stop)
    except (NotImplementedError, RuntimeError, ValueError):
        # Another system, or another thread than the main one: whoever runs this stops it.
        yield
        return
    try:
        yield
    finally:
        for one in signals:
            loop.remove_signal_handler(one)


def bound(settings: ServiceSettings) -> socket.socket:
    """The socket that a service listens on. Raises UsageError for an address that cannot be had."""
    host = settings.host.strip("[]")
    family = socket.AF_INET6 if _is_ipv6(host) else socket.AF_INET
    try:
        place = socket.create_server((host, settings.port), family=family, backlog=512)
    except OSError as error:
        raise UsageError(
            f"Cannot listen on {settings.host} port {settings.port}: {error.strerror or error}; choose another --port."
        ) from error
    # Inherited by each connection. asyncio asks for it only where a socket names its protocol; without it the body of
    # an answer waits for the client to acknowledge its head, which systems put off for 40 ms.
    place.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return place


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def _address(place: socket.socket) -> str:
    host, port = place.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _protocol(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP with a bound on the time that the head of a request may take: it has none itself."""

    class Punctual(H11Protocol):
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.timer = self.loop.call_later(seconds, self.transport.close)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            waiting = self.cycle is None or self.cycle.response_complete
            if not waiting and self.timer is not None:
                self.timer.cancel()
                self.timer = None
            elif waiting and self.timer is None:
                self.timer = self.loop.call_later(seconds, self.transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None
            super().connection_lost(exc)

    return Punctual
