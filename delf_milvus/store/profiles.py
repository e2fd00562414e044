"""Which index a collection of descriptors gets, by what the server can do and the number of rows, and what it is
searched with.

- The metric is the inner product throughout: descriptors have unit norm, so it is the cosine similarity, larger is
  nearer.
- `nlist` counts per segment, not per collection. Milvus cuts a collection into segments of at most
  `dataCoord.segment.maxSize` (512 MB up to Milvus 2.3, 1024 MB since), builds an index of its own for each, and a
  search visits `nprobe` lists in every one of them. So lists are chosen from the rows of a full segment: 100 million
  descriptors of 40 components are some 20 segments of 5 million rows with 2048 lists each, and not one with 8192. A
  segment with fewer than 39 rows a list gets fewer lists than asked, one of fewer than 1024 rows no index at all.
- What Milvus Lite cannot do is replaced by a named substitute: IVF_PQ is never sent to it, because it accepts the name,
  searches by brute force and then cannot load the collection again. What a server cannot do is refused before anything
  is sent: servers accept indexes that they then never finish to build.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from delf_milvus.errors import UsageError
from delf_milvus.settings import Profile

Backend = Literal["lite", "server"]

PROFILES: tuple[Profile, ...] = get_args(Profile)

METRIC = "IP"

INDEX_FROM = 100_000
"""Rows from which an index pays. Below, comparing everything is as fast on Milvus Lite, and exact; above, it also needs
4 bytes for each pair of query descriptor and row."""

ROW_OVERHEAD = 48
"""Bytes of a feature's row beside its descriptor, which Milvus keeps in memory too: two INT64 keys, four floats, and
two INT64 of its own."""

_LEAST_LISTS = 16
_MOST_LISTS = 65536
_PAPER = {"nlist": 8192, "m": 10, "nbits": 5}
_PQ = ("IVF_PQ", "PAPER", "GPU_IVF_PQ")
_LITE = {"FLAT": "", "IVF_SQ8": "", "HNSW": "", "IVF_PQ": "IVF_SQ8", "PAPER": "IVF_SQ8"}
_SINCE: dict[str, tuple[int, int]] = {"SCANN": (2, 3), "DISKANN": (2, 4), "GPU_IVF_PQ": (2, 4), "IVF_RABITQ": (2, 6)}


class Engine(NamedTuple):
    """What decides which indexes there are: Lite or a server, its release, and whether it is built for GPUs."""

    backend: Backend
    release: tuple[int, int]
    gpu: bool
    managed: bool

    @classmethod
    def of(cls, version: str) -> Engine:
        """From the version as `Connection` has it: "Milvus Lite 3.2.2", "Milvus 2.6.4-gpu".

        A build without a number (of a branch) counts as the newest release.
        """
        number = re.search(r"(\d+)\.(\d+)", version)
        release = (int(number[1]), int(number[2])) if number else (99, 0)
        text = version.lower()
        return cls("lite" if text.startswith("milvus lite ") else "server", release, "gpu" in text, "zilliz" in text)

    @property
    def segment_bytes(self) -> int:
        """Most bytes of a segment, by default: `dataCoord.segment.maxSize`."""
        return (512 if self.backend == "server" and self.release < (2, 4) else 1024) << 20


@dataclass(frozen=True)
class Wishes:
    """Parameters of an index that are asked for instead of chosen; None leaves the choice."""

    nlist: int | None = None
    m: int | None = None
    nbits: int | None = None


@dataclass(frozen=True)
class IndexProfile:
    """An index and how it is built.

    asked: the setting it answers. index_type: what Milvus is told. index_params: nlist, m, nbits, M, efConstruction.
    substitute_for: the index that it stands in for because the backend lacks that one, or "".
    """

    asked: str
    index_type: str
    index_params: Mapping[str, int] = field(default_factory=dict)
    substitute_for: str = ""

    def build_params(self, backend: Backend) -> dict[str, Any]:
        """`params` of pymilvus's `add_index`. Clients flatten them, and Lite reads only a nested key of that name."""
        flat = dict(self.index_params)
        return {**flat, "params": flat} if backend == "lite" and flat else flat

    def fits(self, index_type: str, index_params: Mapping[str, int]) -> bool:
        """Whether an existing index is near enough: the same type, the same code, lists within a factor of four."""
        if index_type != self.index_type:
            return False
        if any(index_params.get(key, value) != value for key, value in self.index_params.items() if key != "nlist"):
            return False
        wanted, found = self.index_params.get("nlist", 1), index_params.get("nlist", 1)
        return wanted < 4 * found and found < 4 * wanted


def choose(
    asked: Profile, engine: Engine, dim: int, rows: int, index_from: int = INDEX_FROM, wishes: Wishes | None = None
) -> IndexProfile:
    """The profile for a collection of `rows` descriptors of `dim` components.

    "auto" is FLAT below `index_from` rows and IVF_PQ from there on (AUTOINDEX on Zilliz Cloud, which has no other);
    "PAPER" is the IVF_PQ of the DELF paper. On Milvus Lite IVF_SQ8 stands in for IVF_PQ. Raises UsageError for what
    this engine cannot do.
    """
    wishes = wishes or Wishes()
    wanted: str = asked
    if asked == "auto":
        wanted = "FLAT" if rows < index_from else "IVF_PQ"
        if engine.managed:
            wanted = "AUTOINDEX"
    check(wanted, engine, dim, wishes)
    substitute_for = ""
    if engine.backend == "lite" and _LITE[wanted]:
        wanted, substitute_for = _LITE[wanted], "IVF_PQ"
    lists = {"nlist": wishes.nlist or lists_for(rows_in_segment(engine, dim, rows))}
    code = {"m": wishes.m or _sub_vectors(dim), "nbits": wishes.nbits or 8}
    params: dict[str, dict[str, int]] = {
        "HNSW": {"M": 16, "efConstruction": 200},
        "IVF_SQ8": lists,
        "SCANN": lists,
        "IVF_RABITQ": lists,
        "IVF_PQ": {**lists, **code},
        "GPU_IVF_PQ": {**lists, **code},
        "PAPER": _PAPER,
    }
    return IndexProfile(asked, "IVF_PQ" if wanted == "PAPER" else wanted, params.get(wanted, {}), substitute_for)


def check(wanted: str, engine: Engine, dim: int, wishes: Wishes) -> None:
    """Raise UsageError, one sentence that says what to do, for an index that this engine cannot build or finish."""
    if engine.backend == "lite" and wanted not in _LITE:
        raise UsageError(f"Milvus Lite has no {wanted}: use a Milvus server, or one of {', '.join(_LITE)}.")
    if engine.managed and wanted != "AUTOINDEX":
        raise UsageError(f"Zilliz Cloud has no {wanted}: use the profile AUTOINDEX, or auto.")
    if engine.backend == "server" and engine.release < _SINCE.get(wanted, (0, 0)):
        needed, here = (".".join(map(str, release)) for release in (_SINCE[wanted], engine.release))
        raise UsageError(f"{wanted} needs Milvus {needed} or newer, this server is {here}: choose another profile.")
    if wanted == "GPU_IVF_PQ" and not engine.gpu:
        raise UsageError("GPU_IVF_PQ needs a server built for GPUs, and this one is not: choose IVF_PQ.")
    if wanted not in _PQ or engine.backend == "lite":
        return
    parts = _PAPER["m"] if wanted == "PAPER" else wishes.m
    if parts and dim % parts:
        fitting = ", ".join(str(n) for n in range(1, dim + 1) if dim % n == 0)
        raise UsageError(
            f"{wanted} cannot split descriptors of {dim} components into {parts} sub-vectors: m is one of {fitting}."
        )
    if wanted == "GPU_IVF_PQ" and (wishes.nbits or 8) < 4:
        raise UsageError("GPU_IVF_PQ has codes of 4 to 8 bits: set nbits to one of these.")


def available(engine: Engine, dim: int) -> list[Profile]:
    """The profiles that this engine can build for descriptors of `dim` components, without substitutes and "auto"."""
    found: list[Profile] = []
    for profile in PROFILES:
        if profile == "auto" or (profile == "AUTOINDEX" and not engine.managed):
            continue
        try:
            check(profile, engine, dim, Wishes())
        except UsageError:
            continue
        if engine.backend == "server" or not _LITE[profile]:
            found.append(profile)
    return found


def search_params(
    index_type: str,
    index_params: Mapping[str, int],
    neighbours: int,
    *,
    nprobe: int = 32,
    ef: int | None = None,
    refine: float = 2.0,
) -> dict[str, float]:
    """Parameters of a search for `neighbours` rows with an index as it was built.

    nprobe: lists visited in each segment, of an IVF or SCANN. ef: candidates kept by HNSW (`ef`) and DISKANN
    (`search_list`), else 128, and at least the neighbours. refine: SCANN compares this many times the neighbours once
    more with exact vectors.
    """
    if "IVF" in index_type or index_type == "SCANN":
        lists: dict[str, float] = {"nprobe": min(nprobe, index_params.get("nlist", nprobe))}
        return {**lists, "reorder_k": math.ceil(refine * neighbours)} if index_type == "SCANN" else lists
    if index_type.startswith("HNSW"):
        return {"ef": max(ef or 128, neighbours)}
    if index_type == "DISKANN":
        return {"search_list": max(ef or 128, neighbours)}
    return {}


def scalar_index(field_type: str, engine: Engine) -> str:
    """The index of a field that searches are filtered by, "" for a type that this database cannot index.

    Inverted indexes came with Milvus 2.4.
    """
    if engine.backend == "lite" or engine.release >= (2, 4):
        return "INVERTED"
    return {"VARCHAR": "Trie", "INT64": "STL_SORT", "DOUBLE": "STL_SORT"}.get(field_type, "")


def rows_in_segment(engine: Engine, dim: int, rows: int) -> int:
    """Rows of a full segment of features, or all rows where there are fewer."""
    return min(rows, engine.segment_bytes // (4 * dim + ROW_OVERHEAD)) if engine.backend == "server" else rows


def lists_for(rows: int) -> int:
    """Lists of one index over so many rows: about their square root, a power of two.

    That balances comparing with centres and with a list's rows.
    """
    return min(_MOST_LISTS, max(_LEAST_LISTS, 1 << round(math.log2(math.sqrt(max(rows, 1))))))


def memory_bytes(index_type: str, index_params: Mapping[str, int], dim: int, rows: int) -> int:
    """About how many bytes of memory a loaded collection of features takes, the rows' other fields included.

    A row of an inverted index has its code and its number; HNSW its vector and links; DISKANN keeps about a quarter of
    the vectors in memory and the rest on disk.
    """
    vector = 4 * dim
    lists = vector * index_params.get("nlist", 0)
    code: float = {
        "IVF_SQ8": dim + 8,
        "IVF_PQ": index_params.get("m", 0) * index_params.get("nbits", 8) / 8 + 8,
        "GPU_IVF_PQ": index_params.get("m", 0) * index_params.get("nbits", 8) / 8 + 8,
        # Two components in four bits, and the vectors to compare once more.
        "SCANN": dim / 4 + 8 + vector,
        "IVF_RABITQ": dim / 8 + 8 + 8,
        "HNSW": vector + 4 * 2 * index_params.get("M", 16) + 16,
        "DISKANN": vector / 4,
    }.get(index_type, vector)
    return round(rows * (code + ROW_OVERHEAD) + lists)


def _sub_vectors(dim: int) -> int:
    """Two components a sub-vector, or the nearest coarser split that divides the descriptor."""
    return next(parts for parts in range(max(dim // 2, 1), 0, -1) if dim % parts == 0)
