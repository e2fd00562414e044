"""What unrelated photos reach in the user's own collection: the bar of an answer, set on data like the user's.

The weights of the evidence stay; what is measured is how strong the best wrong answer of a query is, for queries whose
answers must all be wrong. They are either photos of things that the collection does not show, or stored images
themselves, where images of another folder never show the same thing: then those of the own folder do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from delf_milvus.errors import InputError, UsageError, one_line
from delf_milvus.evaluation.calibration import pair_evidence
from delf_milvus.features import Features
from delf_milvus.index import DelfIndex
from delf_milvus.ingestion.scan import scan
from delf_milvus.retrieval.confidence import Calibration

Floats = npt.NDArray[np.float64]
Count = Callable[[int, int], None]

LEAST = 125
"""Queries below which nothing can be said about one false alarm in a hundred."""

FOLDS = 5
"""Parts of the queries, each of which judges a calibration that was fitted to the others."""


@dataclass(frozen=True)
class RecalibrationConfig:
    """Which queries cannot have a right answer.

    no_match: a folder of photos that show nothing of what is stored; or None, then stored images ask. apart: what two
    images that cannot match differ in: the first folder of their id, or all of it but the file's name. limit: queries
    at most. pairs: stored images that each query is compared with on its own. seed: of what is drawn.
    """

    no_match: Path | None = None
    apart: Literal["folder", "parent"] = "folder"
    limit: int = 1000
    pairs: int = 3
    seed: int = 0


@dataclass(frozen=True)
class RecalibrationReport:
    """What was measured.

    queries, pairs: how many. bar: verify.max_false_alarm. before: share of the queries that the calibration used so far
    lets through. after: the same of the new one, each query judged by a calibration that it did not take part in.
    failed: photos that could not be read.
    """

    queries: int
    pairs: int
    bar: float
    before: float
    after: float
    failed: int

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return asdict(self)


def recalibrate(
    index: DelfIndex, config: RecalibrationConfig, progress: Count | None = None
) -> tuple[Calibration, RecalibrationReport]:
    """Measure the collection; writes nothing.

    progress: called with queries done and queries in all. Raises InputError for too few queries, UsageError where all
    stored images lie in one folder, CollectionError, DatabaseError.
    """
    random = np.random.default_rng(config.seed)
    stored = list(index.store.sample(max(config.limit, 100), config.seed).values())
    if not stored:
        raise InputError("The collection is empty; run `delf-milvus ingest FOLDER` first.")
    queries, failed = _queries(index, config, [(record.image_id, features) for record, features in stored])
    searches: list[Floats] = []
    pairs: list[Floats] = []
    for done, (group, features) in enumerate(queries, 1):
        judged = index.judge(features)
        names = [candidate.image_id for candidate in judged.candidates]
        wrong = np.array([group is None or _group(name, config.apart) != group for name in names], np.bool_)
        searches.append(judged.evidence[wrong])
        drawn = [stored[i] for i in random.integers(0, len(stored), config.pairs)]
        others = [f for record, f in drawn if group is None or _group(record.image_id, config.apart) != group]
        pairs.append(pair_evidence(features, others, index.settings))
        if progress is not None:
            progress(done, len(queries))
    found = index.calibration
    try:
        new = found.refitted(searches, np.concatenate(pairs))
        after = sum(_let_through(index, *part) for part in _parts(found, searches, np.concatenate(pairs)))
    except ValueError as error:
        raise InputError(f"The collection is too small: {error}.") from error
    report = RecalibrationReport(
        len(searches),
        sum(map(len, pairs)),
        index.settings.verify.max_false_alarm,
        _let_through(index, found, searches) / len(searches),
        after / len(searches),
        failed,
    )
    return new, report


def _queries(
    index: DelfIndex, config: RecalibrationConfig, stored: list[tuple[str, Features]]
) -> tuple[list[tuple[str | None, Features]], int]:
    """What asks: its group, None where no stored image can be right, and its features; and how many failed."""
    queries: list[tuple[str | None, Features]] = []
    failed = 0
    if config.no_match is not None:
        if not config.no_match.is_dir():
            raise InputError(f"{one_line(config.no_match)} is not a folder; check the path.")
        index.require_model()
        photos = scan([config.no_match]).photos
        # Told before they are extracted rather than after.
        if min(config.limit, len(photos)) < LEAST:
            raise InputError(
                f"{one_line(config.no_match)} has {len(photos)} photos, of which {config.limit} at most ask; a "
                f"calibration needs {LEAST} queries at least."
            )
        for number in np.linspace(0, len(photos) - 1, min(config.limit, len(photos))).round().astype(int).tolist():
            path = photos[number].path
            try:
                queries.append((None, index.query(path).features))
            except InputError:
                failed += 1
        lack = f"{one_line(config.no_match)} has {len(queries)} photos that can be read"
    else:
        count = index.settings.extract.plan.query_features
        queries = [(_group(name, config.apart), features.top(count)) for name, features in stored[: config.limit]]
        groups = {group for group, _ in queries}
        if len(groups) < 2:
            raise UsageError(
                "All stored images lie in one folder, so nothing says which of them cannot match; give a folder of "
                "photos that show nothing of what is stored."
            )
        lack = f"The collection has {len(queries)} images"
    queries = [(group, features) for group, features in queries if len(features)]
    if len(queries) < LEAST:
        raise InputError(f"{lack}; a calibration needs {LEAST} queries at least.")
    return queries, failed


def _group(image_id: str, apart: Literal["folder", "parent"]) -> str:
    head, _, tail = image_id.partition("/") if apart == "folder" else image_id.rpartition("/")
    return head if tail else ""


def _parts(found: Calibration, searches: list[Floats], pairs: Floats) -> Iterator[tuple[Calibration, list[Floats]]]:
    """For each fold a calibration without it, and its searches."""
    for fold in range(FOLDS):
        others = [one for number, one in enumerate(searches) if number % FOLDS != fold]
        yield found.refitted(others, pairs), searches[fold::FOLDS]


def _let_through(index: DelfIndex, calibration: Calibration, searches: list[Floats]) -> int:
    """Searches with an answer that passes the bar."""
    bar = index.settings.verify.max_false_alarm
    return sum(bool((calibration.assess(one).false_alarm <= bar).any()) for one in searches if len(one))
