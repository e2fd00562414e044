"""Compaction: small segments merged, deleted rows dropped, and the index of what is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from delf_milvus.errors import DatabaseError
from delf_milvus.store.connection import Connection
from delf_milvus.store.indexing import Indexing

_POLL_SECONDS = 0.5
_COMPACTION_SECONDS = 6 * 3600.0


@dataclass(frozen=True)
class CompactionReport:
    """What `compact` did. segments_before, segments_after: of both collections, where the server tells. what: a
    sentence."""

    segments_before: int | None
    segments_after: int | None
    seconds: float
    what: str

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return asdict(self)


def compact(
    database: Connection, indexing: Indexing, collections: Sequence[str], progress: Callable[[str], None] | None = None
) -> CompactionReport:
    """Merge small segments and drop deleted rows, and wait until what was merged is indexed. Raises DatabaseError.

    Milvus Lite does so by itself after each flush, so there the collections are flushed.
    """
    started = time.monotonic()
    client = database.client

    def tell(doing: str) -> None:
        if progress is not None:
            progress(f"{doing}: {time.monotonic() - started:.0f} s")

    for name in collections:
        # Only what is flushed can be compacted.
        with database.building(), database.asking("flushing"):
            client.flush(name, timeout=_COMPACTION_SECONDS)
    if database.backend == "lite":
        what = "Milvus Lite compacts by itself after each flush; both collections are flushed."
        return CompactionReport(None, None, time.monotonic() - started, what)
    before = _segments(database, collections)
    for name in collections:
        with database.asking("starting the compaction"):
            job = client.compact(name, timeout=database.timeout)
        if job < 0:
            continue
        while database.call("compacting", client.get_compaction_state, job) != "Completed":
            tell(f"compacting {name}")
            if time.monotonic() - started > _COMPACTION_SECONDS:
                raise DatabaseError(f"The compaction of {name} at {database.where} goes on: look again later.")
            time.sleep(_POLL_SECONDS)
    for name in collections:
        indexing.await_all(name, lambda _: tell("indexing what was merged"))
    after = _segments(database, collections)
    told = "" if before is None or after is None else f": {before} segments before, {after} now"
    return CompactionReport(before, after, time.monotonic() - started, f"Compacted{told}.")


def _segments(database: Connection, collections: Sequence[str]) -> int | None:
    """Flushed segments with rows; None where the server does not tell."""
    try:
        return sum(
            sum(one.num_rows > 0 and one.state.name == "Flushed" for one in found)
            for found in (
                database.call("listing segments", database.client.list_persistent_segments, name)
                for name in collections
            )
        )
    except DatabaseError:
        return None
