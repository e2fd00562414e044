"""How many photos a second `ingest` stores with the local engine and with the workers of a Ray cluster on this machine.

    python tests/benchmarks/ray_engine.py --photos DATA/ukbench --count 60 --actors 2

Each engine ingests the same photos into an empty embedded database; the local one has all processors, as the workers
have together. A rate is that of the second half of the photos: starting a cluster, its workers and their models is over
then.
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
            print(f"ray / local: {rates['ray'] / rates['local']:.2f}")


def measured(engine: str, folder: Path, place: Path, settings: Settings) -> float:
    """Photos a second from the first outcome on."""
    times: list[float] = []
    memory: list[float] = []

    def note(progress: Progress) -> None:
        if progress.done:
            times.append(time.monotonic())
            memory[:] = [*memory, *workers()]

    started = time.monotonic()
    with DelfIndex.open(place, settings=settings) as index:
        report = index.ingest([folder], progress=note)
    assert report.added, report.failures
    half = len(times) // 2
    rate = half / (times[-1] - times[-half - 1])
    print(
        f"{engine}: {report.added} photos, {report.features} features in {report.seconds:.1f} s; first outcome after "
        f"{times[0] - started:.1f} s; {rate:.2f} photos a second in the second half"
        + (f"; a worker takes up to {max(memory) / 1e9:.2f} GB" if memory else "")
    )
    return rate


def workers() -> list[float]:
    """Resident bytes of each worker of a cluster that this process started."""
    children = psutil.Process().children(recursive=True)
    return [float(one.memory_info().rss) for one in children if "MapWorker" in " ".join(one.cmdline())]


if __name__ == "__main__":
    main()
