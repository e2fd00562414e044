"""Datum files: the official releases' arrays of floats, in which their PCA is stored.

A file is one `delf.protos.DatumProto` message: a shape, and the values in row-major order.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from delf_milvus.errors import ModelError

MAX_BYTES = 64 << 20
"""Size above which a file is refused: four times a projection of 2048 x 2048."""


@functools.cache
def datum_class() -> type[Any]:
    """The message class of a datum, described here field by field, so that no generated code is needed.

    message DatumProto { DatumShape shape = 1 { repeated int64 dim = 1 }; FloatList float_list = 2 { repeated float
    value = 1 } }, as in the reference code's `datum.proto`.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    package = "delf_milvus.datum"
    file = descriptor_pb2.FileDescriptorProto(name="delf_milvus/datum.proto", package=package, syntax="proto2")
    for message, field, kind in (("DatumShape", "dim", kinds.TYPE_INT64), ("FloatList", "value", kinds.TYPE_FLOAT)):
        repeated = file.message_type.add(name=message).field.add(
            name=field, number=1, type=kind, label=kinds.LABEL_REPEATED
        )
        repeated.options.packed = True
    datum = file.message_type.add(name="DatumProto")
    for number, (field, message) in enumerate((("shape", "DatumShape"), ("float_list", "FloatList")), 1):
        datum.field.add(
            name=field,
            number=number,
            type=kinds.TYPE_MESSAGE,
            type_name=f".{package}.{message}",
            label=kinds.LABEL_OPTIONAL,
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made: type[Any] = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.DatumProto"))
    return made


def read_datum(path: Path) -> npt.NDArray[np.float32]:
    """The array of a datum file, float32 of the shape that the file says.

    Raises ModelError for a file that is missing, too large, no datum, or holds values that are not finite.
    """
    from google.protobuf.message import DecodeError

    try:
        if path.stat().st_size > MAX_BYTES:
            raise ModelError(f"{path} has more than {MAX_BYTES >> 20} MiB: it is no datum of a DELF release.")
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"There is no readable file {path}; give the folder of the whole release.") from error
    datum = datum_class()()
    try:
        datum.ParseFromString(content)
    except DecodeError as error:
        raise ModelError(f"{path} is damaged, or no datum; download the release again.") from error
    shape, values = tuple(datum.shape.dim), np.array(datum.float_list.value, np.float32)
    if not shape or min(shape) < 1 or math.prod(shape) != len(values) or not np.isfinite(values).all():
        raise ModelError(f"{path} holds no array of finite numbers; download the release again.")
    return values.reshape(shape)
