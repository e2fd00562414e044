"""Calibrating confidence: what evidence do photos reach that have no match, and what those that have one?

Photos without a match come in class folders, and two photos of different classes show different things; classes whose
names begin with the same word ("crocodile", "crocodile_head") may share photos and count as one. Every second class
takes part; the others stay out, so that they can judge the result. The classes that take part form two halves: each
half queries a collection made of the other one, filled up with further photos to a realistic size.

Photos with a match come in folders of one place or thing each. They are in both collections and query them twice: as
they are, where their own photo does not count, and changed as another view of the very same thing may be, where it
does. So hard and easy matches have half of the weight each. With them the evidence is weighed anew; without, the
weights stay those of the bundled model, and only what photos without a match reach is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from delf_milvus.errors import InputError, one_line
from delf_milvus.evaluation.memory import MemoryCollection
from delf_milvus.features import Features
from delf_milvus.imaging.decode import RgbImage
from delf_milvus.ingestion.scan import scan
from delf_milvus.matcher import PhotoMatcher
from delf_milvus.model.spec import BUNDLED
from delf_milvus.retrieval.confidence import Calibration, chance_levels, fit_scorer, with_levels
from delf_milvus.retrieval.evidence import INLIERS, evidence
from delf_milvus.retrieval.matching import match
from delf_milvus.retrieval.search import Timings, judge_candidates, keypoints
from delf_milvus.retrieval.verification import verify_many
from delf_milvus.settings import Settings
from delf_milvus.training.watching import tell

Say = Callable[[str], None]
Floats = npt.NDArray[np.float64]

LEAST = 100
"""Photos without a match below which nothing can be said about one false alarm in a hundred."""

_WRONG_A_QUERY = 6
_RIGHT_A_QUERY = 2
"""Candidates of a query that the weights are fitted to, those with the most inliers: what must be told apart."""

_LEAST_INLIERS = 8
"""Inliers of a candidate of the same place below which it most likely shows another side of it."""


@dataclass(frozen=True)
class CalibrationConfig:
    """How to calibrate.

    data: folder of class folders, no thing in two of them. fill: folders of further unrelated photos, no thing on two
    of them. matches: folder of folders, each of one place or thing, or None. exclude: names of folders in `data` and
    `matches` to leave out. size: images of a collection, without those of `matches`. pairs: random pairs drawn for each
    query. seed: of that draw.
    """

    data: Path
    fill: tuple[Path, ...] = ()
    matches: Path | None = None
    exclude: frozenset[str] = frozenset()
    size: int = 1000
    pairs: int = 3
    seed: int = 0


class Shown(NamedTuple):
    """Features of one photo, and what it shows: two photos of different things have different names here."""

    thing: str
    features: Features


@dataclass
class _Sample:
    """Evidence, (N, columns) each: of all wrong candidates of each search without a match; of the candidates of
    searches with one, and which of them are right; of random pairs of either kind."""

    without: list[Floats] = field(default_factory=list)
    found: list[tuple[Floats, npt.NDArray[np.bool_]]] = field(default_factory=list)
    unrelated: list[Floats] = field(default_factory=list)
    related: list[Floats] = field(default_factory=list)


def class_photos(root: Path) -> list[list[Path]]:
    """The photos of each class folder, in the order of their names; raises InputError where there are too few."""
    by_class = _classes(root)
    return [by_class[name] for name in sorted(by_class)]


def judging_photos(root: Path) -> list[Path]:
    """The photos of the classes that `calibrate` leaves out."""
    return [path for photos in class_photos(root)[1::2] for path in photos]


def calibrate(config: CalibrationConfig, settings: Settings, say: Say = print) -> Calibration:
    """Extract the photos and measure their evidence.

    Raises InputError for folders with too few photos, before any of them is extracted.
    """
    classes = _classes(config.data)
    named = [[name for name in sorted(classes)[start::4] if name not in config.exclude] for start in (0, 2)]
    asking = [sum(len(classes[name]) for name in half) for half in named]
    if min(asking) < 1 or sum(asking) < LEAST:
        raise InputError(
            f"{one_line(config.data)} has too few photos: {sum(asking)} of {len(named[0]) + len(named[1])} classes "
            f"take part, and a calibration needs {LEAST}, some in each of two halves."
        )
    others = [photo.path for root in config.fill for photo in scan([root]).photos]
    folders = {} if config.matches is None else _folders(config.matches)
    places = [(name, path) for name in sorted(folders) if name not in config.exclude for path in folders[name]]
    if config.matches is not None and not places:
        raise InputError(f"{one_line(config.matches)} has no folders of photos, one a place or thing, that take part.")
    matcher = PhotoMatcher(settings)
    plan = matcher.extractor.plan
    count = max(plan.stored_features, plan.query_features)

    def shown(thing: str, path: Path) -> Shown:
        return Shown(thing, matcher.extractor.extract(matcher.decode(path), count))

    halves = [[shown(family(name), path) for name in half for path in classes[name]] for half in named]
    missing = max(0, config.size - min(len(half) for half in halves))
    filling = [shown(str(path), path) for path in others[:missing]]
    matching = [shown(name, path) for name, path in places]
    random = np.random.default_rng(config.seed)
    changed = [
        Shown(name, matcher.extractor.extract(another_view(matcher.decode(path), random), count))
        for name, path in places
    ]
    say(f"{len(halves[0])} and {len(halves[1])} photos in two halves, {len(filling)} more, {len(matching)} that match")
    return fit(halves, filling, matching, changed, config, settings, say)


def another_view(photo: RgbImage, random: np.random.Generator) -> RgbImage:
    """The photo seen from elsewhere, nearer or farther, cropped, darker or brighter, blurred, and compressed."""
    height, width = photo.shape[:2]
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float32)
    turned = cv2.getRotationMatrix2D((width / 2, height / 2), random.uniform(-15, 15), random.uniform(0.6, 1.3))
    moved = np.column_stack([corners, np.ones(4)]) @ turned.T + random.uniform(-0.12, 0.12, (4, 2)) * (width, height)
    transform = cv2.getPerspectiveTransform(corners, moved.astype(np.float32))
    view = cv2.warpPerspective(photo, transform, (width, height), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT)
    share = random.uniform(0.5, 1.0)
    wide, high = max(1, int(width * share)), max(1, int(height * share))
    left, top = random.integers(0, width - wide + 1), random.integers(0, height - high + 1)
    view = view[top : top + high, left : left + wide]
    view = (255 * (view / 255.0) ** random.uniform(0.6, 1.6)).clip(0, 255).astype(np.uint8)
    if random.random() < 0.4:
        view = cv2.GaussianBlur(view, (0, 0), random.uniform(0.5, 1.8))
    _, coded = cv2.imencode(".jpg", view, [cv2.IMWRITE_JPEG_QUALITY, int(random.integers(15, 90))])
    return np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)


def family(name: str) -> str:
    """What the photos of a class show: the first word of its folder's name."""
    return name.partition("_")[0]


def fit(
    halves: Sequence[Sequence[Shown]],
    filling: Sequence[Shown],
    matching: Sequence[Shown],
    changed: Sequence[Shown],
    config: CalibrationConfig,
    settings: Settings,
    say: Say = print,
) -> Calibration:
    """Measure the evidence of photos whose features are known; arguments as `calibrate` makes them.

    Raises InputError for too few photos.
    """
    plan = settings.extract.plan
    random = np.random.default_rng(config.seed)
    sample = _Sample()
    for queries, half in (halves, halves[::-1]):
        crowd = [*half, *filling][: config.size]
        stored = [Shown(one.thing, one.features.top(plan.stored_features)) for one in [*crowd, *matching]]
        collection = MemoryCollection([str(number) for number in range(len(stored))], [one.features for one in stored])
        asking: list[tuple[Shown, int | None]] = [(one, None) for one in queries]
        asking += [(one, len(crowd) + number) for number, one in enumerate(matching)]
        asking += [(one, -1) for one in changed]
        for number, (one, own) in enumerate(asking, 1):
            query = one.features.top(plan.query_features)
            judged = judge_candidates(query, collection, settings.search, settings.verify, Timings())
            numbers = np.array([int(candidate.image_id) for candidate in judged.candidates], np.intp)
            right = np.array([stored[i].thing == one.thing for i in numbers], np.bool_)
            if own is None:
                sample.without.append(judged.evidence[~right])
            else:
                kept = numbers != own
                sample.found.append((judged.evidence[kept], right[kept]))
                same = [i for i, other in enumerate(stored) if other.thing == one.thing and i != own]
                some = [same[i] for i in random.permutation(len(same))[: config.pairs]]
                sample.related.append(pair_evidence(query, [stored[i].features for i in some], settings))
            others = [i for i in random.integers(0, len(crowd), config.pairs) if crowd[i].thing != one.thing]
            sample.unrelated.append(pair_evidence(query, [stored[i].features for i in others], settings))
            tell(say, "calibration", number, len(asking), "queries")
            if number % 200 == 0:
                say(f"{number} of {len(asking)} queries")
    try:
        if not matching:
            return Calibration.read(BUNDLED.with_suffix(".calibration.json")).refitted(
                sample.without, np.concatenate(sample.unrelated)
            )
        return _fitted(sample)
    except ValueError as error:
        raise InputError(f"{config.data} has too few photos: {error}.") from error


def _fitted(sample: _Sample) -> Calibration:
    chance = chance_levels(sample.without)
    wrong = [columns[columns[:, INLIERS] > 0] for one in sample.without for columns in [with_levels(one, chance)]]
    found = [(with_levels(one, chance), right) for one, right in sample.found if len(one)]
    answers = fit_scorer(
        np.concatenate([_most(one[right & (one[:, INLIERS] >= np.log1p(_LEAST_INLIERS))], _RIGHT_A_QUERY)
                        for one, right in found]),
        np.concatenate([_most(one, _WRONG_A_QUERY) for one in wrong]
                       + [_most(one[~right], _WRONG_A_QUERY) for one, right in found]),
        wrong,
        [one[right] for one, right in found],
    )  # fmt: skip
    related, unrelated = np.concatenate(sample.related), np.concatenate(sample.unrelated)
    some = related[related[:, INLIERS] >= np.log1p(_LEAST_INLIERS)]
    pairs = fit_scorer(some, unrelated, [one[None] for one in unrelated], [one[None] for one in some])
    return Calibration(chance, answers, pairs)


def _most(columns: Floats, count: int) -> Floats:
    """The rows with the most inliers."""
    return columns[np.argsort(-columns[:, INLIERS], kind="stable")[:count]]


def pair_evidence(query: Features, images: Sequence[Features], settings: Settings) -> Floats:
    """The evidence of a query with each image, compared on their own: (N, columns)."""
    verify = settings.verify
    matches = [match(query.descriptors, image.descriptors, verify.similarity) for image in images]
    found = verify_many(
        keypoints(query),
        [keypoints(image) for image in images],
        matches,
        residual=verify.residual,
        min_inliers=verify.min_inliers,
    )
    return evidence(keypoints(query), matches, found)


def _classes(root: Path) -> dict[str, list[Path]]:
    by_class = _folders(root)
    if len(by_class) < 4:
        raise InputError(f"{root} has {len(by_class)} folders of photos; a calibration needs at least 4, one a class.")
    return by_class


def _folders(root: Path) -> dict[str, list[Path]]:
    """The photos below each folder in `root`."""
    found: dict[str, list[Path]] = {}
    for photo in scan([root]).photos:
        parts = photo.path.relative_to(photo.root).parts
        if len(parts) > 1:
            found.setdefault(parts[0], []).append(photo.path)
    return found
