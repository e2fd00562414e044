"""What speaks for two photos showing the same thing, as numbers that can be weighed against each other.

The count of inliers alone is poor evidence: textures and plain backgrounds gather many by chance, and a thing seen from
another side has few. What chance does not arrange is that the matches are also many, and some of them very similar.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from delf_milvus.retrieval.matching import Matches
from delf_milvus.retrieval.verification import Keypoints, Verification

Float64Array = npt.NDArray[np.float64]

NAMES = ("inliers", "putatives", "close", "distinct", "spread", "contrast", "scale_agreement")
"""What each column is; see `evidence`."""

INLIERS, PUTATIVES = 0, 1

_CLOSE = 0.7
"""Cosine similarity of a match that is rarely one of chance."""

_DISTINCT = 0.8
"""Cosine similarity of a match that is hardly ever one of chance."""

SUPPORTED = 4
"""Matches that one inlier lets count as evidence, itself among them."""


def evidence(query: Keypoints, matches: Sequence[Matches], verifications: Sequence[Verification]) -> Float64Array:
    """(N, len(NAMES)) float64, all finite, one row for each image that a query was compared with.

    inliers: logarithm of 1 + their number by place. putatives: logarithm of 1 + the number of matches before geometry,
    of which each inlier lets four count at most: photos of one style have many that no transform explains. close:
    logarithm of 1 + the number of inliers with a similarity of at least 0.7. distinct: logarithm of 1 + the number of
    putative matches with one of at least 0.8, limited in the same way. spread: geometric mean of the inliers' standard
    deviations along their two main axes, in longest sides of the query: chance fills the photo, a thing its own part
    of it. contrast: by how many standard errors the inliers are more similar than the other matches. scale_agreement:
    share of the inliers whose scales agree with the transform.
    """
    rows = [_row(query, *one) for one in zip(matches, verifications, strict=True)]
    return np.array(rows, np.float64).reshape(len(rows), len(NAMES))


def _row(query: Keypoints, matches: Matches, verification: Verification) -> list[float]:
    mask, similarity = verification.mask, matches.similarity.astype(np.float64)
    if verification.transform is None or not mask.any():
        return [0.0] * len(NAMES)
    most = SUPPORTED * verification.inliers
    putatives, distinct = min(len(similarity), most), min(int(np.count_nonzero(similarity >= _DISTINCT)), most)
    inside, outside = similarity[mask], similarity[~mask]
    places = query.points[matches.query[mask]].astype(np.float64) / max(query.size)
    places -= places.mean(axis=0)
    (xx, xy), (_, yy) = places.T @ places / len(places)
    contrast = 0.0
    if len(outside):
        error = inside.var() / len(inside) + outside.var() / len(outside) + 1e-4
        contrast = (inside.mean() - outside.mean()) / np.sqrt(error)
    return [
        np.log1p(verification.inliers),
        np.log1p(putatives),
        np.log1p(np.count_nonzero(inside >= _CLOSE)),
        np.log1p(distinct),
        max(xx * yy - xy**2, 0.0) ** 0.25,
        contrast,
        verification.scale_agreement,
    ]
