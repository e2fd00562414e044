"""From scanned photos to feature files, for other pipelines, and for databases that are filled elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2

from delf_milvus.errors import InputError, one_line
from delf_milvus.featurefiles.folder import FeatureFolder
from delf_milvus.features import Features, Fingerprint, Float32Array
from delf_milvus.imaging.attention import attention_picture
from delf_milvus.imaging.decode import RgbImage, decode
from delf_milvus.imaging.draw import save_picture
from delf_milvus.ingestion.pipeline import Progress
from delf_milvus.ingestion.scan import Failure, Scan
from delf_milvus.settings import Settings

if TYPE_CHECKING:
    from delf_milvus.model.extractor import Extractor

log = logging.getLogger(__name__)


@dataclass
class ExtractReport:
    """What an extraction did; the fields of `--json`. skipped: photos whose features were there already. interrupted:
    ended by Ctrl-C."""

    extracted: int = 0
    skipped: int = 0
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
    report = ExtractReport(failures=list(scanned.failures))
    try:
        for done, photo in enumerate(scanned.photos, 1):
            kept = folder is None or folder.has(photo.image_id)
            drawn = pictures is None or pictures.has(photo.image_id)
            if kept and drawn:
                report.skipped += 1
            else:
                extractor = load_extractor()
                try:
                    pixels = decode(photo.path, settings.decode)
                    # The map comes with the same pass of the network, and is not made for nothing.
                    features, attention = (
                        (extractor.extract(pixels, extractor.plan.stored_features), None)
                        if drawn
                        else extractor.attended(pixels, extractor.plan.stored_features)
                    )
                except InputError as error:
                    report.failures.append(Failure(str(photo.path), str(error)))
                except (ValueError, RuntimeError, MemoryError, cv2.error) as error:
                    log.info("extraction failed", exc_info=error)
                    reason = one_line(str(error).partition("\n")[0] or type(error).__name__)
                    text = f"{one_line(photo.path)} cannot be extracted: {reason}."
                    report.failures.append(Failure(str(photo.path), text))
                else:
                    if folder is not None and not kept:
                        folder.write(photo.image_id, features)
                    if pictures is not None and attention is not None:
                        pictures.write(photo.image_id, pixels, features, attention, extractor.fingerprint)
                    report.extracted += 1
                    report.features += len(features)
            if progress is not None:
                seconds = time.monotonic() - started
                progress(Progress(done, len(scanned.photos), report.extracted, len(report.failures), seconds))
    except KeyboardInterrupt:
        report.interrupted = True
    report.seconds = time.monotonic() - started
    return report
