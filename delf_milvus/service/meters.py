"""What Prometheus is told; a registry of its own for each service."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from delf_milvus.service.breaker import Breaker
from delf_milvus.service.queue import FairQueue

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

# What a client calls its method is its own affair: every other name would be a series of its own.
_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH"})


class Meters:
    """Counters and histograms of one service."""

    def __init__(self, queue: FairQueue, breaker: Breaker) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._requests = Counter(
            "delf_milvus_requests", "Requests by route and status.", ("method", "route", "status"), registry=registry
        )
        self._seconds = Histogram(
            "delf_milvus_request_seconds", "From the head to the end of the answer.", ("route",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._stages = Histogram(
            "delf_milvus_stage_seconds", "Steps of a search, and its wait in the queue.", ("stage",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._errors = Counter("delf_milvus_errors", "Answers that are errors.", ("kind",), registry=registry)
        self._rejected = Counter(
            "delf_milvus_rejected", "Requests refused before any work, by reason.", ("reason",), registry=registry
        )
        self._answers = Counter(
            "delf_milvus_searches",
            "Answered searches, by whether anything was proved.",
            ("matched",),
            registry=registry,
        )
        Gauge("delf_milvus_queue_length", "Photos that wait.", registry=registry).set_function(lambda: queue.length)
        Gauge("delf_milvus_queue_running", "Photos in work.", registry=registry).set_function(lambda: queue.running)

        Gauge(
            "delf_milvus_breaker_open",
            "1 while the database is not asked, because it did not answer.",
            registry=registry,
        ).set_function(lambda: breaker.state != "closed")
        Gauge(
            "delf_milvus_breaker_openings", "How often the database stopped being asked.", registry=registry
        ).set_function(lambda: breaker.opened)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def error(self, kind: str, *, rejected: bool) -> None:
        """Count an error; rejected: it cost no work."""
        self._errors.labels(kind).inc()
        if rejected:
            self._rejected.labels(kind).inc()

    def search(self, matched: bool, timings: Mapping[str, float], waited: float) -> None:
        """Count a search and its steps, seconds."""
        self._answers.labels(str(matched).lower()).inc()
        for stage, seconds in {**timings, "queue": waited}.items():
            self._stages.labels(stage).observe(seconds)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)
