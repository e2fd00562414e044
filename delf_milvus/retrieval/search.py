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

from delf_milvus.features import Features
from delf_milvus.retrieval.evidence import evidence
from delf_milvus.retrieval.matching import Matches, match_many
from delf_milvus.retrieval.ranking import combined_scores
from delf_milvus.retrieval.verification import Keypoints, Verification, verify_many
from delf_milvus.retrieval.voting import Votes, vote
from delf_milvus.settings import SearchSettings, VerifySettings


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
        judged = verified_candidates(query, candidates, matches, verify, votes.scores[rows])
        rest, later = votes.images[search.candidates :], votes.scores[search.candidates :]
        inliers = np.concatenate([judged.inliers, np.zeros(len(rest), np.int64)])
        scores = combined_scores(np.concatenate([judged.scores, later]), inliers, search.inlier_weight)
        judged = replace(judged, rest=rest, rest_scores=scores[len(rows) :])
        return judged.ordered(scores[: len(rows)])


def verified_candidates(
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


def keypoints(features: Features) -> Keypoints:
    """What verification needs of a photo's features."""
    return Keypoints(features.locations, features.scales, (features.width, features.height))


def _existing(matches: Matches, candidate: Candidate) -> Matches:
    """Without hits on features that the image's row does not know: what a crashed update may leave."""
    known = matches.candidate < len(candidate.features)
    return Matches(matches.query[known], matches.candidate[known], matches.similarity[known])
