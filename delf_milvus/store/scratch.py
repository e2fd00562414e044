"""A collection of descriptors beside an index's own, for measuring, dropped when it is done.

It holds keys and descriptors alone, is called `<collection>_scratch`, and is marked as ours: what a crash left is
replaced by the next one, and a collection of that name that somebody else made is left alone.
"""

from __future__ import annotations

from types import TracebackType

import numpy as np

from delf_milvus.errors import CollectionError
from delf_milvus.features import Float32Array
from delf_milvus.settings import StoreSettings
from delf_milvus.store import schema
from delf_milvus.store.connection import Connection
from delf_milvus.store.hits import search_arrays
from delf_milvus.store.indexing import FEATURE_VECTOR, Indexing
from delf_milvus.store.keys import Int64Array
from delf_milvus.store.profiles import INDEX_FROM, METRIC, Engine, IndexProfile, choose

_SCRATCH = "scratch"


class Scratch:
    """Made when entered, dropped when left, whatever happened between. Raises DatabaseError, CollectionError.

    dim: components of a descriptor. rows: inserted so far. engine: what this server can build.
    """

    def __init__(self, database: Connection, collection: str, dim: int, settings: StoreSettings) -> None:
        self._db = database
        self._client = database.client
        self._name = f"{collection}_{_SCRATCH}"
        self.dim = dim
        self._settings = settings
        self._indexing = Indexing(database, self._name, "", settings, lambda: dim, INDEX_FROM)
        self.rows = 0
        self.engine = Engine.of(database.version)

    def __enter__(self) -> Scratch:
        timeout = self._settings.timeout
        with self._db.asking(f"creating the collection {self._name!r}"):
            if self._client.has_collection(self._name, timeout=timeout):
                properties = self._client.describe_collection(self._name, timeout=timeout).get("properties") or {}
                if properties.get(schema.PROPERTY) != _SCRATCH:
                    raise CollectionError(
                        f"The collection {self._name!r} at {self._db.where} was made by other software: rename "
                        "it, its name is needed."
                    )
                self._client.drop_collection(self._name, timeout=timeout)
            whole = schema.features_spec(self.dim)
            fields = tuple(field for field in whole.fields if field.name in ("feature_key", FEATURE_VECTOR))
            spec = schema.CollectionSpec("", "delf-milvus: for measuring", fields, FEATURE_VECTOR, dynamic=False)
            self._client.create_collection(
                self._name,
                schema=schema.to_pymilvus(spec),
                index_params=self._indexing.params(self._name, choose("auto", self.engine, self.dim, 0)),
                properties={schema.PROPERTY: _SCRATCH},
                consistency_level="Session",
                timeout=timeout,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._db.asking(f"dropping the collection {self._name!r}"):
            self._client.drop_collection(self._name, timeout=self._settings.timeout)

    def insert(self, keys: Int64Array, descriptors: Float32Array) -> None:
        """Add rows: (N,) int64 keys and (N, D) float32 descriptors."""
        step = max(1, self._settings.batch_bytes // (4 * self.dim + 64))
        for start in range(0, len(keys), step):
            part = slice(start, start + step)
            rows = [
                {"feature_key": key, FEATURE_VECTOR: descriptor}
                for key, descriptor in zip(keys[part].tolist(), descriptors[part], strict=True)
            ]
            with self._db.asking("writing"):
                self._client.insert(self._name, rows, timeout=self._settings.timeout)
        self.rows += len(keys)

    def build(self, profile: IndexProfile) -> None:
        """Give the rows this index, and load them."""
        self._indexing.put(profile, self.rows)

    def neighbours(self, queries: Float32Array, k: int, params: dict[str, float]) -> tuple[Int64Array, Float32Array]:
        """Keys (Q, k) and similarities (Q, k), as of `FeatureStore.neighbours`, searched with these parameters."""
        with self._db.asking("searching for neighbours"):
            return search_arrays(
                self._client,
                self._name,
                k,
                data=list(np.ascontiguousarray(queries)),
                anns_field=FEATURE_VECTOR,
                search_params={"metric_type": METRIC, "params": params},
                output_fields=["feature_key"] if self._db.backend == "lite" else [],
                consistency_level="Session",
                timeout=self._settings.timeout,
            )
