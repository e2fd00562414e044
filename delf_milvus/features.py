"""The one value that travels through the system: the local features of one photo."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from delf_milvus.errors import UsageError

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels."""

Float32Array = npt.NDArray[np.float32]

ORDINAL_BITS = 12
"""A feature's key is `image_key << ORDINAL_BITS | ordinal`."""

MAX_FEATURES = 1 << ORDINAL_BITS
"""Most features of one image."""


@dataclass(frozen=True, eq=False)
class Features:
    """Local features of one photo, in falling attention.

    locations: (N, 2) float32, x then y, pixels of the photo as decoded upright, pixel centres at integers.
    scales: (N,) float32, size of a feature in pixels of the photo relative to the network's own grid
        (1 / pyramid scale): positive.
    attention: (N,) float32, never increasing.
    descriptors: (N, D) float32, rows of unit L2 norm.
    width, height: size of the photo in pixels.
    global_descriptor: (G,) float32 of unit L2 norm, one vector of the whole photo; of length 0 where there is none: the
        model has none, or the features were read from where only local ones are kept.

    Raises ValueError at construction when one of this does not hold.
    """

    locations: Float32Array
    scales: Float32Array
    attention: Float32Array
    descriptors: Float32Array
    width: int
    height: int
    global_descriptor: Float32Array = field(default_factory=lambda: np.zeros(0, np.float32))

    def __post_init__(self) -> None:
        count = len(self.locations)
        arrays = {
            "locations": (self.locations, (count, 2)),
            "scales": (self.scales, (count,)),
            "attention": (self.attention, (count,)),
            "descriptors": (self.descriptors, (count, self.descriptors.shape[-1])),
        }
        for name, (array, shape) in arrays.items():
            if array.dtype != np.float32 or array.shape != shape:
                raise ValueError(f"{name} must be float32 of shape {shape}, not {array.dtype} of {array.shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite")
        if count > MAX_FEATURES:
            raise ValueError(f"at most {MAX_FEATURES} features an image, not {count}")
        if self.width < 1 or self.height < 1:
            raise ValueError(f"an image has at least one pixel, not {self.width} x {self.height}")
        if count and (self.scales <= 0).any():
            raise ValueError("scales must be positive")
        if count and (np.diff(self.attention) > 0).any():
            raise ValueError("features must come in falling attention")
        # Of the squares, which is three times as fast as of the norms: a search checks the features of 100 images.
        squares = np.einsum("nd,nd->n", self.descriptors, self.descriptors)
        if count and (np.abs(squares - 1) > 2e-2).any():
            raise ValueError("descriptors must have unit L2 norm")
        pooled = self.global_descriptor
        if pooled.dtype != np.float32 or pooled.ndim != 1:
            raise ValueError(f"global_descriptor must be a float32 vector, not {pooled.dtype} of {pooled.shape}")
        # Written so that NaN fails too.
        if len(pooled) and not abs(float(pooled @ pooled) - 1) <= 2e-2:
            raise ValueError("global_descriptor must have unit L2 norm")

    def __len__(self) -> int:
        return len(self.locations)

    @property
    def dim(self) -> int:
        """Length of a descriptor."""
        return int(self.descriptors.shape[1])

    @property
    def digest(self) -> str:
        """SHA-256 of all of it, hexadecimal."""
        digest = hashlib.sha256(f"{len(self)} {self.dim} {self.width} {self.height} ".encode())
        for array in (self.locations, self.scales, self.attention, self.descriptors, self.global_descriptor):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def top(self, count: int) -> Features:
        """The `count` features of highest attention."""
        return self.take(np.arange(min(count, len(self))))

    def take(self, rows: npt.NDArray[Any]) -> Features:
        """The features of these rows (indices, or a mask), which must keep the order."""
        return Features(
            self.locations[rows],
            self.scales[rows],
            self.attention[rows],
            self.descriptors[rows],
            self.width,
            self.height,
            self.global_descriptor,
        )


def clipped_box(box: Box | None, width: int, height: int) -> Box:
    """The part of a box (x0, y0, x1, y1) that lies in a photo, rounded outwards to whole pixels; all of it for None.

    Raises UsageError for a box that leaves nothing of the photo.
    """
    if box is None:
        return 0, 0, width, height
    if not np.isfinite(box).all():
        raise UsageError("A box is four finite numbers: x0,y0,x1,y1.")
    x0, y0 = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
    x1, y1 = min(width, math.ceil(box[2])), min(height, math.ceil(box[3]))
    if x0 >= x1 or y0 >= y1:
        raise UsageError(f"The box leaves nothing of the photo: it must overlap 0,0,{width},{height}, x0<x1, y0<y1.")
    return x0, y0, x1, y1


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal: what of a weight file enters the fingerprint."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Fingerprint:
    """What two sets of features must share to be comparable: everything that changes their values.

    weights: SHA-256 of the weight file (or a name, for features made elsewhere).
    selection: how cells are scored. dim: descriptor length. longest_side: pixels a photo is shrunk to.
    scales: the pyramid. stride: pixels between cells. coordinates: the keypoint convention.
    precision: family of the arithmetic. "fp32", "bf16" and "fp16" are one family, "float", on torch and OpenVINO: their
    descriptors agree to a mean cosine above 0.999, and 95 % or more of a photo's 1000 best keypoints are the same.
    global_dim: length of the global descriptor, 0 without one.
    """

    weights: str
    selection: str
    dim: int
    longest_side: int
    scales: tuple[float, ...]
    stride: int
    precision: str = "float"
    coordinates: str = "pixel centres at integers, upright"
    global_dim: int = 0

    @staticmethod
    def elsewhere(name: str, dim: int, global_dim: int = 0) -> Fingerprint:
        """Of features that no model of ours made: `name` says who did ("superpoint-v1")."""
        made = Fingerprint(weights=name, selection="", dim=dim, longest_side=0, scales=(), stride=0)
        return replace(made, global_dim=global_dim)

    @property
    def made_elsewhere(self) -> str:
        """Who made the features, where no model of ours did; else ""."""
        return "" if self.stride else self.weights

    def to_json(self) -> str:
        """Canonical JSON text."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Fingerprint:
        """The inverse of `to_json`; raises ValueError for anything else."""
        try:
            values = json.loads(text)
            return Fingerprint(**{**values, "scales": tuple(values["scales"])})
        except (TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"not a model fingerprint: {error}") from error

    @property
    def short(self) -> str:
        """Twelve hexadecimal digits that stand for all of it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def differences(self, other: Fingerprint) -> list[str]:
        """One phrase for each field in which the two differ: "scales: (0.5, 1.0) here, (1.0,) there"."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} here, {theirs[name]} there" for name in mine if mine[name] != theirs[name]]
