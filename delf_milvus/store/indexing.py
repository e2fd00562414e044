"""The life of an index: described, built, exchanged for another, repaired, loaded.

Each of the two collections has one index, on its vector field: that of the images is FLAT, that of the features is what
`profiles.choose` says. A server loads no collection without an index, so a collection that a crash left without one has
one again before it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from delf_milvus.settings import StoreSettings
from delf_milvus.store.connection import Connection
from delf_milvus.store.profiles import METRIC, IndexProfile, choose, search_params

FEATURE_VECTOR = "descriptor"
IMAGE_VECTOR = "global_descriptor"

BUILD_SECONDS = 6 * 3600.0
"""Patience with what may build an index, seconds."""

_BUILD_PARAMS = ("nlist", "m", "nbits", "M", "efConstruction")
_FLAT = IndexProfile("FLAT", "FLAT")


class BuiltIndex(NamedTuple):
    """An index as Milvus describes it: its type, what it was built with, and its state in Milvus's words."""

    type: str
    params: dict[str, int]
    state: str


NO_INDEX = BuiltIndex("none", {}, "no index")


class Indexing:
    """The indexes of one store's two collections.

    dim: gives the components of a descriptor. index_from: rows from which the profile "auto" is more than FLAT.
    """

    def __init__(
        self,
        database: Connection,
        features: str,
        images: str,
        settings: StoreSettings,
        dim: Callable[[], int],
        index_from: int,
    ) -> None:
        self._db = database
        self._client = database.client
        self._features = features
        self._vectors = {features: FEATURE_VECTOR, images: IMAGE_VECTOR}
        self._settings = settings
        self._dim = dim
        self._index_from = index_from
        self._current = NO_INDEX

    def profile(self, name: str, rows: int) -> IndexProfile:
        """The index that a collection of so many rows shall have."""
        if name != self._features:
            return _FLAT
        return choose(self._settings.profile, self._db.backend, self._dim(), rows, self._index_from)

    def params(self, name: str, profile: IndexProfile) -> Any:
        """The profile as pymilvus takes it."""
        vector = self._vectors[name]
        params = self._client.prepare_index_params()
        params.add_index(
            vector,
            index_type=profile.index_type,
            index_name=vector,
            metric_type=METRIC,
            params=profile.build_params(self._db.backend),
        )
        return params

    def search_params(self, k: int) -> dict[str, Any]:
        """What to search k neighbours with, for the index that the features were loaded with."""
        index = self._current
        return {"metric_type": METRIC, "params": search_params(index.type, index.params, self._settings.nprobe, k)}

    def described(self, name: str) -> BuiltIndex:
        """The index of a collection, or NO_INDEX."""
        with self._db.asking("reading the index"):
            found = self._client.describe_index(name, self._vectors[name], timeout=self._settings.timeout)
        if not found:
            return NO_INDEX
        flat = {**found, **found.get("params", {})}
        params = {key: int(flat[key]) for key in _BUILD_PARAMS if key in flat}
        return BuiltIndex(str(found["index_type"]), params, str(found.get("state", "unknown")))

    def load(self, name: str) -> None:
        """Load a collection with an index, which is created where a crash left none.

        Milvus Lite releases an indexed collection whenever it is closed.
        """
        index = self._repaired(name)
        if name == self._features:
            self._current = index
        with self._db.building(), self._db.asking(f"loading {name!r}"):
            self._client.load_collection(name, timeout=BUILD_SECONDS)

    def exchange(self, rows: int, *, written: bool) -> None:
        """Give the features the index that so many rows ask for, and make all of them searchable.

        written: whether rows were written since the last call. The steps are those of `FeatureStore.ensure_index`.
        """
        wanted = self.profile(self._features, rows)
        found = self.described(self._features)
        changes = not wanted.fits(found.type, found.params)
        if not changes and not written:
            return
        if changes or self._db.backend == "lite":
            # Milvus Lite indexes in the background what is flushed while loaded, and says nothing when it is done.
            with self._db.asking("releasing the features"):
                self._client.release_collection(self._features, timeout=self._settings.timeout)
        with self._db.asking("flushing the features"):
            self._client.flush(self._features, timeout=BUILD_SECONDS)
        if changes and found != NO_INDEX:
            with self._db.asking("dropping the old index"):
                self._client.drop_index(self._features, FEATURE_VECTOR, timeout=self._settings.timeout)
        if changes:
            self._build(self._features, wanted)
        self.load(self._features)

    def _build(self, name: str, profile: IndexProfile) -> None:
        with self._db.building(), self._db.asking(f"building the index {profile.index_type}"):
            self._client.create_index(name, self.params(name, profile), timeout=BUILD_SECONDS)

    def _repaired(self, name: str) -> BuiltIndex:
        found = self.described(name)
        if found != NO_INDEX:
            return found
        # An index that another thread is exchanging is missing only meanwhile: wait for that writer.
        with self._db.write_lock:
            found = self.described(name)
            if found != NO_INDEX:
                return found
            self._build(name, self.profile(name, self.flushed_rows(name)))
            return self.described(name)

    def flushed_rows(self, name: str) -> int:
        """About how many rows a collection has that may not be loaded: those flushed, some of them deleted."""
        with self._db.asking("estimating its size"):
            return int(self._client.get_collection_stats(name, timeout=self._settings.timeout)["row_count"])
