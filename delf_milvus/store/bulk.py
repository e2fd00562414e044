"""Bulk import: rows as column files that a Milvus server reads by itself, past the message queue.

The files go to a storage that both sides reach, `store.bulk_storage`: a folder of a file system that the server has too
(it calls it `store.bulk_path`), or s3://bucket/prefix of the bucket that the server keeps its own data in. Each import
has a folder of its own there, which is removed when the import has ended; one that a killed writer left goes with the
first import after two days. Access to a bucket is told by the variables of the AWS tools (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL and so on), never by settings of ours.

What an import is not: it replaces nothing. A row whose key is there already is there twice afterwards. So

- only keys that the collection has not are imported; rows of others are upserted,
- an import that a killed writer left to the server is waited for before anybody looks for keys,
- nobody looks for keys before all imported rows are loaded: a server loads them some ten seconds after the import,
  unless it is told to,
- of two writers that import the same new images at the same time, the one that ends last is told.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np

from delf_milvus.errors import DatabaseError, UsageError
from delf_milvus.settings import StoreSettings
from delf_milvus.store.columns import Columns
from delf_milvus.store.connection import Connection
from delf_milvus.store.keys import Int64Array
from delf_milvus.store.profiles import Engine
from delf_milvus.store.schema import CollectionSpec

log = logging.getLogger(__name__)

_FAILED = (1, 7)
_COMPLETED = 6
_POLL_SECONDS = 0.1
_IN_FLIGHT = 2
"""Imports that a server has at once: one at work, one waiting, so that neither side idles nor the storage fills."""

_ABANDONED = timedelta(days=2)
_PREFIX = "delf-milvus-"
_PARQUET_FROM = (2, 4)
_PROBES = 1000
"""Keys of an import that are looked for before it counts as loaded, spread over its rows."""


class BulkImport:
    """Imports into one collection. Not safe for several threads: the store's write lock is held around it."""

    def __init__(self, database: Connection, name: str, settings: StoreSettings) -> None:
        self._db = database
        self._name = name
        self._settings = settings
        self._running: dict[int, str] = {}
        self._probes: list[Int64Array] = []
        self._primary = ""
        self._recovered = database.backend == "lite" or not database.plain
        self._storage: _Storage | None = None

    @property
    def enabled(self) -> bool:
        """Whether this backend and these settings allow imports."""
        return self._db.backend == "server" and self._db.plain and bool(self._settings.bulk_storage)

    def open_storage(self) -> None:
        """See, once, that the storage of imports can be used, if they are allowed. Raises UsageError."""
        if self.enabled and self._storage is None:
            storage = _Storage(self._settings)
            storage.listed()
            self._storage = storage

    def recover(self) -> None:
        """Wait, once, for imports that a killed writer may have left to the server, and load what they brought.

        Raises DatabaseError when they do not end in time.
        """
        if self._recovered:
            return
        tasks = []
        try:
            with self._db.asking("listing imports"):
                tasks = self._handler.list_bulk_insert_tasks(
                    0, self._name, timeout=self._settings.timeout, context=self._context
                )
        except DatabaseError as error:
            # An account that may not import may not list imports either, but then it has left none.
            if self.enabled:
                raise
            log.info("%s", error)
        deadline = time.monotonic() + self._settings.bulk_timeout
        for task in tasks:
            while self._state(task.task_id).state not in (*_FAILED, _COMPLETED):
                self._check(deadline, "an import that another writer began")
                time.sleep(_POLL_SECONDS)
        if tasks and self._unloaded():
            self._refresh()
        self.open_storage()
        if self._storage is not None:
            self._storage.tidy(self._prefix)
        self._recovered = True

    def start(self, spec: CollectionSpec, columns: Columns) -> None:
        """Write the rows to the storage and let the server import them; their keys must be new and in rising order.

        Returns while the server works. Raises UsageError for a storage that cannot be written, DatabaseError.
        """
        assert self._storage is not None, "recover comes first"
        while len(self._running) >= _IN_FLIGHT:
            self._wait()
        folder, paths = self._storage.put(self._prefix + uuid.uuid4().hex, spec, columns, self._as_parquet)
        try:
            with self._db.asking("starting an import"):
                task = self._handler.do_bulk_insert(
                    self._name, "", paths, timeout=self._settings.timeout, context=self._context
                )
        except DatabaseError:
            self._storage.remove(folder)
            raise
        self._running[int(task)] = folder
        self._primary = next(field.name for field in spec.fields if field.primary)
        keys = columns[self._primary]
        self._probes.append(np.append(keys[:: len(keys) // _PROBES + 1], keys[-1:]))

    def finish(self) -> None:
        """Wait until the rows of all imports that were started can be found.

        Raises DatabaseError when an import fails or does not end in time, or another writer imported the same keys.
        """
        if not self._probes:
            return
        while self._running:
            self._wait()
        self._refresh()
        deadline = time.monotonic() + self._settings.bulk_timeout
        for probes in self._probes:
            while not self._found(probes.tolist()):
                self._check(deadline, "loading of what it imported")
                time.sleep(_POLL_SECONDS)
        if any(self._counted(probes.tolist()) > len(probes) for probes in self._probes):
            raise DatabaseError(
                f"Somebody else wrote some of the same images to {self._name!r} at {self._db.where} at the same time, "
                "and their rows are there twice: run `delf-milvus fsck --repair`, then the same command again."
            )
        self._probes = []

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Around a write: one that fails leaves what the next has to recover from, as after a killed writer."""
        try:
            yield
        except BaseException:
            self._running, self._probes, self._recovered = {}, [], False
            raise

    @property
    def _prefix(self) -> str:
        return f"{_PREFIX}{self._name}-"

    @property
    def _as_parquet(self) -> bool:
        """Old servers read .npy files three times as fast; of new ones Parquet is the format that is cared for."""
        return Engine.of(self._db.version).release >= _PARQUET_FROM

    @property
    def _handler(self) -> Any:
        """What the client sends its calls through: the client itself has none for imports of files."""
        return self._db.client._get_connection()

    @property
    def _context(self) -> Any:
        return self._db.client._generate_call_context()

    def _state(self, task: int) -> Any:
        with self._db.asking("importing"):
            return self._handler.get_bulk_insert_state(task, timeout=self._settings.timeout, context=self._context)

    def _wait(self) -> None:
        """Until the oldest import has ended."""
        task, folder = next(iter(self._running.items()))
        deadline = time.monotonic() + self._settings.bulk_timeout
        while (state := self._state(task)).state not in (*_FAILED, _COMPLETED):
            self._check(deadline, "an import")
            time.sleep(_POLL_SECONDS)
        del self._running[task]
        assert self._storage is not None
        self._storage.remove(folder)
        if state.state in _FAILED:
            reason = str(state.failed_reason).splitlines()[0][:300].rstrip(". ") if state.failed_reason else "no reason"
            raise DatabaseError(
                f"The database at {self._db.where} could not import files of {self._settings.bulk_storage} ({reason}): "
                "check that store.bulk_path is the name that the server reads that storage by."
            )

    def _check(self, deadline: float, what: str) -> None:
        if time.monotonic() > deadline:
            raise DatabaseError(
                f"The database at {self._db.where} did not end {what} within store.bulk_timeout = "
                f"{self._settings.bulk_timeout:g} s; it may still be at work: run the same command again later."
            )

    def _refresh(self) -> None:
        with self._db.asking("loading what was imported"):
            self._db.client.refresh_load(self._name, timeout=self._settings.bulk_timeout)

    def _unloaded(self) -> bool:
        """Whether rows may be stored that cannot be found yet."""
        with self._db.asking("listing segments"):
            stored = self._db.client.list_persistent_segments(self._name, timeout=self._settings.timeout)
            loaded = self._db.client.list_loaded_segments(self._name, timeout=self._settings.timeout)
        return not {one.segment_id for one in stored} <= {one.segment_id for one in loaded}

    def _found(self, keys: list[int]) -> bool:
        with self._db.asking("looking for what was imported"):
            rows = self._db.client.get(
                self._name,
                ids=keys,
                output_fields=[self._primary],
                consistency_level="Strong",
                timeout=self._settings.timeout,
            )
        return {int(row[self._primary]) for row in rows} >= set(keys)

    def _counted(self, keys: list[int]) -> int:
        """Rows of these keys, all of them where one is there twice."""
        with self._db.asking("counting what was imported"):
            rows = self._db.client.query(
                self._name,
                filter=f"{self._primary} in {keys}",
                output_fields=["count(*)"],
                consistency_level="Strong",
                timeout=self._settings.timeout,
            )
        return int(rows[0]["count(*)"])


class _Storage:
    """Where column files wait for the server. Every failure is a UsageError: the settings name the place."""

    def __init__(self, settings: StoreSettings) -> None:
        import fsspec

        self._location = settings.bulk_storage
        try:
            self._files, self._root = fsspec.core.url_to_fs(self._location)
        except (ImportError, ValueError, OSError) as error:
            raise self._unusable(error) from None
        self._root = self._root.rstrip("/")
        # In a bucket folders need no making, and asking for one would make the bucket.
        self._local = "://" not in self._location
        inside = self._root if self._local else self._root.partition("/")[2]
        self._seen_as = (settings.bulk_path or inside).rstrip("/")

    def put(self, name: str, spec: CollectionSpec, columns: Columns, parquet: bool) -> tuple[str, list[str]]:
        """Write the rows into a new folder; returns it and the names that the server has for its files."""
        folder = f"{self._root}/{name}"
        names = ["rows.parquet"] if parquet else [f"{field.name}.npy" for field in spec.fields]
        try:
            if self._local:
                self._files.makedirs(folder, exist_ok=True)
            for one in names:
                with self._files.open(f"{folder}/{one}", "wb") as file:
                    if parquet:
                        _write_parquet(file, spec, columns)
                    else:
                        values = columns[one.removesuffix(".npy")]
                        np.save(file, values.astype(str) if values.dtype == object else values, allow_pickle=False)
        except Exception as error:
            self.remove(folder)
            raise self._unusable(error) from None
        return folder, [f"{self._seen_as}/{name}/{one}" if self._seen_as else f"{name}/{one}" for one in names]

    def remove(self, folder: str) -> None:
        """Remove a folder of ours; what cannot be removed is not worth a failure."""
        try:
            self._files.rm(folder, recursive=True)
        except Exception as error:
            log.info("%s stays: %s", folder, error)

    def listed(self) -> list[str]:
        """Paths of what is in it. Raises UsageError for a storage that cannot be used."""
        try:
            if self._local and not self._files.isdir(self._root):
                raise NotADirectoryError("there is no such folder")
            if self._local and not os.access(self._root, os.W_OK | os.X_OK):
                raise PermissionError("it cannot be written")
            self._files.invalidate_cache()
            if not self._files.exists(self._root):
                return []
            return [path.rstrip("/") for path in self._files.ls(self._root, detail=False)]
        except Exception as error:
            raise self._unusable(error) from None

    def tidy(self, prefix: str) -> None:
        """Remove what killed writers left long ago. Raises UsageError for a storage that cannot be used."""
        ours = [path for path in self.listed() if path.rpartition("/")[2].startswith(prefix)]
        try:
            for path in ours:
                newest = max((self._files.modified(file) for file in self._files.find(path)), default=None)
                if newest is None or datetime.now(timezone.utc) - newest.astimezone(timezone.utc) > _ABANDONED:
                    self.remove(path)
        except Exception as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> UsageError:
        reason = str(error).splitlines()[0].rstrip(". ") if str(error) else type(error).__name__
        hint = "install delf-milvus[s3]" if isinstance(error, ImportError) else "it must exist and be writable"
        return UsageError(f"store.bulk_storage {self._location!r} cannot be used ({reason}): {hint}.")


def _write_parquet(file: Any, spec: CollectionSpec, columns: Columns) -> None:
    from pyarrow import parquet

    from delf_milvus.store.tables import to_table

    parquet.write_table(to_table(spec, columns), file, compression="none", use_dictionary=False, write_statistics=False)
