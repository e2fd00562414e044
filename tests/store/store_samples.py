"""Features and records that the tests of the store share."""

from __future__ import annotations

import numpy as np

from delf_milvus.features import Features, Fingerprint
from delf_milvus.store.records import ImageRecord

DIM = 16
GLOBAL_DIM = 6
MODEL = Fingerprint("weights-a", "attention", DIM, 640, (0.5, 1.0), 16, global_dim=GLOBAL_DIM)
OTHER_MODEL = Fingerprint("weights-b", "attention", DIM, 640, (1.0,), 16)


def random_features(rng: np.random.Generator, count: int, dim: int = DIM, around: int = 0) -> Features:
    """`count` features of a photo of 640 x 480 pixels; descriptors around `around` centres, or anywhere for 0."""
    descriptors = rng.normal(size=(count, dim))
    if around:
        centres = np.random.default_rng(0).normal(size=(around, dim))
        descriptors = centres[rng.integers(0, around, count)] + 0.5 * descriptors
    descriptors = descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True)
    whole = rng.normal(size=GLOBAL_DIM)
    return Features(
        rng.uniform(0, (639, 479), (count, 2)).astype(np.float32),
        rng.choice(np.float32([0.7071, 1, 1.4142, 2]), count),
        np.sort(rng.uniform(1, 90, count))[::-1].astype(np.float32),
        descriptors.astype(np.float32),
        640,
        480,
        (whole / np.linalg.norm(whole)).astype(np.float32),
    )


def random_items(seed: int, images: int, count: int, prefix: str = "img") -> list[tuple[ImageRecord, Features]]:
    """Images called prefix/00000.jpg and so on, each with `count` features around the same 50 centres."""
    rng = np.random.default_rng(seed)
    return [
        (
            ImageRecord(f"{prefix}/{number:05}.jpg", f"/photos/{prefix}/{number:05}.jpg", "ab" * 32, "/photos"),
            random_features(rng, count, around=50),
        )
        for number in range(images)
    ]
