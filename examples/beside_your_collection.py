"""DELF beside a collection of your own: one Milvus client, two collections, one fused answer.

    python examples/beside_your_collection.py

You have a collection of global vectors, one a photo (here of a stand-in for your network). The index opens over your
client, makes two collections of its own beside yours, and touches nothing else. For each query both are asked, and the
rankings are fused:

- by rank: the sum of weight / (60 + rank) (Cormack, Clarke and Buettcher, "Reciprocal rank fusion", SIGIR 2009);
- by score: your similarity, and DELF's confidence, each times its weight.

Images that DELF proves come first in both: a proof is more than a similarity.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

# Before torch loads: threads that wait by spinning starve others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
from pymilvus import DataType, MilvusClient

sys.path.insert(0, str(Path(__file__).parent))

from scenes import Image, save, scene, view

from delf_milvus import DelfIndex, SearchResult

YOURS = "products"


def your_vector(photo: Image) -> list[float]:
    """A stand-in for the network of yours: the photo as 8 x 8 pixels, centred, of unit length; (192,)."""
    small = cv2.resize(photo, (8, 8), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
    small -= small.mean()
    return (small / np.linalg.norm(small)).tolist()


def by_rank(rankings: Sequence[Sequence[str]], weights: Sequence[float], k: int = 60) -> dict[str, float]:
    """Reciprocal rank fusion of rankings, best first; a document that is missing from one gets nothing of it."""
    fused: dict[str, float] = {}
    for ranking, weight in zip(rankings, weights, strict=True):
        for rank, name in enumerate(ranking, 1):
            fused[name] = fused.get(name, 0.0) + weight / (k + rank)
    return fused


def by_score(scores: Sequence[Mapping[str, float]], weights: Sequence[float]) -> dict[str, float]:
    """Weighted sum of scores that are comparable already; a document that is missing from one counts as 0 there."""
    names = {name for one in scores for name in one}
    return {
        name: sum(weight * one.get(name, 0.0) for one, weight in zip(scores, weights, strict=True)) for name in names
    }


def proved_first(fused: Mapping[str, float], result: SearchResult) -> list[str]:
    """The fused ranking, with what DELF verified before the rest."""
    proved = {hit.image_id for hit in result.hits if hit.verified}
    return sorted(fused, key=lambda name: (name not in proved, -fused[name], name))


def make_yours(client: MilvusClient, photos: Mapping[str, Image]) -> None:
    schema = client.create_schema()
    schema.add_field("sku", DataType.VARCHAR, max_length=200, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=192)
    index = client.prepare_index_params()
    index.add_index("embedding", index_type="FLAT", metric_type="COSINE")
    client.create_collection(YOURS, schema=schema, index_params=index)
    client.insert(YOURS, [{"sku": name, "embedding": your_vector(photo)} for name, photo in photos.items()])


def main() -> int:
    photos = {f"sku-{number}": scene(number) for number in range(8)}
    # The third product stands in the corner of a photo of something else: its global vector says little of it.
    query = scene(50)
    query[120:240, 0:160] = cv2.resize(scene(3), (160, 120), interpolation=cv2.INTER_AREA)
    with tempfile.TemporaryDirectory() as folder:
        client = MilvusClient(str(Path(folder) / "shop.db"))
        make_yours(client, photos)
        before = client.describe_collection(YOURS), client.query(YOURS, output_fields=["count(*)"])
        for name, photo in photos.items():
            save(Path(folder) / "photos" / f"{name}.jpg", view(photo, 1))

        with DelfIndex(client=client, collection="products_delf") as index:
            for name in photos:
                index.add(Path(folder) / "photos" / f"{name}.jpg", image_id=name)
            result = index.search(query, top_k=20, include_unverified=True)

        (yours,) = client.search(
            YOURS,
            [your_vector(query)],
            limit=20,
            output_fields=["sku"],
            search_params={"metric_type": "COSINE"},
        )
        similar = {hit["entity"]["sku"]: float(hit["distance"]) for hit in yours}
        delf = [hit.image_id for hit in result.hits]
        ranked = proved_first(by_rank([list(similar), delf], [0.5, 0.5]), result)
        scored = proved_first(
            by_score([similar, {hit.image_id: hit.confidence for hit in result.hits}], [0.5, 0.5]), result
        )
        print(f"your vectors:    {', '.join(list(similar)[:3])}, ...")
        print(f"DELF:            {', '.join(delf[:3])}, ...; verified: {sum(hit.verified for hit in result.hits)}")
        print(f"fused by rank:   {', '.join(ranked[:3])}, ...")
        print(f"fused by score:  {', '.join(scored[:3])}, ...")
        untouched = before == (client.describe_collection(YOURS), client.query(YOURS, output_fields=["count(*)"]))
        print(f"your collection is untouched: {untouched}")
        client.close()
    return 0 if untouched and ranked[0] == scored[0] == "sku-3" else 1


if __name__ == "__main__":
    sys.exit(main())
