"""An index in somebody else's server, over their client: nothing of theirs is touched, and the client stays open."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from conftest import make_photo, save_photo
from milvus_server import Server
from model.models import write_tiny_model
from pymilvus import MilvusClient

from delf_milvus import DelfIndex, Settings
from delf_milvus.settings import ExtractSettings

pytestmark = pytest.mark.server


def everything(client: MilvusClient) -> dict[str, Any]:
    """What the collections of a client's database are, hold and are called, without ours."""
    found: dict[str, Any] = {}
    for name in client.list_collections():
        if name.startswith("ours"):
            continue
        index = client.list_indexes(name)
        found[name] = {
            "description": client.describe_collection(name),
            "rows": sorted(row["id"] for row in client.query(name, filter="id >= 0", output_fields=["id"])),
            "indexes": [client.describe_index(name, one) for one in index],
            "loaded": str(client.get_load_state(name)),
        }
    return found


def fill(client: MilvusClient, name: str) -> None:
    client.create_collection(name, dimension=4, consistency_level="Strong")
    client.insert(name, [{"id": i, "vector": [1.0, 0.0, 0.0, float(i)]} for i in range(5)])
    client.create_alias(name, f"{name}_alias")


@pytest.mark.parametrize("in_database", [False, True])
def test_a_whole_life_over_a_client_that_was_handed_in(milvus: Server, tmp_path: Path, in_database: bool) -> None:
    run = uuid.uuid4().hex[:8]
    root = MilvusClient(milvus.uri, dedicated=True)
    theirs, ours = f"theirs_{run}", f"ours_{run}"
    database = f"db_{run}" if in_database else ""
    if database:
        root.create_database(database)
    client = MilvusClient(milvus.uri, db_name=database, dedicated=True)
    try:
        fill(client, theirs)
        before = everything(client), everything(root)
        assert before[0][theirs]["rows"] == list(range(5))
        for seed in range(3):
            save_photo(tmp_path / "photos" / f"{seed}.png", make_photo(seed))
        settings = Settings(
            model=str(write_tiny_model(tmp_path / "tiny.safetensors")),
            extract=ExtractSettings(scales=(1.0,), longest_side=320, stored_features=40, query_features=40),
        )
        with DelfIndex(client=client, collection=ours, settings=settings) as index:
            index.ingest([tmp_path / "photos"])
            index.add(make_photo(5), "5.png")
            assert index.search(make_photo(1), include_unverified=True).hits[0].image_id == "1.png"
            assert index.delete(["0.png"]) == ["0.png"]
            assert index.status()["images"] == 3
        assert set(client.list_collections()) - set(before[0]) >= {f"{ours}_images", f"{ours}_features"}
        if database:
            assert not [name for name in root.list_collections() if name.startswith(ours)]
        assert (everything(client), everything(root)) == before
    finally:
        for name in client.list_collections():
            if name.endswith(run) or name.startswith(ours):
                client.drop_alias(f"{name}_alias")
                client.drop_collection(name)
        client.close()
        if database:
            root.drop_database(database)
        root.close()
