"""`.npz`: NumPy's archive of arrays, one file a photo.

    keypoints   (N, 2)  x then y, pixels of the photo, pixel centres at integers
    descriptors (N, D)
    scores      (N,)    larger is better; optional
    scales      (N,)    size of a keypoint, in any unit that is the same for all photos; optional
    image_size  (2,)    width and height of the photo in pixels; optional
    global_descriptor (G,) one vector of the whole photo; optional
    extractor   ()      text: a name, or the JSON of a `Fingerprint`; optional

Arrays may be of any kind of number. Files are read without pickle and without NumPy's own reader, which allocates what
a header claims.
"""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from delf_milvus.errors import InputError
from delf_milvus.featurefiles.arrays import (
    MAX_ARRAY_BYTES,
    MAX_FILE_BYTES,
    LocalFeatures,
    damaged,
    floats,
    partial_of,
    size_of,
)
from delf_milvus.imaging.decode import read_file

_NUMBERS = ("keypoints", "descriptors", "scores", "scales", "global_descriptor")
_MOST_TEXT = 4096
_MOST_ENTRIES = 1000


def read(path: Path) -> LocalFeatures:
    """The features of a file; raises InputError for any other content."""
    source = str(path)
    data = read_file(path, MAX_FILE_BYTES, "it is no feature file of one photo")
    return parse(data, source)


def parse(data: bytes, source: str) -> LocalFeatures:
    """The features that `data` holds; source: what messages call it. Raises InputError."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if len(archive.infolist()) > _MOST_ENTRIES:
                damaged(source, f"it has more than {_MOST_ENTRIES} entries")
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            if missing := {"keypoints", "descriptors"} - names:
                damaged(source, f"it has no array {min(missing)}")
            arrays = {
                name: array(archive, name, source) for name in (*_NUMBERS, "image_size", "extractor") if name in names
            }
    except InputError:
        raise
    # Archives and headers meet hostile bytes with nearly every exception there is: of zlib and lzma, and of Python's
    # own parser, which NumPy hands a header to.
    except Exception as error:
        damaged(source, "it is not an .npz archive, or it is damaged", error)
    numbers = {name: floats(arrays[name], name, source) for name in _NUMBERS if name in arrays}
    if numbers["descriptors"].ndim != 2 or numbers["keypoints"].ndim != 2:
        damaged(source, "keypoints are of shape (N, 2), descriptors of (N, D)")
    return LocalFeatures(
        numbers["keypoints"],
        numbers["descriptors"],
        numbers.get("scores"),
        numbers.get("scales"),
        size_of(arrays["image_size"], source) if "image_size" in arrays else None,
        _text(arrays["extractor"], source) if "extractor" in arrays else "",
        numbers.get("global_descriptor"),
    )


def write(path: Path, found: LocalFeatures) -> None:
    """Write a file, all or nothing. Raises OSError."""
    arrays: dict[str, npt.NDArray[Any]] = {"keypoints": found.keypoints, "descriptors": found.descriptors}
    optional = {"scores": found.scores, "scales": found.scales, "global_descriptor": found.global_descriptor}
    arrays |= {name: values for name, values in optional.items() if values is not None}
    if found.image_size is not None:
        arrays["image_size"] = np.array(found.image_size, np.int64)
    if found.extractor:
        arrays["extractor"] = np.array(found.extractor)
    partial = partial_of(path)
    with partial.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type] # its stubs take an array's name for `allow_pickle`
    partial.replace(path)


def array(archive: zipfile.ZipFile, name: str, source: str) -> npt.NDArray[Any]:
    """One array of an archive, whose header is believed only as far as the entry has the bytes for it.

    Raises InputError, and for damage whatever `zipfile` and NumPy raise.
    """
    entry = archive.getinfo(f"{name}.npy")
    if entry.file_size > MAX_ARRAY_BYTES:
        damaged(source, f"its {name} have {entry.file_size:,} bytes, more than {MAX_ARRAY_BYTES:,}")
    data = archive.read(entry)
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in headers:
        damaged(source, f"its {name} are of version {version} of the .npy format, not 1.0 or 2.0")
    shape, is_fortran, dtype = headers[version](stream)
    if dtype.hasobject:
        damaged(source, f"its {name} are pickled objects, which are never read")
    if (
        math.prod(shape) * dtype.itemsize != len(data) - stream.tell()
        or dtype.itemsize == 0
        or min(shape, default=0) < 0
    ):
        damaged(source, f"its {name} have another size than their header says")
    values: npt.NDArray[Any] = np.frombuffer(data, dtype, offset=stream.tell())
    return values.reshape(shape, order="F" if is_fortran else "C")


def _text(values: npt.NDArray[Any], source: str) -> str:
    if values.shape != () or values.dtype.kind != "U" or values.dtype.itemsize > 4 * _MOST_TEXT:
        damaged(source, f"its extractor is not a text of at most {_MOST_TEXT} characters")
    return str(values)
