"""Geometric proof: the one transform between two photos that most putative matches agree on.

DELF keypoints carry a scale, so each match alone proposes a scale and a translation; where photos are rotated against
each other, two matches propose a rotation as well, and their scales sort out most of the pairs that cannot be right.
Every proposal is scored against every match with one matrix product; the best are refined by least squares, first as
similarities, then as affine transforms, each time on the matches that the last fit explains (local optimisation).
There is no random sampling, and nothing depends on other pairs: the same bytes on every run, in any order, on any
number of threads.

Lengths are compared in pixels of a photo with a longest side of 640, `FRAME`, whatever the size of the real one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from delf_milvus.features import Box
from delf_milvus.retrieval.matching import Matches, single_blas_thread

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
ComplexArray = npt.NDArray[np.complex128]
IntArray = npt.NDArray[np.intp]
BoolArray = npt.NDArray[np.bool_]

FRAME = 640.0
"""Longest side, in pixels, of the frame in which lengths are compared."""

PLACE = 8.0
"""Keypoints closer than about this (pixels of the frame) are one place: windows of several pyramid scales around it."""

SINGLES = 192
"""Matches, the most similar ones, each of which proposes an upright transform."""

PAIRED = 56
"""Matches, the most similar ones, of which every two propose a rotated transform."""

MIN_DISTANCE = 40.0
"""Distance (pixels of the frame, in both photos) of two matches below which a rotation through them is all noise."""

PAIR_SCALE = 1.6
"""Factor between the scale that two matches propose and the one their own scales do: a bit above half an octave, the
step of the pyramid."""

REFINED = 8
"""Proposals that are refined."""

SIMILARITY_FITS = 1
AFFINE_FITS = 2

MAX_SCALE = 16.0
"""Largest change of scale between the two frames, either way."""

MAX_SHEAR = 0.6
"""Largest |b| / |a| of an affine transform a q + b conj(q) + t: one direction is stretched 4 times as much as another,
as on a surface seen at 75 degrees. Above 1 the transform would mirror."""

PRIOR = 1000.0
"""Strength (squared pixels of the frame) with which a similarity holds an affine transform that few matches define."""

OUTSIDE = 4.0
"""Photo sizes from the origin beyond which a point is an error rather than a keypoint at the border."""

MIN_WIDTH = 4.0
"""Standard deviation (pixels of the frame) across the inliers below which they lie on a line, or at a point."""

GRID = 8
"""Cells a side into which the query photo is divided to see how far the inliers spread."""

SCALE_AGREEMENT = 0.75
"""Octaves between a match's change of scale and the transform's: pyramids step by half an octave."""


_PAIRS = np.stack(np.tril_indices(PAIRED, -1))  # the first n (n - 1) / 2 are all pairs of the first n


class _Matched(NamedTuple):
    """Matches in the frame, points as complex numbers around their mean: a similarity is a q + t, and any affine
    transform a q + b conj(q) + t.

    q, x: (M,) complex128, in query and image. ratio: (M,) change of scale.
    weight: (M,), 1 / number of matches between the same two places.
    """

    q: ComplexArray
    x: ComplexArray
    ratio: Float64Array
    weight: Float64Array


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
    with single_blas_thread():
        return _verify(
            Keypoints(query_points, query_scales, query_size),
            Keypoints(image_points, image_scales, image_size),
            residual,
            min_inliers,
        )


def verify_many(
    query: Keypoints, images: Sequence[Keypoints], matches: Sequence[Matches], *, residual: float, min_inliers: int
) -> list[Verification]:
    """`verify` of one query with each image: the same bytes, quicker.

    matches[i] belongs to images[i]; the arguments are as in `verify`, and so are the errors.
    """
    with single_blas_thread():
        return [
            _verify(
                Keypoints(query.points[rows], query.scales[rows], query.size),
                Keypoints(image.points[columns], image.scales[columns], image.size),
                residual,
                min_inliers,
            )
            for image, (rows, columns, _) in zip(images, matches, strict=True)
        ]


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


def _verify(query: Keypoints, image: Keypoints, residual: float, min_inliers: int) -> Verification:
    query_zoom, image_zoom = _checked_zoom(query), _checked_zoom(image)
    count = len(query.points)
    if count != len(image.points):
        raise ValueError(f"a match has two ends, not {count} in the query and {len(image.points)} in the image")
    if not residual > 0:
        raise ValueError(f"the residual must be positive, not {residual}")
    if count < 3:
        return _nothing(count)

    q, x = _complex(query.points) * query_zoom, _complex(image.points) * image_zoom
    ratio = image.scales.astype(np.float64) / query.scales * (image_zoom / query_zoom)
    ratio = np.clip(ratio, 1 / MAX_SCALE, MAX_SCALE)
    query_place, image_place = _place(q), _place(x)
    _, pair, repeats = np.unique(query_place + 1j * image_place, return_inverse=True, return_counts=True)
    q_mean, x_mean = q.mean(), x.mean()
    matched = _Matched(q - q_mean, x - x_mean, ratio, 1 / repeats[pair])

    found = _refine(_propose(matched, residual), matched, residual, min_inliers)
    if found is None:
        return _nothing(count)
    a, b, t = found
    distance = np.abs(a * matched.q + b * matched.q.conj() + t - matched.x)
    mask = distance**2 <= _allowed(a, b, residual)

    linear = np.array([[a.real + b.real, b.imag - a.imag], [a.imag + b.imag, a.real - b.real]])
    shift = t + x_mean - a * q_mean - b * q_mean.conjugate()
    cell = np.clip(query.points[mask] * (GRID / np.array(query.size)), 0, GRID - 1).astype(np.intp)
    octaves = np.log2(ratio[mask]) - np.log2(abs(a) ** 2 - abs(b) ** 2) / 2
    return Verification(
        inliers=min(len(np.unique(query_place[mask])), len(np.unique(image_place[mask]))),
        mask=mask,
        transform=np.column_stack([linear * query_zoom, (shift.real, shift.imag)]) / image_zoom,
        residuals=(distance / image_zoom).astype(np.float32),
        cells=len(np.unique(cell[:, 0] * GRID + cell[:, 1])),
        scale_agreement=float(np.mean(np.abs(octaves) <= SCALE_AGREEMENT)),
    )


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


def _nothing(count: int) -> Verification:
    return Verification(0, np.zeros(count, np.bool_), None, np.zeros(count, np.float32), 0, 0.0)


def _allowed(a: npt.ArrayLike, b: npt.ArrayLike, residual: float) -> Float64Array:
    """Most squared distance of an inlier in the image: less where the transform shrinks, in proportion to its zoom.

    A transform that shrinks the query into a corner of the image brings everything there near to everything; but the
    keypoints of a small thing are not known as much better as it is smaller.
    """
    zoom: Float64Array = np.sqrt(np.maximum(np.abs(a) ** 2 - np.abs(b) ** 2, 0))
    return np.minimum(zoom, 1.0) * residual**2


def _complex(points: Float32Array) -> ComplexArray:
    return np.ascontiguousarray(points, np.float64).view(np.complex128)[:, 0]


def _square(z: ComplexArray) -> Float64Array:
    return z.real**2 + z.imag**2


def _place(points: ComplexArray) -> Float64Array:
    """One number for each place. Rounding, not flooring: cells of the pyramid lie at multiples of the place's size."""
    return np.rint(points.real / PLACE) * 2**20 + np.rint(points.imag / PLACE)


def _propose(matched: _Matched, residual: float) -> ComplexArray:
    """(B, 3), rows (a, b = 0, t): the similarities that are worth refining, best first."""
    q, x, ratio, weight = matched
    single = np.arange(min(len(q), SINGLES))
    i, turn = _rotations(matched)
    proposer = np.concatenate([single, i])
    a = np.concatenate([ratio[single].astype(np.complex128), turn])
    t = x[proposer] - a * q[proposer]

    # |a q + t - x|^2 - residual^2 is linear in what depends on the match, so that one product gives the agreement of
    # every proposal with every match: 1 for a perfect one, 0 at the residual.
    ta, qx = t.conj() * a, q * x.conj()
    of_match = [_square(q), np.ones(len(q)), _square(x), q.real, q.imag, qx.real, qx.imag, x.real, x.imag]
    allowed = _allowed(a, np.zeros(len(a)), residual)
    of_proposal = [_square(a), _square(t) - allowed, np.ones(len(a)), 2 * ta.real, -2 * ta.imag]
    of_proposal += [-2 * a.real, 2 * a.imag, -2 * t.real, -2 * t.imag]
    left = (np.array(of_proposal) / -allowed).astype(np.float32).T
    agreement = left @ np.array(of_match, np.float32)
    np.maximum(agreement, 0, out=agreement)
    score = agreement @ weight.astype(np.float32)

    chosen = []
    for _ in range(REFINED):
        best = int(score.argmax())
        if score[best] < 0:
            break
        chosen.append(best)
        score[best] = -1
        score[agreement[best, proposer] > 0] = -1  # a match that it explains proposes much the same
    return np.array([a[chosen], np.zeros(len(chosen)), t[chosen]]).T


def _rotations(matched: _Matched) -> tuple[IntArray, ComplexArray]:
    """(P,) first match and (P,) factor a (rotation and scale) of the pairs of matches that may be right."""
    q, x, ratio, _ = matched
    paired = min(len(q), PAIRED)
    i, j = _PAIRS[:, : paired * (paired - 1) // 2]
    dq, dx = q[i] - q[j], x[i] - x[j]
    query_length, image_length = _square(dq), _square(dx)
    expected = ratio[i] * ratio[j] * query_length
    possible = np.minimum(query_length, image_length) >= MIN_DISTANCE**2
    possible &= (image_length <= expected * PAIR_SCALE**2) & (image_length * PAIR_SCALE**2 >= expected)
    kept = np.flatnonzero(possible)
    return i[kept], dx[kept] / dq[kept]


def _refine(transforms: ComplexArray, matched: _Matched, residual: float, min_inliers: int) -> ComplexArray | None:
    """The best of the transforms (B, 3), rows (a, b, t), and of what least squares makes of them, or None.

    Best is the largest sum of 1 - (distance / residual)^2 over the inliers: like their number, but precise fits win.
    """
    q, x, _, weight = matched
    design = np.stack([q, q.conj(), np.ones(len(q))])
    monomials = np.stack([design[2], q, x, _square(q), q * q, x * q.conj(), x * q, _square(x), x * x], axis=1)
    monomials = (weight[:, None] * monomials).view(np.float64)
    best, best_score = transforms, np.zeros(len(transforms))
    fits = SIMILARITY_FITS + AFFINE_FITS
    for fit in range(fits + 1):
        allowed = _allowed(transforms[:, 0], transforms[:, 1], residual)
        agreement = 1 - _square(transforms @ design - x) / allowed[:, None]
        moments = ((agreement >= 0).astype(np.float64) @ monomials).view(np.complex128).T
        n = np.maximum(moments[0].real, 1e-9)
        q1, x1, qq, q2, xq, qx, xx, x2 = moments[1:] / n
        qq, q2 = qq.real - _square(q1), q2 - q1 * q1
        xx, x2 = xx.real - _square(x1), x2 - x1 * x1
        # Half of each difference is the smaller eigenvalue of the covariance: the variance across the inliers.
        across = np.minimum(qq - np.abs(q2), xx - np.abs(x2)) / 2
        score = np.where(across >= MIN_WIDTH**2, np.maximum(agreement, 0) @ weight, 0)
        better = score > best_score
        best, best_score = np.where(better[:, None], transforms, best), np.where(better, score, best_score)
        if fit == fits:
            break

        # The least squares of a q + b conj(q) + t with a penalty on b alone; a similarity is its limit, b = 0.
        xq, qx, scatter = xq - x1 * q1.conj(), qx - x1 * q1, np.maximum(qq, 1e-9)
        a, b = xq / scatter, np.zeros(len(n), np.complex128)
        if fit >= SIMILARITY_FITS:
            held = scatter + PRIOR / n
            determinant = scatter * held - _square(q2)
            affine_a = (xq * held - qx * q2.conj()) / determinant
            affine_b = (qx * scatter - xq * q2) / determinant
            sane = (n >= min_inliers) & (np.abs(affine_b) <= MAX_SHEAR * np.abs(affine_a))
            a, b = np.where(sane, affine_a, a), np.where(sane, affine_b, b)
        zoom = np.abs(a)
        possible = (zoom >= 1 / MAX_SCALE) & (zoom <= MAX_SCALE)
        fitted = np.stack([a, b, x1 - a * q1 - b * q1.conj()], axis=1)
        transforms = np.where(possible[:, None], fitted, transforms)

    winner = int(best_score.argmax())
    return best[winner] if best_score[winner] > 0 else None
