"""What the stages of verification share: the frame in which lengths are compared, and matches in it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]
ComplexArray = npt.NDArray[np.complex128]
IntArray = npt.NDArray[np.intp]

FRAME = 640.0
"""Longest side, in pixels, of the frame in which lengths are compared."""

PLACE = 8.0
"""Keypoints closer than about this (pixels of the frame) are one place: windows of several pyramid scales around it."""

MAX_SCALE = 16.0
"""Largest change of scale between the two frames, either way."""

OUTSIDE = 4.0
"""Photo sizes from the origin beyond which a point is an error rather than a keypoint at the border."""


class Matched(NamedTuple):
    """Matches of N pairs of photos in the frame, points as complex numbers around the middle of their photo: a
    similarity is a q + t, and any affine transform a q + b conj(q) + t.

    Rows are padded to one width W; what is beyond `counts` has the weight 0.

    q, x: (N, W) complex128, in query and image. ratio: (N, W) float64, change of scale.
    weight: (N, W) float64, 1 / number of matches between the same two places.
    counts: (N,) matches of each pair, 3 at least.
    has_scales: (N,) bool, whether the keypoints' scales say anything: some extractors give all of them one.
    """

    q: ComplexArray
    x: ComplexArray
    ratio: Float64Array
    weight: Float64Array
    counts: IntArray
    has_scales: npt.NDArray[np.bool_]


def square(z: ComplexArray) -> Float64Array:
    """|z|^2."""
    return z.real**2 + z.imag**2
