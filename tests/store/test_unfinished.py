"""What killed writers leave is ended or kept by the next one, on Milvus Lite and on a real server."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from milvus_server import WheelServer, servers
from store_samples import MODEL, random_features, random_items

from delf_milvus.settings import StoreSettings
from delf_milvus.store.connection import Connection
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.unfinished import Notes

Opener = Callable[[], FeatureStore]
ITEMS = [(replace(record, metadata={"note": record.image_id}), found) for record, found in random_items(1, 6, 20)]
IDS = [record.image_id for record, _ in ITEMS]


class KilledError(BaseException):
    """Instead of a call: nothing handles its class."""


@pytest.fixture(params=["lite", *servers(pytest.mark.server)])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Opens one collection, as often as a test needs."""
    uri = str(tmp_path / "photos.db")
    if request.param != "lite":
        uri = request.getfixturevalue(f"{request.param}_server").uri
    name = f"t{uuid.uuid4().hex[:12]}"
    stores: list[FeatureStore] = []

    def open_store() -> FeatureStore:
        stores.append(FeatureStore.open(uri, name, MODEL, StoreSettings(), max_features=100))
        return stores[-1]

    yield open_store
    for suffix in ("features", "images"):
        stores[0].connection.client.drop_collection(f"{name}_{suffix}")
    for store in stores:
        store.close()


def killed(monkeypatch: pytest.MonkeyPatch, what: str, step: Callable[[], object], after: int = 0) -> None:
    """Do a step up to its first call that does this, or a later one."""
    call, left = Connection.call, after

    def calling(self: Connection, doing: str, *arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= doing == what
        if left < 0:
            raise KilledError
        return call(self, doing, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "call", calling)
        with pytest.raises(KilledError):
            step()


def properties(store: FeatureStore) -> list[str]:
    described = store.connection.client.describe_collection(f"{store.generation}_images")
    return [text for name, text in described["properties"].items() if "unfinished" in name and text]


def test_a_killed_deletion_is_ended_by_the_next_one_whatever_that_deletes(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened()
    store.write(ITEMS)
    killed(monkeypatch, "deleting", lambda: store.delete(IDS[:3]), after=1)
    assert [record.image_id for record in store.list()] == IDS[3:]
    assert {finding.kind for finding in store.fsck().findings} == {"orphan_features"}
    other = opened()
    assert other.delete([]) == []
    assert (other.fsck().findings, other.count_features(), properties(other)) == ([], 60, [])


def test_a_deletion_killed_before_it_deletes_anything_deletes_nothing_later(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened()
    store.write(ITEMS)
    killed(monkeypatch, "deleting", lambda: store.delete(IDS[:3]))
    other = opened()
    other.write(ITEMS[:1])
    assert [record.image_id for record in other.list()] == IDS
    assert (other.fsck().findings, properties(other)) == ([], [])


@pytest.mark.parametrize("after", [0, 1])
def test_metadata_outlives_a_killed_rewrite_until_the_image_is_written_or_deleted(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    store = opened()
    store.write(ITEMS)
    changed = [(record, random_features(np.random.default_rng(9), 12)) for record, _ in ITEMS[:2]]
    killed(monkeypatch, "writing", lambda: store.write(changed), after=after)
    assert [record.image_id for record in store.list()] == IDS[2:]
    other = opened()
    assert other.interrupted(IDS) == {image_id: {"note": image_id} for image_id in IDS[:2]}
    # Another image's rewriting leaves it alone.
    other.write(ITEMS[4:5])
    again = opened()
    assert again.interrupted(IDS).keys() == set(IDS[:2])
    again.write(changed[:1])
    assert again.interrupted(IDS).keys() == {IDS[1]}
    assert again.delete([IDS[1]]) == []
    assert (again.fsck().findings, again.count_features(), properties(again)) == ([], 12 + 4 * 20, [])
    assert opened().interrupted(IDS) == {}


def test_new_images_and_new_metadata_need_no_note(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[object] = []
    add = Notes.add
    monkeypatch.setattr(Notes, "add", lambda self, images: (noted.extend(images), add(self, images)))
    store = opened()
    store.write(ITEMS)
    store.write([(replace(record, metadata={"note": "new"}), features) for record, features in ITEMS])
    store.write([(replace(record, metadata={}), features) for record, features in ITEMS])
    assert noted == []


def test_a_property_that_is_no_note_is_left_out(opened: Opener, caplog: pytest.LogCaptureFixture) -> None:
    store = opened()
    store.write(ITEMS)
    name = f"{store.generation}_images"
    store.connection.client.alter_collection_properties(name, {"delf_milvus_unfinished_3": '{"5": "x"}'})
    assert opened().delete(IDS[:1]) == IDS[:1]
    assert "is no note" in caplog.text
    assert properties(store) == []


@pytest.mark.server
@pytest.mark.slow
def test_a_killed_server_keeps_the_note_of_a_deletion(
    wheel_server: WheelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"t{uuid.uuid4().hex[:12]}"

    def opened() -> FeatureStore:
        return FeatureStore.open(wheel_server.uri, name, MODEL, StoreSettings(retry_seconds=60), max_features=100)

    with opened() as store:
        store.write(ITEMS)
        # Two calls delete: the images, and then their features.
        with monkeypatch.context() as patch:
            killed(patch, "deleting", lambda: store.delete(IDS[:3]), after=1)
    wheel_server.restart()
    with opened() as store:
        assert len(properties(store)) == 1
        assert store.delete(IDS[3:4]) == IDS[3:4]
        assert properties(store) == []
        # Nothing has read the features yet, and the server was killed while it loaded them.
        store.connection.client.load_collection(f"{name}_features")
        keys = store.connection.client.query(
            f"{name}_features", filter="feature_key >= 0", output_fields=["feature_key"], consistency_level="Strong"
        )
        assert len(keys) == 2 * 20
        for suffix in ("features", "images"):
            store.connection.client.drop_collection(f"{name}_{suffix}")
