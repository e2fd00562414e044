"""Images and their features as rows of the two collections, and back.

What a caller gives is checked here, before anything is written: ids and metadata come from strangers' folders and
tables. Filter expressions are built from integers and from `quoted` strings only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np

from delf_milvus.errors import CollectionError, DatabaseError, InputError
from delf_milvus.features import Features, Fingerprint, Float32Array
from delf_milvus.store.codec import pack, split, unpack
from delf_milvus.store.columns import METADATA, Columns
from delf_milvus.store.keys import feature_keys, image_key
from delf_milvus.store.schema import (
    MAX_ID_BYTES,
    MAX_METADATA_BYTES,
    MAX_URI_BYTES,
    CollectionSpec,
    images_spec,
    keypoint_fields,
)

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
    metadata: free fields, values as in JSON. width, height: pixels, upright. model: short fingerprint.
    ingested_at: ISO 8601, UTC. `FeatureStore.write` fills in the last five and feature_count.
    """

    image_id: str
    uri: str = ""
    sha256: str = ""
    root: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    width: int = 0
    height: int = 0
    feature_count: int = 0
    model: str = ""
    ingested_at: str = ""

    @property
    def key(self) -> int:
        """The image's key."""
        return image_key(self.image_id)

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return {**{name: getattr(self, name) for name in RECORD_FIELDS}, "metadata": dict(self.metadata)}


def quoted(text: str) -> str:
    """The text as a string literal of a filter expression, so that it cannot end early or mean anything else.

    Characters beyond ASCII stay as they are: neither Milvus Lite nor Milvus 2.3 knows the escape \\u.
    """
    for character, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, escape)
    return f'"{text}"'


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
    reserved = {one.name for one in images_spec(dim=1, chunks=1).fields}
    for name in record.metadata:
        if not name or name in reserved or name.startswith(("$", "_", "keypoints_")):
            raise InputError(
                f"Metadata of image {shown!r} cannot be called {name!r}: that name is reserved; rename it."
            )
    try:
        size = len(json.dumps(dict(record.metadata), allow_nan=False).encode())
    except (TypeError, ValueError) as error:
        raise InputError(f"Metadata of image {shown!r} cannot be stored as JSON: {error}.") from None
    if size > MAX_METADATA_BYTES:
        raise InputError(f"Metadata of image {shown!r} has {size} bytes; at most {MAX_METADATA_BYTES} can be stored.")


def completed(record: ImageRecord, features: Features, fingerprint: Fingerprint) -> ImageRecord:
    """The record with what the features, the model and the clock say."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return replace(
        record,
        width=features.width,
        height=features.height,
        feature_count=len(features),
        model=fingerprint.short,
        ingested_at=record.ingested_at or now,
    )


def global_descriptor(features: Features) -> Float32Array:
    """Attention-weighted mean of the descriptors, unit L2 norm, (D,) float32; zeros where there is none."""
    weights = np.clip(features.attention, 0, None).astype(np.float64)
    if not weights.any():
        weights = np.ones(len(features))
    mean = weights @ features.descriptors
    norm = np.linalg.norm(mean)
    return (mean / norm if norm > 0 else mean).astype(np.float32)


def image_row(record: ImageRecord, features: Features, chunks: int) -> Row:
    """The image's row, its packed features spread over `chunks` fields.

    Raises CollectionError when the collection was made for fewer features an image.
    """
    try:
        parts = split(pack(features), chunks)
    except ValueError as error:
        raise CollectionError(
            f"The {len(features)} features of image {record.image_id!r} are more than this collection was made for: "
            "store fewer features an image, or use a new collection."
        ) from error
    row: Row = {**record.metadata, "image_key": record.key}
    row.update((name, getattr(record, name)) for name in RECORD_FIELDS)
    row.update(zip(keypoint_fields(chunks), parts, strict=True))
    row["global_descriptor"] = global_descriptor(features)
    return row


def columns_of(spec: CollectionSpec, rows: Sequence[Row]) -> Columns:
    """The declared fields of rows by column."""
    columns: Columns = {}
    for one in spec.fields:
        kind = {"INT64": np.int64, "FLOAT": np.float32, "FLOAT_VECTOR": np.float32}.get(one.type, object)
        values = np.array([row[one.name] for row in rows], dtype=kind)
        columns[one.name] = values.reshape(len(rows), one.size) if one.type == "FLOAT_VECTOR" else values
    return columns


def image_columns(rows: Sequence[Row], spec: CollectionSpec) -> Columns:
    """Rows of the images collection, at least one, by column; their free metadata as JSON."""
    columns = columns_of(spec, rows)
    declared = {one.name for one in spec.fields}
    free = [{name: value for name, value in row.items() if name not in declared} for row in rows]
    columns[METADATA] = np.array([json.dumps(one, allow_nan=False) for one in free], dtype=object)
    return columns


def feature_columns(key: int, features: Features) -> Columns:
    """One row for each feature, in falling attention."""
    count = len(features)
    return {
        "feature_key": feature_keys(key, count),
        "descriptor": features.descriptors,
        "image_key": np.full(count, key, np.int64),
        "x": features.locations[:, 0],
        "y": features.locations[:, 1],
        "scale": features.scales,
        "attention": features.attention,
    }


def record_of(row: Row) -> ImageRecord:
    """The record in an image's row that was asked for with `RECORD_FIELDS` and `METADATA`."""
    known = {one.name for one in images_spec(dim=1, chunks=1).fields}
    metadata = {
        name: value for name, value in row.items() if name not in known and not name.startswith(("$", "keypoints_"))
    }
    return ImageRecord(**{name: row[name] for name in RECORD_FIELDS}, metadata=metadata)


def described(row: Row, record: ImageRecord) -> Row:
    """An image's row, asked for with all its declared fields, with another uri, root and metadata."""
    declared = {one.name for one in images_spec(dim=1, chunks=1).fields}
    kept = {name: value for name, value in row.items() if name in declared or name.startswith("keypoints_")}
    return {**record.metadata, **kept, "uri": record.uri, "root": record.root}


def features_of(row: Row, chunks: int) -> Features:
    """The features in an image's row that was asked for with its keypoint fields.

    Raises DatabaseError when they are damaged.
    """
    try:
        return unpack("".join(row[name] for name in keypoint_fields(chunks)))
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
