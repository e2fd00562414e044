"""How everything grows with the rows, on the test server (Linux x86-64), under IVF_PQ.

    python tests/benchmarks/growth.py --rows 1000000 10000000

Images of 1000 synthetic features are written until each number of rows is reached; then the index is built, the server
is killed and started again, the collection loaded, and measured:

- search: whole, for the 1000 features of another photo of a stored image, 120 neighbours each, 32 lists visited, 100
  candidates matched and verified; its steps; how many of the photos were found first, and verified (medians of 10);
- with `--nprobe 16 64`, the neighbours too where so many lists are visited;
- ingest: of 20 images more, with their index; delete: of the same;
- memory: of the server's process; disk: of all its files.

The slope is the exponent of the power of the rows by which a figure grew since the line before. planned: what
`delf-milvus plan` says of it with its defaults, on this machine's cores, and how far that is from the measured.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from milvus_server import WheelServer

from delf_milvus import DelfIndex
from delf_milvus.features import Features
from delf_milvus.planning.hardware import Hardware
from delf_milvus.planning.model import PlanRequest, make_plan
from delf_milvus.planning.synthetic import MODEL, image, images, query
from delf_milvus.settings import Profile, Settings, StoreSettings
from delf_milvus.store.feature_store import FeatureStore

FEATURES = 1000
SEARCHES = 10
CHANGED = 20
STEPS = ("neighbours", "vote", "geometry", "match", "verify")
PLANNED = {
    "build s": ("standalone.build", 1.0),
    "neighbours ms": ("standalone.search", 1e3),
    "memory MB": ("standalone.memory", 1e-6),
    "disk MB": ("standalone.disk", 1e-6),
}
"""The names of the plan's estimates, and what their units are of ours."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--profile", default="IVF_PQ")
    parser.add_argument("--nprobe", type=int, nargs="*", default=[], help="lists visited, beside the setting's 32")
    parser.add_argument("--folder", type=Path, help="of the server's files; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        server = WheelServer(Path(folder))
        try:
            grow(server, Path(folder), sorted(options.rows), options.profile, options.nprobe)
        finally:
            server.kill()


def grow(server: WheelServer, folder: Path, sizes: list[int], profile: Profile, nprobes: list[int]) -> None:
    before: dict[str, float] = {}
    written = 0
    settings = StoreSettings(timeout=600)
    for rows in sizes:
        figures: dict[str, float] = {"rows": rows}
        with FeatureStore.open(server.uri, "growth", MODEL, settings, max_features=FEATURES) as store:
            started = time.perf_counter()
            for items in images(written // FEATURES, rows // FEATURES, FEATURES):
                store.write(items)
            figures["write rows/s"] = (rows - written) / (time.perf_counter() - started)
            written = rows
            started = time.perf_counter()
            store.build_index(profile)
            figures["build s"] = time.perf_counter() - started
        server.restart()
        with opened(server, settings) as index:
            started = time.perf_counter()
            index.search(seen_again(0))
            figures["first search s"] = time.perf_counter() - started
            figures |= searched(index, rows // FEATURES)
            figures["memory MB"] = resident(server) / 1e6
            figures["disk MB"] = size(folder) / 1e6
            for nprobe in nprobes:
                with opened(server, settings.model_copy(update={"nprobe": nprobe})) as other:
                    figures[f"nprobe {nprobe} ms"] = searched(other, rows // FEATURES)["neighbours ms"]
            figures |= changed(index.store, rows // FEATURES)
            status = index.store.index_status()
        planned = plan_of(rows, profile)
        for name, value in figures.items():
            slope = math.log(value / before[name]) / math.log(rows / before["rows"]) if before.get(name) else math.nan
            told = f"  slope {slope:5.2f}" if not math.isnan(slope) else " " * 13
            told += f"  planned {planned[name]:,.1f} ({planned[name] / value - 1:+.0%})" if name in planned else ""
            print(f"{name:>20} {value:14,.1f}{told}".rstrip(), flush=True)
        estimate = f"about {status.memory_bytes / 1e6:.0f} MB"
        print(f"    {status.index} {dict(status.params)}, {status.segments} segments, {estimate}\n", flush=True)
        before = figures


def opened(server: WheelServer, settings: StoreSettings) -> DelfIndex:
    """The collection, with these settings."""
    return DelfIndex.open(server.uri, collection="growth", made_by=MODEL, settings=Settings(store=settings))


def plan_of(rows: int, profile: Profile) -> dict[str, float]:
    """What `delf-milvus plan` says of the same collection, on as many cores."""
    request = PlanRequest(
        rows // FEATURES,
        FEATURES,
        FEATURES,
        dim=MODEL.dim,
        global_dim=MODEL.global_dim,
        profile=profile,
        release=(2, 3),
    )
    plan = make_plan(request, Hardware(query_cores=os.cpu_count() or 1))
    return {name: times * (plan[estimate] or math.nan) for name, (estimate, times) in PLANNED.items()}


def searched(index: DelfIndex, stored: int) -> dict[str, float]:
    """Milliseconds of whole searches and of their steps, and how many found the image that the query shows."""
    steps: dict[str, list[float]] = {"search": [], **{step: [] for step in STEPS}}
    right = 0
    for number in np.linspace(0, stored - 1, SEARCHES).astype(int).tolist():
        query = seen_again(number)
        started = time.perf_counter()
        result = index.search(query)
        steps["search"].append(time.perf_counter() - started)
        for step in STEPS:
            steps[step].append(getattr(result.timings, step))
        right += bool(result.hits) and result.hits[0].image_id == image(number, 0)[0].image_id
    return {f"{step} ms": 1e3 * float(np.median(seconds)) for step, seconds in steps.items()} | {"found first": right}


def changed(store: FeatureStore, stored: int) -> dict[str, float]:
    """Images a second that come beside all others, index included, and that go again."""
    items = [image(number, FEATURES) for number in range(stored, stored + CHANGED)]
    started = time.perf_counter()
    store.write(items)
    came = time.perf_counter()
    store.delete([record.image_id for record, _ in items])
    return {"ingest images/s": CHANGED / (came - started), "delete images/s": CHANGED / (time.perf_counter() - came)}


def seen_again(number: int) -> Features:
    """Another photo of what image `number` shows: a third of its features, where a smaller copy has them."""
    rng = np.random.default_rng((number, 2))
    _, there = image(number, FEATURES)
    locations = rng.uniform(0, (639, 479), (FEATURES, 2))
    locations[: FEATURES // 3] = 0.8 * there.locations[: FEATURES // 3] + 40
    return replace(there, locations=locations.astype(np.float32), descriptors=query(number, FEATURES))


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
