"""Columns of a collection as Arrow tables, and back: what exports and bulk imports write as Parquet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from delf_milvus.store.columns import Columns
from delf_milvus.store.schema import CollectionSpec, Field

if TYPE_CHECKING:
    import pyarrow as pa


def arrow_schema(spec: CollectionSpec, *more: str) -> pa.Schema:
    """The fields of a collection as Arrow types, then further columns of text."""
    import pyarrow as pa

    return pa.schema(
        [pa.field(field.name, _type(field), nullable=False) for field in spec.fields]
        + [pa.field(name, pa.string(), nullable=False) for name in more]
    )


def to_table(spec: CollectionSpec, columns: Columns, **more: list[str]) -> pa.Table:
    """The columns as a table of `arrow_schema`, further columns of text by name."""
    import pyarrow as pa

    arrays = [_array(field, columns[field.name]) for field in spec.fields]
    arrays += [pa.array(values, pa.string()) for values in more.values()]
    return pa.Table.from_arrays(arrays, schema=arrow_schema(spec, *more))


def from_table(spec: CollectionSpec, table: pa.Table) -> Columns:
    """The columns of a table of `arrow_schema`, numeric ones as arrays, text as arrays of Python strings."""
    import pyarrow as pa

    columns: Columns = {}
    for field in spec.fields:
        column = table.column(field.name).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], _type(field))
        if field.type == "FLOAT_VECTOR":
            values = np.asarray(column.flatten().to_numpy(), np.float32)
            columns[field.name] = values.reshape(len(column), field.size)
        elif field.type == "VARCHAR":
            columns[field.name] = np.array(column.to_pylist(), dtype=object)
        else:
            columns[field.name] = column.to_numpy(zero_copy_only=False)
    return columns


def _type(field: Field) -> pa.DataType:
    import pyarrow as pa

    kinds = {
        "INT64": pa.int64(),
        "FLOAT": pa.float32(),
        "DOUBLE": pa.float64(),
        "BOOL": pa.bool_(),
        "VARCHAR": pa.string(),
    }
    # Milvus reads lists, not lists of a fixed size.
    return (
        pa.list_(pa.field("item", pa.float32(), nullable=False)) if field.type == "FLOAT_VECTOR" else kinds[field.type]
    )


def _array(field: Field, values: Any) -> pa.Array:
    import pyarrow as pa

    if field.type != "FLOAT_VECTOR":
        return pa.array(values, _type(field))
    flat = pa.array(np.ascontiguousarray(values, np.float32).ravel())
    offsets = pa.array(np.arange(0, len(flat) + 1, field.size, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, flat, type=_type(field))
