"""How often is a query without a match answered, and how many right answers does the bar cost?

    python tests/benchmarks/false_alarms.py --data ../shared/data

The collection is UKBench (1000 images, in memory, exact-like search). Queries without a match are photos of the object
classes that the calibration left out. Queries with a match are the UKBench photos, each with its own image taken out
of the answers: three other views of the object remain.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from judge import load_set, truth

from delf_milvus.evaluation.calibration import judging_photos
from delf_milvus.evaluation.memory import MemoryCollection
from delf_milvus.matcher import PhotoMatcher
from delf_milvus.retrieval.search import Timings, judge_candidates
from delf_milvus.settings import Settings

BARS = (0.1, 0.05, 0.01, 0.001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--preset", default="standard", choices=("fast", "standard", "paper"))
    parser.add_argument("--cache", type=Path, default=Path("runs/judge"))
    parser.add_argument("--every", type=int, default=1, help="use every so-manieth query")
    options = parser.parse_args()
    settings = Settings(model=options.model, extract={"preset": options.preset})
    matcher = PhotoMatcher(settings)
    ukbench = load_set("ukbench", options.data, matcher.extractor, options.cache)
    collection = MemoryCollection(ukbench.names, ukbench.features)
    instances = truth(ukbench.names)

    wrong = []
    for path in judging_photos(options.data / "objects")[:: options.every]:
        query = matcher.query_features(matcher.decode(path))
        judged = judge_candidates(query, collection, settings.search, settings.verify, Timings())
        wrong.append(matcher.calibration.assess(judged.evidence).false_alarm.min(initial=1.0))

    right, sure = [], []
    for name, query in list(zip(ukbench.names, ukbench.features, strict=True))[:: options.every]:
        judged = judge_candidates(query, collection, settings.search, settings.verify, Timings())
        false_alarm = matcher.calibration.assess(judged.evidence).false_alarm
        rest = [i for i, candidate in enumerate(judged.candidates) if candidate.image_id != name]
        best = rest[0]
        right.append(instances[judged.candidates[best].image_id] == instances[name])
        sure.append(false_alarm[best])
    answered = np.array(sure)[np.array(right)]
    print(
        f"{len(wrong)} queries without a match; {len(right)} with one, {np.mean(right):.1%} with a right first answer"
    )
    print("max_false_alarm   false alarms   right first answers kept")
    for bar in BARS:
        print(f"{bar:<15g}   {np.mean(np.array(wrong) <= bar):<12.2%}   {np.mean(answered <= bar):.1%}")


if __name__ == "__main__":
    main()
