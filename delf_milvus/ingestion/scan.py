"""Which photos an ingest takes, and under which ids.

Contract: the same folders give the same list in the same order. A photo's id is the path below the folder that was
given, with slashes, so that it does not depend on where that folder lies. Real folders are visited before linked ones:
a new link to a folder changes no id.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import posixpath
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from delf_milvus.errors import InputError, UsageError, one_line
from delf_milvus.imaging import remote
from delf_milvus.imaging.decode import read_bytes, read_file
from delf_milvus.settings import DecodeSettings
from delf_milvus.store.schema import MAX_ID_BYTES

_JPEG = {".jpg", ".jpeg", ".jpe", ".jfif", ".jp2"}
_OTHERS = {".png", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".ppm", ".pgm", ".avif"}
SUFFIXES = frozenset(_JPEG | _OTHERS)
"""What a file in a folder must end with, in any case, to be taken as a photo."""

MAX_LISTING_BYTES = 1 << 28
"""Most bytes of a listing."""


TOO_LONG_ID = f"of more than {MAX_ID_BYTES} bytes; give a folder nearer to it, or rename it"
"""How the failure of such a photo ends."""


@dataclass(frozen=True)
class Photo:
    """A file to ingest.

    path: absolute. root: the folder that was given (of a file that was given, the folder it lies in), absolute; not
    absolute for none. metadata: from the listing. ingested_at: when it was ingested first, or "" for now.
    inside: which photo of a file of many, "" for the file itself. base: the address that was given, of a photo behind
    one; its path is then what follows, and its root is none.
    """

    path: Path
    image_id: str
    root: Path
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    ingested_at: str = ""
    inside: str = ""
    base: str = ""

    @property
    def place(self) -> str:
        """Where its content is: the path, for a photo in a file of many `path#name`, or its address."""
        if self.base:
            return f"{self.base}/{self.path.as_posix()}"
        return f"{self.path}#{self.inside}" if self.inside else str(self.path)

    @property
    def origin(self) -> str:
        """The root, or the base; "" for none."""
        return self.base or (str(self.root) if self.root.is_absolute() else "")

    def read(self, limits: DecodeSettings) -> bytes:
        """Its bytes, still encoded: as `read_bytes`, and with its errors."""
        return remote.read(self.place, limits) if self.base else read_bytes(self.path, limits)


@dataclass(frozen=True)
class Failure:
    """A file or folder that cannot be ingested. `path` is valid Unicode, `error` one sentence."""

    path: str
    error: str


@dataclass
class Scan:
    """Photos in the order of their ids, failures in the order of their paths, and the folders given, absolute.

    others: photos that were found and left to other shards. addresses: what was given instead of folders.
    """

    photos: list[Photo]
    failures: list[Failure]
    roots: list[Path]
    others: int = 0
    addresses: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A photo of a listing. path: normalised, with slashes, or an address; relative ones never leave the folder.
    line: from 1; of a Parquet file the number of the row."""

    path: str
    image_id: str | None
    metadata: Mapping[str, Any] = field(hash=False)
    line: int


@dataclass(frozen=True)
class Listing:
    """The photos that a file names, with their ids and metadata. source: that file, for messages."""

    source: Path
    rows: tuple[Row, ...]


def scan(
    paths: Sequence[Path],
    *,
    id_prefix: str = "",
    follow_links: bool = True,
    listing: Listing | None = None,
    suffixes: frozenset[str] = SUFFIXES,
) -> Scan:
    """The photos in these folders, and these files.

    In a folder, at any depth, a photo is a file with one of `suffixes`; names with a leading dot are skipped. A file
    that is given itself is taken whatever its name; its id is that name.

    id_prefix: put before every id. follow_links: descend into linked folders. Each real folder is visited once, by
    whatever ways it can be reached. listing: take the files it names and no other, whatever their suffix.

    Broken links, folders that cannot be read, names that are not valid UTF-8, ids of more than `MAX_ID_BYTES` bytes and
    listed files that do not exist are failures.

    Raises InputError for a given path that does not exist or cannot be read, and for a listing that names a file
    outside of the folders or twice; UsageError where two files get one id.
    """
    if not is_unicode(id_prefix):
        raise UsageError(f"The id prefix {one_line(id_prefix)} is not valid UTF-8.")
    roots = [(path, _is_folder(path)) for path in dict.fromkeys(Path(os.path.abspath(path)) for path in paths)]
    gathering = _Gathering(id_prefix, listing, suffixes)
    if listing is not None:
        for row in listing.rows:
            gathering.take_listed(row, roots)
    else:
        for path, is_folder in roots:
            if is_folder:
                gathering.walk(path, path, "")
            else:
                gathering.take(path, path.parent, path.name)
        while follow_links and gathering.links:
            gathering.walk(*gathering.links.popleft())
    return Scan(
        [photo for _, photo in sorted(gathering.photos.items())],
        sorted(gathering.failures, key=lambda failure: (failure.path, failure.error)),
        [path for path, is_folder in roots if is_folder],
    )


def read_listing(path: Path) -> Listing:
    """Read a listing by its suffix: CSV with a header line, JSONL (one object a line; .jsonl, .ndjson), Parquet.

    Each row has `path`, relative to the folder or address that is ingested (with slashes) or absolute, and may have
    `id`. All else is metadata: text in CSV, any JSON value in JSONL, the same in Parquet (null is none). An empty `id`
    is none. Text is in UTF-8, with or without a byte order mark; at most `MAX_LISTING_BYTES`, unpacked.

    Raises UsageError for another suffix; InputError, with the line, for a row that is malformed, repeats a path or an
    id, or names a path that leaves the folder through "..", and for a file that cannot be read.
    """
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{one_line(path)} must end with one of {', '.join(readers)}.")
    data = read_file(path, MAX_LISTING_BYTES, "split it")
    rows: list[Row] = []
    path_lines: dict[str, int] = {}
    id_lines: dict[str, int] = {}
    for line, values in reader(path, data):
        row = _row(path, line, values)
        image_id = row.path if row.image_id is None else row.image_id
        for kind, value, lines in (("path", row.path, path_lines), ("id", image_id, id_lines)):
            earlier = lines.setdefault(value, line)
            if earlier != line:
                bad_line(path, line, f"the {kind} {one_line(value)} is also that of line {earlier}")
        rows.append(row)
    return Listing(path, tuple(rows))


class _Gathering:
    """What a scan has found so far."""

    def __init__(self, id_prefix: str, listing: Listing | None, suffixes: frozenset[str]) -> None:
        self.photos: dict[str, Photo] = {}
        self.failures: list[Failure] = []
        self.links: deque[tuple[Path, Path, str]] = deque()  # root, linked folder, its path below the root
        self._id_prefix = id_prefix
        self._listing = listing
        self._suffixes = suffixes
        self._visited: set[tuple[int, int]] = set()
        self._line_of_id: dict[str, int] = {}
        self._line_of_file: dict[str, int] = {}

    def walk(self, root: Path, folder: Path, below: str) -> None:
        """Take the photos of a folder and of all real folders in it; put linked ones off to `links`.

        below: the folder's path below the root, "" or ending with a slash.
        """
        pending = [(folder, below)]
        while pending:
            folder, below = pending.pop()
            subfolders = []
            for entry in self._entries(folder):
                path, name = folder / entry.name, below + entry.name
                match self._kind(entry, path):
                    case "folder":
                        subfolders.append((path, f"{name}/"))
                    case "linked folder":
                        self.links.append((root, path, f"{name}/"))
                    case "photo":
                        self.take(path, root, name)
            pending += reversed(subfolders)

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """What is in a folder, sorted, without the hidden; nothing the second time."""
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in self._visited:
                return []
            self._visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
        except OSError as error:
            self._fail(folder, f"cannot be read: {_reason(error)}")
            return []

    def _kind(self, entry: os.DirEntry[str], path: Path) -> Literal["folder", "linked folder", "photo", "other"]:
        try:
            if entry.is_symlink():
                # is_dir and is_file answer False for a broken link; this raises.
                entry.stat()
            if entry.is_dir():
                return "linked folder" if entry.is_symlink() else "folder"
            if path.suffix.lower() not in self._suffixes:
                return "other"
            if entry.is_file():
                return "photo"
            self._fail(path, "is not a regular file")
        except FileNotFoundError:
            self._fail(path, "is a broken link")
        except OSError as error:
            self._fail(path, f"cannot be read: {_reason(error)}")
        return "other"

    def take(self, path: Path, root: Path, name: str, row: Row | None = None) -> None:
        """Take one file under the id `name`, which the prefix precedes."""
        image_id = self._id_prefix + name
        if not is_unicode(f"{path}{image_id}"):
            self._fail(path, "has a name that is not valid UTF-8; rename it")
            return
        if len(image_id.encode()) > MAX_ID_BYTES:
            self._fail(path, f"has an id {TOO_LONG_ID}")
            return
        other = self.photos.get(image_id)
        if other is not None:
            self._collide(other, path, row)
            return
        self.photos[image_id] = Photo(path, image_id, root, {} if row is None else row.metadata)
        if row is not None:
            self._line_of_id[image_id] = row.line

    def take_listed(self, row: Row, roots: Sequence[tuple[Path, bool]]) -> None:
        """Take the file that a row names, wherever below the given paths it is."""
        places = list(_places(row.path, roots))
        if not places and posixpath.isabs(row.path):
            self._bad_row(row, f"{one_line(row.path)} lies outside of the given folders")
        found = [place for place in places if os.path.exists(place[0])]
        if not found:
            missing = places[0][0] if places else Path(row.path)
            self._fail(missing, f"is named by {one_line(self._source)}, line {row.line}, but does not exist")
            return
        path, root, below = found[0]
        for other, _, _ in found[1:]:
            if not path.samefile(other):
                raise UsageError(
                    f"{one_line(row.path)} is both {one_line(path)} and {one_line(other)}; ingest one folder at a time."
                )
        if path.is_dir():
            self._fail(path, f"is named by {one_line(self._source)}, line {row.line}, but is a folder")
            return
        earlier = self._line_of_file.setdefault(os.path.abspath(path), row.line)
        if earlier != row.line:
            self._bad_row(row, f"{one_line(row.path)} is also the photo of line {earlier}")
        self.take(path, root, below if row.image_id is None else row.image_id, row)

    @property
    def _source(self) -> Path:
        assert self._listing is not None
        return self._listing.source

    def _collide(self, other: Photo, path: Path, row: Row | None) -> None:
        if row is not None:
            self._bad_row(
                row, f"the id {one_line(other.image_id)} is also that of line {self._line_of_id[other.image_id]}"
            )
        try:
            same = path.samefile(other.path)
        except OSError as error:
            self._fail(path, f"cannot be read: {_reason(error)}")
            return
        if not same:
            raise UsageError(
                f"The id {one_line(other.image_id)} would stand for both {one_line(other.path)} and {one_line(path)}; "
                "ingest them one at a time, each with its own --id-prefix."
            )

    def _bad_row(self, row: Row, problem: str) -> NoReturn:
        bad_line(self._source, row.line, problem)

    def _fail(self, path: Path, problem: str) -> None:
        readable = os.fsencode(path).decode("utf-8", "backslashreplace")
        self.failures.append(Failure(readable, f"{one_line(path)} {problem}."))


def _is_folder(path: Path) -> bool:
    """Whether a given path is a folder; raises InputError unless it exists and can be read."""
    name = one_line(path)
    try:
        path.stat()
        is_folder = path.is_dir()
        if is_folder:
            os.scandir(path).close()
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist; check the path.") from error
    except OSError as error:
        raise InputError(f"{name} cannot be read: {_reason(error)}.") from error
    except ValueError as error:
        raise InputError(f"{name} is not a path that the system accepts.") from error
    return is_folder


def _places(listed: str, roots: Sequence[tuple[Path, bool]]) -> Iterator[tuple[Path, Path, str]]:
    """Where a listed path can be: the file, the root it is below, and its path below that root."""
    absolute = posixpath.isabs(listed)
    for given, is_folder in roots:
        root = given if is_folder else given.parent
        below = _below(listed, root) if absolute else listed
        if below is not None and (is_folder or below == given.name):
            yield (Path(listed) if absolute else root / listed), root, below


def _below(path: str, root: Path) -> str | None:
    """The path relative to the root, or None if it lies elsewhere; links in either are seen through if need be."""
    for resolve in (os.path.abspath, os.path.realpath):
        file, folder = Path(resolve(path)), Path(resolve(root))
        if file.is_relative_to(folder):
            return file.relative_to(folder).as_posix()
    return None


def _text(source: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad_line(source, data[: error.start].count(b"\n") + 1, "it is not valid UTF-8")


def _csv_rows(source: Path, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(_text(source, data), newline=""), strict=True)
    columns: list[str] | None = None
    line = 1
    try:
        for values in reader:
            if columns is None:
                columns = values
                if "path" not in columns or len(set(columns)) < len(columns):
                    bad_line(source, line, "it must name the columns, each once, separated by commas, one of them path")
            elif values:
                if len(values) != len(columns):
                    bad_line(source, line, f"it has {len(values)} values for {len(columns)} columns")
                yield line, dict(zip(columns, values, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        bad_line(source, line, f"it is not CSV ({error})", error)
    if columns is None:
        raise InputError(f"{one_line(source)} is empty; its first line names the columns, one of them path.")


def _jsonl_rows(source: Path, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines: JSON strings may hold the other line ends of Unicode.
    for line, content in enumerate(_text(source, data).split("\n"), start=1):
        if not content.strip():
            continue
        try:
            values = json.loads(content, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            bad_line(source, line, "it is not a JSON object", error)
        if not isinstance(values, dict):
            bad_line(source, line, "it is not a JSON object")
        if not is_unicode(json.dumps(values, ensure_ascii=False)):
            bad_line(source, line, "it escapes half of a surrogate pair, which is no text")
        yield line, values


def _parquet_rows(source: Path, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow import BufferReader
    from pyarrow.parquet import ParquetFile

    line = size = 0
    try:
        file = ParquetFile(BufferReader(data), thrift_string_size_limit=1 << 20, thrift_container_size_limit=1 << 20)
        if "path" not in (names := file.schema_arrow.names) or len(set(names)) < len(names):
            bad_line(source, 1, "it must name the columns, each once, one of them path")
        # Few at a time: what is one text for many rows in the file is many texts here.
        for batch in file.iter_batches(100):
            size += batch.nbytes
            if size > MAX_LISTING_BYTES:
                raise InputError(f"{one_line(source)} has more than {MAX_LISTING_BYTES:,} bytes unpacked; split it.")
            for values in batch.to_pylist():
                line += 1
                said = {name: value for name, value in values.items() if value is not None}
                if not _is_json(said):
                    bad_line(source, line, "it has a value that is no JSON: write times, bytes and decimals as text")
                yield line, said
    except InputError:
        raise
    except Exception as error:
        # Arrow meets damaged files with nearly every exception there is.
        bad_line(source, line + 1, f"it is not Parquet ({one_line(str(error).partition(chr(10))[0])})", error)


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_json, value.values()))
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | int | bool) or (isinstance(value, float) and math.isfinite(value))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _row(source: Path, line: int, values: dict[str, Any]) -> Row:
    path, image_id = values.pop("path", None), values.pop("id", None)
    if not isinstance(path, str) or not path or "\0" in path:
        bad_line(source, line, "path must be the path of a photo")
    if image_id is not None and not isinstance(image_id, str):
        bad_line(source, line, "id must be text, in quotes")
    protocol, colon, below = path.rpartition("://") if remote.is_address(path) else ("", "", path)
    normal = posixpath.normpath(below)
    if normal == ".." or normal.startswith("../"):
        bad_line(source, line, f"{one_line(path)} leaves the folder")
    return Row(protocol + colon + normal, image_id or None, values, line)


def bad_line(source: Path, line: int, problem: str, cause: Exception | None = None) -> NoReturn:
    """Raise the InputError of a row of a listing."""
    raise InputError(f"{one_line(source)}, line {line}: {problem}.") from cause


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reason(error: OSError) -> str:
    return error.strerror or "input/output error"
