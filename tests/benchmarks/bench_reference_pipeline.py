"""Matching, verification and ranking beside the official DELF example's, on the same features.

    python tests/benchmarks/judge.py --data ../shared/data          # once: extracts, and keeps features in runs/judge
    python tests/benchmarks/bench_reference_pipeline.py --cache runs/judge --fingerprint 525136ab99de --stored 500

The reference is `tests/reference_pipeline.py`. Three parts, any of which --parts picks:

speed: 100 candidates of 1000 x 40-d, generated, and 100 photos of the cache, matched and verified on one thread; CPU
    seconds, least of --repeats runs. The reference runs on --timed candidates, and its time is scaled to all.
pairs: the scores of true pairs (two photos of one UKBench object, or of one multi-view scene) and of as many unrelated
    ones. The bar is the least score that at most 1 in 100, or 1 in 1000, unrelated pairs reach; what counts is the
    share of true pairs that reach it. Intervals are a 95 % bootstrap over pairs, true and unrelated (bars included).
ranking: the images with the most votes, ranked by the package (votes and inliers), and by the reference's inlier counts
    (ties by votes), for evenly spread UKBench queries among all photos of the cache; the difference as of judge.py.

--frame measures the reference's 20 pixels on a candidate enlarged to a longest side of 640, instead of on its own
pixels, as the example does: photos of UKBench are 320 pixels wide.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import reference_pipeline as reference
from bench_verification import best_of, photos
from judge import SETS, Figures, PhotoSet, compare, means, read_features, truth
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from delf_milvus.evaluation.memory import MemoryCollection
from delf_milvus.evaluation.metrics import average_precision, ns_score
from delf_milvus.features import Features
from delf_milvus.retrieval.frame import FRAME
from delf_milvus.retrieval.matching import match_many
from delf_milvus.retrieval.search import Timings, judge_candidates, keypoints
from delf_milvus.retrieval.verification import Keypoints, verify_many
from delf_milvus.settings import Settings

SETTINGS = Settings()
CANDIDATES = 100
PUTATIVES = 200  # of each generated candidate

Pair = tuple[int, int]
Scores = NDArray[np.int64]


def residual(image: Features, in_frame: bool) -> float:
    """The reference's, in pixels of the photo."""
    return reference.RESIDUAL * (max(image.width, image.height) / FRAME if in_frame else 1)


def our_inliers(query: Features, images: list[Features]) -> list[int]:
    """The package's inliers of one query with each image."""
    matches = match_many(query.descriptors, [image.descriptors for image in images], SETTINGS.verify.similarity)
    found = verify_many(
        keypoints(query),
        [keypoints(image) for image in images],
        matches,
        residual=SETTINGS.verify.residual,
        min_inliers=SETTINGS.verify.min_inliers,
    )
    return [verification.inliers for verification in found]


def as_features(descriptors: NDArray[np.float32], points: Keypoints) -> Features:
    attention = np.ones(len(descriptors), np.float32)
    return Features(points.points, points.scales, attention, descriptors, *points.size)


def speed(everything: PhotoSet, timed: int, repeats: int, in_frame: bool) -> None:
    rng = np.random.default_rng(0)
    query, others = photos(rng, CANDIDATES, 1, PUTATIVES)
    generated = as_features(*query), [as_features(*other) for other in others]
    spread = np.linspace(0, len(everything.names) - 1, CANDIDATES + 1).astype(int)
    first, *rest = (everything.features[i] for i in spread)
    print(f"speed, one thread, CPU milliseconds for {CANDIDATES} candidates; the reference's scaled from {timed}")
    print("features                  ours   reference   ratio")
    for name, (photo, images) in {"1000 x 40-d, generated": generated, "of the cache": (first, rest)}.items():
        some = images[:: len(images) // timed][:timed]

        def slow(photo: Features = photo, some: list[Features] = some) -> None:
            for image in some:
                reference.compare(photo, image, residual(image, in_frame))

        with threadpool_limits(1):
            ours, _ = best_of(repeats, lambda photo=photo, images=images: our_inliers(photo, images))
            theirs = best_of(1, slow)[0] * len(images) / timed
        print(f"{name:<24} {ours * 1e3:5.0f} {theirs * 1e3:11.0f} {theirs / ours:7.0f}", flush=True)


def drawn_pairs(names: list[str], count: int) -> dict[str, tuple[list[Pair], list[Pair]]]:
    """True and unrelated pairs of UKBench and of the multi-view scenes, `count` of each kind in all."""
    rng = np.random.default_rng(0)
    instances = truth(names)
    pairs = {}
    for group, wanted in (("ukbench", count - count // 4), ("multiview", count // 4)):
        members = defaultdict(list)
        for number, name in enumerate(names):
            if name.startswith(group):
                members[instances[name]].append(number)
        true = np.array([(a, b) for same in members.values() for a in same for b in same if a < b])
        true = true[rng.permutation(len(true))[:wanted]]
        keys, unrelated = list(members), []
        for _ in range(wanted):
            one, other = rng.choice(len(keys), 2, replace=False)
            unrelated.append((int(rng.choice(members[keys[one]])), int(rng.choice(members[keys[other]]))))
        pairs[group] = [(int(a), int(b)) for a, b in true], unrelated
    return pairs


def bar(unrelated: Scores, share: float) -> int:
    """The least score that at most this share of the unrelated pairs reaches."""
    allowed = int(share * len(unrelated) + 1e-9)
    return int(np.sort(unrelated)[::-1][allowed]) + 1


def recall_at_equal_false_alarms(everything: PhotoSet, count: int, in_frame: bool, draws: int = 2000) -> None:
    methods: dict[str, Callable[[Features, Features], int]] = {
        "ours": lambda query, image: our_inliers(query, [image])[0],
        "reference": lambda query, image: reference.compare(query, image, residual(image, in_frame)).inliers,
    }
    groups = drawn_pairs(everything.names, count)
    scores: dict[str, dict[str, tuple[Scores, Scores]]] = {}
    started = time.perf_counter()
    for method, score in methods.items():
        scores[method] = {
            group: tuple(  # type: ignore[misc]
                np.array([score(everything.features[a], everything.features[b]) for a, b in pairs]) for pairs in kinds
            )
            for group, kinds in groups.items()
        }
        print(f"  {method}: {time.perf_counter() - started:.0f} s", flush=True)
        started = time.perf_counter()

    def unrelated(method: str) -> Scores:
        return np.concatenate([wrong for _, wrong in scores[method].values()])

    print(f"pairs: {sum(len(t) for t, _ in groups.values())} true, {len(unrelated('ours'))} unrelated")
    rng = np.random.default_rng(1)
    for share in (0.01, 0.001):
        if share * len(unrelated("ours")) < 1:
            continue
        print(f"share of true pairs kept at a false-alarm rate of {share:g}, with 95 % intervals")
        kept: dict[str, dict[str, NDArray[np.float64]]] = {}
        wrong_rows = rng.integers(0, len(unrelated("ours")), (draws, len(unrelated("ours"))))
        for group in groups:
            rows = rng.integers(0, len(groups[group][0]), (draws, len(groups[group][0])))
            for method in methods:
                true, wrong = scores[method][group][0], unrelated(method)
                bars = np.array([bar(wrong[draw], share) for draw in wrong_rows])
                kept.setdefault(group, {})[method] = (true[rows] >= bars[:, None]).mean(axis=1)
                limit = bar(wrong, share)
                print(
                    f"  {group:<10} {method:<10} {(true >= limit).mean():6.1%} {interval(kept[group][method])} "
                    f"at {limit} inliers, which {(wrong >= limit).mean():.2%} of the unrelated reach"
                )
            change = kept[group]["ours"] - kept[group]["reference"]
            print(f"  {group:<10} {'difference':<10} {interval(change)}", flush=True)


def interval(drawn: NDArray[np.float64]) -> str:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"[{low:+.1%}, {high:+.1%}]"


def ranking(everything: PhotoSet, queries: int, candidates: int, in_frame: bool) -> None:
    instances = truth(everything.names)
    members = defaultdict(set)
    for name, instance in instances.items():
        members[instance].add(name)
    numbers = [number for number, name in enumerate(everything.names) if name.startswith("ukbench/")]
    numbers = [numbers[i] for i in np.unique(np.linspace(0, len(numbers) - 1, queries).astype(int))]
    collection = MemoryCollection(everything.names, everything.features)
    search = SETTINGS.search.model_copy(update={"candidates": candidates})
    figures: dict[str, Figures] = {name: {} for name in ("ours", "reference", "votes")}
    for number in numbers:
        query, name = everything.features[number], everything.names[number]
        judged = judge_candidates(query, collection, search, SETTINGS.verify, Timings())
        by_votes = judge_candidates(
            query, collection, search.model_copy(update={"inlier_weight": 0.0}), SETTINGS.verify, Timings()
        ).candidates
        inliers = [reference.compare(query, c.features, residual(c.features, in_frame)).inliers for c in by_votes]
        rankings = {
            "ours": [c.image_id for c in judged.candidates],
            "reference": [by_votes[i].image_id for i in np.argsort(-np.array(inliers), kind="stable")],
            "votes": [c.image_id for c in by_votes],
        }
        same = members[instances[name]]
        for method, images in rankings.items():
            group = figures[method].setdefault("ukbench", {})
            group.setdefault("mAP", {})[name] = average_precision(images, same - {name}, {name})
            group.setdefault("N-S", {})[name] = float(ns_score(images, same))
    print(f"ranking: the first {candidates} by votes of {len(everything.names)} photos, {len(numbers)} queries")
    for method, figure in figures.items():
        print(f"  {method}: {means(figure)}")
    print("ours against the reference, mean difference and 95 % interval:")
    compare(figures["ours"], figures["reference"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/judge"), help="features that judge.py kept")
    parser.add_argument("--fingerprint", required=True, help="first part of the cached files' names")
    parser.add_argument("--stored", type=int, default=500, help="second part: features of a photo")
    parser.add_argument(
        "--parts", nargs="*", choices=("speed", "pairs", "ranking"), default=("speed", "pairs", "ranking")
    )
    parser.add_argument("--pairs", type=int, default=1000, help="true pairs, and as many unrelated ones")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--candidates", type=int, default=50, help="that are ranked")
    parser.add_argument("--timed", type=int, default=5, help="candidates on which the reference is timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--frame", action="store_true", help="the reference's residual in a frame of 640 pixels")
    options = parser.parse_args()
    names = SETS if "ranking" in options.parts else ("ukbench", "multiview")
    sets = [read_features(options.cache / f"{options.fingerprint}-{options.stored}-{name}.npz") for name in names]
    everything = PhotoSet([n for s in sets for n in s.names], [f for s in sets for f in s.features])
    if "speed" in options.parts:
        speed(everything, options.timed, options.repeats, options.frame)
    if "pairs" in options.parts:
        recall_at_equal_false_alarms(everything, options.pairs, options.frame)
    if "ranking" in options.parts:
        ranking(everything, options.queries, options.candidates, options.frame)


if __name__ == "__main__":
    main()
