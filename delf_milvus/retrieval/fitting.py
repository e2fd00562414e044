"""Least squares on what a transform explains, again and again: the best transform of each pair of photos."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from delf_milvus.retrieval.frame import MAX_SCALE, ComplexArray, Float64Array, Matched, square

BoolArray = npt.NDArray[np.bool_]

SIMILARITY_FITS = 1
AFFINE_FITS = 2

MAX_SHEAR = 0.6
"""Largest |b| / |a| of an affine transform a q + b conj(q) + t: one direction is stretched 4 times as much as another,
as on a surface seen at 75 degrees. Above 1 the transform would mirror."""

PRIOR = 1000.0
"""Strength (squared pixels of the frame) with which a similarity holds an affine transform that few matches define."""

MIN_WIDTH = 4.0
"""Standard deviation (pixels of the frame) across the inliers below which they lie on a line, or at a point."""


def allowed(a: npt.ArrayLike, b: npt.ArrayLike, residual: float) -> Float64Array:
    """Most squared distance of an inlier in the image: less where the transform shrinks, in proportion to its zoom.

    A transform that shrinks the query into a corner of the image brings everything there near to everything; but the
    keypoints of a small thing are not known as much better as it is smaller.
    """
    zoom: Float64Array = np.sqrt(np.maximum(np.abs(a) ** 2 - np.abs(b) ** 2, 0))
    return np.minimum(zoom, 1.0) * residual**2


def fit(
    transforms: ComplexArray, matched: Matched, residual: float, min_inliers: int
) -> tuple[ComplexArray, BoolArray]:
    """The best transform of each pair, (N, 3), rows (a, b, t), and whether it proves anything, (N,).

    Best of the proposed ones, (N, B, 3), and of what least squares makes of them is the largest sum of
    1 - (distance / residual)^2 over the inliers: like their number, but precise fits win.
    """
    q, x, _, weight, *_ = matched
    ones = np.ones(q.shape)
    design = np.stack([q.real, q.imag, ones], axis=1)
    monomials = np.stack([ones, q, x, square(q), q * q, x * q.conj(), x * q, square(x), x * x], axis=2)
    monomials = (weight[:, :, None] * monomials).view(np.float64)
    best, best_score = transforms, np.zeros(transforms.shape[:2])
    fits = SIMILARITY_FITS + AFFINE_FITS
    for step in range(fits + 1):
        agreement = _agreement(transforms, design, x, residual)
        moments = ((agreement >= 0).astype(np.float64) @ monomials).view(np.complex128).transpose(2, 0, 1)
        n = np.maximum(moments[0].real, 1e-9)
        q1, x1, qq, q2, xq, qx, xx, x2 = moments[1:] / n
        qq, q2 = qq.real - square(q1), q2 - q1 * q1
        xx, x2 = xx.real - square(x1), x2 - x1 * x1
        # Half of each difference is the smaller eigenvalue of the covariance: the variance across the inliers.
        across = np.minimum(qq - np.abs(q2), xx - np.abs(x2)) / 2
        total = (np.maximum(agreement, 0, out=agreement) @ weight[:, :, None])[:, :, 0]
        score = np.where(across >= MIN_WIDTH**2, total, 0)
        better = score > best_score
        best, best_score = np.where(better[:, :, None], transforms, best), np.where(better, score, best_score)
        if step == fits:
            break

        # The least squares of a q + b conj(q) + t with a penalty on b alone; a similarity is its limit, b = 0.
        xq, qx, scatter = xq - x1 * q1.conj(), qx - x1 * q1, np.maximum(qq, 1e-9)
        a, b = xq / scatter, np.zeros(n.shape, np.complex128)
        if step >= SIMILARITY_FITS:
            held = scatter + PRIOR / n
            determinant = scatter * held - square(q2)
            affine_a = (xq * held - qx * q2.conj()) / determinant
            affine_b = (qx * scatter - xq * q2) / determinant
            sane = (n >= min_inliers) & (np.abs(affine_b) <= MAX_SHEAR * np.abs(affine_a))
            a, b = np.where(sane, affine_a, a), np.where(sane, affine_b, b)
        zoom = np.abs(a)
        possible = (zoom >= 1 / MAX_SCALE) & (zoom <= MAX_SCALE)
        fitted = np.stack([a, b, x1 - a * q1 - b * q1.conj()], axis=2)
        transforms = np.where(possible[:, :, None], fitted, transforms)

    every, winner = np.arange(len(q)), best_score.argmax(axis=1)
    return best[every, winner], best_score[every, winner] > 0


def _agreement(transforms: ComplexArray, design: Float64Array, x: ComplexArray, residual: float) -> Float64Array:
    """(N, B, W): 1 where a transform takes a match exactly to its point in the image, 0 at the residual, then less."""
    a, b, t = transforms.transpose(2, 0, 1)
    right = np.stack([a.real + b.real, b.imag - a.imag, t.real], axis=2) @ design
    down = np.stack([a.imag + b.imag, a.real - b.real, t.imag], axis=2) @ design
    right -= x.real[:, None]
    down -= x.imag[:, None]
    np.square(right, out=right)
    right += np.square(down, out=down)
    right /= -allowed(a, b, residual)[:, :, None]
    right += 1
    return right
