"""What the parts of a running service share: its index, its queue, its limits; and how work is done for a request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import version as installed_version
from typing import Any, TypeVar

from starlette.requests import Request

from delf_milvus.async_index import AsyncDelfIndex
from delf_milvus.errors import DelfMilvusError
from delf_milvus.service.access import Keys, RateLimit, Role, is_loopback
from delf_milvus.service.breaker import Breaker, OpenError
from delf_milvus.service.meters import Meters
from delf_milvus.service.photos import PhotoFolders
from delf_milvus.service.problems import ClientGoneError, RefusedError, database_unavailable
from delf_milvus.service.queue import FairQueue, QueueFullError
from delf_milvus.settings import Settings
from delf_milvus.store.connection import DeadlineError

T = TypeVar("T")

log = logging.getLogger(__name__)

SPARE_THREADS = 2
"""Threads of the index beside those that compute photos: for lists, deletions and counts."""

_PROBE_SECONDS = 3.0
_PROBE_VALID = 1.0
_PROXIED = frozenset({"localhost", "127.0.0.1", "[::1]"})


class _TooLateError(DeadlineError):
    """A request's time is up."""


@dataclass
class Visit:
    """One request, for the log: kind is that of its error, waited its seconds in the queue, received its bytes."""

    id: str
    client: str
    role: Role | None = None
    kind: str = ""
    rejected: bool = False
    waited: float = 0.0
    received: int = 0
    started: float = field(default_factory=time.perf_counter)


def limited(settings: Settings) -> Settings:
    """The settings of a service's index: uploads are smaller than what a folder may hold, and a database that is late
    or away is not waited for, twice and all, beyond the time in which a request must be answered."""
    service, decode, store = settings.service, settings.decode, settings.store
    pixels = min(service.max_pixels, decode.max_pixels)
    half = service.request_seconds / 2
    patience = {"timeout": min(store.timeout, half), "retry_seconds": min(store.retry_seconds, half)}
    return settings.model_copy(
        update={
            "decode": decode.model_copy(update={"max_pixels": pixels}),
            "store": store.model_copy(update=patience),
        }
    )


class Service:
    """A service over an index that is open, with `settings.service.threads + SPARE_THREADS` threads.

    It belongs to the event loop of the index. Raises UsageError for settings that make no sense.
    """

    def __init__(self, index: AsyncDelfIndex) -> None:
        whole = index.settings
        self.index = index
        self.settings = settings = whole.service
        self.keys = Keys(settings)
        self.names = (_PROXIED | {settings.host.lower()}) if is_loopback(settings.host) and not self.keys else None
        self.rate = RateLimit(settings.requests_per_minute)
        self.queue = FairQueue(settings.threads, settings.queue, settings.queue_each)
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_seconds)
        self.meters = Meters(self.queue, self.breaker)
        self.photos = PhotoFolders(settings.photos, settings.uploads, whole.decode, whole.store.tenant)
        self.version = installed_version("delf-milvus")
        self.started = time.monotonic()
        self.model_loaded = False
        self.stopping = False
        self.buffered = 0
        self.visits = 0
        self._files = ThreadPoolExecutor(2, "delf-milvus-photos")
        self._working: set[asyncio.Task[Any]] = set()
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        self._probe: asyncio.Task[int] | None = None
        self._probed = (False, float("-inf"))

    @property
    def uptime(self) -> float:
        """Seconds since the service was made."""
        return time.monotonic() - self.started

    async def load_model(self) -> None:
        """Load the network; until then the service is not ready. Raises ModelError."""
        await self.index.load_model()
        self.model_loaded = True

    async def compute(self, request: Request, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do work that takes a processor, when its turn has come.

        A request whose client leaves or whose time is up while it waits costs nothing. What has begun is carried to its
        end, as a thread cannot be stopped, and keeps its turn until then.

        Raises RefusedError (429 with a full queue, 503 at once while the breaker is open, 504), ClientGoneError, and
        what the work raises.
        """
        self._check_database()
        visit: Visit = request.state.visit
        deadline = time.monotonic() + self.settings.request_seconds
        gone = asyncio.ensure_future(_gone(request))
        try:
            await self._entered(visit, gone, deadline)
            working = asyncio.ensure_future(self._in_turn(work))
            self._working.add(working)
            working.add_done_callback(self._ended)
            await self._first(working, gone, deadline)
            return working.result()
        finally:
            gone.cancel()

    async def soon(self, quick: Awaitable[T]) -> T:
        """Something short, in time: raises RefusedError (504) after `request_seconds`."""
        try:
            return await asyncio.wait_for(quick, self.settings.request_seconds)
        except asyncio.TimeoutError:
            raise _late(self.settings.request_seconds) from None

    async def ask(self, quick: Callable[[], Awaitable[T]]) -> T:
        """Something short of the database, in time; raises as `soon`, and RefusedError (503) while the breaker is open.

        What is too late here counts as the database's failure.
        """

        self._check_database()
        try:
            with self.breaker.asking():
                return await self._in_time(quick)
        except _TooLateError:
            raise _late(self.settings.request_seconds) from None

    async def on_files(self, function: Callable[..., T], *arguments: Any) -> T:
        """A function that reads or writes photos on disk, in a thread."""
        loop = asyncio.get_running_loop()
        return await self.soon(loop.run_in_executor(self._files, function, *arguments))

    @asynccontextmanager
    async def alone(self, image_id: str) -> AsyncIterator[None]:
        """Nobody else adds or deletes this image meanwhile."""
        lock, users = self._locks.get(image_id) or (asyncio.Lock(), 0)
        self._locks[image_id] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks.pop(image_id)
            if users > 1:
                self._locks[image_id] = lock, users - 1

    async def database_answers(self) -> bool:
        """Whether the database answers now, or did a second ago. A question that is still open is not asked again.

        While the breaker is open it is not asked; once a trial may pass, this is one, whatever was answered before.
        """
        try:
            self.breaker.check()
        except OpenError:
            return False
        found, when = self._probed
        # An answer from before the breaker opened says nothing of now.
        if self.breaker.state == "closed" and time.monotonic() - when < _PROBE_VALID:
            return found
        if self._probe is None or self._probe.done():
            self._probe = asyncio.ensure_future(self._counted())
        try:
            await asyncio.wait_for(asyncio.shield(self._probe), _PROBE_SECONDS)
            found = True
        except (asyncio.TimeoutError, DelfMilvusError) as error:
            log.warning("the database does not answer", extra={"fields": {"error": str(error) or "too late"}})
            found = False
        self._probed = found, time.monotonic()
        return found

    async def _in_time(self, quick: Callable[[], Awaitable[T]]) -> T:
        try:
            return await asyncio.wait_for(quick(), self.settings.request_seconds)
        except asyncio.TimeoutError:
            raise _TooLateError from None

    async def _counted(self) -> int:
        with self.breaker.asking():
            return await self.index.count_images()

    def _check_database(self) -> None:
        try:
            self.breaker.check()
        except OpenError as error:
            raise database_unavailable(error.seconds) from None

    async def aclose(self) -> None:
        """Wait for the work that has begun."""
        self.stopping = True
        if self._working:
            await asyncio.wait(self._working)
        self._files.shutdown(wait=False)

    async def _entered(self, visit: Visit, gone: asyncio.Future[None], deadline: float) -> None:
        """Wait for a turn; whatever ends the waiting otherwise leaves none behind."""
        started = time.perf_counter()
        entering = asyncio.ensure_future(self.queue.enter(visit.client))
        try:
            await self._first(entering, gone, deadline)
        except QueueFullError as error:
            raise RefusedError(429, "queue_full", "Too many photos wait; try again later.", error.seconds) from None
        except BaseException:
            if entering.cancel():
                await asyncio.wait({entering})
            elif entering.exception() is None:
                self.queue.leave()
            raise
        finally:
            visit.waited += time.perf_counter() - started

    async def _in_turn(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        started = time.monotonic()
        try:
            # It may have opened while this waited.
            with self.breaker.asking():
                return await work()
        except OpenError as error:
            raise database_unavailable(error.seconds) from None
        finally:
            self.queue.leave(time.monotonic() - started)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._working.discard(task)
        # Told to nobody where the client did not wait for it.
        if not task.cancelled():
            task.exception()

    async def _first(self, task: asyncio.Future[Any], gone: asyncio.Future[None], deadline: float) -> None:
        """Wait for a task, the client's leaving or the deadline; raises what the task raises."""
        left = max(0.0, deadline - time.monotonic())
        await asyncio.wait({task, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        elif gone.done():
            raise ClientGoneError
        else:
            raise _late(self.settings.request_seconds)


def _late(seconds: float) -> RefusedError:
    return RefusedError(504, "timeout", f"There was no answer within {seconds:g} s; try again, or search for less.", 5)


async def _gone(request: Request) -> None:
    """Returns when the client has closed its connection; its request must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
