"""Imports of files by a server, in tests of ingest."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from milvus_server import Server

from delf_milvus.store import bulk


def as_files(milvus: Server, enough: int) -> dict[str, Any]:
    """Settings of a store from which so many new rows go as files."""
    storage = milvus.storage / f"stage-{uuid.uuid4().hex[:8]}"
    storage.mkdir()
    return {"bulk_storage": str(storage), "bulk_from": enough}


def count_imports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each import from now on."""
    found: list[int] = []
    put = bulk._Storage.put

    def counted(self: Any, name: str, spec: Any, columns: Any, parquet: bool) -> Any:
        found.append(len(columns["feature_key"]))
        return put(self, name, spec, columns, parquet)

    monkeypatch.setattr(bulk._Storage, "put", counted)
    return found
