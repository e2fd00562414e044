"""From scanned photos to feature files, for other pipelines, and for databases that are filled elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2

from delf_milvus.errors import InputError, one_line
from delf_milvus.featurefiles.folder import FeatureFolder
from delf_milvus.features import Features, Fingerprint, Float32Array
from delf_milvus.imaging.attention import attention_picture
from delf_milvus.imaging.decode import RgbImage, decode
from delf_milvus.imaging.draw import save_picture
from delf_milvus.ingestion.ahead import Ahead, PhotoExtraction, not_extracted, ready
from delf_milvus.ingestion.pipeline import Progress
from delf_milvus.ingestion.scan import Failure, Photo, Scan
from delf_milvus.settings import Settings

if TYPE_CHECKING:
    from delf_milvus.model.extractor import Extractor

log = logging.getLogger(__name__)


@dataclass
class ExtractReport:
    """What an extraction did; the fields of `--json`. skipped: photos whose features were there already. others: photos
    that belong to other shards. interrupted: ended by Ctrl-C."""

    extracted: int = 0
    skipped: int = 0
    others: int = 0
    failures: list[Failure] = field(default_factory=list)
    features: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return {**asdict(self), "seconds": round(self.seconds, 3), "failed": len(self.failures)}


class AttentionPictures:
    """Writes an attention picture of photos by their ids: `id.jpg` in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path_of(self, image_id: str) -> Path:
        """The file that a photo's picture is in."""
        return self._folder / f"{image_id}.jpg"

    def has(self, image_id: str) -> bool:
        """Whether a photo's picture is there."""
        return self.path_of(image_id).is_file()

    def write(
        self, image_id: str, photo: RgbImage, features: Features, attention: Float32Array, fingerprint: Fingerprint
    ) -> None:
        """Write a photo's picture: its features, and the attention map, (h, w), that they were selected from.

        Raises InputError where that is impossible.
        """
        selected = "attention" if fingerprint.selection == "attention" else f"{fingerprint.selection}, for attention"
        caption = f"{one_line(image_id)}: {len(features)} features, each as wide as its cell; {selected} of all cells"
        picture = attention_picture(photo, features, attention, cell=fingerprint.stride, caption=caption)
        save_picture(self.path_of(image_id), picture)


def extract_photos(
    scanned: Scan,
    folder: FeatureFolder | None,
    load_extractor: Callable[[], Extractor],
    settings: Settings,
    *,
    pictures: AttentionPictures | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> ExtractReport:
    """Write the features of each photo, at most `stored_features` of them, unless they are there already, and where
    `pictures` are asked for its attention picture.

    folder: None writes pictures alone. A photo that fails is listed and stops nothing else. Raises InputError for a
    place that cannot be written, UsageError for one with features of another model.
    """
    started = time.monotonic()
    report = ExtractReport(failures=list(scanned.failures), others=scanned.others)
    run = _Run(folder, pictures, load_extractor, settings, report)
    extract = PhotoExtraction(load_extractor)
    done = 0
    with Ahead(run.decoded, scanned.photos, settings.ingest) as ahead:
        try:
            taken = iter(ahead)
            while group := list(islice(taken, extract.at_once)):
                run.take(group, extract)
                ahead.widen(extract.at_once)
                done += len(group)
                if progress is not None:
                    seconds = time.monotonic() - started
                    progress(Progress(done, len(scanned.photos), report.extracted, len(report.failures), seconds))
        except KeyboardInterrupt:
            report.interrupted = True
    report.seconds = time.monotonic() - started
    return report


@dataclass(frozen=True)
class _Run:
    """What happens to each photo, and the counts of it. Arguments as of `extract_photos`."""

    folder: FeatureFolder | None
    pictures: AttentionPictures | None
    load_extractor: Callable[[], Extractor]
    settings: Settings
    report: ExtractReport

    def decoded(self, photo: Photo) -> RgbImage | None:
        """A photo's pixels; None where all that is wanted of it is there. Raises InputError."""
        return decode(photo.path, self.settings.decode) if self._lacks(photo) or self._undrawn(photo) else None

    def take(self, group: Sequence[tuple[Photo, Future[RgbImage | None]]], extract: PhotoExtraction) -> None:
        """Extract and write photos."""
        plain: list[tuple[Photo, RgbImage]] = []
        for photo, future in group:
            pixels = ready(future)
            if isinstance(pixels, InputError):
                self._fail(photo, pixels)
            elif pixels is None:
                self.report.skipped += 1
            elif self._undrawn(photo):
                self._draw(photo, pixels)
            else:
                plain.append((photo, pixels))
        found = extract([(str(photo.path), pixels) for photo, pixels in plain]) if plain else []
        for (photo, _), features in zip(plain, found, strict=True):
            if isinstance(features, InputError):
                self._fail(photo, features)
            else:
                self._write(photo, features)

    def _lacks(self, photo: Photo) -> bool:
        return self.folder is not None and not self.folder.has(photo.image_id)

    def _undrawn(self, photo: Photo) -> bool:
        return self.pictures is not None and not self.pictures.has(photo.image_id)

    def _draw(self, photo: Photo, pixels: RgbImage) -> None:
        """Extract and write a photo with its picture."""
        assert self.pictures is not None
        extractor = self.load_extractor()
        try:
            # The map comes with the same pass of the network.
            features, attention = extractor.attended(pixels, extractor.plan.stored_features)
        except (ValueError, RuntimeError, MemoryError, cv2.error) as error:
            log.info("extraction failed", exc_info=error)
            self._fail(photo, not_extracted(str(photo.path), error))
            return
        self._write(photo, features)
        self.pictures.write(photo.image_id, pixels, features, attention, extractor.fingerprint)

    def _write(self, photo: Photo, features: Features) -> None:
        if self.folder is not None and self._lacks(photo):
            self.folder.write(photo.image_id, features)
        self.report.extracted += 1
        self.report.features += len(features)

    def _fail(self, photo: Photo, error: InputError) -> None:
        self.report.failures.append(Failure(str(photo.path), str(error)))
