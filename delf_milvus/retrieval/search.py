"""The search of one query photo: vote, fetch, match, verify, rank.

The database is behind two calls (`CandidateSource`), so that the same search runs over Milvus, over arrays in memory
and over whatever a test needs. Who must wait for the database otherwise, calls the stages between: `vote` and `judge`.
`answers` makes of it what is shown.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from delf_milvus.features import Box, Features
from delf_milvus.retrieval.confidence import Calibration
from delf_milvus.retrieval.evidence import evidence
from delf_milvus.retrieval.expansion import expanded
from delf_milvus.retrieval.matching import Matches, match_many
from delf_milvus.retrieval.ranking import combined_scores
from delf_milvus.retrieval.verification import Keypoints, Verification, verify_many
from delf_milvus.retrieval.voting import Votes, vote
from delf_milvus.settings import SearchSettings, VerifySettings

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
class Judgement:
    """Every candidate of one search, in falling score; arrays of the same length N.

    evidence: (N, columns), as of `evidence.evidence`. rest, rest_scores: (R,) int64 keys and float64 scores of the
    images that have votes, but too few to be a candidate, in falling score.
    """

    candidates: list[Candidate]
    verifications: list[Verification]
    matches: list[Matches]
    inliers: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    evidence: npt.NDArray[np.float64]
    rest: npt.NDArray[np.int64]
    rest_scores: npt.NDArray[np.float64]

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
            self.rest,
            self.rest_scores,
        )

    def joined(self, other: Judgement) -> Judgement:
        """These candidates and then the others, without those that only have votes."""
        return Judgement(
            self.candidates + other.candidates,
            self.verifications + other.verifications,
            self.matches + other.matches,
            np.concatenate([self.inliers, other.inliers]),
            np.concatenate([self.scores, other.scores]),
            np.concatenate([self.evidence, other.evidence]),
            np.empty(0, np.int64),
            np.empty(0),
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
        rest, later = votes.images[search.candidates :], votes.scores[search.candidates :]
        inliers = np.concatenate([judged.inliers, np.zeros(len(rest), np.int64)])
        scores = combined_scores(np.concatenate([judged.scores, later]), inliers, search.inlier_weight)
        judged = replace(judged, rest=rest, rest_scores=scores[len(rows) :])
        return judged.ordered(scores[: len(rows)])


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
        np.empty(0, np.int64),
        np.empty(0),
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
    last = lowest - 1 - len(own.candidates)
    own = replace(own, rest=second.rest, rest_scores=last - np.arange(len(second.rest), dtype=np.float64))
    return own.ordered(np.array(scores, np.float64))


def keypoints(features: Features) -> Keypoints:
    """What verification needs of a photo's features."""
    return Keypoints(features.locations, features.scales, (features.width, features.height))


def _existing(matches: Matches, candidate: Candidate) -> Matches:
    """Without hits on features that the image's row does not know: what a crashed update may leave."""
    known = matches.candidate < len(candidate.features)
    return Matches(matches.query[known], matches.candidate[known], matches.similarity[known])
