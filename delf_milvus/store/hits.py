"""Searches whose hits are wanted as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from delf_milvus.errors import DatabaseError
from delf_milvus.features import Float32Array
from delf_milvus.store.keys import Int64Array

if TYPE_CHECKING:
    from pymilvus import MilvusClient

PADDING_KEY = -1
PADDING_SIMILARITY = -1.0


Hits = tuple[Int64Array, Float32Array]
"""Keys (Q, k) int64 and similarities (Q, k) float32 of k hits of each of Q vectors, nearest first, padded."""


def search_arrays(client: MilvusClient, collection_name: str, limit: int, **options: Any) -> Hits:
    """The client's search for `limit` hits of each of Q vectors, as arrays; raises what the client raises.

    The client makes a dictionary of every hit, which for 1000 vectors takes longer than many a
    search; so the answer is read as it came. Whatever is no plain answer is asked for again in the usual way, which
    knows what to retry and how to name an error.
    """
    import grpc

    found = client.search(collection_name, limit=limit, _async=True, **options)
    call = getattr(found, "_future", None)
    if call is not None:
        try:
            response = call.result()
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
        else:
            if not response.status.code and not response.status.error_code:
                return hit_arrays(response.results, limit)
        found = client.search(collection_name, limit=limit, **options)
    return answer_arrays(found, limit)


def answer_arrays(found: Iterable[Any], k: int) -> Hits:
    """The hits of an answer as the client has unpacked it."""
    rows = list(found)
    keys = [key for hits in rows for key in hits.ids]
    similarities = [similarity for hits in rows for similarity in hits.distances]
    return _padded(np.array(keys, np.int64), np.array(similarities, np.float32), [len(hits.ids) for hits in rows], k)


def joined_hits(parts: Sequence[Hits], count: int, k: int) -> Hits:
    """The hits of `count` vectors from those of the calls that they were split over; padding where there was none.

    Raises DatabaseError for an answer that is not whole.
    """
    if not parts:
        return np.full((count, k), PADDING_KEY, np.int64), np.full((count, k), PADDING_SIMILARITY, np.float32)
    keys, similarities = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if len(keys) != count:
        raise DatabaseError(f"The database answered {len(keys)} of {count} questions of a search; search again.")
    return keys, similarities


def hit_arrays(results: Any, k: int) -> Hits:
    """The hits of an answer (`SearchResultData` of Milvus's protocol) as `search_arrays` returns them."""
    keys = np.array(results.ids.int_id.data, np.int64)
    return _padded(keys, np.array(results.scores, np.float32), list(results.topks), k)


def _padded(keys: Int64Array, similarities: Float32Array, counts: list[int], k: int) -> Hits:
    if len(keys) == k * len(counts):
        return keys.reshape(-1, k), similarities.reshape(-1, k)
    if len(keys) != sum(counts) or len(keys) != len(similarities) or max(counts, default=0) > k:
        raise DatabaseError("The database answered a search with fewer or more hits than it says; search again.")
    there = np.arange(k) < np.array(counts, np.intp)[:, None]
    all_keys = np.full(there.shape, PADDING_KEY, np.int64)
    all_similarities = np.full(there.shape, PADDING_SIMILARITY, np.float32)
    all_keys[there], all_similarities[there] = keys, similarities
    return all_keys, all_similarities
