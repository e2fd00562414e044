"""Match and verify one query against 100 candidates of 1000 x 40-d, on one core, beside the plain twin.

    python tests/benchmarks/bench_verification.py

The twin (loops for the mutual neighbours, skimage's affine RANSAC with 1000 trials, as in the official DELF matching
example) runs on a few candidates; its time for all is extrapolated.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "retrieval"))

from drawn_pairs import PYRAMID, on_grid, random_truth, scene
from twins import slow_match, slow_verify

from delf_milvus.retrieval.matching import match_many
from delf_milvus.retrieval.verification import Keypoints, verify_many

FEATURES, DIM, SIZE = 1000, 40, (640, 480)
THRESHOLD, RESIDUAL, MIN_INLIERS = 0.6, 25.0, 5


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def keypoints(rng):
    scales = 1 / rng.choice(PYRAMID, FEATURES)
    points = on_grid(rng.uniform((0, 0), SIZE, (FEATURES, 2)), scales)
    return Keypoints(points.astype(np.float32), scales.astype(np.float32), SIZE)


def photos(rng, candidates, related, putatives):
    """A query and candidates, of which the first `related` show the same thing: descriptors, then keypoints.

    Every candidate has `putatives` mutual neighbours above the threshold; in a related one, 40 % of them are right.
    """
    query, query_points = unit(rng.normal(size=(FEATURES, DIM))), keypoints(rng)
    others = []
    for index in range(candidates):
        descriptors, points = unit(rng.normal(size=(FEATURES, DIM))), keypoints(rng)
        rows = rng.permutation(FEATURES)[:putatives]
        descriptors[:putatives] = unit(query[rows] + rng.normal(0, 0.12, (putatives, DIM)))
        if index < related:
            s = scene(rng, putatives, 1.0, random_truth(rng, scale=1.0), size=SIZE)
            right = rng.random(putatives) < 0.4
            query_points.points[rows[right]] = s.query.points[right]
            query_points.scales[rows[right]] = s.query.scales[right]
            points.points[:putatives][right] = s.image.points[right]
            points.scales[:putatives][right] = s.image.scales[right]
        others.append((descriptors, points))
    return (query, query_points), others


def best_of(repeats, function):
    """The least CPU time of this process, in seconds, and the result."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        times.append(time.process_time() - start)
    return min(times), result


def measured(putatives, arguments):
    """One row of the table."""
    rng = np.random.default_rng(putatives)
    (query, query_points), others = photos(rng, arguments.candidates, 1, putatives)
    descriptors, points = [d for d, _ in others], [p for _, p in others]
    match_time, matches = best_of(arguments.repeats, lambda: match_many(query, descriptors, THRESHOLD))
    verify_time, results = best_of(
        arguments.repeats,
        lambda: verify_many(query_points, points, matches, residual=RESIDUAL, min_inliers=MIN_INLIERS),
    )

    def twin():
        for candidate, candidate_points in others[1 : 1 + arguments.twin]:
            pairs = slow_match(query, candidate, THRESHOLD)
            rows, columns, _ = (np.array(part) for part in zip(*pairs, strict=True))
            slow_verify(query_points.points[rows], candidate_points.points[columns], RESIDUAL)

    with threadpool_limits(1):
        twin_time = best_of(1, twin)[0] * arguments.candidates / arguments.twin
    total = match_time + verify_time
    found = [result.inliers for result in results]
    return (
        f"{np.mean([len(m.query) for m in matches]):9.0f} {match_time * 1e3:6.0f} {verify_time * 1e3:7.0f} "
        f"{total * 1e3:6.0f} {twin_time * 1e3:19.0f} {twin_time / total:6.0f}  {found[0]} / {max(found[1:])}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--twin", type=int, default=3, help="candidates that the twin verifies")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print(
        f"one core, CPU milliseconds for {arguments.candidates} candidates of {FEATURES} x {DIM}-d, one of them related"
    )
    print("putatives  match  verify  total   twin (from a few)  times  inliers: related / most unrelated")
    for putatives in (100, 200, 300):
        print(measured(putatives, arguments))


if __name__ == "__main__":
    main()
