"""Searches whose hits are wanted as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from delf_milvus.features import Float32Array
from delf_milvus.store.keys import Int64Array

if TYPE_CHECKING:
    from pymilvus import MilvusClient

PADDING_KEY = -1
PADDING_SIMILARITY = -1.0


def search_arrays(client: MilvusClient, name: str, k: int, **options: Any) -> tuple[Int64Array, Float32Array]:
    """The client's search for k hits of each of Q vectors, as arrays.

    Returns keys (Q, k) int64 and similarities (Q, k) float32, nearest first, padded where there are fewer; raises what
    the client raises. The client makes a dictionary of every hit, which for 1000 vectors takes longer than many a
    search; so the answer is read as it came. Whatever is no plain answer is asked for again in the usual way, which
    knows what to retry and how to name an error.
    """
    import grpc

    call = getattr(client.search(name, limit=k, _async=True, **options), "_future", None)
    if call is not None:
        try:
            response = call.result()
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
        else:
            if not response.status.code and not response.status.error_code:
                return hit_arrays(response.results, k)
    found = client.search(name, limit=k, **options)
    keys = [key for hits in found for key in hits.ids]
    similarities = [similarity for hits in found for similarity in hits.distances]
    return _padded(np.array(keys, np.int64), np.array(similarities, np.float32), [len(hits.ids) for hits in found], k)


def hit_arrays(results: Any, k: int) -> tuple[Int64Array, Float32Array]:
    """The hits of an answer (`SearchResultData` of Milvus's protocol) as `search_arrays` returns them."""
    keys = np.array(results.ids.int_id.data, np.int64)
    return _padded(keys, np.array(results.scores, np.float32), list(results.topks), k)


def _padded(keys: Int64Array, similarities: Float32Array, counts: list[int], k: int) -> tuple[Int64Array, Float32Array]:
    if len(keys) == k * len(counts):
        return keys.reshape(-1, k), similarities.reshape(-1, k)
    there = np.arange(k) < np.array(counts, np.intp)[:, None]
    all_keys = np.full(there.shape, PADDING_KEY, np.int64)
    all_similarities = np.full(there.shape, PADDING_SIMILARITY, np.float32)
    all_keys[there], all_similarities[there] = keys, similarities
    return all_keys, all_similarities
