"""Many searches at once: `AsyncDelfIndex` on one event loop against `DelfIndex` in threads, and how late the loop gets.

    python tests/benchmarks/async_service.py http://127.0.0.1:19530

Fills a collection of its own with random features and drops it in the end.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from conftest import RgbImage, make_photo
from model.models import write_tiny_model
from pymilvus import MilvusClient
from store.store_samples import random_features

from delf_milvus import AsyncDelfIndex, DelfIndex, Settings
from delf_milvus.settings import ExtractSettings
from delf_milvus.store.records import ImageRecord

IMAGES, FEATURES, SEARCHES, THREADS = 100, 500, 32, 4


async def serve(settings: Settings, photos: list[RgbImage]) -> tuple[float, list[float]]:
    """Seconds for all searches, and by how much a timer of 5 ms was late."""
    late: list[float] = []

    async def watch() -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(0.005)
            late.append(time.perf_counter() - started - 0.005)

    async with await AsyncDelfIndex.open(settings=settings, threads=THREADS) as index:
        await index.search(photos[0])
        watching = asyncio.ensure_future(watch())
        started = time.perf_counter()
        await asyncio.gather(*map(index.search, photos))
        seconds = time.perf_counter() - started
        watching.cancel()
    return seconds, late


def main(uri: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder) / "tiny.safetensors")
        extract = ExtractSettings(scales=(0.5, 1.0, 2.0), stored_features=FEATURES, query_features=FEATURES)
        settings = Settings(uri=uri, collection=f"b{uuid.uuid4().hex[:8]}", model=str(model), extract=extract)
        rng = np.random.default_rng(0)
        with DelfIndex.open(settings=settings) as index, ThreadPoolExecutor(THREADS) as pool:
            items = [(ImageRecord(f"{number}"), random_features(rng, FEATURES, 16)) for number in range(IMAGES)]
            for start in range(0, IMAGES, 50):
                index.store.write(items[start : start + 50])
            index.store.ensure_index()
            photos = [make_photo(seed) for seed in range(SEARCHES)]
            index.search(photos[0])
            started = time.perf_counter()
            list(pool.map(index.search, photos))
            threads = time.perf_counter() - started
        seconds, late = asyncio.run(serve(settings, photos))
        print(f"{SEARCHES} searches, {IMAGES * FEATURES} descriptors, {THREADS} threads:")
        print(f"DelfIndex in threads {threads:.2f} s, AsyncDelfIndex {seconds:.2f} s")
        print(f"loop late by (ms): median {np.median(late) * 1e3:.1f}, p99 {np.quantile(late, 0.99) * 1e3:.1f}, "
              f"most {max(late) * 1e3:.1f}")  # fmt: skip
        client = MilvusClient(uri)
        for suffix in ("images", "features"):
            client.drop_collection(f"{settings.collection}_{suffix}")
        client.close()


if __name__ == "__main__":
    main(sys.argv[1])
