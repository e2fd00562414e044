"""The answers to a query: which judged candidates are shown, in which order, and what is said of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from delf_milvus.features import Box, Features
from delf_milvus.retrieval.confidence import Calibration
from delf_milvus.retrieval.homography import refined
from delf_milvus.retrieval.matching import Matches
from delf_milvus.retrieval.regions import bounds, regions
from delf_milvus.retrieval.search import (
    CandidateSource,
    Judgement,
    Timings,
    judge_candidates,
    keypoints,
)
from delf_milvus.retrieval.second_look import agreed, looked_twice, widened
from delf_milvus.retrieval.verification import Verification, matched_box
from delf_milvus.settings import SearchSettings, VerifySettings

Transform = list[list[float]]


@dataclass(frozen=True)
class Named:
    """What is said of a stored image that was not compared."""

    image_id: str
    uri: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


class AnswerSource(CandidateSource, Protocol):
    """A source that can also name images without fetching their features."""

    def named(self, image_keys: npt.NDArray[np.int64]) -> dict[int, Named]:
        """The stored images of these keys; an image that is not there is left out."""


@dataclass(frozen=True, eq=False)
class Correspondence:
    """The inliers of a verified match, for drawing and for geometry.

    query_points, image_points: (N, 2) float32 pixels. residuals: (N,) float32 pixels of the image.
    """

    query_points: npt.NDArray[np.float32]
    image_points: npt.NDArray[np.float32]
    residuals: npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Hit:
    """One answer.

    verified: the evidence passes the bar. compared: whether it was matched and verified; images beyond the candidates
    were not. inliers: matches that one affine transform explains, counted by place;
    putatives: matches before geometry. confidence: probability that it shows the same thing, if half of all queries
    have a match. false_alarm: share of queries without a match whose best answer has at least this evidence; the bar is
    set on it. score: what orders the hits. transform: query pixels to image pixels,
    [[a, b, tx], [c, d, ty]]. homography: a finer transform, 3 x 3, where one was asked for and fits better. box:
    x0, y0, x1, y1 of the matched region in the image; query_box: of the inliers in the query. region: which of the
    things that the query shows, counted from 1; 0 if not verified. metadata: what the image carries.
    """

    rank: int
    image_id: str
    uri: str
    verified: bool
    compared: bool
    inliers: int
    putatives: int
    confidence: float
    false_alarm: float
    score: float
    transform: Transform | None
    homography: Transform | None
    box: Box | None
    query_box: Box | None
    region: int
    correspondence: Correspondence = field(repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        names = (
            "rank",
            "image_id",
            "uri",
            "verified",
            "compared",
            "inliers",
            "putatives",
            "confidence",
            "false_alarm",
            "score",
        )
        return {name: getattr(self, name) for name in (*names, "transform", "homography", "region")} | {
            "box": None if self.box is None else list(self.box),
            "query_box": None if self.query_box is None else list(self.query_box),
            "metadata": dict(self.metadata),
        }


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The answer to one query: the verified hits in falling score, or none.

    query: what was searched for. model: fingerprint of the model, shortened. matched: whether any hit is verified.
    query_features: how many features the query had. calibrated: whether confidence and false_alarm were measured with
    features of this model; else they are a rough guide.
    """

    query: str
    model: str
    matched: bool
    hits: list[Hit]
    timings: Timings
    query_features: int
    calibrated: bool

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return {
            "query": self.query,
            "model": self.model,
            "matched": self.matched,
            "query_features": self.query_features,
            "calibrated": self.calibrated,
            "hits": [hit.to_dict() for hit in self.hits],
            "timings": {name: round(seconds, 6) for name, seconds in asdict(self.timings).items()},
        }


def answer(
    query: Features,
    source: AnswerSource,
    search: SearchSettings,
    verify: VerifySettings,
    calibration: Calibration,
    timings: Timings,
    *,
    query_box: Box,
    include_unverified: bool = False,
) -> list[Hit]:
    """The hits of a query, verified ones first by score; with `include_unverified` the other candidates after them, and
    then the images that were not compared.

    query_box: the part of the query photo that was searched for, x0, y0, x1, y1.
    """
    judged = judge_candidates(query, source, search, verify, timings)
    wide = widened(query, judged, search, calibration, query_box)
    if wide is not None:
        second = judge_candidates(wide, source, search, verify, timings)
        judged = looked_twice(query, judged, second, verify, timings)
    judged = agreed(judged, search, verify, calibration, timings)
    hits = hits_of(
        query, judged, search, verify, calibration, query_box=query_box, include_unverified=include_unverified
    )
    late = late_keys(judged, search, hits, include_unverified)
    if len(late):
        with timings.measure("geometry"):
            hits += late_hits(judged, source.named(late), search, hits)
    return hits


def hits_of(
    query: Features,
    judged: Judgement,
    search: SearchSettings,
    verify: VerifySettings,
    calibration: Calibration,
    *,
    query_box: Box,
    include_unverified: bool = False,
) -> list[Hit]:
    """The hits among judged candidates; arguments and order as of `answer`."""
    confidence, false_alarm = calibration.assess(judged.evidence)
    verified = false_alarm <= verify.max_false_alarm
    region_of = verified_regions(query, judged, verified, search.per_region)
    order = list(region_of)
    if include_unverified:
        order += [i for i in range(len(verified)) if not verified[i]]
    hits = []
    for rank, i in enumerate(order[: search.top], 1):
        candidate, verification, matches = judged.candidates[i], judged.verifications[i], judged.matches[i]
        transform = verification.transform
        inliers = correspondence(query, candidate.features, matches, verification)
        homography = None
        if verify.homography and verified[i]:
            sides = keypoints(query), keypoints(candidate.features)
            homography = refined(*sides, matches, verification, verify.residual)
        hits.append(
            Hit(
                rank,
                candidate.image_id,
                candidate.uri,
                bool(verified[i]),
                True,
                verification.inliers,
                len(matches.query),
                float(confidence[i]),
                float(false_alarm[i]),
                float(judged.scores[i]),
                None if transform is None else transform.tolist(),
                None if homography is None else homography.tolist(),
                region(query_box, candidate.features, verification, inliers),
                bounds(inliers.query_points),
                region_of.get(i, 0),
                inliers,
                candidate.metadata,
            )
        )
    return hits


def late_keys(
    judged: Judgement, search: SearchSettings, hits: list[Hit], include_unverified: bool
) -> npt.NDArray[np.int64]:
    """Keys of the images without verification that may follow these hits."""
    wanted = search.top if include_unverified and len(hits) < search.top else 0
    return judged.rest[:wanted]


def late_hits(judged: Judgement, named: Mapping[int, Named], search: SearchSettings, hits: list[Hit]) -> list[Hit]:
    """The hits that were not compared, after those that were verified or tried. named: images of `late_keys`."""
    known = {candidate.image_id for candidate in judged.candidates}
    none = np.empty((0, 2), np.float32)
    rest = [
        (named[key], score)
        for key, score in zip(judged.rest.tolist(), judged.rest_scores.tolist(), strict=True)
        if key in named and named[key].image_id not in known
    ]
    return [
        Hit(
            rank,
            image.image_id,
            image.uri,
            verified=False,
            compared=False,
            inliers=0,
            putatives=0,
            confidence=0.0,
            false_alarm=1.0,
            score=score,
            transform=None,
            homography=None,
            box=None,
            query_box=None,
            region=0,
            correspondence=Correspondence(none, none, np.empty(0, np.float32)),
            metadata=image.metadata,
        )
        for rank, (image, score) in enumerate(rest[: search.top - len(hits)], len(hits) + 1)
    ]


def verified_regions(
    query: Features, judged: Judgement, verified: npt.NDArray[np.bool_], per_region: int
) -> dict[int, int]:
    """The region of each verified candidate (see `regions`), by its row, best first; of each region the first
    `per_region`, or all for 0."""
    rows = np.flatnonzero(verified).tolist()
    places = [query.locations[judged.matches[i].query[judged.verifications[i].mask]] for i in rows]
    seen: Counter[int] = Counter()
    kept = {}
    for i, number in zip(rows, regions(places, (query.width, query.height)), strict=True):
        seen[number] += 1
        if not per_region or seen[number] <= per_region:
            kept[i] = number
    return kept


def correspondence(query: Features, image: Features, matches: Matches, verification: Verification) -> Correspondence:
    """The inliers of a verified pair."""
    mask = verification.mask
    return Correspondence(
        query.locations[matches.query[mask]],
        image.locations[matches.candidate[mask]],
        verification.residuals[mask],
    )


def region(query_box: Box, image: Features, verification: Verification, inliers: Correspondence) -> Box | None:
    """The matched region of the image; None without a transform."""
    if verification.transform is None:
        return None
    return matched_box(verification.transform, query_box, (image.width, image.height), inliers.image_points)
