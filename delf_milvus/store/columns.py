"""Rows of a collection as one numpy array a field, and their way into Milvus without a Python step for each value.

pymilvus takes rows as dictionaries and spends most of a write on packing them: it looks at every value, and at every
single character of a text. Here a field becomes its part of the request in one piece: a packed `repeated float` of
protobuf is the array's little-endian bytes behind a length.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from delf_milvus.store.connection import Connection
from delf_milvus.store.profiles import Engine
from delf_milvus.store.schema import CollectionSpec, Field

Columns = dict[str, npt.NDArray[Any]]
"""Field name to values: (N,), or (N, D) for vectors, all of one length; text as arrays of Python strings."""

METADATA = "$meta"
"""Field, and output field, that stands for all dynamic fields of a row: here as JSON text."""

_PACKED_FLOATS = b"\x0a"
"""Tag of field 1, length-delimited: the `data` of FloatArray and of DoubleArray."""


def length(columns: Columns) -> int:
    """Number of rows."""
    return len(next(iter(columns.values())))


def row_bytes(columns: Columns) -> int:
    """Bytes of one row as it is sent, about."""
    count = max(length(columns), 1)
    return max(1, sum(values.nbytes for values in columns.values()) // count)


def joined(parts: Sequence[Columns]) -> Columns:
    """The rows of all parts, one after the other; at least one part."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def slices(columns: Columns, limit: int) -> Iterator[Columns]:
    """The rows in order, in runs of about `limit` bytes, at least one row each."""
    step = max(1, limit // row_bytes(columns))
    for start in range(0, length(columns), step):
        yield {name: values[start : start + step] for name, values in columns.items()}


def write_columns(
    database: Connection, name: str, spec: CollectionSpec, columns: Columns, *, new: bool = False
) -> None:
    """Write whole rows, replacing those of the same key. A spec with dynamic fields takes them from METADATA.

    new: the caller knows of no rows of these keys, so there is nothing to replace, and no deletion is left that the
    server would have to work into its segments. A second try replaces all the same, for the first may have arrived;
    so the client must not try again by itself. Raises what `Connection.call` raises.
    """
    # On Milvus Lite the newest row of a key wins however it was written; its upsert looks for each old row first.
    newest_wins = database.backend == "lite"
    # Before 2.4 an upsert puts rows into partitions that a search for their tenant does not look in.
    misplaces = any(field.tenant for field in spec.fields) and Engine.of(database.version).release < (2, 4)
    fields = [_field_data(field, columns[field.name]) for field in spec.fields] if database.plain else []
    primary = next(field.name for field in spec.fields if field.primary)
    first = True

    def write(**options: Any) -> None:
        nonlocal first
        # A client that is not plain cannot be kept from trying again.
        inserts = newest_wins or (new and first and database.plain)
        first = False
        if not inserts and misplaces:
            database.client.delete(name, ids=columns[primary].tolist(), **options)
            inserts = True
        if database.plain:
            _send(database, name, spec, columns, fields, inserts, **options)
        else:
            (database.client.insert if inserts else database.client.upsert)(name, _rows(spec, columns), **options)

    database.call("writing", write)


def _send(
    database: Connection,
    name: str,
    spec: CollectionSpec,
    columns: Columns,
    fields: list[Any],
    inserts: bool,
    **options: Any,
) -> None:
    from pymilvus import DataType
    from pymilvus.grpc_gen import milvus_pb2

    request = (milvus_pb2.InsertRequest if inserts else milvus_pb2.UpsertRequest)(
        collection_name=name, num_rows=length(columns), fields_data=fields
    )
    if spec.dynamic:
        free = request.fields_data.add(field_name=METADATA, is_dynamic=True, type=int(DataType.JSON))
        free.scalars.json_data.data.extend(text.encode() for text in columns[METADATA].tolist())
    client = database.client
    handler = client._get_connection()
    # A request that is ready needs no schema, but without one the handler would ask the server for it.
    ready = {"schema": {"fields": []}, "context": client._generate_call_context(), **options}
    if inserts:
        # Without its decorators: they repeat a call that was cut off, which would insert the rows once more.
        inspect.unwrap(type(handler).batch_insert)(handler, name, [], insert_param=request, **ready)
    else:
        handler.upsert(name, [], upsert_param=request, **ready)


def _rows(spec: CollectionSpec, columns: Columns) -> list[dict[str, Any]]:
    """The rows as the client's own methods take them."""
    names = [field.name for field in spec.fields]
    values = [columns[name] if columns[name].ndim > 1 else columns[name].tolist() for name in names]
    free = columns[METADATA].tolist() if spec.dynamic else ["{}"] * length(columns)
    return [
        {**json.loads(text), **dict(zip(names, row, strict=True))}
        for text, row in zip(free, zip(*values, strict=True), strict=True)
    ]


def _field_data(field: Field, values: npt.NDArray[Any]) -> Any:
    from pymilvus import DataType
    from pymilvus.grpc_gen import schema_pb2

    data = schema_pb2.FieldData(field_name=field.name, type=int(DataType[field.type]))
    if field.type == "FLOAT_VECTOR":
        data.vectors.dim = field.size
        data.vectors.float_vector.MergeFromString(_packed(values, "<f4"))
    elif field.type == "FLOAT":
        data.scalars.float_data.MergeFromString(_packed(values, "<f4"))
    elif field.type == "DOUBLE":
        data.scalars.double_data.MergeFromString(_packed(values, "<f8"))
    elif field.type == "BOOL":
        data.scalars.bool_data.data.extend(values.tolist())
    elif field.type == "INT64":
        data.scalars.long_data.data.extend(values.tolist())
    else:
        data.scalars.string_data.data.extend(values.tolist())
    return data


def _packed(values: npt.NDArray[Any], kind: str) -> bytes:
    body = np.ascontiguousarray(values, kind).tobytes()
    return _PACKED_FLOATS + _varint(len(body)) + body


def _varint(number: int) -> bytes:
    """Seven bits a byte, lowest first, the highest bit set on all but the last."""
    octets = bytearray()
    while number > 0x7F:
        octets.append(number & 0x7F | 0x80)
        number >>= 7
    octets.append(number)
    return bytes(octets)
