"""AsyncDelfIndex: `DelfIndex` for services that run on an event loop.

- Decoding, the network, voting, matching and verification run in a bounded pool of threads; the event loop only waits
  for them and for the database.
- The stages, their order and their answers are those of `DelfIndex`: every step is the same function.
- On a Milvus server one `AsyncMilvusClient` does all the talking, on an event loop of its own, because it computes
  there too; one that is handed in stays on its own loop, which then has that work. pymilvus's asynchronous client
  cannot create collections on Milvus Lite, so there the synchronous store runs in the pool.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from delf_milvus.errors import DatabaseError, UsageError
from delf_milvus.features import Box, Features, Fingerprint
from delf_milvus.imaging.decode import Source
from delf_milvus.index import DelfIndex, Query, candidates_of, named_of
from delf_milvus.matcher import PairResult
from delf_milvus.retrieval.answers import Hit, SearchResult, hits_of, late_hits, late_keys
from delf_milvus.retrieval.search import Judgement, asks_globally, judge
from delf_milvus.retrieval.second_look import agreed, looked_twice, widened
from delf_milvus.retrieval.shortlist import NOBODY, Shortlist, shortlist
from delf_milvus.retrieval.voting import vote
from delf_milvus.settings import SearchSettings, Settings, VerifySettings
from delf_milvus.store import connection
from delf_milvus.store.asynchronous import AsyncReads, Blocking, ClientLoop, run_in
from delf_milvus.store.filters import Filter
from delf_milvus.store.hits import answer_arrays, joined_hits
from delf_milvus.store.records import ImageRecord

if TYPE_CHECKING:
    from pymilvus import AsyncMilvusClient

T = TypeVar("T")

log = logging.getLogger(__name__)


class AsyncDelfIndex:
    """Photos in Milvus, searchable by what they show, for an event loop.

    `async with await AsyncDelfIndex.open(uri) as index: result = await index.search(photo)`. Any number of calls may
    run at once, on the event loop that it was opened in; at most `threads` of them compute. A cancelled call stops at
    its next wait: a search leaves nothing behind, while a write or deletion that has begun is carried to its end.
    """

    def __init__(
        self,
        index: DelfIndex,
        pool: ThreadPoolExecutor,
        client: AsyncMilvusClient | None = None,
        home: ClientLoop | None = None,
    ) -> None:
        """Not called by users: `open` does."""
        self._index = index
        self._pool = pool
        self._client = client
        self._home = home
        self._running: set[Future[Any]] = set()
        self._closing: asyncio.Task[None] | None = None
        self._opened = self
        store, timeout = index.store, index.settings.store.timeout
        loop = home.loop if home else asyncio.get_running_loop()
        self._reads = None if client is None else AsyncReads(store, client, loop, self._in_thread, timeout)

    @classmethod
    async def open(
        cls,
        uri: str | Path | None = None,
        *,
        client: AsyncMilvusClient | None = None,
        collection: str | None = None,
        token: str | None = None,
        model: str | Path | None = None,
        settings: Settings | None = None,
        create: bool = True,
        any_model: bool = False,
        made_by: Fingerprint | None = None,
        threads: int = 4,
    ) -> AsyncDelfIndex:
        """Open the database at `uri`, a path (embedded) or http(s)://host:port, or the one that `client` talks to.

        client: of a Milvus server, in use on this event loop; it is never closed here, and unpacks its answers on this
        loop, which takes some 0.1 s a search. threads: that compute at once.
        The rest, and the errors, as for `DelfIndex`. Raises UsageError for a client of Milvus Lite.
        """
        if threads < 1:
            raise UsageError(f"The number of threads must be at least 1, not {threads}.")
        settings = (settings or Settings()).with_database(None if uri is None else str(uri), token)
        made = functools.partial(
            DelfIndex,
            collection=collection,
            model=model,
            settings=settings,
            create=create,
            any_model=any_model,
            made_by=made_by,
        )
        pool = ThreadPoolExecutor(threads, "delf-milvus")
        owned: AsyncMilvusClient | None = None
        home: ClientLoop | None = None
        try:
            if client is None and not connection.is_server(settings.uri):
                return cls(await _run(pool, made), pool)
            where = "the given client's server"
            if client is None:
                secret = settings.token.get_secret_value()
                where = connection.server_name(settings.uri, settings.store)
                options = connection.server_options(settings.uri, secret, settings.store)
                home = ClientLoop()
                client = owned = await run_in(home.loop, _connected(options, where))
            blocking = Blocking(client, home.loop if home else asyncio.get_running_loop())

            def opened() -> DelfIndex:
                database = connection.adopt(blocking, settings.store.timeout, where, settings.store.retry_seconds)
                if database.backend == "lite":
                    raise UsageError(
                        "pymilvus's asynchronous client cannot create collections on Milvus Lite: open its path."
                    )
                return made(client=database)

            return cls(await _run(pool, opened), pool, client, home)
        except BaseException:
            pool.shutdown(wait=False)
            if home is not None:
                if owned is not None:
                    await run_in(home.loop, owned.close())
                await home.close()
            raise

    @property
    def settings(self) -> Settings:
        """The settings that the index was opened with."""
        return self._index.settings

    def searching(self, search: SearchSettings | None = None, verify: VerifySettings | None = None) -> AsyncDelfIndex:
        """This index with other settings for searches alone; it closes with this one."""
        other = copy.copy(self)
        other._index = self._index.searching(search, verify)
        return other

    async def load_model(self) -> None:
        """Load the network now instead of at the first photo. Raises ModelError."""
        await self._in_thread(self._index.load_model)

    async def count_images(self) -> int:
        """Images in the collection, as the database says now. Raises DatabaseError."""
        return await self._in_thread(self._index.store.count_images)

    async def search(
        self,
        image: Source | Features,
        top_k: int | None = None,
        *,
        box: Box | None = None,
        filter: Filter = "",
        include_unverified: bool = False,
    ) -> SearchResult:
        """Find the stored images that show the same thing as a photo; arguments and errors as of `DelfIndex.search`.

        The timings of its result include the waiting for a thread and for the database.
        """
        reads = self._reads
        if reads is None:
            return await self._in_thread(
                self._index.search, image, top_k, box=box, filter=filter, include_unverified=include_unverified
            )
        queries = await self._in_thread(self._index.queries, image, top_k, box)
        found = [
            await self._hits(reads, query, filter, include_unverified and number == 0)
            for number, query in enumerate(queries)
        ]
        return await self._in_thread(self._index.result, queries, found, top_k)

    async def _hits(self, reads: AsyncReads, query: Query, filter: Filter, include_unverified: bool) -> list[Hit]:
        """The hits of one view, as `answers.answer` finds them."""
        if not len(query.features):
            return []
        verify, calibration = self._index.settings.verify, self._index.calibration
        judged = await self._judged(reads, query, query.features, filter)
        wide = await self._in_thread(widened, query.features, judged, query.search, calibration, query.box)
        if wide is not None:
            second = await self._judged(reads, query, wide, filter)
            judged = await self._in_thread(looked_twice, query.features, judged, second, verify, query.timings)
        judged = await self._in_thread(agreed, judged, query.search, verify, calibration, query.timings)
        hits = await self._in_thread(
            hits_of,
            query.features,
            judged,
            query.search,
            verify,
            calibration,
            query_box=query.box,
            include_unverified=include_unverified,
        )
        late = late_keys(judged, query.search, hits, include_unverified)
        if len(late):
            with query.timings.measure("geometry"):
                calls = await self._in_thread(self._index.store.named_calls, late.tolist())
                rows = await reads.get(calls)
                # A thousand rows are too many to read on the event loop.
                records = await self._in_thread(self._index.store.named_answer, late.tolist(), rows)
            hits += late_hits(judged, named_of(records), query.search, hits)
        return hits

    async def _judged(self, reads: AsyncReads, query: Query, features: Features, filter: Filter) -> Judgement:
        """The candidates of these features, the query's or a widened one's."""
        store, search = self._index.store, query.search
        descriptors, neighbours = features.descriptors, search.neighbours
        globally: list[dict[str, Any]] = []
        with query.timings.measure("neighbours"):
            calls = await self._in_thread(store.neighbour_calls, descriptors, neighbours, filter)
            if asks_globally(features, search):
                globally = await self._in_thread(
                    store.similar_calls, features.global_descriptor, search.similar_images, filter
                )
            results = await reads.search(calls)
            alike = await reads.search(globally)

        def voted() -> tuple[Shortlist, list[int], list[dict[str, Any]]]:
            with query.timings.measure("neighbours"):
                parts = [answer_arrays(result, neighbours) for result in results]
                keys, similarities = joined_hits(parts, len(descriptors), neighbours)
                found = [answer_arrays(result, search.similar_images) for result in alike]
                similar = store.similar_answer(found) if found else NOBODY
            with query.timings.measure("vote"):
                chosen = shortlist(vote(keys, similarities), *similar, search.global_weight)
            wanted = chosen.images[: search.candidates].tolist()
            return chosen, wanted, store.stored_calls(wanted)

        chosen, wanted, calls = await self._in_thread(voted)
        with query.timings.measure("geometry"):
            rows = await reads.get(calls)

        def verified() -> Judgement:
            with query.timings.measure("geometry"):
                stored = candidates_of(store.stored_answer(wanted, rows))
            return judge(features, chosen, stored, search, self._index.settings.verify, query.timings)

        return await self._in_thread(verified)

    async def match(self, first: Source, second: Source) -> PairResult:
        """Compare two photos; the database is not used. Raises ImageError."""
        return await self._in_thread(self._index.match, first, second)

    async def add(self, image: Source, image_id: str, metadata: Mapping[str, Any] | None = None, uri: str = "") -> int:
        """Store one photo; arguments, result and errors as of `DelfIndex.add`.

        The synchronous store writes, in a thread: the order of its steps and its lock are what keeps images whole. So a
        call that is cancelled once it has begun is completed nevertheless.
        """
        return await self._in_thread(self._index.add, image, image_id, metadata, uri)

    async def delete(self, image_ids: Sequence[str]) -> list[str]:
        """Delete images, in a thread as `add` does; returns the ids that were there. Raises DatabaseError."""
        return await self._in_thread(self._index.delete, image_ids)

    async def list(
        self, prefix: str = "", limit: int | None = None, *, after: str = "", filter: Filter = ""
    ) -> list[ImageRecord]:
        """The stored images whose id starts with `prefix`, in order of their ids; arguments as of `DelfIndex.list`."""
        return await self._in_thread(self._index.list, prefix, limit, after=after, filter=filter)

    async def show(self, image_id: str) -> ImageRecord:
        """What is stored of one image; raises NotFoundError."""
        return await self._in_thread(self._index.show, image_id)

    async def status(self) -> dict[str, Any]:
        """Database, collection, index and model, as plain values."""
        return await self._in_thread(self._index.status)

    async def aclose(self) -> None:
        """Wait for what is running in threads, bring the index up to date if photos were added, and release the
        database unless its client was handed in. Once begun it is carried to its end, also when cancelled; calls that
        have further steps to take fail meanwhile."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def __aenter__(self) -> AsyncDelfIndex:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _close(self) -> None:
        try:
            if running := [asyncio.wrap_future(future) for future in list(self._running)]:
                await asyncio.wait(running)
            await _run(self._pool, self._index.close)
        finally:
            self._pool.shutdown(wait=False)
            if self._home is not None and self._client is not None:
                await run_in(self._home.loop, self._client.close())
                await self._home.close()

    async def _in_thread(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        if self._opened._closing is not None:
            raise DatabaseError("This index has been closed; open it again.")
        return await _run(self._pool, functools.partial(function, *arguments, **options), self._running)


async def _run(pool: ThreadPoolExecutor, function: Callable[[], T], running: set[Future[Any]] | None = None) -> T:
    """Run a function in the pool, noted in `running` until it ends, which may be after the caller was cancelled."""
    future = pool.submit(contextvars.copy_context().run, function)
    if running is not None:
        running.add(future)
        future.add_done_callback(running.discard)
    waited: T = await asyncio.wrap_future(future)
    return waited


async def _connected(options: dict[str, Any], where: str) -> AsyncMilvusClient:
    from pymilvus import AsyncMilvusClient

    client = AsyncMilvusClient(**options)
    try:
        with connection.asking_milvus(where, "connecting", options["timeout"]):
            await client.get_server_version(timeout=options["timeout"])
    except BaseException:
        await client.close()
        raise
    return client
