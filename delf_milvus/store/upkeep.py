"""What an operator looks after: how far an index is built, what it needs in memory, and compaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from delf_milvus.errors import DatabaseError
from delf_milvus.store.connection import Connection

_POLL_SECONDS = 0.5
_COMPACTION_SECONDS = 6 * 3600.0
_ID_BYTES = 8


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


def index_bytes(index_type: str, index_params: Mapping[str, int], dim: int, rows: int) -> int:
    """About how much memory an index takes, in bytes: codes, ids, centres and links, without the fields beside it.

    Centres count once for each segment; one is assumed.
    """
    vector = 4 * dim
    lists = index_params.get("nlist", 0) * vector
    if index_type == "IVF_PQ":
        code = index_params.get("m", dim // 2) * index_params.get("nbits", 8) / 8
        return round(rows * (code + _ID_BYTES)) + lists + (vector << index_params.get("nbits", 8))
    if index_type in ("IVF_SQ8", "SCANN", "IVF_RABITQ"):
        code = {"IVF_SQ8": dim, "SCANN": dim / 4, "IVF_RABITQ": dim / 8 + 8}[index_type]
        return round(rows * (code + _ID_BYTES)) + lists
    if index_type == "IVF_FLAT":
        return rows * (vector + _ID_BYTES) + lists
    if index_type.startswith("HNSW"):
        # Twice M links of four bytes on the ground floor, about a tenth of that above it.
        return round(rows * (vector + 2.2 * 4 * index_params.get("M", 16)))
    return rows * vector


def build_progress(database: Connection, collection: str, vector: str) -> tuple[int, int]:
    """Rows that are indexed, and rows that an index is for, as the database tells: (0, 0) where it does not.

    On a server rows that were written a moment ago are no part of either: they are searched without an index.
    """
    found = database.call("reading the index", database.client.describe_index, collection, vector) or {}
    return int(found.get("indexed_rows", 0)), int(found.get("total_rows", 0))


def compact(
    database: Connection, collections: Sequence[str], progress: Callable[[str], None] | None = None
) -> CompactionReport:
    """Merge small segments and drop deleted rows, and wait until that is done. Raises DatabaseError.

    Milvus Lite does so by itself after each flush, so there the collections are flushed.
    """
    started = time.monotonic()
    client = database.client
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
            if progress is not None:
                progress(f"compacting {name}: {time.monotonic() - started:.0f} s")
            if time.monotonic() - started > _COMPACTION_SECONDS:
                raise DatabaseError(f"The compaction of {name} at {database.where} goes on: look again later.")
            time.sleep(_POLL_SECONDS)
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
