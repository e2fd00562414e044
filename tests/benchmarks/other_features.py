"""Features of other extractors on UKBench: OpenCV's SIFT and ORB, with their scales and without.

    python tests/benchmarks/other_features.py --data DATA

Pairs: the first two views of each object, and first views of different objects; how many pass the bar of 0.01, which
was calibrated with the bundled model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from delf_milvus.featurefiles.arrays import LocalFeatures
from delf_milvus.features import Features
from delf_milvus.matcher import PhotoMatcher
from delf_milvus.retrieval.evidence import evidence
from delf_milvus.retrieval.matching import match
from delf_milvus.retrieval.search import keypoints
from delf_milvus.retrieval.verification import verify_many
from delf_milvus.settings import Settings

COUNT = 500
BAR = 0.01


def extracted(path: Path, kind: str, has_scales: bool) -> Features:
    """ORB's bits become -1 and 1, so that their cosine falls with the Hamming distance."""
    photo = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    detector = cv2.SIFT_create(COUNT) if kind == "sift" else cv2.ORB_create(COUNT)
    points, descriptors = detector.detectAndCompute(photo, None)
    if descriptors is None:
        descriptors = np.zeros((0, 128 if kind == "sift" else 32), np.uint8)
    if kind == "orb":
        descriptors = np.unpackbits(descriptors, axis=1).astype(np.float32) * 2 - 1
    return LocalFeatures(
        np.array([one.pt for one in points], np.float32).reshape(-1, 2),
        descriptors.astype(np.float32),
        np.array([one.response for one in points], np.float32),
        np.array([one.size for one in points], np.float32) if has_scales else None,
        (photo.shape[1], photo.shape[0]),
    ).features(COUNT, str(path))


def pairs(of: Callable[[int], Features], settings: Settings) -> None:
    """Print how many true and unrelated pairs pass."""
    calibration, verify = PhotoMatcher(settings).calibration, settings.verify

    def passed(pair: tuple[int, int]) -> bool:
        query, image = map(of, pair)
        matches = match(query.descriptors, image.descriptors, verify.similarity)
        sides = keypoints(query), [keypoints(image)]
        found = verify_many(*sides, [matches], residual=verify.residual, min_inliers=verify.min_inliers)
        return bool(calibration.assess_pairs(evidence(sides[0], [matches], found)).false_alarm[0] <= BAR)

    objects = range(250)
    true = sum(passed((4 * i, 4 * i + 1)) for i in objects)
    wrong = sum(passed((4 * i, 4 * ((i + 97) % 250))) for i in objects)
    print(f"  pairs: {true} of 250 true ones pass, {wrong} of 250 unrelated ones", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kinds", nargs="*", default=["sift", "orb"])
    parser.add_argument("--similarity", type=float, help="verify.similarity")
    arguments = parser.parse_args()
    photos = sorted((arguments.data / "ukbench").iterdir())
    verify = {} if arguments.similarity is None else {"similarity": arguments.similarity}
    settings = Settings(verify=verify)
    for kind in arguments.kinds:
        for has_scales in (True, False):
            print(f"{kind}, {'its scales' if has_scales else 'all scales 1'}", flush=True)
            known: dict[int, Features] = {}

            def of(
                number: int, kind: str = kind, has_scales: bool = has_scales, known: dict[int, Features] = known
            ) -> Features:
                if number not in known:
                    known[number] = extracted(photos[number], kind, has_scales)
                return known[number]

            pairs(of, settings)


if __name__ == "__main__":
    main()
