"""One collection, many customers: what one of them asks for is never answered with another's photos.

    python examples/tenants.py

The tenant field partitions the collection. An index that is opened for a tenant reads, writes and searches only that
tenant's images, whatever a filter says; image ids of two tenants may be the same. Declared fields filter inside a
tenant, within the vector search itself.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

# Before torch loads: threads that wait by spinning starve others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parent))

from scenes import scene, view

from delf_milvus import DelfIndex, Settings


def opened(uri: Path, tenant: str) -> DelfIndex:
    """The collection as one customer sees it."""
    store = {"tenant_field": "shop", "tenant": tenant, "fields": {"year": "integer=0"}}
    return DelfIndex.open(uri, settings=Settings(store=store))


def main() -> int:
    with tempfile.TemporaryDirectory() as work:
        uri = Path(work) / "shops.db"
        stock = {"anna": (0, 1), "bert": (1, 2)}
        for shop, numbers in stock.items():
            with opened(uri, shop) as index:
                for number in numbers:
                    index.add(scene(number), image_id=f"photo-{number}", metadata={"year": 2020 + number})
        answers = {}
        for shop in stock:
            with opened(uri, shop) as index:
                for number in (0, 1):
                    answers[shop, number] = [hit.image_id for hit in index.search(view(scene(number), 5)).hits]
                    print(f"{shop} asks for scene {number}: {answers[shop, number] or 'no match'}")
                old = index.search(view(scene(2), 5), filter={"year": {"<": 2022}})
                new = index.search(view(scene(2), 5), filter={"year": {">=": 2022}})
        print(f"bert, before 2022: {old.matched}; since 2022: {new.matched}")
    expected = {(shop, n): [f"photo-{n}"] if n in numbers else [] for shop, numbers in stock.items() for n in (0, 1)}
    return 0 if answers == expected and not old.matched and new.matched else 1


if __name__ == "__main__":
    sys.exit(main())
