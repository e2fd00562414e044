"""What a second look is worth: query expansion, agreement of the first answers, and fusion with a global vector.

    python tests/benchmarks/judge.py --data ../shared/data          # once: extracts, and keeps features in runs/judge
    python tests/benchmarks/global_descriptor.py --data ../shared/data      # once: the same for global vectors
    python tests/benchmarks/second_looks.py --cache runs/judge --fingerprint 525136ab99de --every 2

Queries, sets and columns are those of voting_options.py; the base is the package's search. Expansion is the package's
(`search.expand`), and so is agreement (`search.agreement`). Fusion: similarity to a global vector joins the score, as a
third term divided by its mean over the best five; "GeM" is that of global_descriptor.py, "pooled" the mean of the
stored descriptors weighted by attention, which costs no storage.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from global_descriptor import centred
from judge import SETS, PhotoSet, Without, read_features
from numpy.typing import NDArray
from voting_options import CALIBRATION, SETTINGS, difference, instances_of, queries_of

from delf_milvus.evaluation.memory import MemoryCollection
from delf_milvus.evaluation.metrics import average_precision
from delf_milvus.features import Features
from delf_milvus.retrieval.ranking import relative
from delf_milvus.retrieval.search import (
    Judgement,
    Timings,
    judge_candidates,
)
from delf_milvus.retrieval.second_look import agreed, looked_twice, widened

Floats = NDArray[np.float64]


def pooled_similarities(query: Features, images: Sequence[Features]) -> Floats:
    """Cosine similarity, (N,) and at least 0, of the query's global vector to that of each image.

    The vector is the mean of the local descriptors weighted by their attention, which is what the attention was trained
    to pool; what the images have in common is subtracted from all, for it tells none of them from another.
    """
    if not images:
        return np.empty(0)
    vectors = np.array([pooled(one) for one in [query, *images]])
    vectors -= vectors[1:].mean(axis=0)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.asarray(np.maximum(vectors[1:] @ vectors[0], 0))


def pooled(features: Features) -> Floats:
    total = features.attention.astype(np.float64) @ features.descriptors
    return np.asarray(total / max(float(np.linalg.norm(total)), 1e-12))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/judge"))
    parser.add_argument("--fingerprint", required=True)
    parser.add_argument("--stored", type=int, default=500)
    parser.add_argument("--every", type=int, default=1, help="only every so many queries")
    options = parser.parse_args()
    sets = [read_features(options.cache / f"{options.fingerprint}-{options.stored}-{name}.npz") for name in SETS]
    photos = PhotoSet([n for s in sets for n in s.names], [f for s in sets for f in s.features])
    gems: dict[str, NDArray[np.float32]] = {}
    for group in SETS:
        with np.load(options.cache / f"{options.fingerprint}-gem-{group}.npz") as archive:
            gems.update(zip(map(str, archive["names"]), archive["vectors"], strict=True))
    vectors = centred(np.array([gems[name] for name in photos.names]))
    number = {name: i for i, name in enumerate(photos.names)}
    instances = instances_of(photos.names)
    names = queries_of(instances)[:: options.every]
    groups = np.array([instances[name][0] for name in names])
    same: dict[str, set[str]] = {}
    for name, (_, instance) in instances.items():
        same.setdefault(instance, set()).add(name)
    collection = MemoryCollection(photos.names, photos.features)
    precision: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}

    for name in names:
        query = photos.features[number[name]].top(SETTINGS.extract.plan.query_features)
        relevant = same[instances[name][1]] - {name}

        def note(option: str, judged: Judgement, name: str = name, relevant: set[str] = relevant) -> None:
            ranking = [candidate.image_id for candidate in judged.candidates]
            known = set(ranking)
            ranking += [image for i in judged.rest.tolist() if (image := photos.names[i]) not in known]
            precision.setdefault(option, []).append(average_precision(ranking, relevant, {name}))

        others = Without(collection, name)
        judged = judge_candidates(query, others, SETTINGS.search, SETTINGS.verify, Timings())
        note("the package's", judged)
        box = (0.0, 0.0, float(query.width), float(query.height))
        for most in (1, 3, 10):
            started = time.perf_counter()
            search = SETTINGS.search.model_copy(update={"expand": most})
            wide = widened(query, judged, search, CALIBRATION, box)
            second = judged
            if wide is not None:
                looked = judge_candidates(wide, others, search, SETTINGS.verify, Timings())
                second = looked_twice(query, judged, looked, SETTINGS.verify, Timings())
            option = f"expansion by {most}"
            seconds[option] = seconds.get(option, 0.0) + time.perf_counter() - started
            note(option, second)
        for most in (1, 3):
            started = time.perf_counter()
            search = SETTINGS.search.model_copy(update={"agreement": most})
            second = agreed(judged, search, SETTINGS.verify, CALIBRATION, Timings())
            option = f"agreement with {most}"
            seconds[option] = seconds.get(option, 0.0) + time.perf_counter() - started
            note(option, second)
        among = [number[candidate.image_id] for candidate in judged.candidates]
        similarities = {
            "GeM": np.maximum(vectors[among] @ vectors[number[name]], 0),
            "pooled": pooled_similarities(query, [candidate.features for candidate in judged.candidates]),
        }
        for kind, similarity in similarities.items():
            for weight in (0.25, 0.5, 1.0):
                fused = judged.ordered(judged.scores + weight * relative(similarity))
                note(f"fusion with {kind}, weight {weight}", fused)

    print(f"mAP, difference to the package's, 95 % interval; {len(names)} queries")
    base = np.array(precision["the package's"])
    for option, values in precision.items():
        mine = np.array(values)
        columns = [
            f"{group}: {difference(mine[groups == group], base[groups == group])}" for group in np.unique(groups)
        ]
        print(f"{option:<28} " + "  ".join(columns))
    for option, total in seconds.items():
        print(f"{option}: {total / len(names):.2f} s a query")


if __name__ == "__main__":
    main()
