"""What does confidence promise, and what does it keep? On photos that the calibration has not seen.

    python tests/benchmarks/false_alarms.py --data ../shared/data --every 2

The collection: UKBench, the multi-view scenes, the landmarks, the classes of `objects` that the calibration used, and
the churches that filled its collections. Queries without a match: the other classes and churches; photos of a class
whose name begins with the same word may show the same thing (several do) and do not count as answers, nor does one
pair of photos of one church. Queries with a match: UKBench, the multi-view scenes and the judging places, each without
its own photo. For UKBench only every third of these is asked, so that the three weigh more alike.

Prints, for each bar, the share of queries without a match that are answered and the share of right first answers that
pass; then the expected calibration error of the confidence of first answers, queries with a match having half of the
weight.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from judge import PLACES, SETS, load_set, truth

from delf_milvus.evaluation.calibration import CalibrationConfig, family
from delf_milvus.evaluation.memory import MemoryCollection
from delf_milvus.evaluation.statistics import statistic
from delf_milvus.matcher import PhotoMatcher
from delf_milvus.retrieval.search import Timings, judge_candidates
from delf_milvus.settings import Settings

BARS = (0.05, 0.01, 0.003, 0.001)
SAME_CHURCH = {"churches/n03028079_26345.jpg", "churches/n03028079_30176.jpg"}


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
    sets = {name: load_set(name, options.data, matcher.extractor, options.cache) for name in SETS}
    features = {name: f for photos in sets.values() for name, f in zip(photos.names, photos.features, strict=True)}
    used, others = halves(sets["objects"].names, sets["churches"].names)
    stored = [*sets["ukbench"].names, *sets["multiview"].names, *sets["landmarks"].names, *used]
    collection = MemoryCollection(stored, [features[name] for name in stored])
    instances = truth(stored)
    places = set(PLACES.read_text().split())
    asking = [*others, *sets["ukbench"].names[::3], *sets["multiview"].names]
    asking += [name for name in sets["landmarks"].names if name.split("/")[1] in places]

    unanswerable: list[float] = []
    right: dict[str, list[float]] = defaultdict(list)
    sure: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for name in asking[:: options.every]:
        judged = judge_candidates(features[name], collection, settings.search, settings.verify, Timings())
        assessed = matcher.calibration.assess(judged.evidence)
        kept = [i for i, one in enumerate(judged.candidates) if not may_match(name, one.image_id)]
        kind, first = name.split("/")[0], judged.candidates[kept[0]].image_id
        is_right = name in instances and instances.get(first) == instances[name]
        if name in instances:
            if is_right:
                right[kind].append(float(assessed.false_alarm[kept[0]]))
        else:
            kind = "no match"
            unanswerable.append(float(assessed.false_alarm[kept].min()))
        sure[kind].append((float(assessed.confidence[kept[0]]), float(is_right), float(name in instances)))

    print(f"{len(unanswerable)} queries without a match")
    print(f"{'max_false_alarm':<17}{'false alarms':<14}" + "".join(f"{k} ({len(v)} right)  " for k, v in right.items()))
    for bar in BARS:
        shares = "".join(f"{np.mean(np.array(v) <= bar):<{len(k) + 14}.1%}" for k, v in right.items())
        print(f"{bar:<17g}{np.mean(np.array(unanswerable) <= bar):<14.2%}{shares}")
    for kinds in (["ukbench", "multiview"], ["landmarks"], ["ukbench", "multiview", "landmarks"]):
        values = [value for kind in [*kinds, "no match"] for value in sure[kind]]
        print(f"expected calibration error, {' and '.join(kinds)}: {statistic(values, 'ece'):.3f}")


def halves(objects: list[str], churches: list[str]) -> tuple[list[str], list[str]]:
    """Photos that the calibration used, and the others: see `calibrate`."""
    classes = sorted({name.split("/")[1] for name in objects})
    used = [name for name in objects if classes.index(name.split("/")[1]) % 2 == 0]
    sizes = [sum(classes.index(name.split("/")[1]) % 4 == start for name in used) for start in (0, 2)]
    filling = max(0, CalibrationConfig(Path()).size - min(sizes))
    ordered = sorted(churches)
    return [*used, *ordered[:filling]], [*(name for name in objects if name not in set(used)), *ordered[filling:]]


def may_match(query: str, image: str) -> bool:
    """Whether an image is the query itself, or may show the same thing although it counts as unrelated."""
    if query == image or {query, image} == SAME_CHURCH:
        return True
    kinds = [name.split("/") for name in (query, image)]
    return all(kind[0] == "objects" for kind in kinds) and family(kinds[0][1]) == family(kinds[1][1])


if __name__ == "__main__":
    main()
