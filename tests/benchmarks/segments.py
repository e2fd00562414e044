"""What segments take of a search, on the test server (Linux x86-64), under IVF_PQ of 1024 lists.

    python tests/benchmarks/segments.py --rows 600000 --parts 6

So many rows are written in parts, each flushed for itself, and the index is built; the server merges nothing by itself.
Neighbours of 500 descriptors are measured, in milliseconds (medians of 8): with the segments as written; beside
`compact`, until the index of what was merged is built; and with what is left.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from milvus_server import WheelServer

from delf_milvus.planning.synthetic import MODEL, images, query
from delf_milvus.settings import StoreSettings
from delf_milvus.store.feature_store import FeatureStore

FEATURES = 500
SEARCHES = 8
NPROBES = (8, 64)
NEIGHBOURS = (30, 120, 480)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600_000)
    parser.add_argument("--parts", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = WheelServer(Path(folder))
        try:
            merge_nothing(Path(folder) / "configs/milvus.yaml")
            server.restart()
            measure(server.uri, options.rows, options.parts)
        finally:
            server.kill()


def merge_nothing(config: Path) -> None:
    text = config.read_text()
    assert "enableAutoCompaction: true" in text
    config.write_text(text.replace("enableAutoCompaction: true", "enableAutoCompaction: false"))


def measure(uri: str, rows: int, parts: int) -> None:
    with opened(uri) as store:
        each = rows // FEATURES // parts
        for part in range(parts):
            for items in images(part * each, (part + 1) * each, FEATURES):
                store.write(items)
            # Only what is flushed is in a segment of its own.
            store.build_index("FLAT")
        store.build_index("IVF_PQ")
        tell(uri, store)
        took: list[float] = []
        merged = threading.Event()
        thread = threading.Thread(target=search_until, args=(uri, merged, took))
        thread.start()
        report = store.compact()
        merged.set()
        thread.join()
        print(
            f"{report.what} {report.seconds:.0f} s; meanwhile nprobe {NPROBES[0]}, 120 neighbours: median "
            f"{1e3 * np.median(took):.0f} ms, most {1e3 * max(took):.0f} ms",
            flush=True,
        )
        tell(uri, store)


def opened(uri: str, nprobe: int = 32) -> FeatureStore:
    settings = StoreSettings(timeout=600, nlist=1024, nprobe=nprobe)
    return FeatureStore.open(uri, "segments", MODEL, settings, max_features=FEATURES)


def search_until(uri: str, merged: threading.Event, took: list[float]) -> None:
    with opened(uri, NPROBES[0]) as store:
        while not merged.is_set():
            took.append(timed(store, 120, len(took)))


def tell(uri: str, store: FeatureStore) -> None:
    status = store.index_status()
    for nprobe in NPROBES:
        with opened(uri, nprobe) as searched:
            timed(searched, 120, 0)
            for k in NEIGHBOURS:
                median = np.median([timed(searched, k, number) for number in range(SEARCHES)])
                where = f"{status.total_rows} rows, {status.segments} segments, nprobe {nprobe:2d}, {k:3d} neighbours"
                print(f"{where}: {1e3 * median:4.0f} ms", flush=True)


def timed(store: FeatureStore, k: int, number: int) -> float:
    wanted = query(number, FEATURES)
    started = time.perf_counter()
    store.neighbours(wanted, k)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
