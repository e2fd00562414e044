"""Mixed load in small: what is open and what runs does not grow with the number of calls, and memory stays bounded."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from benchmarks.soak import INGESTED, Calls, Log, Usage, calls_of, in_use, settings_of, trend, work
from conftest import RgbImage, make_photo, save_photo
from milvus_server import Server

from delf_milvus import DelfIndex, Settings

THREADS, CALLS = 3, 30
MEMORY = 70.0
"""MB that two further rounds may add: the 60 photos of their calls, decoded, with the levels of their pyramids as
floats, are more than 80 MB, so that a call that kept its photo's would be seen. What the allocator, torch's kernels for
ever new sizes and Milvus Lite's segments keep is less."""


def turn(calls: Calls, seed: int) -> Usage:
    """So many calls in threads, which end; what the process takes afterwards."""
    log, left = Log(), itertools.count(CALLS, -1)

    def go_on() -> bool:
        return next(left) > 0

    workers = [threading.Thread(target=work, args=(calls, log, seed + number, go_on)) for number in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert log.errors == {}
    assert log.calls == CALLS
    return in_use()


def settled(rounds: Callable[[int], Usage], most: int) -> None:
    """After a first round, further two add no more than so many files and threads, and little memory."""
    before, _, after = [rounds(number) for number in range(3)]
    until = time.monotonic() + 60
    while after.threads > before.threads + most or after.handles > before.handles + most:
        # The threads and sockets of a channel that was closed end when its poller looks.
        if time.monotonic() > until:
            break
        time.sleep(0.1)
        after = in_use()
    assert after.threads <= before.threads + most, (before, after)
    assert after.handles <= before.handles + most, (before, after)
    assert after.memory - before.memory < MEMORY, (before, after)


@pytest.fixture(scope="module")
def photos() -> list[RgbImage]:
    return [make_photo(seed) for seed in range(12)]


def test_mixed_load_leaves_nothing_open_behind(tmp_path: Path, tiny_model: Path, photos: list[RgbImage]) -> None:
    for number in range(INGESTED):
        save_photo(tmp_path / "folder" / f"{number}.png", photos[number])
    with DelfIndex.open(settings=settings_of(str(tmp_path / "photos.db"), str(tiny_model))) as index:
        for number, photo in enumerate(photos):
            index.add(photo, f"pool/{number}", {"year": 2000 + number})
        # Each neighbour costs the embedded database time, and nothing here depends on their number.
        few = index.searching(index.settings.search.model_copy(update={"neighbours": 20}))
        calls = calls_of(few, photos, tmp_path / "folder")
        # Pools, of ten threads at most, grow while calls happen to overlap; a call that left one would add sixty.
        settled(lambda number: turn(calls, 10 * number), 12)


def test_opening_and_closing_again_and_again_leaves_nothing_open(
    tmp_path: Path, tiny_model: Path, photos: list[RgbImage]
) -> None:
    settings = settings_of(str(tmp_path / "photos.db"), str(tiny_model))
    with DelfIndex.open(settings=settings) as index:
        index.add(photos[0], "one")
    settled(lambda _: reopened(settings, photos[0]), 4)


@pytest.mark.server
def test_opening_and_closing_on_a_server_leaves_nothing_open(
    milvus: Server, name: str, tiny_model: Path, photos: list[RgbImage]
) -> None:
    settings = settings_of(milvus.uri, str(tiny_model)).model_copy(update={"collection": name})
    with DelfIndex.open(settings=settings) as index:
        index.add(photos[0], "one")
    settled(lambda _: reopened(settings, photos[0]), 4)


def reopened(settings: Settings, photo: RgbImage) -> Usage:
    """What the process takes after an index was opened and closed five times."""
    for _ in range(5):
        with DelfIndex.open(settings=settings) as index:
            assert index.search(photo, include_unverified=True).hits
    return in_use()


def test_only_what_must_be_flat_is_called_flat() -> None:
    hours, rng = np.linspace(0, 1, 300), np.random.default_rng(0)
    noise = rng.normal(0, 1, 300)
    assert trend(hours, 100 + noise).verdict == "flat"
    assert trend(hours, 100 + 30 * hours + noise).verdict == "grows"
    assert trend(hours, 100 - 30 * hours + noise).verdict == "shrinks"
    # So noisy, and its neighbours so alike, that a rise of a tenth could hide in it.
    wandering = np.cumsum(rng.normal(0, 4, 300))
    assert trend(hours, 100 + wandering - np.polyval(np.polyfit(hours, wandering, 1), hours)).verdict == "cannot tell"
    rising = trend(hours, 100 + 30 * hours + noise)
    assert rising.low < 30 < rising.high
    assert rising.high - rising.low < 2
