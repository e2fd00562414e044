"""Pictures of an evaluation: precision over recall, the inliers of right and of wrong answers, and how well confidence
says what share of answers is right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from delf_milvus.evaluation.dataset import Answer, Query
from delf_milvus.evaluation.metrics import Floats, interpolated_precision, precision_recall
from delf_milvus.evaluation.statistics import reliability
from delf_milvus.imaging.chart import Line, histogram_picture, line_picture
from delf_milvus.imaging.draw import save_picture

PRECISION_RECALL = "precision_recall.png"
INLIERS = "inliers.png"
RELIABILITY = "reliability.png"

_WORST_CORNER = 50.0  # pixels: the end of that picture's axis

_LEVELS = np.linspace(0, 1, 101)


def precision_recall_picture(answered: Sequence[tuple[Query, Answer]], path: Path) -> bool:
    """Write the mean precision of the rankings at each recall, and that of the first answers as the bar is lowered.

    Returns whether there is anything to draw: a query that has a match. Errors as of `save_picture`.
    """
    lines = [line for line in (*_rankings(answered), _first_answers(answered)) if line is not None]
    if not lines:
        return False
    caption = "rankings: mean over queries; first answers: all above a confidence, of queries with and without a match"
    save_picture(path, line_picture(lines, "recall", "precision", caption))
    return True


def inliers_picture(answered: Sequence[tuple[Query, Answer]], path: Path) -> bool:
    """Write how many inliers the best right and the best wrong image of each query have.

    Returns whether there is any query. Errors as of `save_picture`.
    """
    samples: dict[str, list[int]] = {"right": [], "wrong": [], "no match": []}
    for query, answer in answered:
        right = [one.inliers for one in answer.found if one.name in query.truth.relevant]
        counted = query.truth.relevant | query.truth.junk
        wrong = [one.inliers for one in answer.found if one.name not in counted]
        if query.truth.relevant:
            # A right image that is no candidate shows nothing at all.
            samples["right"].append(max(right, default=0))
            samples["wrong"].append(max(wrong, default=0))
        else:
            samples["no match"].append(max(wrong, default=0))
    if not answered:
        return False
    caption = "the most inliers of a right and of a wrong image, by query; no match: of queries that have none"
    save_picture(path, histogram_picture(samples, "inliers", "share of queries", caption))
    return True


def reliability_picture(answered: Sequence[tuple[Query, Answer]], path: Path) -> bool:
    """Write the share of right first answers over their confidence, in ten bins.

    Returns whether there is anything to draw: queries with a match and queries without. Errors as of `save_picture`.
    """
    values = []
    for query, answer in answered:
        first = answer.first(query.truth.junk)
        sure, right = (0.0, False) if first is None else (first.confidence, first.name in query.truth.relevant)
        values.append((sure, float(right), float(bool(query.truth.relevant))))
    table = np.array(values, np.float64).reshape(1, -1, 3)
    if not 0 < table[..., 2].sum() < table.shape[1]:
        return False
    sure, true, weight = (column[0] for column in reliability(table))
    some = weight > 0
    lines = [
        Line("first answers", sure[some].tolist(), true[some].tolist()),
        Line("as promised", [0.0, 1.0], [0.0, 1.0]),
    ]
    caption = "each point: a tenth of the scale; queries with and without a match weigh the same"
    save_picture(path, line_picture(lines, "confidence", "share that is right", caption))
    return True


def _rankings(answered: Sequence[tuple[Query, Answer]]) -> list[Line]:
    curves: dict[str, list[Floats]] = {}
    for query, answer in answered:
        ranking = [one.name for one in answer.found]
        for name, truth in (query.levels or {"rankings": query.truth}).items():
            if truth.relevant:
                curve = interpolated_precision(ranking, truth.relevant, _LEVELS, truth.junk)
                curves.setdefault(name if name == "rankings" else f"rankings, {name}", []).append(curve)
    return [Line(name, _LEVELS.tolist(), np.mean(some, axis=0).tolist()) for name, some in curves.items()]


def _first_answers(answered: Sequence[tuple[Query, Answer]]) -> Line | None:
    confidences, right = [], []
    for query, answer in answered:
        first = answer.first(query.truth.junk)
        if first is not None:
            confidences.append(first.confidence)
            right.append(first.name in query.truth.relevant)
    answerable = sum(bool(query.truth.relevant) for query, _ in answered)
    if not answerable or not confidences:
        return None
    recall, precision, _ = precision_recall(confidences, right, answerable)
    return Line("first answers", recall.tolist(), precision.tolist())


def corner_errors_picture(errors: Sequence[float], pairs: int, path: Path) -> bool:
    """Write the share of pairs whose corner error, pixels, is at most so large.

    errors: of pairs that have a transform. pairs: all that have a homography. Returns whether there are any. Errors as
    of `save_picture`.
    """
    if not pairs:
        return False
    found = np.sort(np.asarray(errors, np.float64))
    found = found[found <= _WORST_CORNER]
    steps = np.repeat(found / _WORST_CORNER, 2)
    shares = np.repeat(np.arange(len(found) + 1), 2)[1:-1] / pairs
    lines = [Line("pairs", [0.0, *steps.tolist(), 1.0], [0.0, *shares.tolist(), len(found) / pairs])]
    caption = f"{pairs} pairs with a homography, {len(errors)} of them with a transform"
    save_picture(path, line_picture(lines, "mean error of four corners, px", "share", caption, x_end=_WORST_CORNER))
    return True
