"""Collections that index a part of an image's features: the others are compared, and nothing of them is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_photo
from pymilvus import MilvusClient
from store_samples import MODEL, random_features, random_items

from delf_milvus import DelfIndex, Settings
from delf_milvus.errors import CollectionError
from delf_milvus.features import ORDINAL_BITS
from delf_milvus.settings import ExtractSettings, IndexedChoice, StoreSettings
from delf_milvus.store.choosing import spread
from delf_milvus.store.codec import pack
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.keys import image_key
from delf_milvus.store.records import ImageRecord
from delf_milvus.store.transfer import export_collection, import_collection

ITEMS = random_items(1, 6, 40)
INDEXED = 15


def opened(place: Path, indexed: int | None = INDEXED, choice: IndexedChoice = "spread") -> FeatureStore:
    settings = StoreSettings(indexed_features=indexed, indexed_choice=choice)
    return FeatureStore.open(str(place), "delf", MODEL, settings, max_features=100)


@pytest.mark.parametrize("choice", ["top", "spread"])
def test_so_many_features_are_searched_and_all_are_compared(tmp_path: Path, choice: IndexedChoice) -> None:
    with opened(tmp_path / "photos.db", choice=choice) as store:
        store.write([*ITEMS, (ImageRecord("few.jpg"), random_features(np.random.default_rng(2), 9))])
        assert store.count_features() == len(ITEMS) * INDEXED + 9
        stored = store.stored([record.key for record, _ in ITEMS])
        for record, features in ITEMS:
            ordered = spread(features, INDEXED) if choice == "spread" else features
            found, packed = stored[record.key]
            assert found.feature_count == INDEXED
            np.testing.assert_allclose(packed.locations, ordered.locations, atol=0.01)
            keys, similarities = store.neighbours(ordered.descriptors, 1)
            own = keys[:, 0] >> ORDINAL_BITS == record.key
            exact = similarities[:, 0] > 0.9999
            assert (own & exact)[:INDEXED].all()
            assert not (own & exact)[INDEXED:].any()
        assert store.fsck().findings == []


def test_an_image_written_anew_leaves_nothing_of_its_old_version(tmp_path: Path) -> None:
    with opened(tmp_path / "photos.db") as store:
        store.write(ITEMS)
        rng = np.random.default_rng(3)
        for count, rows in ((5, 5), (60, INDEXED), (3, 3)):
            store.write([(ITEMS[0][0], random_features(rng, count))])
            assert store.count_features() == 5 * INDEXED + rows
            assert len(store.stored([ITEMS[0][0].key])[ITEMS[0][0].key][1]) == count
        assert store.fsck().findings == []
        assert store.delete([ITEMS[0][0].image_id]) == [ITEMS[0][0].image_id]
        assert store.count_features() == 5 * INDEXED


def test_a_collection_remembers_how_many_it_indexes_and_refuses_others(tmp_path: Path) -> None:
    place = tmp_path / "photos.db"
    with opened(place) as store:
        store.write(ITEMS[:3])
    with opened(place, indexed=None) as store:
        store.write(ITEMS[3:])
        assert store.count_features() == len(ITEMS) * INDEXED
        status = store.status()
        assert (status.indexed_features, status.indexed_choice) == (INDEXED, "spread")
    for indexed, choice in ((INDEXED + 1, "spread"), (INDEXED, "top")):
        with pytest.raises(CollectionError, match=r"made to index 15 \(spread\) of an image's features: leave"):
            opened(place, indexed, choice)  # type: ignore[arg-type]
    with FeatureStore.open(str(tmp_path / "all.db"), "delf", MODEL, StoreSettings(), max_features=100) as store:
        store.write(ITEMS[:1])
    with pytest.raises(CollectionError, match="made to index all of an image's features"):
        opened(tmp_path / "all.db")


def test_an_export_keeps_what_is_compared_and_fits_no_collection_that_indexes_otherwise(tmp_path: Path) -> None:
    with opened(tmp_path / "from.db") as store:
        store.write(ITEMS)
        export_collection(store, tmp_path / "export")
        rows = store.rows([record.key for record, _ in ITEMS])
    with FeatureStore.open(str(tmp_path / "to.db"), "delf", None, StoreSettings(), create=True) as store:
        assert import_collection(store, tmp_path / "export").features == len(ITEMS) * INDEXED
        assert store.fsck().findings == []
        again = store.rows(list(rows))
        assert {key: row["keypoints"] for key, row in again.items()} == {k: row["keypoints"] for k, row in rows.items()}
    with opened(tmp_path / "other.db", indexed=20) as store:
        store.create()
        with pytest.raises(CollectionError, match="another number or choice"):
            import_collection(store, tmp_path / "export")


def test_damage_is_mended_from_what_there_is_and_lost_features_are_said(tmp_path: Path) -> None:
    """A row moved: packed again with the rest kept. A row that is no feature: written anew. The text unreadable, or of
    another photo: the features that no row has are lost."""
    place = str(tmp_path / "photos.db")
    with opened(Path(place)) as store:
        store.write(ITEMS)
        before = {key: packed for key, (_, packed) in store.stored([r.key for r, _ in ITEMS]).items()}
        client = MilvusClient(place)

        def image(number: int) -> dict[str, Any]:
            fields = ["*", "$meta"]
            (row,) = client.get("delf_images", ids=[ITEMS[number][0].key], output_fields=fields)
            return dict(row)

        def feature(number: int, ordinal: int) -> dict[str, Any]:
            key = ITEMS[number][0].key << ORDINAL_BITS | ordinal
            (row,) = client.get("delf_features", ids=[key], output_fields=["*"])
            return dict(row)

        client.upsert("delf_features", [{**feature(0, 2), "x": feature(0, 2)["x"] + 1}])
        client.upsert("delf_features", [{**feature(1, 3), "attention": 1e6}])
        client.upsert("delf_images", [{**image(2), "keypoints": image(2)["keypoints"][:-8]}])
        client.upsert("delf_images", [{**image(3), "keypoints": pack(random_features(np.random.default_rng(5), 40))}])
        expected = {
            ("packed_geometry", ITEMS[0][0].key, 1),
            ("damaged_features", ITEMS[1][0].key, INDEXED),
            ("lost_features", ITEMS[2][0].key, 1),
        }
        found = {(one.kind, one.image_key, one.rows) for one in store.fsck(repair=True).findings}
        assert expected < found
        assert {kind for kind, key, _ in found if key == ITEMS[3][0].key} <= {"lost_features", "packed_geometry"}
        assert store.fsck().findings == []
        after = store.stored([ITEMS[0][0].key, ITEMS[1][0].key])
        for number, moved in ((0, 1.0), (1, 0.0)):
            old, new = before[ITEMS[number][0].key], after[ITEMS[number][0].key][1]
            assert len(new) == 40
            assert np.abs(new.locations - old.locations).max() == pytest.approx(moved, abs=0.02)
        assert feature(1, 3)["attention"] < 100
        assert {record.image_id for record in store.list()} >= {r.image_id for r, _ in (*ITEMS[:2], *ITEMS[4:])}
        assert image_key(ITEMS[2][0].image_id) not in store.stored([ITEMS[2][0].key])
        client.close()


def test_an_index_finds_photos_by_a_few_features_and_proves_them_by_all(tmp_path: Path, tiny_model: Path) -> None:
    extract = ExtractSettings(scales=(0.5, 1.0), longest_side=320, stored_features=120, query_features=120)
    results = {}
    for indexed in (None, 20):
        store = StoreSettings(indexed_features=indexed)
        settings = Settings(uri=str(tmp_path / f"{indexed}.db"), model=str(tiny_model), extract=extract, store=store)
        with DelfIndex.open(settings=settings) as index:
            for seed in range(5):
                index.add(make_photo(seed, 320, 240), f"{seed}.png")
            results[indexed] = index.search(np.ascontiguousarray(make_photo(2, 320, 240)[10:220, 15:300]))
            assert index.status()["features"] == 5 * (indexed or 120)
    best = {indexed: result.hits[0] for indexed, result in results.items()}
    assert best[20].image_id == best[None].image_id == "2.png"
    assert best[20].inliers == best[None].inliers
