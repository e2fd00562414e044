"""What each stage of a search thought of one image, and which of them decided."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from delf_milvus.features import Features
from delf_milvus.retrieval.answers import Transform, verified_regions
from delf_milvus.retrieval.confidence import Calibration
from delf_milvus.retrieval.search import Candidate, Judgement, Timings, judge
from delf_milvus.retrieval.second_look import agreed
from delf_milvus.retrieval.shortlist import Shortlist, shortlist
from delf_milvus.retrieval.voting import vote
from delf_milvus.settings import SearchSettings, VerifySettings


@dataclass(frozen=True)
class Explanation:
    """One image in one search.

    query_features, image_features: how many there are. voting_features: of the query, that have the image among their
    neighbours. votes: their votes, vote_rank: its rank among voted_images by them, None without a vote. similarity: of
    its global descriptor, None where it is not among the nearest that were fetched. shortlist_rank: among the images
    that come into question by both, None where it is none of them. candidate:
    whether it was verified as one of the first of these; the rest is then as in the search, and otherwise what it would
    have been. recounted_votes: of a candidate, over all of its features; None in the mode that does not count again.
    putatives: matches before geometry. inliers, transform, confidence, false_alarm, verified: as of a hit.
    cells: of an 8 x 8 grid over the query in which inliers lie. residual: median distance of an inlier from the
    transform, pixels of the image. scale_agreement: share of the inliers whose scales agree with the transform.
    max_false_alarm: the bar of a verified answer. rank: among the answers, None if it is none of them. verdict: the
    same in words.
    """

    image_id: str
    query_features: int
    image_features: int
    voting_features: int
    votes: float
    vote_rank: int | None
    voted_images: int
    similarity: float | None
    shortlist_rank: int | None
    candidate: bool
    recounted_votes: float | None
    putatives: int
    inliers: int
    cells: int
    residual: float | None
    scale_agreement: float
    transform: Transform | None
    confidence: float
    false_alarm: float
    max_false_alarm: float
    verified: bool
    rank: int | None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return asdict(self)


def explain(
    query: Features,
    chosen: Shortlist,
    key: int,
    stored: dict[int, Candidate],
    search: SearchSettings,
    verify: VerifySettings,
    calibration: Calibration,
) -> Explanation:
    """Explain the image of this key, which `stored` has beside the candidates, by image key.

    The rank is that of a search without expansion, whose second look would need the database again.
    """
    image = stored[key]
    judged = judge(query, chosen, stored, search, verify, Timings())
    judged = agreed(judged, search, verify, calibration, Timings())
    position = next((i for i, one in enumerate(judged.candidates) if one.image_id == image.image_id), None)
    candidate = position is not None
    if position is None:
        # Judged beside the candidates, for the chance level of a query is that of all its candidates.
        judged, position = judged.joined(_alone(query, key, image, search, verify)), len(judged.candidates)
    confidence, false_alarm = calibration.assess(judged.evidence)
    verified = false_alarm <= verify.max_false_alarm
    order = list(verified_regions(query, judged, verified, search.per_region))[: search.top] if candidate else []
    votes = chosen.votes
    place = int(np.flatnonzero(chosen.images == key)[0]) if key in chosen.images else None
    row = None if place is None or chosen.rows[place] < 0 else int(chosen.rows[place])
    alike = None if place is None or np.isnan(chosen.similarities[place]) else float(chosen.similarities[place])
    found, recounted = judged.verifications[position], float(judged.votes[position])
    explanation = Explanation(
        image_id=image.image_id,
        query_features=len(query),
        image_features=len(image.features),
        voting_features=0 if row is None else int(votes.offsets[row + 1] - votes.offsets[row]),
        votes=0.0 if row is None else float(votes.scores[row]),
        vote_rank=None if row is None else row + 1,
        voted_images=len(votes),
        similarity=alike,
        shortlist_rank=None if place is None else place + 1,
        candidate=candidate,
        recounted_votes=recounted if candidate and not np.isnan(recounted) else None,
        putatives=len(judged.matches[position].query),
        inliers=found.inliers,
        cells=found.cells,
        residual=float(np.median(found.residuals[found.mask])) if found.mask.any() else None,
        scale_agreement=found.scale_agreement,
        transform=None if found.transform is None else found.transform.tolist(),
        confidence=float(confidence[position]),
        false_alarm=float(false_alarm[position]),
        max_false_alarm=verify.max_false_alarm,
        verified=candidate and bool(verified[position]),
        rank=order.index(position) + 1 if position in order else None,
        verdict="",
    )
    return replace(explanation, verdict=_verdict(explanation, search))


def _alone(query: Features, key: int, image: Candidate, search: SearchSettings, verify: VerifySettings) -> Judgement:
    """The judgement of an image that is no candidate, as if it were the only one."""
    nobody = vote(np.full((len(query), 1), -1, np.int64), np.zeros((len(query), 1), np.float32))
    only = shortlist(nobody, np.array([key], np.int64), np.ones(1, np.float32), search.global_weight)
    full = search.model_copy(update={"mode": "full"})
    return judge(query, only, {key: image}, full, verify, Timings())


def _verdict(found: Explanation, search: SearchSettings) -> str:
    geometry = _geometry(found)
    if not found.query_features:
        return "The query has no features."
    if found.shortlist_rank is None:
        return (
            "No feature of the query has a neighbour in it, and its whole is not similar: it was no candidate. "
            f"Compared all the same, {geometry}"
        )
    if not found.candidate:
        return (
            f"It is number {found.shortlist_rank} by votes and similarity, and the best {search.candidates} are "
            f"verified (--candidates). Compared all the same, {geometry}"
        )
    if found.verified and found.rank is None:
        return f"It is verified, but not among the answers that are shown (--top, --per-region): {geometry}"
    return ("Verified: " if found.verified else "Not verified: ") + geometry


def _geometry(found: Explanation) -> str:
    if found.putatives < 3:
        return f"{found.putatives} of its features match the query's, too few for a transform."
    if found.transform is None:
        return f"no transform explains three of its {found.putatives} matches that are not on a line."
    side = "at most" if found.false_alarm <= found.max_false_alarm else "above"
    return (
        f"{found.inliers} places of {found.putatives} matches agree on one transform; the share of queries without a "
        f"match that reach as much is {found.false_alarm:.2g}, {side} the bar of {found.max_false_alarm:g}."
    )
