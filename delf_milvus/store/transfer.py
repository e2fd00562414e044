"""A whole collection as a folder of Parquet files, and back: backup, restore, moves between Milvus Lite and servers.

Layout: parts of two files each, images-00000.parquet with the images' rows in the order of their ids (free metadata as
JSON text) and features-00000.parquet with the rows of their features, in the same order and in as many row groups:
group i of the one belongs to group i of the other. manifest.json names every file with its size and SHA-256, and what
the collection was made for. It is written last, so a folder without it is no export.

Nothing of a folder is trusted: the manifest is checked against its schema, every file against the manifest, before the
database is touched; and rows against each other before they are written. Nothing is ever executed (no pickle).

Memory holds one group or batch of images, with its features at most some 300 MB, and one id for each image.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from delf_milvus.errors import CollectionError, InputError, UsageError, one_line
from delf_milvus.features import MAX_FEATURES, file_digest
from delf_milvus.store import records
from delf_milvus.store.codec import split, unpack
from delf_milvus.store.columns import METADATA, Columns, length
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.keys import IMAGE_KEY_BITS, feature_keys
from delf_milvus.store.records import Row
from delf_milvus.store.schema import GLOBAL, SCHEMA_VERSION, CollectionFacts, keypoint_fields
from delf_milvus.store.tables import arrow_schema, from_table, to_table

MANIFEST = "manifest.json"

_GROUP_FEATURES = 50_000
_GROUP_IMAGES = 500
_PART_FEATURES = 1_000_000
_PART_IMAGES = 20_000
_BATCH_BYTES = 32_000_000
_FILES_BYTES = 256_000_000
_MOST_MANIFEST = 64_000_000
_MOST_GROUP = 2_000_000_000
_MOST_DIM = 32_768
_MOST_CHUNKS = 64
_FOOTER = 100_000_000
_OURS = re.compile(r"\.?(images|features)-\d{5,7}\.parquet(\.partial)?|\.manifest\.json\.partial")
_FREE = "metadata"

Progress = Callable[[int, int], None]
"""Called with images done and images in all."""

Count = Annotated[int, Field(ge=0, le=1 << 53)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExportedFile(_Strict):
    """One file of an export."""

    file: str = Field(pattern=r"^(images|features)-[0-9]{5,7}\.parquet$", description="Name in the folder.")
    rows: Count = Field(description="Rows in it.")
    bytes: Count = Field(description="Size of the file.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the file, hexadecimal.")


class ExportedPart(_Strict):
    """The rows of some images, and those of their features in the same order."""

    images: ExportedFile
    features: ExportedFile


class Manifest(_Strict):
    """manifest.json of an exported collection."""

    format: Literal["delf-milvus export"] = "delf-milvus export"
    version: Literal[1] = 1
    created_at: str = Field(max_length=64, description="ISO 8601, UTC.")
    software: str = Field(max_length=200, description="Version of delf-milvus that wrote it.")
    backend: str = Field(max_length=200, description="Database that it was read from.")
    collection: str = Field(max_length=200, description="Name of the collection there.")
    prefix: str = Field(description="Only images whose id starts so were exported.")
    facts: CollectionFacts = Field(
        description="What the collection was made for: model, packed fields, schema version."
    )
    images: Count = Field(description="Images in all parts.")
    features: Count = Field(description="Features in all parts.")
    parts: list[ExportedPart]


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote; the fields of `--json`."""

    folder: str
    images: int
    features: int
    files: int
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}


@dataclass
class ImportReport:
    """What an import did; the fields of `--json`.

    unchanged: images that were there already with the same row. features: rows written. Images of the collection that
    the export has not stay.
    """

    folder: str
    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    features: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}


def export_collection(
    store: FeatureStore, folder: Path, *, prefix: str = "", progress: Progress | None = None
) -> ExportReport:
    """Write the images whose id starts with `prefix`, and their features, into a folder.

    The folder is made, or is empty, or holds what an export left that did not end. Whatever goes wrong, no manifest is
    written, and a failure leaves nothing. Writers should rest meanwhile: an image that is written while it is read may
    end the export.

    Raises UsageError for a folder that holds something else, InputError when it cannot be written (a full disk),
    CollectionError where there is no collection, DatabaseError.
    """
    started = time.monotonic()
    facts = store.facts
    if facts is None:
        raise CollectionError("There is no collection to export; `delf-milvus status` shows what there is.")
    status = store.status()
    writer = _Writer(folder, facts)
    try:
        writer.open()
        chosen = store.keys(prefix)
        done = 0
        _tell(progress, done, len(chosen))
        for start in range(0, len(chosen), _GROUP_IMAGES):
            keys = chosen[start : start + _GROUP_IMAGES]
            found = store.rows(keys)
            # Images that were deleted since they were listed are left out.
            for group in _groups([found[key] for key in keys if key in found]):
                counts = {int(row["image_key"]): int(row["feature_count"]) for row in group}
                writer.write(group, store.feature_columns(counts))
            done += len(keys)
            _tell(progress, done, len(chosen))
        manifest = writer.finish(status.backend, status.collection, prefix)
    except BaseException as error:
        writer.discard()
        if isinstance(error, OSError):
            raise InputError(
                f"The export into {one_line(folder)} was given up ({one_line(error.strerror or error)}): nothing of it "
                "is left; make room, or choose another folder."
            ) from None
        raise
    files = [one for part in manifest.parts for one in (part.images, part.features)]
    size = sum(one.bytes for one in files)
    seconds = time.monotonic() - started
    return ExportReport(str(folder), manifest.images, manifest.features, len(files) + 1, size, seconds)


def import_collection(
    store: FeatureStore, folder: Path, *, prefix: str = "", progress: Progress | None = None
) -> ImportReport:
    """Store the images of an exported folder, replacing those of the same id; the collection is made where absent.

    Before anything is written, the manifest, the checksums of all files, their schemas and the model are checked. An
    image that is stored already with the same row is left alone, so running it again goes on where it was interrupted.

    Raises InputError for a folder that is no whole export, CollectionError for another model, DatabaseError.
    """
    started = time.monotonic()
    manifest = read_manifest(folder)
    _check_files(folder, manifest)
    as_files = store.imports_from() is not None
    store.prepare(manifest.facts)
    target = store.facts
    assert target is not None, "prepare creates it"
    report = ImportReport(str(folder))
    deferred: set[int] = set()
    done = 0
    _tell(progress, done, manifest.images)
    dim = manifest.facts.fingerprint.dim
    least = (_FILES_BYTES if as_files else _BATCH_BYTES) // (4 * dim + 64)
    for batch in _batches(_read(folder, manifest, target.chunks, features=True), least):
        done += len(batch)
        wanted = {key: one for key, one in batch.items() if one.row["image_id"].startswith(prefix)}
        stored = store.rows(list(wanted))
        todo = {key: one for key, one in wanted.items() if not _same(stored.get(key), one.row, target.chunks)}
        report.unchanged += len(wanted) - len(todo)
        report.replaced += sum(key in stored for key in todo)
        report.added += sum(key not in stored for key in todo)
        report.features += sum(length(one.columns) for one in todo.values())
        if todo:
            store.restore(
                {key: one.row for key, one in todo.items()},
                {key: one.columns for key, one in todo.items()},
                now=not as_files,
            )
        if as_files:
            deferred.update(todo)
        _tell(progress, done, manifest.images)
    if deferred:
        store.settle()
        for group in _read(folder, manifest, target.chunks, features=False):
            rows = [one.row for key, one in group.items() if key in deferred]
            if rows:
                store.restore_rows(rows)
    report.seconds = time.monotonic() - started
    return report


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported folder. Raises InputError where there is none, or one that breaks its schema."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MOST_MANIFEST:
            raise InputError(f"{one_line(path)} is too large to be the manifest of an export.")
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{one_line(folder)} holds no export: it has no {MANIFEST}; was the export interrupted? Run it again."
        ) from None
    except OSError as error:
        raise InputError(f"{one_line(path)} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "its text"
        raise InputError(f"{one_line(path)} is damaged, or of another version ({where}: {first['msg']}).") from None
    if manifest.facts.schema_version != SCHEMA_VERSION:
        raise CollectionError(
            f"{one_line(folder)} has schema version {manifest.facts.schema_version}, this program knows "
            f"{SCHEMA_VERSION}: import it with the version of delf-milvus that exported it."
        )
    made = manifest.facts
    if not (1 <= made.fingerprint.dim <= _MOST_DIM and 1 <= made.chunks <= _MOST_CHUNKS):
        raise InputError(f"{one_line(path)} is damaged: no collection has such descriptors or so many packed fields.")
    if not 0 <= made.indexed <= MAX_FEATURES:
        raise InputError(f"{one_line(path)} is damaged: no collection indexes {made.indexed} features of an image.")
    names = [one.file for part in manifest.parts for one in (part.images, part.features)]
    kinds = all(p.images.file.startswith("images") and p.features.file.startswith("features") for p in manifest.parts)
    sums = tuple(sum(getattr(part, kind).rows for part in manifest.parts) for kind in ("images", "features"))
    if len(set(names)) < len(names) or not kinds or sums != (manifest.images, manifest.features):
        raise InputError(f"{one_line(path)} is damaged: its parts do not add up.")
    return manifest


@dataclass(frozen=True)
class _Image:
    row: Row
    columns: Columns = field(default_factory=dict)


class _Writer:
    """The files of an export while it runs: each is called .partial until it is whole."""

    def __init__(self, folder: Path, facts: CollectionFacts) -> None:
        self._folder = folder
        self._facts = facts
        self._images = facts.images
        self._features = facts.features
        self._parts: list[ExportedPart] = []
        self._files: list[tuple[str, Any]] = []
        self._rows = [0, 0]
        self._ours = False

    def open(self) -> None:
        """Make the folder, or empty it of what an export left that did not end."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UsageError(f"{one_line(self._folder)} is a file; choose a folder to export into.") from None
        present = os.listdir(self._folder)
        others = sorted(name for name in present if not _OURS.fullmatch(name))
        if others:
            what = "a finished export" if MANIFEST in others else f"other files ({one_line(others[0])})"
            raise UsageError(f"{one_line(self._folder)} holds {what}; choose a new folder to export into.")
        self._ours = True
        self._clear()

    def write(self, rows: Sequence[Row], columns: Columns) -> None:
        """Append a group of images and all their features."""
        if not self._files:
            self._begin()
        images = records.image_columns(rows, self._images)
        tables = (
            to_table(self._images, images, **{_FREE: images[METADATA].tolist()}),
            to_table(self._features, columns),
        )
        for number, ((_, writer), table) in enumerate(zip(self._files, tables, strict=True)):
            writer.write_table(table, row_group_size=max(1, table.num_rows))
            self._rows[number] += table.num_rows
        if self._rows[0] >= _PART_IMAGES or self._rows[1] >= _PART_FEATURES:
            self._end()

    def finish(self, backend: str, collection: str, prefix: str) -> Manifest:
        """End the last part and write the manifest."""
        if self._files:
            self._end()
        manifest = Manifest(
            created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            software=f"delf-milvus {version('delf-milvus')}",
            backend=backend,
            collection=collection,
            prefix=prefix,
            facts=self._facts,
            images=sum(part.images.rows for part in self._parts),
            features=sum(part.features.rows for part in self._parts),
            parts=self._parts,
        )
        partial = self._folder / f".{MANIFEST}.partial"
        partial.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        _synchronised(partial)
        partial.rename(self._folder / MANIFEST)
        _synchronised(self._folder)
        return manifest

    def discard(self) -> None:
        """Remove what was written."""
        for _, writer in self._files:
            # The disk is full, or the file is no longer wanted: closing it may fail once more.
            with suppress(OSError, ValueError):
                writer.close()
        self._files = []
        if self._ours:
            with suppress(OSError):
                self._clear()

    def _clear(self) -> None:
        for name in os.listdir(self._folder):
            if _OURS.fullmatch(name):
                (self._folder / name).unlink()

    def _begin(self) -> None:
        from pyarrow import parquet

        self._rows = [0, 0]
        for name, schema in (
            ("images", arrow_schema(self._images, _FREE)),
            ("features", arrow_schema(self._features)),
        ):
            file = f"{name}-{len(self._parts):05}.parquet"
            # Descriptors are noise to a compressor; checksums of pages would repeat the manifest's.
            options = {"compression": "zstd" if name == "images" else "none", "use_dictionary": False}
            self._files.append(
                (
                    file,
                    parquet.ParquetWriter(self._folder / f".{file}.partial", schema, write_statistics=False, **options),
                )
            )

    def _end(self) -> None:
        described = []
        for (file, writer), rows in zip(self._files, self._rows, strict=True):
            writer.close()
            partial = self._folder / f".{file}.partial"
            _synchronised(partial)
            described.append(
                ExportedFile(file=file, rows=rows, bytes=partial.stat().st_size, sha256=file_digest(partial))
            )
            partial.rename(self._folder / file)
        self._files = []
        self._parts.append(ExportedPart(images=described[0], features=described[1]))


def _groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The images in order, in groups that have about as many features as a row group should."""
    group: list[Row] = []
    filled = 0
    for row in rows:
        count = int(row["feature_count"])
        if group and filled + count > _GROUP_FEATURES:
            yield group
            group, filled = [], 0
        group.append(row)
        filled += count
    if group:
        yield group


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Raise InputError unless every file is there as the manifest says, down to its schema and row groups."""
    schemas = (arrow_schema(manifest.facts.images, _FREE), arrow_schema(manifest.facts.features))
    for part in manifest.parts:
        groups = []
        for one, schema in zip((part.images, part.features), schemas, strict=True):
            path = folder / one.file
            try:
                size = path.stat().st_size
                if size != one.bytes or not path.is_file():
                    raise _damaged(path, f"it has {size} bytes, not {one.bytes}")
                if file_digest(path) != one.sha256:
                    raise _damaged(path, "its checksum differs")
            except OSError as error:
                raise InputError(f"{one_line(path)} cannot be read: {error.strerror}; copy the export again.") from None
            with _opened(path) as file, _sound(path):
                if not file.schema_arrow.equals(schema):
                    raise ValueError("it has other columns than this collection")
                sizes = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
                if file.metadata.num_rows != one.rows:
                    raise ValueError(f"it has {file.metadata.num_rows} rows, not {one.rows}")
                if any(group.total_byte_size > _MOST_GROUP for group in sizes):
                    raise ValueError("a row group is too large")
                groups.append(len(sizes))
        if len(set(groups)) > 1:
            raise _damaged(folder / part.images.file, "its row groups are not those of its features")


def _read(folder: Path, manifest: Manifest, chunks: int, *, features: bool) -> Iterator[dict[int, _Image]]:
    """The images of an export by key, group by group, checked, for a collection with `chunks` packed fields.

    Without `features`, their columns are left out.
    """
    image_spec, feature_spec = manifest.facts.images, manifest.facts.features
    last = ("", -1)
    for part in manifest.parts:
        path = folder / part.images.file
        with _opened(path) as images, _opened(folder / part.features.file) as rest:
            for group in range(images.metadata.num_row_groups):
                with _sound(path):
                    table = images.read_row_group(group)
                    rows = _rows(from_table(image_spec, table), table.column(_FREE).to_pylist())
                    columns = from_table(feature_spec, rest.read_row_group(group)) if features else {}
                    found = _checked(rows, columns, manifest.facts, chunks, last)
                last = _order(rows[-1]) if rows else last
                yield found


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    """Around reading rows: whatever they make fail says that the file is damaged."""
    try:
        yield
    # Arrow and NumPy meet hostile bytes with nearly every exception there is.
    except Exception as error:
        raise _damaged(path, one_line(error).rstrip(".") or type(error).__name__) from None


def _rows(columns: Columns, free: Sequence[str]) -> list[Row]:
    values = {name: column if column.ndim > 1 else column.tolist() for name, column in columns.items()}
    metadata = [json.loads(text) for text in free]
    if not all(isinstance(one, dict) for one in metadata):
        raise ValueError("metadata of an image is no object")
    return [
        {**one, **dict(zip(values, row, strict=True))}
        for one, row in zip(metadata, zip(*values.values(), strict=True), strict=True)
    ]


def _checked(
    rows: Sequence[Row], columns: Columns, facts: CollectionFacts, chunks: int, last: tuple[str, int]
) -> dict[int, _Image]:
    """The images with their own features, for ids that rise from `last`, so that none comes twice.

    Raises ValueError or InputError for rows that do not belong together.
    """
    found: dict[int, _Image] = {}
    start = 0
    for row in rows:
        record = records.record_of(row, facts.tenant_field)
        records.typed(record, facts, record.tenant)
        key, count = int(row["image_key"]), int(row["feature_count"])
        if _order(row) <= last:
            raise ValueError("its images are not in the order of their ids")
        last = _order(row)
        if key != record.key or not 0 <= key < 1 << IMAGE_KEY_BITS or not 0 <= count <= MAX_FEATURES:
            raise ValueError(f"the key or the feature count of image {record.image_id!r} is wrong")
        text = "".join(row.pop(name) for name in keypoint_fields(facts.chunks))
        packed = unpack(text)
        if (facts.rows_of(len(packed)), packed.width, packed.height) != (count, row["width"], row["height"]):
            raise ValueError(f"the packed features of image {record.image_id!r} are not its own")
        if not np.isfinite(row[GLOBAL]).all():
            raise ValueError(f"the descriptor of image {record.image_id!r} is not finite")
        row.update(zip(keypoint_fields(chunks), split(text, chunks), strict=True))
        part = {name: values[start : start + count] for name, values in columns.items()}
        if part and not _belongs(part, key, count, {one.name: row[one.name] for one in facts.declared}):
            raise ValueError(f"the features of image {record.image_id!r} are not its own, or not finite")
        start += count
        found[key] = _Image(row, part)
    if columns and start != length(columns):
        raise ValueError("there are features of no image")
    return found


def _order(row: Row) -> tuple[str, int]:
    """What images are in the order of: tenants may share an id."""
    return row["image_id"], int(row["image_key"])


def _belongs(part: Columns, key: int, count: int, declared: Mapping[str, Any]) -> bool:
    keys = feature_keys(key, count)
    return (
        bool(np.array_equal(part["feature_key"], keys))
        and bool((part["image_key"] == key).all())
        and all(bool((part[name] == value).all()) for name, value in declared.items())
        and all(np.isfinite(values).all() for values in part.values() if values.dtype.kind == "f")
        and bool((np.abs(np.linalg.norm(part["descriptor"], axis=1) - 1) <= 1e-2).all())
    )


def _batches(groups: Iterator[dict[int, _Image]], least: int) -> Iterator[dict[int, _Image]]:
    """The groups joined until a batch has at least `least` features."""
    batch: dict[int, _Image] = {}
    filled = 0
    for group in groups:
        batch.update(group)
        filled += sum(length(one.columns) for one in group.values())
        if filled >= least:
            yield batch
            batch, filled = {}, 0
    if batch:
        yield batch


def _same(stored: Row | None, row: Row, chunks: int) -> bool:
    """Whether an image is stored with the same record, metadata and packed features."""
    if stored is None or records.record_of(stored) != records.record_of(row):
        return False
    return all(stored[name] == row[name] for name in keypoint_fields(chunks))


def _opened(path: Path) -> Any:
    from pyarrow.parquet import ParquetFile

    with _sound(path):
        return ParquetFile(path, thrift_string_size_limit=_FOOTER, thrift_container_size_limit=_FOOTER)


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{one_line(path)} is damaged ({reason}): copy or make the export again.")


def _synchronised(path: Path) -> None:
    """On the disk, so that a manifest never outlives what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
