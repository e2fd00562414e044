"""The search of one query photo: vote, shortlist, fetch, match and count votes again, verify, rank.

The database is behind three calls (`CandidateSource`), so that the same search runs over Milvus, over arrays in memory
and over whatever a test needs. Who must wait for the database otherwise, calls the stages between: `vote`, `shortlist`
and `judge`. `answers` makes of it what is shown.
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
from delf_milvus.retrieval.matching import Matches
from delf_milvus.retrieval.ranking import combined_scores
from delf_milvus.retrieval.shortlist import NOBODY, Shortlist, shortlist
from delf_milvus.retrieval.verification import Keypoints, Verification, verify_many
from delf_milvus.retrieval.voting import match_and_recount, vote
from delf_milvus.settings import SearchSettings, VerifySettings


@dataclass(frozen=True)
class Candidate:
    """What the search needs of a stored image. indexed: how many of its features, the first, are in the index; None for
    all."""

    image_id: str
    uri: str
    features: Features
    metadata: Mapping[str, Any] = field(default_factory=dict)
    indexed: int | None = None


class CandidateSource(Protocol):
    """Where neighbours, similar images and candidates come from."""

    def neighbours(
        self, descriptors: npt.NDArray[np.float32], k: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Feature keys (Q, k), -1 where there are fewer, and similarities (Q, k), falling along a row."""

    def similar(
        self, descriptor: npt.NDArray[np.float32], k: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Keys (N,) and similarities (N,) of the k images, or of all, whose global descriptor is nearest to (G,)."""

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

    votes: float64, counted over all of a candidate's features, NaN where only those of the index were counted.
    evidence: (N, columns), as of `evidence.evidence`. rest, rest_scores: (R,) int64 keys and float64 scores of the
    images of the shortlist that are too low to be a candidate, in falling score.
    """

    candidates: list[Candidate]
    verifications: list[Verification]
    matches: list[Matches]
    inliers: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    votes: npt.NDArray[np.float64]
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
            self.votes[order],
            self.evidence[order],
            self.rest,
            self.rest_scores,
        )

    def joined(self, other: Judgement) -> Judgement:
        """These candidates and then the others, without the rest."""
        return Judgement(
            self.candidates + other.candidates,
            self.verifications + other.verifications,
            self.matches + other.matches,
            np.concatenate([self.inliers, other.inliers]),
            np.concatenate([self.scores, other.scores]),
            np.concatenate([self.votes, other.votes]),
            np.concatenate([self.evidence, other.evidence]),
            np.empty(0, np.int64),
            np.empty(0),
        )


def judge_candidates(
    query: Features, source: CandidateSource, search: SearchSettings, verify: VerifySettings, timings: Timings
) -> Judgement:
    """Find, match and verify the candidates of a query."""
    chosen = shortlisted(query, source, search, timings)
    with timings.measure("geometry"):
        stored = source.candidates(chosen.images[: search.candidates])
    return judge(query, chosen, stored, search, verify, timings)


def shortlisted(query: Features, source: CandidateSource, search: SearchSettings, timings: Timings) -> Shortlist:
    """The images that come into question for a query."""
    with timings.measure("neighbours"):
        keys, similarities = source.neighbours(query.descriptors, search.neighbours)
        similar = NOBODY
        if asks_globally(query, search):
            similar = source.similar(query.global_descriptor, search.similar_images)
    with timings.measure("vote"):
        return shortlist(vote(keys, similarities), *similar, search.global_weight)


def asks_globally(query: Features, search: SearchSettings) -> bool:
    """Whether the database is asked for images with a similar global descriptor."""
    return len(query.global_descriptor) > 0 and search.global_weight > 0


def judge(
    query: Features,
    chosen: Shortlist,
    stored: Mapping[int, Candidate],
    search: SearchSettings,
    verify: VerifySettings,
    timings: Timings,
) -> Judgement:
    """Match and verify the first of the shortlist; `stored` has those of them that exist, by image key."""
    images = chosen.images[: search.candidates].tolist()
    # A feature without its image row is what a crash left: that image does not exist.
    rows = [row for row, image in enumerate(images) if image in stored]
    candidates = [stored[images[row]] for row in rows]
    with timings.measure("match"):
        if search.mode == "full":
            descriptors = [c.features.descriptors for c in candidates]
            known = chosen.images[rows], descriptors, verify.similarity, chosen.votes, _share(candidates)
            matches, votes = match_and_recount(query.descriptors, *known)
            scores = chosen.recounted(rows, votes)
        else:
            scores, votes = chosen.scores[rows], np.full(len(rows), np.nan)
            matches = [chosen.hits(row, verify.similarity) for row in rows]
            matches = [_existing(m, c) for m, c in zip(matches, candidates, strict=True)]
    with timings.measure("verify"):
        judged = verified_candidates(query, candidates, matches, verify, scores)
        rest, rest_scores = chosen.images[search.candidates :], chosen.scores[search.candidates :]
        # Nothing is known of them that would put them before a candidate.
        rest_scores = np.minimum(rest_scores, scores.min(initial=np.inf))
        judged = replace(judged, votes=votes, rest=rest, rest_scores=rest_scores)
        return judged.ordered(combined_scores(judged.scores, judged.inliers, search.inlier_weight))


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
        np.full(len(candidates), np.nan),
        evidence(keypoints(query), matches, verifications),
        np.empty(0, np.int64),
        np.empty(0),
    )


def keypoints(features: Features) -> Keypoints:
    """What verification needs of a photo's features."""
    return Keypoints(features.locations, features.scales, (features.width, features.height))


def _share(candidates: Sequence[Candidate]) -> float:
    """Features of the candidates for each one of them in the index."""
    counts = [len(c.features) for c in candidates]
    indexed = sum(n if c.indexed is None else min(c.indexed, n) for c, n in zip(candidates, counts, strict=True))
    return sum(counts) / indexed if indexed else 1.0


def _existing(matches: Matches, candidate: Candidate) -> Matches:
    """Without hits on features that the image's row does not know: what a crashed update may leave."""
    known = matches.candidate < len(candidate.features)
    return Matches(matches.query[known], matches.candidate[known], matches.similarity[known])
