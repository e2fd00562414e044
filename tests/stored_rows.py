"""All that a collection holds, to compare what two ways of filling it leave."""

from __future__ import annotations

from typing import Any

from pymilvus import MilvusClient


def rows(client: MilvusClient, collection: str, key: str) -> dict[int, dict[str, Any]]:
    """The rows of a collection by key, but for the time they were written."""
    found = client.query(collection, filter=f"{key} >= 0", output_fields=["*"], limit=16384, consistency_level="Strong")
    kept = {row[key]: {name: value for name, value in row.items() if name != "ingested_at"} for row in found}
    assert len(kept) == len(found) > 0
    return kept
