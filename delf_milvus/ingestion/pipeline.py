"""From scanned files to stored rows: read and decode in threads, extract here, write in a thread of its own.

The files are photos here; `precomputed` feeds the same pipeline with features that were made elsewhere.

- At most `queue` decoded photos wait for the network (on a GPU: and 64 more) and at most two batches for the database:
  memory does not grow with the folder, only with the size of its photos (three bytes a pixel).
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from delf_milvus.errors import InputError, one_line
from delf_milvus.features import Features, Fingerprint
from delf_milvus.imaging.decode import RgbImage, content_digest, decode, read_bytes
from delf_milvus.ingestion.ahead import Ahead, PhotoExtraction, ready
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

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


@dataclass
class IngestReport:
    """What an ingest did; the fields of `--json`.

    others: photos of these folders that belong to other shards.
    sparse: ids of images that are stored but have too few features to be found reliably.
    interrupted: ended by Ctrl-C. stopped: ended at the first failure, as the settings ask.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: int = 0
    others: int = 0
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
            "others": self.others,
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
class Prepared(Generic[T]):
    """A file after reading.

    content: what features are made of; None when the same is stored already. moved: whether the stored record names
    another place or other metadata than `record`.
    """

    record: ImageRecord
    content: T | None
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

    def prepare(photo: Photo, stored: ImageRecord | None) -> Prepared[RgbImage]:
        data = read_bytes(photo.path, settings.decode)
        record = store.typed(described(photo, content_digest(data), stored))
        return prepared(
            record, stored, fingerprint, os.path.isfile, lambda: decode(data, settings.decode, str(photo.path))
        )

    return ingest_files(
        scanned, store, prepare, PhotoExtraction(load_extractor), settings, dry_run=dry_run, progress=progress
    )


class Extraction(Protocol[T_contra]):
    """Makes features of the content of files, given each with its place; InputError for one that fails."""

    @property
    def at_once(self) -> int:
        """How many files to give at a time."""

    def __call__(self, contents: Sequence[tuple[str, T_contra]], /) -> list[Features | InputError]: ...


def ingest_files(
    scanned: Scan,
    store: FeatureStore,
    prepare: Callable[[Photo, ImageRecord | None], Prepared[T]],
    extract: Extraction[T],
    settings: Settings,
    *,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> IngestReport:
    """The pipeline: `prepare` a file, whose stored record is given, in a thread, `extract` its features in this one.

    `prepare` may raise InputError, which fails that file. Raises DatabaseError when the database fails.
    """
    started = time.monotonic()
    report = IngestReport(failures=list(scanned.failures), others=scanned.others)
    known = store.records([photo.image_id for photo in scanned.photos])
    # Their rows are gone, and with them what was said of them, if a writer was killed.
    lost = store.interrupted([photo.image_id for photo in scanned.photos if photo.image_id not in known])
    stop_at_failure = settings.ingest.on_error == "stop"
    if stop_at_failure and report.failures:
        report.stopped = True
        return report
    extracted = 0
    writer = _Writer(store)
    run = _Run(report, writer, extract, dry_run)

    def tell(done: int) -> None:
        if progress is not None:
            seconds = time.monotonic() - started
            progress(Progress(done, len(scanned.photos), extracted, report.failed, seconds))

    def looked_up(photo: Photo) -> Prepared[T]:
        if photo.image_id in lost and not photo.metadata:
            photo = replace(photo, metadata=lost[photo.image_id])
        return prepare(photo, known.get(photo.image_id))

    done = 0
    with Ahead(looked_up, scanned.photos, settings.ingest) as ahead, writer:
        try:
            tell(0)
            taken = iter(ahead)
            while not report.stopped and (group := list(islice(taken, extract.at_once))):
                for photo, outcome in run.take(group, stop_at_failure):
                    if isinstance(outcome, InputError):
                        report.failures.append(Failure(photo.place, str(outcome)))
                        report.stopped = stop_at_failure
                    else:
                        extracted += outcome
                    done += 1
                    tell(done)
                ahead.widen(extract.at_once)
        except KeyboardInterrupt:
            report.interrupted = True
    if not dry_run:
        store.describe(run.moved)
    report.seconds = time.monotonic() - started
    log.info("ingested %d photos, %.1f extracted a second", len(scanned.photos), extracted / max(report.seconds, 1e-9))
    return report


@dataclass
class _Run(Generic[T]):
    """What happens to each prepared file, and the counts of it."""

    report: IngestReport
    writer: _Writer
    extract: Extraction[T]
    dry_run: bool
    moved: list[ImageRecord] = field(default_factory=list)

    def take(
        self, group: Sequence[tuple[Photo, Future[Prepared[T]]]], stop_at_failure: bool
    ) -> Iterator[tuple[Photo, bool | InputError]]:
        """Extract and hand over files: whether each needed extraction, or why it failed.

        stop_at_failure: nothing behind the first file that fails is handed over.
        """
        outcomes: list[tuple[Photo, Prepared[T] | InputError]] = []
        for photo, future in group:
            outcome = ready(future)
            outcomes.append((photo, outcome))
            if stop_at_failure and isinstance(outcome, InputError):
                break
        wanted = [
            (item.record.uri, item.content)
            for _, item in outcomes
            if isinstance(item, Prepared) and item.content is not None and not self.dry_run
        ]
        extracted = iter(self.extract(wanted) if wanted else [])
        for photo, item in outcomes:
            if isinstance(item, InputError):
                yield photo, item
                continue
            if item.content is None:
                self._keep(item)
                yield photo, False
                continue
            features = None if self.dry_run else next(extracted)
            if isinstance(features, InputError):
                yield photo, features
                if stop_at_failure:
                    return
                continue
            self._put(item, features)
            yield photo, True

    def _keep(self, item: Prepared[T]) -> None:
        self.report.unchanged += not item.moved
        self.report.updated += item.moved
        if item.moved:
            self.moved.append(item.record)

    def _put(self, item: Prepared[T], features: Features | None) -> None:
        """features: None in a dry run."""
        report = self.report
        if features is not None:
            self.writer.put(item.record, features)
            report.features += len(features)
            if len(features) < SPARSE:
                report.sparse.append(item.record.image_id)
        report.updated += item.is_update
        report.added += not item.is_update


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


def described(photo: Photo, sha256: str, stored: ImageRecord | None) -> ImageRecord:
    """The record of a file; without metadata of its own it keeps what is stored."""
    metadata = photo.metadata or (stored.metadata if stored is not None else {})
    return ImageRecord(
        image_id=photo.image_id,
        uri=photo.place,
        sha256=sha256,
        root=str(photo.root) if photo.root.is_absolute() else "",
        metadata=dict(metadata),
        ingested_at=photo.ingested_at,
    )


def prepared(
    record: ImageRecord,
    stored: ImageRecord | None,
    fingerprint: Fingerprint,
    is_there: Callable[[str], bool],
    load: Callable[[], T],
) -> Prepared[T]:
    """What to do about a file with this record: load it unless the same content is stored already.

    is_there: whether the file of a uri exists. Raises InputError where the id is that of another file, and what `load`
    raises.
    """
    if stored is None:
        return Prepared(record, load(), False)
    if stored.sha256 == record.sha256 and stored.model == fingerprint.short:
        # A copy of the photo elsewhere is no move while the stored one is still in its place.
        left = stored.uri != record.uri and not is_there(stored.uri)
        return Prepared(record, None, True, left or dict(stored.metadata) != dict(record.metadata))
    if stored.root != record.root and stored.uri != record.uri and is_there(stored.uri):
        raise InputError(
            f"{one_line(record.uri)}: the id {record.image_id!r} belongs to another photo, {one_line(stored.uri)}; "
            "give this folder an --id-prefix of its own."
        )
    return Prepared(record, load(), True)


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
