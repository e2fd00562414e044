"""Imports of files by a server."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from milvus_server import Server

from delf_milvus.store import bulk


def new_storage(milvus: Server) -> Path:
    """A folder that the server reads files from."""
    folder = milvus.storage / f"stage-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    return folder


def as_files(milvus: Server, enough: int) -> dict[str, Any]:
    """Settings of a store from which so many new rows go as files."""
    return {"bulk_storage": str(new_storage(milvus)), "bulk_from": enough}


def count_imports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each import from now on."""
    found: list[int] = []
    put = bulk._Storage.put

    def counted(self: Any, name: str, spec: Any, columns: Any, parquet: bool) -> Any:
        found.append(len(columns["feature_key"]))
        return put(self, name, spec, columns, parquet)

    monkeypatch.setattr(bulk._Storage, "put", counted)
    return found
