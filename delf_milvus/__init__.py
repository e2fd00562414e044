"""Find the photos that show the same thing, with proof: DELF local features on Milvus.

The public names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delf_milvus.async_index import AsyncDelfIndex
    from delf_milvus.client import AsyncDelfClient, DelfClient
    from delf_milvus.errors import DelfMilvusError
    from delf_milvus.features import Features
    from delf_milvus.index import DelfIndex
    from delf_milvus.ingestion.pipeline import IngestReport
    from delf_milvus.matcher import PairResult, PhotoMatcher
    from delf_milvus.retrieval.answers import Hit, SearchResult
    from delf_milvus.settings import Settings
    from delf_milvus.store.records import ImageRecord

__all__ = [
    "AsyncDelfClient",
    "AsyncDelfIndex",
    "DelfClient",
    "DelfIndex",
    "DelfMilvusError",
    "Features",
    "Hit",
    "ImageRecord",
    "IngestReport",
    "PairResult",
    "PhotoMatcher",
    "SearchResult",
    "Settings",
]

_HOMES = {
    "AsyncDelfClient": "client",
    "AsyncDelfIndex": "async_index",
    "DelfClient": "client",
    "DelfIndex": "index",
    "DelfMilvusError": "errors",
    "Features": "features",
    "Hit": "retrieval.answers",
    "ImageRecord": "store.records",
    "IngestReport": "ingestion.pipeline",
    "PairResult": "matcher",
    "PhotoMatcher": "matcher",
    "SearchResult": "retrieval.answers",
    "Settings": "settings",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"delf_milvus.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
