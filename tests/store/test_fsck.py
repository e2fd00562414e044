"""Every kind of damage, made with the plain client, on Milvus Lite and on a real server: found, and mended."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from milvus_server import servers
from pymilvus import MilvusClient
from store_samples import MODEL, OTHER_MODEL, random_features, random_items

from delf_milvus.features import Features
from delf_milvus.settings import StoreSettings
from delf_milvus.store import fsck
from delf_milvus.store.codec import pack, rounding_differences, unpack
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.fsck import REMEDIES
from delf_milvus.store.keys import feature_keys, image_key
from delf_milvus.store.records import ImageRecord

IMAGES = 12
COUNT = 40
IDS = [f"img/{number:05}.jpg" for number in range(IMAGES)]


@dataclass
class Place:
    """A store with twelve images, and the plain client beside it."""

    store: FeatureStore
    client: MilvusClient
    name: str
    server: bool

    def image(self, image_id: str) -> dict[str, Any]:
        fields = ["*", "$meta"]
        (row,) = self.client.get(f"{self.name}_images", ids=[image_key(image_id)], output_fields=fields)
        return dict(row)

    def put(self, suffix: str, *rows: dict[str, Any]) -> None:
        self.client.upsert(f"{self.name}_{suffix}", list(rows))

    def features(self, image_id: str, *ordinals: int) -> list[dict[str, Any]]:
        keys = feature_keys(image_key(image_id), COUNT)[list(ordinals)].tolist()
        return [dict(row) for row in self.client.get(f"{self.name}_features", ids=keys, output_fields=["*"])]

    def drop(self, suffix: str, *keys: int) -> None:
        self.client.delete(f"{self.name}_{suffix}", ids=list(keys))


@pytest.fixture(params=["lite", *servers(pytest.mark.server)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    lite = request.param == "lite"
    uri = str(tmp_path / "photos.db") if lite else request.getfixturevalue(f"{request.param}_server").uri
    name = f"t{uuid.uuid4().hex[:12]}"
    with FeatureStore.open(uri, name, MODEL, StoreSettings(), max_features=100) as store:
        items = random_items(1, IMAGES, COUNT)
        store.write([(ImageRecord(r.image_id, r.uri, r.sha256, metadata={"year": 1999}), f) for r, f in items])
        client = MilvusClient(uri)
        yield Place(store, client, name, not lite)
        for suffix in ("features", "images"):
            client.drop_collection(f"{name}_{suffix}")
        client.close()


def damage_everything(place: Place) -> set[tuple[str, int, str, int]]:
    """Damage one image in each way; returns what should be found: kind, image key, image id, rows."""
    keys = [image_key(image_id) for image_id in IDS]
    place.drop("images", keys[0])
    place.drop("features", *feature_keys(keys[1], COUNT)[7:9].tolist())
    place.put(
        "features",
        *(
            {**row, "feature_key": int(feature_keys(keys[2], COUNT + 2)[COUNT + number]), "image_key": keys[2]}
            for number, row in enumerate(place.features(IDS[5], 0, 1))
        ),
    )
    place.put("features", *({**row, "image_key": 5} for row in place.features(IDS[3], 3, 4, 5)))
    place.put("features", *({**row, "attention": 1e6} for row in place.features(IDS[4], 20)))
    place.put("features", *({**row, "x": row["x"] + 1} for row in place.features(IDS[5], 0)))
    image = place.image(IDS[6])
    place.put("images", {**image, "keypoints": image["keypoints"][:-8]})
    place.put("images", {**place.image(IDS[7]), "image_key": 77, "image_id": "somewhere else"})
    place.put("images", {**place.image(IDS[8]), "model": OTHER_MODEL.short})
    image = place.image(IDS[9])
    place.put("images", {**image, "keypoints": pack(random_features(np.random.default_rng(3), 2))})
    expected = {
        ("orphan_features", keys[0], "", COUNT),
        ("lost_features", keys[1], IDS[1], 2),
        ("surplus_features", keys[2], IDS[2], 2),
        ("misfiled_features", keys[3], IDS[3], 3),
        ("damaged_features", keys[4], IDS[4], COUNT),
        ("packed_geometry", keys[5], IDS[5], 1),
        ("packed_geometry", keys[6], IDS[6], 1),
        ("wrong_key", 77, "somewhere else", 1),
        ("other_model", keys[8], IDS[8], 1 + COUNT),
        ("packed_geometry", keys[9], IDS[9], 1),
    }
    if place.server:
        # Only a server holds a key twice.
        place.client.insert(f"{place.name}_features", place.features(IDS[10], 2, 3))
        place.client.insert(f"{place.name}_images", [place.image(IDS[11])])
        assert place.store.count_features() == (IMAGES - 1) * COUNT + COUNT - 2 + 2 + 2
        expected |= {("duplicate_keys", keys[10], "", 2), ("duplicate_keys", keys[11], "", 1)}
    return expected


@pytest.mark.parametrize("place", ["lite"], indirect=True)
def test_a_sound_collection_has_no_findings(place: Place) -> None:
    steps: list[tuple[int, int]] = []
    report = place.store.fsck(progress=lambda done, total: steps.append((done, total)))
    assert (report.findings, report.clean, report.repaired) == ([], True, False)
    assert (report.images, report.features) == (IMAGES, IMAGES * COUNT)
    assert steps[-1] == (IMAGES + IMAGES * COUNT,) * 2


def test_every_kind_of_damage_is_found_and_mended(place: Place) -> None:
    before = {record.image_id: features for record, features in place.store.stored(map(image_key, IDS)).values()}
    expected = damage_everything(place)
    for report in (place.store.fsck(), place.store.fsck(repair=True)):
        assert {(one.kind, one.image_key, one.image_id, one.rows) for one in report.findings} == expected
        assert report.clean == report.repaired
    again = place.store.fsck()
    assert again.findings == []
    gone = {IDS[0], IDS[1], IDS[8]}
    assert {record.image_id for record in place.store.list()} == set(IDS) - gone
    assert place.store.count_features() == again.features == COUNT * (IMAGES - len(gone))
    after = place.store.stored(map(image_key, IDS))
    for record, features in after.values():
        assert dict(record.metadata) == {"year": 1999}
        moved = 1 if record.image_id == IDS[5] else 0
        assert np.abs(features.locations - before[record.image_id].locations).max() == pytest.approx(moved, abs=0.02)
    # The row with the impossible attention was written anew from the packed features.
    (row,) = place.features(IDS[4], 20)
    assert row["attention"] == pytest.approx(float(before[IDS[4]].attention[20]), rel=1e-3)
    assert place.features(IDS[3], 3)[0]["image_key"] == image_key(IDS[3])


def test_keys_are_read_in_several_ranges_and_pages(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_RANGE", 100), ("_PAGE_BYTES", 5000), ("_PAGE_ROWS", 20), ("_IMAGES", 5)):
        monkeypatch.setattr(fsck, name, value)
    report = place.store.fsck()
    assert (report.findings, report.images, report.features) == ([], IMAGES, IMAGES * COUNT)
    expected = damage_everything(place)
    report = place.store.fsck(repair=True)
    assert {(one.kind, one.image_key, one.image_id, one.rows) for one in report.findings} == expected
    assert place.store.fsck().findings == []


def altered(features: Features, change: Callable[[dict[str, Any]], None]) -> Features:
    arrays = {name: getattr(features, name).copy() for name in ("locations", "scales", "attention", "descriptors")}
    change(arrays)
    return Features(**arrays, width=features.width, height=features.height)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda arrays: arrays["locations"].__setitem__((3, 1), arrays["locations"][3, 1] + 0.02), ["x or y"]),
        (lambda arrays: arrays["scales"].__setitem__(3, 3.0), ["scale"]),
        (lambda arrays: arrays["attention"].__imul__(0.99), ["attention"]),
        (lambda arrays: arrays["descriptors"].__setitem__([3, 4], arrays["descriptors"][[4, 3]]), ["descriptor"]),
        (lambda arrays: None, []),
    ],
)
def test_what_rounding_cannot_explain_is_a_difference(
    change: Callable[[dict[str, Any]], None], said: list[str]
) -> None:
    exact = random_features(np.random.default_rng(5), 500)
    packed = unpack(pack(exact))
    assert rounding_differences(packed, altered(exact, change)) == said


def test_every_finding_has_a_remedy(tmp_path: Path) -> None:
    assert all("--repair" in remedy for remedy in REMEDIES.values())
