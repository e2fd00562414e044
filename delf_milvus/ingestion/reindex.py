"""A collection for another model, beside the one in use: extracted again from the stored places of its photos.

1. Passes over the old generation fill the new one: an image whose stored content hash is in the new one already is
   left alone, so that a second run after a crash goes on where the first one ended, and a later pass takes what was
   ingested, changed or deleted meanwhile. Ids, roots, metadata and times of ingest are kept.
2. The index is built, and passes follow until one finds nothing to do.
3. The alias is switched; a last look takes the images that came to the old one at that very moment. Whoever has the
   old one open can read it on, but no longer write to it.

An image whose photo is gone, or cannot be read, has no features of the new model, unless those of the same content are
there from an earlier run: nothing is switched, unless asked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delf_milvus.errors import one_line
from delf_milvus.features import Fingerprint
from delf_milvus.imaging import remote
from delf_milvus.ingestion.pipeline import Progress, ingest_photos
from delf_milvus.ingestion.scan import Failure, Photo, Scan
from delf_milvus.settings import Settings
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.records import ImageRecord

if TYPE_CHECKING:
    from delf_milvus.model.extractor import Extractor

_PAGE = 1000
_PASSES = 10
"""Passes before the switch at most, where somebody ingests all the time: the last one takes the rest."""


@dataclass
class ReindexReport:
    """What a rebuild did; the fields of `--json`.

    generation: the one that is filled; previous: the one it replaces. extracted: images extracted in this run; images:
    in the new generation. removed: images that were deleted from the old one meanwhile. missing: photos that are gone
    or cannot be read. switched: whether the new generation is the current one. dropped: old generations dropped.
    interrupted: ended by Ctrl-C.
    """

    generation: str
    previous: str
    extracted: int = 0
    images: int = 0
    removed: int = 0
    missing: list[Failure] = field(default_factory=list)
    switched: bool = False
    dropped: list[str] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}


def reindex(
    old: FeatureStore,
    new: FeatureStore,
    load_extractor: Callable[[], Extractor],
    fingerprint: Fingerprint,
    settings: Settings,
    *,
    allow_missing: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> ReindexReport:
    """Fill `new`, a store that `old.rebuilt` gave, from the photos of `old`, and make it the current generation.

    allow_missing: switch without the images whose photo is gone or cannot be read. Raises DatabaseError,
    CollectionError.
    """
    started = time.monotonic()
    report = ReindexReport(new.generation, old.generation)
    skipping = settings.model_copy(update={"ingest": settings.ingest.model_copy(update={"on_error": "skip"})})
    run = _Run(old, new, load_extractor, fingerprint, skipping, report, progress, started)
    run.fill()
    if not report.interrupted:
        new.ensure_index()
        for _ in range(_PASSES):
            if not run.fill() or report.interrupted:
                break
    if not report.interrupted and (allow_missing or not report.missing):
        # Without any image there are no collections yet, which the alias could stand for.
        new.create()
        new.become_current()
        report.switched = True
        run.take_late()
        new.ensure_index()
    report.images = new.count_images()
    report.seconds = time.monotonic() - started
    return report


@dataclass
class _Run:
    """One rebuild."""

    old: FeatureStore
    new: FeatureStore
    load_extractor: Callable[[], Extractor]
    fingerprint: Fingerprint
    settings: Settings
    report: ReindexReport
    progress: Callable[[Progress], None] | None
    started: float

    seen: set[int] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)

    def fill(self) -> int:
        """One pass; the number of images it changed in the new generation."""
        self.report.missing = []
        self.seen.clear()
        total, changed = self.old.count_images(), 0
        for old, new in self._tenants():
            for page in _pages(old):
                known = new.records([record.image_id for record in page])
                wanted = [r for r in page if r.image_id not in known or known[r.image_id].sha256 != r.sha256]
                changed += self._ingest(new, wanted, total)
                if self.report.interrupted:
                    return changed
                # An earlier run has left another version of a photo that nobody can read any more.
                new.delete([image_id for image_id in self.unread if image_id in known])
                changed += _described(new, page)
                self.seen.update(record.key for record in page)
                self._tell(len(self.seen), total)
            for page in _pages(new):
                kept = old.records([record.image_id for record in page])
                removed = new.delete([r.image_id for r in page if r.image_id not in kept])
                self.report.removed += len(removed)
                changed += len(removed)
        return changed

    def take_late(self) -> None:
        """Images that came to the old generation since the last pass. Others write to the new one by now: nothing else
        of it may be changed."""
        for old, new in self._tenants():
            for page in _pages(old):
                late = [record for record in page if record.key not in self.seen]
                known = new.records([record.image_id for record in late])
                self._ingest(new, [record for record in late if record.image_id not in known], len(self.seen))

    def _tenants(self) -> Iterator[tuple[FeatureStore, FeatureStore]]:
        """Both stores as each tenant's in turn, also of one who has left the old generation; as they are without."""
        for tenant in sorted({*self.old.tenants(), *self.new.tenants()} - {""}) or [""]:
            yield self.old.of_tenant(tenant), self.new.of_tenant(tenant)

    def _photo(self, record: ImageRecord) -> Photo | None:
        """Where to read an image again; None, and noted, where that is not possible."""
        base = record.root if remote.is_address(record.root) else ""
        path = remote.below(base, record.uri) if base else record.uri
        # Whether a photo behind an address is there is seen when it is read.
        if path and (base or os.path.isfile(path)):
            root = Path() if base else Path(record.root)
            return Photo(Path(path), record.image_id, root, dict(record.metadata), record.ingested_at, base=base)
        place = f"its photo is not at {one_line(record.uri)}" if record.uri else "it was stored without a file"
        self.report.missing.append(Failure(record.uri, f"{one_line(record.image_id)}: {place}."))
        return None

    def _ingest(self, new: FeatureStore, wanted: list[ImageRecord], total: int) -> int:
        """Extract and store these images; how many of them changed anything. `unread` has the others' ids."""
        photos = {record.image_id: photo for record in wanted if (photo := self._photo(record))}
        self.unread = [record.image_id for record in wanted if record.image_id not in photos]
        if not photos:
            return 0

        def tell(inner: Progress) -> None:
            self._tell(len(self.seen) + inner.done, total, self.report.extracted + inner.extracted)

        done_now = ingest_photos(
            Scan(list(photos.values()), [], []),
            new,
            self.load_extractor,
            self.fingerprint,
            self.settings,
            progress=tell,
        )
        changed = done_now.added + done_now.updated
        self.report.extracted += changed
        self.report.missing += done_now.failures
        failed = {failure.path for failure in done_now.failures}
        self.unread += [image_id for image_id, photo in photos.items() if photo.place in failed]
        self.report.interrupted = done_now.interrupted
        return changed

    def _tell(self, done: int, total: int, extracted: int | None = None) -> None:
        if self.progress is not None:
            seconds = time.monotonic() - self.started
            ready = self.report.extracted if extracted is None else extracted
            self.progress(Progress(done, max(total, done), ready, len(self.report.missing), seconds))


def _described(new: FeatureStore, page: list[ImageRecord]) -> int:
    """Bring over what was said anew of images without a change of the photo; how many there were."""
    known = new.records([record.image_id for record in page])
    said = [
        record
        for record in page
        if record.image_id in known and _description(known[record.image_id]) != _description(record)
    ]
    new.describe(said)
    return len(said)


def _description(record: ImageRecord) -> tuple[str, str, dict[str, Any]]:
    return record.uri, record.root, dict(record.metadata)


def _pages(store: FeatureStore) -> Iterator[list[ImageRecord]]:
    page: list[ImageRecord] = []
    for record in store.list():
        page.append(record)
        if len(page) == _PAGE:
            yield page
            page = []
    if page:
        yield page
