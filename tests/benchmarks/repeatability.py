"""Whether features that are found again in warped copies of their photo are the better ones to have in the index.

    python tests/benchmarks/judge.py --data DATA --quick      # once: extracts, in runs/judge
    python tests/benchmarks/repeatability.py --data DATA --fingerprint 942d827e2fdc

Every photo is warped twice, turned by 12 degrees and made smaller by a fifth, and tilted, and features are extracted of
that. A feature's likeness is the similarity of the likest new one near its place, the mean of both. Judged are spread
features chosen by score times a power of that, by the places that judge nothing alone: mean average precision, and the
difference to power 0 with its 95 % interval. The vectors in the lists are floats.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from judge import SETS, PhotoSet, read_features
from memory_curve import Codes, Judge, Point, without_judging
from numpy.typing import NDArray
from voting_options import difference

from delf_milvus.features import Features
from delf_milvus.imaging.decode import decode
from delf_milvus.model.extractor import Extractor
from delf_milvus.settings import DecodeSettings, Settings
from delf_milvus.store.choosing import spread

STORED, NEW = 500, 700
"""Features of a photo, and of a warped one."""

REACH = 20
"""Pixels of a photo of 640 x 480 within which a new feature is near."""

EDGE = 8
"""Pixels: what comes nearer to the edge is not looked for."""

UNSEEN, LEAST = 0.7, 0.2
"""Likeness of what left both warped photos, and the least that counts."""

Likeness = dict[str, NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/judge"))
    parser.add_argument("--fingerprint", required=True, help="of the bundled model's features, as judge.py named them")
    parser.add_argument("--indexed", type=int, nargs="+", default=[11, 35, 81])
    parser.add_argument("--powers", type=float, nargs="+", default=[0, 1, 2, 4])
    options = parser.parse_args()
    sets = [read_features(options.cache / f"{options.fingerprint}-{STORED}-{name}.npz") for name in SETS]
    photos = without_judging(PhotoSet([n for s in sets for n in s.names], [f for s in sets for f in s.features]))
    likeness = found_again(photos, options.data, options.cache / f"{options.fingerprint}-{STORED}-warps.npz")
    judge = Judge(photos, choosing=True, every=1)
    print(f"{len(photos.names)} photos, {len(judge.names)} queries", flush=True)
    for indexed in options.indexed:
        base = None
        for power in options.powers:
            features = [
                spread(weighed(one, likeness[name] ** power), indexed)
                for name, one in zip(photos.names, photos.features, strict=True)
            ]
            point = Point(indexed)
            # It holds the features that were compared before, in another order.
            judge.pairs.clear()
            values = judge.values(Codes(features, point, False), point, features)
            base = values if base is None else base
            print(f"{indexed:3d} indexed, likeness to the power {power:g}: {difference(values, base)}", flush=True)


def found_again(photos: PhotoSet, data: Path, path: Path) -> Likeness:
    """The likeness of every feature, extracted once; resumes."""
    known: Likeness = {}
    if path.is_file():
        with np.load(path) as archive:
            known = {name: archive[name] for name in archive.files}
    settings = Settings(extract={"stored_features": STORED})
    extractor = Extractor(settings.model, settings.extract)
    saved = time.monotonic()
    for name, features in zip(photos.names, photos.features, strict=True):
        if name not in known:
            pixels = decode(data / name, DecodeSettings())
            likest = [likest_near(extractor, pixels, features, warp) for warp in warps(features.width, features.height)]
            sums, counts = np.nansum(likest, axis=0), np.isfinite(likest).sum(axis=0)
            means = np.where(counts, sums / np.maximum(counts, 1), UNSEEN)
            known[name] = np.clip(means, LEAST, 1).astype(np.float32)
        if time.monotonic() - saved > 60:
            np.savez(path, **known)
            saved = time.monotonic()
            print(f"{len(known)} photos were warped", flush=True)
    np.savez(path, **known)
    return known


def warps(width: int, height: int) -> Iterator[NDArray[np.float64]]:
    """Homographies around the centre of a photo: turned and made smaller, and tilted."""
    angle = np.deg2rad(12)
    cosine, sine = 0.8 * np.cos(angle), 0.8 * np.sin(angle)
    turned = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    tilted = np.array([[0.72, 0, 0], [0.06, 0.95, 0], [0.35 / width, 0, 1]])
    to, back = np.eye(3), np.eye(3)
    to[:2, 2] = -width / 2, -height / 2
    back[:2, 2] = -to[:2, 2]
    yield back @ turned @ to
    yield back @ tilted @ to


def likest_near(
    extractor: Extractor, pixels: NDArray[np.uint8], features: Features, warp: NDArray[np.float64]
) -> NDArray[np.float64]:
    """For each feature (N,) the largest similarity of a feature of the warped photo near its place, -1 without one,
    and nan where the place has left the photo."""
    size = features.width, features.height
    warped = cv2.warpPerspective(pixels, warp, size, flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE)
    new = extractor.extract(np.asarray(warped, np.uint8), NEW)
    places = cv2.perspectiveTransform(features.locations[None].astype(np.float64), warp)[0]
    distances = np.linalg.norm(places[:, None] - new.locations, axis=2)
    near = distances < REACH * np.sqrt(size[0] * size[1] / (640 * 480))
    found = np.where(near, features.descriptors @ new.descriptors.T, -1).max(axis=1, initial=-1)
    inside = ((places >= EDGE) & (places <= np.array(size) - EDGE)).all(axis=1)
    return np.where(inside, found, np.nan)


def weighed(features: Features, weights: NDArray[np.float32]) -> Features:
    """The same features by score times weight, in falling order."""
    scores = features.attention * weights
    order = np.argsort(-scores, kind="stable")
    return replace(
        features,
        locations=features.locations[order],
        scales=features.scales[order],
        attention=scores[order].astype(np.float32),
        descriptors=features.descriptors[order],
    )


if __name__ == "__main__":
    main()
