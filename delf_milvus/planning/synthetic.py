"""Descriptors with the structure of real ones: many around common centres, each image with some of its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from delf_milvus.features import Features, Fingerprint
from delf_milvus.store.records import ImageRecord

DIM = 40
MODEL = Fingerprint("synthetic", "norm", DIM, 640, (1.0,), 16)
CENTRES = 20_000
SPREAD = 0.55  # of a descriptor around its centre, against the centre's own length


def image(number: int, count: int) -> tuple[ImageRecord, Features]:
    """Image `number` with `count` features, the same in every run."""
    rng = np.random.default_rng(number)
    centres = centres_of(rng.integers(0, CENTRES, count))
    descriptors = unit(centres + SPREAD * unit(rng.normal(size=(count, DIM))))
    features = Features(
        rng.uniform(0, (639, 479), (count, 2)).astype(np.float32),
        rng.choice(np.array([0.7071, 1, 1.4142, 2], np.float32), count),
        np.sort(rng.uniform(1, 90, count))[::-1].astype(np.float32),
        descriptors.astype(np.float32),
        640,
        480,
    )
    return ImageRecord(f"{number:07}.jpg", sha256="ab" * 32), features


def images(first: int, last: int, count: int, at_once: int = 20) -> Iterator[list[tuple[ImageRecord, Features]]]:
    """Images `first` to `last`, some at once."""
    for start in range(first, last, at_once):
        yield [image(number, count) for number in range(start, min(start + at_once, last))]


def query(number: int, count: int) -> NDArray[np.float32]:
    """Descriptors (count, DIM) of another photo of what image `number` shows: a third of them, moved, and others."""
    _, features = image(number, count)
    rng = np.random.default_rng((number, 1))
    seen = features.descriptors[: count // 3]
    moved = unit(seen + 0.3 * unit(rng.normal(size=seen.shape)))
    others = unit(
        centres_of(rng.integers(0, CENTRES, count - len(seen)))
        + SPREAD * unit(rng.normal(size=(count - len(seen), DIM)))
    )
    return np.concatenate([moved, others]).astype(np.float32)


_centres: list[NDArray[np.float64]] = []


def centres_of(rows: NDArray[np.int64]) -> NDArray[np.float64]:
    if not _centres:
        _centres.append(unit(np.random.default_rng(0).normal(size=(CENTRES, DIM))))
    return _centres[0][rows]


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths: NDArray[np.float64] = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / lengths
