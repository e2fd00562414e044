"""Geometric proof: the one transform between two photos that most putative matches agree on.

DELF keypoints carry a scale, so each match alone proposes a scale and a translation; where photos are rotated against
each other, two matches propose a rotation as well, and their scales sort out most of the pairs that cannot be right
(`proposing`); where an extractor gives all keypoints one scale, two matches propose any change of scale. Every proposal
is scored against every match with one matrix product; the best are refined by least squares, first as similarities,
then as affine transforms, each time on the matches that the last fit explains (`fitting`: local optimisation). There is
no random sampling, and nothing depends on other pairs: the same bytes on every run, in any order, on any number of
threads.

Lengths are compared in pixels of a photo with a longest side of 640, `FRAME`, whatever the size of the real one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from delf_milvus.features import Box
from delf_milvus.retrieval.fitting import allowed, fit
from delf_milvus.retrieval.frame import FRAME, MAX_SCALE, OUTSIDE, PLACE, Matched
from delf_milvus.retrieval.matching import Matches, single_blas_thread
from delf_milvus.retrieval.proposing import propose

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
ComplexArray = npt.NDArray[np.complex128]
IntArray = npt.NDArray[np.intp]
BoolArray = npt.NDArray[np.bool_]

GRID = 8
"""Cells a side into which the query photo is divided to see how far the inliers spread."""

SCALE_AGREEMENT = 0.75
"""Octaves between a match's change of scale and the transform's: pyramids step by half an octave."""

WIDTH = 64
"""Pairs are computed together whose numbers of matches round up to the same multiple of this: the shape of the arrays,
and with it the order of every sum, depends on the pair alone."""

TOGETHER = 16
"""Pairs that are computed together at most: what they need stays in the cache."""


class Keypoints(NamedTuple):
    """Where the features of a photo lie.

    points: (N, 2) float32, x then y, pixels. scales: (N,) float32, positive. size: (width, height) in pixels.
    """

    points: Float32Array
    scales: Float32Array
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Verification:
    """What geometry says about one pair of photos.

    inliers: number of distinct places that agree, counted in the photo that has fewer of them: features of several
        scales around one spot count once.
    mask: (M,) bool, the matches that agree with the transform.
    transform: (2, 3) float64, from pixels of the query to pixels of the image; None if there is no proof.
    residuals: (M,) float32, distance of each match from the transform, in pixels of the image; zeros without one.
    cells: cells of an 8 x 8 grid over the query photo in which inliers lie.
    scale_agreement: share of the inliers whose own change of scale is the transform's, to within 0.75 octaves.
    """

    inliers: int
    mask: BoolArray
    transform: Float64Array | None
    residuals: Float32Array
    cells: int
    scale_agreement: float


def verify(
    query_points: Float32Array,
    query_scales: Float32Array,
    image_points: Float32Array,
    image_scales: Float32Array,
    *,
    query_size: tuple[int, int],
    image_size: tuple[int, int],
    residual: float,
    min_inliers: int,
) -> Verification:
    """Find the affine transform from query to image that the most matches agree on.

    query_points, image_points: (M, 2), pixels; query_scales, image_scales: (M,), positive; row i of each is match i.
        Matches come in falling similarity, for the first ones propose.
    query_size, image_size: (width, height) in pixels.
    residual: most distance of an inlier, in pixels of an image with a longest side of 640; less where the image shows
        the thing smaller than the query does, in proportion to the square root of how much smaller.
    min_inliers: places that must agree before the transform may be affine; with fewer it stays a similarity, because
        an affine transform through so few proves nothing.
    There are no inliers with fewer than three matches, or if those that agree lie at one point or on one line.
    Raises ValueError for shapes that differ, values that are not finite, scales or sizes that are not positive.
    """
    if len(query_points) != len(image_points):
        raise ValueError(
            f"a match has two ends, not {len(query_points)} in the query and {len(image_points)} in the image"
        )
    every = np.arange(len(query_points))
    found = verify_many(
        Keypoints(query_points, query_scales, query_size),
        [Keypoints(image_points, image_scales, image_size)],
        [Matches(every, every, np.ones(len(every), np.float32))],
        residual=residual,
        min_inliers=min_inliers,
    )
    return found[0]


def verify_many(
    query: Keypoints, images: Sequence[Keypoints], matches: Sequence[Matches], *, residual: float, min_inliers: int
) -> list[Verification]:
    """`verify` of one query with each image: the same bytes, quicker.

    matches[i] belongs to images[i]; the arguments are as in `verify`, and so are the errors.
    """
    if not residual > 0:
        raise ValueError(f"the residual must be positive, not {residual}")
    query_zoom = _checked_zoom(query)
    found: list[Verification] = [_nothing(len(m.query)) for m in matches]
    has_scales = [_differ(query.scales) or _differ(image.scales) for image in images]
    images = [_matched_part(image, m) for image, m in zip(images, matches, strict=True)]
    zooms = [_checked_zoom(image) for image in images]
    with single_blas_thread():
        for rows in _alike([len(m.query) for m in matches]):
            some = [(images[i], zooms[i], matches[i].query, has_scales[i]) for i in rows]
            for i, verification in zip(rows, _verified(query, query_zoom, some, residual, min_inliers), strict=True):
                found[i] = verification
    return found


def matched_box(
    transform: Float64Array | None, query_box: Box, image_size: tuple[int, int], inlier_points: Float32Array
) -> Box:
    """The box (x0, y0, x1, y1), in pixels of the image, of the region that shows what the query shows.

    It bounds the part of the transformed outline of `query_box` that lies in the image; without a transform, or if no
    part does, it bounds the inliers.

    transform: (2, 3), from query to image, or None. query_box: (x0, y0, x1, y1), pixels of the query.
    image_size: (width, height). inlier_points: (N, 2), pixels of the image.
    Raises ValueError if there is neither such a part nor an inlier.
    """
    right, bottom = image_size[0] - 1, image_size[1] - 1
    if transform is not None:
        x0, y0, x1, y1 = query_box
        outline = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]) @ transform[:, :2].T + transform[:, 2]
        image = np.array([(0, 0), (right, 0), (right, bottom), (0, bottom)], np.float32)
        area, region = cv2.intersectConvexConvex(outline.astype(np.float32), image)
        if area > 0 and region is not None:
            inlier_points = region.reshape(-1, 2).astype(np.float32)
    if len(inlier_points) == 0:
        raise ValueError("no region: the transform leaves the image, and there are no inliers")
    low = np.clip(inlier_points.min(axis=0), 0, (right, bottom))
    high = np.clip(inlier_points.max(axis=0), 0, (right, bottom))
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def _alike(counts: Sequence[int]) -> Iterator[list[int]]:
    """Pairs to compute together, by number; without those whose matches are too few to prove anything."""
    widths: dict[int, list[int]] = {}
    for i, count in enumerate(counts):
        if count >= 3:
            widths.setdefault(-(-count // WIDTH), []).append(i)
    for rows in widths.values():
        for start in range(0, len(rows), TOGETHER):
            yield rows[start : start + TOGETHER]


def _verified(
    query: Keypoints,
    query_zoom: float,
    images: Sequence[tuple[Keypoints, float, IntArray, bool]],
    residual: float,
    min_inliers: int,
) -> list[Verification]:
    """Verify pairs of one width. images: keypoints of the matches, zoom, the matched features of the query, and whether
    scales say anything."""
    counts = np.array([len(rows) for _, _, rows, _ in images])
    pairs, width = len(images), int(-(-counts.max() // WIDTH) * WIDTH)
    valid = np.arange(width) < counts[:, None]

    def padded(parts: Sequence[npt.NDArray[np.generic]], fill: float) -> Float64Array:
        array = np.full((pairs, width, *parts[0].shape[1:]), fill)
        array[valid] = np.concatenate(parts)
        return array

    rows = np.concatenate([rows for _, _, rows, _ in images])
    has_scales = np.array([has for *_, has in images])
    image_zoom = np.array([zoom for _, zoom, _, _ in images])
    points = padded([query.points[rows]], 0.0)
    q = points.view(np.complex128)[..., 0] * query_zoom
    x = padded([image.points for image, *_ in images], 0.0).view(np.complex128)[..., 0] * image_zoom[:, None]
    ratio = padded([image.scales for image, *_ in images], 1.0) / padded([query.scales[rows]], 1.0)
    ratio = np.clip(ratio * (image_zoom[:, None] / query_zoom), 1 / MAX_SCALE, MAX_SCALE)
    query_place, image_place = _place(q), _place(x)
    q_middle = complex(*query.size) * (query_zoom / 2)
    x_middle = np.array([complex(*image.size) for image, *_ in images]) * (image_zoom / 2)
    weight = 1 / _repeats(query_place << _PLACE_BITS | image_place, valid)
    matched = Matched(q - q_middle, x - x_middle[:, None], ratio, np.where(valid, weight, 0.0), counts, has_scales)

    transforms, proven = fit(propose(matched, residual), matched, residual, min_inliers)
    a, b, t = transforms.T
    distance = np.abs(a[:, None] * matched.q + b[:, None] * matched.q.conj() + t[:, None] - matched.x)
    mask = (distance**2 <= allowed(a, b, residual)[:, None]) & valid & proven[:, None]

    linear = np.array([[a.real + b.real, b.imag - a.imag], [a.imag + b.imag, a.real - b.real]]).transpose(2, 0, 1)
    shift = t + x_middle - a * q_middle - b * q_middle.conjugate()
    moved = np.concatenate([linear * query_zoom, np.stack([shift.real, shift.imag], axis=1)[:, :, None]], axis=2)
    moved /= image_zoom[:, None, None]
    inliers = np.minimum(_distinct(query_place, mask), _distinct(image_place, mask))
    cell = np.clip(points * (GRID / np.array(query.size)), 0, GRID - 1).astype(np.int64)
    cells = _distinct(cell[..., 0] * GRID + cell[..., 1], mask)
    octaves = np.log2(ratio) - np.log2(np.abs(a) ** 2 - np.abs(b) ** 2)[:, None] / 2
    agreeing = np.count_nonzero(mask & (np.abs(octaves) <= SCALE_AGREEMENT), axis=1)
    agreement = agreeing / np.maximum(np.count_nonzero(mask, axis=1), 1)
    distance /= image_zoom[:, None]
    return [
        Verification(
            int(inliers[i]),
            mask[i, :count],
            moved[i],
            distance[i, :count].astype(np.float32),
            int(cells[i]),
            float(agreement[i]),
        )
        if proven[i]
        else _nothing(count)
        for i, count in enumerate(counts.tolist())
    ]


def _matched_part(image: Keypoints, matches: Matches) -> Keypoints:
    return Keypoints(image.points[matches.candidate], image.scales[matches.candidate], image.size)


def _checked_zoom(keypoints: Keypoints) -> float:
    """Pixels of the frame in one pixel of the photo."""
    points, scales, size = keypoints
    if scales.ndim != 1 or points.shape != (len(scales), 2):
        raise ValueError(f"points must be of shape (M, 2) and scales (M,), not {points.shape} and {scales.shape}")
    if not min(size) > 0:
        raise ValueError(f"a photo has at least one pixel, not {size[0]} x {size[1]}")
    if not (np.isfinite(points).all() and np.isfinite(scales).all()):
        raise ValueError("points and scales must be finite")
    if len(scales) and not scales.min() > 0:
        raise ValueError("scales must be positive")
    if len(points) and np.abs(points).max() > OUTSIDE * max(size):
        raise ValueError(f"points must lie in their photo of {size[0]} x {size[1]} pixels")
    return FRAME / max(size)


def _differ(scales: Float32Array) -> bool:
    """Whether the scales of a photo's keypoints tell them apart."""
    return len(scales) > 0 and bool((scales != scales[0]).any())


def _nothing(count: int) -> Verification:
    return Verification(0, np.zeros(count, np.bool_), None, np.zeros(count, np.float32), 0, 0.0)


_PLACE_BITS = 20


def _place(points: ComplexArray) -> npt.NDArray[np.int64]:
    """One number for each place. Rounding, not flooring: cells of the pyramid lie at multiples of the place's size."""
    half = 1 << (_PLACE_BITS // 2 - 1)
    column, row = np.rint(points.real / PLACE).astype(np.int64), np.rint(points.imag / PLACE).astype(np.int64)
    return (column + half) << (_PLACE_BITS // 2) | (row + half)


def _repeats(values: npt.NDArray[np.int64], valid: BoolArray) -> Float64Array:
    """(N, W): how often a value occurs among the valid ones of its row; 1 elsewhere."""
    repeats = np.ones(values.shape)
    pair = np.nonzero(valid)[0]
    _, inverse, counts = np.unique(pair << 2 * _PLACE_BITS | values[valid], return_inverse=True, return_counts=True)
    repeats[valid] = counts[inverse]
    return repeats


def _distinct(values: npt.NDArray[np.int64], mask: BoolArray) -> IntArray:
    """(N,): number of different values where the mask is set, by row."""
    pair = np.nonzero(mask)[0]
    different = np.unique(pair << _PLACE_BITS | values[mask])
    return np.bincount(different >> _PLACE_BITS, minlength=len(values))
