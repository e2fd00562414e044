"""How sure a figure is: intervals by the bootstrap, and whether two runs differ, over queries.

Values of a figure are (N,), one a query, or (N, C) where a query has several. A statistic makes one number of them.
Everything is drawn with a fixed seed: the same values give the same interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

StatisticName = Literal["mean", "median", "gap", "ece"]

BINS = 10
"""Bins of confidence, of equal width."""

LEVEL = 0.95
"""Share of resamples inside an interval."""

_DRAWS = 10_000
_LEAST_DRAWS = 1_000
_NUMBERS = 50_000_000  # drawn for one figure at most, a second of work
_BLOCK = 1_000_000  # numbers in memory at once


def _mean(values: Floats) -> Floats:
    return np.asarray(values.mean(axis=1))[:, 0]


def _median(values: Floats) -> Floats:
    return np.asarray(np.median(values, axis=1))[:, 0]


def _gap(values: Floats) -> Floats:
    """Of (B, N, 4): confidence, inliers, right, answerable; the inliers order what is equally sure."""
    order = np.lexsort((-values[..., 1], -values[..., 0]), axis=1)
    right = np.take_along_axis(values[..., 2], order, axis=1)
    precision = np.cumsum(right, axis=1) / np.arange(1, right.shape[1] + 1)
    # A resample may lack answerable queries altogether: it shows nothing.
    return np.asarray((precision * right).sum(axis=1) / np.maximum(values[..., 3].sum(axis=1), 1))


def reliability(values: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean confidence, share of right answers and weight of each of ten bins of confidence, (B, 10) each.

    values: (B, N, 3): confidence of a query's first answer, whether it is right, whether the query has a match.
    Queries with and without a match have half of the weight each, which is what a confidence speaks of.
    """
    confidence, right, answerable = (values[..., column] for column in range(3))
    with_match = answerable.mean(axis=1, keepdims=True)
    share = np.where(answerable > 0, 0.5 / np.maximum(with_match, 1e-12), 0.5 / np.maximum(1 - with_match, 1e-12))
    share = share / share.sum(axis=1, keepdims=True)
    bins = np.minimum((confidence * BINS).astype(np.intp), BINS - 1)
    weight, sure, true = (
        np.stack([np.where(bins == one, share * what, 0).sum(axis=1) for one in range(BINS)], axis=1)
        for what in (1.0, confidence, right)
    )
    held = np.maximum(weight, 1e-12)
    return sure / held, true / held, weight


def _ece(values: Floats) -> Floats:
    """Expected calibration error: how far confidence and share of right answers are apart, over ten bins."""
    sure, true, weight = reliability(values)
    return np.asarray((weight * np.abs(sure - true)).sum(axis=1))


_STATISTICS: dict[StatisticName, Callable[[Floats], Floats]] = {
    "mean": _mean,
    "median": _median,
    "gap": _gap,
    "ece": _ece,
}
"""From (B, N, C), B samples of N queries, to (B,)."""


@dataclass(frozen=True)
class Interval:
    """A figure with the 95 % interval of a percentile bootstrap over its queries."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """How much the second run's figure is above the first's, over the queries of both.

    low, high: 95 % interval of a paired bootstrap. p: share of runs with a difference at least as large, either way, if
    which run a query's values come from were left to chance: a sign-flip permutation test, two-sided.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float


def statistic(values: npt.ArrayLike, name: StatisticName) -> float:
    """The statistic of all queries' values, (N,) or (N, C). Raises ValueError without values."""
    return float(_STATISTICS[name](_columns(values)[None])[0])


def interval(values: npt.ArrayLike, name: StatisticName, seed: int = 0) -> Interval:
    """The statistic with its interval. Raises ValueError without values."""
    array = _columns(values)
    of = _STATISTICS[name]
    drawn = np.concatenate([of(array[rows]) for rows in _resamples(len(array), seed)])
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(of(array[None])[0]), float(low), float(high))


def difference(first: npt.ArrayLike, second: npt.ArrayLike, name: StatisticName, seed: int = 0) -> Difference:
    """Compare two runs over the same queries in the same order.

    Raises ValueError without values, or for values of different shapes.
    """
    one, other = _columns(first), _columns(second)
    if one.shape != other.shape:
        raise ValueError(f"values of the same queries have one shape, not {one.shape} and {other.shape}")
    of = _STATISTICS[name]
    a, b = float(of(one[None])[0]), float(of(other[None])[0])
    drawn = np.concatenate([of(other[rows]) - of(one[rows]) for rows in _resamples(len(one), seed)])
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    flipped = np.concatenate([_swapped(of, one, other, swap) for swap in _swaps(len(one), seed)])
    # What differs by rounding alone is as large.
    reached = int((np.abs(flipped) >= abs(b - a) - 1e-12).sum())
    return Difference(a, b, b - a, float(low), float(high), (1 + reached) / (1 + len(flipped)))


def _swapped(of: Callable[[Floats], Floats], one: Floats, other: Floats, swap: npt.NDArray[np.bool_]) -> Floats:
    where = swap[..., None]
    return of(np.where(where, one, other)) - of(np.where(where, other, one))


def _columns(values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, np.float64)
    if not len(array):
        raise ValueError("a figure needs at least one query")
    return array.reshape(len(array), -1)


def _blocks(queries: int) -> Iterator[int]:
    """Resamples of each block, so that the memory and the time of a figure are bounded."""
    left = int(np.clip(_NUMBERS // queries, _LEAST_DRAWS, _DRAWS))
    size = max(1, _BLOCK // queries)
    while left > 0:
        yield min(size, left)
        left -= size


def _resamples(queries: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    random = np.random.default_rng(seed)
    for size in _blocks(queries):
        yield random.integers(0, queries, (size, queries))


def _swaps(queries: int, seed: int) -> Iterator[npt.NDArray[np.bool_]]:
    random = np.random.default_rng(seed)
    for size in _blocks(queries):
        yield random.random((size, queries), np.float32) < 0.5
