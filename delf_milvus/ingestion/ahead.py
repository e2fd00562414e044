"""Reading ahead of the network, and as many photos at once as the network's device takes with profit."""

from __future__ import annotations

import logging
import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Generic, TypeVar

import cv2

from delf_milvus.errors import InputError, one_line
from delf_milvus.features import Features
from delf_milvus.imaging.decode import RgbImage
from delf_milvus.settings import IngestSettings

if TYPE_CHECKING:
    from delf_milvus.model.extractor import Extractor

log = logging.getLogger(__name__)

P = TypeVar("P")
T = TypeVar("T")

BESIDE_CPU = 2
MOST_THREADS = 16
"""Threads that read and decode where nothing else is asked for: beside a network on the CPU, and for one on a GPU."""


class Ahead(Generic[P, T]):
    """Prepares things in threads, ahead of who takes them; iterating gives (thing, its preparation) in order.

    At most `queue` of them wait, more once `widen` was told that many are taken at a time: memory does not grow with
    their number. A context manager: what was not begun when it ends never is.
    """

    def __init__(self, prepare: Callable[[P], T], things: Iterable[P], settings: IngestSettings) -> None:
        self._prepare, self._things, self._settings = prepare, things, settings
        self._threads = settings.decode_threads or BESIDE_CPU
        self._gate = threading.Semaphore(self._threads)
        self._window = settings.queue
        self._pool = ThreadPoolExecutor(settings.decode_threads or MOST_THREADS, "decode")

    def __enter__(self) -> Ahead[P, T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[P, Future[T]]]:
        waiting: deque[tuple[P, Future[T]]] = deque()
        things = iter(self._things)
        while True:
            waiting.extend((thing, self._pool.submit(self._gated, thing)) for thing in self._next(things, len(waiting)))
            if not waiting:
                return
            yield waiting.popleft()

    def widen(self, at_once: int) -> None:
        """Have the next `at_once` things ready while as many are worked on; 1 changes nothing."""
        if at_once > 1:
            self._window = max(self._window, self._settings.queue + at_once)
            wanted = min(MOST_THREADS, os.cpu_count() or 1)
            if self._settings.decode_threads is None and wanted > self._threads:
                self._gate.release(wanted - self._threads)
                self._threads = wanted

    def _next(self, things: Iterator[P], waiting: int) -> list[P]:
        return list(islice(things, max(0, self._window - waiting)))

    def _gated(self, thing: P) -> T:
        with self._gate:
            return self._prepare(thing)


def ready(preparation: Future[T]) -> T | InputError:
    """What a preparation made, once it is done, or why it failed; raises what else it raised."""
    try:
        return preparation.result()
    except InputError as error:
        return error


class PhotoExtraction:
    """The features of decoded photos, as many of each as the preset stores.

    load_extractor: called when a photo needs extraction.
    """

    def __init__(self, load_extractor: Callable[[], Extractor]) -> None:
        self._load = load_extractor
        self._loaded: Extractor | None = None

    @property
    def at_once(self) -> int:
        """How many photos to give at a time: 1 until the first one was extracted, and on a CPU."""
        return 1 if self._loaded is None else self._loaded.most_together

    def __call__(self, photos: Sequence[tuple[str, RgbImage]]) -> list[Features | InputError]:
        """The features of photos, each given with its place, or why there are none, in their order."""
        extractor = self._loaded = self._load()
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, (_, pixels) in enumerate(photos):
            by_shape[pixels.shape[0], pixels.shape[1]].append(number)
        found: dict[int, Features | InputError] = {}
        for shape, numbers in by_shape.items():
            step = extractor.together(shape)
            for first in range(0, len(numbers), step):
                group = numbers[first : first + step]
                found |= zip(group, self._extracted(extractor, [photos[number] for number in group]), strict=True)
        return [found[number] for number in range(len(photos))]

    def _extracted(
        self, extractor: Extractor, photos: Sequence[tuple[str, RgbImage]]
    ) -> Sequence[Features | InputError]:
        count = extractor.plan.stored_features
        try:
            if len(photos) == 1:
                return [extractor.extract(photos[0][1], count)]
            return extractor.extract_many([pixels for _, pixels in photos], count)
        except (ValueError, RuntimeError, MemoryError, cv2.error) as error:
            # One photo that exhausts memory or breaks a kernel must not end a run over a million others.
            log.info("extraction failed", exc_info=error)
            if len(photos) > 1:
                return [one for photo in photos for one in self._extracted(extractor, [photo])]
            return [not_extracted(photos[0][0], error)]


def not_extracted(place: str, error: Exception) -> InputError:
    """The error of a photo that the network failed at."""
    reason = one_line(str(error).partition("\n")[0] or type(error).__name__)
    return InputError(f"{one_line(place)} cannot be extracted: {reason}.")
