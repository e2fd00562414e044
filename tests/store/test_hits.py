from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException
from pymilvus.grpc_gen import schema_pb2

from delf_milvus.errors import DatabaseError
from delf_milvus.store.hits import hit_arrays, joined_hits, search_arrays

VECTORS = np.eye(4, 3, dtype=np.float32)
OPTIONS = {"data": list(np.eye(2, 3, dtype=np.float32)), "anns_field": "vector", "output_fields": ["id"]}


@pytest.fixture
def client(tmp_path: Path) -> MilvusClient:
    client = MilvusClient(str(tmp_path / "hits.db"))
    client.create_collection("some", dimension=3, metric_type="IP")
    client.insert("some", [{"id": number, "vector": vector} for number, vector in enumerate(VECTORS, 10)])
    yield client
    client.close()


class Documented(MilvusClient):
    """A client without the short way."""

    def search(self, *arguments: object, _async: bool = False, **options: object) -> object:
        return super().search(*arguments, **options)


@pytest.mark.parametrize("k", [2, 4, 6])
def test_hits_are_those_of_the_client_and_padded(client: MilvusClient, k: int) -> None:
    expected = client.search("some", limit=k, **OPTIONS)
    keys, similarities = search_arrays(client, "some", k, **OPTIONS)
    assert (keys.shape, keys.dtype, similarities.dtype) == ((2, k), np.int64, np.float32)
    for row, hits in enumerate(expected):
        found = len(hits.ids)
        assert keys[row].tolist() == [*hits.ids, *[-1] * (k - found)]
        assert similarities[row].tolist() == [*hits.distances, *[-1.0] * (k - found)]


def test_a_client_without_the_short_way_gives_the_same(client: MilvusClient, tmp_path: Path) -> None:
    other = Documented(str(tmp_path / "hits.db"))
    for found, expected in zip(
        search_arrays(other, "some", 6, **OPTIONS), search_arrays(client, "some", 6, **OPTIONS), strict=True
    ):
        assert np.array_equal(found, expected)
    other.close()


def test_an_empty_collection_gives_padding(client: MilvusClient) -> None:
    client.delete("some", ids=[10, 11, 12, 13])
    keys, similarities = search_arrays(client, "some", 3, **OPTIONS)
    assert (keys == -1).all()
    assert (similarities == -1).all()


def test_errors_are_those_of_the_client(client: MilvusClient) -> None:
    for name in ("absent", "some"):
        if name == "some":
            client.release_collection("some")
        with pytest.raises(MilvusException) as expected:
            client.search(name, limit=3, **OPTIONS)
        with pytest.raises(MilvusException) as found:
            search_arrays(client, name, 3, **OPTIONS)
        assert found.value.code == expected.value.code


def test_an_answer_that_lacks_questions_or_hits_is_an_error_and_not_a_shorter_answer(client: MilvusClient) -> None:
    hits = search_arrays(client, "some", 2, **OPTIONS)
    assert joined_hits([hits, hits], 4, 2)[0].shape == (4, 2)
    for parts in ([hits], [hits, hits, hits]):
        with pytest.raises(DatabaseError, match=r"answered [26] of 4 questions of a search; search again"):
            joined_hits(parts, 4, 2)
    results = schema_pb2.SearchResultData(topks=[2, 2], scores=[0.9, 0.8, 0.7])
    results.ids.int_id.data.extend([10, 11, 12])
    with pytest.raises(DatabaseError, match="fewer or more hits than it says"):
        hit_arrays(results, 3)
