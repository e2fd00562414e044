"""Which index a collection of descriptors gets, by backend and number of rows, and what it is searched with.

The metric is the inner product throughout: descriptors have unit norm, so it is the cosine similarity, larger is
nearer. What Milvus Lite cannot do is replaced by a named substitute: IVF_PQ is never sent to it, because it accepts the
name, searches by brute force and then cannot load the collection again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Backend = Literal["lite", "server"]
Asked = Literal["auto", "FLAT", "IVF_SQ8", "IVF_PQ", "HNSW"]

METRIC = "IP"

INDEX_FROM = 100_000
"""Rows from which an index pays. Below, comparing everything is as fast on Milvus Lite, and exact; above, it also needs
4 bytes for each pair of query descriptor and row."""

_LEAST_LISTS = 16
_MOST_LISTS = 65536


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
        """Whether an existing index is near enough: the same type, and lists within a factor of four."""
        if index_type != self.index_type:
            return False
        wanted, found = self.index_params.get("nlist", 1), index_params.get("nlist", 1)
        return wanted < 4 * found and found < 4 * wanted


def choose(asked: Asked, backend: Backend, dim: int, rows: int, index_from: int = INDEX_FROM) -> IndexProfile:
    """The profile for a collection of `rows` descriptors of `dim` components.

    "auto" is FLAT below `index_from` rows and IVF_PQ from there on; on Milvus Lite IVF_SQ8 stands in for IVF_PQ.
    """
    wanted = ("FLAT" if rows < index_from else "IVF_PQ") if asked == "auto" else asked
    if wanted == "FLAT":
        return IndexProfile(asked, "FLAT")
    if wanted == "HNSW":
        return IndexProfile(asked, "HNSW", {"M": 16, "efConstruction": 200})
    lists = {"nlist": _lists(rows)}
    if wanted == "IVF_SQ8":
        return IndexProfile(asked, "IVF_SQ8", lists)
    if backend == "lite":
        return IndexProfile(asked, "IVF_SQ8", lists, substitute_for="IVF_PQ")
    return IndexProfile(asked, "IVF_PQ", {**lists, "m": _sub_vectors(dim), "nbits": 8})


def search_params(index_type: str, index_params: Mapping[str, int], nprobe: int, neighbours: int) -> dict[str, int]:
    """Parameters of a search for `neighbours` rows with an index as it was built; `nprobe` counts lists of an IVF."""
    if index_type.startswith("IVF"):
        return {"nprobe": min(nprobe, index_params.get("nlist", nprobe))}
    if index_type.startswith("HNSW"):
        return {"ef": max(128, neighbours)}
    return {}


def scalar_index(field_type: str, backend: Backend, version: str) -> str:
    """The index of a field that searches are filtered by, "" for a type that this database cannot index.

    version: as `Connection.version` says it. Inverted indexes came with Milvus 2.4.
    """
    if backend == "lite" or version_at_least(version, 2, 4):
        return "INVERTED"
    return {"VARCHAR": "Trie", "INT64": "STL_SORT", "DOUBLE": "STL_SORT"}.get(field_type, "")


def version_at_least(version: str, major: int, minor: int) -> bool:
    """Whether "Milvus 2.3.5-lite" is at least a version; a text without numbers is taken for a current one."""
    found = re.search(r"(\d+)\.(\d+)", version)
    return found is None or (int(found[1]), int(found[2])) >= (major, minor)


def _lists(rows: int) -> int:
    """About the square root of the rows, a power of two: balances comparing with centres and with a list's rows."""
    return min(_MOST_LISTS, max(_LEAST_LISTS, 1 << round(math.log2(math.sqrt(max(rows, 1))))))


def _sub_vectors(dim: int) -> int:
    """Two components a sub-vector, or the nearest coarser split that divides the descriptor."""
    return next(parts for parts in range(max(dim // 2, 1), 0, -1) if dim % parts == 0)
