"""Single steps of a search, and the first write into a new collection, timed; skipped by the test command.

python -m pytest tests/benchmarks/test_speed.py --benchmark-only
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "store"))

from store_samples import MODEL, random_features, random_items

from delf_milvus.features import ORDINAL_BITS
from delf_milvus.retrieval.voting import vote
from delf_milvus.settings import StoreSettings
from delf_milvus.store.codec import pack, unpack
from delf_milvus.store.feature_store import FeatureStore

Benchmark = Callable[..., Any]


def test_unpack_the_features_of_100_candidates(benchmark: Benchmark) -> None:
    texts = [pack(random_features(np.random.default_rng(seed), 1000, 40)) for seed in range(20)] * 5
    features = benchmark(lambda: [unpack(text) for text in texts])
    assert [len(one) for one in features] == [1000] * 100


def test_vote_of_1000_features_with_60_neighbours(benchmark: Benchmark) -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 1000, (1000, 60)) << ORDINAL_BITS | rng.integers(0, 1000, (1000, 60))
    votes = benchmark(vote, keys, rng.random((1000, 60)).astype(np.float32))
    assert len(votes) == 1000


@pytest.mark.parametrize("place", ["lite", pytest.param("server", marks=pytest.mark.server)])
def test_the_first_write_into_a_new_collection_with_a_declared_field(
    benchmark: Benchmark, place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = str(tmp_path / "photos.db") if place == "lite" else request.getfixturevalue("milvus").uri
    settings = StoreSettings(fields={"year": "integer=0"})
    items = random_items(1, 16, 40)

    def write(name: str) -> int:
        with FeatureStore.open(uri, name, MODEL, settings, max_features=100) as store:
            store.write(items)
            return store.count_images()

    def another() -> tuple[tuple[str], dict[str, Any]]:
        return (f"n{uuid.uuid4().hex[:12]}",), {}

    assert benchmark.pedantic(write, setup=another, rounds=7) == len(items)
