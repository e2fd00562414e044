"""What a search adds to the server's own, step by step, on the test server (Linux x86-64), under IVF_PQ.

    python tests/benchmarks/server_search.py --images 1000

Side by side in one run: the neighbour step of the store and the client's bare search of the same vectors; the vote; the
records and packed features of 100 candidates. Medians.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from milvus_server import WheelServer
from pymilvus import MilvusClient
from synthetic import MODEL, images, query

from delf_milvus.retrieval.voting import vote
from delf_milvus.settings import StoreSettings
from delf_milvus.store.feature_store import FeatureStore

FEATURES = 1000
NEIGHBOURS = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = WheelServer(Path(folder))
        try:
            with FeatureStore.open(
                server.uri, "speed", MODEL, StoreSettings(timeout=600), max_features=FEATURES
            ) as store:
                started = time.perf_counter()
                for items in images(0, options.images, FEATURES):
                    store.write(items)
                print(f"written: {options.images * FEATURES / (time.perf_counter() - started):.0f} rows/s", flush=True)
                store.build_index("IVF_PQ")
                status = store.index_status()
                print(f"{status.index} {dict(status.params)}, {dict(status.search)}, {status.segments} segments")
                measure(store, MilvusClient(server.uri), options.images, options.rounds)
        finally:
            server.kill()


def measure(store: FeatureStore, client: MilvusClient, count: int, rounds: int) -> None:
    params = {"metric_type": "IP", "params": {"nprobe": 32}}
    raw, ours, votes, geometry = [], [], [], []
    for number in range(rounds + 2):
        wanted = query(number % count, FEATURES)
        vectors = list(wanted)

        def bare(vectors: list = vectors) -> object:
            return client.search(
                "speed_features", vectors, anns_field="descriptor", limit=NEIGHBOURS, search_params=params
            )

        def step(wanted: np.ndarray = wanted) -> tuple:
            return store.neighbours(wanted, NEIGHBOURS)

        # Which of the two is first alternates: the second finds a warmer server.
        for one, times in ((bare, raw), (step, ours))[:: 1 if number % 2 else -1]:
            seconds, found = timed(one)
            times.append(seconds)
            if one is step:
                keys, similarities = found
        seconds, ranking = timed(lambda k=keys, s=similarities: vote(k, s))
        votes.append(seconds)
        seconds, stored = timed(lambda r=ranking: store.stored(r.images[:100].tolist()))
        geometry.append(seconds)
        assert len(stored) == min(100, len(ranking))
        assert int(ranking.images[0]) in stored
    figures = {
        name: float(np.median(times[2:]))
        for name, times in (
            ("bare search", raw),
            ("neighbour step", ours),
            ("vote", votes),
            ("geometry of 100", geometry),
        )
    }
    for name, seconds in figures.items():
        print(f"{name:>16}: {1e3 * seconds:8.1f} ms")
    ratios = np.array(ours[2:]) / np.array(raw[2:])
    print(
        f"neighbour step / bare search: {figures['neighbour step'] / figures['bare search']:.3f} of medians, "
        f"{np.median(ratios):.3f} median of pairs"
    )


def timed(call: Callable) -> tuple[float, object]:
    started = time.perf_counter()
    found = call()
    return time.perf_counter() - started, found


if __name__ == "__main__":
    main()
