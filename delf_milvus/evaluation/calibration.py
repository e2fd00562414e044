"""Calibrating confidence: what evidence do photos reach that have no match?

Photos come in class folders, and two photos of different classes show different things. Every second class takes
part; the others stay out, so that they can judge the result. The classes that take part form two halves: each half
queries a collection made of the other one, filled up with further photos to a realistic size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from delf_milvus.errors import InputError
from delf_milvus.evaluation.memory import MemoryCollection
from delf_milvus.features import Features
from delf_milvus.ingestion.scan import scan
from delf_milvus.matcher import PhotoMatcher
from delf_milvus.retrieval.confidence import Calibration
from delf_milvus.retrieval.matching import match
from delf_milvus.retrieval.search import Timings, judge_candidates, keypoints
from delf_milvus.retrieval.verification import verify_many
from delf_milvus.settings import Settings

Say = Callable[[str], None]


@dataclass(frozen=True)
class CalibrationConfig:
    """How to calibrate.

    data: folder of class folders, no thing in two of them. fill: folders of further unrelated photos.
    size: images of a collection. pairs: random pairs drawn for each query. seed: of that draw.
    """

    data: Path
    fill: tuple[Path, ...] = ()
    size: int = 1000
    pairs: int = 3
    seed: int = 0


def class_photos(root: Path) -> list[list[Path]]:
    """The photos of each class folder, in the order of their names; raises InputError where there are too few."""
    by_class: dict[str, list[Path]] = {}
    for photo in scan([root]).photos:
        parts = photo.path.relative_to(photo.root).parts
        if len(parts) > 1:
            by_class.setdefault(parts[0], []).append(photo.path)
    if len(by_class) < 4:
        raise InputError(f"{root} has {len(by_class)} folders of photos; a calibration needs at least 4, one a class.")
    return [by_class[name] for name in sorted(by_class)]


def judging_photos(root: Path) -> list[Path]:
    """The photos of the classes that `calibrate` leaves out."""
    return [path for photos in class_photos(root)[1::2] for path in photos]


def calibrate(config: CalibrationConfig, settings: Settings, say: Say = print) -> Calibration:
    """Measure the evidence of queries without a match, and of unrelated pairs.

    Raises InputError for folders with too few photos.
    """
    matcher = PhotoMatcher(settings)
    plan = matcher.extractor.plan
    count = max(plan.stored_features, plan.query_features)

    def extracted(paths: list[Path]) -> list[Features]:
        return [matcher.extractor.extract(matcher.decode(path), count) for path in paths]

    classes = class_photos(config.data)
    halves = [extracted([path for photos in classes[start::4] for path in photos]) for start in (0, 2)]
    others = [photo.path for root in config.fill for photo in scan([root]).photos]
    missing = max(0, config.size - min(len(half) for half in halves))
    filling = extracted(others[:missing])
    say(f"{len(halves[0])} and {len(halves[1])} photos in two halves, {len(filling)} more")
    random = np.random.default_rng(config.seed)
    searches: list[npt.NDArray[np.int64]] = []
    pairs: list[int] = []
    for queries, half in (halves, halves[::-1]):
        stored = [features.top(plan.stored_features) for features in (half + filling)[: config.size]]
        collection = MemoryCollection([str(number) for number in range(len(stored))], stored)
        for number, photo in enumerate(queries, 1):
            query = photo.top(plan.query_features)
            judged = judge_candidates(query, collection, settings.search, settings.verify, Timings())
            searches.append(judged.inliers)
            drawn = [stored[i] for i in random.integers(0, len(stored), config.pairs)]
            pairs += pair_inliers(query, drawn, settings)
            if number % 200 == 0:
                say(f"{number} of {len(queries)} queries")
    try:
        return Calibration.fit(searches, pairs)
    except ValueError as error:
        raise InputError(f"{config.data} has too few photos: {error}.") from error


def pair_inliers(query: Features, images: list[Features], settings: Settings) -> list[int]:
    """The inliers of single pairs."""
    verify = settings.verify
    matches = [match(query.descriptors, image.descriptors, verify.similarity) for image in images]
    found = verify_many(
        keypoints(query),
        [keypoints(image) for image in images],
        matches,
        residual=verify.residual,
        min_inliers=verify.min_inliers,
    )
    return [verification.inliers for verification in found]
