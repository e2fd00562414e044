"""The model's global descriptor alone: what local features are worth beside it.

    python tests/benchmarks/judge.py --data ../shared/data --quick --save quick.json    # keeps features in runs/judge
    python tests/benchmarks/global_descriptor.py --fingerprint FINGERPRINT --against quick.json

Photos are ranked by the cosine similarity of their global descriptors. Queries and figures are those of judge.py, whose
--save a run with --against reads: prints the mean difference, the package's minus the global descriptor's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from judge import SETS, Figures, alike, compare, means, note, read_features
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


def judged(names: list[str], vectors: Vectors, among: list[int], queries: list[str]) -> Figures:
    """Figures of every query, by set, with the photos `among` as the collection."""
    same = alike(names)
    number = {name: i for i, name in enumerate(names)}
    collection = vectors[among]
    figures: Figures = {}
    for name in queries:
        order = np.argsort(-(collection @ vectors[number[name]]), kind="stable")
        note(figures, name, [names[among[i]] for i in order.tolist()], same[name])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/judge"))
    parser.add_argument("--fingerprint", required=True)
    parser.add_argument("--stored", type=int, default=500)
    parser.add_argument("--save", type=Path, help="JSON file for the figures of every query")
    parser.add_argument("--against", type=Path, help="such a file of judge.py")
    options = parser.parse_args()
    sets = [read_features(options.cache / f"{options.fingerprint}-{options.stored}-{name}.npz") for name in SETS]
    names = [name for one in sets for name in one.names]
    vectors = np.array([features.global_descriptor for one in sets for features in one.features])
    queries = list(alike(names))
    alone = [i for i, name in enumerate(names) if name.startswith("ukbench")]
    runs = {
        "alone": judged(names, vectors, alone, [q for q in queries if q.startswith("ukbench")]),
        "with distractors": judged(names, vectors, list(range(len(names))), queries),
    }
    for run, figures in runs.items():
        print(f"{run}: {means(figures)}")
    if options.save:
        options.save.write_text(json.dumps(runs))
    if options.against:
        theirs = json.loads(options.against.read_text())
        for run, figures in runs.items():
            print(f"the package's minus these, {run}, mean and 95 % interval:")
            compare(theirs.get(run, {}), figures)


if __name__ == "__main__":
    main()
