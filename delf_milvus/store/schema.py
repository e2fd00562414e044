"""Both collections as data, and what is stored with them so that a later opening can tell whether they fit.

Nothing here imports pymilvus except `to_pymilvus`. What the collections were made for (`CollectionFacts`) is one
property of each of them: Milvus Lite keeps properties, but neither the description of a collection nor of its fields.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, get_args

from delf_milvus.errors import UsageError
from delf_milvus.features import Fingerprint
from delf_milvus.settings import IndexedChoice
from delf_milvus.store.codec import MAX_TEXT
from delf_milvus.store.fields import MAX_TEXT_BYTES, DeclaredField, FieldKind

if TYPE_CHECKING:
    from pymilvus import CollectionSchema

FieldType = Literal["INT64", "FLOAT", "DOUBLE", "BOOL", "VARCHAR", "FLOAT_VECTOR"]

SCHEMA_VERSION = 1
"""Version of both collections' fields, of the keys and of the packed text."""

PROPERTY = "delf_milvus"
"""Property of a collection that holds its `CollectionFacts`."""

MAX_ID_BYTES = 1024
"""Longest image id, UTF-8 bytes."""

MAX_URI_BYTES = 8192
"""Longest uri or root, UTF-8 bytes."""

MAX_METADATA_BYTES = 65000
"""Longest free metadata of one image, bytes of JSON: a dynamic field holds 65536."""

GLOBAL = "global_descriptor"
"""Field of an image's row: one vector of the whole photo."""

FEATURES_SUFFIX = "_features"
IMAGES_SUFFIX = "_images"


@dataclass(frozen=True)
class Field:
    """One field of a collection.

    size: bytes of a VARCHAR, components of a FLOAT_VECTOR, else 0. tenant: rows are partitioned by it.
    """

    name: str
    type: FieldType
    description: str
    size: int = 0
    primary: bool = False
    tenant: bool = False


@dataclass(frozen=True)
class CollectionSpec:
    """A collection: its fields, the vector field that is indexed, whether rows carry free (dynamic) fields, and the
    fields (among the others) that searches are filtered by."""

    suffix: str
    description: str
    fields: tuple[Field, ...]
    vector: str
    dynamic: bool
    filtered: tuple[Field, ...] = ()


_TYPES: dict[FieldKind, FieldType] = {"text": "VARCHAR", "integer": "INT64", "number": "DOUBLE", "boolean": "BOOL"}


def declared_fields(fields: Sequence[DeclaredField], tenant_field: str) -> tuple[Field, ...]:
    """The fields that both collections have for the declared ones."""
    return tuple(
        Field(
            field.name,
            _TYPES[field.kind],
            f"declared: {field.declaration}",
            MAX_TEXT_BYTES if field.kind == "text" else 0,
            tenant=field.name == tenant_field,
        )
        for field in fields
    )


def features_spec(dim: int, declared: tuple[Field, ...] = ()) -> CollectionSpec:
    """The collection with one row for each keypoint, descriptors of `dim` components."""
    return CollectionSpec(
        FEATURES_SUFFIX,
        "delf-milvus: one row for each keypoint",
        (
            Field("feature_key", "INT64", "image_key << 12 | ordinal in falling attention", primary=True),
            Field("descriptor", "FLOAT_VECTOR", "local descriptor of unit L2 norm", dim),
            Field("image_key", "INT64", "51 bits of BLAKE2b over tenant and image_id"),
            Field("x", "FLOAT", "pixels of the image as decoded upright, pixel centres at integers"),
            Field("y", "FLOAT", "pixels of the image as decoded upright, pixel centres at integers"),
            Field("scale", "FLOAT", "1 / pyramid scale"),
            Field("attention", "FLOAT", "attention score"),
            *declared,
        ),
        "descriptor",
        dynamic=False,
        filtered=declared,
    )


def keypoint_fields(chunks: int) -> list[str]:
    """Names of the fields that hold an image's packed features: keypoints, keypoints_1, ..."""
    return ["keypoints" if part == 0 else f"keypoints_{part}" for part in range(chunks)]


def images_spec(dim: int, chunks: int, declared: tuple[Field, ...] = ()) -> CollectionSpec:
    """The collection with one row for each image, its packed features in `chunks` fields, global descriptors of `dim`
    components."""
    return CollectionSpec(
        IMAGES_SUFFIX,
        "delf-milvus: one row for each image; an image without its row does not exist",
        (
            Field("image_key", "INT64", "51 bits of BLAKE2b over tenant and image_id", primary=True),
            Field("image_id", "VARCHAR", "id given at ingest", MAX_ID_BYTES),
            Field("uri", "VARCHAR", "where the photo was read from", MAX_URI_BYTES),
            Field("sha256", "VARCHAR", "SHA-256 of the photo's bytes, hexadecimal", 64),
            Field("width", "INT64", "pixels, upright"),
            Field("height", "INT64", "pixels, upright"),
            Field("feature_count", "INT64", "rows of this image in the features collection"),
            Field("model", "VARCHAR", "short fingerprint of the model", 64),
            Field("ingested_at", "VARCHAR", "ISO 8601, UTC", 64),
            Field("root", "VARCHAR", "folder that this image was ingested from", MAX_URI_BYTES),
            *(Field(name, "VARCHAR", "packed features, base64", MAX_TEXT) for name in keypoint_fields(chunks)),
            Field(GLOBAL, "FLOAT_VECTOR", "of the whole photo: the model's, or the mean local one", dim),
            *declared,
        ),
        GLOBAL,
        dynamic=True,
        filtered=declared,
    )


RESERVED = frozenset(field.name for spec in (features_spec(1), images_spec(1, 1)) for field in spec.fields)
"""Names that neither a declared field nor free metadata can have."""


@dataclass(frozen=True)
class CollectionFacts:
    """What a collection was made for: the model, how many VARCHAR fields a packed image has, the declared fields, which
    of them is the tenant ("" for none), the schema's version, how many features of an image are rows (0: all) and which
    ones ("top" or "spread")."""

    fingerprint: Fingerprint
    chunks: int
    declared: tuple[DeclaredField, ...] = ()
    tenant_field: str = ""
    schema_version: int = SCHEMA_VERSION
    indexed: int = 0
    indexed_choice: IndexedChoice = "top"

    def rows_of(self, count: int) -> int:
        """How many rows the features collection has of an image with `count` features."""
        return min(count, self.indexed) if self.indexed else count

    @property
    def features(self) -> CollectionSpec:
        """The collection of the features."""
        return features_spec(self.fingerprint.dim, declared_fields(self.declared, self.tenant_field))

    @property
    def images(self) -> CollectionSpec:
        """The collection of the images."""
        fields = declared_fields(self.declared, self.tenant_field)
        return images_spec(self.fingerprint.global_dim or self.fingerprint.dim, self.chunks, fields)

    def to_json(self) -> str:
        """Canonical JSON text, the value of the property `PROPERTY`."""
        fields = {field.name: field.declaration for field in self.declared}
        fingerprint = json.loads(self.fingerprint.to_json())
        return json.dumps({**asdict(self), "fingerprint": fingerprint, "declared": fields}, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> CollectionFacts:
        """The inverse of `to_json`; raises ValueError for anything else, other schema versions included."""
        try:
            values = json.loads(text)
            version, chunks = int(values["schema_version"]), int(values["chunks"])
            fingerprint = values["fingerprint"]
            declared = tuple(DeclaredField.parse(*item) for item in sorted(values.get("declared", {}).items()))
            tenant_field = str(values.get("tenant_field", ""))
            indexed, choice = int(values.get("indexed", 0)), values.get("indexed_choice", "top")
        except (TypeError, KeyError, AttributeError, UsageError) as error:
            raise ValueError(f"not the facts of a collection: {error}") from error
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema version {version}, this program knows {SCHEMA_VERSION}")
        if indexed < 0 or choice not in get_args(IndexedChoice):
            raise ValueError(f"it indexes {indexed} features of an image, chosen by {choice!r}")
        model = Fingerprint.from_json(json.dumps(fingerprint))
        return CollectionFacts(model, chunks, declared, tenant_field, version, indexed, choice)


def to_pymilvus(spec: CollectionSpec) -> CollectionSchema:
    """The specification as pymilvus takes it."""
    from pymilvus import DataType, MilvusClient

    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=spec.dynamic, description=spec.description)
    for field in spec.fields:
        sizes = {"VARCHAR": {"max_length": field.size}, "FLOAT_VECTOR": {"dim": field.size}}.get(field.type, {})
        schema.add_field(
            field.name,
            DataType[field.type],
            is_primary=field.primary,
            is_partition_key=field.tenant,
            description=field.description,
            **sizes,
        )
    return schema
