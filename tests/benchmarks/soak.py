"""Mixed load for an hour or a day: does memory, the number of open files or of threads, or the time of a call grow?

    python tests/benchmarks/soak.py --minutes 60 --database lite
    python tests/benchmarks/soak.py --minutes 60 --database service --photos DATA/ukbench --model bundled
    python tests/benchmarks/soak.py --extract 1050 --one-size

Threads search, add, add again, delete, list by a filter, match, ask for the status and (all but `service`) ingest a
folder that changes, each chosen at random. --database: `lite`, the embedded one in this process; `server`, the wheel of
the tests as a process of its own; `service`, `delf-milvus serve` over an embedded database. Measured is the process
that holds the index: this one, or that of the service. The ids come from a fixed pool, so the collection does not grow,
and what grows is a leak or the database's own. --pause: seconds that a thread rests after each call.

Every five seconds memory, files and threads are noted. For each, and for the minutes' median times, a line is fitted to
what follows the first fifth; its 95 % interval comes from resampling blocks of residuals, because neighbouring samples
are alike. "flat" is said only where that interval lies within a tenth of the mean per hour around zero, "grows" or
"shrinks" where it leaves out zero, "cannot tell" otherwise.

--extract: instead of all this extract so many photos of ever new sizes, or of one size, and tell memory, and how much
of it is in use (Linux).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import gc
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import cv2
import numpy as np
import psutil
from conftest import RgbImage, make_photo, save_photo
from milvus_server import WheelServer
from model.models import write_tiny_model
from numpy.typing import NDArray
from service.serving import process

from delf_milvus import DelfClient, DelfIndex, DelfMilvusError, Settings
from delf_milvus.model.extractor import Extractor
from delf_milvus.settings import ExtractSettings, StoreSettings

SAMPLE_SECONDS = 5.0
FLAT = 0.1
"""Of the mean, per hour: what a flat line may rise or fall at most."""

WEIGHTS = {"search": 50, "add": 18, "delete": 6, "list": 8, "match": 6, "status": 6, "ingest": 2}
INGESTED = 6

_BLOCKS = 10
_WIDER = 1.32
"""What so few blocks ask for: sqrt(10 / 8) for the two fitted numbers, and Student's 2.31 instead of 1.96."""

Floats = NDArray[np.float64]
Calls = dict[str, Callable[[np.random.Generator], object]]


class Usage(NamedTuple):
    """memory: resident, MB. handles: open files and sockets."""

    memory: float
    handles: int
    threads: int


def usage(pid: int | None = None) -> Usage:
    """What a process, this one by default, takes now."""
    of = psutil.Process(pid)
    return Usage(of.memory_info().rss / 1e6, of.num_fds(), of.num_threads())


def in_use() -> Usage:
    """What this process takes when all that is free went back to the system, where the C library can do that."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return usage()


class Trend(NamedTuple):
    """A fitted line: its rise in an hour, the 95 % interval of that, and the mean."""

    slope: float
    low: float
    high: float
    mean: float

    @property
    def verdict(self) -> str:
        """In one or two words."""
        if max(abs(self.low), abs(self.high)) <= FLAT * abs(self.mean):
            return "flat"
        if self.low <= 0 <= self.high:
            return "cannot tell"
        return "grows" if self.slope > 0 else "shrinks"


def trend(hours: Floats, values: Floats, resamples: int = 2000, seed: int = 0) -> Trend:
    """The line through values over time; its interval by the moving-block bootstrap of its residuals."""
    slope, start = np.polyfit(hours, values, 1)
    fitted = start + slope * hours
    residuals = values - fitted
    count = len(values)
    length = max(2, count // _BLOCKS)
    rng = np.random.default_rng(seed)
    first = rng.integers(0, count - length + 1, (resamples, -(-count // length)))
    drawn = residuals[(first[..., None] + np.arange(length)).reshape(resamples, -1)[:, :count]]
    centred = hours - hours.mean()
    slopes = (fitted + drawn) @ centred / (centred @ centred)
    low, high = slope + _WIDER * (np.quantile(slopes, [0.025, 0.975]) - slope)
    return Trend(float(slope), float(low), float(high), float(values.mean()))


@dataclass
class Log:
    """What happened: times of calls by name since the last minute, and errors by their text."""

    taken: dict[str, list[float]] = field(default_factory=lambda: collections.defaultdict(list))
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    calls: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, name: str, call: Callable[[], object]) -> None:
        """Call, and note how long it took and how it failed."""
        started = time.perf_counter()
        try:
            call()
        except DelfMilvusError as error:
            with self._lock:
                self.errors[f"{name}: {error}"] += 1
        with self._lock:
            self.calls += 1
            self.taken[name].append(time.perf_counter() - started)

    def minute(self) -> dict[str, list[float]]:
        """The times since this was last called."""
        with self._lock:
            taken, self.taken = self.taken, collections.defaultdict(list)
        return taken


def cut(photo: RgbImage, rng: np.random.Generator) -> RgbImage:
    """A photo without its margins, brighter or darker: a query."""
    height, width = photo.shape[:2]
    x, y = rng.integers(0, width // 6), rng.integers(0, height // 6)
    part = photo[y : height - height // 8, x : width - width // 8]
    return np.clip(part * rng.uniform(0.8, 1.2), 0, 255).astype(np.uint8)


def calls_of(index: DelfIndex | DelfClient, photos: list[RgbImage], folder: Path) -> Calls:
    """The calls of the load, by name. folder: of the photos that are ingested, which are written here."""

    def photo(rng: np.random.Generator) -> RgbImage:
        return photos[rng.integers(len(photos))]

    def named(rng: np.random.Generator) -> str:
        return f"pool/{rng.integers(len(photos))}"

    calls: Calls = {
        "search": lambda rng: index.search(cut(photo(rng), rng), top_k=5, include_unverified=bool(rng.integers(2))),
        "add": lambda rng: index.add(photo(rng), named(rng), {"year": int(rng.integers(2000, 2030))}),
        "delete": lambda rng: index.delete([named(rng)]),
        "list": lambda rng: index.list("pool/", 20, filter={"year": {">=": int(rng.integers(2000, 2030))}}),
        "status": lambda _: index.status(),
    }
    if isinstance(index, DelfIndex):
        calls["match"] = lambda rng: index.match(photo(rng), cut(photo(rng), rng))
        one_at_a_time = threading.Lock()

        def ingest(rng: np.random.Generator) -> None:
            with one_at_a_time:
                save_photo(folder / f"{rng.integers(INGESTED)}.png", photo(rng))
                report = index.ingest([folder], id_prefix="ingested/")
                assert not report.failed, report.failures

        calls["ingest"] = ingest
    return calls


def work(calls: Calls, log: Log, seed: int, go_on: Callable[[], bool], pause: float = 0.0) -> None:
    """Call at random while `go_on` says so, with pauses of so many seconds."""
    rng = np.random.default_rng(seed)
    names = [name for name in WEIGHTS if name in calls]
    weights = np.array([WEIGHTS[name] for name in names], float)
    while go_on():
        name = names[rng.choice(len(names), p=weights / weights.sum())]
        log.run(name, lambda name=name: calls[name](rng))  # type: ignore[misc]
        time.sleep(pause)


def settings_of(uri: str, model: str) -> Settings:
    """Of a small index with the tiny model, or of the bundled one in the fast preset."""
    store = StoreSettings(fields={"year": "integer=0"})
    if model == "bundled":
        return Settings(uri=uri, extract=ExtractSettings(preset="fast"), store=store)
    extract = ExtractSettings(scales=(0.5, 1.0), longest_side=320, stored_features=60, query_features=60)
    return Settings(uri=uri, model=model, extract=extract, store=store)


@contextlib.contextmanager
def opened(database: str, folder: Path, model: str) -> Iterator[tuple[DelfIndex | DelfClient, int | None, int | None]]:
    """What is called, the process that is measured (None: this one), and that of a server."""
    if database == "service":
        given = {
            "DELF_MILVUS_SERVICE__REQUESTS_PER_MINUTE": "0",
            "DELF_MILVUS_SERVICE__REQUEST_SECONDS": "600",
            "DELF_MILVUS_STORE__FIELDS": '{"year": "integer=0"}',
        }
        tiny = None if model == "bundled" else Path(model)
        if tiny is not None:
            given |= {f"DELF_MILVUS_EXTRACT__{name}_FEATURES": "60" for name in ("STORED", "QUERY")}
        with process(folder, tiny, "--uploads", "uploads", **given) as running:
            running.ready()
            with DelfClient(running.address, timeout=600) as client:
                yield client, running.running.pid, None
        return
    server = WheelServer(folder / "milvus") if database == "server" else None
    try:
        uri = server.uri if server else str(folder / "photos.db")
        with DelfIndex.open(settings=settings_of(uri, model)) as index:
            yield index, None, server.pid if server else None
    finally:
        if server:
            server.kill()


def photos_in(folder: Path | None, count: int) -> list[RgbImage]:
    """Generated photos, or the first of a folder."""
    if folder is None:
        return [make_photo(seed) for seed in range(count)]
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".png"))
    return [cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB) for path in paths[:count]]


def soak(
    calls: Calls,
    log: Log,
    minutes: float,
    threads: int,
    pause: float,
    measured: int | None,
    server: int | None,
) -> tuple[list[tuple[float, Usage]], list[dict[str, Any]]]:
    """The load for so long: samples (hours since the start, usage), and a row for each minute."""
    started = time.monotonic()
    until = started + 60 * minutes
    workers = [
        threading.Thread(target=work, args=(calls, log, seed, lambda: time.monotonic() < until, pause))
        for seed in range(threads)
    ]
    for worker in workers:
        worker.start()
    samples: list[tuple[float, Usage]] = []
    rows: list[dict[str, Any]] = []
    before = 0
    while any(worker.is_alive() for worker in workers):
        time.sleep(SAMPLE_SECONDS)
        hours = (time.monotonic() - started) / 3600
        samples.append((hours, usage(measured)))
        if 60 * hours >= len(rows) + 1:
            row: dict[str, Any] = {"minute": len(rows) + 1, "hours": hours, **samples[-1][1]._asdict()}
            if server is not None:
                row["server_memory"] = usage(server).memory
            row |= {"calls": log.calls - before, "errors": sum(log.errors.values())}
            before = log.calls
            for name, taken in log.minute().items():
                row[name] = [float(value) for value in 1e3 * np.quantile(taken, [0.5, 0.95])]
            rows.append(row)
            print(_line(row), flush=True)
    return samples, rows


_TIMED = ("search", "add", "delete", "list", "status", "match", "ingest")


def _line(row: dict[str, Any]) -> str:
    times = "".join("{:>12}".format("{:.0f}/{:.0f}".format(*row[name]) if name in row else "") for name in _TIMED)
    server = f"{row['server_memory']:>8.0f}" if "server_memory" in row else ""
    return (
        f"{row['minute']:>6}{row['memory']:>8.0f}{row['handles']:>8}{row['threads']:>8}{row['calls']:>7}"
        f"{row['errors']:>7}{times}{server}"
    )


def summary(samples: list[tuple[float, Usage]], rows: list[dict[str, Any]]) -> dict[str, Trend]:
    """The trends of what follows the first fifth."""
    settled = samples[len(samples) // 5 :]
    hours = np.array([when for when, _ in settled])
    found = {name: trend(hours, np.array([getattr(one, name) for _, one in settled], float)) for name in Usage._fields}
    late = rows[len(rows) // 5 :]
    for name in _TIMED:
        timed = [row for row in late if name in row]
        if len(timed) >= 10:
            found[f"{name}, ms"] = trend(
                np.array([row["hours"] for row in timed]), np.array([row[name][0] for row in timed])
            )
    return found


def extract(model: str, photos: list[RgbImage], count: int, one_size: bool) -> None:
    """Extract so many photos, and say now and then what memory is taken, and how much of it is in use."""
    extractor = Extractor(model, settings_of("", model).extract)
    rng = np.random.default_rng(0)
    for number in range(1, count + 1):
        photo = photos[number % len(photos)]
        extractor.extract(photo if one_size else np.ascontiguousarray(cut(photo, rng)), 60)
        if number % 150 == 0:
            taken = usage().memory
            print(f"{number:>6} photos: {taken:.0f} MB, in use {in_use().memory:.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--database", choices=("lite", "server", "service"), default="lite")
    parser.add_argument("--photos", type=Path, help="folder of photos; generated ones without it")
    parser.add_argument("--count", type=int, default=60, help="photos in the pool")
    parser.add_argument("--model", choices=("tiny", "bundled"), default="tiny")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--extract", type=int, default=0, metavar="PHOTOS")
    parser.add_argument("--one-size", action="store_true")
    parser.add_argument("--save", type=Path, help="JSON file for samples, minutes and trends")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        model = "bundled" if options.model == "bundled" else str(write_tiny_model(folder / "tiny.safetensors"))
        photos = photos_in(options.photos, options.count)
        if options.extract:
            extract(model, photos, options.extract, options.one_size)
            return
        for number in range(INGESTED):
            save_photo(folder / "ingested" / f"{number}.png", photos[number])
        log = Log()
        with opened(options.database, folder, model) as (index, measured, server):
            for number, photo in enumerate(photos):
                index.add(photo, f"pool/{number}", {"year": 2000 + number % 30})
            print(f"{'minute':>6}{'MB':>8}{'handles':>8}{'threads':>8}{'calls':>7}{'errors':>7}", end="")
            print(
                "".join(f"{name:>12}" for name in _TIMED) + ("  server" if server else ""), "(p50/p95, ms)", flush=True
            )
            calls = calls_of(index, photos, folder / "ingested")
            samples, rows = soak(calls, log, options.minutes, options.threads, options.pause, measured, server)
        found = summary(samples, rows)
        print(f"\n{log.calls} calls, {sum(log.errors.values())} errors; per hour, after the first fifth:")
        for name, one in found.items():
            interval = f"[{one.low:+.2f}, {one.high:+.2f}]"
            print(f"  {name:12} mean {one.mean:9.1f}  slope {one.slope:+8.2f} {interval}  {one.verdict}")
        for text, count in log.errors.most_common(5):
            print(f"  {count} x {text}")
        if options.save:
            trends = {name: one._asdict() | {"verdict": one.verdict} for name, one in found.items()}
            kept = [[when, *one] for when, one in samples]
            options.save.write_text(json.dumps({"trends": trends, "rows": rows, "samples": kept}))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
