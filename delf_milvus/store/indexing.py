"""The life of an index: described, built, exchanged for another, dropped, repaired, loaded.

Each of the two collections has one index, on its vector field: that of the images is FLAT, that of the features is what
`profiles.choose` says. A server loads no collection without an index, so a collection that was left without one, by a
crash or by `drop`, has one again before it is loaded.

The fields that searches are filtered by have indexes too, which are made first: a server refuses to load again what was
loaded before one of them was there, so whoever finds the index of the vectors, while another makes them, may load.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from delf_milvus.errors import DatabaseError
from delf_milvus.settings import Profile, StoreSettings
from delf_milvus.store.connection import Connection
from delf_milvus.store.profiles import (
    METRIC,
    PROFILES,
    Engine,
    IndexProfile,
    Wishes,
    choose,
    memory_bytes,
    scalar_index,
    search_params,
)
from delf_milvus.store.schema import GLOBAL, Field

log = logging.getLogger(__name__)

FEATURE_VECTOR = "descriptor"

BUILD_SECONDS = 6 * 3600.0
"""Patience with what may build an index, seconds."""

_BUILD_PARAMS = ("nlist", "m", "nbits", "M", "efConstruction")
_FLAT = IndexProfile("FLAT", "FLAT")
_POLL_SECONDS = 0.5

_HANDOVER_SECONDS = 60.0
"""Patience with a server that is to search indexed segments instead of others; it takes some ten seconds."""

_TRAINED = 39
"""Rows for each list that faiss wants to see in training."""


class BuiltIndex(NamedTuple):
    """An index as Milvus describes it: its type, what it was built with, its state in Milvus's words, and how many of
    how many flushed rows it holds. pending_rows: those of merged or cleared segments that it does not hold yet; until
    it does, they are searched one by one."""

    type: str
    params: dict[str, int]
    state: str
    indexed_rows: int = 0
    total_rows: int = 0
    pending_rows: int = 0


NO_INDEX = BuiltIndex("none", {}, "no index")


@dataclass(frozen=True)
class BuildProgress:
    """How far a build is: its step ("flushing", "building" or "loading") and the rows in the index, of all."""

    step: str
    indexed: int
    total: int


Watcher = Callable[[BuildProgress], None]


@dataclass(frozen=True)
class IndexStatus:
    """What `delf-milvus index status` prints.

    asked: the setting. index: what there is, or "none". params: what it was built with; nlist counts per segment.
    search: what it is searched with. substitute_for: the index that it stands in for, or "". state: as Milvus says.
    indexed_rows, total_rows: flushed rows in the index, and all of them. segments, segment_rows: loaded segments, each
    with an index of its own, and the rows of the largest; 0 where the backend does not tell. memory_bytes: an estimate
    for the loaded features.
    """

    asked: str
    index: str
    params: Mapping[str, int]
    search: Mapping[str, float]
    substitute_for: str
    state: str
    indexed_rows: int
    total_rows: int
    segments: int
    segment_rows: int
    memory_bytes: int


def _unwatched(_: BuildProgress) -> None:
    pass


def vector_index(database: Connection, name: str, field: str) -> dict[str, Any]:
    """What the database tells of the index of a collection's vector field, which has that field's name; {} without one.

    Raises DatabaseError.
    """
    # Asked for an index that is not there, Milvus Lite describes that of another field, and fails if there are several.
    if field not in database.call("reading the indexes", database.client.list_indexes, name, field_name=field):
        return {}
    return database.call("reading the index", database.client.describe_index, name, field) or {}


class Indexing:
    """The indexes of one store's two collections.

    dim: gives the components of a descriptor. index_from: rows from which the profile "auto" is more than FLAT.
    filtered: gives the fields that searches of a collection are filtered by.
    """

    def __init__(
        self,
        database: Connection,
        features: str,
        images: str,
        settings: StoreSettings,
        dim: Callable[[], int],
        index_from: int,
        filtered: Callable[[str], Sequence[Field]] = lambda _: (),
    ) -> None:
        self._db = database
        self._client = database.client
        self._features = features
        self._vectors = {features: FEATURE_VECTOR, images: GLOBAL}
        self._settings = settings
        self.engine = Engine.of(database.version)
        self._dim = dim
        self._index_from = index_from
        self._filtered = filtered
        self._current = NO_INDEX
        self.outdated = False
        """Whether rows were written or deleted since the index was last brought up to date."""

    def profile(self, name: str, rows: int, asked: Profile | None = None) -> IndexProfile:
        """The index that a collection of so many rows shall have; `asked` instead of the setting.

        Raises UsageError for one that this server cannot build.
        """
        if name != self._features:
            return IndexProfile("auto", "AUTOINDEX") if self.engine.managed else _FLAT
        wishes = Wishes(self._settings.nlist, self._settings.m, self._settings.nbits)
        return choose(asked or self._settings.profile, self.engine, self._dim(), rows, self._index_from, wishes)

    def params(self, name: str, profile: IndexProfile, filtered: Sequence[Field] = ()) -> Any:
        """The indexes of fields that searches are filtered by, and then the profile, as pymilvus takes them."""
        vector = self._vectors[name]
        params = self._client.prepare_index_params()
        for field in filtered:
            if kind := scalar_index(field.type, self.engine):
                params.add_index(field.name, index_type=kind, index_name=field.name)
        params.add_index(
            vector,
            index_type=profile.index_type,
            index_name=vector,
            metric_type=METRIC,
            params=profile.build_params(self._db.backend),
        )
        return params

    def search_params(self, name: str, k: int) -> dict[str, Any]:
        """What to search k neighbours in a collection with, for the index that it was loaded with."""
        known = name == self._features
        return {"metric_type": METRIC, "params": self._search_params(self._current, k) if known else {}}

    def _search_params(self, index: BuiltIndex, k: int) -> dict[str, float]:
        own = self._settings
        return search_params(index.type, index.params, k, nprobe=own.nprobe, ef=own.ef, refine=own.refine)

    def described(self, name: str) -> BuiltIndex:
        """The index of a collection, or NO_INDEX."""
        found = vector_index(self._db, name, self._vectors[name])
        if not found:
            return NO_INDEX
        flat = {**found, **found.get("params", {})}
        params = {key: int(flat[key]) for key in _BUILD_PARAMS if key in flat}
        indexed, total, pending = (
            int(found.get(name) or 0) for name in ("indexed_rows", "total_rows", "pending_index_rows")
        )
        state = str(found.get("state", "unknown"))
        return BuiltIndex(
            str(found["index_type"]), params, state, min(indexed, max(0, total - pending)), total, pending
        )

    def status(self, k: int) -> IndexStatus:
        """The index of the features, which stay as they are: loaded or not. k: neighbours of a search."""
        index = self.described(self._features)
        rows = index.total_rows or self.flushed_rows(self._features)
        wanted = self.profile(self._features, rows)
        sizes: list[int] = []
        if index != NO_INDEX and self._db.backend == "server":
            # Not every server has this call; what is not loaded has no segments to tell.
            with suppress(DatabaseError), self._db.asking("listing segments"):
                segments = self._client.list_loaded_segments(self._features, timeout=self._settings.timeout)
                sizes = [int(segment.num_rows) for segment in segments]
        return IndexStatus(
            asked=self._settings.profile,
            index=index.type,
            params=index.params,
            search=self._search_params(index, k),
            substitute_for=wanted.substitute_for if wanted.index_type == index.type else "",
            state=index.state,
            indexed_rows=index.indexed_rows,
            total_rows=rows,
            segments=len(sizes),
            segment_rows=max(sizes, default=0),
            memory_bytes=memory_bytes(index.type, index.params, self._dim(), rows) if index != NO_INDEX else 0,
        )

    def begin(self, name: str, filtered: Sequence[Field]) -> None:
        """Give a collection without rows its indexes, and begin to load it. Errors are pymilvus's."""
        indexes = self.params(name, self.profile(name, 0), filtered)
        # There is nothing to build: pymilvus waits half a second for each all the same, unless told not to. A server
        # loads in seconds, and so both collections in the time of one: `load` waits.
        self._client.create_index(name, indexes, timeout=self._settings.timeout, sync=False)
        self._client.load_collection(name, timeout=self._settings.timeout, _async=True)

    def load(self, name: str) -> None:
        """Load a collection with an index, which is created where a crash left none.

        Milvus Lite releases an indexed collection whenever it is closed.
        """
        index = self._repaired(name)
        if name == self._features:
            self._current = index
        self._load(name)

    @property
    def least_segment(self) -> int:
        """Rows that a segment needs so that its lists are trained with enough; of the loaded index, 0 without lists."""
        return _TRAINED * self._current.params.get("nlist", 0)

    def flush(self, names: Sequence[str]) -> None:
        """Make segments of all rows of these loaded collections of Milvus Lite.

        Beside a flush its searches miss the rows that are being written (seen with 3.2.2). So the collections are
        released meanwhile: who reads them waits for the writer.
        """
        for name in names:
            self._release(name)
            self._flush(name)
            # Not `load`: to describe an index Milvus Lite counts rows, which takes longer than the flush in the end.
            self._load(name)

    def exchange(self, rows: int) -> None:
        """Give the features the index that so many rows ask for, and make all of them searchable.

        An index that fits stays. With the profile "auto" any index but FLAT stays until it has too few lists: somebody
        may have built it on purpose. The steps are those of `FeatureStore.ensure_index`.
        """
        found = self.described(self._features)
        wanted = self._grown(rows, found)
        if wanted is not None or self.outdated:
            self._replace(found, wanted, rows, _unwatched)

    def build(self, rows: int, asked: Profile | None, progress: Watcher | None) -> None:
        """Give the features exactly the index that is asked for, or that the settings ask for; steps as of `exchange`.

        Raises UsageError, before anything changes, for an index that this server cannot build.
        """
        wanted = self.profile(self._features, rows, asked)
        found = self.described(self._features)
        same = found.type == wanted.index_type and dict(found.params) == dict(wanted.index_params)
        watcher = progress or _unwatched
        self._replace(found, None if same else wanted, rows, watcher, whole=True)

    def put(self, profile: IndexProfile, rows: int) -> None:
        """Give the features this index, flushed and loaded."""
        self._replace(self.described(self._features), profile, rows, _unwatched)

    def await_all(self, name: str, progress: Watcher = _unwatched) -> None:
        """Wait until a server's index holds all that is flushed, and is what is searched if the collection is loaded.

        What was merged is searched as it was until then, but building its index takes the processors from searches
        where both share a machine. Raises DatabaseError.
        """
        if self._db.backend == "lite" or self.described(name) == NO_INDEX:
            return
        self._wait(name, "building the index", progress)
        give_up = time.monotonic() + _HANDOVER_SECONDS
        while self._is_handing_over(name) and time.monotonic() < give_up:
            time.sleep(_POLL_SECONDS)

    def _is_handing_over(self, name: str) -> bool:
        """Whether the segments that a loaded collection is searched in are not yet those that are kept."""
        # Not every server has these calls.
        with suppress(DatabaseError), self._db.asking("listing segments"):
            timeout = self._settings.timeout
            if self._client.get_load_state(name, timeout=timeout)["state"].name != "Loaded":
                return False
            kept = self._client.list_persistent_segments(name, timeout=timeout)
            searched = self._client.list_loaded_segments(name, timeout=timeout)
            return {one.segment_id for one in searched if one.state.name == "Sealed"} != {
                one.segment_id for one in kept if one.num_rows > 0 and one.state.name == "Flushed"
            }
        return False

    def drop(self) -> bool:
        """Release the features and drop their index; whether there was one."""
        found = self.described(self._features)
        if found == NO_INDEX:
            return False
        self._release(self._features)
        # So that what is counted without loading is all there is.
        self._flush(self._features)
        self._drop()
        return True

    def _grown(self, rows: int, found: BuiltIndex) -> IndexProfile | None:
        """The index that shall replace the one found, or None."""
        wanted = self.profile(self._features, rows)
        if self._settings.profile != "auto" or found.type in ("none", "FLAT"):
            return None if wanted.fits(found.type, found.params) else wanted
        lists = found.params.get("nlist")
        if found.type not in PROFILES or lists is None:
            return None
        code = Wishes(self._settings.nlist, found.params.get("m"), found.params.get("nbits"))
        again = choose(found.type, self.engine, self._dim(), rows, self._index_from, code)
        return again if again.index_params["nlist"] >= 4 * lists else None

    def _replace(
        self, found: BuiltIndex, wanted: IndexProfile | None, rows: int, progress: Watcher, *, whole: bool = False
    ) -> None:
        """Flush, build the wanted index instead of the one found, and load.

        whole: where the one found stays, wait until it holds all that is flushed.
        """
        progress(BuildProgress("flushing", 0, rows))
        if wanted is not None or self._db.backend == "lite":
            # Milvus Lite indexes in the background what is flushed while loaded, and says nothing when it is done.
            self._release(self._features)
        self._flush(self._features)
        if wanted is not None:
            if found != NO_INDEX:
                self._drop()
            # Milvus Lite has dropped the indexes of all fields.
            self._build(self._features, wanted, progress, self._missing(self._features))
        elif whole:
            self._wait(self._features, f"building the index {found.type}", progress)
        progress(BuildProgress("loading", rows, rows))
        self.load(self._features)
        self.outdated = False

    def _load(self, name: str) -> None:
        with self._db.building(), self._db.asking(f"loading {name!r}"):
            self._client.load_collection(name, timeout=BUILD_SECONDS)

    def _release(self, name: str) -> None:
        with self._db.asking(f"releasing {name!r}"):
            self._client.release_collection(name, timeout=self._settings.timeout)

    def _flush(self, name: str) -> None:
        with self._db.asking(f"flushing {name!r}"):
            self._client.flush(name, timeout=BUILD_SECONDS)

    def _drop(self) -> None:
        with self._db.asking("dropping the old index"):
            self._client.drop_index(self._features, FEATURE_VECTOR, timeout=self._settings.timeout)

    def _build(
        self,
        name: str,
        profile: IndexProfile,
        progress: Watcher = _unwatched,
        filtered: Sequence[Field] = (),
    ) -> None:
        doing = f"building the index {profile.index_type}"
        with self._db.building(), self._db.asking(doing):
            self._client.create_index(name, self.params(name, profile, filtered), timeout=BUILD_SECONDS, sync=False)
        self._wait(name, doing, progress)

    def _wait(self, name: str, doing: str, progress: Watcher) -> None:
        """Until every flushed row is in the index."""
        give_up = time.monotonic() + BUILD_SECONDS
        while True:
            index = self.described(name)
            progress(BuildProgress("building", index.indexed_rows, index.total_rows))
            if index.state == "Failed":
                raise DatabaseError(f"The database at {self._db.where} failed while {doing}; its log says why.")
            # A server calls an index finished while it is still building it for segments that it has merged.
            if (index.state == "Finished" and not index.pending_rows) or self._db.backend == "lite":
                return
            if time.monotonic() > give_up:
                raise DatabaseError(
                    f"The database at {self._db.where} is still {doing} after {BUILD_SECONDS / 3600:g} hours: "
                    "`delf-milvus index status` shows how far it is."
                )
            time.sleep(_POLL_SECONDS)

    def _repaired(self, name: str) -> BuiltIndex:
        found = self.described(name)
        if found != NO_INDEX:
            return found
        # An index that another thread is exchanging is missing only meanwhile: wait for that writer.
        with self._db.write_lock:
            found = self.described(name)
            if found != NO_INDEX:
                return found
            log.warning("the collection %s has no index: it is built before anything is read", name)
            self._build(name, self.profile(name, self.flushed_rows(name)), filtered=self._missing(name))
            return self.described(name)

    def _missing(self, name: str) -> list[Field]:
        """The fields that searches of a collection are filtered by, and that have no index."""
        there = self._db.call("reading the indexes", self._client.list_indexes, name)
        return [field for field in self._filtered(name) if field.name not in there]

    def flushed_rows(self, name: str) -> int:
        """About how many rows a collection has that may not be loaded: those flushed, some of them deleted."""
        with self._db.asking("estimating its size"):
            return int(self._client.get_collection_stats(name, timeout=self._settings.timeout)["row_count"])
