"""OpenCV's SIFT under the same retrieval: what the learned features are worth beside hand-made ones.

    python tests/benchmarks/judge.py --data ../shared/data --quick --save quick.json
    python tests/benchmarks/sift_baseline.py --data ../shared/data --against quick.json

Photos have the 500 SIFT features of highest response, as square roots of their L1-normalised histograms (RootSIFT:
Arandjelovic and Zisserman, CVPR 2012), at most 640 pixels a side, as the bundled model sees them. Votes, matching,
verification, queries and figures are those of judge.py, every fifth query; there is no global descriptor. Prints the
mean difference, the package's minus SIFT's.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
from judge import SETS, PhotoSet, compare, judge, means, read_features, truth, write_features

from delf_milvus.evaluation.memory import MemoryCollection
from delf_milvus.features import Features
from delf_milvus.imaging.decode import RgbImage, decode
from delf_milvus.settings import DecodeSettings, Settings

LONGEST_SIDE = 640


def root_sift(photo: RgbImage, count: int) -> Features:
    """The `count` features of highest response of an RGB photo."""
    height, width = photo.shape[:2]
    shrink = min(1.0, LONGEST_SIDE / max(height, width))
    small = cv2.resize(photo, (round(width * shrink), round(height * shrink)), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small.astype(np.uint8), cv2.COLOR_RGB2GRAY)
    # OpenCV's own limit breaks ties by the order of its threads; the cut is made here.
    keypoints, histograms = cv2.SIFT_create().detectAndCompute(grey, None)
    if not keypoints:
        none = np.zeros(0, np.float32)
        return Features(np.zeros((0, 2), np.float32), none, none, np.zeros((0, 128), np.float32), width, height)
    response = np.array([one.response for one in keypoints], np.float32)
    best = np.argsort(-response, kind="stable")[:count]
    total = np.maximum(histograms[best].sum(axis=1, keepdims=True), 1e-9)
    return Features(
        np.array([keypoints[i].pt for i in best], np.float32) / np.float32(shrink),
        np.array([keypoints[i].size for i in best], np.float32) / np.float32(shrink),
        response[best],
        np.sqrt(histograms[best] / total).astype(np.float32),
        width,
        height,
    )


def load(name: str, data: Path, cache: Path, count: int) -> PhotoSet:
    """Features of one set, extracted once."""
    path = cache / f"rootsift-{count}-{name}.npz"
    if not path.is_file():
        photos = sorted(p for p in (data / name).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        started = time.perf_counter()
        features = [root_sift(decode(p, DecodeSettings()), count) for p in photos]
        print(f"{name}: {len(photos)} photos, {(time.perf_counter() - started) / len(photos):.3f} s each", flush=True)
        write_features(path, PhotoSet([p.relative_to(data).as_posix() for p in photos], features))
    return read_features(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/judge"))
    parser.add_argument("--similarity", type=float, default=0.85, help="least similarity of a putative match")
    parser.add_argument("--against", type=Path, help="file that judge.py --quick saved")
    options = parser.parse_args()
    settings = Settings(verify={"similarity": options.similarity})
    count = settings.extract.plan.stored_features
    sets = [load(name, options.data, options.cache, count) for name in SETS]
    photos = PhotoSet([n for s in sets for n in s.names], [f for s in sets for f in s.features])
    collection = MemoryCollection(photos.names, photos.features)
    figures = judge(photos, collection, settings, list(truth(photos.names))[::5])
    print(f"with distractors: {means(figures)}")
    if options.against:
        print("the package's minus these, mean and 95 % interval:")
        compare(json.loads(options.against.read_text())["with distractors"], figures)


if __name__ == "__main__":
    main()
