"""Looks at a database before, or after, something goes wrong: each check ok, warn, fail or skip, with what to do."""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from delf_milvus.errors import DelfMilvusError
from delf_milvus.features import Features, Fingerprint
from delf_milvus.settings import StoreSettings
from delf_milvus.store import connection, generations, schema
from delf_milvus.store.columns import length, write_columns
from delf_milvus.store.connection import Connection
from delf_milvus.store.indexing import FEATURE_VECTOR, vector_index
from delf_milvus.store.profiles import METRIC, memory_bytes
from delf_milvus.store.records import feature_columns
from delf_milvus.store.schema import CollectionFacts, CollectionSpec

if TYPE_CHECKING:
    from pymilvus import MilvusClient

State = Literal["ok", "warn", "fail", "skip"]

_MAINTAINED = (2, 5)
_OLDEST_PYMILVUS = (2, 6, 17)
_CLOCK_SECONDS = 5.0
_LEAST_DISK = 200_000_000
_GOOD_DISK = 2_000_000_000
_LOGICAL_BITS = 18
_SCRATCH_ROWS = 2000
_SLOW_ROWS = 1000
_SCRATCH_DIM = 40


@dataclass(frozen=True)
class Check:
    """One line of the doctor. what: what was seen. todo: what to do about it, "" where nothing is."""

    name: str
    state: State
    what: str
    todo: str = ""

    def to_dict(self) -> dict[str, str]:
        """The fields of `--json`."""
        return asdict(self)


def examine(
    uri: str,
    collection: str,
    settings: StoreSettings,
    fingerprint: Fingerprint | None,
    *,
    token: str = "",
    client: MilvusClient | None = None,
    read_only: bool = False,
) -> Iterator[Check]:
    """Check after check, as they are made; none raises for what it finds.

    fingerprint: of the model in use, or None where it cannot be read. read_only: nothing is written; otherwise a
    scratch collection of a name of its own, beginning with `collection`, is created, filled and dropped.
    """
    if client is None and not connection.is_server(uri):
        with suppress(DelfMilvusError):
            if not connection.embedded_exists(uri) and read_only:
                yield Check("connection", "skip", f"{uri} does not exist yet, and nothing may be written")
                yield from _client_versions()
                yield _disk(uri)
                return
    started = time.monotonic()
    try:
        database = (
            connection.connect(uri, token, settings)
            if client is None
            else connection.adopt(client, settings.timeout, retry_seconds=settings.retry_seconds)
        )
    except DelfMilvusError as error:
        yield Check("connection", "fail", str(error), "check --uri and --token, and that the database is running")
        yield from _client_versions()
        return
    try:
        yield Check("connection", "ok", f"{database.where} answers after {time.monotonic() - started:.2f} s")
        yield _server_version(database)
        yield from _client_versions()
        yield from _permissions(database, collection, read_only)
        yield from _collections(database, collection, fingerprint)
        if database.backend == "lite":
            yield _disk(uri)
        else:
            yield Check("disk", "skip", "the server's disks are not visible from here", "watch them where it runs")
    finally:
        database.close()


def _server_version(database: Connection) -> Check:
    found = re.search(r"(\d+)\.(\d+)", database.version)
    if database.backend == "lite" or found is None:
        return Check("database version", "ok", database.version)
    if (int(found[1]), int(found[2])) < _MAINTAINED:
        return Check(
            "database version", "warn", f"{database.version} is no longer maintained", "update it to the latest 2.6"
        )
    return Check("database version", "ok", database.version)


def _client_versions() -> Iterator[Check]:
    for package, oldest in (("pymilvus", _OLDEST_PYMILVUS), ("milvus-lite", (3, 2, 2))):
        try:
            found = version(package)
        except PackageNotFoundError:
            if package == "pymilvus":
                yield Check(package, "fail", "not installed", "pip install --upgrade delf-milvus")
            else:
                yield Check(package, "skip", "not installed: only servers can be used")
            continue
        parts = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
        if parts < oldest:
            wanted = ".".join(map(str, oldest))
            yield Check(package, "fail", f"{found} is too old", f"pip install '{package}>={wanted}'")
        else:
            yield Check(package, "ok", found)


def _permissions(database: Connection, collection: str, read_only: bool) -> Iterator[Check]:
    """Listing, then creating, writing, reading and dropping a collection of our own; its clock and its speed."""
    try:
        names = database.call("listing collections", database.client.list_collections)
        yield Check("listing", "ok", f"{len(names)} collections are visible")
    except DelfMilvusError as error:
        yield Check("listing", "fail", str(error), "give the user the right to show collections")
    if read_only:
        for name in ("writing", "clock", "write speed"):
            yield Check(name, "skip", "nothing may be written (--read-only)")
        return
    scratch = f"{collection}_doctor_{uuid.uuid4().hex[:8]}"
    doing = "create"
    try:
        with database.asking("creating a scratch collection"):
            before = time.time()
            _create(database, scratch)
            after = time.time()
        doing = "write to"
        spec = schema.features_spec(_SCRATCH_DIM)
        rows = feature_columns(1, _random_features(), spec, {})
        written = length(rows)
        started = time.monotonic()
        write_columns(database, scratch, spec, rows)
        seconds = time.monotonic() - started
        doing = "read"
        found = database.call(
            "reading a scratch collection",
            database.client.query,
            scratch,
            filter="",
            output_fields=["count(*)"],
            consistency_level="Strong",
        )
        read = int(found[0]["count(*)"])
        described = database.call("describing a scratch collection", database.client.describe_collection, scratch)
        doing = "drop"
        with database.asking("dropping a scratch collection"):
            database.client.drop_collection(scratch, timeout=database.timeout)
    except DelfMilvusError as error:
        yield Check("writing", "fail", f"cannot {doing} a collection: {error}", "give the user the rights of a writer")
        if doing not in ("create", "drop"):
            with suppress(DelfMilvusError), database.asking("dropping a scratch collection"):
                database.client.drop_collection(scratch, timeout=database.timeout)
        for name in ("clock", "write speed"):
            yield Check(name, "skip", "needs a collection that can be written")
        return
    if read == written:
        yield Check("writing", "ok", "collections can be created, written, read and dropped")
    else:
        yield Check("writing", "fail", f"{written} rows were written and {read} read", "look at the server's log")
    yield _clock(database, int(described.get("created_timestamp") or 0), before, after)
    rate = written / seconds
    shown = f"{rate:,.0f} feature rows a second, one call of {written}"
    if rate < _SLOW_ROWS:
        yield Check("write speed", "warn", shown, "look at the network and at the server's load and disks")
    else:
        yield Check("write speed", "ok", shown)


def _create(database: Connection, name: str) -> None:
    params = database.client.prepare_index_params()
    params.add_index("descriptor", index_type="FLAT", index_name="descriptor", metric_type=METRIC)
    database.client.create_collection(
        name,
        schema=schema.to_pymilvus(schema.features_spec(_SCRATCH_DIM)),
        index_params=params,
        timeout=database.timeout,
    )


def _random_features() -> Features:
    rng = np.random.default_rng(0)
    descriptors = rng.normal(size=(_SCRATCH_ROWS, _SCRATCH_DIM)).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    ones = np.ones(_SCRATCH_ROWS, np.float32)
    return Features(np.zeros((_SCRATCH_ROWS, 2), np.float32), ones, ones, descriptors, 1, 1)


def _clock(database: Connection, created: int, before: float, after: float) -> Check:
    """Compare the time in the server's timestamps (milliseconds above 18 bits of a counter) with ours."""
    if database.backend == "lite":
        return Check("clock", "skip", "an embedded database has this machine's clock")
    if not created:
        return Check("clock", "skip", "this server tells no timestamps")
    theirs = (created >> _LOGICAL_BITS) / 1000
    off = theirs - after if theirs > after else min(0.0, theirs - before)
    if abs(off) > _CLOCK_SECONDS:
        return Check(
            "clock", "warn", f"the server's clock is {off:+.1f} s from ours", "let both follow one time server"
        )
    return Check("clock", "ok", f"within {max(abs(off), after - before):.1f} s of the server's")


def _collections(database: Connection, collection: str, fingerprint: Fingerprint | None) -> Iterator[Check]:
    """Both collections: schema, model, index, memory."""
    found: dict[str, dict[str, Any]] = {}
    try:
        generation = generations.current(database, collection)
        names = [generation + schema.FEATURES_SUFFIX, generation + schema.IMAGES_SUFFIX]
        for name in names:
            if database.call("looking for the collections", database.client.has_collection, name):
                found[name] = database.call("reading the schema", database.client.describe_collection, name)
    except DelfMilvusError as error:
        yield Check("schema", "fail", str(error), "give the user the right to describe collections")
        return
    if not found:
        yield Check("schema", "ok", f"there is no collection {collection!r} yet")
        return
    facts = _facts(collection, found)
    if isinstance(facts, Check):
        yield facts
        return
    absent = [name for name in names if name not in found]
    specs = (facts.features, facts.images)
    wrong = [
        text
        for name, spec in zip(names, specs, strict=True)
        if name in found
        for text in _differences(found[name], spec)
    ]
    if absent:
        yield Check("schema", "fail", f"{absent[0]} is missing", "run `delf-milvus ingest` again: it is created anew")
    elif wrong:
        yield Check("schema", "fail", f"altered: {'; '.join(wrong)}", "ingest into a new collection")
    else:
        yield Check("schema", "ok", f"version {facts.schema_version}, {facts.fingerprint.dim} components a descriptor")
    yield _model(fingerprint, facts.fingerprint)
    if not absent:
        yield from _index(database, names[0], facts.fingerprint.dim)


def _model(ours: Fingerprint | None, stored: Fingerprint) -> Check:
    if name := stored.made_elsewhere:
        return Check("model", "ok", f"none: the features were made elsewhere ({name})")
    if ours is None:
        return Check("model", "fail", "the model cannot be read", "check --model")
    if ours == stored:
        return Check("model", "ok", f"{ours.short}, the one of the collection")
    what = "; ".join(stored.differences(ours))
    return Check("model", "fail", f"the collection has another: {what}", "use that model and those settings")


def _facts(collection: str, found: dict[str, dict[str, Any]]) -> CollectionFacts | Check:
    try:
        known = [CollectionFacts.from_json((one.get("properties") or {})[schema.PROPERTY]) for one in found.values()]
    except KeyError:
        return Check("schema", "fail", f"{collection!r} was made by other software", "use another name: --collection")
    except ValueError as error:
        return Check("schema", "fail", f"{collection!r}: {error}", "ingest into a new collection")
    return known[0]


def _index(database: Connection, name: str, dim: int) -> Iterator[Check]:
    try:
        described = vector_index(database, name, FEATURE_VECTOR)
        rows = int(database.call("counting", database.client.get_collection_stats, name)["row_count"])
    except DelfMilvusError as error:
        yield Check("index", "fail", str(error), "give the user the right to describe indexes")
        return
    if not described:
        yield Check("index", "fail", "the features have no index", "any `delf-milvus search` or `ingest` builds one")
        return
    kind = str(described.get("index_type"))
    total = int(described.get("total_rows", 0))
    indexed = min(int(described.get("indexed_rows", 0)), total - int(described.get("pending_index_rows") or 0))
    if indexed < total:
        yield Check(
            "index", "warn", f"{kind}, {indexed} of {total} rows indexed", "wait: searches are slower meanwhile"
        )
    else:
        yield Check("index", "ok", f"{kind}, {indexed} of {total} rows indexed")
    flat = {**described, **described.get("params", {})}
    params = {key: int(flat[key]) for key in ("nlist", "m", "nbits", "M") if key in flat}
    needed = memory_bytes(kind, params, dim, rows)
    shown = f"{rows} loaded rows take about {needed / 1e6:,.0f} MB"
    if database.backend == "server":
        yield Check("memory", "skip", f"{shown} on the server, whose memory is not visible from here")
        return
    free = _free_memory()
    if free is None:
        yield Check("memory", "skip", f"{shown}; this system does not tell how much is free")
    elif free < needed:
        yield Check("memory", "warn", f"{shown}, {free / 1e6:,.0f} MB are free", "use a Milvus server")
    else:
        yield Check("memory", "ok", f"{shown}, {free / 1e6:,.0f} MB are free")


def _differences(described: dict[str, Any], spec: CollectionSpec) -> list[str]:
    """What a collection lacks of its fields. More fields than ours do no harm."""
    fields = {str(one["name"]): one for one in described.get("fields", ())}
    wrong = []
    for field in spec.fields:
        one = fields.get(field.name)
        if one is None:
            wrong.append(f"no field {field.name}")
            continue
        kind = getattr(one["type"], "name", str(one["type"]))
        size = int((one.get("params") or {}).get("dim" if field.type == "FLOAT_VECTOR" else "max_length", field.size))
        if kind != field.type or size < field.size:
            wrong.append(f"{field.name} is {kind} {size or ''}".rstrip())
    return wrong


def _disk(uri: str) -> Check:
    """Free space where the embedded database is: compaction writes what it merges a second time."""
    path = Path(uri).absolute()
    try:
        free = shutil.disk_usage(path if path.exists() else path.parent).free
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.exists() else 0
    except OSError as error:
        return Check("disk", "fail", f"{path.parent} cannot be read: {error.strerror}", "check the path and its rights")
    shown = f"{free / 1e9:,.1f} GB free, the database has {size / 1e9:,.2f}"
    if free < _LEAST_DISK:
        return Check("disk", "fail", shown, "free some space before anything is written")
    if free < _GOOD_DISK + size:
        return Check("disk", "warn", shown, "free some space: rewriting needs as much again")
    return Check("disk", "ok", shown)


def _free_memory() -> int | None:
    """Bytes that programs can still get; None where the system does not say."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
