"""The coefficients of a plan, measured on the user's machine and server, or with Milvus Lite.

- Descriptors are synthetic, of 40 components; photos are drawn. No collection of the user's is opened: rows go to
  `<collection>_bench`, which is dropped whatever happens, and with Milvus Lite to a database of its own in a folder
  beside the user's. What a crash left is replaced; a collection of that name of somebody else is left alone.
- Rows are written, indexed and searched at two sizes; a search is measured with two numbers of visited lists. The
  last of these measurements is held out of the fit, and how far the fit is from it is told. On a server that is done
  twice, before and after its segments are merged, which tells what a segment takes.
- What cannot be seen, the memory of a server on another machine for instance, is said to be not measured.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import NamedTuple, get_args
from urllib.parse import urlsplit

import numpy as np

from delf_milvus.errors import CollectionError
from delf_milvus.planning import synthetic
from delf_milvus.planning.coefficients import DEFAULTS, Coefficient, CoefficientFile
from delf_milvus.planning.model import PlanRequest, make_plan
from delf_milvus.planning.processes import listener, name_of, resident_bytes
from delf_milvus.settings import Preset, Profile, Settings, StoreSettings
from delf_milvus.store import connection, schema
from delf_milvus.store.connection import Connection
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.profiles import ROW_OVERHEAD, Engine

Say = Callable[[str], None]
Opened = Callable[..., FeatureStore]

MODEL = replace(synthetic.MODEL, weights="synthetic descriptors of delf-milvus bench")

FEATURES = 500
"""Of a synthetic photo."""

ASKED = 500
"""Descriptors of a query, as of a photo: of fewer each one takes longer."""

MOST_ROWS = 1_000_000
LEAST_ROWS = 5_000
"""At each of the two sizes; an index needs so many to have lists."""

_ROWS_FOR_MEMORY = 200_000
"""Rows below which what Milvus Lite's libraries take hides what a row takes."""

_PHOTO = (426, 640)
_QUERIES = 5
_PROBES = (8, 64)
_EXTRACTING, _WRITING = 0.3, 0.25
_NEIGHBOURS = 120
_FARTHEST = 2.0
"""Times that a fit may be off what was held out, up or down; beyond that it is none."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PORT = 19530
_IMAGES_AT_ONCE = 20


class _Searched(NamedTuple):
    """One measurement of searches: the codes and the segments that each query descriptor met, and the seconds for it
    (median)."""

    codes: float
    seconds: float
    segments: int


@dataclass(frozen=True)
class BenchConfig:
    """How to measure.

    minutes: about how long, most of it writing and extracting; building an index takes what it takes. rows: written at
    most. presets: to extract with; none leaves extraction out.
    """

    minutes: float = 5.0
    rows: int = MOST_ROWS
    presets: tuple[Preset, ...] = get_args(Preset)


class _Notes:
    """What was measured, what was not, and what was held out, so far."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.measured: dict[str, Coefficient] = {}
        self.missing: list[str] = []
        self.held_out: list[str] = []
        self._source = f"measured here {datetime.now(timezone.utc):%Y-%m-%d}"

    def take(self, name: str, value: float, how: str) -> None:
        self.measured[name] = Coefficient(value, DEFAULTS[name].unit, f"{self._source}: {how}")
        self.say(f"{name}: {value:.4g} {DEFAULTS[name].unit}")

    def hold_out(self, what: str, told: float, measured: float) -> None:
        self.held_out.append(f"{what}: {told:.3g} s by the fit, {measured:.3g} s measured ({told / measured - 1:+.0%})")
        self.say(f"held out: {self.held_out[-1]}")

    def lack(self, what: str) -> None:
        self.missing.append(what)
        self.say(f"not measured: {what}")


def bench(settings: Settings, config: BenchConfig | None = None, say: Say = print) -> CoefficientFile:
    """Measure, and drop what was made for it.

    Raises DatabaseError, CollectionError (a collection `<collection>_bench` that is not of a bench), ModelError.
    """
    config = config or BenchConfig()
    notes = _Notes(say)
    with ExitStack() as stack:
        database, folder = stack.enter_context(_database(settings))
        opened = stack.enter_context(_scratch(database, settings))
        # First the database, embedded in this process perhaps: what the network leaves would hide what it takes.
        _measure_store(opened, database, folder, config, notes)
        version = database.version
    for preset in config.presets:
        _measure_extraction(settings, preset, 60 * config.minutes * _EXTRACTING / len(config.presets), notes)
    return CoefficientFile.of(
        notes.measured,
        made_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=f"{platform.machine()}, {_cores()} cores, {version}",
        not_measured=notes.missing,
        held_out=notes.held_out,
    )


@contextmanager
def _database(settings: Settings) -> Iterator[tuple[Connection, Path | None]]:
    """A connection, and for Milvus Lite the folder of the database that was made for it."""
    own = _plain(settings.store)
    token = settings.token.get_secret_value()
    with ExitStack() as stack:
        folder = None
        uri = settings.uri
        if not connection.is_server(uri):
            beside = Path(uri).absolute().parent
            made = tempfile.TemporaryDirectory(prefix="delf-bench-", dir=beside if beside.is_dir() else None)
            folder = Path(stack.enter_context(made))
            uri = str(folder / "bench.db")
        database = connection.connect(uri, token, own)
        stack.callback(database.close)
        yield database, folder


@contextmanager
def _scratch(database: Connection, settings: Settings) -> Iterator[Opened]:
    """Opens the store `<collection>_bench`, whose collections are dropped before and after."""
    name = f"{settings.collection}_bench"
    own = _plain(settings.store)

    def opened(nprobe: int = own.nprobe) -> FeatureStore:
        changed = own.model_copy(update={"nprobe": nprobe})
        return FeatureStore.open("", name, MODEL, changed, client=database, max_features=FEATURES)

    # Opening refuses what another model, or other software, has made.
    if opened().generation != name:
        raise CollectionError(
            f"The collection {name!r} was rebuilt, so it is not of a bench: use another --collection."
        )
    _drop(database, name)
    try:
        yield opened
    finally:
        _drop(database, name)


def _drop(database: Connection, name: str) -> None:
    for suffix in (schema.IMAGES_SUFFIX, schema.FEATURES_SUFFIX):
        with database.asking(f"dropping the collection {name + suffix!r}"):
            if database.client.has_collection(name + suffix, timeout=database.timeout):
                database.client.drop_collection(name + suffix, timeout=database.timeout)


def _plain(own: StoreSettings) -> StoreSettings:
    """The settings of the store without what is of the user's collection."""
    changes = {"fields": {}, "tenant_field": "", "tenant": "", "bulk_storage": "", "profile": "auto"}
    lists = {"nlist": None, "m": None, "nbits": None}
    return own.model_copy(update={**changes, **lists})


def _measure_extraction(settings: Settings, preset: Preset, seconds: float, notes: _Notes) -> None:
    """Seconds a photo, the first one apart: it compiles kernels."""
    from delf_milvus.model.extractor import Extractor

    extract = settings.extract.model_copy(update={"preset": preset})
    extractor = Extractor(settings.model, extract)
    photos = np.random.default_rng(0).integers(0, 256, (2, *_PHOTO, 3), np.uint8)
    started = time.perf_counter()
    extractor.extract(photos[0], extract.plan.stored_features)
    spent: list[float] = []
    for number in count():
        before = time.perf_counter()
        extractor.extract(photos[number % len(photos)], extract.plan.stored_features)
        spent.append(time.perf_counter() - before)
        if time.perf_counter() - started + spent[-1] > seconds:
            break
    median = float(np.median(spent))
    how = f"{len(spent)} drawn photos of 640 x 426"
    if extractor.device.type == "cpu":
        import torch

        threads = torch.get_num_threads()
        notes.take(f"extract_{preset}_core_seconds", median * threads, f"{how}, {threads} threads")
    else:
        notes.take(f"gpu_{preset}_photos_per_second", 1 / median, f"{how} one by one, {extractor.device}")


def _measure_store(
    opened: Opened, database: Connection, folder: Path | None, config: BenchConfig, notes: _Notes
) -> None:
    seen, pid = _process(database, notes)
    alone = len(database.client.list_collections(timeout=database.timeout)) == 0
    before = resident_bytes(pid) if seen else None
    store = opened()
    seconds = 60 * config.minutes * _WRITING
    whole = max(config.rows, 2 * LEAST_ROWS) // FEATURES
    lite = database.backend == "lite"
    first, _ = _write(store, 0, max(whole // 4, LEAST_ROWS // FEATURES), seconds / 4, notes)
    unmerged = [] if lite else _merge(opened, store)
    builds = [_build(store, lite)]
    searches = _search(opened, store)
    # At least as many again, so that there are two sizes.
    last, rate = _write(store, first, whole, seconds, notes)
    rows = FEATURES * last
    notes.take("lite_write_rows_per_second" if lite else "write_rows_per_second", rate, f"{rows} rows")
    unmerged += [] if lite else _merge(opened, store)
    builds.append(_build(store, lite))
    searches += _search(opened, store)
    _fit_search(searches, unmerged, rows, lite, notes)
    _fit_build(builds, lite, notes)
    after = resident_bytes(pid) if seen else None
    if before is not None and after is not None:
        _fit_memory(before, after, rows, lite, alone, Engine.of(database.version), notes)
    if folder is None:
        notes.lack("disk of the server: its files are not seen from here")
    else:
        notes.take("lite_disk_row_bytes", _size(folder) / rows, f"{rows} rows")


def _process(database: Connection, notes: _Notes) -> tuple[bool, int | None]:
    """Whether the memory of the database can be seen, and its process; None: this one."""
    if database.backend == "lite":
        return resident_bytes() is not None, None
    address = urlsplit(database.where)
    here = address.hostname in _LOOPBACK
    if not here:
        notes.lack("cores of the server: its times count as if it had those of this machine")
    pid = listener(address.port or _PORT) if here else None
    # What listens for a container is not what runs in it.
    if pid is None or not name_of(pid).startswith("milvus"):
        notes.lack("memory of the server: no process of Milvus on this machine listens there")
        return False, None
    return True, pid


def _write(store: FeatureStore, first: int, last: int, seconds: float, notes: _Notes) -> tuple[int, float]:
    """Photos from `first` up to `last`, or until the time is spent; the number reached, and rows a second."""
    spent, reached = 0.0, first
    for items in synthetic.images(first, last, FEATURES, _IMAGES_AT_ONCE):
        started = time.perf_counter()
        store.write(items)
        spent += time.perf_counter() - started
        reached += len(items)
        if spent > seconds and reached - first >= LEAST_ROWS // FEATURES:
            break
    notes.say(f"written: {FEATURES * reached} rows")
    return reached, FEATURES * (reached - first) / spent


class _Built(NamedTuple):
    """work: rows times lists."""

    work: float
    seconds: float


def _merge(opened: Opened, store: FeatureStore) -> list[_Searched]:
    """Index what was written and merge it, which a server would begin by itself while something else is measured;
    searches before that."""
    store.build_index("IVF_PQ")
    found = _search(opened, store)
    store.compact()
    return found


def _build(store: FeatureStore, lite: bool) -> _Built:
    """The index whose times a plan knows, loading included; merging and indexing again a plan counts apart."""
    profile: Profile = "IVF_SQ8" if lite else "IVF_PQ"
    if not lite:
        store.drop_index()
    started = time.perf_counter()
    store.build_index(profile)
    seconds = time.perf_counter() - started
    status = store.index_status()
    return _Built(status.total_rows * status.params["nlist"], seconds)


def _search(opened: Opened, store: FeatureStore) -> list[_Searched]:
    """With few visited lists and with many."""
    # A server goes on for some seconds with what it had loaded.
    store.await_index()
    status = store.index_status()
    lists = status.params["nlist"]
    found = []
    for probes in _PROBES:
        visited = min(probes, lists)
        searching = opened(visited)
        seconds = []
        for number in range(1 + _QUERIES):
            wanted = synthetic.query(number, ASKED)
            started = time.perf_counter()
            searching.neighbours(wanted, _NEIGHBOURS)
            seconds.append(time.perf_counter() - started)
        # The first one loads what is not in memory yet.
        each = float(np.median(seconds[1:])) / ASKED
        found.append(_Searched(status.total_rows * visited / lists, each, status.segments))
    return found


def _segment_seconds(searches: list[_Searched], unmerged: list[_Searched]) -> float | None:
    """Seconds that a query descriptor takes more with each segment, for the same codes; None where that is not seen."""
    found = [
        (before.seconds - after.seconds) / (before.segments - after.segments)
        for before, after in zip(unmerged, searches, strict=True)
        if before.segments > after.segments > 0
    ]
    return float(np.median(found)) if found and np.median(found) > 0 else None


def _fit_search(searches: list[_Searched], unmerged: list[_Searched], rows: int, lite: bool, notes: _Notes) -> None:
    *fitted, held_out = searches
    segment = None if lite else _segment_seconds(searches, unmerged)
    of_segments = segment or 0.0
    codes, seconds, segments = np.array(fitted).T
    slope, fixed = np.polyfit(codes, seconds - of_segments * segments, 1).tolist()
    told = fixed + slope * held_out.codes + of_segments * held_out.segments
    # Noise is larger than what so few codes take: such a fit would say anything of a large collection.
    if slope <= 0 or fixed + of_segments <= 0 or not 1 / _FARTHEST <= told / held_out.seconds <= _FARTHEST:
        measured = ", ".join(f"{1e3 * ASKED * one.seconds:.0f} ms for {one.codes:.0f} codes" for one in searches)
        notes.lack(f"search: {measured} do not tell how it grows; give more --minutes and --rows")
        return
    how = f"{rows} rows, nprobe {' and '.join(map(str, _PROBES))}"
    if lite:
        notes.take("lite_code_seconds", slope, how)
        notes.take("lite_neighbour_seconds", fixed / _NEIGHBOURS, how)
    else:
        cores = _cores()
        if segment is None:
            how += ", a segment against neighbours as by default"
            of_one = DEFAULTS["search_segment_seconds"].value
            segment = fixed * of_one / (of_one + _NEIGHBOURS * DEFAULTS["search_neighbour_core_seconds"].value)
            fixed -= segment
        neighbour = max(fixed, 0.0) / _NEIGHBOURS
        notes.take("search_code_seconds", slope * cores, f"{how}, {cores} cores")
        notes.take("search_segment_seconds", segment * cores, f"{how}, {cores} cores")
        notes.take("search_neighbour_seconds", neighbour, how)
        notes.take("search_neighbour_core_seconds", neighbour * cores, f"{how}, {cores} cores")
    notes.hold_out(f"search of {rows} rows, nprobe {_PROBES[-1]}", ASKED * told, ASKED * held_out.seconds)


def _fit_build(builds: list[_Built], lite: bool, notes: _Notes) -> None:
    first, last = builds
    if lite:
        notes.say(f"index built in {first.seconds:.1f} and {last.seconds:.1f} s")
        return
    slope = (last.seconds - first.seconds) / (last.work - first.work) if last.work > first.work else 0.0
    base = first.seconds - slope * first.work
    if slope <= 0 or base < 0:
        notes.lack(
            f"building of the index: {first.seconds:.1f} and {last.seconds:.1f} s at the two sizes do not tell how it "
            "grows; give more --minutes"
        )
        return
    how = f"two sizes, none held out, {_cores()} cores"
    notes.take("build_list_seconds", slope * _cores(), how)
    notes.take("build_base_seconds", base, how)


def _fit_memory(before: int, after: int, rows: int, lite: bool, alone: bool, engine: Engine, notes: _Notes) -> None:
    grown = max(0, after - before)
    if lite and rows < _ROWS_FOR_MEMORY:
        notes.lack(f"memory of a row: that takes {_ROWS_FOR_MEMORY} rows; give more --minutes")
        return
    if lite:
        notes.take("lite_memory_row_bytes", grown / rows, f"{rows} rows, growth of this process")
        return
    if not alone:
        notes.lack("memory of an empty server: this one holds other collections")
        return
    request = PlanRequest(
        rows // FEATURES, FEATURES, dim=MODEL.dim, global_dim=MODEL.dim, profile="IVF_PQ", release=engine.release
    )
    # Nothing else in the sum is measured: what is beyond it is what loading and searching hold, of what they may hold,
    # and the process itself.
    nothing = {"memory_base_bytes": _none("memory_base_bytes"), "memory_working_bytes": _none("memory_working_bytes")}
    held = make_plan(request, coefficients={**DEFAULTS, **nothing})["standalone.memory"]
    assert held is not None
    beyond, most = max(0.0, grown - held), float(rows * (4 * MODEL.dim + ROW_OVERHEAD))
    how = f"the process before anything was written, and what it holds with {rows} rows beyond their bytes"
    notes.take("memory_base_bytes", before + max(0.0, beyond - most), how)
    if rows < MOST_ROWS:
        notes.lack(f"memory that loading and searching hold: that takes {MOST_ROWS} rows; give more --minutes")
    elif beyond >= most:
        notes.lack(f"memory that loading and searching hold at most: {rows} rows are too few to reach it")
    else:
        notes.take("memory_working_bytes", beyond, f"{rows} rows, beyond the bytes of their fields")


def _none(name: str) -> Coefficient:
    return replace(DEFAULTS[name], value=0.0)


def _size(folder: Path) -> int:
    """Bytes of files."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            # The database clears up meanwhile: what is gone counts nothing.
            with suppress(OSError):
                total += (Path(parent) / name).stat().st_size
    return total


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
