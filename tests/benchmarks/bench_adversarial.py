"""Verification on generated matches with a known transform, beside the reference: the grid of the adversarial tests.

    python tests/benchmarks/bench_adversarial.py --scenes 12

Tables: the share of scenes whose true transform is found (at least 80 % of the true matches within 20 pixels of the
truth), by number of matches and share of true ones, and by noise, scale, rotation and perspective, where the rest of
the grid is drawn at random; the same where wrong matches are the more similar ones; the inliers that matches without a
truth reach: anywhere, between fronts of like windows, and crowded together. Both have a residual of 20 pixels.
--trials is the reference's number of trials; 0 leaves the reference out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "retrieval"))

import reference_pipeline as reference
from adversarial import (
    CLOSE,
    RATIOS,
    Case,
    case_of,
    concentrated,
    counts,
    facades,
    found,
    make,
    reordered,
    unrelated,
    verified,
)
from drawn_pairs import Scene

Pair = tuple[bool, bool]


class Methods:
    """The package and the reference, and the CPU seconds of each."""

    def __init__(self, trials: int) -> None:
        self.trials = trials
        self.seconds = [0.0, 0.0]
        self.count = 0

    def inliers(self, scene: Scene, seed: int) -> tuple[int, int]:
        ours, fit = self._run(scene, seed)
        return ours.inliers, fit.inliers

    def found(self, scene: Scene, seed: int) -> Pair:
        ours, fit = self._run(scene, seed)
        return found(ours.transform, scene), found(fit.transform, scene)

    def _run(self, scene: Scene, seed: int):  # type: ignore[no-untyped-def]
        self.count += 1
        started = time.process_time()
        ours = verified(scene)
        middle = time.process_time()
        if self.trials:
            fit = reference.verify(scene.query.points, scene.image.points, CLOSE, trials=self.trials, seed=seed)
        else:
            fit = reference.Fit(np.zeros(0, bool), None)
        self.seconds[0] += middle - started
        self.seconds[1] += time.process_time() - middle
        return ours, fit


def shares(pairs: Iterable[Pair]) -> str:
    ours, theirs = np.mean(list(pairs), axis=0)
    return f"{ours:4.0%} /{theirs:4.0%}"


def grid(methods: Methods, scenes: int) -> None:
    rng = np.random.default_rng(0)
    results: list[tuple[Case, Pair]] = []
    for matches, ratio in counts():
        for seed in range(scenes):
            case = case_of(rng, matches, ratio)
            results.append((case, methods.found(make(case, seed), seed)))
    print(f"true transform found, ours / reference; {scenes} scenes a cell, the rest of the grid drawn")
    print("matches  " + "".join(f"{f'{ratio:.0%} true':>12}" for ratio in RATIOS))
    for matches in dict(counts()):
        row = [[pair for case, pair in results if case[:2] == (matches, ratio)] for ratio in RATIOS]
        print(f"{matches:7}  " + "".join(f"{shares(pairs) if pairs else '-':>12}" for pairs in row))
    for field in ("noise", "scale", "rotation", "perspective"):
        print(f"by {field}: " + by(results, lambda case, field=field: getattr(case, field)))
    print(f"all: {shares(pair for _, pair in results)} of {len(results)}", flush=True)


def by(results: list[tuple[Case, Pair]], key: Callable[[Case], Hashable]) -> str:
    groups: dict[Hashable, list[Pair]] = defaultdict(list)
    for case, pair in results:
        groups[key(case)].append(pair)
    return ", ".join(f"{value:g}: {shares(groups[value])}" for value in sorted(groups))  # type: ignore[type-var,str-bytes-safe]


def orders(methods: Methods, scenes: int) -> None:
    print("true transform found by order of similarity: true ones first, any order, wrong ones mostly first, first")
    for matches, ratio, rotation in ((100, 0.4, 0), (100, 0.4, 45), (300, 0.3, 0), (300, 0.3, 45), (1000, 0.2, 0)):
        row = []
        for preference in (1.0, 0.0, -0.3, -1.0):
            cases = [make(Case(matches, ratio, rotation=rotation), seed) for seed in range(scenes)]
            row.append(
                shares(methods.found(reordered(scene, seed, preference), seed) for seed, scene in enumerate(cases))
            )
        print(f"{matches:5} matches, {ratio:.0%} true, {rotation:2} degrees: " + "  ".join(row), flush=True)


def chance(methods: Methods, scenes: int) -> None:
    kinds: dict[str, Callable[[int], Scene]] = {}
    for matches in (20, 50, 100, 300, 1000):
        kinds[f"{matches} anywhere"] = lambda seed, matches=matches: unrelated(seed, matches)
    for layers in (1, 6):
        kinds[f"48 like windows, {layers} matches each"] = lambda seed, layers=layers: facades(
            seed, 8, 6, related=False, layers=layers
        )
    for query, image in ((0.25, 0.25), (0.15, 1.0), (1.0, 0.15)):
        kinds[f"100 in {query:.0%} of the query's sides, {image:.0%} of the image's"] = (
            lambda seed, query=query, image=image: concentrated(seed, 100, query, image)
        )
    print("inliers of matches without a truth, median and largest: ours; reference")
    for name, kind in kinds.items():
        reached = np.array([methods.inliers(kind(seed), seed) for seed in range(scenes)])
        ours, theirs = (f"{np.median(column):4.0f} {column.max():4d}" for column in reached.T)
        print(f"{name:<52} {ours}; {theirs}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=12, help="of each cell")
    parser.add_argument("--trials", type=int, default=reference.TRIALS)
    options = parser.parse_args()
    methods = Methods(options.trials)
    grid(methods, options.scenes)
    orders(methods, options.scenes)
    chance(methods, options.scenes)
    ours, theirs = np.array(methods.seconds) / methods.count * 1e3
    print(f"CPU milliseconds a scene: ours {ours:.2f}, reference {theirs:.0f}")


if __name__ == "__main__":
    main()
