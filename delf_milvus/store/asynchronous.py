"""The store for an event loop: its reads of a search as coroutines, the rest through blocking calls in threads.

`Blocking` gives the methods of an `AsyncMilvusClient` as blocking calls, so that `FeatureStore` runs unchanged over the
one connection of a service: what it decides, checks and orders is written once. Such a call waits in its thread while
the event loop does the talking; it must never be made in the loop's own thread, which would wait for itself.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from delf_milvus.errors import DatabaseError
from delf_milvus.store.connection import NotLoadedError, asking_milvus
from delf_milvus.store.feature_store import FeatureStore

if TYPE_CHECKING:
    from pymilvus import AsyncMilvusClient

_GRACE_SECONDS = 5.0
"""How much longer than its own deadline a call may take: pymilvus's deadline is that of each of its tries."""

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

    def query_iterator(
        self, collection_name: str, *, batch_size: int, filter: str, output_fields: list[str], **options: Any
    ) -> _Pages:
        """Pages of a query in the order of the primary key: what the asynchronous client lacks."""
        described = self.describe_collection(collection_name, timeout=options.get("timeout"))
        primary = next(field["name"] for field in described["fields"] if field.get("is_primary"))

        def page(after: int | None) -> list[dict[str, Any]]:
            conditions = [f"({filter})"] if filter else []
            conditions += [f"{primary} > {after}"] if after is not None else []
            rows = self.query(
                collection_name,
                filter=" and ".join(conditions),
                output_fields=[primary, *output_fields],
                limit=batch_size,
                # Without these a server may return any rows that fit, not the first ones.
                iterator="True",
                reduce_stop_for_best="True",
                **options,
            )
            return list(rows)

        return _Pages(page, primary)

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
            raise DatabaseError(f"The database did not answer within {timeout:g} s.") from None
        except concurrent.futures.CancelledError:
            raise DatabaseError("The event loop of this index ended while it waited for the database.") from None


class _Pages:
    """What `MilvusClient.query_iterator` returns, as far as the store uses it."""

    def __init__(self, page: Callable[[int | None], list[dict[str, Any]]], primary: str) -> None:
        self._page = page
        self._primary = primary
        self._last: int | None = None
        self._done = False

    def next(self) -> list[dict[str, Any]]:
        """The next page; empty at the end."""
        rows = [] if self._done else self._page(self._last)
        self._done = not rows
        if rows:
            self._last = rows[-1][self._primary]
        return rows

    def close(self) -> None:
        """Nothing is held."""


class AsyncReads:
    """The two reads of a search over the connection of a store, awaited; answers are those of `FeatureStore`."""

    def __init__(self, store: FeatureStore, client: AsyncMilvusClient, in_thread: InThread, timeout: float) -> None:
        self._store = store
        self._client = client
        self._in_thread = in_thread
        self._timeout = timeout

    async def search(self, calls: list[dict[str, Any]]) -> list[Any]:
        """The results of `FeatureStore.neighbour_calls`."""
        return [await self._reading("searching for neighbours", self._client.search, call) for call in calls]

    async def get(self, calls: list[dict[str, Any]]) -> list[Any]:
        """The results of `FeatureStore.stored_calls`."""
        return [await self._reading("reading images", self._client.get, call) for call in calls]

    async def _reading(self, doing: str, read: Callable[..., Awaitable[Any]], call: dict[str, Any]) -> Any:
        try:
            return await self._asking(doing, read, call)
        except NotLoadedError:
            await self._in_thread(self._store.reload)
            return await self._asking(doing, read, call)

    async def _asking(self, doing: str, read: Callable[..., Awaitable[Any]], call: dict[str, Any]) -> Any:
        where = self._store.connection.where
        with asking_milvus(where, doing, self._timeout):
            try:
                return await asyncio.wait_for(read(**call, timeout=self._timeout), self._timeout + _GRACE_SECONDS)
            except asyncio.TimeoutError:
                raise DatabaseError(
                    f"The database at {where} did not answer within {self._timeout:g} s while {doing}."
                ) from None
