"""The two collections of one index, on Milvus Lite or a Milvus server.

Invariants, which hold after a crash at any point:

- An image exists if and only if its row in the images collection does, and then all its features are there.
- The features of one image, row or no row, have the ordinals 0 to m - 1 without a gap: features are written in rising
  and deleted in falling order. So one look at ordinal n tells whether an earlier, larger version left anything beyond.
- A collection without its index, after a crash or a drop, has one again before it is loaded, which the first read does.

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
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version as installed_version
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from delf_milvus.errors import CollectionError, DatabaseError, UsageError
from delf_milvus.features import MAX_FEATURES, ORDINAL_BITS, Features, Fingerprint, Float32Array
from delf_milvus.settings import Profile, StoreSettings
from delf_milvus.store import connection, generations, records, schema, upkeep
from delf_milvus.store.bulk import BulkImport
from delf_milvus.store.codec import chunks_needed
from delf_milvus.store.columns import METADATA, Columns, joined, length, slices, write_columns
from delf_milvus.store.connection import Connection, NotLoadedError
from delf_milvus.store.fields import declared
from delf_milvus.store.filters import Filter, both, expression, quoted
from delf_milvus.store.fsck import Fsck, FsckReport, Progress
from delf_milvus.store.hits import joined_hits, search_arrays
from delf_milvus.store.indexing import NO_INDEX, Indexing, IndexStatus, Watcher
from delf_milvus.store.keys import IMAGE_KEY_BITS, Int64Array, feature_keys, image_key
from delf_milvus.store.profiles import INDEX_FROM, memory_bytes
from delf_milvus.store.records import ImageRecord, Row
from delf_milvus.store.schema import CollectionFacts, CollectionSpec, keypoint_fields
from delf_milvus.store.scratch import Scratch

if TYPE_CHECKING:
    from pymilvus import MilvusClient

Ids = list[str]
Keys = list[int]

_QUERIES = 16384
_HITS = 1_000_000
_KEYS = 1000
_FEATURE_KEYS = 10_000
_FEATURE_BYTES = 30_000_000
_PAGE = 10000
_DESCRIBED = 100
_STRONG = "Strong"
_SESSION = "Session"


@dataclass(frozen=True)
class StoreStatus:
    """What `status` prints.

    backend: "Milvus Lite 3.2.2". uri: without secrets. collection: as asked for; exists tells whether it does.
    generation: the name that both of its collections start with; alias: the alias that says so, or "" for a collection
    that was never rebuilt. images, features: rows. index_asked: the setting. index_used, index_params: what is built.
    substitute_for: the index that index_used stands in for because this backend lacks it, or "". index_state: as Milvus
    says. indexed_rows, index_total_rows: how far it is built; what was written a moment ago is in neither.
    memory_bytes: an estimate for the loaded features. fingerprint: of the model that filled the collection. fields:
    declarations of the fields that a search can be filtered by. tenant_field: the one that keeps tenants apart, or "".
    pymilvus: its version.
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
    indexed_rows: int
    index_total_rows: int
    memory_bytes: int
    fingerprint: Fingerprint | None
    fields: Mapping[str, str]
    tenant_field: str
    schema_version: int
    pymilvus: str


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
        self._fingerprint = fingerprint
        self._settings = settings
        self._consistency = settings.consistency.capitalize()
        self._max_features = max_features
        self._index_from = index_from
        self._tenant = settings.tenant
        tenants = {settings.tenant_field: "text"} if settings.tenant_field else {}
        self._declared = declared({**tenants, **settings.fields})
        if any(field.name == settings.tenant_field and field.declaration != "text" for field in self._declared):
            raise UsageError(f"The tenant field {settings.tenant_field!r} is text without a default.")
        if reserved := schema.RESERVED.intersection(field.name for field in self._declared):
            raise UsageError(f"No field can be declared as {min(reserved)!r}: that name is reserved; choose another.")
        self._state_lock = threading.RLock()
        self._facts: CollectionFacts | None = None
        self._indexing = Indexing(database, self._features, self._images, settings, self._dim, index_from)
        self._loaded: set[str] = set()
        self._attached = False
        self._written = False
        self._bulk = BulkImport(database, self._features, settings)

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

        Raises UsageError (name or uri that cannot be one, an index that this server lacks), DatabaseError (not
        reachable, locked, no database), CollectionError (other model, other schema, other software, or absent without
        `create`).
        """
        _check_name(collection)
        if client is None:
            absent = not create and not connection.is_server(uri) and not connection.embedded_exists(uri)
            if absent:
                raise CollectionError(_absent(collection, uri))
            database = connection.connect(uri, token, settings)
        else:
            adopted = isinstance(client, Connection)
            patience = settings.retry_seconds
            database = client if adopted else connection.adopt(client, settings.timeout, retry_seconds=patience)
        try:
            store = cls(database, collection, fingerprint, settings, max_features, index_from)
            if not store._attach() and not create:
                raise CollectionError(_absent(collection, database.where))
            if store._facts or fingerprint:
                # An index that this server cannot build is refused now, not at the end of an ingest.
                store._indexing.profile(store._features, 0)
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
        facts = self._existing()
        if facts.tenant_field:
            raise UsageError(
                f"The collection {self._collection!r} keeps tenants apart, and a rebuild needs all of them at once: "
                "ingest each tenant's photos into a new collection with --collection instead."
            )
        generation = generations.target(self._db, self._collection, fingerprint, self._generation, self._settings)
        fields = {field.name: field.declaration for field in facts.declared}
        settings = self._settings.model_copy(update={"fields": fields})
        return FeatureStore(
            self._db, self._collection, fingerprint, settings, max_features, self._index_from, generation
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

        Everything is checked before anything is written. Then, so that a crash leaves no image half-visible:

        1. delete the rows of images that exist already: from here on they do not exist,
        2. write the features, in rising ordinals,
        3. delete the features that an earlier version has beyond the new ones, in falling ordinals,
        4. write the images' rows: from here on the images exist.

        Raises InputError (an id or metadata that cannot be stored), CollectionError (features of another length, or
        more than the collection was made for), DatabaseError.
        """
        latest = {record.image_id: (self.typed(record), features) for record, features in items}
        if not latest:
            return
        with self._db.write_lock, self._bulk.guarded():
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
                if record.key in complete:
                    _check_collision(complete[record.key][0].image_id, record.image_id)
                complete[record.key] = (records.completed(record, features, fingerprint), features)
                if chunks_needed(len(features), fingerprint.dim) > facts.chunks:
                    # It may fit all the same, but that must be known now.
                    records.image_row(record, features, facts.chunks)
            columns = {
                key: records.feature_columns(key, features, facts.features, record.metadata)
                for key, (record, features) in complete.items()
            }
            self._replace({key: record.image_id for key, (record, _) in complete.items()}, columns)
            # Packed while the server imports.
            rows = [records.image_row(record, features, facts.chunks) for record, features in complete.values()]
            self._bulk.finish()
            self._write_images(rows)

    def _replace(self, ids: Mapping[int, str], columns: Mapping[int, Columns]) -> None:
        """The first three steps of `write`, for these images by key; `_bulk.finish` comes before the fourth."""
        self._bulk.recover()
        stored = self._rows(list(ids), ("image_id", "feature_count"))
        for key, row in stored.items():
            _check_collision(row["image_id"], ids[key])
        leftovers = self._leftovers(columns, stored)
        self._written = True
        self._delete_rows(self._images, list(stored))
        self._write_features(columns, stored)
        self._delete_rows(self._features, leftovers)

    def prepare(self, made: CollectionFacts) -> None:
        """Create the collections for rows of another one with these facts, or check that they can take such rows.

        Raises CollectionError where they were made by another model or for fewer features an image.
        """
        if self._fingerprint is not None and self._fingerprint != made.fingerprint:
            raise CollectionError(_other_model("what is to be imported", made.fingerprint, self._fingerprint))
        with self._db.write_lock:
            facts = self._created(made)
        if facts.fingerprint != made.fingerprint:
            raise CollectionError(_other_model("what is to be imported", made.fingerprint, facts.fingerprint))
        if (facts.declared, facts.tenant_field) != (made.declared, made.tenant_field):
            raise CollectionError(
                f"The collection {self._collection!r} has other declared fields than what is to be imported: import "
                "into a new collection with --collection."
            )
        if facts.chunks < made.chunks:
            raise CollectionError(
                f"The collection {self._collection!r} was made for fewer features an image than what is to be "
                "imported: import into a new collection with --collection."
            )

    @property
    def facts(self) -> CollectionFacts | None:
        """What the collections were made for; None while they do not exist."""
        return self._attach()

    @property
    def imports_files(self) -> bool:
        """Whether large writes go through the server's bulk import."""
        return self._bulk.enabled

    def restore(self, image_rows: Mapping[int, Row], columns: Mapping[int, Columns], *, now: bool = True) -> None:
        """Store images as they are, by key: their rows, and the columns of their features in rising ordinals.

        The caller has checked them. The steps are those of `write`. Not `now`: the images do not exist before `settle`
        and then `restore_rows`, so that one wait for imports of files serves any number of calls.
        """
        with self._db.write_lock, self._bulk.guarded():
            self._replace({key: row["image_id"] for key, row in image_rows.items()}, columns)
            if now:
                self._bulk.finish()
                self._write_images(list(image_rows.values()))

    def settle(self) -> None:
        """Wait until all features of earlier calls of `restore` can be found."""
        with self._db.write_lock, self._bulk.guarded():
            self._bulk.finish()

    def restore_rows(self, image_rows: Sequence[Row]) -> None:
        """Write the rows of images whose features are there."""
        with self._db.write_lock:
            self._write_images(image_rows)

    def keys(self, prefix: str = "") -> Keys:
        """The keys of all images whose id starts so, in order of the ids; with a tenant set, only that tenant's."""
        facts = self._attach()
        if facts is None:
            return []
        conditions = [*filter(None, [self._of_tenant(facts)]), *_starting(prefix)]
        found = self._scan(" and ".join(conditions))
        return [key for _, key in sorted((row["image_id"], int(row["image_key"])) for row in found)]

    def rows(self, image_keys: Sequence[int]) -> dict[int, Row]:
        """Whole rows of those of the images that exist, by key."""
        facts = self._attach()
        if facts is None:
            return {}
        return self._rows(image_keys, (*(one.name for one in facts.images.fields), METADATA))

    def feature_columns(self, counts: Mapping[int, int]) -> Columns:
        """All features of images, given as feature counts by key: in that order, in rising ordinals.

        Raises DatabaseError where one has not all of them.
        """
        facts = self._existing()
        spec = facts.features
        keys = np.concatenate([feature_keys(key, count) for key, count in counts.items()] or [np.empty(0, np.int64)])
        fields = [one.name for one in spec.fields if not one.primary]
        step = min(_FEATURE_KEYS, max(1, _FEATURE_BYTES // (4 * facts.fingerprint.dim + 64)))
        found = self._by_key(self._features, "feature_key", keys.tolist(), fields, _STRONG, step)
        if len(found) < len(keys):
            missing = next(key for key in keys.tolist() if key not in found) >> ORDINAL_BITS
            raise DatabaseError(
                f"Features of the image with key {missing} are missing: was it written meanwhile? Try again, and "
                "ingest it again if that does not help."
            )
        return records.columns_of(spec, [found[key] for key in keys.tolist()])

    def describe(self, changed: Sequence[ImageRecord]) -> None:
        """Rewrite uri, root and metadata of stored images; their features stay. Ids that are not stored are left out.

        Where a declared field changes, its copies in the features change with it: as in `write`, the image does not
        exist meanwhile.

        Raises InputError (metadata that cannot be stored) and DatabaseError.
        """
        changed = [self.typed(record) for record in changed]
        with self._db.write_lock:
            facts = self._attach()
            if facts is None:
                return
            self._check_current()
            names = [field.name for field in facts.declared]
            fields = (*records.RECORD_FIELDS, *names, *keypoint_fields(facts.chunks), "global_descriptor")
            for start in range(0, len(changed), _DESCRIBED):
                batch = {record.key: record for record in changed[start : start + _DESCRIBED]}
                found = self._rows(list(batch), fields)
                self._written = self._written or bool(found)
                moved = [key for key, row in found.items() if any(row[n] != batch[key].metadata[n] for n in names)]
                # Read while the images still exist: one that lost features stays as it is.
                columns = [
                    self._redeclared(key, int(found[key]["feature_count"]), batch[key].metadata) for key in moved
                ]
                self._delete_rows(self._images, moved)
                self._write_columns(self._features, facts.features, columns)
                self._write_images([records.described(row, batch[key]) for key, row in found.items()])

    def typed(self, record: ImageRecord) -> ImageRecord:
        """The record as this collection stores it: checked, declared fields typed, tenant filled in.

        Raises InputError for what cannot be stored, and UsageError where the collection keeps tenants apart and none
        is set.
        """
        return records.typed(record, self._attach() or self._planned(), self._owner())

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
        facts = self._attach()
        if facts is None:
            return {}
        owner = self._owner()
        wanted = {image_key(image_id, owner): image_id for image_id in image_ids}
        found = self._records(list(wanted), facts)
        return {wanted[key]: record for key, record in found.items() if record.image_id == wanted[key]}

    def neighbours(self, descriptors: Float32Array, k: int, where: Filter = "") -> tuple[Int64Array, Float32Array]:
        """The k most similar stored descriptors of each query descriptor.

        descriptors: (Q, D) float32 of unit norm. where: only features whose image meets this, in declared fields; see
        `filters`. With a tenant set, only that tenant's. Returns feature keys (Q, k) int64 and similarities (Q, k)
        float32, nearest first, padded with PADDING_KEY and PADDING_SIMILARITY where there are fewer, or no collection
        yet.
        Raises CollectionError for descriptors of another length, UsageError for a filter that does not fit the
        collection, DatabaseError.
        """
        search = partial(search_arrays, self._client)
        calls = self.neighbour_calls(descriptors, k, where)
        return joined_hits(
            [self._reading("searching for neighbours", search, **call) for call in calls], len(descriptors), k
        )

    def neighbour_calls(self, descriptors: Float32Array, k: int, where: Filter = "") -> list[dict[str, Any]]:
        """Arguments of the client's `search`, call by call, whose results are read by `hits`; none while there is no
        collection. Arguments and errors as of `neighbours`."""
        facts = self._attach()
        if facts is None or not len(descriptors):
            return []
        if descriptors.shape[1] != facts.fingerprint.dim:
            raise CollectionError(
                f"The query has descriptors of {descriptors.shape[1]} components, the collection {self._collection!r} "
                f"of {facts.fingerprint.dim}: search with the model that it was made with."
            )
        queries = np.ascontiguousarray(descriptors, dtype=np.float32)
        self._ensure_loaded(self._features)
        common = {
            "collection_name": self._features,
            "anns_field": "descriptor",
            "limit": k,
            "filter": both(self._of_tenant(facts), expression(where, facts.declared)),
            "search_params": self._indexing.search_params(k),
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
        self._ensure_loaded(self._images)
        fields = (*records.record_fields(facts), *keypoint_fields(facts.chunks))
        return _get_calls(self._images, "image_key", image_keys, fields, self._consistency)

    def stored_answer(
        self, image_keys: Sequence[int], results: Iterable[Sequence[Row]]
    ) -> dict[int, tuple[ImageRecord, Features]]:
        """What `stored` returns, from the results of `stored_calls`."""
        rows, facts = _by_primary("image_key", results), self._facts
        return {
            key: (records.record_of(rows[key], facts.tenant_field), records.features_of(rows[key], facts.chunks))
            for key in image_keys
            if facts is not None and key in rows
        }

    def reload(self) -> None:
        """Load the collections again after somebody released them; waits for a writer that exchanges an index."""
        with self._db.write_lock:
            for name in (self._features, self._images):
                self._db.patiently(partial(self._load, name))

    def count_images(self) -> int:
        """Images in the collection."""
        return self._count(self._images)

    def count_features(self) -> int:
        """Features in the collection, among them such as a crash left without their image."""
        return self._count(self._features)

    def status(self) -> StoreStatus:
        """What there is, counted now."""
        facts = self._attach()
        index = self._indexing.described(self._features) if facts else NO_INDEX._replace(state="no collection")
        images = self.count_images()
        features = self._feature_rows() if facts else 0
        wanted = self._indexing.profile(self._features, features)
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
            indexed_rows=index.indexed_rows,
            index_total_rows=index.total_rows,
            memory_bytes=memory_bytes(index.type, index.params, self._dim(), features) if index != NO_INDEX else 0,
            fingerprint=facts.fingerprint if facts else None,
            fields={field.name: field.declaration for field in (facts.declared if facts else self._declared)},
            tenant_field=facts.tenant_field if facts else self._settings.tenant_field,
            schema_version=facts.schema_version if facts else schema.SCHEMA_VERSION,
            pymilvus=installed_version("pymilvus"),
        )

    def fsck(self, repair: bool = False, progress: Progress | None = None) -> FsckReport:
        """Look for what does not fit together, and with `repair` mend it: see `fsck`. Raises DatabaseError."""
        with self._db.write_lock:
            facts = self._attach()
            if facts is None:
                raise CollectionError(_absent(self._collection, self._db.where))
            for name in (self._features, self._images):
                self._ensure_loaded(name)
            report = Fsck(self._db, self._features, self._images, facts).run(repair, progress)
            if repair and report.findings:
                self._written = True
                self.ensure_index()
        return report

    def compact(self, progress: Callable[[str], None] | None = None) -> upkeep.CompactionReport:
        """Merge small segments and drop deleted rows: see `upkeep.compact`. Raises DatabaseError."""
        with self._db.write_lock:
            if self._attach() is None:
                raise CollectionError(_absent(self._collection, self._db.where))
            return upkeep.compact(self._db, (self._features, self._images), progress)

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
            self._indexing.exchange(self._feature_rows(), written=self._written)
            self._loaded.add(self._features)
            self._written = False

    def build_index(self, profile: Profile | None = None, progress: Watcher | None = None) -> None:
        """Build exactly the index that is asked for, or that the settings ask for, whatever there was before.

        The steps are those of `ensure_index`. progress: called with each step and the rows in the index. Raises
        UsageError, before anything changes, for an index that this server cannot build; CollectionError without a
        collection; DatabaseError.
        """
        with self._db.write_lock:
            self._existing()
            self._indexing.build(self._feature_rows(), profile, progress)
            self._loaded.add(self._features)
            self._written = False

    def drop_index(self) -> bool:
        """Release the features and drop their index; whether there was one. What reads features next builds it again.

        Raises CollectionError without a collection, DatabaseError.
        """
        with self._db.write_lock:
            self._existing()
            self._loaded.discard(self._features)
            return self._indexing.drop()

    def scratch(self) -> Scratch:
        """A collection for measuring beside this one; raises CollectionError without a collection."""
        return Scratch(self._db, self._collection, self._existing().fingerprint.dim, self._settings)

    def sample(self, count: int, seed: int = 0) -> dict[int, tuple[ImageRecord, Features]]:
        """At most `count` images, drawn at random, as `stored` gives them.

        Image keys are hashes, so the images whose keys lie in any one range are a random sample.
        """
        self._existing()
        space = 1 << IMAGE_KEY_BITS
        total = self.count_images()
        width = space if total <= _KEYS else min(space, math.ceil(space * 1.2 * count / total))
        first = int(np.random.default_rng(seed).integers(space))
        ranges = [(first, min(first + width, space)), (0, max(0, first + width - space))]
        condition = " or ".join(f"(image_key >= {low} and image_key < {high})" for low, high in ranges)
        rows = self._reading(
            "drawing a sample",
            self._client.query,
            self._images,
            filter=condition,
            output_fields=["image_key"],
            limit=_QUERIES,
            consistency_level=_SESSION,
        )
        keys = sorted((int(row["image_key"]) for row in rows), key=lambda key: (key - first) % space)[:count]
        found: dict[int, tuple[ImageRecord, Features]] = {}
        for start in range(0, len(keys), _DESCRIBED):
            found.update(self.stored(keys[start : start + _DESCRIBED]))
        return found

    def index_status(self, k: int = 120) -> IndexStatus:
        """The index of the features; nothing is loaded or built. k: neighbours that a search asks for."""
        self._existing()
        return self._indexing.status(k)

    def list(
        self, prefix: str = "", limit: int | None = None, root: str | None = None, after: str = ""
    ) -> Iterator[ImageRecord]:
        """The images in the order of their ids.

        prefix: only ids that start so. limit: at most so many. root: only images ingested from this folder. after: only
        ids beyond this one, to go on from an earlier listing. With a tenant set, only that tenant's images.
        Memory holds one id for each image that is listed.
        """
        facts = self._attach()
        if facts is None:
            return
        conditions = [tenant] if (tenant := self._of_tenant(facts)) else []
        conditions += _starting(prefix)
        if root is not None:
            conditions.append(f"root == {quoted(root)}")
        if after:
            conditions.append(f"image_id > {quoted(after)}")
        found = ((row["image_id"], int(row["image_key"])) for row in self._scan(" and ".join(conditions)))
        chosen = sorted(found) if limit is None else heapq.nsmallest(limit, found)
        for start in range(0, len(chosen), _KEYS):
            yield from self._records([key for _, key in chosen[start : start + _KEYS]], facts).values()

    def _attach(self) -> CollectionFacts | None:
        """The facts of the collections, checked; None while they do not exist."""
        if self._attached:
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
        self._attached = True
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
        if self._declared and (facts.declared, facts.tenant_field) != (self._declared, self._settings.tenant_field):
            kept = ", ".join(f"{field.name}: {field.declaration}" for field in facts.declared) or "none"
            raise CollectionError(
                f"The collection {self._collection!r} at {self._db.where} was made with other declared fields ({kept}"
                f"{f'; tenant: {facts.tenant_field}' if facts.tenant_field else ''}); declare these or none, or ingest "
                "into a new collection with --collection."
            )
        return facts

    def _planned(self) -> CollectionFacts:
        """The facts that new collections get."""
        fingerprint = self._facts.fingerprint if self._facts else self._fingerprint
        if fingerprint is None:
            raise UsageError(f"There is no collection {self._collection!r} yet, and no model to create it for.")
        if self._facts:
            return self._facts
        chunks = chunks_needed(self._max_features, fingerprint.dim)
        return CollectionFacts(fingerprint, chunks, self._declared, self._settings.tenant_field)

    def _owner(self) -> str:
        """The tenant whose images are read and written by id; "" in a collection without tenants."""
        tenant_field = self._facts.tenant_field if self._facts else self._settings.tenant_field
        if tenant_field and not self._tenant:
            raise UsageError(
                f"The collection {self._collection!r} keeps tenants apart by {tenant_field!r}: say whose images are "
                "meant with --tenant."
            )
        if self._tenant and not tenant_field:
            raise UsageError(f"The collection {self._collection!r} has no tenants; leave --tenant out.")
        return self._tenant

    def _of_tenant(self, facts: CollectionFacts) -> str:
        """The condition that keeps to the tenant, "" where none is set."""
        return f"{facts.tenant_field} == {quoted(self._owner())}" if self._tenant else ""

    def _existing(self) -> CollectionFacts:
        facts = self._attach()
        if facts is None:
            raise CollectionError(_absent(self._collection, self._db.where))
        return facts

    def _feature_rows(self) -> int:
        """Rows of the features. Without an index they cannot be loaded and counted: then those flushed."""
        if self._indexing.described(self._features) != NO_INDEX:
            return self.count_features()
        return self._indexing.flushed_rows(self._features)

    def _created(self, made: CollectionFacts | None = None) -> CollectionFacts:
        """The facts of the collections, which are created where they are absent, as `made` says or as planned."""
        facts = self._attach()
        if facts is not None:
            return facts
        with self._state_lock:
            made = self._facts or made or self._planned()
            self._create(self._features, made.features, made)
            self._create(self._images, made.images, made)
            facts = self._attach()
        if facts is None:
            raise CollectionError(f"The collection {self._collection!r} vanished while it was created; try again.")
        return facts

    def _create(self, name: str, spec: CollectionSpec, facts: CollectionFacts) -> None:
        with self._db.asking(f"creating the collection {name!r}"):
            if self._client.has_collection(name, timeout=self._settings.timeout):
                return
            self._client.create_collection(
                name,
                schema=schema.to_pymilvus(spec),
                index_params=self._indexing.params(name, self._indexing.profile(name, 0), spec.filtered),
                properties={
                    schema.PROPERTY: facts.to_json(),
                    **generations.properties(self._collection, self._generation),
                },
                consistency_level=_SESSION,
                timeout=self._settings.timeout,
            )

    def _dim(self) -> int:
        known = self._facts.fingerprint if self._facts else self._fingerprint
        return known.dim if known else 1

    def _load(self, name: str) -> None:
        """Load a collection, which then has an index; without the state's lock, for this may wait for a writer."""
        self._indexing.load(name)
        self._loaded.add(name)

    def _ensure_loaded(self, name: str) -> None:
        if name not in self._loaded:
            self._load(name)

    def _reading(self, doing: str, read: Any, collection_name: str, *arguments: Any, **options: Any) -> Any:
        """Call the client for a loaded collection; where somebody released it meanwhile, load it and call again."""
        self._ensure_loaded(collection_name)
        try:
            return self._db.call(doing, read, collection_name, *arguments, **options)
        except NotLoadedError:
            # An index that is being exchanged must stay released until that is done: wait for the writer.
            with self._db.write_lock:
                self._db.patiently(partial(self._load, collection_name))
            return self._db.call(doing, read, collection_name, *arguments, **options)

    def _rows(self, keys: Sequence[int], fields: Sequence[str], consistency: str = _STRONG) -> dict[int, Row]:
        """Rows of the images collection by primary key."""
        if self._attach() is None:
            return {}
        return self._by_key(self._images, "image_key", keys, fields, consistency)

    def _records(self, keys: Sequence[int], facts: CollectionFacts) -> dict[int, ImageRecord]:
        """Records by image key, those that exist, in the given order."""
        rows = self._rows(keys, records.record_fields(facts))
        return {key: records.record_of(rows[key], facts.tenant_field) for key in keys if key in rows}

    def _by_key(
        self,
        name: str,
        primary: str,
        keys: Sequence[int],
        fields: Sequence[str],
        consistency: str,
        step: int = _KEYS,
    ) -> dict[int, Row]:
        calls = _get_calls(name, primary, keys, fields, consistency, step)
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
            output_fields=["image_id", "image_key"],
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

    def _leftovers(self, written: Mapping[int, Columns], stored: Mapping[int, Row]) -> Keys:
        """Keys of features, in rising order, that earlier versions of these images have beyond the new ones."""
        keys: list[npt.NDArray[np.int64]] = []
        unknown: dict[int, int] = {}
        for key, columns in written.items():
            count = length(columns)
            if key in stored:
                keys.append(feature_keys(key, max(count, int(stored[key]["feature_count"])), count))
            elif count < MAX_FEATURES:
                unknown[int(feature_keys(key, count + 1, count)[0])] = count
        found = self._by_key(self._features, "feature_key", list(unknown), (), _STRONG)
        keys.extend(feature_keys(first >> ORDINAL_BITS, MAX_FEATURES, unknown[first]) for first in found)
        return np.concatenate(keys).tolist() if keys else []

    def _write_features(self, written: Mapping[int, Columns], stored: Mapping[int, Row]) -> None:
        """As files where they are many and new, else as messages."""
        parts = {key: columns for key, columns in written.items() if length(columns)}
        spec = self._existing().features
        if self._bulk.enabled and sum(map(length, parts.values())) >= self._settings.bulk_from:
            # An import replaces nothing: it takes images without any feature, which would be the one of ordinal 0.
            first = {int(parts[key]["feature_key"][0]): key for key in parts if key not in stored}
            there = self._by_key(self._features, "feature_key", list(first), (), _STRONG)
            new = sorted(key for feature, key in first.items() if feature not in there)
            if sum(length(parts[key]) for key in new) >= self._settings.bulk_from:
                self._bulk.start(spec, joined([parts.pop(key) for key in new]))
        self._write_columns(self._features, spec, list(parts.values()))

    def _write_columns(self, name: str, spec: CollectionSpec, parts: Sequence[Columns]) -> None:
        for batch in slices(joined(parts), self._settings.batch_bytes) if parts else ():
            write_columns(self._db, name, spec, batch)

    def _write_images(self, rows: Sequence[Row]) -> None:
        spec = self._existing().images
        # An array's text would take longer than everything else here.
        sizes = [sum(v.nbytes if isinstance(v, np.ndarray) else len(str(v)) for v in row.values()) for row in rows]
        for batch in records.batches(rows, sizes, self._settings.batch_bytes):
            write_columns(self._db, self._images, spec, records.image_columns(batch, spec))

    def _redeclared(self, key: int, count: int, metadata: Mapping[str, Any]) -> Columns:
        """The features of an image with other values of its declared fields."""
        spec = self._existing().features
        changed = {one.name: records.repeated(spec, one.name, metadata[one.name], count) for one in spec.filtered}
        return self.feature_columns({key: count}) | changed

    def _delete_rows(self, name: str, keys: Sequence[int]) -> None:
        """Delete by primary key, the last ones first."""
        for end in range(len(keys), 0, -_QUERIES):
            self._db.call("deleting", self._client.delete, name, ids=list(keys[max(0, end - _QUERIES) : end]))


def _get_calls(
    name: str, primary: str, keys: Sequence[int], fields: Sequence[str], consistency: str, step: int = _KEYS
) -> list[dict[str, Any]]:
    return [
        {
            "collection_name": name,
            "ids": list(keys[start : start + step]),
            "output_fields": [primary, *fields],
            "consistency_level": consistency,
        }
        for start in range(0, len(keys), step)
    ]


def _by_primary(primary: str, results: Iterable[Sequence[Row]]) -> dict[int, Row]:
    return {int(row[primary]): row for rows in results for row in rows}


def _check_name(collection: str) -> None:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", collection):
        raise UsageError(f"{collection!r} cannot name a collection: use at most 200 letters, digits and underscores.")


def _check_collision(earlier: str, image_id: str) -> None:
    if earlier != image_id:
        raise DatabaseError(f"The ids {earlier!r} and {image_id!r} happen to have the same key: rename one of them.")


def _starting(prefix: str) -> list[str]:
    """The condition that an id starts so, if there is any: a range, because not every version can escape `like`."""
    if not prefix:
        return []
    end = prefix + chr(0x10FFFF)
    return [f"image_id >= {quoted(prefix)} and image_id <= {quoted(end)}"]


def _other_model(what: str, theirs: Fingerprint, ours: Fingerprint) -> str:
    differences = "; ".join(theirs.differences(ours))
    return (
        f"The model of {what} is another one ({differences}): use a new collection, or the settings it was made with."
    )


def _absent(collection: str, where: str) -> str:
    return f"There is no collection {collection!r} in {where}; run `delf-milvus ingest FOLDER` first."
