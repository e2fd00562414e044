"""Single steps of a search, timed; skipped by the test command.

python -m pytest tests/benchmarks/test_speed.py --benchmark-only
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "store"))

from store_samples import random_features

from delf_milvus.features import ORDINAL_BITS
from delf_milvus.retrieval.voting import vote
from delf_milvus.store.codec import pack, unpack

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
