"""The search of one query photo: vote, fetch, match, verify, rank, judge.

The database is behind two calls (`CandidateSource`), so that the same search runs over Milvus, over arrays in memory
and over whatever a test needs. Who must wait for the database otherwise, calls the stages between: `vote`, `judge` and
`hits_of`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from delf_milvus.features import Box, Features
from delf_milvus.retrieval.confidence import Calibration
from delf_milvus.retrieval.evidence import evidence
from delf_milvus.retrieval.expansion import expanded
from delf_milvus.retrieval.homography import refined
from delf_milvus.retrieval.matching import Matches, match_many
from delf_milvus.retrieval.ranking import combined_scores
from delf_milvus.retrieval.regions import bounds, regions
from delf_milvus.retrieval.verification import Keypoints, Verification, matched_box, verify_many
from delf_milvus.retrieval.voting import Votes, vote
from delf_milvus.settings import SearchSettings, VerifySettings

Transform = list[list[float]]

EXPANSION_FALSE_ALARM = 0.001
"""Bar of an answer whose features may join the query: a wrong one would bring more of its own kind."""


@dataclass(frozen=True)
class Candidate:
    """What the search needs of a stored image."""

    image_id: str
    uri: str
    features: Features
    metadata: Mapping[str, Any] = field(default_factory=dict)


class CandidateSource(Protocol):
    """Where neighbours and candidates come from."""

    def neighbours(
        self, descriptors: npt.NDArray[np.float32], k: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Feature keys (Q, k), -1 where there are fewer, and similarities (Q, k), falling along a row."""

    def candidates(self, image_keys: npt.NDArray[np.int64]) -> dict[int, Candidate]:
        """The stored images of these keys; an image that is not there is left out."""


@dataclass
class Timings:
    """Seconds spent in each step of a search."""

    decode: float = 0.0
    extract: float = 0.0
    neighbours: float = 0.0
    vote: float = 0.0
    geometry: float = 0.0
    match: float = 0.0
    verify: float = 0.0
    total: float = 0.0

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        """Add the time of the block to `step` and to the total."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            setattr(self, step, getattr(self, step) + seconds)
            self.total += seconds


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

    verified: the evidence passes the bar. inliers: matches that one affine transform explains, counted by place;
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
        names = ("rank", "image_id", "uri", "verified", "inliers", "putatives", "confidence", "false_alarm", "score")
        return {name: getattr(self, name) for name in (*names, "transform", "homography", "region")} | {
            "box": None if self.box is None else list(self.box),
            "query_box": None if self.query_box is None else list(self.query_box),
            "metadata": dict(self.metadata),
        }


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The answer to one query: the verified hits in falling score, or none.

    query: what was searched for. model: fingerprint of the model, shortened. matched: whether any hit is verified.
    query_features: how many features the query had.
    """

    query: str
    model: str
    matched: bool
    hits: list[Hit]
    timings: Timings
    query_features: int

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return {
            "query": self.query,
            "model": self.model,
            "matched": self.matched,
            "query_features": self.query_features,
            "hits": [hit.to_dict() for hit in self.hits],
            "timings": {name: round(seconds, 6) for name, seconds in asdict(self.timings).items()},
        }


@dataclass(frozen=True, eq=False)
class Judgement:
    """Every candidate of one search, in falling score; arrays of the same length N. evidence: (N, columns), as of
    `evidence.evidence`."""

    candidates: list[Candidate]
    verifications: list[Verification]
    matches: list[Matches]
    inliers: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    evidence: npt.NDArray[np.float64]

    def ordered(self, scores: npt.NDArray[np.float64]) -> Judgement:
        """The same candidates in falling order of these scores."""
        order = np.argsort(-scores, kind="stable")
        return Judgement(
            [self.candidates[i] for i in order],
            [self.verifications[i] for i in order],
            [self.matches[i] for i in order],
            self.inliers[order],
            scores[order],
            self.evidence[order],
        )

    def joined(self, other: Judgement) -> Judgement:
        """These candidates and then the others."""
        return Judgement(
            self.candidates + other.candidates,
            self.verifications + other.verifications,
            self.matches + other.matches,
            np.concatenate([self.inliers, other.inliers]),
            np.concatenate([self.scores, other.scores]),
            np.concatenate([self.evidence, other.evidence]),
        )


def judge_candidates(
    query: Features, source: CandidateSource, search: SearchSettings, verify: VerifySettings, timings: Timings
) -> Judgement:
    """Find, match and verify the candidates of a query."""
    with timings.measure("neighbours"):
        keys, similarities = source.neighbours(query.descriptors, search.neighbours)
    with timings.measure("vote"):
        votes = vote(keys, similarities)
    with timings.measure("geometry"):
        stored = source.candidates(votes.images[: search.candidates])
    return judge(query, votes, stored, search, verify, timings)


def judge(
    query: Features,
    votes: Votes,
    stored: Mapping[int, Candidate],
    search: SearchSettings,
    verify: VerifySettings,
    timings: Timings,
) -> Judgement:
    """Match and verify the images with the most votes; `stored` has those of them that exist, by image key."""
    images = votes.images[: search.candidates].tolist()
    # A feature without its image row is what a crash left: that image does not exist.
    rows = [row for row, image in enumerate(images) if image in stored]
    candidates = [stored[images[row]] for row in rows]
    with timings.measure("match"):
        if search.mode == "full":
            matches = match_many(query.descriptors, [c.features.descriptors for c in candidates], verify.similarity)
        else:
            matches = [votes.hits(row, verify.similarity) for row in rows]
            matches = [_existing(m, c) for m, c in zip(matches, candidates, strict=True)]
    with timings.measure("verify"):
        judged = _verified(query, candidates, matches, verify, votes.scores[rows])
        scores = combined_scores(votes.scores[rows], judged.inliers, search.inlier_weight)
        return judged.ordered(scores)


def _verified(
    query: Features,
    candidates: Sequence[Candidate],
    matches: Sequence[Matches],
    verify: VerifySettings,
    scores: npt.NDArray[np.float64],
) -> Judgement:
    """The candidates in the given order, with these scores."""
    verifications = verify_many(
        keypoints(query),
        [keypoints(c.features) for c in candidates],
        matches,
        residual=verify.residual,
        min_inliers=verify.min_inliers,
    )
    return Judgement(
        list(candidates),
        verifications,
        list(matches),
        np.array([v.inliers for v in verifications], np.int64),
        scores,
        evidence(keypoints(query), matches, verifications),
    )


def widened(
    query: Features, judged: Judgement, search: SearchSettings, calibration: Calibration, query_box: Box
) -> Features | None:
    """The query for a second look, with features of its surest answers; None where none is asked for or none is sure
    enough."""
    if not search.expand:
        return None
    sure = np.flatnonzero(calibration.assess(judged.evidence).false_alarm <= EXPANSION_FALSE_ALARM)[: search.expand]
    found = [(judged.candidates[i].features, judged.matches[i], judged.verifications[i]) for i in sure]
    return expanded(query, found, query_box) if found else None


def looked_twice(
    query: Features, first: Judgement, second: Judgement, verify: VerifySettings, timings: Timings
) -> Judgement:
    """What both looks found. second: the judgement of the widened query.

    The second look orders its candidates; proof and evidence are those of the query itself. Candidates of the first
    look that the second lacks come after them, in their order.
    """
    known = {candidate.image_id: i for i, candidate in enumerate(first.candidates)}
    new = [i for i, candidate in enumerate(second.candidates) if candidate.image_id not in known]
    candidates = [second.candidates[i] for i in new]
    with timings.measure("match"):
        matches = match_many(query.descriptors, [c.features.descriptors for c in candidates], verify.similarity)
    with timings.measure("verify"):
        own = first.joined(_verified(query, candidates, matches, verify, np.zeros(len(new))))
    lowest = float(second.scores.min(initial=0.0))
    score = {candidate.image_id: float(s) for candidate, s in zip(second.candidates, second.scores, strict=True)}
    after = [lowest - 1 - rank for rank in range(len(own.candidates))]
    scores = [score.get(candidate.image_id, late) for candidate, late in zip(own.candidates, after, strict=True)]
    return own.ordered(np.array(scores, np.float64))


def answer(
    query: Features,
    source: CandidateSource,
    search: SearchSettings,
    verify: VerifySettings,
    calibration: Calibration,
    timings: Timings,
    *,
    query_box: Box,
    include_unverified: bool = False,
) -> list[Hit]:
    """The hits of a query, verified ones first by score; with `include_unverified` the rest after them.

    query_box: the part of the query photo that was searched for, x0, y0, x1, y1.
    """
    judged = judge_candidates(query, source, search, verify, timings)
    wide = widened(query, judged, search, calibration, query_box)
    if wide is not None:
        second = judge_candidates(wide, source, search, verify, timings)
        judged = looked_twice(query, judged, second, verify, timings)
    return hits_of(
        query, judged, search, verify, calibration, query_box=query_box, include_unverified=include_unverified
    )


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


def keypoints(features: Features) -> Keypoints:
    """What verification needs of a photo's features."""
    return Keypoints(features.locations, features.scales, (features.width, features.height))


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


def _existing(matches: Matches, candidate: Candidate) -> Matches:
    """Without hits on features that the image's row does not know: what a crashed update may leave."""
    known = matches.candidate < len(candidate.features)
    return Matches(matches.query[known], matches.candidate[known], matches.similarity[known])
