"""The store for an event loop: its reads of a search as coroutines, the rest through blocking calls in threads.

`Blocking` gives the methods of an `AsyncMilvusClient` as blocking calls, so that `FeatureStore` runs unchanged over the
one connection of a service: what it decides, checks and orders is written once. Such a call waits in its thread while
the client's event loop does the talking; it must never be made in that loop's own thread, which would wait for itself.

pymilvus unpacks a search's answer, some 0.1 s of computing for 500 x 120 hits, on the loop that its client belongs to.
So a client of our own has a loop of its own, in a thread (`ClientLoop`), and a service's loop is kept free.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from delf_milvus.errors import DatabaseError
from delf_milvus.store.connection import DeadlineError, NotLoadedError, asking_milvus
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.reading import left_out

if TYPE_CHECKING:
    from pymilvus import AsyncMilvusClient

T = TypeVar("T")

_GRACE_SECONDS = 5.0
"""How much longer than its own deadline a call may take: pymilvus's deadline is that of each of its tries."""

_ATTEMPTS = 4

InThread = Callable[..., Awaitable[Any]]
"""Runs a function in a thread, for a coroutine."""


class Blocking:
    """An `AsyncMilvusClient` as a client whose methods block, for use in other threads than the event loop's."""

    def __init__(self, client: AsyncMilvusClient, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            made = method(*arguments, **options)
            return self._wait(made, options.get("timeout")) if inspect.iscoroutine(made) else made

        return call

    def _wait(self, coroutine: Any, timeout: float | None) -> Any:
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:
            coroutine.close()
            raise DatabaseError("The event loop of this index has ended; open it again in the new one.") from None
        try:
            return future.result(None if timeout is None else timeout + _GRACE_SECONDS)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise DeadlineError(f"The database did not answer within {timeout:g} s.") from None
        except concurrent.futures.CancelledError:
            raise DatabaseError("The event loop of this index ended while it waited for the database.") from None


class ClientLoop:
    """An event loop in a thread of its own, for one client."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        # It ends with the process where nobody closes it.
        self._thread = threading.Thread(target=self.loop.run_forever, name="delf-milvus-client", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """End the loop and its thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        await asyncio.to_thread(self._thread.join)
        self.loop.close()


async def run_in(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine that belongs to a loop, which may be the running one; cancelled, it is cancelled there."""
    if loop is asyncio.get_running_loop():
        return await coroutine
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop))


class AsyncReads:
    """The two reads of a search over the connection of a store, awaited; answers are those of `FeatureStore`."""

    def __init__(
        self,
        store: FeatureStore,
        client: AsyncMilvusClient,
        loop: asyncio.AbstractEventLoop,
        in_thread: InThread,
        timeout: float,
    ) -> None:
        self._store = store
        self._client = client
        self._loop = loop
        self._in_thread = in_thread
        self._timeout = timeout

    async def search(self, calls: list[dict[str, Any]]) -> list[Any]:
        """The results of `FeatureStore.neighbour_calls`."""
        return [await self._reading("searching for neighbours", self._client.search, call) for call in calls]

    async def get(self, calls: list[dict[str, Any]]) -> list[Any]:
        """The results of `FeatureStore.stored_calls`."""
        return [await self._got(call) for call in calls]

    async def _got(self, call: dict[str, Any]) -> list[Any]:
        rows: list[Any] = []
        asked: dict[str, Any] | None = call
        while asked is not None:
            answer = await self._reading("reading images", self._client.get, asked)
            rows += answer
            asked = left_out(asked, answer)
        return rows

    async def _reading(self, doing: str, read: Callable[..., Coroutine[Any, Any, Any]], call: dict[str, Any]) -> Any:
        from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

        async def reload(_: RetryCallState) -> None:
            await self._in_thread(self._store.reload)

        async def patiently() -> Any:
            return await AsyncRetrying(**self._store.connection.patience())(self._asking, doing, read, call)

        # A writer may release a collection again before this reads it.
        released, stop = retry_if_exception_type(NotLoadedError), stop_after_attempt(_ATTEMPTS)
        return await AsyncRetrying(retry=released, stop=stop, before_sleep=reload, reraise=True)(patiently)

    async def _asking(self, doing: str, read: Callable[..., Coroutine[Any, Any, Any]], call: dict[str, Any]) -> Any:
        where = self._store.connection.where
        with asking_milvus(where, doing, self._timeout):
            try:
                asked = run_in(self._loop, read(**call, timeout=self._timeout))
                return await asyncio.wait_for(asked, self._timeout + _GRACE_SECONDS)
            except asyncio.TimeoutError:
                raise DeadlineError(
                    f"The database at {where} did not answer within {self._timeout:g} s while {doing}."
                ) from None
