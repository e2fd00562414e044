"""What a second look is worth: query expansion, and agreement of the first answers.

    python tests/benchmarks/judge.py --data ../shared/data          # once: extracts, and keeps features in runs/judge
    python tests/benchmarks/second_looks.py --cache runs/judge --fingerprint 525136ab99de --every 2

Queries, sets and columns are those of voting_options.py; the base is the package's search. Expansion is the package's
(`search.expand`), and so is agreement (`search.agreement`).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from judge import SETS, PhotoSet, Without, read_features
from voting_options import CALIBRATION, SETTINGS, difference, instances_of, queries_of

from delf_milvus.evaluation.memory import MemoryCollection
from delf_milvus.evaluation.metrics import average_precision
from delf_milvus.retrieval.search import Judgement, Timings, judge_candidates
from delf_milvus.retrieval.second_look import agreed, looked_twice, widened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/judge"))
    parser.add_argument("--fingerprint", required=True)
    parser.add_argument("--stored", type=int, default=500)
    parser.add_argument("--every", type=int, default=1, help="only every so many queries")
    options = parser.parse_args()
    sets = [read_features(options.cache / f"{options.fingerprint}-{options.stored}-{name}.npz") for name in SETS]
    photos = PhotoSet([n for s in sets for n in s.names], [f for s in sets for f in s.features])
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

        others = Without(collection, number[name])
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
