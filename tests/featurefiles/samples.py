"""Features, and files of them, that the tests of this room share."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from delf_milvus.featurefiles.arrays import LocalFeatures


def local_features(
    seed: int, count: int, dim: int, *, optional: bool = True, extractor: str = "", whole: int = 0
) -> LocalFeatures:
    """Random features of a photo of 640 x 480 pixels, in no order, with everything that is optional or without."""
    rng = np.random.default_rng(seed)
    return LocalFeatures(
        rng.uniform(0, (639, 479), (count, 2)).astype(np.float32),
        rng.normal(size=(count, dim)).astype(np.float32),
        rng.normal(size=count).astype(np.float32) if optional else None,
        rng.uniform(0.5, 4, count).astype(np.float32) if optional else None,
        (640, 480) if optional else None,
        extractor,
        rng.normal(size=whole).astype(np.float32) if whole else None,
    )


some_features = st.builds(
    local_features,
    st.integers(0, 2**32 - 1),
    st.integers(0, 30),
    st.integers(1, 20),
    optional=st.booleans(),
    extractor=st.sampled_from(["", "superpoint-v1"]),
    whole=st.sampled_from([0, 5]),
)


def sift(photo: npt.NDArray[np.uint8], count: int = 300) -> LocalFeatures:
    """SIFT features of an RGB photo, as OpenCV gives them: descriptors of 128 components, not normalised."""
    keypoints, descriptors = cv2.SIFT_create(count).detectAndCompute(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY), None)
    return LocalFeatures(
        np.array([one.pt for one in keypoints], np.float32),
        descriptors,
        np.array([one.response for one in keypoints], np.float32),
        np.array([one.size for one in keypoints], np.float32),
        (photo.shape[1], photo.shape[0]),
    )


def same(first: LocalFeatures, second: LocalFeatures) -> bool:
    """Whether two are equal, to the last bit."""
    pairs = [
        (first.keypoints, second.keypoints),
        (first.descriptors, second.descriptors),
        (first.scores, second.scores),
        (first.scales, second.scales),
        (first.global_descriptor, second.global_descriptor),
    ]
    for one, other in pairs:
        if (one is None) != (other is None) or (one is not None and not np.array_equal(one, other)):
            return False
    return (first.image_size, first.extractor) == (second.image_size, second.extractor)
