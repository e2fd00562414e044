"""The whole path on UKBench: ingest into the embedded database, search, time, memory, N-S.

    python tests/benchmarks/whole_path.py --data ../shared/data --queries 100

Prints what a search costs beyond decoding, extracting and the database's own search (the same vectors through the
client alone), the peak memory of ingesting, and the N-S score over the queries (all 1000 by default).
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from delf_milvus import DelfIndex, Settings
from delf_milvus.evaluation.metrics import ns_score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--preset", default="standard", choices=("fast", "standard", "paper"))
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--neighbours", type=int, default=None)
    options = parser.parse_args()
    values: dict = {"extract": {"preset": options.preset}}
    if options.neighbours:
        values["search"] = {"neighbours": options.neighbours}
    settings = Settings(**values)
    folder = options.data / "ukbench"
    with tempfile.TemporaryDirectory() as work, DelfIndex.open(Path(work) / "ukbench.db", settings=settings) as index:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        report = index.ingest([folder])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"ingest: {report.added} photos, {report.features} features, {report.seconds:.0f} s "
            f"({report.added / report.seconds:.1f} photos/s); peak memory {peak / 2**20:.2f} GiB, "
            f"{(peak - before) / 2**20:.2f} GiB more than before, database included",
            flush=True,
        )
        photos = sorted(folder.glob("*.jpg"))
        chosen = photos[:: max(1, len(photos) // options.queries)]
        scores, added, raw, shares = [], [], [], []
        for number, path in enumerate(chosen, 1):
            result = index.search(path, top_k=4, include_unverified=True)
            first = int(path.stem.removeprefix("ukbench")) // 4 * 4
            relevant = {f"ukbench{view:05d}.jpg" for view in range(first, first + 4)}
            scores.append(ns_score([hit.image_id for hit in result.hits], relevant))
            timings = result.timings
            shares.append([timings.neighbours, timings.vote, timings.geometry, timings.match, timings.verify])
            if number % 5 == 1:
                raw.append(raw_search(index, path))
                added.append(timings.total - timings.decode - timings.extract - raw[-1])
            if number % 100 == 0:
                print(f"  {number} queries, N-S {np.mean(scores):.3f}", flush=True)
        print(f"N-S {np.mean(scores):.3f} over {len(scores)} queries")
        names = ("neighbours", "vote", "geometry", "match", "verify")
        medians = ", ".join(f"{n} {m:.3f}" for n, m in zip(names, np.median(shares, axis=0), strict=True))
        print(f"seconds, median: {medians}; client alone {np.median(raw):.3f}")
        print(f"a search adds {np.median(added):.3f} s to decoding, extracting and the database's own search")


def raw_search(index: DelfIndex, path: Path) -> float:
    """Seconds that the client alone takes for the same vectors, index parameters and limit."""
    matcher, store = index._matcher, index.store
    query = matcher.query_features(matcher.decode(path))
    calls = store.neighbour_calls(query.descriptors, index.settings.search.neighbours)
    started = time.perf_counter()
    for call in calls:
        store.connection.client.search(**call)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
