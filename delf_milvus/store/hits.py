"""Hits of a search as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from delf_milvus.features import Float32Array
from delf_milvus.store.keys import Int64Array

PADDING_KEY = -1
PADDING_SIMILARITY = -1.0


def hit_arrays(found: Any, k: int) -> tuple[Int64Array, Float32Array]:
    """Keys (Q, k) int64 and similarities (Q, k) float32 of a pymilvus search, nearest first, padded where there are
    fewer."""
    keys = np.full((len(found), k), PADDING_KEY, np.int64)
    similarities = np.full((len(found), k), PADDING_SIMILARITY, np.float32)
    for row, hits in enumerate(found):
        count = len(hits.ids)
        keys[row, :count] = hits.ids
        similarities[row, :count] = hits.distances
    return keys, similarities
