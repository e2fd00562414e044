"""What a feature file says of one photo, before anything of it is believed, and how that becomes `Features`.

Sizes are bounded before anything is read or allocated: files come from strangers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from delf_milvus.errors import InputError, one_line
from delf_milvus.features import Features, Fingerprint, Float32Array

MAX_FILE_BYTES = 1 << 28
"""Largest feature file of one photo, bytes."""

MAX_ARRAY_BYTES = 1 << 28
"""Largest array of one photo, bytes."""

MAX_COUNT = 1 << 17
"""Most features of one photo in a file; how many of them are kept is another matter."""

MAX_DIM = 4096
"""Most components of a descriptor."""

MAX_SIDE = 1 << 24
"""Largest side of a photo, pixels."""

MAX_OUTSIDE = 2.0
"""Longest sides from the origin beyond which a keypoint is an error rather than one at the border."""

_UNIT = 1e-5
"""Distance of a descriptor's squared norm from 1 at which it is left as it is, to the last bit."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+()-]{0,99}")


@dataclass(frozen=True, eq=False)
class LocalFeatures:
    """The local features of one photo as a file has them.

    keypoints: (N, 2) float32, x then y, pixels of the photo, pixel centres at integers.
    descriptors: (N, D) float32, of any norm. scores, scales: (N,) float32, or None where the file has none.
    image_size: (width, height) in pixels, or None. global_descriptor: (G,) float32, of any norm, one vector of the
    whole photo, or None.
    extractor: who made them: a name, or the JSON of a `Fingerprint`, or "" where the file does not say.
    """

    keypoints: Float32Array
    descriptors: Float32Array
    scores: Float32Array | None = None
    scales: Float32Array | None = None
    image_size: tuple[int, int] | None = None
    extractor: str = ""
    global_descriptor: Float32Array | None = None

    @staticmethod
    def of(features: Features, extractor: str = "") -> LocalFeatures:
        """What is written of `features`."""
        return LocalFeatures(
            features.locations,
            features.descriptors,
            features.attention,
            features.scales,
            (features.width, features.height),
            extractor,
            features.global_descriptor if len(features.global_descriptor) else None,
        )

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Who made them, as far as the file says; raises ValueError where that is neither name nor fingerprint."""
        return None if not self.extractor else maker(self.extractor, self.descriptors.shape[1], self.global_dim)

    @property
    def global_dim(self) -> int:
        """Length of the global descriptor, 0 without one."""
        return 0 if self.global_descriptor is None else self.global_descriptor.shape[-1]

    def features(self, count: int, source: str) -> Features:
        """The `count` features of highest score; in the file's order where it has no scores, all with attention 1.

        Descriptors are scaled to unit L2 norm, and those of norm zero are left out. Without scales all are 1. Without a
        size the photo is taken to end at the outermost keypoints.
        source: what messages call the file.

        Raises InputError for shapes that do not fit each other, values that are not finite, scales that are not
        positive and keypoints far outside of the photo.
        """
        total = len(self.keypoints)
        dim = self.descriptors.shape[-1]
        shapes = {"keypoints": (total, 2), "descriptors": (total, dim), "scores": (total,), "scales": (total,)}
        if total > MAX_COUNT or not 1 <= dim <= MAX_DIM:
            damaged(source, f"it has {total:,} features of {dim:,} components; the limits are {MAX_COUNT:,}, {MAX_DIM}")
        for name, shape in shapes.items():
            values = getattr(self, name)
            if values is None:
                continue
            if values.shape != shape:
                damaged(source, f"its {name} are of shape {values.shape} where {shape} fits the keypoints")
            if not np.isfinite(values).all():
                damaged(source, f"its {name} hold values that are not finite")
        if self.scales is not None and (self.scales <= 0).any():
            damaged(source, "its scales are not all positive")
        width, height = self.image_size or _extent(self.keypoints)
        if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
            damaged(source, f"a photo of {width} x {height} pixels is impossible")
        if total and np.abs(self.keypoints).max() > MAX_OUTSIDE * max(width, height):
            damaged(source, f"its keypoints lie outside of the photo of {width} x {height}; they must be its pixels")
        # Not of float32, whose squares overflow and underflow.
        norms = np.linalg.norm(self.descriptors.astype(np.float64), axis=1)
        order = np.arange(total) if self.scores is None else np.argsort(-self.scores, kind="stable")
        kept = order[norms[order] > 0][:count]
        descriptors, norms = self.descriptors[kept], norms[kept]
        off = np.abs(norms**2 - 1) > _UNIT
        descriptors[off] = descriptors[off] / norms[off, None]
        ones = np.ones(len(kept), np.float32)
        whole = np.zeros(0, np.float32) if self.global_descriptor is None else self.global_descriptor
        if whole.ndim != 1 or len(whole) > MAX_DIM or not np.isfinite(whole).all():
            damaged(source, f"its global_descriptor is not a vector of at most {MAX_DIM} finite numbers")
        return Features(
            self.keypoints[kept],
            ones if self.scales is None else self.scales[kept],
            ones if self.scores is None else self.scores[kept],
            descriptors,
            width,
            height,
            _unit(whole),
        )


def maker(name: str, dim: int, global_dim: int = 0) -> Fingerprint:
    """The fingerprint that a file's entry `extractor` stands for: the JSON of one of our models, or a name.

    Raises ValueError for anything else, and for a model of another `dim`, or of another `global_dim` where the file has
    a global descriptor.
    """
    if not name.startswith("{"):
        if not _NAME.fullmatch(name):
            raise ValueError("an extractor is named by at most 100 letters, digits, spaces and . _ + - ( )")
        return Fingerprint.elsewhere(name, dim, global_dim)
    found = Fingerprint.from_json(name)
    if found.dim != dim:
        raise ValueError(f"its extractor makes {found.dim} components, and it has {dim}")
    if global_dim and found.global_dim != global_dim:
        raise ValueError(f"its extractor makes global descriptors of {found.global_dim}, and it has {global_dim}")
    return found


def floats(values: npt.NDArray[Any], name: str, source: str) -> Float32Array:
    """Numbers of any kind as float32; raises InputError for others."""
    if values.dtype.kind not in "fiu":
        damaged(source, f"its {name} are of type {values.dtype}, not numbers")
    # What float32 cannot hold becomes infinite, which `LocalFeatures.features` refuses.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(values, np.float32)


def size_of(values: npt.NDArray[Any], source: str) -> tuple[int, int]:
    """Width and height out of an array of two."""
    if values.shape != (2,) or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        damaged(source, "its image_size is not two numbers, width and height")
    return int(values[0]), int(values[1])


def damaged(source: str, problem: str, cause: BaseException | None = None) -> NoReturn:
    """Raise InputError for a file that cannot be used."""
    raise InputError(f"{one_line(source)} cannot be used as a feature file: {problem}.") from cause


def partial_of(path: Path) -> Path:
    """Where a file is written before it takes its name, so that no other ever sees half of it."""
    return path.with_name(f".{path.name}.partial")


def _unit(vector: Float32Array) -> Float32Array:
    """A vector at unit norm, as it is where it has that; one of norm zero says nothing, and becomes none."""
    norm = np.linalg.norm(vector.astype(np.float64))
    if abs(norm**2 - 1) <= _UNIT:
        return vector
    return (vector / norm).astype(np.float32) if norm > 0 else vector[:0]


def _extent(keypoints: Float32Array) -> tuple[int, int]:
    """Width and height of the least photo that holds the keypoints; 1 x 1 for none."""
    if not len(keypoints):
        return 1, 1
    right, bottom = np.clip(np.ceil(keypoints.max(axis=0)), 0, MAX_SIDE).astype(int).tolist()
    return right + 1, bottom + 1
