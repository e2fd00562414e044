"""Milvus Lite beside writes: how long a search takes, with its own flushes and with those of the store.

    python tests/benchmarks/lite_flushing.py --images 600

For both, one after the other in a database of its own: images of 500 synthetic features are written ten at a time; then
50 descriptors are searched, 60 neighbours each, all is flushed, and they are searched again; then every image is
written anew, and all ids are listed. Times in seconds, of searches and listings the median of five.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from delf_milvus.planning.synthetic import MODEL, image
from delf_milvus.settings import StoreSettings
from delf_milvus.store import writing
from delf_milvus.store.feature_store import FeatureStore

FEATURES = 500
TOGETHER = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    images = parser.parse_args().images
    own = writing._FLUSHED
    columns = ("rows between flushes", "written", "search", "flushed", "search", "written anew", "listed", "search")
    print(" ".join(f"{name:>20}" for name in columns), flush=True)
    for rows in (10**9, own):
        writing._FLUSHED = rows
        found = measured(images)
        print(" ".join(f"{value:20.2f}" for value in (rows, *found)), flush=True)


def measured(images: int) -> list[float]:
    """The columns after the first."""
    items = [image(number, FEATURES) for number in range(images)]
    asked = items[images // 2][1].descriptors[:50]
    with (
        tempfile.TemporaryDirectory() as folder,
        FeatureStore.open(f"{folder}/flushing.db", "flushing", MODEL, StoreSettings(), max_features=FEATURES) as store,
    ):

        def written() -> None:
            for start in range(0, images, TOGETHER):
                store.write(items[start : start + TOGETHER])

        def search() -> object:
            return store.neighbours(asked, 60)

        def listed() -> object:
            return list(store.list())

        steps = [seconds(written), typical(search), seconds(store.compact), typical(search)]
        return [*steps, seconds(written), typical(listed), typical(search)]


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def typical(call: Callable[[], Any]) -> float:
    call()
    return statistics.median(seconds(call) for _ in range(5))


if __name__ == "__main__":
    main()
