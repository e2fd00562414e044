"""The two collections of one generation of an index: what they were made for, creating, checking and loading them.

A store reads and writes one generation of a collection, the one that was current when it was opened, by the true names
of its two collections: an alias that moves meanwhile changes nothing for it, except that it writes no more.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from delf_milvus.errors import CollectionError, DatabaseError, UsageError
from delf_milvus.features import Fingerprint
from delf_milvus.settings import StoreSettings
from delf_milvus.store import generations, schema
from delf_milvus.store.codec import chunks_needed
from delf_milvus.store.connection import Connection, NotLoadedError
from delf_milvus.store.fields import declared
from delf_milvus.store.filters import quoted
from delf_milvus.store.indexing import Indexing
from delf_milvus.store.schema import CollectionFacts, CollectionSpec, Field

log = logging.getLogger(__name__)

SESSION = "Session"


class AttachedCollections:
    """The collections, found at the first use; the base of what reads and writes them."""

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
        self._generation = generation or generations.current(database, collection)
        # A generation that is being made is written before it is the current one.
        self._is_made = generation is not None
        self._features = self._generation + schema.FEATURES_SUFFIX
        self._images = self._generation + schema.IMAGES_SUFFIX
        self._fingerprint = fingerprint
        self._settings = settings
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
        self._indexing = Indexing(
            database, self._features, self._images, settings, self._dim, index_from, self._filtered
        )
        self._loaded: set[str] = set()
        self._attached = False

    @property
    def connection(self) -> Connection:
        """The database, and what is known about it."""
        return self._db

    @property
    def generation(self) -> str:
        """The name that both collections of this store start with: the collection's own, or that of a rebuilt one."""
        return self._generation

    @property
    def stored_fingerprint(self) -> Fingerprint | None:
        """Fingerprint of the model that the collection was made with; None while there is no collection."""
        return self._facts.fingerprint if self._facts else None

    @property
    def expected_fingerprint(self) -> Fingerprint | None:
        """Fingerprint of the only model that this store takes; None where it takes what is stored."""
        return self._fingerprint

    def expect(self, fingerprint: Fingerprint) -> None:
        """From here on take a collection of this model alone, and make it for it.

        Raises CollectionError where there is one of another model.
        """
        with self._state_lock:
            self._attach()
            if self._facts is not None:
                self._check_model(self._facts.fingerprint, fingerprint)
            self._fingerprint = fingerprint

    @property
    def facts(self) -> CollectionFacts | None:
        """What the collections were made for; None while they do not exist."""
        return self._attach()

    def create(self) -> None:
        """Create the collections where they are absent, which otherwise the first write does."""
        with self._db.write_lock:
            self._created()

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
        if (facts.indexed, facts.indexed_choice) != (made.indexed, made.indexed_choice):
            raise CollectionError(
                f"The collection {self._collection!r} indexes another number or choice of an image's features than "
                "what is to be imported: import into a new collection with --collection."
            )
        if facts.chunks < made.chunks:
            raise CollectionError(
                f"The collection {self._collection!r} was made for fewer features an image than what is to be "
                "imported: import into a new collection with --collection."
            )

    def reload(self) -> None:
        """Load the collections again after somebody released them; waits for a writer that exchanges an index."""
        with self._db.write_lock:
            for name in (self._features, self._images):
                self._db.patiently(partial(self._load, name))

    def _attach(self) -> CollectionFacts | None:
        """The facts of the collections, checked; None while they do not exist."""
        if self._attached:
            return self._facts
        with self._state_lock:
            names = (self._features, self._images)
            looking = partial(self._db.call, "looking for the collections")
            present = [name for name in names if looking(self._client.has_collection, name)]
            for name in present:
                described = looking(self._client.describe_collection, name)
                self._facts = self._checked(name, described.get("properties") or {})
            if len(present) < len(names):
                return None
        self._attached = True
        return self._facts

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
        if self._fingerprint is not None:
            self._check_model(facts.fingerprint, self._fingerprint)
        if self._declared and (facts.declared, facts.tenant_field) != (self._declared, self._settings.tenant_field):
            kept = ", ".join(f"{field.name}: {field.declaration}" for field in facts.declared) or "none"
            raise CollectionError(
                f"The collection {self._collection!r} at {self._db.where} was made with other declared fields ({kept}"
                f"{f'; tenant: {facts.tenant_field}' if facts.tenant_field else ''}); declare these or none, or ingest "
                "into a new collection with --collection."
            )
        own = self._settings
        if own.indexed_features and (facts.indexed, facts.indexed_choice) != (own.indexed_features, own.indexed_choice):
            kept = f"{facts.indexed} ({facts.indexed_choice})" if facts.indexed else "all"
            raise CollectionError(
                f"The collection {self._collection!r} at {self._db.where} was made to index {kept} of an image's "
                "features: leave store.indexed_features out, or ingest into a new collection with --collection."
            )
        return facts

    def _check_model(self, stored: Fingerprint, wanted: Fingerprint) -> None:
        if stored == wanted:
            return
        here = f"The collection {self._collection!r} at {self._db.where}"
        if stored.made_elsewhere and not wanted.made_elsewhere:
            raise CollectionError(
                f"{here} holds features made elsewhere ({stored.made_elsewhere}, {stored.dim} components), not this "
                "model's: give it feature files of that extractor with --features, or name another with --collection."
            )
        differences = "; ".join(stored.differences(wanted))
        raise CollectionError(
            f"{here} was made with another model ({differences}); use that model and those settings, or ingest into a "
            "new collection with --collection."
        )

    def _planned(self) -> CollectionFacts:
        """The facts that new collections get."""
        fingerprint = self._facts.fingerprint if self._facts else self._fingerprint
        if fingerprint is None:
            raise UsageError(f"There is no collection {self._collection!r} yet, and no model to create it for.")
        if self._facts:
            return self._facts
        chunks = chunks_needed(self._max_features, fingerprint.dim)
        own = self._settings
        facts = CollectionFacts(fingerprint, chunks, self._declared, own.tenant_field)
        if own.indexed_features is None:
            return facts
        return replace(facts, indexed=own.indexed_features, indexed_choice=own.indexed_choice)

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
            raise CollectionError(absent_sentence(self._collection, self._db.where))
        return facts

    def _created(self, made: CollectionFacts | None = None) -> CollectionFacts:
        """The facts of the collections, which are created where they are absent, as `made` says or as planned."""
        facts = self._attach()
        if facts is not None:
            return facts
        with self._state_lock:
            made = self._facts or made or self._planned()
            self._create(self._features, made.features, made)
            # Whoever else makes them at the same time may do so for another model: who made the features decides.
            self._attach()
            made = self._facts or made
            self._create(self._images, made.images, made)
            facts = self._attach()
        if facts is None:
            raise CollectionError(f"The collection {self._collection!r} vanished while it was created; try again.")
        return facts

    def _create(self, name: str, spec: CollectionSpec, facts: CollectionFacts) -> None:
        """Create one of the collections, unless somebody else does so first: what they made it for is checked next."""
        if self._is_there(name):
            return
        try:
            with self._db.asking(f"creating the collection {name!r}"):
                self._client.create_collection(
                    name,
                    schema=schema.to_pymilvus(spec),
                    properties={
                        schema.PROPERTY: facts.to_json(),
                        **generations.properties(self._collection, self._generation),
                    },
                    consistency_level=SESSION,
                    timeout=self._settings.timeout,
                )
                self._indexing.begin(name, spec.filtered)
        except DatabaseError:
            if not self._is_there(name):
                raise
            log.info("somebody else created the collection %s at the same time", name, exc_info=True)

    def _is_there(self, name: str) -> bool:
        return bool(self._db.call("looking for the collections", self._client.has_collection, name))

    def _dim(self) -> int:
        known = self._facts.fingerprint if self._facts else self._fingerprint
        return known.dim if known else 1

    def _filtered(self, name: str) -> Sequence[Field]:
        if self._facts is None:
            return ()
        return (self._facts.features if name == self._features else self._facts.images).filtered

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


def _other_model(what: str, theirs: Fingerprint, ours: Fingerprint) -> str:
    differences = "; ".join(theirs.differences(ours))
    return (
        f"The model of {what} is another one ({differences}): use a new collection, or the settings it was made with."
    )


def absent_sentence(collection: str, where: str) -> str:
    """For CollectionError."""
    return f"There is no collection {collection!r} in {where}; run `delf-milvus ingest FOLDER` first."
