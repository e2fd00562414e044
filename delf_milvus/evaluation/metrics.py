"""Figures of merit, as pure functions of rankings, of first answers and of matched points.

A ranking is a sequence of image ids, best first, each at most once. Relevant images that it lacks count as never found,
junk is taken out of it first, as if it were not in the collection. What a query without relevant images scores is not
defined: such queries are left out of a mean, and raise ValueError here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Transform = npt.ArrayLike  # (3, 3), or (2, 3) for an affine one


def average_precision(ranking: Sequence[str], relevant: Collection[str], junk: Collection[str] = ()) -> float:
    """Area under the precision-recall curve by trapezoids, as the Oxford and Paris protocols compute it.

    Source: Philbin et al., "Object retrieval with large vocabularies and fast spatial matching", CVPR 2007.
    """
    _require(relevant)
    area, found, rank = 0.0, 0, 0
    for image in ranking:
        if image in junk:
            continue
        if image in relevant:
            before = found / rank if rank else 1.0
            found += 1
            area += (before + found / (rank + 1)) / 2
        rank += 1
    return area / len(relevant)


def average_precision_at(
    ranking: Sequence[str], relevant: Collection[str], k: int, junk: Collection[str] = ()
) -> float:
    """Mean of the precision at each relevant image among the first `k`, over min(relevant, k).

    Source: the retrieval challenge of Weyand et al., "Google Landmarks Dataset v2", CVPR 2020, where k is 100.
    """
    _require(relevant)
    found, total = 0, 0.0
    for rank, right in enumerate(_rights(ranking, relevant, junk)[:k], 1):
        if right:
            found += 1
            total += found / rank
    return total / min(len(relevant), k)


def ns_score(ranking: Sequence[str], relevant: Collection[str]) -> int:
    """Relevant images among the first four answers: the score of UKBench, whose objects have four views each.

    Source: Nistér and Stewénius, "Scalable recognition with a vocabulary tree", CVPR 2006. The query is an answer too.
    """
    return sum(image in relevant for image in ranking[:4])


def recall_at(ranking: Sequence[str], relevant: Collection[str], k: int, junk: Collection[str] = ()) -> float:
    """1 where any relevant image is among the first `k`, else 0: recall@k of instance retrieval."""
    _require(relevant)
    return float(any(_rights(ranking, relevant, junk)[:k]))


def precision_at(ranking: Sequence[str], relevant: Collection[str], k: int, junk: Collection[str] = ()) -> float:
    """Share of relevant images among the first `k`, or among the first of as many as are relevant where those are
    fewer, so that a perfect ranking scores 1."""
    _require(relevant)
    places = min(k, len(relevant))
    return sum(_rights(ranking, relevant, junk)[:places]) / places


def revisited_precision_at(
    ranking: Sequence[str], relevant: Collection[str], k: int, junk: Collection[str] = ()
) -> float:
    """mP@k of the revisited protocol: precision among the first min(k, place of the last relevant image).

    Relevant images that the ranking lacks stand behind its end.

    Source: Radenović et al., "Revisiting Oxford and Paris", CVPR 2018, and its published evaluation.
    """
    _require(relevant)
    rights = _rights(ranking, relevant, junk)
    missing = len(relevant) - sum(rights)
    last = len(rights) + missing if missing else 1 + max(place for place, right in enumerate(rights) if right)
    places = min(last, k)
    return sum(rights[:places]) / places


def interpolated_precision(
    ranking: Sequence[str], relevant: Collection[str], levels: npt.ArrayLike, junk: Collection[str] = ()
) -> Floats:
    """Best precision at any recall of at least each level, (L,) in [0, 1]; 0 where that recall is never reached."""
    _require(relevant)
    places = np.flatnonzero(_rights(ranking, relevant, junk)) + 1
    found = np.arange(1, len(places) + 1)
    precision = np.maximum.accumulate((found / places)[::-1])[::-1]
    needed = np.maximum(np.ceil(np.asarray(levels, np.float64) * len(relevant) - 1e-9), 1).astype(np.int64)
    return np.append(precision, 0.0)[np.minimum(needed - 1, len(precision))]


def global_average_precision(confidences: npt.ArrayLike, right: npt.ArrayLike, answerable: int) -> float:
    """Precision at each right prediction in falling confidence, summed, over the queries with an answer (GAP, µAP).

    confidences: (N,), one prediction a query at most, of any queries. right: (N,) bool. answerable: queries that have a
    right answer, predicted or not. Equal confidences stay in the order given. Raises ValueError without answerable
    queries.

    Source: Perronnin et al., "A family of contextual measures of similarity", CVPR 2009; the recognition challenge of
    Weyand et al., CVPR 2020.
    """
    if answerable < 1:
        raise ValueError("global average precision needs at least one query that has an answer")
    hits = np.asarray(right, bool)[np.argsort(-np.asarray(confidences, np.float64), kind="stable")]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].sum() / answerable)


def precision_recall(
    confidences: npt.ArrayLike, right: npt.ArrayLike, answerable: int
) -> tuple[Floats, Floats, Floats]:
    """Recall, precision and least confidence, (M,) each, when only predictions of at least that confidence are given.

    Arguments as of `global_average_precision`; a wrong prediction for a query that has no answer lowers the precision.
    Equal confidences are accepted together.
    """
    if answerable < 1:
        raise ValueError("a precision-recall curve needs at least one query that has an answer")
    values = np.asarray(confidences, np.float64)
    order = np.argsort(-values, kind="stable")
    values, found = values[order], np.cumsum(np.asarray(right, np.float64)[order])
    ends = np.flatnonzero(np.diff(values, append=-np.inf) != 0)
    return found[ends] / answerable, found[ends] / (ends + 1), values[ends]


def transfer_distances(homography: Transform, first: npt.ArrayLike, second: npt.ArrayLike) -> Floats:
    """Pixels between the places where a homography sends points and their matches, (N,).

    homography: (3, 3), from pixels of the first photo to the second's. first, second: (N, 2) pixels. A point that it
    sends through infinity is infinitely far.
    """
    gaps = _sent(homography, first) - np.asarray(second, np.float64).reshape(-1, 2)
    return np.hypot(gaps[:, 0], gaps[:, 1])


def epipolar_distances(fundamental: Transform, first: npt.ArrayLike, second: npt.ArrayLike) -> Floats:
    """Symmetric epipolar distances, (N,): mean of the pixels from each point to the line of its match.

    fundamental: (3, 3), second^T F first = 0 for a match. first, second: (N, 2) pixels. A point at an epipole, which
    has no line, is infinitely far.

    Source: Hartley and Zisserman, "Multiple View Geometry", 11.4.
    """
    matrix = np.asarray(fundamental, np.float64)
    starts, ends = _homogeneous(first), _homogeneous(second)
    lines, back = starts @ matrix.T, ends @ matrix
    residual = np.abs(np.einsum("ni,ni->n", ends, lines))
    lengths = np.linalg.norm(lines[:, :2], axis=1), np.linalg.norm(back[:, :2], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        distances = residual * (1 / lengths[0] + 1 / lengths[1]) / 2
    return np.where((lengths[0] > 0) & (lengths[1] > 0), distances, np.inf)


def corner_error(estimate: Transform, homography: Transform, width: int, height: int) -> float:
    """Mean pixels, in the second photo, between where the estimate and the truth send the first photo's four corners.

    estimate: (2, 3) affine or (3, 3). homography: (3, 3). width, height: of the first photo.

    Source: DeTone et al., "SuperPoint", CVPRW 2018.
    """
    corners = np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], np.float64)
    truth = _sent(homography, corners)
    return float(np.linalg.norm(_sent(estimate, corners) - truth, axis=1).mean())


def error_area(error: float, threshold: float) -> float:
    """What one error adds to the area under the curve of errors up to a threshold: 1 for none, 0 from the threshold on.

    The mean over pairs is the area under their cumulative curve, a share of the whole.
    """
    return max(0.0, 1 - error / threshold)


def _require(relevant: Collection[str]) -> None:
    if not relevant:
        raise ValueError("a ranking is judged by at least one relevant image")


def _rights(ranking: Sequence[str], relevant: Collection[str], junk: Collection[str]) -> list[bool]:
    """Whether each image of the ranking is relevant, without the junk."""
    return [image in relevant for image in ranking if image not in junk]


def _homogeneous(points: npt.ArrayLike) -> Floats:
    array = np.asarray(points, np.float64).reshape(-1, 2)
    return np.column_stack([array, np.ones(len(array))])


def _sent(transform: Transform, points: npt.ArrayLike) -> Floats:
    """Points after a transform, (N, 2); infinite where it has none in front of the camera."""
    matrix = np.asarray(transform, np.float64)
    sent = _homogeneous(points) @ matrix.T
    if len(matrix) == 2:
        return sent
    # A homography's sign is free: the first photo's origin says which side is in front.
    sign = np.sign(matrix[2, 2]) or 1.0
    depth = sent[:, 2] * sign
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(depth[:, None] > 0, sent[:, :2] / sent[:, 2:], np.inf)
