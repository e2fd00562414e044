"""One index on Milvus Lite or a Milvus server, opened: what `reading` and `writing` do, its index, its upkeep.

A collection without its index, after a crash or a drop, has one again before it is loaded, which the first read does.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from types import TracebackType
from typing import TYPE_CHECKING

from delf_milvus.errors import CollectionError, UsageError
from delf_milvus.features import Fingerprint
from delf_milvus.settings import Profile, StoreSettings
from delf_milvus.store import connection, generations, schema, upkeep
from delf_milvus.store.attached import absent_sentence
from delf_milvus.store.connection import Connection
from delf_milvus.store.fsck import Fsck, FsckReport, Progress
from delf_milvus.store.indexing import NO_INDEX, IndexStatus, Watcher
from delf_milvus.store.profiles import INDEX_FROM, memory_bytes
from delf_milvus.store.reading import Ids
from delf_milvus.store.scratch import Scratch
from delf_milvus.store.writing import StoreWriter

if TYPE_CHECKING:
    from pymilvus import MilvusClient


@dataclass(frozen=True)
class StoreStatus:
    """What `status` prints.

    backend: "Milvus Lite 3.2.2". uri: without secrets. collection: as asked for; exists tells whether it does.
    generation: the name that both of its collections start with; alias: the alias that says so, or "" for a collection
    that was never rebuilt. images, features: rows. index_asked: the setting. index_used, index_params: what is built.
    substitute_for: the index that index_used stands in for because this backend lacks it, or "". index_state: as Milvus
    says. indexed_rows, index_total_rows: how far it is built; what was written a moment ago is in neither.
    memory_bytes: an estimate for the loaded features. fingerprint: of the model that filled the collection.
    made_elsewhere: who made its features, where no model of ours did, else "". fields: declarations of the fields that
    a search can be filtered by. tenant_field: the one that keeps tenants apart, or "". indexed_features: most of an
    image that are rows, 0 for all; indexed_choice: which ones. pymilvus: its version.
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
    made_elsewhere: str
    fields: Mapping[str, str]
    tenant_field: str
    indexed_features: int
    indexed_choice: str
    schema_version: int
    pymilvus: str


class FeatureStore(StoreWriter):
    """Writes, finds and reads the images of one index. Safe to search from many threads; writes queue up.

    Open it with `FeatureStore.open`, close it with `close` or as a context manager.
    """

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
                raise CollectionError(absent_sentence(collection, uri))
            database = connection.connect(uri, token, settings)
        else:
            adopted = isinstance(client, Connection)
            patience = settings.retry_seconds
            database = client if adopted else connection.adopt(client, settings.timeout, retry_seconds=patience)
        try:
            store = cls(database, collection, fingerprint, settings, max_features, index_from)
            if not store._attach() and not create:
                raise CollectionError(absent_sentence(collection, database.where))
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

    def rebuilt(self, fingerprint: Fingerprint, max_features: int) -> FeatureStore:
        """The store that a rebuild for another model fills, over the same connection: a generation of that model that
        was begun or left, or a new one.

        Raises CollectionError where the database has no aliases to switch, UsageError where a tenant is set.
        """
        facts = self._existing()
        if self._tenant:
            raise UsageError("A rebuild takes the images of all tenants: leave --tenant out.")
        generation = generations.target(self._db, self._collection, fingerprint, self._generation, self._settings)
        fields = {field.name: field.declaration for field in facts.declared}
        kept: dict[str, object] = {"fields": fields, "tenant_field": facts.tenant_field}
        if facts.indexed:
            kept |= {"indexed_features": facts.indexed, "indexed_choice": facts.indexed_choice}
        settings = self._settings.model_copy(update=kept)
        return FeatureStore(
            self._db, self._collection, fingerprint, settings, max_features, self._index_from, generation
        )

    def of_tenant(self, tenant: str) -> FeatureStore:
        """This store as one tenant's, over the same connection, which this one still closes; "": nobody's."""
        one = copy.copy(self)
        one._tenant = tenant
        return one

    def become_current(self) -> None:
        """From here on the collection is this generation for whoever opens it: one alias is set, in one call."""
        generations.switch(self._db, self._collection, self._generation, self._settings.timeout)
        self._is_made = False

    def drop_others(self) -> Ids:
        """Drop the other generations of the collection, also one that is being made; returns their names."""
        return generations.drop_others(self._db, self._collection, self._generation, self._settings.timeout)

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
            made_elsewhere=facts.fingerprint.made_elsewhere if facts else "",
            fields={field.name: field.declaration for field in (facts.declared if facts else self._declared)},
            tenant_field=facts.tenant_field if facts else self._settings.tenant_field,
            indexed_features=facts.indexed if facts else self._settings.indexed_features or 0,
            indexed_choice=facts.indexed_choice if facts else self._settings.indexed_choice,
            schema_version=facts.schema_version if facts else schema.SCHEMA_VERSION,
            pymilvus=installed_version("pymilvus"),
        )

    def index_status(self, k: int = 120) -> IndexStatus:
        """The index of the features; nothing is loaded or built. k: neighbours that a search asks for."""
        self._existing()
        return self._indexing.status(k)

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
            self._indexing.exchange(self._feature_rows())
            self._loaded.add(self._features)

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

    def await_index(self) -> None:
        """Wait until the index holds all descriptors that are flushed, and searches go to it and to nothing else.

        Raises CollectionError without a collection, DatabaseError.
        """
        self._existing()
        self._indexing.await_all(self._features)

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

    def fsck(self, repair: bool = False, progress: Progress | None = None) -> FsckReport:
        """Look for what does not fit together, and with `repair` mend it: see `fsck`. Raises DatabaseError."""
        with self._db.write_lock:
            facts = self._attach()
            if facts is None:
                raise CollectionError(absent_sentence(self._collection, self._db.where))
            for name in (self._features, self._images):
                self._ensure_loaded(name)
            report = Fsck(self._db, self._features, self._images, facts).run(repair, progress)
            if repair and report.findings:
                self._indexing.outdated = True
                self.ensure_index()
        return report

    def compact(self, progress: Callable[[str], None] | None = None) -> upkeep.CompactionReport:
        """Merge small segments, drop deleted rows, index what is left: see `upkeep.compact`. Raises DatabaseError."""
        with self._db.write_lock:
            if self._attach() is None:
                raise CollectionError(absent_sentence(self._collection, self._db.where))
            return upkeep.compact(self._db, self._indexing, (self._features, self._images), progress)


def _check_name(collection: str) -> None:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", collection):
        raise UsageError(f"{collection!r} cannot name a collection: use at most 200 letters, digits and underscores.")
