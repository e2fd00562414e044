"""Figures of merit of a ranking."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def average_precision(ranking: Sequence[str], relevant: Collection[str], junk: Collection[str] = ()) -> float:
    """Area under the precision-recall curve by trapezoids, as the Oxford and Paris protocols compute it.

    Junk is taken out of the ranking, as if it were not in the collection; relevant images that the ranking lacks
    count as never found. Raises ValueError without relevant images: such queries are left out of a mean.
    """
    if not relevant:
        raise ValueError("average precision needs at least one relevant image")
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


def ns_score(ranking: Sequence[str], relevant: Collection[str]) -> int:
    """Relevant images among the first four answers: the score of UKBench, whose objects have four views each."""
    return sum(image in relevant for image in ranking[:4])
