"""From scanned photos to stored rows: read and decode in threads, extract here, write in a thread of its own.

- At most `queue` decoded photos wait for the network and at most two batches for the database: memory does not grow
  with the folder, only with the size of its photos (three bytes a pixel).
- A photo with the stored content hash and the same model is not decoded at all.
- A photo that fails is listed and stops nothing else. A database that fails stops the run: what was written stays.
- Ctrl-C stops reading, writes what is extracted, and returns; running the same call again goes on from there.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2

from delf_milvus.errors import InputError, one_line
from delf_milvus.features import Features, Fingerprint
from delf_milvus.imaging.decode import RgbImage, content_digest, decode, read_bytes
from delf_milvus.ingestion.scan import Failure, Photo, Scan
from delf_milvus.settings import Settings
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.records import ImageRecord

if TYPE_CHECKING:
    from delf_milvus.model.extractor import Extractor

log = logging.getLogger(__name__)

SPARSE = 10
"""Features below which an image can hardly be verified: such images are stored, and said."""

_BATCH = 16


@dataclass
class IngestReport:
    """What an ingest did; the fields of `--json`.

    sparse: ids of images that are stored but have too few features to be found reliably.
    interrupted: ended by Ctrl-C. stopped: ended at the first failure, as the settings ask.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: int = 0
    failures: list[Failure] = field(default_factory=list)
    sparse: list[str] = field(default_factory=list)
    features: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    stopped: bool = False

    @property
    def failed(self) -> int:
        """Number of photos that failed."""
        return len(self.failures)

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return {
            "added": self.added,
            "updated": self.updated,
            "unchanged": self.unchanged,
            "removed": self.removed,
            "failed": self.failed,
            "failures": [asdict(failure) for failure in self.failures],
            "sparse": self.sparse,
            "features": self.features,
            "seconds": round(self.seconds, 3),
            "interrupted": self.interrupted,
            "stopped": self.stopped,
        }


@dataclass(frozen=True)
class Progress:
    """How far an ingest is."""

    done: int
    total: int
    extracted: int
    failed: int
    seconds: float


@dataclass(frozen=True)
class _Prepared:
    """A photo after reading.

    pixels: None when the same content is stored already. moved: whether the stored record names another place or other
    metadata than `record`.
    """

    record: ImageRecord
    pixels: RgbImage | None
    is_update: bool
    moved: bool = False


def ingest_photos(
    scanned: Scan,
    store: FeatureStore,
    load_extractor: Callable[[], Extractor],
    fingerprint: Fingerprint,
    settings: Settings,
    *,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> IngestReport:
    """Store the scanned photos; the report counts what happened to each.

    load_extractor: called when a photo needs extraction.

    Raises DatabaseError when the database fails.
    """
    started = time.monotonic()
    report = IngestReport(failures=list(scanned.failures))
    known = store.records([photo.image_id for photo in scanned.photos])
    stop_at_failure = settings.ingest.on_error == "stop"
    if stop_at_failure and report.failures:
        report.stopped = True
        return report
    extracted = 0
    writer = _Writer(store)
    run = _Run(report, writer, load_extractor, dry_run)

    def tell(done: int) -> None:
        if progress is not None:
            seconds = time.monotonic() - started
            progress(Progress(done, len(scanned.photos), extracted, report.failed, seconds))

    def prepare(photo: Photo) -> _Prepared:
        return _prepare(photo, store, known.get(photo.image_id), fingerprint, settings)

    with ThreadPoolExecutor(settings.ingest.decode_threads, "decode") as pool, writer:
        prepared = _ahead(pool, prepare, scanned.photos, settings.ingest.queue)
        try:
            tell(0)
            for done, (photo, future) in enumerate(zip(scanned.photos, prepared, strict=True), 1):
                try:
                    extracted += run.take(future.result())
                except InputError as error:
                    report.failures.append(Failure(str(photo.path), str(error)))
                    if stop_at_failure:
                        report.stopped = True
                        break
                tell(done)
        except KeyboardInterrupt:
            report.interrupted = True
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if not dry_run:
        store.describe(run.moved)
    report.seconds = time.monotonic() - started
    log.info("ingested %d photos, %.1f extracted a second", len(scanned.photos), extracted / max(report.seconds, 1e-9))
    return report


@dataclass
class _Run:
    """What happens to each prepared photo, and the counts of it."""

    report: IngestReport
    writer: _Writer
    load_extractor: Callable[[], Extractor]
    dry_run: bool
    moved: list[ImageRecord] = field(default_factory=list)

    def take(self, item: _Prepared) -> bool:
        """Extract and hand over a photo; whether it needed extraction. Raises InputError."""
        report = self.report
        if item.pixels is None:
            report.unchanged += not item.moved
            report.updated += item.moved
            if item.moved:
                self.moved.append(item.record)
            return False
        if not self.dry_run:
            features = self._extract(item.record, item.pixels)
            self.writer.put(item.record, features)
            report.features += len(features)
            if len(features) < SPARSE:
                report.sparse.append(item.record.image_id)
        report.updated += item.is_update
        report.added += not item.is_update
        return True

    def _extract(self, record: ImageRecord, pixels: RgbImage) -> Features:
        extractor = self.load_extractor()
        try:
            return extractor.extract(pixels, extractor.plan.stored_features)
        except (ValueError, RuntimeError, MemoryError, cv2.error) as error:
            # One photo that exhausts memory or breaks a kernel must not end a run over a million others.
            log.info("extraction failed", exc_info=error)
            reason = one_line(str(error).partition("\n")[0] or type(error).__name__)
            raise InputError(f"{one_line(record.uri)} cannot be extracted: {reason}.") from error


def gone(store: FeatureStore, roots: list[Path], failures: list[Failure]) -> list[str]:
    """Ids of the stored images of these roots whose file has left the disk.

    What lies under a folder that could not be read is not gone: nobody looked.
    """
    unread = [Path(failure.path) for failure in failures]
    missing = []
    for root in roots:
        for record in store.list(root=str(root)):
            path = Path(record.uri)
            if not os.path.lexists(path) and not any(folder in path.parents for folder in unread):
                missing.append(record.image_id)
    return missing


def _ahead(
    pool: ThreadPoolExecutor, prepare: Callable[[Photo], _Prepared], photos: Sequence[Photo], window: int
) -> Iterator[Future[_Prepared]]:
    """The preparations of the photos, in order, with at most `window` of them submitted and not yet taken."""
    waiting: deque[Future[_Prepared]] = deque()
    for photo in photos:
        waiting.append(pool.submit(prepare, photo))
        if len(waiting) >= window:
            yield waiting.popleft()
    yield from waiting


def _prepare(
    photo: Photo, store: FeatureStore, stored: ImageRecord | None, fingerprint: Fingerprint, settings: Settings
) -> _Prepared:
    data = read_bytes(photo.path, settings.decode)
    metadata = photo.metadata or (stored.metadata if stored is not None else {})
    record = store.typed(
        ImageRecord(
            image_id=photo.image_id,
            uri=str(photo.path),
            sha256=content_digest(data),
            root=str(photo.root) if photo.root.is_absolute() else "",
            metadata=dict(metadata),
            ingested_at=photo.ingested_at,
        )
    )
    if stored is None:
        return _Prepared(record, decode(data, settings.decode, str(photo.path)), False)
    elsewhere = Path(stored.uri)
    if stored.sha256 == record.sha256 and stored.model == fingerprint.short:
        # A copy of the photo elsewhere is no move while the stored one is still in its place.
        left = stored.uri != record.uri and not elsewhere.is_file()
        return _Prepared(record, None, True, left or dict(stored.metadata) != dict(record.metadata))
    if stored.root != record.root and elsewhere != photo.path and elsewhere.is_file():
        raise InputError(
            f"{one_line(photo.path)}: the id {photo.image_id!r} belongs to another photo, {one_line(elsewhere)}; "
            "give this folder an --id-prefix of its own."
        )
    return _Prepared(record, decode(data, settings.decode, str(photo.path)), True)


class _Writer:
    """Writes batches in a thread of its own; an error there surfaces at the next `put` and at the end."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._queue: queue.Queue[list[tuple[ImageRecord, Features]] | None] = queue.Queue(maxsize=2)
        self._batch: list[tuple[ImageRecord, Features]] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write", daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def put(self, record: ImageRecord, features: Features) -> None:
        """Hand over one image; blocks while the database is behind."""
        if self._error is not None:
            raise self._error
        self._batch.append((record, features))
        if len(self._batch) >= _BATCH:
            self._queue.put(self._batch)
            self._batch = []

    def _run(self) -> None:
        while (batch := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._store.write(batch)
                except BaseException as error:  # carried over to the thread that asked for it
                    self._error = error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._batch:
            self._queue.put(self._batch)
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error
