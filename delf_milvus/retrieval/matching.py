"""Putative matches between two photos: mutual nearest neighbours among their descriptors.

Exact (no index, no approximation) and bit-identical on every run: a matrix product may round differently when BLAS
splits it over threads, so each one runs on a single thread; so it is quickest, too, beside other load.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

_ROWS = 256
"""Query descriptors multiplied at once: with 1000 stored ones, the block of similarities stays in the L2 cache."""


class Matches(NamedTuple):
    """Putative matches, one-to-one, in falling similarity (ties: by query index).

    query: (M,) intp, index of the query's feature.
    candidate: (M,) intp, index (ordinal) of the candidate's feature.
    similarity: (M,) float32, cosine.
    """

    query: IntArray
    candidate: IntArray
    similarity: Float32Array


@functools.cache
def _controller() -> ThreadpoolController:
    libraries = ThreadpoolController().select(user_api="blas")
    # One that runs on OpenMP has a setting for each thread: one thread cannot restore it for another.
    shared = [lib.filepath for lib in libraries.lib_controllers if getattr(lib, "threading_layer", "") != "openmp"]
    return libraries.select(filepath=shared)


_lock = threading.Lock()
_users = 0
_limiter: Any = None


def _release_control() -> None:
    """Let any thread set the limit: newer threadpoolctl ignores all but the one that set it first, and who leaves last
    need not be who entered first."""
    for library in _controller().lib_controllers:
        if hasattr(library, "clear_controlling_thread"):
            library.clear_controlling_thread(force=True)


@contextmanager
def single_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread while anybody is inside; may be nested and entered from several threads.

    BLAS has one setting a process, so the first to enter sets it and the last to leave restores it: were each to
    restore what it found, overlapping threads would leave the limit behind for good.
    """
    global _users, _limiter  # noqa: PLW0603
    with _lock:
        if _users == 0:
            _limiter = _controller().limit(limits=1)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _release_control()
                _limiter.restore_original_limits()
                _release_control()


def match(query: Float32Array, candidate: Float32Array, threshold: float) -> Matches:
    """Mutual nearest neighbours with a cosine similarity of at least `threshold`.

    query: (Q, D) and candidate: (C, D), float32, rows of unit L2 norm. Of equal similarities the lower index is nearer.
    Raises ValueError for arrays of another shape, unequal D or values that are not finite.
    """
    return match_many(query, [candidate], threshold)[0]


def match_many(query: Float32Array, candidates: Sequence[Float32Array], threshold: float) -> list[Matches]:
    """`match` of one query with each candidate: the same bytes, without the cost of setting up each time.

    query: (Q, D); candidates: (C_i, D) each; float32, rows of unit L2 norm.
    Raises ValueError for arrays of another shape, unequal D or values that are not finite.
    """
    return match_and_count(query, candidates, threshold, np.full(len(query), np.inf, np.float32))[0]


def match_and_count(
    query: Float32Array, candidates: Sequence[Float32Array], threshold: float, levels: Float32Array
) -> tuple[list[Matches], Float64Array]:
    """`match_many`, and each candidate's votes, (N,), as `voting` counts them, over all of its features.

    levels: (Q,) float32, similarity at which the crowd of each query feature begins; one of infinity has no vote.
    Errors as of `match_many`.
    """
    query = _checked(query, "query")
    matches, votes = [], np.zeros(len(candidates))
    with single_blas_thread():
        for row, candidate in enumerate(candidates):
            found, votes[row] = _match(query, _checked(candidate, "candidate"), threshold, levels)
            matches.append(found)
    return matches, votes


def soft_votes(best: npt.NDArray[np.floating[Any]], levels: Float32Array, hits: IntArray) -> Float64Array:
    """What the best hits, (H,), weigh that are so far above the level of their query feature, which has so many hits in
    the same image."""
    return np.maximum(best.astype(np.float64) - levels, 0) / np.sqrt(hits)


def _checked(descriptors: Float32Array, name: str) -> Float32Array:
    if descriptors.ndim != 2:
        raise ValueError(f"{name} descriptors must be of shape (N, D), not {descriptors.shape}")
    if not np.isfinite(descriptors).all():
        raise ValueError(f"{name} descriptors must be finite")
    return np.ascontiguousarray(descriptors, dtype=np.float32)


def _match(
    query: Float32Array, candidate: Float32Array, threshold: float, levels: Float32Array
) -> tuple[Matches, float]:
    if query.shape[1] != candidate.shape[1]:
        raise ValueError(f"the query has {query.shape[1]}-d descriptors, the candidate {candidate.shape[1]}-d ones")
    count = len(query)
    if count == 0 or len(candidate) == 0:
        return Matches(np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0, np.float32)), 0.0
    nearest = np.empty(count, np.intp)
    similarity = np.empty(count, np.float32)
    hits = np.ones(count, np.intp)
    counted = np.isfinite(levels).any()
    best = np.full(len(candidate), -np.inf, np.float32)  # over all query features, for each candidate feature
    block = np.empty((min(_ROWS, count), len(candidate)), np.float32)
    for start in range(0, count, _ROWS):
        rows = query[start : start + _ROWS]
        products = np.matmul(rows, candidate.T, out=block[: len(rows)])
        nearest[start : start + _ROWS] = indices = products.argmax(axis=1)
        similarity[start : start + _ROWS] = products[np.arange(len(rows)), indices]
        np.maximum(best, products.max(axis=0), out=best)
        if counted:
            above = products > levels[start : start + _ROWS, None]
            hits[start : start + _ROWS] = np.maximum(np.count_nonzero(above, axis=1), 1)
    mutual = np.flatnonzero((similarity == best[nearest]) & (similarity >= threshold))
    # Query features with the very same descriptor tie for a candidate's feature: written last, the first gets it.
    owner = np.empty(len(candidate), np.intp)
    owner[nearest[mutual[::-1]]] = mutual[::-1]
    mutual = mutual[owner[nearest[mutual]] == mutual]
    order = mutual[np.argsort(-similarity[mutual], kind="stable")]
    votes = float(soft_votes(similarity, levels, hits).sum()) if counted else 0.0
    return Matches(order, nearest[order], similarity[order]), votes
