"""The two collections of one index, on Milvus Lite or a Milvus server.

Invariants, which hold after a crash at any point:

- An image exists if and only if its row in the images collection does, and then all its features are there.
- The features of one image, row or no row, have the ordinals 0 to m - 1 without a gap: features are written in rising
  and deleted in falling order. So one look at ordinal n tells whether an earlier, larger version left anything beyond.
- A collection that a crash left without its index has one again before it is loaded.

Similarities are inner products of unit vectors; larger is nearer. A neighbour whose image has no row (a crash came
between) is to be ignored.

Consistency: reads that decide what is written, and reads of records, are strong. Neighbour searches and reads of packed
features have the level of the settings, by default "Session": they see everything that this process wrote, and what
others wrote a moment ago.

A store reads and writes one generation of a collection, the one that was current when it was opened, by the true names
of its two collections: an alias that moves meanwhile changes nothing for it, except that it writes no more.
"""

from __future__ import annotations

import heapq
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from delf_milvus.errors import CollectionError, DatabaseError, UsageError
from delf_milvus.features import MAX_FEATURES, ORDINAL_BITS, Features, Fingerprint, Float32Array
from delf_milvus.settings import StoreSettings
from delf_milvus.store import connection, generations, records, schema
from delf_milvus.store.codec import chunks_needed
from delf_milvus.store.connection import Connection, NotLoadedError
from delf_milvus.store.keys import Int64Array, feature_keys, image_key
from delf_milvus.store.profiles import INDEX_FROM, METRIC, IndexProfile, choose, search_params
from delf_milvus.store.records import ImageRecord, Row
from delf_milvus.store.schema import CollectionFacts, CollectionSpec, keypoint_fields

if TYPE_CHECKING:
    from pymilvus import MilvusClient

Ids = list[str]
Keys = list[int]

PADDING_KEY = -1
PADDING_SIMILARITY = -1.0

_QUERIES = 16384
_HITS = 1_000_000
_KEYS = 1000
_PAGE = 10000
_DESCRIBED = 100
_BUILD_SECONDS = 6 * 3600.0
_STRONG = "Strong"
_SESSION = "Session"


@dataclass(frozen=True)
class StoreStatus:
    """What `status` prints.

    backend: "Milvus Lite 3.2.2". uri: without secrets. collection: as asked for; exists tells whether it does.
    generation: the name that both of its collections start with; alias: the alias that says so, or "" for a collection
    that was never rebuilt. images, features: rows. index_asked: the setting. index_used, index_params: what is built.
    substitute_for: the index that index_used stands in for because this backend lacks it, or "". index_state: as Milvus
    says. fingerprint: of the model that filled the collection.
    """

    backend: str
    uri: str
    collection: str
    generation: str
    alias: str
    exists: bool
    images: int
    features: int
    index_asked: str
    index_used: str
    index_params: Mapping[str, int]
    substitute_for: str
    index_state: str
    fingerprint: Fingerprint | None
    schema_version: int


class _Index(NamedTuple):
    type: str
    params: dict[str, int]
    state: str


_NO_INDEX = _Index("none", {}, "no index")
_FLAT = IndexProfile("FLAT", "FLAT")


class FeatureStore:
    """Writes, finds and reads the images of one index. Safe to search from many threads; writes queue up.

    Open it with `FeatureStore.open`, close it with `close` or as a context manager.
    """

    def __init__(
        self,
        database: Connection,
        collection: str,
        fingerprint: Fingerprint | None,
        settings: StoreSettings,
        max_features: int,
        index_from: int,
        generation: str | None = None,
    ) -> None:
        self._db = database
        self._client = database.client
        self._collection = collection
        self._generation = generation or generations.current(database, collection, settings.timeout)
        # A generation that is being made is written before it is the current one.
        self._is_made = generation is not None
        self._features = self._generation + schema.FEATURES_SUFFIX
        self._images = self._generation + schema.IMAGES_SUFFIX
        self._feature_vectors = (self._features, "descriptor")
        self._image_vectors = (self._images, "global_descriptor")
        self._fingerprint = fingerprint
        self._settings = settings
        self._consistency = settings.consistency.capitalize()
        self._max_features = max_features
        self._index_from = index_from
        self._state_lock = threading.RLock()
        self._facts: CollectionFacts | None = None
        self._index = _Index("", {}, "")
        self._ready = False
        self._written = False

    @classmethod
    def open(
        cls,
        uri: str,
        collection: str,
        fingerprint: Fingerprint | None,
        settings: StoreSettings,
        *,
        token: str = "",
        client: MilvusClient | Connection | None = None,
        max_features: int = 1000,
        create: bool = True,
        index_from: int = INDEX_FROM,
    ) -> FeatureStore:
        """Connect, and check that the collections, where they exist, belong to this model and this software.

        uri: path of an embedded database (.db) or address of a server; not used with `client`, which stays open when
        this store closes. fingerprint: of the model, or None to take what is stored. max_features: most features an
        image may have in a collection that this store creates, which it does at the first write. create: whether an
        absent collection is accepted. index_from: rows from which the profile "auto" is more than FLAT.

        Raises UsageError (name or uri that cannot be one), DatabaseError (not reachable, locked, no database),
        CollectionError (other model, other schema, other software, or absent without `create`).
        """
        _check_name(collection)
        if client is None:
            absent = not create and not connection.is_server(uri) and not connection.embedded_exists(uri)
            if absent:
                raise CollectionError(_absent(collection, uri))
            database = connection.connect(uri, token, settings)
        else:
            adopted = isinstance(client, Connection)
            database = client if adopted else connection.adopt(client, settings.timeout)
        try:
            store = cls(database, collection, fingerprint, settings, max_features, index_from)
            if not store._attach() and not create:
                raise CollectionError(_absent(collection, database.where))
        except BaseException:
            database.close()
            raise
        return store

    def close(self) -> None:
        """Close the connection, unless the client was handed in. Further calls of the store fail."""
        self._db.close()

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def connection(self) -> Connection:
        """The database, and what is known about it."""
        return self._db

    @property
    def generation(self) -> str:
        """The name that both collections of this store start with: the collection's own, or that of a rebuilt one."""
        return self._generation

    def rebuilt(self, fingerprint: Fingerprint, max_features: int) -> FeatureStore:
        """The store that a rebuild for another model fills, over the same connection: a generation of that model that
        was begun or left, or a new one. Raises CollectionError where the database has no aliases to switch."""
        generation = generations.target(self._db, self._collection, fingerprint, self._generation, self._settings)
        return FeatureStore(
            self._db, self._collection, fingerprint, self._settings, max_features, self._index_from, generation
        )

    def create(self) -> None:
        """Create the collections where they are absent, which otherwise the first write does."""
        with self._db.write_lock:
            self._created()

    def become_current(self) -> None:
        """From here on the collection is this generation for whoever opens it: one alias is set, in one call."""
        generations.switch(self._db, self._collection, self._generation, self._settings.timeout)
        self._is_made = False

    def drop_others(self) -> Ids:
        """Drop the other generations of the collection, also one that is being made; returns their names."""
        return generations.drop_others(self._db, self._collection, self._generation, self._settings.timeout)

    @property
    def stored_fingerprint(self) -> Fingerprint | None:
        """Fingerprint of the model that the collection was made with; None while there is no collection."""
        return self._facts.fingerprint if self._facts else None

    def write(self, items: Sequence[tuple[ImageRecord, Features]]) -> None:
        """Store images with their features, replacing images of the same id; of an id given twice the last one counts.

        Everything is checked and packed before anything is written. Then, so that a crash leaves no image half-visible:

        1. delete the rows of images that exist already: from here on they do not exist,
        2. write the features, in rising ordinals,
        3. delete the features that an earlier version has beyond the new ones, in falling ordinals,
        4. write the images' rows: from here on the images exist.

        Raises InputError (an id or metadata that cannot be stored), CollectionError (features of another length, or
        more than the collection was made for), DatabaseError.
        """
        latest = {record.image_id: (record, features) for record, features in items}
        if not latest:
            return
        for record, _ in latest.values():
            records.checked(record)
        with self._db.write_lock:
            facts = self._created()
            self._check_current()
            fingerprint = facts.fingerprint
            complete: dict[int, tuple[ImageRecord, Features]] = {}
            for record, features in latest.values():
                if features.dim != fingerprint.dim:
                    raise CollectionError(
                        f"Image {record.image_id!r} has descriptors of {features.dim} components, the collection "
                        f"{self._collection!r} of {fingerprint.dim}: use the model that it was made with."
                    )
                _check_collision(complete.get(record.key), record)
                complete[record.key] = (records.completed(record, features, fingerprint), features)
            image_rows = [records.image_row(record, features, facts.chunks) for record, features in complete.values()]
            stored = self._rows(list(complete), ("image_id", "feature_count"))
            for key, row in stored.items():
                _check_collision((ImageRecord(row["image_id"]), None), complete[key][0])
            leftovers = self._leftovers(complete, stored)

            self._written = True
            self._delete_rows(self._images, list(stored))
            self._write_features(complete)
            self._delete_rows(self._features, leftovers)
            sizes = [sum(len(str(value)) for value in row.values()) for row in image_rows]
            for batch in records.batches(image_rows, sizes, self._settings.batch_bytes):
                self._write_rows(self._images, batch)

    def describe(self, changed: Sequence[ImageRecord]) -> None:
        """Rewrite uri, root and metadata of stored images; their features stay. Ids that are not stored are left out.

        Raises InputError (metadata that cannot be stored) and DatabaseError.
        """
        for record in changed:
            records.checked(record)
        with self._db.write_lock:
            facts = self._attach()
            if facts is None:
                return
            self._check_current()
            fields = (*records.RECORD_FIELDS, *keypoint_fields(facts.chunks), "global_descriptor")
            for start in range(0, len(changed), _DESCRIBED):
                batch = {record.key: record for record in changed[start : start + _DESCRIBED]}
                found = self._rows(list(batch), fields)
                rows = [records.described(row, batch[key]) for key, row in found.items()]
                self._written = self._written or bool(rows)
                sizes = [sum(len(str(value)) for value in row.values()) for row in rows]
                for part in records.batches(rows, sizes, self._settings.batch_bytes):
                    self._write_rows(self._images, part)

    def delete(self, image_ids: Iterable[str]) -> Ids:
        """Delete images: their rows first, then their features. Returns the ids that existed, in the given order."""
        with self._db.write_lock:
            self._check_current()
            found = {record.key: record for record in self.records(image_ids).values()}
            keys = [feature_keys(key, record.feature_count) for key, record in found.items() if record.feature_count]
            self._written = self._written or bool(found)
            self._delete_rows(self._images, list(found))
            self._delete_rows(self._features, np.concatenate(keys).tolist() if keys else [])
        return [record.image_id for record in found.values()]

    def records(self, image_ids: Iterable[str]) -> dict[str, ImageRecord]:
        """The records of those of the ids that exist, by id, in the given order."""
        wanted = {image_key(image_id): image_id for image_id in image_ids}
        rows = self._rows(list(wanted), (*records.RECORD_FIELDS, records.METADATA))
        found = ((image_id, rows[key]) for key, image_id in wanted.items() if key in rows)
        return {image_id: records.record_of(row) for image_id, row in found if row["image_id"] == image_id}

    def neighbours(self, descriptors: Float32Array, k: int) -> tuple[Int64Array, Float32Array]:
        """The k most similar stored descriptors of each query descriptor.

        descriptors: (Q, D) float32 of unit norm. Returns feature keys (Q, k) int64 and similarities (Q, k) float32,
        nearest first, padded with PADDING_KEY and PADDING_SIMILARITY where there are fewer, or no collection yet.
        Raises CollectionError for descriptors of another length, DatabaseError.
        """
        calls = self.neighbour_calls(descriptors, k)
        results = [self._reading("searching for neighbours", self._client.search, **call) for call in calls]
        return neighbour_answer(results, len(descriptors), k)

    def neighbour_calls(self, descriptors: Float32Array, k: int) -> list[dict[str, Any]]:
        """Arguments of the client's `search`, call by call, whose results `neighbour_answer` reads; none while there
        is no collection. Raises CollectionError for descriptors of another length."""
        facts = self._attach()
        if facts is None or not len(descriptors):
            return []
        if descriptors.shape[1] != facts.fingerprint.dim:
            raise CollectionError(
                f"The query has descriptors of {descriptors.shape[1]} components, the collection {self._collection!r} "
                f"of {facts.fingerprint.dim}: search with the model that it was made with."
            )
        queries = np.ascontiguousarray(descriptors, dtype=np.float32)
        common = {
            "collection_name": self._features,
            "anns_field": "descriptor",
            "limit": k,
            "search_params": self._search_parameters(k),
            # Without any output field Milvus Lite would return all of them.
            "output_fields": ["feature_key"] if self._db.backend == "lite" else [],
            "consistency_level": self._consistency,
        }
        step = max(1, min(_QUERIES, _HITS // k))
        return [{**common, "data": list(queries[start : start + step])} for start in range(0, len(queries), step)]

    def stored(self, image_keys: Iterable[int]) -> dict[int, tuple[ImageRecord, Features]]:
        """Record and packed features of those of the images that exist, by image key, in the given order.

        Keypoints and descriptors are rounded as `codec` says. Raises DatabaseError, also for damaged features.
        """
        wanted = [int(key) for key in image_keys]
        calls = self.stored_calls(wanted)
        return self.stored_answer(wanted, [self._reading("reading images", self._client.get, **call) for call in calls])

    def stored_calls(self, image_keys: Sequence[int]) -> list[dict[str, Any]]:
        """Arguments of the client's `get`, call by call, whose results `stored_answer` reads."""
        facts = self._attach()
        if facts is None:
            return []
        fields = (*records.RECORD_FIELDS, records.METADATA, *keypoint_fields(facts.chunks))
        return _get_calls(self._images, "image_key", image_keys, fields, self._consistency)

    def stored_answer(
        self, image_keys: Sequence[int], results: Iterable[Sequence[Row]]
    ) -> dict[int, tuple[ImageRecord, Features]]:
        """What `stored` returns, from the results of `stored_calls`."""
        rows = _by_primary("image_key", results)
        return {
            key: (records.record_of(rows[key]), records.features_of(rows[key], self._facts.chunks))
            for key in image_keys
            if self._facts is not None and key in rows
        }

    def reload(self) -> None:
        """Load the collections again after somebody released them; waits for a writer that exchanges an index."""
        with self._db.write_lock:
            self._load()

    def count_images(self) -> int:
        """Images in the collection."""
        return self._count(self._images)

    def count_features(self) -> int:
        """Features in the collection, among them such as a crash left without their image."""
        return self._count(self._features)

    def status(self) -> StoreStatus:
        """What there is, counted now."""
        facts = self._attach()
        images, features = (self.count_images(), self.count_features()) if facts else (0, 0)
        index = self._described_index(*self._feature_vectors) if facts else _Index("none", {}, "no collection")
        wanted = self._profile(features)
        return StoreStatus(
            backend=self._db.version,
            uri=self._db.where,
            collection=self._collection,
            generation=self._generation,
            alias=generations.alias_of(self._collection) if self._generation != self._collection else "",
            exists=facts is not None,
            images=images,
            features=features,
            index_asked=self._settings.profile,
            index_used=index.type,
            index_params=index.params,
            substitute_for=wanted.substitute_for if wanted.index_type == index.type else "",
            index_state=index.state,
            fingerprint=facts.fingerprint if facts else None,
            schema_version=facts.schema_version if facts else schema.SCHEMA_VERSION,
        )

    def ensure_index(self) -> None:
        """Give the features the index that their number and the settings ask for, and make all of them searchable.

        Called at the end of an ingest. Searches from other threads or processes wait or see an error while an index is
        exchanged, which goes so:

        1. release the features and flush them, which may take long,
        2. drop the old index, if there is one,
        3. create the new one; a crash before this leaves no index, and the next opening or call creates one,
        4. load the features.

        Raises DatabaseError.
        """
        with self._db.write_lock, self._db.building():
            if self._attach() is None:
                return
            wanted = self._profile(self.count_features())
            self._index = self._described_index(*self._feature_vectors)
            changes = not wanted.fits(self._index.type, self._index.params)
            if not changes and not self._written:
                return
            if changes or self._db.backend == "lite":
                # Milvus Lite indexes in the background what is flushed while loaded, and says nothing when it is done.
                with self._db.asking("releasing the features"):
                    self._client.release_collection(self._features, timeout=self._settings.timeout)
            with self._db.asking("flushing the features"):
                self._client.flush(self._features, timeout=_BUILD_SECONDS)
            if changes and self._index.type != _NO_INDEX.type:
                with self._db.asking("dropping the old index"):
                    self._client.drop_index(*self._feature_vectors, timeout=self._settings.timeout)
            if changes:
                self._build_index(*self._feature_vectors, wanted)
            self._load()
            self._written = False

    def list(
        self, prefix: str = "", limit: int | None = None, root: str | None = None, after: str = ""
    ) -> Iterator[ImageRecord]:
        """The images in the order of their ids.

        prefix: only ids that start so. limit: at most so many. root: only images ingested from this folder. after: only
        ids beyond this one, to go on from an earlier listing. Memory holds one id for each image that is listed.
        """
        conditions = []
        if prefix:
            # A range, because the wildcards of `like` cannot be escaped on every version.
            end = prefix + chr(0x10FFFF)
            conditions.append(f"image_id >= {records.quoted(prefix)} and image_id <= {records.quoted(end)}")
        if root is not None:
            conditions.append(f"root == {records.quoted(root)}")
        if after:
            conditions.append(f"image_id > {records.quoted(after)}")
        found = (row["image_id"] for row in self._scan(" and ".join(conditions)))
        ids = sorted(found) if limit is None else heapq.nsmallest(limit, found)
        for start in range(0, len(ids), _KEYS):
            yield from self.records(ids[start : start + _KEYS]).values()

    def _attach(self) -> CollectionFacts | None:
        """The facts of the collections, checked and loaded; None while they do not exist."""
        if self._ready:
            return self._facts
        with self._state_lock, self._db.asking("looking for the collections"):
            names = (self._features, self._images)
            timeout = self._settings.timeout
            present = [name for name in names if self._client.has_collection(name, timeout=timeout)]
            for name in present:
                described = self._client.describe_collection(name, timeout=timeout)
                self._facts = self._checked(name, described.get("properties") or {})
            if len(present) < len(names):
                return None
        self._load()
        self._ready = True
        return self._facts

    def _check_current(self) -> None:
        """Raise CollectionError where the collection was rebuilt since this store was opened: nobody would see what is
        written to the old generation."""
        if not self._is_made and generations.current(self._db, self._collection, self._settings.timeout) != (
            self._generation
        ):
            raise CollectionError(
                f"The collection {self._collection!r} at {self._db.where} was rebuilt for another model meanwhile: "
                "open it again to write."
            )

    def _checked(self, name: str, properties: Mapping[str, str]) -> CollectionFacts:
        if schema.PROPERTY not in properties:
            raise CollectionError(
                f"The collection {name!r} at {self._db.where} was made by other software; choose another name with "
                "--collection."
            )
        try:
            facts = CollectionFacts.from_json(properties[schema.PROPERTY])
        except ValueError as error:
            raise CollectionError(
                f"The collection {name!r} at {self._db.where} was made by another version of delf-milvus ({error}); "
                "ingest into a new collection."
            ) from None
        if self._fingerprint is not None and facts.fingerprint != self._fingerprint:
            differences = "; ".join(facts.fingerprint.differences(self._fingerprint))
            raise CollectionError(
                f"The collection {self._collection!r} at {self._db.where} was made with another model ({differences}); "
                "use that model and those settings, or ingest into a new collection with --collection."
            )
        return facts

    def _created(self) -> CollectionFacts:
        """The facts of the collections, which are created where they are absent."""
        facts = self._attach()
        if facts is not None:
            return facts
        with self._state_lock:
            fingerprint = self._facts.fingerprint if self._facts else self._fingerprint
            if fingerprint is None:
                raise UsageError(f"There is no collection {self._collection!r} yet, and no model to create it for.")
            chunks = self._facts.chunks if self._facts else chunks_needed(self._max_features, fingerprint.dim)
            made = CollectionFacts(fingerprint, chunks)
            self._create(self._features, schema.features_spec(fingerprint.dim), made, self._profile(0))
            self._create(self._images, schema.images_spec(fingerprint.dim, chunks), made, _FLAT)
            facts = self._attach()
        if facts is None:
            raise CollectionError(f"The collection {self._collection!r} vanished while it was created; try again.")
        return facts

    def _create(self, name: str, spec: CollectionSpec, facts: CollectionFacts, profile: IndexProfile) -> None:
        with self._db.asking(f"creating the collection {name!r}"):
            if self._client.has_collection(name, timeout=self._settings.timeout):
                return
            self._client.create_collection(
                name,
                schema=schema.to_pymilvus(spec),
                index_params=self._index_params(spec.vector, profile),
                properties={
                    schema.PROPERTY: facts.to_json(),
                    **generations.properties(self._collection, self._generation),
                },
                consistency_level=_SESSION,
                timeout=self._settings.timeout,
            )

    def _profile(self, rows: int) -> IndexProfile:
        dim = self._facts.fingerprint.dim if self._facts else self._fingerprint.dim if self._fingerprint else 1
        return choose(self._settings.profile, self._db.backend, dim, rows, self._index_from)

    def _index_params(self, vector: str, profile: IndexProfile) -> Any:
        params = self._client.prepare_index_params()
        params.add_index(
            vector,
            index_type=profile.index_type,
            index_name=vector,
            metric_type=METRIC,
            params=profile.build_params(self._db.backend),
        )
        return params

    def _described_index(self, name: str, vector: str) -> _Index:
        with self._db.asking("reading the index"):
            found = self._client.describe_index(name, vector, timeout=self._settings.timeout)
        if not found:
            return _NO_INDEX
        flat = {**found, **found.get("params", {})}
        params = {key: int(flat[key]) for key in ("nlist", "m", "nbits", "M", "efConstruction") if key in flat}
        return _Index(str(found["index_type"]), params, str(found.get("state", "unknown")))

    def _build_index(self, name: str, vector: str, profile: IndexProfile) -> None:
        with self._db.building(), self._db.asking(f"building the index {profile.index_type}"):
            self._client.create_index(name, self._index_params(vector, profile), timeout=_BUILD_SECONDS)

    def _indexed(self, name: str, vector: str) -> _Index:
        """The index of a collection, which is created where a crash left none."""
        found = self._described_index(name, vector)
        if found != _NO_INDEX:
            return found
        # An index that another thread is exchanging is missing only meanwhile: wait for that writer.
        with self._db.write_lock:
            found = self._described_index(name, vector)
            if found != _NO_INDEX:
                return found
            profile = self._profile(self._rows_unloaded(name)) if name == self._features else _FLAT
            self._build_index(name, vector, profile)
            return self._described_index(name, vector)

    def _rows_unloaded(self, name: str) -> int:
        """About how many rows a collection has that cannot be loaded yet: those flushed, some of them deleted."""
        with self._db.asking("estimating its size"):
            return int(self._client.get_collection_stats(name, timeout=self._settings.timeout)["row_count"])

    def _load(self) -> None:
        """Load what is not loaded, with an index: a server loads nothing without one.

        Milvus Lite releases an indexed collection whenever it is closed.
        """
        self._index = self._indexed(*self._feature_vectors)
        self._indexed(*self._image_vectors)
        for name in (self._features, self._images):
            with self._db.building(), self._db.asking(f"loading {name!r}"):
                self._client.load_collection(name, timeout=_BUILD_SECONDS)

    def _reading(self, doing: str, read: Any, *arguments: Any, **options: Any) -> Any:
        """Call the client; where somebody released a collection meanwhile, load it and call again."""
        try:
            with self._db.asking(doing):
                return read(*arguments, timeout=self._settings.timeout, **options)
        except NotLoadedError:
            self.reload()
            with self._db.asking(doing):
                return read(*arguments, timeout=self._settings.timeout, **options)

    def _search_parameters(self, k: int) -> dict[str, Any]:
        index = self._index
        return {"metric_type": METRIC, "params": search_params(index.type, index.params, self._settings.nprobe, k)}

    def _rows(self, keys: Sequence[int], fields: Sequence[str], consistency: str = _STRONG) -> dict[int, Row]:
        """Rows of the images collection by primary key."""
        if self._attach() is None:
            return {}
        return self._by_key(self._images, "image_key", keys, fields, consistency)

    def _by_key(
        self, name: str, primary: str, keys: Sequence[int], fields: Sequence[str], consistency: str
    ) -> dict[int, Row]:
        calls = _get_calls(name, primary, keys, fields, consistency)
        return _by_primary(primary, (self._reading("reading images", self._client.get, **call) for call in calls))

    def _scan(self, condition: str) -> Iterator[Row]:
        """Ids of the images that meet a condition."""
        if self._attach() is None:
            return
        pages = self._reading(
            "listing images",
            self._client.query_iterator,
            self._images,
            batch_size=_PAGE,
            filter=condition,
            output_fields=["image_id"],
            consistency_level=_STRONG,
        )
        try:
            while True:
                with self._db.asking("listing images"):
                    page = pages.next()
                if not page:
                    return
                yield from page
        finally:
            pages.close()

    def _count(self, name: str) -> int:
        if self._attach() is None:
            return 0
        rows = self._reading(
            "counting", self._client.query, name, filter="", output_fields=["count(*)"], consistency_level=_STRONG
        )
        return int(rows[0]["count(*)"])

    def _leftovers(self, written: Mapping[int, tuple[ImageRecord, Features]], stored: Mapping[int, Row]) -> Keys:
        """Keys of features, in rising order, that earlier versions of these images have beyond the new ones."""
        keys: list[npt.NDArray[np.int64]] = []
        unknown: dict[int, int] = {}
        for key, (_, features) in written.items():
            count = len(features)
            if key in stored:
                keys.append(feature_keys(key, max(count, int(stored[key]["feature_count"])), count))
            elif count < MAX_FEATURES:
                unknown[int(feature_keys(key, count + 1, count)[0])] = count
        found = self._by_key(self._features, "feature_key", list(unknown), (), _STRONG)
        keys.extend(feature_keys(first >> ORDINAL_BITS, MAX_FEATURES, unknown[first]) for first in found)
        return np.concatenate(keys).tolist() if keys else []

    def _write_features(self, written: Mapping[int, tuple[ImageRecord, Features]]) -> None:
        rows = [row for key, (_, features) in written.items() for row in records.feature_rows(key, features)]
        if rows:
            size = 4 * len(rows[0]["descriptor"]) + 64
            for batch in records.batches(rows, [size] * len(rows), self._settings.batch_bytes):
                self._write_rows(self._features, batch)

    def _write_rows(self, name: str, rows: Sequence[Row]) -> None:
        """Write whole rows, replacing those of the same key."""
        # On Milvus Lite the newest row of a key wins however it was written; its upsert looks for each old row first.
        write = self._client.insert if self._db.backend == "lite" else self._client.upsert
        with self._db.asking("writing"):
            write(name, list(rows), timeout=self._settings.timeout)

    def _delete_rows(self, name: str, keys: Sequence[int]) -> None:
        """Delete by primary key, the last ones first."""
        for end in range(len(keys), 0, -_QUERIES):
            with self._db.asking("deleting"):
                self._client.delete(name, ids=list(keys[max(0, end - _QUERIES) : end]), timeout=self._settings.timeout)


def neighbour_answer(results: Iterable[Any], count: int, k: int) -> tuple[Int64Array, Float32Array]:
    """What `FeatureStore.neighbours` returns for `count` descriptors, from the results of its calls in their order."""
    keys = np.full((count, k), PADDING_KEY, np.int64)
    similarities = np.full((count, k), PADDING_SIMILARITY, np.float32)
    for row, hits in enumerate(hits for result in results for hits in result):
        found = len(hits.ids)
        keys[row, :found] = hits.ids
        similarities[row, :found] = hits.distances
    return keys, similarities


def _get_calls(
    name: str, primary: str, keys: Sequence[int], fields: Sequence[str], consistency: str
) -> list[dict[str, Any]]:
    return [
        {
            "collection_name": name,
            "ids": list(keys[start : start + _KEYS]),
            "output_fields": [primary, *fields],
            "consistency_level": consistency,
        }
        for start in range(0, len(keys), _KEYS)
    ]


def _by_primary(primary: str, results: Iterable[Sequence[Row]]) -> dict[int, Row]:
    return {int(row[primary]): row for rows in results for row in rows}


def _check_name(collection: str) -> None:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", collection):
        raise UsageError(f"{collection!r} cannot name a collection: use at most 200 letters, digits and underscores.")


def _check_collision(earlier: tuple[ImageRecord, Any] | None, record: ImageRecord) -> None:
    if earlier is not None and earlier[0].image_id != record.image_id:
        raise DatabaseError(
            f"The ids {earlier[0].image_id!r} and {record.image_id!r} happen to have the same key: rename one of them."
        )


def _absent(collection: str, where: str) -> str:
    return f"There is no collection {collection!r} in {where}; run `delf-milvus ingest FOLDER` first."
