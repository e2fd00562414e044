"""`.delf`: the DelfFeatures protocol buffer of the reference code, one file a photo.

Source: tensorflow/models, research/delf, delf/protos/feature.proto and datum.proto. A file has neither the photo's size
nor the name of the model. Its locations are x (field 2) and y (field 3), which the reference code's arrays have as
(y, x). Orientations, always 0 in files of that code, are not read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from delf_milvus.featurefiles.arrays import MAX_COUNT, MAX_DIM, MAX_FILE_BYTES, LocalFeatures, damaged, partial_of
from delf_milvus.imaging.decode import read_file

if TYPE_CHECKING:
    from google.protobuf.message import Message

_FEATURE_TAG = 0x0A
"""Field 1 of DelfFeatures, with a length: all that such a file consists of."""

_MOST_FEATURE_BYTES = 8 * MAX_DIM + 1024
_VARINT_BYTES = 5


def read(path: Path) -> LocalFeatures:
    """The features of a file; raises InputError for any other content."""
    source = str(path)
    return parse(read_file(path, MAX_FILE_BYTES, "it is no feature file of one photo"), source)


def parse(data: bytes, source: str) -> LocalFeatures:
    """The features that `data` holds; source: what messages call it. Raises InputError."""
    from google.protobuf.message import DecodeError

    feature = _messages()["DelfFeature"]
    geometry: list[tuple[float, float, float, float]] = []
    descriptors: list[list[float]] = []
    for piece in _pieces(data, source):
        try:
            one: Any = feature.FromString(piece)
        except DecodeError as error:
            damaged(source, "it is not a DelfFeatures message, or it is damaged", error)
        values = one.descriptor.float_list.value
        if not (one.HasField("x") and one.HasField("y") and len(values)):
            damaged(source, "a feature without location or descriptor is in it")
        if one.descriptor.HasField("shape") and math.prod(one.descriptor.shape.dim) != len(values):
            damaged(source, "a descriptor in it has another length than its shape says")
        if descriptors and len(values) != len(descriptors[0]):
            damaged(source, "its descriptors differ in length")
        geometry.append((one.x, one.y, one.scale if one.HasField("scale") else 1.0, one.strength))
        descriptors.append(list(values))
    if not geometry:
        none = np.empty(0, np.float32)
        return LocalFeatures(np.empty((0, 2), np.float32), np.empty((0, 1), np.float32), none, none)
    columns = np.array(geometry, np.float32)
    return LocalFeatures(
        np.ascontiguousarray(columns[:, :2]),
        np.array(descriptors, np.float32),
        np.ascontiguousarray(columns[:, 3]),
        np.ascontiguousarray(columns[:, 2]),
    )


def write(path: Path, found: LocalFeatures) -> None:
    """Write a file, all or nothing. Size and extractor are lost. Raises OSError."""
    partial = partial_of(path)
    partial.write_bytes(serialised(found))
    partial.replace(path)


def serialised(found: LocalFeatures) -> bytes:
    """The message's bytes; the same as of the reference code. Scales and scores are 1 where there are none."""
    whole: Any = _messages()["DelfFeatures"]()
    dim = found.descriptors.shape[1]
    ones = np.ones(len(found.keypoints), np.float32)
    scales = ones if found.scales is None else found.scales
    scores = ones if found.scores is None else found.scores
    for point, descriptor, scale, score in zip(found.keypoints, found.descriptors, scales, scores, strict=True):
        one = whole.feature.add()
        one.descriptor.shape.dim.append(dim)
        one.descriptor.float_list.value.extend(descriptor.tolist())
        one.x, one.y = point.tolist()
        one.scale, one.orientation, one.strength = float(scale), 0.0, float(score)
    data: bytes = whole.SerializeToString()
    return data


def _pieces(data: bytes, source: str) -> Iterator[bytes]:
    """The features of a message, each still encoded.

    Parsed whole, a file of empty features would take some fifty times its size in memory.
    """
    place = 0
    for _ in range(MAX_COUNT):
        if place == len(data):
            return
        if data[place] != _FEATURE_TAG:
            damaged(source, "it is not a DelfFeatures message")
        size, shift, place = 0, 0, place + 1
        while True:
            if place == len(data) or shift == 7 * _VARINT_BYTES:
                damaged(source, "it is cut short, or damaged")
            byte = data[place]
            size |= (byte & 0x7F) << shift
            shift, place = shift + 7, place + 1
            if byte < 0x80:
                break
        if size > _MOST_FEATURE_BYTES:
            damaged(source, f"a descriptor in it has more than {MAX_DIM} components")
        if place + size > len(data):
            damaged(source, "it is cut short")
        yield data[place : place + size]
        place += size
    if place < len(data):
        damaged(source, f"it has more than {MAX_COUNT:,} features")


@functools.cache
def _messages() -> dict[str, type[Message]]:
    """The message classes by name.

    They live in a pool of their own: in the default one the reference code's own module would collide with them.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    package = "delf.protos"
    file = descriptor_pb2.FileDescriptorProto(name="delf_milvus/delf_features.proto", package=package, syntax="proto2")

    def message(name: str, *fields: tuple[str, int, Any, bool]) -> None:
        """A message of fields: name, number, type (or the name of a message), whether repeated."""
        made = file.message_type.add(name=name)
        for field, number, kind, repeated in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            one = made.field.add(name=field, number=number, label=label)
            if isinstance(kind, str):
                one.type, one.type_name = kinds.TYPE_MESSAGE, f".{package}.{kind}"
            else:
                one.type = kind
                one.options.packed = repeated
                if not repeated:
                    one.ClearField("options")

    number = kinds.TYPE_FLOAT
    message("DatumShape", ("dim", 1, kinds.TYPE_INT64, True))
    message("FloatList", ("value", 1, number, True))
    message("DatumProto", ("shape", 1, "DatumShape", False), ("float_list", 2, "FloatList", False))
    message(
        "DelfFeature",
        ("descriptor", 1, "DatumProto", False),
        *(
            (field, place, number, False)
            for place, field in enumerate(("x", "y", "scale", "orientation", "strength"), 2)
        ),
    )
    message("DelfFeatures", ("feature", 1, "DelfFeature", True))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        one.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{one.name}"))
        for one in file.message_type
    }
