"""`.h5`: the layout of hloc (cvg/Hierarchical-Localization, extract_features.py), one file for many photos.

A group for each photo, named by its path, slashes included:

    keypoints   (N, 2)  x then y, pixels of the photo, pixel centres at integers; attribute `uncertainty`, pixels
    descriptors (D, N)  as columns
    scores      (N,)    larger is better; optional
    scales      (N,)    size of a keypoint, in any unit that is the same for all photos; optional
    image_size  (2,)    width and height of the photo in pixels; optional
    global_descriptor (G,) one vector of the whole photo, as in hloc's files of global features; optional

hloc adds half a pixel only where it hands keypoints over to COLMAP, whose pixel centres are at halves. It stores half
precision by default, in which keypoints beyond pixel 1024 are whole pixels; here single precision is written, and any
kind of number is read. The file's attribute `extractor` is ours and may be absent: a name, or the JSON of a
`Fingerprint`.

Links to other files, and data sets that lie in other files, are never followed.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from delf_milvus.errors import DelfMilvusError, InputError, NotFoundError, UsageError, one_line
from delf_milvus.featurefiles.arrays import (
    MAX_ARRAY_BYTES,
    LocalFeatures,
    damaged,
    floats,
    size_of,
)

if TYPE_CHECKING:
    import h5py

_NUMBERS = ("keypoints", "descriptors", "scores", "scales", "global_descriptor")
_ARRAYS = (*_NUMBERS, "image_size")
_MOST_TEXT = 4096


def names(path: Path) -> list[str]:
    """The photos that a file has features of, sorted. Raises InputError."""
    found: list[str] = []

    def visit(name: str, thing: Any) -> None:
        # What else lies in such files (global descriptors, matches) is no local feature.
        if name.endswith("/keypoints") and "descriptors" in thing.parent:
            found.append(name.removesuffix("/keypoints"))

    with _opened(path) as file:
        file.visititems(visit)
    return sorted(found)


def read(path: Path, name: str) -> LocalFeatures:
    """The features of one photo; raises InputError, NotFoundError for a photo that the file does not have."""
    return read_with_digest(path, name)[0]


def read_with_digest(path: Path, name: str) -> tuple[LocalFeatures, str]:
    """The features of one photo, and the SHA-256, hexadecimal, of its arrays. Errors as of `read`."""
    source = f"{path}#{name}"
    with _opened(path) as file:
        group = _group(file, name, source)
        arrays = {key: _array(group, key, source) for key in _ARRAYS if key in group}
        extractor = _text(file, source)
    if missing := {"keypoints", "descriptors"} - set(arrays):
        damaged(source, f"it has no data set {min(missing)}")
    digest = hashlib.sha256()
    for key, values in arrays.items():
        digest.update(f"{key} {values.dtype.str} {values.shape} ".encode())
        digest.update(values.tobytes())
    numbers = {key: floats(arrays[key], key, source) for key in _NUMBERS if key in arrays}
    if numbers["descriptors"].ndim != 2 or numbers["keypoints"].ndim != 2:
        damaged(source, "keypoints are of shape (N, 2), descriptors of (D, N)")
    found = LocalFeatures(
        numbers["keypoints"],
        np.ascontiguousarray(numbers["descriptors"].T),
        numbers.get("scores"),
        numbers.get("scales"),
        size_of(arrays["image_size"], source) if "image_size" in arrays else None,
        extractor,
        numbers.get("global_descriptor"),
    )
    return found, digest.hexdigest()


def extractor_of(path: Path) -> str:
    """Who made the features of a file, "" where it does not say. Raises InputError."""
    with _opened(path) as file:
        return _text(file, str(path))


def write(path: Path, name: str, found: LocalFeatures, uncertainty: float = 1.0) -> None:
    """Add the features of one photo to a file, which is made where it is absent; replaces those of the same name.

    uncertainty: standard deviation of a keypoint, pixels. As hloc itself does, the file is opened for each photo: it is
    whole after each, but a process that is killed within may damage it. Raises OSError.
    """
    h5py = _library()
    with h5py.File(path, "a", libver="latest") as file:
        if found.extractor:
            file.attrs["extractor"] = found.extractor
        if name in file:
            del file[name]
        group = file.create_group(name)
        group.create_dataset("keypoints", data=found.keypoints).attrs["uncertainty"] = uncertainty
        if found.scores is not None:
            group.create_dataset("scores", data=found.scores)
        if found.scales is not None:
            group.create_dataset("scales", data=found.scales)
        if found.global_descriptor is not None:
            group.create_dataset("global_descriptor", data=found.global_descriptor)
        if found.image_size is not None:
            group.create_dataset("image_size", data=np.array(found.image_size, np.int64))
        group.create_dataset("descriptors", data=np.ascontiguousarray(found.descriptors.T))


def _library() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UsageError("HDF5 files need h5py: pip install 'delf-milvus[hloc]'.") from error
    return h5py


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """A file for reading, whatever is wrong with it told as InputError."""
    h5py = _library()
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{one_line(path)} is not a regular file.")
        with h5py.File(path, "r") as file:
            yield file
    except DelfMilvusError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{one_line(path)} does not exist; check the path.") from error
    # What h5py raises for damage depends on where in the file it is.
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        damaged(str(path), "it is not an HDF5 file, or it is damaged", error)


def _group(file: h5py.File, name: str, source: str) -> h5py.Group:
    """The group of a photo, reached through this file alone."""
    h5py = _library()
    group: Any = file
    for part in name.strip("/").split("/"):
        link = group.get(part, getlink=True) if part and isinstance(group, h5py.Group) else None
        if not isinstance(link, h5py.HardLink):
            raise NotFoundError(f"{one_line(source)}: there is no photo of that name in the file.")
        group = group[part]
    if not isinstance(group, h5py.Group):
        raise NotFoundError(f"{one_line(source)}: there is no photo of that name in the file.")
    return group


def _array(group: h5py.Group, name: str, source: str) -> npt.NDArray[Any]:
    h5py = _library()
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        damaged(source, f"its {name} are a link to elsewhere")
    data = group[name]
    if not isinstance(data, h5py.Dataset) or data.shape is None:
        damaged(source, f"its {name} are no array")
    if data.external or data.is_virtual:
        damaged(source, f"its {name} lie in another file")
    if data.dtype.kind not in "fiu":
        damaged(source, f"its {name} are of type {data.dtype}, not numbers")
    if data.size * max(data.dtype.itemsize, 4) > MAX_ARRAY_BYTES:
        damaged(source, f"its {name} are of shape {data.shape}, more than {MAX_ARRAY_BYTES:,} bytes")
    values: npt.NDArray[Any] = data[()]
    return np.asarray(values)


def _text(file: h5py.File, source: str) -> str:
    if "extractor" not in file.attrs:
        return ""
    kind = file.attrs.get_id("extractor")
    if kind.shape != () or kind.get_storage_size() > _MOST_TEXT:
        damaged(source, f"its extractor is not a text of at most {_MOST_TEXT} bytes")
    text = file.attrs["extractor"]
    if not isinstance(text, str) or len(text) > _MOST_TEXT:
        damaged(source, f"its extractor is not a text of at most {_MOST_TEXT} bytes")
    return text
