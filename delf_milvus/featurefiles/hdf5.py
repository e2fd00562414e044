"""Reading `.h5` files, in a process of its own: `python -m delf_milvus.featurefiles.hdf5`.

The HDF5 library, written in C, loops without end on some damaged files, and nothing within a process can stop it. So
`reading` starts one that does nothing else, whose memory is bounded, and ends it where it does not answer.

A request is a line of JSON on stdin: path, name of a photo, and what is asked for: names, arrays or extractor. The
answer on stdout is a line of JSON, which says how many bytes follow, and these: the arrays as an .npz archive, in which
nothing can be that runs. Errors are told by the name of their class.
"""

from __future__ import annotations

import io
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from delf_milvus.errors import DelfMilvusError, InputError, NotFoundError, UsageError, one_line
from delf_milvus.featurefiles.arrays import MAX_ARRAY_BYTES, damaged

if TYPE_CHECKING:
    import h5py

NUMBERS = ("keypoints", "descriptors", "scores", "scales", "global_descriptor")
ARRAYS = (*NUMBERS, "image_size")
EXTRACTOR = "extractor"

_MOST_TEXT = 4096
_MOST_MEMORY = 4 << 30
"""Address space of the process, bytes: several times the arrays of one photo."""


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


def arrays(path: Path, name: str) -> tuple[dict[str, npt.NDArray[Any]], str]:
    """The arrays of one photo as they are stored, by name, and who made the features of the file, "" where it does not
    say. Raises InputError, NotFoundError for a photo that the file does not have."""
    source = f"{path}#{name}"
    with _opened(path) as file:
        group = _group(file, name, source)
        return {key: _array(group, key, source) for key in ARRAYS if key in group}, _text(file, source)


def extractor(path: Path) -> str:
    """Who made the features of a file, "" where it does not say. Raises InputError."""
    with _opened(path) as file:
        return _text(file, str(path))


def library() -> Any:
    """The module h5py; raises UsageError without it."""
    try:
        import h5py
    except ImportError as error:
        raise UsageError("HDF5 files need h5py: pip install 'delf-milvus[hloc]'.") from error
    return h5py


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """A file for reading, whatever is wrong with it told as InputError."""
    h5py = library()
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
    except Exception as error:
        damaged(str(path), "it is not an HDF5 file, or it is damaged", error)


def _group(file: h5py.File, name: str, source: str) -> h5py.Group:
    """The group of a photo, reached through this file alone."""
    h5py = library()
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
    h5py = library()
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


def serve() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    # What C code prints belongs to no answer.
    os.dup2(2, 1)
    _limit_memory()
    for line in sys.stdin.buffer:
        path, name, kind = json.loads(line)
        head: dict[str, Any] = {}
        body = b""
        try:
            if kind == "names":
                head["names"] = names(Path(path))
            elif kind == "extractor":
                head["extractor"] = extractor(Path(path))
            else:
                found, head["extractor"] = arrays(Path(path), name)
                stream = io.BytesIO()
                np.savez(stream, **found)  # type: ignore[arg-type] # its stubs take an array's name for `allow_pickle`
                body = stream.getvalue()
        except DelfMilvusError as error:
            head = {"error": type(error).__name__, "message": str(error)}
        answers.write(json.dumps({**head, "bytes": len(body)}).encode() + b"\n" + body)
        answers.flush()


def _limit_memory() -> None:
    """Bound the address space, where the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    except (ImportError, ValueError, OSError):
        return


if __name__ == "__main__":
    serve()
