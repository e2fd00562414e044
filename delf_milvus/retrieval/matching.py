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


class Near(NamedTuple):
    """A candidate's features that are nearer to the query's than levels.

    best: (Q,) float32, similarity of each query feature's nearest one, near or not. query: (H,) intp, in rising order,
    and similarity: (H,) float32, of all near ones.
    """

    best: Float32Array
    query: IntArray
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
    return match_and_gather(query, candidates, threshold)[0]


def match_and_gather(
    query: Float32Array, candidates: Sequence[Float32Array], threshold: float, levels: Float32Array | None = None
) -> tuple[list[Matches], list[Near]]:
    """`match_many`, and what of each candidate is nearer to the query's features than `levels`, (Q,); without them
    nothing is.

    Errors as of `match_many`.
    """
    query = _checked(query, "query")
    if levels is None:
        levels = np.full(len(query), np.inf, np.float32)
    with single_blas_thread():
        found = [_match(query, _checked(candidate, "candidate"), threshold, levels) for candidate in candidates]
    return [matches for matches, _ in found], [near for _, near in found]


def _checked(descriptors: Float32Array, name: str) -> Float32Array:
    if descriptors.ndim != 2:
        raise ValueError(f"{name} descriptors must be of shape (N, D), not {descriptors.shape}")
    if not np.isfinite(descriptors).all():
        raise ValueError(f"{name} descriptors must be finite")
    return np.ascontiguousarray(descriptors, dtype=np.float32)


def _match(
    query: Float32Array, candidate: Float32Array, threshold: float, levels: Float32Array
) -> tuple[Matches, Near]:
    if query.shape[1] != candidate.shape[1]:
        raise ValueError(f"the query has {query.shape[1]}-d descriptors, the candidate {candidate.shape[1]}-d ones")
    count = len(query)
    if count == 0 or len(candidate) == 0:
        none, nothing = np.empty(0, np.intp), np.empty(0, np.float32)
        return Matches(none, none, nothing), Near(np.full(count, -np.inf, np.float32), none, nothing)
    nearest = np.empty(count, np.intp)
    similarity = np.empty(count, np.float32)
    gathers = bool(np.isfinite(levels).any())
    near_query, near_similarity = [np.empty(0, np.intp)], [np.empty(0, np.float32)]
    best = np.full(len(candidate), -np.inf, np.float32)  # over all query features, for each candidate feature
    block = np.empty((min(_ROWS, count), len(candidate)), np.float32)
    for start in range(0, count, _ROWS):
        rows = query[start : start + _ROWS]
        products = np.matmul(rows, candidate.T, out=block[: len(rows)])
        nearest[start : start + _ROWS] = indices = products.argmax(axis=1)
        similarity[start : start + _ROWS] = products[np.arange(len(rows)), indices]
        np.maximum(best, products.max(axis=0), out=best)
        if gathers:
            near = np.flatnonzero(products > levels[start : start + _ROWS, None])
            near_query.append(near // len(candidate) + start)
            near_similarity.append(products.ravel()[near])
    mutual = np.flatnonzero((similarity == best[nearest]) & (similarity >= threshold))
    # Query features with the very same descriptor tie for a candidate's feature: written last, the first gets it.
    owner = np.empty(len(candidate), np.intp)
    owner[nearest[mutual[::-1]]] = mutual[::-1]
    mutual = mutual[owner[nearest[mutual]] == mutual]
    order = mutual[np.argsort(-similarity[mutual], kind="stable")]
    gathered = Near(similarity, np.concatenate(near_query), np.concatenate(near_similarity))
    return Matches(order, nearest[order], similarity[order]), gathered
