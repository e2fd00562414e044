"""Which images come into question for a query, and in which order they are looked at.

Two views are added. Votes of the local descriptors see details, and the same thing from near and far, partly hidden or
among others; the global descriptor sees what the whole photo is of, where details have changed too much. Both count
above their crowd: a vote what it is nearer than the query feature's last neighbour, an image what its global descriptor
is more similar than that of the last image that was found so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from delf_milvus.retrieval.matching import Matches
from delf_milvus.retrieval.ranking import relative
from delf_milvus.retrieval.voting import Votes

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]

NOBODY: tuple[Int64Array, Float32Array] = (np.empty(0, np.int64), np.empty(0, np.float32))
"""Keys and similarities where there is no global descriptor to search with."""


@dataclass(frozen=True, eq=False)
class Shortlist:
    """Images in falling score (ties: by key).

    images: (I,) int64, image keys. scores: (I,) float64, never negative. votes: of the local descriptors; rows: (I,)
    intp, where an image is among them, -1 without a vote. similarities: (I,) float32, of the global descriptors, NaN
    where it was not among those found. whole: (I,) float64, what these add to the scores.
    """

    images: Int64Array
    scores: npt.NDArray[np.float64]
    votes: Votes
    rows: npt.NDArray[np.intp]
    similarities: Float32Array
    whole: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.images)

    def hits(self, rank: int, threshold: float = -1.0) -> Matches:
        """The votes for the image of this rank (0 is the best) as putative matches, as of `Votes.hits`."""
        if self.rows[rank] < 0:
            none = np.empty(0, np.intp)
            return Matches(none, none, np.empty(0, np.float32))
        return self.votes.hits(int(self.rows[rank]), threshold)

    def recounted(self, ranks: Sequence[int], votes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The scores, (N,), of the images of these ranks, had they so many votes, (N,)."""
        return relative(votes) + self.whole[list(ranks)]


def shortlist(votes: Votes, keys: Int64Array, similarities: Float32Array, weight: float) -> Shortlist:
    """Add the votes and the similarities of global descriptors, each divided by the mean of its five largest values.

    keys: (N,) int64, the images found by their global descriptors, each once; similarities: (N,) float32. weight: of
    the similarities, 0.25 in the paper (Noh et al., ICCV 2017, section 5.3).
    """
    images = np.union1d(votes.images, keys)
    rows = np.full(len(images), -1, np.intp)
    rows[np.searchsorted(images, votes.images)] = np.arange(len(votes))
    local = np.where(rows >= 0, np.append(votes.scores, 0.0)[rows], 0.0)
    known = np.full(len(images), np.nan, np.float32)
    known[np.searchsorted(images, keys)] = similarities
    # A single image has no crowd to compare with; nor has an unlike one any say.
    crowd = max(float(similarities.min()), 0.0) if len(keys) > 1 else 0.0
    whole = np.nan_to_num(np.maximum(known.astype(np.float64) - crowd, 0.0))
    whole = weight * relative(whole)
    scores = relative(local) + whole
    order = np.argsort(-scores, kind="stable")
    return Shortlist(images[order], scores[order], votes, rows[order], known[order], whole[order])
