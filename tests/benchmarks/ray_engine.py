"""How many photos a second `ingest` stores with the local engine and with the workers of a Ray cluster on this machine.

    python tests/benchmarks/ray_engine.py --photos DATA/ukbench --count 60 --actors 2

Each engine ingests the same photos into an empty embedded database; the local one has all processors, as the workers
have together. What counts is the second half of the photos: starting a cluster, its workers and their models is over
then. On a machine with other work the time of processors tells more than the rate: two processes get more of it than
one.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from delf_milvus import DelfIndex, Settings
from delf_milvus.ingestion.pipeline import Progress
from delf_milvus.ingestion.scan import scan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "photos"
        folder.mkdir()
        for photo in scan([options.photos]).photos[: options.count]:
            shutil.copy(photo.path, folder)
        for number in range(options.rounds):
            rates = {}
            for engine in ("local", "ray"):
                given: dict[str, Any] = {
                    "extract": {"preset": options.preset},
                    "ingest": {"engine": engine},
                    "ray": {"actors": options.actors},
                }
                rates[engine] = measured(engine, folder, Path(work) / f"{engine}{number}.db", Settings(**given))
            ratios = [ray / local for ray, local in zip(rates["ray"], rates["local"], strict=True)]
            print(f"ray / local: {ratios[0]:.2f} of the rate, {ratios[1]:.2f} of the time of processors", flush=True)


def measured(engine: str, folder: Path, place: Path, settings: Settings) -> tuple[float, float]:
    """Photos a second of the second half, and seconds of processors for each of them."""
    times: list[float] = []
    spent: list[float] = []
    memory = [0.0]

    def note(progress: Progress) -> None:
        if progress.done:
            times.append(time.monotonic())
        if progress.done in (progress.total // 2, progress.total):
            spent.append(processors())
            memory.extend(float(one.memory_info().rss) for one in tree() if "MapWorker" in " ".join(one.cmdline()))

    started = time.monotonic()
    with DelfIndex.open(place, settings=settings) as index:
        report = index.ingest([folder], progress=note)
    assert report.added, report.failures
    half = len(times) - len(times) // 2
    rate, each = half / (times[-1] - times[-half - 1]), (spent[1] - spent[0]) / half
    print(
        f"{engine}: {report.added} photos, {report.features} features in {report.seconds:.1f} s; first outcome after "
        f"{times[0] - started:.1f} s; second half: {rate:.2f} photos a second, {each:.2f} s of processors each"
        + (f"; a worker takes {max(memory) / 1e9:.2f} GB" if max(memory) else ""),
        flush=True,
    )
    return rate, each


def tree() -> list[psutil.Process]:
    """This process, and all that a cluster of its own consists of."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def processors() -> float:
    return sum(sum(one.cpu_times()[:2]) for one in tree())


if __name__ == "__main__":
    main()
