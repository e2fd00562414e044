"""What speaks for two photos showing the same thing, as numbers that can be weighed against each other.

The count of inliers alone is poor evidence: textures and plain backgrounds gather many by chance, and a thing seen from
another side has few. What chance does not arrange is that the matches are also many, similar, precise and spread out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from delf_milvus.retrieval.matching import Matches
from delf_milvus.retrieval.verification import FRAME, Keypoints, Verification

Float64Array = npt.NDArray[np.float64]

NAMES = ("inliers", "putatives", "similarity", "close", "precision", "cells", "spread", "contrast")
"""What each column is; see `evidence`."""

_LEAST_SIMILARITY = 0.6
_CLOSE = 0.7
"""Cosine similarity of a match that is rarely one of chance."""

_LEAST_RESIDUAL = 3.0
"""Residual (pixels of the frame) below which precision is that of the pyramid's grid."""

_FLOOR = 0.1


def evidence(
    query: Keypoints, images: Sequence[Keypoints], matches: Sequence[Matches], verifications: Sequence[Verification]
) -> Float64Array:
    """(N, len(NAMES)) float64, one row for each image that a query was compared with; all finite, larger is more.

    inliers: logarithm of their number by place. putatives: logarithm of the number of matches before geometry.
    similarity: logarithm of the sum, over the inliers, of what their cosine similarity is above 0.6.
    close: logarithm of the number of inliers with a similarity of at least 0.7. precision: logarithm of the reciprocal
    of the inliers' root mean square residual, pixels of a frame of 640. cells: logarithm of the number of cells of an
    8 x 8 grid over the query in which inliers lie. spread: geometric mean of the inliers' standard deviations along
    their two main axes, in sizes of the frame. contrast: by how many standard errors the inliers are more similar than
    the other matches.
    """
    rows = [_row(query, *one) for one in zip(images, matches, verifications, strict=True)]
    return np.array(rows, np.float64).reshape(len(rows), len(NAMES))


def _row(query: Keypoints, image: Keypoints, matches: Matches, verification: Verification) -> list[float]:
    mask, similarity = verification.mask, matches.similarity.astype(np.float64)
    putatives = np.log1p(len(similarity))
    if verification.transform is None or not mask.any():
        return [0.0, putatives, np.log(_FLOOR), 0.0, -np.log(FRAME), 0.0, 0.0, 0.0]
    inside, outside = similarity[mask], similarity[~mask]
    residuals = verification.residuals[mask].astype(np.float64) * (FRAME / max(image.size))
    places = query.points[matches.query[mask]].astype(np.float64) / max(query.size)
    places -= places.mean(axis=0)
    scatter = places.T @ places / len(places)
    contrast = 0.0
    if len(outside):
        error = inside.var() / len(inside) + outside.var() / len(outside) + 1e-4
        contrast = (inside.mean() - outside.mean()) / np.sqrt(error)
    return [
        np.log1p(verification.inliers),
        putatives,
        np.log(np.maximum(inside - _LEAST_SIMILARITY, 0).sum() + _FLOOR),
        np.log1p(np.count_nonzero(inside >= _CLOSE)),
        -np.log(max(np.sqrt(np.mean(residuals**2)), _LEAST_RESIDUAL)),
        np.log1p(verification.cells),
        max(scatter[0, 0] * scatter[1, 1] - scatter[0, 1] ** 2, 0.0) ** 0.25,
        contrast,
    ]
