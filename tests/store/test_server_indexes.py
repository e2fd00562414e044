"""Every index that the test server can build, on the test server."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from milvus_server import Server
from store_samples import MODEL, random_items

from delf_milvus.errors import UsageError
from delf_milvus.settings import Profile, StoreSettings
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.indexing import BuildProgress

pytestmark = pytest.mark.server

ITEMS = random_items(1, 30, 100)


@pytest.fixture(scope="module")
def store(milvus: Server) -> Iterator[FeatureStore]:
    """30 images of 100 features."""
    name = f"t{uuid.uuid4().hex[:12]}"
    with FeatureStore.open(milvus.uri, name, MODEL, StoreSettings(m=4, nbits=6), max_features=100) as opened:
        opened.write(ITEMS)
        yield opened
        for suffix in ("_features", "_images"):
            opened._client.drop_collection(name + suffix)


@pytest.mark.parametrize("profile", ["IVF_PQ", "SCANN", "HNSW"])
def test_a_profile_is_built_searched_and_described(store: FeatureStore, profile: Profile) -> None:
    steps: list[BuildProgress] = []
    store.build_index(profile, steps.append)
    status = store.index_status()
    assert (status.index, status.substitute_for, status.total_rows) == (profile, "", 3000)
    # The server may merge segments at any time, and then builds the merged one anew.
    assert status.state in ("Finished", "InProgress")
    assert status.segments >= 1
    assert 0 < status.segment_rows <= 3000
    assert status.params["M" if profile == "HNSW" else "nlist"] > 0
    assert [step.step for step in (steps[0], steps[-1])] == ["flushing", "loading"]
    assert any(step.step == "building" and step.total == 3000 for step in steps)
    keys, _ = store.neighbours(ITEMS[3][1].descriptors, 20)
    own = ITEMS[3][0].key << 12 | np.arange(100)
    assert (keys == own[:, None]).any(axis=1).mean() > 0.9


def test_a_build_waits_for_segments_that_the_server_has_merged(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Milvus 2.3 calls an index finished, and its rows indexed, while it lacks those of a merged segment."""
    store.build_index("IVF_PQ")
    describe, left = store._client.describe_index, [4]

    def merging(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        pending = 1000 if left[0] > 0 else 0
        return {**describe(*arguments, **options), "pending_index_rows": pending}

    monkeypatch.setattr(store._client, "describe_index", merging)
    steps: list[BuildProgress] = []
    store.build_index("IVF_PQ", steps.append)
    assert left[0] <= 0
    building = [step for step in steps if step.step == "building"]
    assert building[0] == BuildProgress("building", 2000, 3000)
    assert building[-1] == BuildProgress("building", 3000, 3000)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("IVF_RABITQ", "needs Milvus 2.6 or newer, this server is 2.3"),
        ("DISKANN", "needs Milvus 2.4"),
        ("GPU_IVF_PQ", "needs Milvus 2.4"),
        ("PAPER", "cannot split descriptors of 16 components into 10"),
    ],
)
def test_what_this_server_cannot_do_is_refused_and_changes_nothing(
    store: FeatureStore, profile: Profile, message: str
) -> None:
    before = store.index_status()
    with pytest.raises(UsageError, match=message):
        store.build_index(profile)
    assert store.index_status() == before


def test_after_a_drop_nothing_is_loaded_until_somebody_reads(store: FeatureStore) -> None:
    assert store.drop_index()
    assert not store.drop_index()
    status = store.index_status()
    assert (status.index, status.segments, status.total_rows, status.memory_bytes) == ("none", 0, 3000, 0)
    assert (store.status().index_used, store.status().images, store.status().features) == ("none", 30, 3000)
    assert store.delete([ITEMS[0][0].image_id]) == [ITEMS[0][0].image_id]
    assert store.index_status().index == "none"
    assert (store.neighbours(ITEMS[3][1].descriptors, 1)[1] > 0.99).mean() > 0.95
    assert store.index_status().index == "FLAT"
    assert store.count_features() == 2900
    store.write(ITEMS[:1])
