"""Building, looking at and dropping the index, on Milvus Lite; `test_server_indexes` does the same on a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from store_samples import MODEL, random_items

from delf_milvus.errors import CollectionError, DatabaseError, UsageError
from delf_milvus.settings import Profile, StoreSettings
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.indexing import BuildProgress
from delf_milvus.store.profiles import IndexProfile


def open_store(folder: Path, settings: StoreSettings | None = None, **options: object) -> FeatureStore:
    arguments = {"fingerprint": MODEL, "settings": settings or StoreSettings(), "max_features": 100, **options}
    return FeatureStore.open(str(folder / "photos.db"), "delf", **arguments)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeatureStore]:
    with open_store(tmp_path) as opened:
        opened.write(random_items(1, 30, 100))
        opened.ensure_index()
        yield opened


@pytest.mark.parametrize(
    ("profile", "index", "substitute_for"),
    [("IVF_SQ8", "IVF_SQ8", ""), ("HNSW", "HNSW", ""), ("IVF_PQ", "IVF_SQ8", "IVF_PQ"), ("FLAT", "FLAT", "")],
)
def test_an_index_is_built_as_asked(store: FeatureStore, profile: Profile, index: str, substitute_for: str) -> None:
    steps: list[BuildProgress] = []
    store.build_index(profile, steps.append)
    status = store.index_status()
    assert (status.index, status.state, status.total_rows) == (index, "Finished", 3000)
    assert status.memory_bytes > 3000 * (16 + 48)
    assert steps[0].step == "flushing"
    assert steps[-1] == BuildProgress("loading", 3000, 3000)
    items = random_items(1, 30, 100)
    assert (store.neighbours(items[3][1].descriptors, 1)[1] > 0.99).mean() > 0.95
    assert profile_of(store, profile).substitute_for == substitute_for


def profile_of(store: FeatureStore, profile: Profile) -> IndexProfile:
    return store._indexing.profile("delf_features", 3000, profile)


def test_what_lite_cannot_build_is_refused_and_the_index_stays(store: FeatureStore) -> None:
    store.build_index("HNSW")
    with pytest.raises(UsageError, match="Milvus Lite has no SCANN"):
        store.build_index("SCANN")
    assert store.index_status().index == "HNSW"


def test_a_setting_that_lite_cannot_build_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.write(random_items(1, 1, 10))
    for folder in (tmp_path, tmp_path / "new"):
        folder.mkdir(exist_ok=True)
        with pytest.raises(UsageError, match="Milvus Lite has no DISKANN"):
            open_store(folder, StoreSettings(profile="DISKANN"))


def test_auto_keeps_an_index_that_was_built_on_purpose_until_it_has_too_few_lists(tmp_path: Path) -> None:
    items = random_items(2, 40, 100)
    with open_store(tmp_path) as store:
        store.write(items[:2])
        store.build_index("IVF_SQ8")
        assert store.index_status().params == {"nlist": 16}
        store.write(items[2:4])
        store.ensure_index()
        assert (store.index_status().index, store.index_status().params) == ("IVF_SQ8", {"nlist": 16})
        store.write(items)
        store.ensure_index()
        assert (store.index_status().index, store.index_status().params) == ("IVF_SQ8", {"nlist": 64})


def test_after_a_drop_the_status_says_none_and_what_reads_builds_again(tmp_path: Path) -> None:
    items = random_items(3, 30, 100)
    with open_store(tmp_path) as store:
        store.write(items)
        store.build_index("IVF_SQ8")
        assert store.drop_index()
        assert not store.drop_index()
    with open_store(tmp_path, create=False) as store:
        status = store.index_status()
        assert (status.index, status.total_rows, status.memory_bytes, dict(status.search)) == ("none", 3000, 0, {})
        whole = store.status()
        assert (whole.index_used, whole.images, whole.features) == ("none", 30, 3000)
        assert [record.image_id for record in store.list(limit=1)] == ["img/00000.jpg"]
        assert store.index_status().index == "none"
        assert (store.neighbours(items[3][1].descriptors, 1)[1] > 0.99).mean() > 0.95
        assert store.index_status().index == "FLAT"
        store.drop_index()
        assert (store.neighbours(items[3][1].descriptors, 1)[1] > 0.99).mean() > 0.95
        store.drop_index()
        assert store.delete([items[0][0].image_id]) == [items[0][0].image_id]
        store.write(random_items(4, 1, 50, "more"))
        store.ensure_index()
        assert (store.index_status().index, store.count_features()) == ("FLAT", 2950)


def test_parameters_in_the_settings_are_those_of_the_index_and_of_its_search(tmp_path: Path) -> None:
    settings = StoreSettings(profile="IVF_SQ8", nlist=24, nprobe=7)
    with open_store(tmp_path, settings) as store:
        store.write(random_items(1, 10, 100))
        store.build_index()
        status = store.index_status()
        assert (status.asked, status.params, status.search) == ("IVF_SQ8", {"nlist": 24}, {"nprobe": 7})


def test_an_absent_collection_has_no_index(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for call in (store.build_index, store.drop_index, store.index_status, store.scratch, lambda: store.sample(5)):
            with pytest.raises(CollectionError, match="no collection 'delf'"):
                call()


def test_a_sample_is_random_repeatable_and_whole(tmp_path: Path) -> None:
    items = random_items(5, 1500, 1)
    with open_store(tmp_path) as store:
        store.write(items)
        drawn = store.sample(300, seed=1)
        assert len(drawn) == 300
        assert list(store.sample(300, seed=1)) == list(drawn)
        assert list(store.sample(300, seed=2)) != list(drawn)
        assert {record.image_id for record, _ in store.sample(2000).values()} == {r.image_id for r, _ in items}
        numbers = [int(record.image_id[4:9]) for record, _ in drawn.values()]
        assert 600 < np.mean(numbers) < 900


def test_a_scratch_collection_is_gone_afterwards_also_after_a_failure(store: FeatureStore) -> None:
    keys, descriptors = np.arange(50), random_items(6, 1, 50)[0][1].descriptors
    before = sorted(store._client.list_collections())
    with store.scratch() as scratch:
        scratch.insert(keys, descriptors)
        scratch.build(profile_of(store, "HNSW"))
        found, similarities = scratch.neighbours(descriptors, 3, {"ef": 64})
        assert found[:, 0].tolist() == keys.tolist()
        assert np.allclose(similarities[:, 0], 1, atol=1e-5)
        assert sorted(store._client.list_collections()) != before
    assert sorted(store._client.list_collections()) == before
    with pytest.raises(DatabaseError), store.scratch() as scratch:
        scratch.insert(keys, descriptors[:, :3])
    assert sorted(store._client.list_collections()) == before


def test_a_scratch_collection_replaces_what_a_crash_left_and_nothing_else(store: FeatureStore) -> None:
    store.scratch().__enter__()
    with store.scratch():
        pass
    store._client.create_collection("delf_scratch", dimension=4)
    with pytest.raises(CollectionError, match="made by other software"), store.scratch():
        pass
    assert "delf_scratch" in store._client.list_collections()
