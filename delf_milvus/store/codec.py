"""One image's features as text: its packed geometry and int8 descriptors, base64, small enough for VARCHAR fields.

Layout, little-endian, before base64: a header (magic, version, flags, count, dim, width, height, number of distinct
scales, then origin and step of x and of y, then the CRC-32 of everything else), the table of distinct scales (float32),
and one column after the other: x and y (uint16, in steps from the origin), scales (uint8 row of the table, or float32
where an image has more than 256 of them), attention (float16, or float32 where float16 would lose it), descriptors
(int8, each row scaled to its own largest component, so no scale is stored: unpacking restores the unit norm).

Every rounding is monotone, so features keep their order. Keypoints come back within 1/131070 of the image's extent,
descriptors at a cosine above 0.999. Unpacking trusts nothing: sizes are checked before anything is read, the checksum
before anything is used.
"""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np
import numpy.typing as npt
import pybase64

from delf_milvus.features import Features, Float32Array

MAX_TEXT = 65535
"""Most characters that one VARCHAR field holds."""

_VERSION = 1
_HEADER = struct.Struct("<2sBBHHIIHdddd")
_CHECKSUM = struct.Struct("<I")
_MAGIC = b"DM"
_RAW_SCALES = 1
_RAW_ATTENTION = 2
_TABLE_ROWS = 256
_STEPS = 65535
_LEAST_HALF = float(np.finfo(np.float16).smallest_normal)
_HIGHEST_HALF = float(np.finfo(np.float16).max)


def chunks_needed(max_features: int, dim: int) -> int:
    """VARCHAR fields that the text of `max_features` features of `dim` components may fill in the worst case."""
    size = _HEADER.size + _CHECKSUM.size + max_features * (2 + 2 + 4 + 4 + dim)
    return max(1, math.ceil(4 * math.ceil(size / 3) / MAX_TEXT))


def split(text: str, chunks: int) -> list[str]:
    """The text in `chunks` parts of at most MAX_TEXT characters, the last ones possibly empty.

    Raises ValueError when it does not fit.
    """
    if len(text) > chunks * MAX_TEXT:
        raise ValueError(f"{len(text)} characters do not fit {chunks} fields of {MAX_TEXT}")
    return [text[part * MAX_TEXT : (part + 1) * MAX_TEXT] for part in range(chunks)]


def pack(features: Features) -> str:
    """The features as base64 text; `unpack` is the inverse up to the rounding that the module's head states.

    Raises ValueError for descriptors of more than 65535 components or a photo of 2**32 pixels or more on a side.
    """
    if features.dim > 0xFFFF or max(features.width, features.height) > 0xFFFFFFFF:
        raise ValueError("the descriptors or the photo are too large to pack")
    flags = 0
    table, rows = np.unique(features.scales, return_inverse=True)
    if len(table) > _TABLE_ROWS:
        flags |= _RAW_SCALES
        table, scales = table[:0], features.scales.astype("<f4").tobytes()
    else:
        scales = rows.astype(np.uint8).tobytes()
    magnitude = np.abs(features.attention[features.attention != 0])
    if len(magnitude) and (magnitude.min() < _LEAST_HALF or magnitude.max() > _HIGHEST_HALF):
        flags |= _RAW_ATTENTION
        attention = features.attention.astype("<f4").tobytes()
    else:
        attention = features.attention.astype("<f2").tobytes()
    x, x_origin, x_step = _quantised(features.locations[:, 0], features.width)
    y, y_origin, y_step = _quantised(features.locations[:, 1], features.height)
    peaks = np.abs(features.descriptors).max(axis=1, keepdims=True, initial=0)
    descriptors = np.rint(features.descriptors / peaks * 127).astype(np.int8)
    header = _HEADER.pack(
        _MAGIC,
        _VERSION,
        flags,
        len(features),
        features.dim,
        features.width,
        features.height,
        len(table),
        x_origin,
        x_step,
        y_origin,
        y_step,
    )
    body = b"".join((table.astype("<f4").tobytes(), x, y, scales, attention, descriptors.tobytes()))
    checksum = _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(header)))
    return pybase64.b64encode_as_string(header + checksum + body)


def unpack(text: str) -> Features:
    """The features that `pack` made this text of, descriptors float32 of unit norm.

    Raises ValueError for text that is cut short, damaged, or of another version of this layout.
    """
    data = memoryview(pybase64.b64decode(text, validate=True))
    start = _HEADER.size + _CHECKSUM.size
    if len(data) < start:
        raise ValueError("packed features are cut short")
    magic, version, flags, count, dim, width, height, entries, x_origin, x_step, y_origin, y_step = _HEADER.unpack_from(
        data
    )
    if magic != _MAGIC or version != _VERSION:
        raise ValueError(f"not packed features of version {_VERSION}")
    layout = (
        ("<f4", entries),
        ("<u2", count),
        ("<u2", count),
        ("<f4" if flags & _RAW_SCALES else "<u1", count),
        ("<f4" if flags & _RAW_ATTENTION else "<f2", count),
        ("<i1", count * dim),
    )
    sizes = [np.dtype(kind).itemsize * length for kind, length in layout]
    if len(data) != start + sum(sizes):
        raise ValueError("packed features have another length than their header says")
    (checksum,) = _CHECKSUM.unpack_from(data, _HEADER.size)
    if checksum != zlib.crc32(data[start:], zlib.crc32(data[: _HEADER.size])):
        raise ValueError("packed features are damaged: their checksum differs")
    columns = []
    for (kind, length), size in zip(layout, sizes, strict=True):
        columns.append(np.frombuffer(data, kind, length, start))
        start += size
    table, x, y, scales, attention, packed = columns
    if not flags & _RAW_SCALES:
        if count and scales.max() >= entries:
            raise ValueError("packed features are damaged: a scale is not in their table")
        scales = table[scales]
    locations = np.empty((count, 2), np.float32)
    locations[:, 0] = x_origin + x * x_step
    locations[:, 1] = y_origin + y * y_step
    descriptors = packed.reshape(count, dim).astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        descriptors /= np.sqrt(np.einsum("nd,nd->n", descriptors, descriptors))[:, None]
    return Features(
        locations, scales.astype(np.float32), attention.astype(np.float32), descriptors, int(width), int(height)
    )


def rounding_differences(packed: Features, exact: Features) -> list[str]:
    """What of unpacked features is further from the exact ones than packing rounds: one phrase for each array."""
    if (len(packed), packed.dim, packed.width, packed.height) != (len(exact), exact.dim, exact.width, exact.height):
        return ["another number, length or photo size"]
    if not len(exact):
        return []
    differing = []
    low = np.minimum(exact.locations.min(axis=0), 0)
    high = np.maximum(exact.locations.max(axis=0), (exact.width - 1, exact.height - 1))
    # Half a step, and the resolution of float32 at the far edge.
    step = (high - low) / _STEPS * 0.5 + np.spacing(np.maximum(-low, high).astype(np.float32)) * 2
    if (np.abs(packed.locations - exact.locations) > step).any():
        differing.append("x or y")
    if not np.array_equal(packed.scales, exact.scales):
        differing.append("scale")
    if not np.allclose(packed.attention, exact.attention, rtol=2.0**-11, atol=2.0**-25):
        differing.append("attention")
    # A component is half a level of its row's largest one off, and restoring the norm moves it by at most the length of
    # all those errors together.
    level = np.abs(exact.descriptors).max(axis=1, keepdims=True) / 127 / 2
    if (np.abs(packed.descriptors - exact.descriptors) > level * (1 + np.sqrt(exact.dim)) + 1e-6).any():
        differing.append("descriptor")
    return differing


def _quantised(values: Float32Array, extent: int) -> tuple[bytes, float, float]:
    """Coordinates as uint16 steps from an origin over the image's extent, stretched where a keypoint lies outside."""
    wide: npt.NDArray[np.float64] = values.astype(np.float64)
    low, high = wide.min(initial=0.0), wide.max(initial=extent - 1.0)
    step = (high - low) / _STEPS
    steps = np.rint((wide - low) / (step or 1.0))
    return steps.astype("<u2").tobytes(), float(low), float(step)
