"""How search, build, memory and disk grow with the rows, on the test server (Linux x86-64), under IVF_PQ.

    python tests/benchmarks/growth.py --rows 100000 1000000 5000000

Images of 1000 synthetic features are written until each number of rows is reached; then the index is built, the server
is killed and started again, the collection loaded, and measured: a search for 1000 descriptors, 120 neighbours each, 32
lists visited (median of 10), the server's resident memory, the size of its files. The slope is the exponent of the
power of the rows by which a figure grew since the line before.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from milvus_server import WheelServer

from delf_milvus.planning.synthetic import MODEL, images, query
from delf_milvus.settings import Profile, StoreSettings
from delf_milvus.store.feature_store import FeatureStore

FEATURES = 1000
NEIGHBOURS = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--profile", default="IVF_PQ")
    parser.add_argument("--folder", type=Path, help="of the server's files; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        server = WheelServer(Path(folder))
        try:
            grow(server, Path(folder), sorted(options.rows), options.profile)
        finally:
            server.kill()


def grow(server: WheelServer, folder: Path, sizes: list[int], profile: Profile) -> None:
    names = ("rows", "write rows/s", "build s", "load s", "search ms", "memory MB", "disk MB")
    print("  ".join(f"{name:>12}" for name in (*names, "slope of search")), flush=True)
    before: tuple[int, float] | None = None
    written = 0
    settings = StoreSettings(timeout=600)
    for rows in sizes:
        store = FeatureStore.open(server.uri, "growth", MODEL, settings, max_features=FEATURES)
        started = time.perf_counter()
        for items in images(written // FEATURES, rows // FEATURES, FEATURES):
            store.write(items)
        speed = (rows - written) / (time.perf_counter() - started)
        written = rows
        started = time.perf_counter()
        store.build_index(profile)
        built = time.perf_counter() - started
        store.close()
        server.restart()
        store = FeatureStore.open(server.uri, "growth", MODEL, settings, max_features=FEATURES)
        started = time.perf_counter()
        store.neighbours(query(0, FEATURES), NEIGHBOURS)
        loaded = time.perf_counter() - started
        seconds = []
        for number in range(10):
            wanted = query(number, FEATURES)
            started = time.perf_counter()
            store.neighbours(wanted, NEIGHBOURS)
            seconds.append(time.perf_counter() - started)
        search = float(np.median(seconds))
        slope = "" if before is None else f"{math.log(search / before[1]) / math.log(rows / before[0]):.2f}"
        before = rows, search
        values = (rows, speed, built, loaded, 1e3 * search, resident(server) / 1e6, size(folder) / 1e6)
        print("  ".join(f"{value:12.0f}" for value in values) + f"  {slope:>12}", flush=True)
        status = store.index_status()
        estimate = f"about {status.memory_bytes / 1e6:.0f} MB"
        print(f"    {status.index} {dict(status.params)}, {status.segments} segments, {estimate}", flush=True)
        store.close()


def resident(server: WheelServer) -> int:
    """Bytes of memory of the server's process."""
    text = Path(f"/proc/{server.pid}/status").read_text()
    return 1024 * int(text.partition("VmRSS:")[2].split()[0])


def size(folder: Path) -> int:
    """Bytes of files."""
    # The server clears up meanwhile: what is gone counts nothing.
    sizes = subprocess.run(["du", "-sb", str(folder)], stdout=subprocess.PIPE, text=True, check=False).stdout
    return int(sizes.split()[0])


if __name__ == "__main__":
    main()
