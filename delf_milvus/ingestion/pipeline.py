"""From scanned files to stored rows: read and decode in threads, extract here, write in a thread of its own.

The files are photos here; `precomputed` feeds the same pipeline with features that were made elsewhere. Reading,
decoding and extracting are an engine's: `Here` is this process, `distributed` a Ray cluster each of whose workers has a
`Here` of its own. What becomes of the outcomes, and every write, is decided in this process whichever engine it is.

- At most `queue` decoded photos wait for the network (on a GPU: and 64 more) and at most three batches for the
  database: memory does not grow with the folder, only with the size of its photos (three bytes a pixel). Where the
  server imports files, a batch of new images is what makes one import, or comes in half a minute.
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
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from delf_milvus.errors import InputError, one_line
from delf_milvus.features import Features, Fingerprint
from delf_milvus.imaging import remote
from delf_milvus.imaging.decode import RgbImage, content_digest, decode
from delf_milvus.ingestion.ahead import Ahead, PhotoExtraction, ready
from delf_milvus.ingestion.scan import Failure, Photo, Scan
from delf_milvus.settings import IngestSettings, Settings
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.records import ImageRecord

if TYPE_CHECKING:
    from delf_milvus.model.extractor import Extractor

log = logging.getLogger(__name__)

SPARSE = 10
"""Features below which an image can hardly be verified: such images are stored, and said."""

_BATCH, _BEHIND = 16, 256
"""Images of a write, at least, and at most while the database is behind."""

_GATHERED_SECONDS = 30.0
"""That new images wait at most for others to be imported with."""

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
class Work:
    """A file to look at.

    record: as it would be stored, but for the content's hash; or why it cannot be. stored: what the collection has of
    this id, if anything.
    """

    photo: Photo
    record: ImageRecord | InputError
    stored: ImageRecord | None

    def described(self, sha256: str) -> ImageRecord:
        """The record with the content's hash; raises InputError where it cannot be stored."""
        if isinstance(self.record, InputError):
            raise self.record
        return replace(self.record, sha256=sha256)


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


@dataclass(frozen=True)
class Outcome:
    """A file after extraction.

    kept: the same content is stored already. features: None of what is kept, and in a dry run. The others as of
    `Prepared`.
    """

    record: ImageRecord
    features: Features | None
    is_update: bool
    kept: bool
    moved: bool = False


Outcomes = Generator[tuple[Photo, Outcome | InputError], None, None]
"""Files with their outcomes, or why they failed. Whoever does not take all of them closes it."""


class Engine(Protocol):
    """Reads files and extracts their features. The outcomes may come in any order."""

    def __call__(self, works: Iterable[Work], /) -> Outcomes: ...


class Extraction(Protocol[T_contra]):
    """Makes features of the content of files, given each with its place; InputError for one that fails."""

    @property
    def at_once(self) -> int:
        """How many files to give at a time."""

    def __call__(self, contents: Sequence[tuple[str, T_contra]], /) -> list[Features | InputError]: ...


@dataclass(frozen=True)
class Here(Generic[T]):
    """The engine that this process is: `prepare` a file in a thread, `extract` its features in the calling one.

    `prepare` may raise InputError, which fails that file. dry_run: nothing is extracted. The outcomes come in the order
    of the files; where the settings say that the first failure stops a run, nothing behind it is extracted.
    """

    prepare: Callable[[Work], Prepared[T]]
    extract: Extraction[T]
    settings: IngestSettings
    dry_run: bool = False

    def __call__(self, works: Iterable[Work], /) -> Outcomes:
        """See `Engine`."""
        with Ahead(self.prepare, works, self.settings) as ahead:
            taken = iter(ahead)
            while group := list(islice(taken, self.extract.at_once)):
                yield from self._outcomes(group)
                ahead.widen(self.extract.at_once)

    def _outcomes(self, group: Sequence[tuple[Work, Future[Prepared[T]]]]) -> Outcomes:
        items: list[tuple[Photo, Prepared[T] | InputError]] = []
        for work, future in group:
            item = ready(future)
            items.append((work.photo, item))
            if isinstance(item, InputError) and self.settings.on_error == "stop":
                break
        wanted = [
            (item.record.uri, item.content)
            for _, item in items
            if isinstance(item, Prepared) and item.content is not None and not self.dry_run
        ]
        extracted = iter(self.extract(wanted) if wanted else [])
        for photo, item in items:
            if isinstance(item, InputError):
                yield photo, item
                continue
            kept = item.content is None
            features = None if kept or self.dry_run else next(extracted)
            if isinstance(features, InputError):
                yield photo, features
            else:
                yield photo, Outcome(item.record, features, item.is_update, kept, item.moved)


def photos_here(
    load_extractor: Callable[[], Extractor], fingerprint: Fingerprint, settings: Settings, *, dry_run: bool = False
) -> Here[RgbImage]:
    """The engine for photos. load_extractor: called when a photo needs extraction. fingerprint: of that extractor."""

    def prepare(work: Work) -> Prepared[RgbImage]:
        photo = work.photo
        data = photo.read(settings.decode)
        record = work.described(content_digest(data))
        return prepared(record, work.stored, fingerprint, _is_there, lambda: decode(data, settings.decode, photo.place))

    return Here(prepare, PhotoExtraction(load_extractor), settings.ingest, dry_run)


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
    """Store the scanned photos, extracted in this process; the report counts what happened to each.

    load_extractor: called when a photo needs extraction.

    Raises DatabaseError when the database fails.
    """
    engine = photos_here(load_extractor, fingerprint, settings, dry_run=dry_run)
    return ingest_files(scanned, store, engine, settings, dry_run=dry_run, progress=progress)


def ingest_files(
    scanned: Scan,
    store: FeatureStore,
    engine: Engine,
    settings: Settings,
    *,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> IngestReport:
    """The pipeline: what the engine makes of the scanned files is written, in batches.

    Raises DatabaseError when the database fails, and what the engine raises.
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
    failed: list[tuple[str, Failure]] = []
    writer = _Writer(store)
    run = _Run(report, writer)

    def tell(done: int) -> None:
        if progress is not None:
            seconds = time.monotonic() - started
            number = report.failed + len(failed)
            progress(Progress(done, len(scanned.photos), extracted, number, seconds))

    def work(photo: Photo) -> Work:
        stored = known.get(photo.image_id)
        if photo.image_id in lost and not photo.metadata:
            photo = replace(photo, metadata=lost[photo.image_id])
        try:
            return Work(photo, store.typed(described(photo, "", stored)), stored)
        except InputError as error:
            return Work(photo, error, stored)

    with closing(engine(map(work, scanned.photos))) as outcomes, writer:
        try:
            tell(0)
            for done, (photo, outcome) in enumerate(outcomes, start=1):
                if isinstance(outcome, InputError):
                    failed.append((photo.image_id, Failure(photo.place, str(outcome))))
                    report.stopped = stop_at_failure
                else:
                    run.take(outcome)
                    extracted += not outcome.kept
                tell(done)
                if report.stopped:
                    break
        except KeyboardInterrupt:
            report.interrupted = True
    # An engine may be ready with some before others; a report is in the order of the ids.
    report.failures += [failure for _, failure in sorted(failed, key=lambda one: one[0])]
    report.sparse.sort()
    if not dry_run:
        store.describe(run.moved)
    report.seconds = time.monotonic() - started
    log.info("ingested %d photos, %.1f extracted a second", len(scanned.photos), extracted / max(report.seconds, 1e-9))
    return report


@dataclass
class _Run:
    """What is done about each outcome, and the counts of it."""

    report: IngestReport
    writer: _Writer
    moved: list[ImageRecord] = field(default_factory=list)

    def take(self, outcome: Outcome) -> None:
        """Hand an image over to be written, or note that it is there."""
        report = self.report
        if outcome.kept:
            report.unchanged += not outcome.moved
            report.updated += outcome.moved
            if outcome.moved:
                self.moved.append(outcome.record)
            return
        if outcome.features is not None:
            self.writer.put(outcome.record, outcome.features, is_update=outcome.is_update)
            report.features += len(outcome.features)
            if len(outcome.features) < SPARSE:
                report.sparse.append(outcome.record.image_id)
        report.updated += outcome.is_update
        report.added += not outcome.is_update


def gone(store: FeatureStore, scanned: Scan, failures: list[Failure]) -> list[str]:
    """Ids of the stored images of the scanned folders whose file has left the disk, or the storage behind an address.

    What lies under a folder that could not be read is not gone: nobody looked. Raises InputError where an address
    cannot be read.
    """
    unread = [Path(failure.path) for failure in failures]
    missing = []
    for base in scanned.addresses:
        there = set(remote.files(base))
        missing += [record.image_id for record in store.list(root=base) if record.uri not in there]
    for root in scanned.roots:
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
        root=photo.origin,
        metadata=dict(metadata),
        ingested_at=photo.ingested_at,
    )


def prepared(
    record: ImageRecord,
    stored: ImageRecord | None,
    fingerprint: Fingerprint,
    is_there: Callable[[ImageRecord], bool],
    load: Callable[[], T],
) -> Prepared[T]:
    """What to do about a file with this record: load it unless the same content is stored already.

    is_there: whether the file of a stored record exists. Raises InputError where the id is that of another file, and
    what `is_there` and `load` raise.
    """
    if stored is None:
        return Prepared(record, load(), False)
    if stored.sha256 == record.sha256 and stored.model == fingerprint.short:
        # A copy of the photo elsewhere is no move while the stored one is still in its place.
        left = stored.uri != record.uri and not is_there(stored)
        return Prepared(record, None, True, left or dict(stored.metadata) != dict(record.metadata))
    if stored.root != record.root and stored.uri != record.uri and is_there(stored):
        raise InputError(
            f"{one_line(record.uri)}: the id {record.image_id!r} belongs to another photo, {one_line(stored.uri)}; "
            "give this folder an --id-prefix of its own."
        )
    return Prepared(record, load(), True)


def _is_there(record: ImageRecord) -> bool:
    if not remote.is_address(record.root):
        return os.path.isfile(record.uri)
    try:
        return remote.exists(record.uri)
    except InputError as error:
        reason = str(error).rstrip(".")
        raise InputError(
            f"Whether the stored photo of the id {record.image_id!r} is gone cannot be told ({reason}): "
            "make it readable, give these photos an --id-prefix of their own, or delete the image."
        ) from None


class _Writer:
    """Writes batches in a thread of its own; an error there surfaces at the next `put` and at the end.

    A batch of new images grows while the database is behind, since many together take less. Where the server imports
    files, they are gathered until they are enough for an import; not for long, for a kill loses what was gathered.
    Those that replace others are written a few at a time, for they do not exist meanwhile.
    """

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._enough = store.imports_from()
        self._queue: queue.Queue[list[tuple[ImageRecord, Features]] | None]
        self._queue = queue.Queue(maxsize=2 if self._enough is None else 1)
        self._new: list[tuple[ImageRecord, Features]] = []
        self._changed: list[tuple[ImageRecord, Features]] = []
        self._rows = 0
        self._since = 0.0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write", daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def put(self, record: ImageRecord, features: Features, *, is_update: bool) -> None:
        """Hand over one image; blocks while the database is far behind."""
        if self._error is not None:
            raise self._error
        if is_update:
            self._changed.append((record, features))
            if len(self._changed) >= _BATCH:
                self._hand_over_changed()
            return
        if not self._new:
            self._since = time.monotonic()
        self._new.append((record, features))
        self._rows += self._store.rows_of(len(features))
        if self._is_enough():
            self._hand_over_new()

    def _is_enough(self) -> bool:
        if self._enough is not None:
            return self._rows >= self._enough or time.monotonic() - self._since >= _GATHERED_SECONDS
        return len(self._new) >= (_BEHIND if self._queue.full() else _BATCH)

    def _hand_over_new(self) -> None:
        if self._new:
            self._queue.put(self._new)
            self._new, self._rows = [], 0

    def _hand_over_changed(self) -> None:
        if self._changed:
            self._queue.put(self._changed)
            self._changed = []

    def _run(self) -> None:
        while (batch := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._store.write(batch)
                except BaseException as error:  # carried over to the thread that asked for it
                    self._error = error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._hand_over_changed()
        self._hand_over_new()
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error
