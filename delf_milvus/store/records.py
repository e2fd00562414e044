"""Images and their features as rows of the two collections, and back.

What a caller gives is checked here, before anything is written: ids and metadata come from strangers' folders and
tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
import numpy.typing as npt

from delf_milvus.errors import CollectionError, DatabaseError, InputError, one_line
from delf_milvus.features import Features, Float32Array
from delf_milvus.store.codec import pack, split, unpack
from delf_milvus.store.columns import METADATA, Columns
from delf_milvus.store.fields import typed_values
from delf_milvus.store.keys import feature_keys, image_key
from delf_milvus.store.schema import (
    GLOBAL,
    MAX_ID_BYTES,
    MAX_METADATA_BYTES,
    MAX_URI_BYTES,
    RESERVED,
    CollectionFacts,
    CollectionSpec,
    FieldType,
    keypoint_fields,
)

_KINDS: dict[FieldType, type] = {
    "INT64": np.int64,
    "FLOAT": np.float32,
    "DOUBLE": np.float64,
    "BOOL": np.bool_,
    "FLOAT_VECTOR": np.float32,
}

_MAX_NESTING = 64
"""Levels of metadata: the client of the database writes some hundred, and then cannot read them."""

Row = dict[str, Any]
"""One row as pymilvus takes and gives it."""

RECORD_FIELDS = (
    "image_id",
    "uri",
    "sha256",
    "width",
    "height",
    "feature_count",
    "model",
    "ingested_at",
    "root",
)
"""Fields of an image's row that an `ImageRecord` shows, beside its metadata."""


@dataclass(frozen=True)
class ImageRecord:
    """One image of a collection, without its features.

    uri: where it was read from. sha256: of its bytes, hexadecimal. root: the folder it was ingested from, or "".
    metadata: declared and free fields, values as in JSON. tenant: whose it is, "" in a collection without tenants.
    width, height: pixels, upright. model: short fingerprint. ingested_at: ISO 8601, UTC.
    `FeatureStore.write` fills in the last five and feature_count.
    """

    image_id: str
    uri: str = ""
    sha256: str = ""
    root: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tenant: str = ""
    width: int = 0
    height: int = 0
    feature_count: int = 0
    model: str = ""
    ingested_at: str = ""

    @property
    def key(self) -> int:
        """The image's key."""
        return image_key(self.image_id, self.tenant)

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return {**{name: getattr(self, name) for name in RECORD_FIELDS}, "metadata": dict(self.metadata)}


def checked(record: ImageRecord) -> None:
    """Raise InputError for an id, a path or metadata that cannot be stored."""
    shown = record.image_id if len(record.image_id) <= 100 else f"{record.image_id[:100]}..."
    for name, text, limit in (
        ("id", record.image_id, MAX_ID_BYTES),
        ("uri", record.uri, MAX_URI_BYTES),
        ("root", record.root, MAX_URI_BYTES),
    ):
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise InputError(
                f"The {name} of image {shown!a} is not valid Unicode: rename the file, or give it an id."
            ) from None
        if size > limit or "\0" in text:
            raise InputError(f"The {name} of image {shown!r} has {size} bytes or a NUL; at most {limit} can be stored.")
    if not record.image_id:
        raise InputError("An image needs an id that is not empty.")
    for name in record.metadata:
        if not name or name in RESERVED or name.startswith(("$", "_", "keypoints_")):
            raise InputError(
                f"Metadata of image {shown!r} cannot be called {name!r}: that name is reserved; rename it."
            )
    try:
        if _nesting(record.metadata) > _MAX_NESTING:
            raise ValueError(f"it is nested more than {_MAX_NESTING} levels deep")
        size = len(json.dumps(dict(record.metadata), allow_nan=False).encode())
        # Lone surrogates, which the client of the database writes and then cannot read; they pass as escapes above.
        json.dumps(dict(record.metadata), ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"Metadata of image {shown!r} cannot be stored as JSON: {error}.") from None
    if size > MAX_METADATA_BYTES:
        raise InputError(f"Metadata of image {shown!r} has {size} bytes; at most {MAX_METADATA_BYTES} can be stored.")


def _nesting(value: Any) -> int:
    """How deep objects and lists lie in each other."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return 1 + max(map(_nesting, value), default=0) if isinstance(value, list | tuple) else 0


def typed(record: ImageRecord, facts: CollectionFacts, tenant: str) -> ImageRecord:
    """The record as this collection stores it: checked, its declared fields typed, and of this tenant.

    Raises InputError for what cannot be stored, a declared field of another type or missing, or another tenant.
    """
    checked(record)
    if not facts.declared:
        return record
    metadata = dict(record.metadata)
    shown = one_line(record.image_id)
    if facts.tenant_field and metadata.setdefault(facts.tenant_field, tenant) != tenant:
        raise InputError(
            f"Image {shown} says {facts.tenant_field} = {metadata[facts.tenant_field]!r}, but this is written for the "
            f"tenant {tenant!r}; write each tenant's images on its own."
        )
    values = typed_values(facts.declared, metadata, shown)
    return replace(record, metadata=metadata | values, tenant=tenant if facts.tenant_field else "")


def completed(record: ImageRecord, features: Features, facts: CollectionFacts) -> ImageRecord:
    """The record with what the features, the collection and the clock say."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return replace(
        record,
        width=features.width,
        height=features.height,
        feature_count=facts.rows_of(len(features)),
        model=facts.fingerprint.short,
        ingested_at=record.ingested_at or now,
    )


def global_descriptor(features: Features, length: int) -> Float32Array:
    """One vector of the whole photo, (G,) float32 of unit L2 norm: the model's, of this length, or where it has none
    (0) the attention-weighted mean of the local descriptors. Zeros for a photo without any."""
    if len(features.global_descriptor) == length > 0:
        return features.global_descriptor
    if length:
        return np.zeros(length, np.float32)
    weights = np.clip(features.attention, 0, None).astype(np.float64)
    if not weights.any():
        weights = np.ones(len(features))
    mean = weights @ features.descriptors
    norm = np.linalg.norm(mean)
    return (mean / norm if norm > 0 else mean).astype(np.float32)


def image_row(record: ImageRecord, features: Features, facts: CollectionFacts) -> Row:
    """The image's row in a collection that was made for this.

    Raises CollectionError when the collection was made for fewer features an image.
    """
    try:
        parts = split(pack(features), facts.chunks)
    except ValueError as error:
        raise CollectionError(
            f"The {len(features)} features of image {record.image_id!r} are more than this collection was made for: "
            "store fewer features an image, or use a new collection."
        ) from error
    row: Row = {**record.metadata, "image_key": record.key}
    row.update((name, getattr(record, name)) for name in RECORD_FIELDS)
    row.update(zip(keypoint_fields(facts.chunks), parts, strict=True))
    row[GLOBAL] = global_descriptor(features, facts.fingerprint.global_dim)
    return row


def columns_of(spec: CollectionSpec, rows: Sequence[Row]) -> Columns:
    """The declared fields of rows by column."""
    columns: Columns = {}
    for one in spec.fields:
        values: npt.NDArray[Any] = np.array([row[one.name] for row in rows], dtype=_KINDS.get(one.type, object))
        columns[one.name] = values.reshape(len(rows), one.size) if one.type == "FLOAT_VECTOR" else values
    return columns


def image_columns(rows: Sequence[Row], spec: CollectionSpec) -> Columns:
    """Rows of the images collection, at least one, by column; their free metadata as JSON."""
    columns = columns_of(spec, rows)
    fields = {one.name for one in spec.fields}
    free = [{name: value for name, value in row.items() if name not in fields} for row in rows]
    columns[METADATA] = np.array([json.dumps(one, allow_nan=False) for one in free], dtype=object)
    return columns


def feature_columns(key: int, features: Features, spec: CollectionSpec, metadata: Mapping[str, Any]) -> Columns:
    """One row for each feature, in falling attention; each repeats the image's declared fields."""
    count = len(features)
    return {
        "feature_key": feature_keys(key, count),
        "descriptor": features.descriptors,
        "image_key": np.full(count, key, np.int64),
        "x": features.locations[:, 0],
        "y": features.locations[:, 1],
        "scale": features.scales,
        "attention": features.attention,
        **{one.name: repeated(spec, one.name, metadata[one.name], count) for one in spec.filtered},
    }


def repeated(spec: CollectionSpec, name: str, value: Any, count: int) -> npt.NDArray[Any]:
    """A column that has one value in every row."""
    kind = next(one.type for one in spec.fields if one.name == name)
    column: npt.NDArray[Any] = np.empty(count, dtype=_KINDS.get(kind, object))
    column[:] = value
    return column


def record_fields(facts: CollectionFacts) -> tuple[str, ...]:
    """Output fields that `record_of` needs."""
    return (*RECORD_FIELDS, *(one.name for one in facts.declared), METADATA)


def record_of(row: Row, tenant_field: str = "") -> ImageRecord:
    """The record in an image's row that was asked for with `record_fields`."""
    metadata = {
        name: value for name, value in row.items() if name not in RESERVED and not name.startswith(("$", "keypoints_"))
    }
    tenant = str(row[tenant_field]) if tenant_field else ""
    return ImageRecord(**{name: row[name] for name in RECORD_FIELDS}, metadata=metadata, tenant=tenant)


def described(row: Row, record: ImageRecord) -> Row:
    """An image's row, asked for with all its declared fields, with another uri, root and metadata."""
    kept = {name: value for name, value in row.items() if name in RESERVED or name.startswith("keypoints_")}
    return {**record.metadata, **kept, "uri": record.uri, "root": record.root}


def features_of(row: Row, chunks: int) -> Features:
    """The features in an image's row that was asked for with its keypoint fields, and perhaps GLOBAL.

    Raises DatabaseError when they are damaged.
    """
    try:
        features = unpack("".join(row[name] for name in keypoint_fields(chunks)))
        whole = np.asarray(row.get(GLOBAL, ()), np.float32)
        # Zeros stand for none.
        return replace(features, global_descriptor=whole) if whole.any() else features
    except ValueError as error:
        raise DatabaseError(
            f"The stored features of image {row['image_id']!r} cannot be read, ingest it again: {error}."
        ) from error


def batches(rows: Sequence[Row], row_bytes: Sequence[int], limit: int) -> list[list[Row]]:
    """The rows in order, in runs of at most `limit` bytes; a row that alone is larger has a run of its own."""
    runs: list[list[Row]] = []
    filled = limit
    for row, size in zip(rows, row_bytes, strict=True):
        if filled + size > limit:
            runs.append([])
            filled = 0
        runs[-1].append(row)
        filled += size
    return runs
