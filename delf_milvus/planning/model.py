"""What a collection of some size will need, computed from coefficients: sizes, machines, times, and what drives them.

Nothing is asked or measured here. An estimate whose coefficient nobody has measured is None, and never a guess.

The model, for N rows (images x indexed features) in S segments, each with an index of its own of L lists:

- memory of query nodes: code, its number and primary key for each row, the centres of each segment; the other fields
  lie on disk (mmap, as in deploy/helm/values.yaml). A standalone server and Milvus Lite keep them in memory.
- a search compares each query descriptor with N x nprobe / L codes, however many segments there are; each segment takes
  its part beside that, and so does each neighbour that is returned, which does not shrink with more machines.
- building compares each row with the L centres of its segment, twice where segments are merged.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from delf_milvus.errors import UsageError
from delf_milvus.planning.coefficients import DEFAULTS, SEARCHED, Coefficients
from delf_milvus.planning.hardware import GIB, Hardware
from delf_milvus.settings import Preset, Profile
from delf_milvus.store.profiles import (
    ROW_OVERHEAD,
    Engine,
    IndexProfile,
    Wishes,
    choose,
    memory_bytes,
    rows_in_segment,
    search_params,
)

Unit = Literal["count", "bytes", "seconds", "per second"]

RECORDED_DIM = 40
"""Components of the descriptors that the bytes a row of a standalone server and of Milvus Lite were measured with."""

_FILES = "chosen by delf_milvus/store/profiles.py"
_ASKED = "asked for"
_LITE = Engine("lite", (3, 2), gpu=False, managed=False)
_MOST = 10**15
_MOST_RATE = 10**9
_PROXIES, _STREAMING = 2, 2
"""Nodes of these roles that the sum of all memory counts."""


@dataclass(frozen=True)
class PlanRequest:
    """What to plan for.

    features: stored of an image; indexed: of these, in the index, None for all. query_features: of a query photo. dim,
    global_dim: components of a local and of the global descriptor. profile, wishes, nprobe: as in the settings of the
    store. neighbours, candidates: of the search. release: of Milvus. replicas: copies of what is loaded.
    queries_per_second: wanted, or None.
    """

    images: int
    features: int = 500
    query_features: int = 500
    dim: int = 40
    global_dim: int = 128
    profile: Profile = "auto"
    wishes: Wishes = field(default_factory=Wishes)
    nprobe: int = 32
    neighbours: int = 120
    candidates: int = 100
    preset: Preset = "standard"
    release: tuple[int, int] = (2, 6)
    replicas: int = 1
    queries_per_second: float | None = None
    indexed: int | None = None

    @property
    def image_rows(self) -> int:
        """Descriptors of an image in the index."""
        return self.features if self.indexed is None else min(self.indexed, self.features)

    @property
    def rows(self) -> int:
        """Descriptors in the index."""
        return self.images * self.image_rows


@dataclass(frozen=True)
class Estimate:
    """One figure of a plan.

    name: dotted, for programs. what: for people. value: in `unit`; None where nobody has measured what it takes.
    note: what belongs to the value. source: where its coefficients are from.
    """

    name: str
    what: str
    value: float | None
    unit: Unit
    note: str
    source: str


@dataclass(frozen=True)
class Driver:
    """What a change would do, as factors of what is planned; None where that is not known.

    change: "half the features", for instance. memory: of the query nodes. storage: of the object store. search: core
    seconds of a search.
    """

    change: str
    memory: float
    storage: float
    search: float | None


@dataclass(frozen=True)
class Plan:
    """Estimates in the order of the page; drivers; shares: of what the memory of the query nodes is made."""

    request: PlanRequest
    hardware: Hardware
    index: str
    index_params: Mapping[str, int]
    estimates: list[Estimate]
    shares: Mapping[str, float]
    drivers: list[Driver]

    def __getitem__(self, name: str) -> float | None:
        """The value of an estimate by its name; KeyError for one that there is not."""
        return next(one.value for one in self.estimates if one.name == name) if name in self.names else _missing(name)

    @property
    def names(self) -> list[str]:
        """Of the estimates."""
        return [one.name for one in self.estimates]

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return {**asdict(self), "hardware": self.hardware.model_dump()}


def _missing(name: str) -> float:
    raise KeyError(name)


class _Sizes:
    """Bytes, segments and work of one request on a server."""

    def __init__(self, request: PlanRequest, coefficients: Coefficients) -> None:
        self.engine = Engine("server", request.release, gpu=request.profile == "GPU_IVF_PQ", managed=False)
        self.request = request
        self._of = {name: one.value for name, one in coefficients.items()}
        rows, dim = request.rows, request.dim
        self.index: IndexProfile = choose(request.profile, self.engine, dim, rows, wishes=request.wishes)
        self.segment_rows = rows_in_segment(self.engine, dim, rows)
        self.segments = math.ceil(rows / self.segment_rows)
        self.raw = 4 * dim * rows
        self.packed = math.ceil((dim + 7) * 4 / 3) * request.images * request.features
        self.images = request.images * (4 * request.global_dim + self._of["primary_key_bytes"])
        self.text = request.images * self._of["image_text_bytes"]
        lists = 4 * dim * self.index.index_params.get("nlist", 0)
        # The centres of every segment; `memory_bytes` counts those of one.
        whole = memory_bytes(self.index.index_type, self.index.index_params, dim, rows)
        self.index_bytes = whole - ROW_OVERHEAD * rows + lists * (self.segments - 1)
        self.keys = self._of["primary_key_bytes"] * rows
        self.fields = ROW_OVERHEAD * rows

    @property
    def loaded(self) -> float:
        """Bytes in memory of query nodes, one replica, without room."""
        return self.index_bytes + self.keys + self.images

    @property
    def mapped(self) -> float:
        """Bytes on the disk of query nodes by mmap."""
        return self.raw + self.fields + self.packed + self.text

    @property
    def stored(self) -> float:
        """Bytes in the object store, once."""
        return self.mapped + self.index_bytes + self.images

    @property
    def standalone(self) -> float:
        """Bytes of memory of a server that maps nothing."""
        working = min(self.raw + self.fields, self._of["memory_working_bytes"])
        held = self.index_bytes + self.fields + self.packed + self.text + self.images
        return self._of["memory_base_bytes"] + working + held

    @property
    def codes(self) -> float:
        """Codes that one query descriptor is compared with."""
        params = self.index.index_params
        found = search_params(self.index.index_type, params, self.request.neighbours, nprobe=self.request.nprobe)
        return self.request.rows * found.get("nprobe", 0) / max(params.get("nlist", 1), 1)

    @property
    def timed(self) -> bool:
        """Whether the times of this index are known."""
        return self.index.index_type == SEARCHED["server"]

    @property
    def returned(self) -> int:
        """Neighbours that a search returns."""
        return self.request.query_features * self.request.neighbours

    @property
    def shared_core_seconds(self) -> float:
        """Of a search, for what its cores share: the segments, and the codes in them."""
        each = self.segments * self._of["search_segment_seconds"] + self.codes * self._of["search_code_seconds"]
        return self.request.query_features * each

    @property
    def search_core_seconds(self) -> float | None:
        """Of one search, all of the server's."""
        if not self.timed:
            return None
        return self.returned * self._of["search_neighbour_core_seconds"] + self.shared_core_seconds

    def search_seconds(self, cores: float) -> float | None:
        """Of one search that so many cores share."""
        if not self.timed:
            return None
        return self.returned * self._of["search_neighbour_seconds"] + self.shared_core_seconds / cores

    def build_seconds(self, cores: float) -> float | None:
        """Of building the index of all segments."""
        if not self.timed:
            return None
        rounds = self._of["build_rounds"] if self.segments > 1 else 1
        work = rounds * self.request.rows * self.index.index_params["nlist"] * self._of["build_list_seconds"]
        return self._of["build_base_seconds"] + work / cores

    @property
    def build_memory(self) -> float:
        """Bytes of memory in which a data node builds one segment and merges two others."""
        share = 1 / self.segments
        return self._of["memory_base_bytes"] + share * (2 * self.raw + self.index_bytes) + 2 * self.engine.segment_bytes


def make_plan(request: PlanRequest, hardware: Hardware | None = None, coefficients: Coefficients = DEFAULTS) -> Plan:
    """The plan for a request. Raises UsageError for an index that Milvus of that release cannot build."""
    hardware = hardware or Hardware()
    if not 1 <= request.images <= _MOST or request.images * request.features > _MOST:
        raise UsageError("A plan is for 1 to 10^15 descriptors: give fewer images or features.")
    if request.queries_per_second is not None and not 0 <= request.queries_per_second <= _MOST_RATE:
        raise UsageError(f"Searches a second are a number from 0 to {_MOST_RATE:,}.")
    sizes = _Sizes(request, coefficients)
    estimates = [
        *_collection(sizes),
        *_one_machine(sizes, hardware, coefficients),
        *_cluster(sizes, hardware, coefficients),
        *_work(sizes, hardware, coefficients),
    ]
    parts = {
        "index": sizes.index_bytes - 8 * request.rows if _numbered(sizes) else sizes.index_bytes,
        "row numbers": 8 * request.rows if _numbered(sizes) else 0,
        "primary keys": sizes.keys,
        "global descriptors": sizes.images,
    }
    shares = {name: part / sizes.loaded for name, part in parts.items() if part}
    drivers = list(_drivers(sizes, coefficients))
    return Plan(request, hardware, sizes.index.index_type, sizes.index.index_params, estimates, shares, drivers)


def _numbered(sizes: _Sizes) -> bool:
    """Whether the index keeps a number of 8 bytes beside each code."""
    return "IVF" in sizes.index.index_type


def _collection(sizes: _Sizes) -> Iterator[Estimate]:
    request, params = sizes.request, sizes.index.index_params
    told = ", ".join(f"{name} {value}" for name, value in params.items())
    widths = "widths of the fields"
    of_image = f"{request.image_rows} an image"
    if request.image_rows < request.features:
        of_image += f", {request.features} compared"
    yield Estimate("descriptors", "descriptors", request.rows, "count", of_image, _ASKED)
    yield Estimate("raw_bytes", "raw descriptors", sizes.raw, "bytes", f"{request.dim} floats each", widths)
    index = f"{sizes.index.index_type} {told}".strip()
    yield Estimate("index_bytes", "index", sizes.index_bytes, "bytes", index, _FILES)
    each = "index, keys, global descriptor"
    yield Estimate("image.memory", "memory of an image", sizes.loaded / request.images, "bytes", each, widths)
    each = "mapped or read from disk: fields, packed features"
    yield Estimate("image.disk", "disk of an image", sizes.mapped / request.images, "bytes", each, widths)
    yield Estimate("segments", "segments", sizes.segments, "count", f"{sizes.segment_rows} rows in a full one", _FILES)
    if "nlist" in params:
        probes = min(request.nprobe, params["nlist"])
        note = f"of {params['nlist']} lists in every segment"
        yield Estimate("nprobe", "lists visited (nprobe)", probes, "count", note, _ASKED)


def _one_machine(sizes: _Sizes, hardware: Hardware, coefficients: Coefficients) -> Iterator[Estimate]:
    request = sizes.request
    yield from _lite(request, (sizes.mapped / request.rows) / _recorded().mapped_row, coefficients)
    row = (sizes.stored / request.rows) / _recorded().stored_row
    base = coefficients["memory_base_bytes"].source
    yield Estimate("standalone.memory", "standalone: memory", sizes.standalone, "bytes", "nothing mapped", base)
    disk = coefficients["disk_base_bytes"].value + request.rows * row * coefficients["disk_row_bytes"].value
    yield Estimate("standalone.disk", "standalone: disk", disk, "bytes", "", coefficients["disk_row_bytes"].source)
    cores, source = hardware.query_cores, coefficients["search_code_seconds"].source
    search = sizes.search_seconds(cores)
    yield Estimate("standalone.search", "standalone: search", search, "seconds", f"{cores} cores", source)
    build, source = sizes.build_seconds(cores), coefficients["build_list_seconds"].source
    yield Estimate("standalone.build", "standalone: index built", build, "seconds", f"{cores} cores", source)


def _lite(request: PlanRequest, row: float, coefficients: Coefficients) -> Iterator[Estimate]:
    """Milvus Lite, where it has the index."""
    try:
        index = choose(request.profile, _LITE, request.dim, request.rows, wishes=request.wishes)
    except UsageError:
        return
    of = {name: one.value for name, one in coefficients.items()}
    name = index.index_type
    # Nearly all of it is what the database holds beside the index, but a graph is not small.
    each = row * of["lite_memory_row_bytes"]
    memory = None if name == "HNSW" else of["lite_memory_base_bytes"] + request.rows * each
    yield Estimate("lite.memory", "Lite: memory", memory, "bytes", name, coefficients["lite_memory_row_bytes"].source)
    disk = None if name == "HNSW" else request.rows * row * of["lite_disk_row_bytes"]
    yield Estimate("lite.disk", "Lite: disk", disk, "bytes", name, coefficients["lite_disk_row_bytes"].source)
    search = None
    if name == SEARCHED["lite"]:
        lists = index.index_params["nlist"]
        codes = request.rows * min(request.nprobe, lists) / lists
        each = request.neighbours * of["lite_neighbour_seconds"] + codes * of["lite_code_seconds"]
        search = request.query_features * each
    source = coefficients["lite_code_seconds"].source
    yield Estimate("lite.search", "Lite: search", search, "seconds", name, source)


def _cluster(sizes: _Sizes, hardware: Hardware, coefficients: Coefficients) -> Iterator[Estimate]:
    request = sizes.request
    of = {name: one.value for name, one in coefficients.items()}
    keys, copies = coefficients["primary_key_bytes"].source, of["storage_copies"]
    needed = request.replicas * sizes.loaded * of["memory_room"]
    nodes = query_nodes(sizes, hardware, coefficients)
    room = f"{request.replicas} replica(s), room to swap {of['memory_room']:g}x included"
    yield Estimate("query.memory", "query nodes: memory", needed, "bytes", room, keys)
    disk = request.replicas * sizes.mapped * copies
    yield Estimate("query.disk", "query nodes: disk (mmap)", disk, "bytes", f"{copies:g}x what is mapped", keys)
    each = f"of {hardware.query_cores} cores and {hardware.query_memory_gib:g} GiB"
    memory_nodes = _nodes_for_memory(needed, hardware, of["memory_base_bytes"], request.replicas)
    yield Estimate("query.nodes_for_memory", "query nodes: for memory", memory_nodes, "count", each, keys)
    source = coefficients["search_code_seconds"].source
    core_seconds = sizes.search_core_seconds
    rate = None if core_seconds is None else hardware.query_cores / core_seconds
    note = "searches, all cores busy"
    yield Estimate("query.rate", "query nodes: rate of one", rate, "per second", note, source)
    if request.queries_per_second is not None:
        wanted = f"for {request.queries_per_second:g} searches a second"
        for_rate = None if rate is None else max(1, math.ceil(request.queries_per_second / rate))
        yield Estimate("query.nodes_for_rate", "query nodes: for the rate", for_rate, "count", wanted, source)
        larger = "the larger" if request.replicas == 1 else "the larger, as many for each replica"
        yield Estimate("query.nodes", "query nodes", None if rate is None else nodes, "count", larger, source)
    cores = hardware.query_cores * nodes / request.replicas
    search = sizes.search_seconds(cores)
    yield Estimate("query.search", "search", search, "seconds", f"nodes: {nodes}, idle", source)
    compare = _compare_seconds(request, of)
    yield Estimate(
        "client.compare", "the client's part of it", compare, "seconds", f"vote; {request.candidates} candidates",
        coefficients["compare_seconds"].source,
    )  # fmt: skip
    yield from _other_roles(sizes, hardware, coefficients, needed)
    yield Estimate("object_store", "object store", copies * sizes.stored, "bytes", f"{copies:g}x what is stored", keys)


def _other_roles(
    sizes: _Sizes, hardware: Hardware, coefficients: Coefficients, of_query_nodes: float
) -> Iterator[Estimate]:
    """What is no query node, and the sum of all memory."""
    request = sizes.request
    of = {name: one.value for name, one in coefficients.items()}
    data, source = data_nodes(sizes, hardware), coefficients["primary_key_bytes"].source
    build = None if data is None else sizes.build_seconds(hardware.data_cores * data)
    older = request.release < (2, 6)
    role = "index" if older else "data"
    note = f"one segment built{'' if older else ', two merged'}"
    yield Estimate(f"{role}.memory", f"{role} node: memory of one", sizes.build_memory, "bytes", note, source)
    merging = of["memory_base_bytes"] + 2 * sizes.engine.segment_bytes
    if older:
        # Up to 2.5 index nodes build, and data nodes merge.
        yield Estimate("data.memory", "data node: memory of one", merging, "bytes", "two segments merged", source)
    source = coefficients["build_list_seconds"].source
    limit = f"of {hardware.data_cores} cores, to build in {hardware.build_hours:g} h"
    yield Estimate(f"{role}.nodes", f"{role} nodes (build indexes)", data, "count", limit, source)
    yield Estimate("build", "index built", build, "seconds", f"nodes: {data}" if data else "", source)
    others = merging if older else _STREAMING * of["streaming_memory_bytes"]
    if not older:
        streaming = coefficients["streaming_memory_bytes"]
        what, note = "streaming node: memory of one", "two or more; what is not flushed"
        yield Estimate("streaming.memory", what, streaming.value, "bytes", note, streaming.source)
    proxy, coordinator = coefficients["proxy_memory_bytes"], coefficients["coordinator_memory_bytes"]
    yield Estimate("proxy.memory", "proxy: memory of one", proxy.value, "bytes", "two or more", proxy.source)
    yield Estimate("coordinator.memory", "coordinator: memory", coordinator.value, "bytes", "", coordinator.source)
    others += _PROXIES * proxy.value + coordinator.value
    total = None if data is None else of_query_nodes + data * sizes.build_memory + others
    counted = f"{_PROXIES} proxies" if older else f"{_PROXIES} proxies, {_STREAMING} streaming nodes"
    note = f"{counted}; not etcd, not the object store"
    yield Estimate("cluster.memory", "all nodes: memory", total, "bytes", note, "sum of those above")


def _work(sizes: _Sizes, hardware: Hardware, coefficients: Coefficients) -> Iterator[Estimate]:
    request = sizes.request
    cpu = coefficients[f"extract_{request.preset}_core_seconds"]
    gpu = coefficients[f"gpu_{request.preset}_photos_per_second"]
    seconds = request.images * cpu.value / hardware.extract_cores
    note = f"{hardware.extract_cores} cores, {request.preset}"
    yield Estimate("extract.cpu", "extraction on CPUs", seconds, "seconds", note, cpu.source)
    seconds, note = request.images / (gpu.value * hardware.gpus), f"{hardware.gpus} GPU(s), {request.preset}"
    yield Estimate("extract.gpu", "extraction on GPUs", seconds, "seconds", note, gpu.source)
    for name, what in (("write", "ingest by upserts"), ("bulk", "ingest by bulk import")):
        rate = coefficients[f"{name}_rows_per_second"]
        note = f"{round(rate.value)} rows/s, one client"
        yield Estimate(f"ingest.{name}", what, request.rows / rate.value, "seconds", note, rate.source)


def query_nodes(sizes: _Sizes, hardware: Hardware, coefficients: Coefficients) -> int:
    """Query nodes of all replicas, for memory and for the rate that is wanted."""
    request = sizes.request
    of = {name: one.value for name, one in coefficients.items()}
    needed = request.replicas * sizes.loaded * of["memory_room"]
    nodes = _nodes_for_memory(needed, hardware, of["memory_base_bytes"], request.replicas)
    core_seconds = sizes.search_core_seconds
    if request.queries_per_second is not None and core_seconds is not None:
        nodes = max(nodes, math.ceil(request.queries_per_second * core_seconds / hardware.query_cores))
    # Each replica is whole.
    return request.replicas * math.ceil(nodes / request.replicas)


def _nodes_for_memory(needed: float, hardware: Hardware, base: float, replicas: int) -> int:
    room = hardware.query_memory_gib * GIB - base
    if room <= 0:
        raise UsageError(
            f"query_memory_gib {hardware.query_memory_gib:g} is less than a query node takes empty: give it more."
        )
    return replicas * max(1, math.ceil(needed / replicas / room))


def data_nodes(sizes: _Sizes, hardware: Hardware) -> int | None:
    """Nodes that build all indexes in the time given, at most one for each segment."""
    alone, at_once = sizes.build_seconds(hardware.data_cores), sizes.build_seconds(math.inf)
    if alone is None or at_once is None:
        return None
    # What does not shrink with more nodes is left out: no number of them would make up for it.
    wanted = (alone - at_once) / (3600 * hardware.build_hours)
    return min(sizes.segments, max(1, math.ceil(wanted)))


def _compare_seconds(request: PlanRequest, of: Mapping[str, float]) -> float:
    each = request.query_features * of["compare_seconds"] + of["fetch_seconds"]
    return request.query_features * of["vote_seconds"] + request.candidates * request.features * each


def _drivers(sizes: _Sizes, coefficients: Coefficients) -> Iterator[Driver]:
    request, params = sizes.request, sizes.index.index_params
    wishes = request.wishes
    changes: dict[str, PlanRequest] = {}
    if request.features > 1:
        half = None if request.indexed is None else max(1, request.image_rows // 2)
        changes["half the features"] = replace(request, features=request.features // 2, indexed=half)
    if request.dim > 1:
        code = replace(wishes, m=wishes.m // 2 if wishes.m and wishes.m % 2 == 0 else None)
        changes["half the components (dim)"] = replace(request, dim=request.dim // 2, wishes=code)
    if "nbits" in params and params["nbits"] > 1 and request.profile != "PAPER":
        code = replace(wishes, nbits=params["nbits"] // 2)
        changes["half the bits (nbits)"] = replace(request, wishes=code)
    if "nlist" in params and request.nprobe > 1:
        changes["half the nprobe"] = replace(request, nprobe=request.nprobe // 2)
    if request.query_features > 1:
        changes["half the query features"] = replace(request, query_features=request.query_features // 2)
    for change, asked in changes.items():
        try:
            other = _Sizes(asked, coefficients)
        except UsageError:
            continue  # such an index cannot be built
        mine, its = sizes.search_core_seconds, other.search_core_seconds
        search = its / mine if mine is not None and its is not None else None
        yield Driver(change, other.loaded / sizes.loaded, other.stored / sizes.stored, search)


class _Recorded(NamedTuple):
    """Bytes a row of the collections that the bytes a row of one machine were measured with."""

    mapped_row: float
    stored_row: float


@functools.cache
def _recorded() -> _Recorded:
    request = PlanRequest(1000, 1000, dim=RECORDED_DIM, global_dim=RECORDED_DIM, profile="IVF_PQ", release=(2, 3))
    sizes = _Sizes(request, DEFAULTS)
    return _Recorded(sizes.mapped / request.rows, sizes.stored / request.rows)
