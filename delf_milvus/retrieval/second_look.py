"""Second looks: what the surest answers of a search tell about the others.

Both are options. Expansion asks again with a query that features of these answers have joined; agreement lets them vote
for the other candidates: what matches them as well as the query shows the same thing more likely.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from delf_milvus.features import Box, Features
from delf_milvus.retrieval.confidence import Calibration
from delf_milvus.retrieval.expansion import expanded
from delf_milvus.retrieval.matching import match_many
from delf_milvus.retrieval.ranking import relative
from delf_milvus.retrieval.search import Judgement, Timings, keypoints, verified_candidates
from delf_milvus.retrieval.verification import verify_many
from delf_milvus.settings import SearchSettings, VerifySettings

SURE = 0.001
"""False-alarm level of an answer that may say something about others: a wrong one would bring more of its own kind."""


def surest(judged: Judgement, calibration: Calibration, most: int) -> list[int]:
    """Rows of the first candidates that are sure, `most` at most."""
    if not most:
        return []
    sure = np.flatnonzero(calibration.assess(judged.evidence).false_alarm <= SURE)
    return [int(row) for row in sure[:most]]


def agreed(
    judged: Judgement, search: SearchSettings, verify: VerifySettings, calibration: Calibration, timings: Timings
) -> Judgement:
    """The candidates in the order that the surest of them, `search.agreement` at most, have a say in.

    Each is matched and verified with all candidates as the query is; the mean of these inliers, each divided by their
    level, joins the score with `search.inlier_weight`. Proof and evidence stay those of the query.
    """
    sure = surest(judged, calibration, search.agreement)
    features = [candidate.features for candidate in judged.candidates]
    total = np.zeros(len(features))
    for row in sure:
        with timings.measure("match"):
            descriptors = [one.descriptors for one in features]
            matches = match_many(features[row].descriptors, descriptors, verify.similarity)
        with timings.measure("verify"):
            found = verify_many(
                keypoints(features[row]),
                [keypoints(one) for one in features],
                matches,
                residual=verify.residual,
                min_inliers=verify.min_inliers,
            )
        inliers = np.array([one.inliers for one in found], np.float64)
        inliers[row] = np.delete(inliers, row).max(initial=0)  # it agrees with itself whatever it shows
        total += relative(inliers)
    return judged.ordered(judged.scores + search.inlier_weight * total / len(sure)) if sure else judged


def widened(
    query: Features, judged: Judgement, search: SearchSettings, calibration: Calibration, query_box: Box
) -> Features | None:
    """The query for a second look, with features of its surest answers; None where none is asked for or none is sure
    enough."""
    sure = surest(judged, calibration, search.expand)
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
        own = first.joined(verified_candidates(query, candidates, matches, verify, np.zeros(len(new))))
    lowest = float(second.scores.min(initial=0.0))
    score = {candidate.image_id: float(s) for candidate, s in zip(second.candidates, second.scores, strict=True)}
    after = [lowest - 1 - rank for rank in range(len(own.candidates))]
    scores = [score.get(candidate.image_id, late) for candidate, late in zip(own.candidates, after, strict=True)]
    last = lowest - 1 - len(own.candidates)
    own = replace(own, rest=second.rest, rest_scores=last - np.arange(len(second.rest), dtype=np.float64))
    return own.ordered(np.array(scores, np.float64))
