"""Declared fields and tenants on real databases: filters inside the vector search, and walls between tenants."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from milvus_server import Server, servers
from pymilvus import MilvusClient
from store_samples import MODEL, random_features, random_items

from delf_milvus.errors import CollectionError, InputError, UsageError
from delf_milvus.features import Features
from delf_milvus.settings import StoreSettings
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.hits import PADDING_KEY
from delf_milvus.store.keys import image_key, split_keys
from delf_milvus.store.records import ImageRecord

Opener = Callable[..., FeatureStore]

FIELDS = {"year": "integer=0", "kind": "text=", "price": "number=1.5", "sold": "boolean=false"}


@pytest.fixture(params=["lite", *servers(pytest.mark.server)])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Opens the store of one collection, with other settings if a test wants them."""
    name = f"t{uuid.uuid4().hex[:12]}"
    server: Server | None = None if request.param == "lite" else request.getfixturevalue(f"{request.param}_server")
    uri = server.uri if server else str(tmp_path / "photos.db")
    stores: list[FeatureStore] = []

    def open_store(model: object = MODEL, **values: object) -> FeatureStore:
        settings = StoreSettings(**values)  # type: ignore[arg-type]
        stores.append(FeatureStore.open(uri, name, model, settings, max_features=100))  # type: ignore[arg-type]
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()
    if server:
        client = MilvusClient(uri)
        for collection in client.list_collections():
            if collection.startswith(name):
                client.drop_collection(collection)
        client.close()


def items_of(years: list[int], seed: int = 1) -> list[tuple[ImageRecord, Features]]:
    kinds = ["tower", 'a" or kind != "']
    return [
        (ImageRecord(record.image_id, metadata={"year": years[n], "kind": kinds[n % 2], "free": n}), features)
        for n, (record, features) in enumerate(random_items(seed, len(years), 40))
    ]


def found_images(store: FeatureStore, features: Features, where: object = "") -> set[int]:
    """Images found by their local features, which must be those found by their global descriptors."""
    keys, _ = store.neighbours(features.descriptors, 400, where)  # type: ignore[arg-type]
    found = set(split_keys(keys[keys != PADDING_KEY])[0].tolist())
    alike, _ = store.similar(features.global_descriptor, 400, where)  # type: ignore[arg-type]
    assert set(alike.tolist()) == found
    return found


def test_a_filter_works_inside_the_vector_search(opened: Opener) -> None:
    store = opened(fields=FIELDS)
    items = items_of([1999, 2020, 2021, 2020])
    store.write(items)
    keys = [record.key for record, _ in items]
    query = items[0][1]
    assert found_images(store, query) == set(keys)
    assert found_images(store, query, "year >= 2020") == set(keys[1:])
    assert found_images(store, query, {"year": {"in": [1999, 2021]}}) == {keys[0], keys[2]}
    assert found_images(store, query, {"kind": 'a" or kind != "'}) == {keys[1], keys[3]}
    assert found_images(store, query, {"kind": {"like": "tow%"}, "year": {"<": 2020}}) == {keys[0]}
    assert found_images(store, query, "price == 1.5 and sold == false") == set(keys)
    # The best matches are found among those that pass, not cut from an unfiltered list.
    only, similarities = store.neighbours(items[3][1].descriptors, 5, "year == 1999")
    assert (split_keys(only)[0] == keys[0]).all()
    assert (similarities > -1).all()
    with pytest.raises(UsageError, match="'colour', but the declared ones are kind, price, sold, year"):
        store.neighbours(query.descriptors, 5, "colour == 1")
    record = store.records([items[1][0].image_id])[items[1][0].image_id]
    assert record.metadata == {"year": 2020, "kind": 'a" or kind != "', "price": 1.5, "sold": False, "free": 1}


def test_changed_values_reach_the_features(opened: Opener) -> None:
    store = opened(fields=FIELDS)
    items = items_of([1999, 2020])
    store.write(items)
    before = store.neighbours(items[0][1].descriptors, 3, "year == 1999")
    moved = ImageRecord(items[0][0].image_id, "elsewhere", metadata={"year": "2005", "new": "x"})
    store.describe([moved])
    assert (store.neighbours(items[0][1].descriptors, 3, "year == 1999")[0] == PADDING_KEY).all()
    after = store.neighbours(items[0][1].descriptors, 3, "year == 2005")
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_allclose(before[1], after[1], atol=1e-5)
    assert found_images(store, items[0][1], "year == 2005") == {moved.key}
    record, features = store.stored([moved.key])[moved.key]
    assert (record.uri, record.metadata["year"], record.metadata["new"], len(features)) == ("elsewhere", 2005, "x", 40)
    assert (store.count_images(), store.count_features()) == (2, 80)


def test_what_does_not_fit_a_declaration_is_refused_before_anything_is_written(opened: Opener) -> None:
    store = opened(fields={"year": "integer"})
    good = (ImageRecord("good", metadata={"year": 1}), random_features(np.random.default_rng(0), 3))
    for metadata, problem in (({}, "has no 'year'"), ({"year": "soon"}, "'soon', not a 64-bit integer")):
        with pytest.raises(InputError, match=problem):
            store.write([good, (ImageRecord("bad", metadata=metadata), good[1])])
    assert store.count_images() == 0


def test_a_collection_keeps_its_declarations(opened: Opener) -> None:
    opened(fields=FIELDS).write(items_of([1999]))
    store = opened()
    assert store.status().fields == dict(sorted(FIELDS.items()))
    store.write(items_of([2001], seed=2))
    assert opened(fields=FIELDS).count_images() == 1
    with pytest.raises(CollectionError, match=r"other declared fields .*year: integer=0"):
        opened(fields={"year": "integer"})


def test_tenants_share_ids_and_see_nothing_of_each_other(opened: Opener) -> None:
    ours, theirs = (opened(tenant_field="owner", tenant=name) for name in ("ours", 'x" or owner != "'))
    rng = np.random.default_rng(5)
    mine, other = random_features(rng, 30), random_features(rng, 20)
    ours.write([(ImageRecord("a"), mine), (ImageRecord("b"), mine)])
    theirs.write([(ImageRecord("a"), other)])
    assert found_images(ours, other) == {image_key("a", "ours"), image_key("b", "ours")}
    assert found_images(theirs, mine) == {image_key("a", 'x" or owner != "')}
    assert found_images(ours, mine, 'owner != "ours" or owner == "ours"') == found_images(ours, mine)
    with pytest.raises(UsageError, match="was not opened"):
        ours.neighbours(mine.descriptors, 5, 'owner == "ours") or (owner != "ours"')
    assert [record.image_id for record in ours.list()] == ["a", "b"]
    assert [record.feature_count for record in theirs.list()] == [20]
    assert theirs.records(["b"]) == {}
    assert theirs.delete(["a", "b"]) == ["a"]
    assert ours.records(["a"])["a"].metadata == {"owner": "ours"}
    assert (ours.count_images(), ours.count_features()) == (2, 60)
    with pytest.raises(InputError, match="written for the tenant 'ours'"):
        ours.write([(ImageRecord("c", metadata={"owner": "theirs"}), mine)])


def test_a_collection_with_tenants_asks_whose_images_are_meant(opened: Opener) -> None:
    opened(tenant_field="owner", tenant="ours").write(
        [(ImageRecord("a"), random_features(np.random.default_rng(5), 9))]
    )
    everybody = opened()
    for call in (
        lambda: everybody.records(["a"]),
        lambda: everybody.delete(["a"]),
        lambda: everybody.typed(ImageRecord("a")),
    ):
        with pytest.raises(UsageError, match=r"keeps tenants apart by .owner.*--tenant"):
            call()
    assert [record.tenant for record in everybody.list()] == ["ours"]
    assert found_images(everybody, random_features(np.random.default_rng(5), 9)) == {image_key("a", "ours")}


def test_a_tenant_of_a_collection_without_tenants_is_refused(opened: Opener) -> None:
    features = random_features(np.random.default_rng(5), 9)
    opened().write([(ImageRecord("a"), features)])
    with pytest.raises(UsageError, match="has no tenants"):
        opened(tenant="ours").neighbours(features.descriptors, 3)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"fields": {"x": "number"}}, "'x': that name is reserved"),
        ({"fields": {"uri": "text"}}, "'uri': that name is reserved"),
        ({"fields": {"when": "date"}}, "the types are"),
        ({"tenant_field": "owner", "fields": {"owner": "integer"}}, "is text without a default"),
    ],
)
def test_declarations_that_no_collection_can_have_are_refused(
    tmp_path: Path, values: dict[str, object], problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        FeatureStore.open(str(tmp_path / "photos.db"), "delf", MODEL, StoreSettings(**values))  # type: ignore[arg-type]
