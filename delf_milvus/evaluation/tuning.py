"""What each index loses against exact search, measured on a sample of the user's own collection.

Stored images are drawn at random; some of them query, and the others are copied into a collection of their own in the
same database. Exact neighbours are the truth. For every index and search parameter: recall of the neighbours; what the
package's own vote and verification make of them, compared with what they make of the exact ones; time; memory.

The indexes are built with the lists that the whole collection would get, so that `nprobe` means the same there: in the
whole collection the neighbours of a descriptor lie nearer to it than in a sample, in fewer lists, so the recall of the
sample is a lower bound. Times are those of the sample, and say which index is faster, not how fast it will be.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from delf_milvus.errors import InputError
from delf_milvus.evaluation.metrics import average_precision
from delf_milvus.features import Features, Float32Array
from delf_milvus.imaging.chart import Mark, scatter_picture
from delf_milvus.imaging.draw import save_picture
from delf_milvus.index import DelfIndex, candidates_of
from delf_milvus.retrieval.search import Candidate, Timings, judge_candidates
from delf_milvus.retrieval.shortlist import NOBODY
from delf_milvus.settings import Profile, Settings
from delf_milvus.store.keys import feature_keys
from delf_milvus.store.profiles import (
    INDEX_FROM,
    IndexProfile,
    Wishes,
    available,
    choose,
    lists_for,
    memory_bytes,
    search_params,
)
from delf_milvus.store.scratch import Scratch

Say = Callable[[str], None]
Int64Array = npt.NDArray[np.int64]

PREFERENCES = ("balance", "latency", "memory")

_LEAST_IMAGES = 8
_POINTS_A_LIST = 39
_NPROBES = (8, 16, 32, 64, 128)
_EFS = (128, 256, 512)


@dataclass(frozen=True)
class TuningConfig:
    """How to tune.

    profiles: to measure, all that the server can build where empty. images: in the sample. queries: of them, that
    search and are left out of what is searched; a quarter at most. loss: of mean average precision, that is accepted.
    prefer: one of PREFERENCES. seed: of the sample.
    """

    profiles: tuple[Profile, ...] = ()
    images: int = 1000
    queries: int = 50
    loss: float = 0.01
    prefer: str = "balance"
    seed: int = 0


@dataclass(frozen=True)
class TuningPoint:
    """One index with one set of search parameters.

    params, search: what it was built and searched with. recall: share of the exact K neighbours found.
    average_precision: mean, of the images that exact search verifies, over the queries that have any; None where none
    has. same_first: share of queries with the same first candidate. overlap: share of the exact first ten candidates
    that are among the first ten. median_seconds, p95_seconds: one search for all descriptors of an image.
    build_seconds: with loading. bytes_a_row: memory, estimated for the whole collection. settings: to paste, names as
    in `StoreSettings`. on_front: nothing measured is better in recall, median time and memory at once.
    """

    profile: Profile
    index: str
    params: Mapping[str, int]
    search: Mapping[str, float]
    recall: float
    average_precision: float | None
    same_first: float
    overlap: float
    median_seconds: float
    p95_seconds: float
    build_seconds: float
    bytes_a_row: float
    settings: Mapping[str, Any]
    on_front: bool = False

    @property
    def quality(self) -> float:
        """What is held against the accepted loss: 1 for the exact ranking."""
        return self.overlap if self.average_precision is None else self.average_precision


@dataclass(frozen=True)
class TuningReport:
    """The points in the order measured, the recommended one, and what to know of the sample."""

    neighbours: int
    sample_images: int
    sample_rows: int
    total_rows: int
    queries: int
    points: list[TuningPoint]
    recommended: TuningPoint
    notes: list[str] = field(default_factory=list)

    @property
    def recommended_toml(self) -> str:
        """One line of `delf_milvus.toml`."""
        values = ", ".join(f"{name} = {_toml(value)}" for name, value in self.recommended.settings.items())
        return f"store = {{ {values} }}"

    @property
    def recommended_environment(self) -> str:
        """The same as environment variables."""
        values = self.recommended.settings.items()
        return " ".join(f"DELF_MILVUS_STORE__{name.upper()}={value}" for name, value in values)

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return {
            **asdict(self),
            "recommended_toml": self.recommended_toml,
            "recommended_environment": self.recommended_environment,
        }


@dataclass(frozen=True, eq=False)
class _Sample:
    """Images that are searched, by key, with all their rows; and the images that query."""

    images: dict[int, Candidate]
    keys: Int64Array
    descriptors: Float32Array
    queries: list[Features]


@dataclass(frozen=True, eq=False)
class _Exact:
    """What exact search answers to one query: neighbours (Q, K), candidates in order, the verified ones."""

    keys: Int64Array
    ranking: list[str]
    verified: set[str]


class _Source:
    """A `CandidateSource` with the neighbours of one query, found before."""

    def __init__(self, sample: _Sample, keys: Int64Array, similarities: Float32Array) -> None:
        self._sample = sample
        self._found = keys, similarities

    def neighbours(self, descriptors: Float32Array, k: int) -> tuple[Int64Array, Float32Array]:
        return self._found

    def similar(self, descriptor: Float32Array, k: int) -> tuple[Int64Array, Float32Array]:
        """None: what is tuned is the index of the local descriptors."""
        return NOBODY

    def candidates(self, image_keys: Int64Array) -> dict[int, Candidate]:
        return {key: self._sample.images[key] for key in image_keys.tolist() if key in self._sample.images}


def tune(index: DelfIndex, config: TuningConfig, say: Say = print) -> TuningReport:
    """Measure, and recommend the best by `config.prefer` among what loses no more than `config.loss`.

    Raises UsageError, before anything is copied, for a profile that this server cannot build; InputError for a
    collection with too few images; CollectionError without one; DatabaseError.
    """
    settings, store = index.settings, index.store
    scratch = store.scratch()
    total = store.count_features()
    own = settings.store
    wishes = Wishes(own.nlist, own.m, own.nbits)
    dim = scratch.dim
    chosen = [
        (profile, choose(profile, scratch.engine, dim, total, INDEX_FROM, wishes))
        for profile in config.profiles or available(scratch.engine, dim)
    ]
    sample = _drawn(index, config)
    say(f"{len(sample.images)} images with {len(sample.keys)} descriptors, {len(sample.queries)} queries")
    exact = _exact(index, sample)
    points: list[TuningPoint] = []
    with scratch:
        scratch.insert(sample.keys, sample.descriptors)
        for profile, whole in chosen:
            built = _for_sample(whole, len(sample.keys))
            started = time.perf_counter()
            scratch.build(built)
            seconds = time.perf_counter() - started
            for values in _sweep(built, settings):
                points.append(
                    _measured(scratch, sample, exact, settings, (profile, whole, built), values, total, seconds)
                )
                last = points[-1]
                say(f"{profile} {_shown(last.search)}: recall {last.recall:.3f}, {1e3 * last.median_seconds:.1f} ms")
    points = _with_front(points)
    notes = []
    if len(sample.keys) < 0.9 * total:
        notes.append(
            f"The sample has {len(sample.keys)} of {total} descriptors: recall is at least this in the whole, "
            "times are those of the sample."
        )
    if all(point.average_precision is None for point in points):
        notes.append(
            "Exact search verifies no image of the sample for any query: the first ten candidates count instead."
        )
    return TuningReport(
        neighbours=settings.search.neighbours,
        sample_images=len(sample.images),
        sample_rows=len(sample.keys),
        total_rows=total,
        queries=len(sample.queries),
        points=points,
        recommended=_recommended(points, config, total),
        notes=notes,
    )


def tuning_picture(report: TuningReport, path: Path) -> None:
    """Write recall over time, one colour an index; filled where on the front. Errors as of `save_picture`."""
    marks = [
        Mark(1e3 * point.median_seconds, point.recall, point.profile, _shown(point.search), point.on_front)
        for point in report.points
    ]
    chosen = report.recommended
    caption = (
        f"filled: nothing is better in recall, time and memory; recommended: {chosen.profile} {_shown(chosen.search)}"
    )
    save_picture(path, scatter_picture(marks, "ms an image, median", f"recall@{report.neighbours}", caption))


def _drawn(index: DelfIndex, config: TuningConfig) -> _Sample:
    drawn = {key: item for key, item in index.store.sample(config.images, config.seed).items() if len(item[1])}
    if len(drawn) < _LEAST_IMAGES:
        raise InputError(
            f"The collection has {len(drawn)} images with features; tuning needs at least {_LEAST_IMAGES}: ingest more."
        )
    keys = list(drawn)
    asking = keys[: max(1, min(config.queries, len(keys) // 4))]
    count = index.settings.extract.plan.query_features
    images = {key: drawn[key] for key in keys[len(asking) :]}
    return _Sample(
        candidates_of(images),
        np.concatenate([feature_keys(key, record.feature_count) for key, (record, _) in images.items()]),
        np.concatenate([features.descriptors[: record.feature_count] for record, features in images.values()]),
        [drawn[key][1].top(count) for key in asking],
    )


def _exact(index: DelfIndex, sample: _Sample) -> list[_Exact]:
    # faiss comes with the embedded database.
    import faiss

    settings = index.settings
    k = min(settings.search.neighbours, len(sample.keys))
    exact = []
    for query in sample.queries:
        similarities, rows = faiss.knn(query.descriptors, sample.descriptors, k, metric=faiss.METRIC_INNER_PRODUCT)
        keys = sample.keys[rows]
        judged = judge_candidates(
            query, _Source(sample, keys, similarities), settings.search, settings.verify, Timings()
        )
        sure = index.calibration.assess(judged.evidence).false_alarm <= settings.verify.max_false_alarm
        ranking = [candidate.image_id for candidate in judged.candidates]
        exact.append(_Exact(keys, ranking, {name for name, one in zip(ranking, sure.tolist(), strict=True) if one}))
    return exact


def _measured(
    scratch: Scratch,
    sample: _Sample,
    exact: list[_Exact],
    settings: Settings,
    profiles: tuple[Profile, IndexProfile, IndexProfile],
    values: Mapping[str, int],
    total: int,
    build_seconds: float,
) -> TuningPoint:
    asked, whole, built = profiles
    k = exact[0].keys.shape[1]
    own = settings.store
    params = search_params(
        built.index_type,
        built.index_params,
        k,
        nprobe=values.get("nprobe", own.nprobe),
        ef=values.get("ef", own.ef),
        refine=own.refine,
    )
    scratch.neighbours(sample.queries[0].descriptors, k, params)  # the first search after loading is slower
    seconds, recalls, firsts, overlaps, precisions = [], [], [], [], []
    for query, truth in zip(sample.queries, exact, strict=True):
        started = time.perf_counter()
        keys, similarities = scratch.neighbours(query.descriptors, k, params)
        seconds.append(time.perf_counter() - started)
        recalls.append(_recall(keys, truth.keys))
        judged = judge_candidates(
            query, _Source(sample, keys, similarities), settings.search, settings.verify, Timings()
        )
        ranking = [candidate.image_id for candidate in judged.candidates]
        firsts.append(ranking[:1] == truth.ranking[:1])
        first_ten = set(truth.ranking[:10])
        overlaps.append(len(first_ten & set(ranking[:10])) / len(first_ten) if first_ten else 1.0)
        if truth.verified:
            precisions.append(_precision(ranking, truth))
    lists = whole.index_params.get("nlist", 0) / max(built.index_params.get("nlist", 0), 1)
    wanted = {"nprobe": math.ceil(values["nprobe"] * max(lists, 1))} if "nprobe" in values else dict(values)
    code = {name: getattr(own, name) for name in ("nlist", "m", "nbits") if getattr(own, name) is not None}
    return TuningPoint(
        profile=asked,
        index=built.index_type,
        params=built.index_params,
        search=params,
        recall=float(np.mean(recalls)),
        average_precision=float(np.mean(precisions)) if precisions else None,
        same_first=float(np.mean(firsts)),
        overlap=float(np.mean(overlaps)),
        median_seconds=float(np.median(seconds)),
        p95_seconds=float(np.percentile(seconds, 95)),
        build_seconds=build_seconds,
        bytes_a_row=memory_bytes(whole.index_type, whole.index_params, scratch.dim, total) / max(total, 1),
        settings={"profile": asked, **code, **wanted},
    )


def _recall(found: Int64Array, truth: Int64Array) -> float:
    return float(np.mean([np.isin(row, hits).mean() for row, hits in zip(truth, found, strict=True)]))


def _precision(ranking: list[str], truth: _Exact) -> float:
    """Average precision of the verified images, relative to what the exact ranking itself reaches."""
    best = average_precision(truth.ranking, truth.verified)
    return average_precision(ranking, truth.verified) / best


def _for_sample(whole: IndexProfile, rows: int) -> IndexProfile:
    """The index for the sample: with fewer lists where it has too few rows to fill them."""
    lists = whole.index_params.get("nlist", 0)
    if lists * _POINTS_A_LIST <= rows:
        return whole
    return replace(whole, index_params={**whole.index_params, "nlist": min(lists, lists_for(rows))})


def _sweep(built: IndexProfile, settings: Settings) -> list[dict[str, int]]:
    kind = built.index_type
    lists = built.index_params.get("nlist", 0)
    if lists:
        steps = sorted({min(step, lists) for step in (*_NPROBES, settings.store.nprobe)})
        return [{"nprobe": step} for step in steps]
    if kind in ("HNSW", "DISKANN"):
        least = settings.search.neighbours
        return [{"ef": step} for step in sorted({max(step, least) for step in _EFS})]
    return [{}]


def _with_front(points: list[TuningPoint]) -> list[TuningPoint]:
    costs = np.array([(-point.recall, point.median_seconds, point.bytes_a_row) for point in points])
    beaten = [bool(((costs <= own).all(axis=1) & (costs < own).any(axis=1)).any()) for own in costs]
    return [replace(point, on_front=not one) for point, one in zip(points, beaten, strict=True)]


def _recommended(points: list[TuningPoint], config: TuningConfig, total: int) -> TuningPoint:
    # Comparing everything may be fastest on the sample, but its time grows with the rows.
    scaling = [point for point in points if point.index != "FLAT" or total < INDEX_FROM] or points
    good = [point for point in scaling if point.quality >= 1 - config.loss]
    if not good:
        return max(scaling, key=lambda point: (point.quality, point.recall))
    cost: dict[str, Callable[[TuningPoint], float]] = {
        "latency": lambda point: point.median_seconds,
        "memory": lambda point: point.bytes_a_row,
        "balance": lambda point: point.median_seconds * point.bytes_a_row,
    }
    return min(good, key=lambda point: (cost[config.prefer](point), point.median_seconds))


def _shown(params: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:g}" for name, value in params.items())


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
