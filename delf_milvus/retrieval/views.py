"""Several views of one query photo, searched one by one, and their answers as one.

A part of the photo has the whole budget of features and votes to itself, so that a thing that fills a tenth of it, or
one of four, is seen as if it were alone; turned photos are seen upright, for the descriptors have no orientation. Each
view is one more chance for a wrong answer, which is counted: with N views a false alarm is N times as likely.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from delf_milvus.features import Box
from delf_milvus.retrieval.answers import Correspondence, Hit, Transform
from delf_milvus.retrieval.regions import bounds, regions

PART = 0.6
"""Side of a part, of the photo's: parts overlap, so that a thing on a seam lies whole in one of them."""


@dataclass(frozen=True)
class View:
    """A part of a photo, turned.

    box: x0, y0, x1, y1, whole pixels of the photo. turns: quarter turns to the left, 0 to 3.
    """

    box: tuple[int, int, int, int]
    turns: int = 0

    @property
    def matrix(self) -> npt.NDArray[np.float64]:
        """(3, 3): pixels of the photo to pixels of the view."""
        x0, y0, x1, y1 = self.box
        right, bottom = x1 - x0 - 1, y1 - y0 - 1
        turned = (
            ((1, 0, 0), (0, 1, 0)),
            ((0, 1, 0), (-1, 0, right)),
            ((-1, 0, right), (0, -1, bottom)),
            ((0, -1, bottom), (1, 0, 0)),
        )[self.turns]
        return np.array([*turned, (0, 0, 1)], np.float64) @ np.array([(1, 0, -x0), (0, 1, -y0), (0, 0, 1)], np.float64)

    def cut(self, photo: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The view of a photo (H, W, 3)."""
        x0, y0, x1, y1 = self.box
        return np.ascontiguousarray(np.rot90(photo[y0:y1, x0:x1], self.turns))


def views_of(box: Box, *, parts: bool, turned: bool) -> list[View]:
    """The views of the part of a photo inside `box` (whole pixels), the upright whole first.

    parts: five more, of 0.6 of its sides: the corners and the middle. turned: the whole by a quarter, a half and three
    quarters too.
    """
    x0, y0, x1, y1 = map(int, box)
    whole = View((x0, y0, x1, y1))
    found = [whole]
    if turned:
        found += [replace(whole, turns=turns) for turns in (1, 2, 3)]
    if parts:
        wide, high = max(1, round((x1 - x0) * PART)), max(1, round((y1 - y0) * PART))
        right, bottom = x1 - wide, y1 - high
        places = [(x0, y0), (right, y0), (x0, bottom), (right, bottom), ((x0 + right) // 2, (y0 + bottom) // 2)]
        found += [View((x, y, x + wide, y + high)) for x, y in places]
    return found


def joined(
    seen: Sequence[tuple[View, Sequence[Hit]]],
    size: tuple[int, int],
    *,
    max_false_alarm: float,
    top: int,
    per_region: int,
) -> list[Hit]:
    """The hits of all views in pixels of the photo (width, height), each image once: where its proof is strongest.

    seen: the views and their hits, verified or not, without limits. Verified hits come first, in falling score, at most
    `per_region` for each region (0: all); then the others of the first view, in its order.
    """
    chances = len(seen)
    best: dict[str, Hit] = {}
    for view, hits in seen:
        for hit in hits:
            if not hit.verified:
                continue
            moved = _counted(_moved(hit, view), chances)
            other = best.get(hit.image_id)
            if other is None or (moved.false_alarm, -moved.score) < (other.false_alarm, -other.score):
                best[hit.image_id] = moved
    verified = sorted((hit for hit in best.values() if hit.false_alarm <= max_false_alarm), key=lambda hit: -hit.score)
    count: Counter[int] = Counter()
    shown: list[Hit] = []
    numbers = regions([hit.correspondence.query_points for hit in verified], size)
    for hit, number in zip(verified, numbers, strict=True):
        count[number] += 1
        if not per_region or count[number] <= per_region:
            shown.append(replace(hit, region=number))
    known = {hit.image_id for hit in verified}
    view, hits = seen[0]
    shown += [
        replace(_counted(_moved(hit, view), chances), verified=False, region=0)
        for hit in hits
        if hit.image_id not in known
    ]
    return [replace(hit, rank=rank) for rank, hit in enumerate(shown[:top], 1)]


def _counted(hit: Hit, chances: int) -> Hit:
    """A hit that is the best of so many chances: odds and false alarms divided and multiplied by them."""
    doubt = chances * (1 - hit.confidence)
    total = hit.confidence + doubt
    return replace(
        hit,
        false_alarm=min(1.0, chances * hit.false_alarm),
        confidence=hit.confidence / total if total > 0 else 0.0,
    )


def _moved(hit: Hit, view: View) -> Hit:
    """A hit of a view in pixels of the photo."""
    matrix = view.matrix
    points = hit.correspondence.query_points.astype(np.float64)
    inverse = np.linalg.inv(matrix)
    moved = (points @ inverse[:2, :2].T + inverse[:2, 2]).astype(np.float32)
    return replace(
        hit,
        transform=_composed(hit.transform, matrix),
        homography=_composed(hit.homography, matrix),
        query_box=bounds(moved),
        correspondence=Correspondence(moved, hit.correspondence.image_points, hit.correspondence.residuals),
    )


def _composed(transform: Transform | None, matrix: npt.NDArray[np.float64]) -> Transform | None:
    """The transform of the view after the view's own; (2, 3) stays so, and (3, 3)."""
    return None if transform is None else (np.array(transform) @ matrix).tolist()
