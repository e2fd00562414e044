"""What the doctor sees in sound and in sick databases."""

from __future__ import annotations

import time
import uuid
from collections import namedtuple
from pathlib import Path

import pytest
from milvus_server import Server
from pymilvus import DataType, MilvusClient
from store_samples import MODEL, OTHER_MODEL, random_items

from delf_milvus.settings import StoreSettings
from delf_milvus.store import doctor
from delf_milvus.store.doctor import Check, examine
from delf_milvus.store.feature_store import FeatureStore

Usage = namedtuple("Usage", "total used free")


def checks(uri: str, collection: str = "delf", model: object = MODEL, **options: object) -> dict[str, Check]:
    return {check.name: check for check in examine(uri, collection, StoreSettings(), model, **options)}


def fill(uri: str, collection: str = "delf") -> None:
    with FeatureStore.open(uri, collection, MODEL, StoreSettings(), max_features=100) as store:
        store.write(random_items(1, 2, 20))


def test_a_sound_embedded_database_has_nothing_to_mend(tmp_path: Path) -> None:
    uri = str(tmp_path / "photos.db")
    fill(uri)
    seen = checks(uri)
    assert {check.state for check in seen.values()} <= {"ok", "skip", "warn"}
    expected = {"connection", "database version", "pymilvus", "listing", "writing", "write speed", "schema", "model"}
    assert {name for name, check in seen.items() if check.state == "ok"} >= expected | {"index"}
    assert seen["clock"].state == "skip"
    assert "40 of 40 rows indexed" in seen["index"].what
    client = MilvusClient(uri)
    assert sorted(client.list_collections()) == ["delf_features", "delf_images"]
    client.close()


def test_read_only_writes_nothing(tmp_path: Path) -> None:
    uri = str(tmp_path / "photos.db")
    seen = checks(uri, read_only=True)
    assert (seen["connection"].state, seen["disk"].state != "fail") == ("skip", True)
    assert not (tmp_path / "photos.db").exists()
    fill(uri)
    seen = checks(uri, read_only=True)
    assert [seen[name].state for name in ("writing", "clock", "write speed")] == ["skip"] * 3
    assert seen["schema"].state == "ok"


def test_a_model_that_does_not_fit_is_said_with_the_difference(tmp_path: Path) -> None:
    uri = str(tmp_path / "photos.db")
    fill(uri)
    check = checks(uri, model=OTHER_MODEL)["model"]
    assert check.state == "fail"
    assert "weights-a here, weights-b there" in check.what
    assert checks(uri, model=None)["model"].state == "fail"


def test_altered_missing_and_foreign_collections_are_said(tmp_path: Path) -> None:
    uri = str(tmp_path / "photos.db")
    fill(uri)
    client = MilvusClient(uri)
    properties = client.describe_collection("delf_features")["properties"]
    client.drop_collection("delf_features")
    check = checks(uri)["schema"]
    assert (check.state, check.what) == ("fail", "delf_features is missing")
    schema = MilvusClient.create_schema()
    schema.add_field("feature_key", DataType.INT64, is_primary=True)
    schema.add_field("descriptor", DataType.FLOAT_VECTOR, dim=8)
    client.create_collection("delf_features", schema=schema, properties=properties)
    check = checks(uri)["schema"]
    assert check.state == "fail"
    assert check.what.startswith("altered: descriptor is FLOAT_VECTOR 8; no field image_key")
    client.drop_collection("delf_features")
    client.create_collection("delf_features", schema=schema)
    assert "made by other software" in checks(uri)["schema"].what
    client.close()


def test_a_database_that_does_not_answer_is_one_failed_line() -> None:
    started = time.monotonic()
    seen = checks("http://127.0.0.1:9")
    assert (seen["connection"].state, "writing" in seen) == ("fail", False)
    assert time.monotonic() - started < 12
    assert checks("notes.txt")["connection"].state == "fail"


@pytest.mark.parametrize(("free", "state"), [(10**8, "fail"), (10**9, "warn"), (10**12, "ok")])
def test_little_free_space_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(10**13, 0, free))
    assert checks(str(tmp_path / "photos.db"), read_only=True)["disk"].state == state


@pytest.mark.parametrize(
    ("offset", "state", "said"),
    [(0, "ok", "within"), (-60_000, "warn", "-60."), (60_000, "warn", "+59."), (None, "skip", "no timestamps")],
)
def test_clocks_are_compared_by_the_servers_timestamp(offset: int | None, state: str, said: str) -> None:
    class Answer:
        backend = "server"

    now = time.time()
    created = 0 if offset is None else (int(now * 1000) + offset) << 18
    check = doctor._clock(Answer(), created, now, now + 0.1)
    assert check.state == state
    assert said in check.what


@pytest.mark.server
def test_a_server_is_examined_and_left_as_it_was(milvus: Server) -> None:
    name = f"t{uuid.uuid4().hex[:12]}"
    fill(milvus.uri, name)
    client = MilvusClient(milvus.uri)
    before = sorted(client.list_collections())
    seen = checks(milvus.uri, name)
    assert sorted(client.list_collections()) == before
    assert {check.state for check in seen.values()} <= {"ok", "skip", "warn"}
    for check in ("connection", "listing", "writing", "clock", "schema", "model", "index"):
        assert seen[check].state == "ok", seen[check]
    assert [seen[check].state for check in ("disk", "memory")] == ["skip", "skip"]
    old = "2.3" in seen["database version"].what
    assert seen["database version"].state == ("warn" if old else "ok")
    for collection in (f"{name}_features", f"{name}_images"):
        client.drop_collection(collection)
    client.close()
