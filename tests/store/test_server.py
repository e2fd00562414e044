"""The store on a real Milvus server."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from milvus_server import Server
from pymilvus import MilvusClient
from store_samples import MODEL, OTHER_MODEL, random_items

from delf_milvus.errors import CollectionError
from delf_milvus.settings import StoreSettings
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.keys import split_keys

pytestmark = pytest.mark.server

Opener = Callable[..., FeatureStore]


@pytest.fixture
def opened(milvus: Server) -> Iterator[Opener]:
    """Opens the store of one new collection, as often as a test needs; closes and drops everything afterwards."""
    name = f"t{uuid.uuid4().hex[:12]}"
    stores: list[FeatureStore] = []

    def open_store(**options: object) -> FeatureStore:
        arguments = {"fingerprint": MODEL, "settings": StoreSettings(), "max_features": 100, **options}
        stores.append(FeatureStore.open(milvus.uri, name, **arguments))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()
    client = MilvusClient(milvus.uri)
    for collection in client.list_collections():
        if collection.startswith(name):
            client.drop_collection(collection)
    client.close()


def test_images_are_written_found_updated_and_deleted_under_ivf_pq(opened: Opener) -> None:
    items = random_items(1, 40, 100)
    store = opened(index_from=2000)
    store.write(items)
    store.ensure_index()
    status = store.status()
    assert (status.index_used, status.substitute_for, status.index_state) == ("IVF_PQ", "", "Finished")
    assert (status.images, status.features) == (40, 4000)
    keys, _ = store.neighbours(items[3][1].descriptors, 10)
    assert np.mean((split_keys(keys)[0] == items[3][0].key).any(axis=1)) > 0.9
    store.write([(items[3][0], items[4][1].top(30))])
    assert store.delete([items[5][0].image_id, "missing"]) == [items[5][0].image_id]
    assert (store.count_images(), store.count_features()) == (39, 3830)
    assert [record.image_id for record in store.list(limit=6)][5] == "img/00006.jpg"


@pytest.mark.parametrize("attempt", range(4))
def test_collections_that_many_make_at_once_are_made_once(opened: Opener, attempt: int) -> None:
    items = random_items(attempt, 12, 20)
    # Connections of their own: to the server these are as good as processes.
    stores = [opened(settings=StoreSettings(fields={"year": "integer=0"})) for _ in range(6)]
    begin = threading.Barrier(len(stores))

    def write(number: int) -> None:
        begin.wait(60)
        stores[number].write(items[number :: len(stores)])

    with ThreadPoolExecutor(len(stores)) as pool:
        list(pool.map(write, range(len(stores))))
    reader = opened(settings=StoreSettings(consistency="strong"))
    assert [record.image_id for record in reader.list()] == [record.image_id for record, _ in items]
    keys, _ = reader.neighbours(items[7][1].descriptors, 1)
    assert (split_keys(keys)[0] == items[7][0].key).all()
    assert reader.status().index_used == "FLAT"


def test_collections_that_two_models_make_at_once_are_of_one_of_them(opened: Opener) -> None:
    stores = [opened(), opened(fingerprint=OTHER_MODEL)]
    begin = threading.Barrier(2)

    def create(store: FeatureStore) -> str:
        begin.wait(60)
        try:
            store.create()
        except CollectionError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(create, stores))
    assert sorted("was made with another model" in one for one in told) == [False, True]
    assert opened(fingerprint=None).facts is not None


def test_strong_searches_see_at_once_what_others_wrote(opened: Opener) -> None:
    items = random_items(3, 6, 20)
    writer = opened()
    writer.write(items[:1])
    reader = opened(settings=StoreSettings(consistency="strong"))
    for record, features in items[1:]:
        writer.write([(record, features)])
        keys, _ = reader.neighbours(features.descriptors, 1)
        assert (split_keys(keys)[0] == record.key).all()
        assert list(reader.stored([record.key])) == [record.key]


def test_every_level_of_consistency_finds_what_has_long_been_there(opened: Opener) -> None:
    ((record, features),) = random_items(4, 1, 20)
    writer = opened()
    writer.write([(record, features)])
    assert writer.count_images() == 1
    for level in ("session", "bounded", "eventually"):
        reader = opened(settings=StoreSettings(consistency=level))
        deadline = time.monotonic() + 20
        while not (found := reader.stored([record.key])) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert list(found) == [record.key]


def test_a_killed_server_keeps_every_acknowledged_image(opened: Opener, milvus: Server) -> None:
    items = random_items(2, 30, 100)
    opened().write(items)
    milvus.restart()
    store = opened(create=False)
    assert (store.count_images(), store.count_features()) == (30, 3000)
    found = store.stored([record.key for record, _ in items])
    assert [len(features) for _, features in found.values()] == [100] * 30
