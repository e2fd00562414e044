"""Feature files of every format, told apart by their suffix.

A place is what a user writes and what is stored as an image's uri: the path of a `.npz` or `.delf` file, or, for one
photo of a `.h5` file, `features.h5#folder/photo.jpg`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from delf_milvus.errors import UsageError, one_line
from delf_milvus.featurefiles import delf, hloc, npz
from delf_milvus.featurefiles.arrays import MAX_FILE_BYTES, LocalFeatures
from delf_milvus.imaging.decode import content_digest, read_file

Format = Literal["delf", "npz", "hloc"]

SUFFIX_OF: dict[Format, str] = {"delf": ".delf", "npz": ".npz", "hloc": ".h5"}
"""What files of a format are written with."""

MANY = frozenset((".h5", ".hdf5"))
"""Suffixes of files that hold many photos."""

SUFFIXES = frozenset((".npz", ".delf")) | MANY
"""What a feature file ends with, in any case."""

_INSIDE = re.compile(r"(.*?\.(?:h5|hdf5))#(.+)", re.DOTALL | re.IGNORECASE)


def split_place(place: str | Path) -> tuple[Path, str]:
    """The file of a place, and which photo of it, "" where the file has one alone."""
    inside = _INSIDE.fullmatch(str(place))
    return (Path(inside[1]), inside[2]) if inside else (Path(place), "")


def read_place(place: str | Path) -> LocalFeatures:
    """The features of one photo. Raises InputError, UsageError for another suffix or an `.h5` file without #name."""
    return read_with_digest(*split_place(place))[0]


def read_with_digest(path: Path, name: str = "") -> tuple[LocalFeatures, str]:
    """The features of one photo, and the SHA-256, hexadecimal, of the file or, of `.h5`, of that photo's arrays.

    Errors as of `read_place`.
    """
    suffix = path.suffix.lower()
    if suffix in MANY:
        if not name:
            raise UsageError(f"{one_line(path)} holds many photos; say which: {one_line(path.name)}#folder/photo.jpg.")
        return hloc.read_with_digest(path, name)
    parsers = {".npz": npz.parse, ".delf": delf.parse}
    if suffix not in parsers:
        raise UsageError(
            f"{one_line(path)} is not a feature file; it must end with one of {', '.join(sorted(SUFFIXES))}."
        )
    data = read_file(path, MAX_FILE_BYTES, "it is no feature file of one photo")
    return parsers[suffix](data, str(path)), content_digest(data)
