"""What a photo more costs `ingest` with the local engine and with the workers of a Ray cluster on this machine.

    python tests/benchmarks/ray_engine.py --photos DATA/ukbench --count 60 --actors 2

Each engine ingests a quarter of the photos, and all of them, each time into an empty embedded database; what counts is
the difference, for starting a cluster, its workers and their models takes the same in both. The local engine has all
processors, as the workers have together. On a machine with other work the time of processors tells more than the clock:
two processes get more of it than one.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import psutil

from delf_milvus import DelfIndex, Settings
from delf_milvus.ingestion.pipeline import Progress
from delf_milvus.ingestion.scan import scan
from delf_milvus.model.environment import prepare_environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--preset", default="fast")
    options = parser.parse_args()
    # As the command does.
    prepare_environment()
    found = scan([options.photos]).photos[: options.count]
    # All else that a process does once is done before the local engine is measured.
    runs = [
        ("local", 1),
        ("local", len(found) // 4),
        ("local", len(found)),
        ("ray", len(found) // 4),
        ("ray", len(found)),
    ]
    took: dict[str, list[tuple[int, float, float]]] = {"local": [], "ray": []}
    with tempfile.TemporaryDirectory() as work:
        for engine, count in runs:
            folder = Path(work) / f"{engine}{count}"
            folder.mkdir()
            for photo in found[:count]:
                shutil.copy(photo.path, folder)
            given: dict[str, Any] = {
                "extract": {"preset": options.preset},
                "ingest": {"engine": engine},
                "ray": {"actors": options.actors},
            }
            took[engine].append((count, *measured(engine, folder, Path(work) / f"{folder.name}.db", Settings(**given))))
    more: dict[str, list[float]] = {}
    for engine, ((few, *first), (many, *second)) in ((name, rows[-2:]) for name, rows in took.items()):
        more[engine] = [(after - before) / (many - few) for before, after in zip(first, second, strict=True)]
        print(f"{engine}: a photo more takes {more[engine][0]:.2f} s, {more[engine][1]:.2f} s of processors")
    print(
        f"ray / local: {more['ray'][0] / more['local'][0]:.2f}; of processors {more['ray'][1] / more['local'][1]:.2f}"
    )


def measured(engine: str, folder: Path, place: Path, settings: Settings) -> tuple[float, float]:
    """Seconds that the photos took, by the clock and of processors."""
    spent: dict[psutil.Process, float] = {}
    memory = [0.0]

    def note(_: Progress) -> None:
        for one in (psutil.Process(), *psutil.Process().children(recursive=True)):
            spent[one] = sum(one.cpu_times()[:2])
            if "MapWorker" in " ".join(one.cmdline()):
                memory.append(float(one.memory_info().rss))

    before = sum(psutil.Process().cpu_times()[:2])
    with DelfIndex.open(place, settings=settings) as index:
        report = index.ingest([folder], progress=note)
    assert report.added, report.failures
    processors = sum(spent.values()) - before
    print(
        f"{engine}: {report.added} photos in {report.seconds:.1f} s, {processors:.1f} s of processors"
        + (f"; a worker takes {max(memory) / 1e9:.2f} GB" if max(memory) else ""),
        flush=True,
    )
    return report.seconds, processors


if __name__ == "__main__":
    main()
