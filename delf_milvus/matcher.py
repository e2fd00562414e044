"""Photos without a database: extraction, and the comparison of two photos."""

from __future__ import annotations

import functools
import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from delf_milvus.features import Box, Features, Fingerprint
from delf_milvus.imaging.decode import RgbImage, Source, decode
from delf_milvus.imaging.draw import match_picture, save_picture
from delf_milvus.model.spec import BUNDLED, fingerprint_of, resolve
from delf_milvus.retrieval.answers import Correspondence, Transform, correspondence, region
from delf_milvus.retrieval.confidence import Calibration
from delf_milvus.retrieval.evidence import evidence
from delf_milvus.retrieval.matching import match
from delf_milvus.retrieval.search import keypoints
from delf_milvus.retrieval.verification import verify_many
from delf_milvus.settings import Settings

if TYPE_CHECKING:
    from delf_milvus.model.extractor import Extractor


log = logging.getLogger(__name__)

CALIBRATION_SUFFIX = ".calibration.json"


@dataclass(frozen=True, eq=False)
class PairResult:
    """What two photos have in common.

    matched: the evidence passes the bar. inliers, putatives, transform, box: as of a search's hit, with the first photo
    as the query. confidence: probability that they show the same thing, if half of all pairs do. false_alarm: share of
    unrelated pairs with at least this evidence.
    """

    matched: bool
    inliers: int
    putatives: int
    confidence: float
    false_alarm: float
    transform: Transform | None
    box: Box | None
    seconds: float
    correspondence: Correspondence = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        names = ("matched", "inliers", "putatives", "confidence", "false_alarm", "transform")
        return {name: getattr(self, name) for name in names} | {
            "box": None if self.box is None else list(self.box),
            "seconds": round(self.seconds, 6),
        }


class PhotoMatcher:
    """A model, its calibration and the settings of extraction and verification; safe to use from several threads.

    The network is loaded on first use.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._extractor: Extractor | None = None
        self._calibration: Calibration | None = None

    @property
    def extractor(self) -> Extractor:
        """The extractor; raises ModelError when the weight file cannot be used."""
        with self._lock:
            if self._extractor is None:
                from delf_milvus.model.extractor import Extractor

                self._extractor = Extractor(self.settings.model, self.settings.extract)
            return self._extractor

    @property
    def calibration(self) -> Calibration:
        """That of the settings, or the one beside the weight file, or the bundled model's for a model that has none.

        Raises ModelError when it cannot be read.
        """
        if self._calibration is None:
            if own := self.settings.verify.calibration:
                self._calibration = Calibration.read(Path(own))
                return self._calibration
            path = resolve(self.settings.model)
            beside, bundled = (model.with_suffix(CALIBRATION_SUFFIX) for model in (path, BUNDLED))
            if not beside.is_file():
                log.warning("%s has no calibration; confidence is that of the bundled model", path)
            self._calibration = Calibration.read(beside if beside.is_file() else bundled)
        return self._calibration

    @property
    def calibrated(self) -> bool:
        """Whether `calibration` was measured with this model, or given by the settings."""
        path = resolve(self.settings.model)
        return bool(self.settings.verify.calibration) or path.with_suffix(CALIBRATION_SUFFIX).is_file()

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """What identifies the features that this matcher extracts; raises ModelError as `extractor` does."""
        return fingerprint_of(resolve(self.settings.model), self.settings.extract)

    def decode(self, source: Source, name: str | None = None) -> RgbImage:
        """A photo as (H, W, 3) uint8 RGB; raises ImageError."""
        return decode(source, self.settings.decode, name)

    def query_features(self, photo: RgbImage, box: Box | None = None) -> Features:
        """The features of a query photo, or of the part of it inside `box`."""
        return self.extractor.extract(photo, self.extractor.plan.query_features, box)

    def match(self, first: Source, second: Source) -> PairResult:
        """Compare two photos; raises ImageError when one of them cannot be decoded."""
        started = time.perf_counter()
        photos = [self.decode(source) for source in (first, second)]
        query, image = (self.query_features(photo) for photo in photos)
        verify = self.settings.verify
        matches = match(query.descriptors, image.descriptors, verify.similarity)
        (verification,) = verify_many(
            keypoints(query),
            [keypoints(image)],
            [matches],
            residual=verify.residual,
            min_inliers=verify.min_inliers,
        )
        assessed = self.calibration.assess_pairs(evidence(keypoints(query), [matches], [verification]))
        false_alarm = float(assessed.false_alarm[0])
        inliers = correspondence(query, image, matches, verification)
        return PairResult(
            matched=false_alarm <= verify.max_false_alarm,
            inliers=verification.inliers,
            putatives=len(matches.query),
            confidence=float(assessed.confidence[0]),
            false_alarm=false_alarm,
            transform=None if verification.transform is None else verification.transform.tolist(),
            box=region((0, 0, query.width, query.height), image, verification, inliers),
            seconds=time.perf_counter() - started,
            correspondence=inliers,
        )

    def draw(self, first: Source, second: Source, pair: PairResult, out: Path) -> None:
        """Write a picture of a pair with its inliers; raises UsageError for an unknown suffix."""
        verdict = "match" if pair.matched else "no match"
        picture = match_picture(
            self.decode(first),
            self.decode(second),
            pair.correspondence.query_points,
            pair.correspondence.image_points,
            residuals=pair.correspondence.residuals,
            transform=None if pair.transform is None else np.array(pair.transform),
            caption=f"{verdict}: {pair.inliers} inliers of {pair.putatives}, confidence {pair.confidence:.4f}",
        )
        save_picture(out, picture)
