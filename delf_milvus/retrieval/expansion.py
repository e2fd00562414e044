"""Query expansion: what the best answers prove to show of the query's thing joins the query.

An image that is verified beyond doubt shows the query's thing from another side, in other light, or with more of it in
view. Its features, moved into the query's frame by the inverse of the verified transform, find what the query alone
does not. Source: total recall by spatially verified expansion (Chum et al., ICCV 2007), here on single local features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from delf_milvus.features import Box, Features
from delf_milvus.retrieval.matching import Matches
from delf_milvus.retrieval.verification import Verification

Found = tuple[Features, Matches, Verification]
"""Features of a verified image, its putative matches with the query, and its verification."""


MOST = 500
"""Features that may join a query."""


def expanded(query: Features, found: Sequence[Found], box: Box, most: int = MOST) -> Features:
    """The query with features of verified images, in falling attention.

    found: best first. A feature of an image joins where the inverse of the image's transform puts it inside `box`
    (x0, y0, x1, y1, pixels of the query photo), unless it is matched with a feature of the query: then that one's
    descriptor becomes the mean of all that match it. most: features that may join, each image an equal share of them.
    Images without a transform are left out.
    """
    sums = query.descriptors.astype(np.float64)
    locations, scales, attention = [query.locations], [query.scales], [query.attention]
    descriptors: list[npt.NDArray[np.float32]] = []
    x0, y0, x1, y1 = box
    usable = [one for one in found if one[2].transform is not None]
    for image, matches, verification in usable:
        rows, columns = matches.query[verification.mask], matches.candidate[verification.mask]
        sums[rows] += image.descriptors[columns]
        moved, zoom = _back(image, verification)
        free = np.ones(len(image), np.bool_)
        free[columns] = False
        free &= ((moved >= (x0, y0)) & (moved < (x1, y1))).all(axis=1)
        chosen = np.flatnonzero(free)[: most // len(usable)]
        locations.append(moved[chosen].astype(np.float32))
        scales.append((image.scales[chosen] * zoom).astype(np.float32))
        attention.append(image.attention[chosen])
        descriptors.append(image.descriptors[chosen])
    sums /= np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    order = np.argsort(-np.concatenate(attention), kind="stable")
    return Features(
        np.concatenate(locations)[order],
        np.concatenate(scales)[order],
        np.concatenate(attention)[order],
        np.concatenate([sums.astype(np.float32), *descriptors])[order],
        query.width,
        query.height,
        query.global_descriptor,
    )


def _back(image: Features, verification: Verification) -> tuple[npt.NDArray[np.float64], float]:
    """Where the features of an image lie in the query, (N, 2), and by how much their scales change."""
    assert verification.transform is not None
    linear, shift = verification.transform[:, :2], verification.transform[:, 2]
    inverse = np.linalg.inv(linear)
    return (image.locations - shift) @ inverse.T, float(np.sqrt(abs(np.linalg.det(inverse))))
