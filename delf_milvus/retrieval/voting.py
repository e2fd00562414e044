"""Which images the neighbours of a query's descriptors speak for.

Soft votes: a hit weighs as much as it is more similar than the query feature's last neighbour, for that one is where
the crowd of unrelated descriptors begins. Of each (query feature, image) only the best hit counts, divided by the
square root of the number of hits that this query feature has in this image, so that repeated structure (windows,
foliage) does not outvote distinctive detail. An image's score is the sum over the query's features.

The index has codes of features, and perhaps of a part of them only. Of the candidates all features are compared later,
and their votes are counted again (`match_and_recount`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from delf_milvus.features import ORDINAL_BITS
from delf_milvus.retrieval.matching import Matches, Near, match_and_gather, single_blas_thread

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]


_ROUNDED = np.float32(1e-5)
_GATHERED = 4
"""Near features, of the number of neighbours, from which on those that a level will leave out are dropped."""


@dataclass(frozen=True, eq=False)
class Votes:
    """Images in falling score (ties: by key), and the best hit of each (query feature, image).

    images: (I,) int64, image keys. scores: (I,) float64, never negative.
    query, ordinal: (H,) intp, the query's feature and the image's feature of a hit; similarity: (H,) float32.
        The hits of image i are rows offsets[i] to offsets[i + 1], in rising `query`.
    offsets: (I + 1,) intp.
    levels: (Q,) float32, similarity of each query feature's last neighbour; infinity where it has none.
    keys: (Q, K) int64 and similarities: (Q, K) float32, the neighbours themselves.
    """

    images: Int64Array
    scores: Float64Array
    query: IntArray
    ordinal: IntArray
    similarity: Float32Array
    offsets: IntArray
    levels: Float32Array
    keys: Int64Array
    similarities: Float32Array

    def __len__(self) -> int:
        return len(self.images)

    @property
    def bar(self) -> Float32Array:
        """(Q,) float32: what is more similar is nearer than the last neighbour, and not that one itself, whose
        similarity every way to compute it rounds differently."""
        return self.levels + _ROUNDED

    def hits(self, rank: int, threshold: float = -1.0) -> Matches:
        """The hits in the image of this rank (0 is the best) as putative matches: each of its features at most once.

        A feature of the image that several query features hit goes to the most similar one (ties: the lower index).
        threshold: least cosine similarity.
        """
        rows = slice(self.offsets[rank], self.offsets[rank + 1])
        query, ordinal, similarity = self.query[rows], self.ordinal[rows], self.similarity[rows]
        order = np.argsort(-similarity, kind="stable")
        order = order[similarity[order] >= threshold]
        order = order[np.sort(np.unique(ordinal[order], return_index=True)[1])]
        return Matches(query[order], ordinal[order], similarity[order])


def vote(keys: Int64Array, similarities: Float32Array) -> Votes:
    """Score images by the neighbours of Q query descriptors.

    keys: (Q, K) int64, `image_key << ORDINAL_BITS | ordinal` of each neighbour, -1 where there is none.
    similarities: (Q, K) float32, cosine; ignored where the key is -1. Neighbours may come in any order.
    A neighbour that is listed twice for one query feature counts once. A query feature with a single neighbour has no
    crowd to compare with and adds nothing; if all are so (K = 1), the similarity itself is the weight.
    Raises ValueError if the shapes differ or a similarity that counts is not finite.
    """
    if keys.ndim != 2 or keys.shape != similarities.shape:
        raise ValueError(f"keys {keys.shape} and similarities {similarities.shape} must have one shape (Q, K)")
    valid = keys >= 0
    if not np.isfinite(similarities[valid]).all():
        raise ValueError("similarities must be finite")
    if not valid.any():
        none, nothing = np.empty(0, np.intp), np.empty(0, np.float32)
        nowhere = np.full(len(keys), np.inf, np.float32)
        found = np.empty(0, np.int64), np.empty(0), none, none, nothing, np.zeros(1, np.intp)
        return Votes(*found, nowhere, keys, similarities)

    levels = np.where(valid, similarities, np.inf).min(axis=1).astype(np.float32)
    if (valid.sum(axis=1) <= 1).all():
        levels[np.isfinite(levels)] = 0

    # Sorted by key, a query feature's hits in one image are neighbours of each other, and so are repeated keys.
    # Equal keys may come in any order, for nothing below depends on it: the quick sort, not the stable one.
    order = np.argsort(keys, axis=1)
    valid = np.take_along_axis(valid, order, axis=1)
    key = np.take_along_axis(keys, order, axis=1)[valid]
    similarity = np.take_along_axis(similarities, order, axis=1)[valid]
    query = np.nonzero(valid)[0]
    image = key >> ORDINAL_BITS
    new_query = np.diff(query, prepend=-1) != 0
    new_key = new_query | (np.diff(key, prepend=-1) != 0)
    new_image = new_query | (np.diff(image, prepend=-1) != 0)
    starts = np.flatnonzero(new_image)

    best = np.maximum.reduceat(similarity, starts)
    hits = np.add.reduceat(new_key.astype(np.intp), starts)
    group = np.cumsum(new_image) - 1
    is_best = np.flatnonzero(similarity == best[group])
    row = is_best[np.diff(group[is_best], prepend=-1) != 0]  # the first of equal ones: the lower ordinal
    query, image, ordinal = query[starts], image[starts], key[row] & ((1 << ORDINAL_BITS) - 1)
    weight = _soft(best, levels[query], hits)

    images, inverse = np.unique(image, return_inverse=True)
    scores = np.bincount(inverse, weights=weight).astype(np.float64, copy=False)
    ranking = np.argsort(-scores, kind="stable")
    rank = np.empty_like(ranking)
    rank[ranking] = np.arange(len(ranking))
    rank_of_hit = rank[inverse]
    # As the smallest type that holds them: 16 bits and fewer are sorted by radix, several times faster.
    by_rank = np.argsort(rank_of_hit.astype(np.min_scalar_type(len(images))), kind="stable")
    offsets = np.zeros(len(images) + 1, np.intp)
    np.cumsum(np.bincount(rank_of_hit), out=offsets[1:])
    return Votes(
        images[ranking],
        scores[ranking],
        query[by_rank],
        ordinal[by_rank].astype(np.intp),
        best[by_rank].astype(np.float32, copy=False),
        offsets,
        levels,
        keys,
        similarities,
    )


def match_and_recount(
    query: Float32Array,
    images: Int64Array,
    candidates: Sequence[Float32Array],
    threshold: float,
    votes: Votes,
    share: float,
) -> tuple[list[Matches], Float64Array]:
    """The matches of a query with candidates, as of `match_many`, and these images' scores by all of their features.

    query: (Q, D); images: (N,) int64, their keys; candidates: (C_i, D) each. share: features of an image for each one
    of them in the index, 1 where that has all.

    Where the index has a part, its last neighbour is farther than the last of all features would be. Where that one is
    follows from what is known: all features of these images, and of the others those in the index, each of which stands
    for so many.
    """
    matches: list[Matches] = []
    near: list[Near] = []
    bar, most = votes.bar, _GATHERED * votes.keys.size
    with single_blas_thread():
        for candidate in candidates:
            found, gathered = match_and_gather(query, [candidate], threshold, bar)
            matches += found
            near += gathered
            if share > 1 and sum(len(one.query) for one in near) > most:
                bar = _levels(votes, bar, near)
                near = [_above(one, bar) for one in near]
    levels = bar
    if share > 1:
        others = (votes.keys >= 0) & ~np.isin(votes.keys >> ORDINAL_BITS, images)
        levels = _levels(votes, bar, near, (np.nonzero(others)[0], votes.similarities[others]), share)
    scores = np.zeros(len(near))
    for row, one in enumerate(near):
        hits = np.bincount(_above(one, levels).query, minlength=len(levels))
        scores[row] = _soft(one.best, levels, np.maximum(hits, 1)).sum()
    return matches, scores


def _soft(best: Float32Array, levels: Float32Array, hits: IntArray) -> Float64Array:
    """What best hits weigh, of query features with so many hits in the same image."""
    return np.maximum(best.astype(np.float64) - levels, 0) / np.sqrt(hits)


def _above(near: Near, levels: Float32Array) -> Near:
    kept = near.similarity > levels[near.query]
    return Near(near.best, near.query[kept], near.similarity[kept])


def _levels(
    votes: Votes,
    bar: Float32Array,
    near: Sequence[Near],
    others: tuple[IntArray, Float32Array] = (np.empty(0, np.intp), np.empty(0, np.float32)),
    share: float = 1.0,
) -> Float32Array:
    """(Q,): the similarity at which each query feature has as many neighbours as it has in the index, or `bar`.

    near: those above the bar, which count once. others: query features and similarities, which count `share` times.
    More that are found can only raise a level.
    """
    wanted = (votes.keys >= 0).sum(axis=1)
    if (wanted <= 1).all():
        return bar
    query = np.concatenate([*(one.query for one in near), others[0]])
    similarity = np.concatenate([*(one.similarity for one in near), others[1]])
    weight = np.ones(len(query))
    weight[len(query) - len(others[0]) :] = share
    order = np.lexsort((-similarity, query))
    query, similarity, weight = query[order], similarity[order], weight[order]
    reached = np.cumsum(weight)
    first = np.searchsorted(query, np.arange(len(wanted)))
    before = np.append(0.0, reached)[first]
    place = np.searchsorted(reached, before + wanted)
    known = place < np.searchsorted(query, np.arange(len(wanted)), side="right")
    levels = bar.copy()
    levels[known] = similarity[place[known]]
    return levels
