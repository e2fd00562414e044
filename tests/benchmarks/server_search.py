"""What a search adds to the server's own, step by step, on the test server (Linux x86-64), under IVF_PQ.

    python tests/benchmarks/server_search.py --images 1000

Side by side in one run: the neighbour step of the store and the client's bare search of the same vectors; the vote; the
records and packed features of 100 candidates. Medians; the processor time of this process does not depend on what
else the machine does.
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

from delf_milvus.planning.synthetic import MODEL, images, query
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
    names = ("bare search", "neighbour step", "vote", "geometry of 100")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(-2, rounds):
        wanted = query(number % count, FEATURES)
        vectors = list(wanted)

        def bare(vectors: list = vectors) -> object:
            return client.search(
                "speed_features", vectors, anns_field="descriptor", limit=NEIGHBOURS, search_params=params
            )

        def step(wanted: np.ndarray = wanted) -> tuple:
            return store.neighbours(wanted, NEIGHBOURS)

        # Which of the two is first alternates: the second finds a warmer server.
        both = [("bare search", bare), ("neighbour step", step)]
        found = {}
        for name, call in both[:: 1 if number % 2 else -1]:
            seconds, found[name] = timed(call)
            times[name].append(seconds)
        keys, similarities = found["neighbour step"]
        seconds, ranking = timed(lambda k=keys, s=similarities: vote(k, s))
        times["vote"].append(seconds)
        seconds, stored = timed(lambda r=ranking: store.stored(r.images[:100].tolist()))
        times["geometry of 100"].append(seconds)
        assert len(stored) == min(100, len(ranking))
        assert number % count in {int(record.image_id.partition(".")[0]) for record, _ in stored.values()}
    figures = {name: np.median(values[2:], axis=0) for name, values in times.items()}
    for name, (wall, processor) in figures.items():
        print(f"{name:>16}: {1e3 * wall:8.1f} ms, of which {1e3 * processor:8.1f} ms of this process's processor")
    ratios = [ours[0] / raw[0] for ours, raw in zip(times["neighbour step"][2:], times["bare search"][2:], strict=True)]
    print(
        f"neighbour step / bare search: {figures['neighbour step'][0] / figures['bare search'][0]:.3f} of medians, "
        f"{np.median(ratios):.3f} median of pairs"
    )


def timed(call: Callable) -> tuple[tuple[float, float], object]:
    """Seconds by the wall and of this process's processor time, and what the call returned."""
    started, busy = time.perf_counter(), time.process_time()
    found = call()
    return (time.perf_counter() - started, time.process_time() - busy), found


if __name__ == "__main__":
    main()
