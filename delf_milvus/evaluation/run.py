"""Running a data set against a collection: store its photos, search with its queries, judge what comes back.

What a query found is kept in the journal of the output folder as soon as it is known, so a run that was interrupted,
killed or limited to few queries is gone on with. A result counts for the model, the settings, the index and the
content of the collection that it was found with, and for no others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from delf_milvus.errors import InputError, UsageError, one_line
from delf_milvus.evaluation.dataset import Answer, DataSet, Found, Query, Value, chosen
from delf_milvus.evaluation.journal import Journal, digest_of, size_of
from delf_milvus.evaluation.page import EvaluationPage
from delf_milvus.evaluation.pictures import (
    INLIERS,
    PRECISION_RECALL,
    RELIABILITY,
    inliers_picture,
    precision_recall_picture,
    reliability_picture,
)
from delf_milvus.evaluation.report import REPORT, EvaluationReport, Facts, made_report
from delf_milvus.index import DelfIndex
from delf_milvus.ingestion.pipeline import Progress
from delf_milvus.ingestion.scan import Failure
from delf_milvus.matcher import PhotoMatcher
from delf_milvus.retrieval.answers import SearchResult
from delf_milvus.settings import Settings

Say = Callable[[str], None]

Count = Callable[[int, int, int], None]
"""Called with what is done, what there is to do, and what failed so far."""

RANKED = 1000
"""Answers that are judged: the most that a search gives. Those beyond its candidates are ranked by votes."""

JOURNAL = "queries.jsonl"
LISTING = "photos.jsonl"


@dataclass(frozen=True)
class RunConfig:
    """How to run.

    out: folder of the results. ingest: store the photos first; else the collection has them. limit: queries at most,
    of those with a match and of those without, evenly spread. page: an HTML file that tells the same with pictures.
    """

    out: Path
    ingest: bool = True
    limit: int | None = None
    page: Path | None = None


@dataclass(frozen=True)
class _Collection:
    """What is searched, by name. uris: where the photos are. digest: of its content."""

    names: Mapping[str, int]  # how many images have it
    uris: Mapping[str, str]
    digest: str
    described: dict[str, Any]


def run(
    index: DelfIndex,
    data: DataSet,
    config: RunConfig,
    say: Say = print,
    *,
    ingesting: Callable[[Progress], None] | None = None,
    searching: Count | None = None,
) -> EvaluationReport:
    """Judge the collection by the data set; writes report.json and the pictures into `config.out`.

    ingesting, searching: told how far it is. A query that cannot be read is listed in the report and stops nothing.

    Raises InputError where the collection has none of the images, or no query can be judged; KeyboardInterrupt as it
    comes, with what was answered kept; CollectionError, DatabaseError.
    """
    failures = list(data.failures)
    if config.ingest:
        failures += _ingest(index, data, config.out, say, ingesting)
    collection = _collection(index, data)
    notes = [*data.notes, *_coverage(data, collection)]
    queries = chosen(data.queries, config.limit)
    if len(queries) < len(data.queries):
        notes.append(f"{len(queries)} of {len(data.queries)} queries were judged, evenly spread.")
    settings = relevant_settings(index.settings)
    fingerprint = fingerprint_values(index.settings)
    key = {
        "software": installed_version("delf-milvus"),
        "fingerprint": fingerprint,
        "calibration": digest_of(asdict(index.calibration)),
        "settings": settings,
        "collection": [index.settings.collection, collection.digest, collection.described["search"]],
    }
    answered: list[tuple[Query, Answer]] = []
    with Journal(config.out / JOURNAL) as journal:
        for done, query in enumerate(queries, 1):
            try:
                answered.append((query, _answer(index, data, query, key, journal)))
            # A box beside the photo is of the ground truth, not of the command.
            except (InputError, UsageError) as error:
                failures.append(Failure(str(query.path), str(error)))
            if searching is not None:
                searching(done, len(queries), len(failures))
    values: dict[str, Mapping[str, Value]] = {query.name: data.judge(query, answer) for query, answer in answered}
    report = made_report(
        data.kind,
        Facts(
            name=data.name,
            digest=data.digest(),
            images=digest_of(sorted(collection.names)),
            queries=len(data.queries),
            no_match=sum(not query.truth.relevant for query in data.queries),
            judged=len(answered),
        ),
        fingerprint,
        collection.described,
        settings,
        data.about,
        values,
        failures,
        notes,
    )
    report.write(config.out / REPORT)
    pictures = (
        (precision_recall_picture, PRECISION_RECALL),
        (inliers_picture, INLIERS),
        (reliability_picture, RELIABILITY),
    )
    for draw, name in pictures:
        if not draw(answered, config.out / name):
            (config.out / name).unlink(missing_ok=True)
    if config.page is not None:
        page = EvaluationPage(report, index.settings.decode)
        page.add_queries(answered, collection.uris)
        page.write(config.page, config.out)
    return report


def relevant_settings(settings: Settings) -> dict[str, Any]:
    """The settings that a result depends on, by stage; the number of answers shown is none of them."""
    return {
        "extract": settings.extract.model_dump(mode="json"),
        "search": settings.search.model_dump(mode="json", exclude={"top"}),
        "verify": settings.verify.model_dump(mode="json"),
    }


def fingerprint_values(settings: Settings) -> dict[str, Any]:
    """The model's fingerprint, in short and in full. Raises ModelError."""
    fingerprint = PhotoMatcher(settings).fingerprint
    return {"short": fingerprint.short, **json.loads(fingerprint.to_json())}


def _ingest(
    index: DelfIndex, data: DataSet, out: Path, say: Say, progress: Callable[[Progress], None] | None
) -> list[Failure]:
    if not data.photos:
        return []
    listing = out / LISTING
    lines = (json.dumps({"path": str(photo.path), "id": photo.image_id}) + "\n" for photo in data.photos)
    try:
        out.mkdir(parents=True, exist_ok=True)
        listing.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{one_line(listing)} cannot be written: {error.strerror or 'input/output error'}.") from error
    report = index.ingest(data.roots, ids_from=listing, progress=progress)
    if report.interrupted:
        raise KeyboardInterrupt
    say(
        f"{report.added} photos added, {report.updated} updated, {report.unchanged} unchanged, {report.failed} failed; "
        f"{report.seconds:.1f} s"
    )
    return report.failures


def _collection(index: DelfIndex, data: DataSet) -> _Collection:
    records = index.list()
    names = Counter(data.name_of(record.image_id) for record in records)
    common = data.expected & names.keys()
    if not common:
        raise InputError(
            f"The collection has none of the {len(data.expected)} images of this data set; ids are paths below the "
            "folder that was ingested, so ingest that very folder, or leave --no-ingest out."
        )
    twice = [name for name in common if names[name] > 1]
    if twice:
        raise InputError(f"The collection has {names[min(twice)]} images that could be {one_line(min(twice))}.")
    status = index.index_status()
    return _Collection(
        names,
        {data.name_of(record.image_id): record.uri for record in records},
        digest_of([[record.image_id, record.sha256, record.feature_count] for record in records]),
        {
            "name": index.settings.collection,
            "backend": index.status()["backend"],
            "images": len(records),
            "features": sum(record.feature_count for record in records),
            "search": {"index": status["index"], "params": status["params"], "search": status["search"]},
        },
    )


def _coverage(data: DataSet, collection: _Collection) -> list[str]:
    """What the collection lacks, and what it has beside the data set."""
    notes = []
    missing = len(data.expected - collection.names.keys())
    if missing:
        notes.append(f"{missing} of {len(data.expected)} images are not in the collection, and count as never found.")
    others = len(collection.names.keys() - data.expected - data.withheld)
    if others:
        notes.append(f"{others} further images of the collection match nothing, and only distract.")
    short = sum(len(query.truth.relevant) > RANKED for query in data.queries)
    if short:
        notes.append(
            f"{short} queries have more right images than a search has answers, {RANKED}: they cannot all be found."
        )
    return notes


def _answer(index: DelfIndex, data: DataSet, query: Query, key: Mapping[str, Any], journal: Journal) -> Answer:
    """What a query finds, out of the journal where it has it."""
    digest = digest_of([key, query.name, query.box, size_of(query.path)])
    kept = journal.get(digest)
    if kept is None:
        result = index.search(query.path, top_k=RANKED, box=query.box, include_unverified=True)
        kept = _line(query.name, result)
        journal.add(digest, kept)
    try:
        found = (
            Found(data.name_of(image_id), bool(verified), int(inliers), float(confidence))
            for image_id, verified, inliers, confidence in kept["hits"]
        )
        counted = tuple(one for one in found if one.name not in data.withheld)
        return Answer(counted, float(kept["seconds"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{one_line(query.name)} has a damaged result; remove {JOURNAL}.") from error


def _line(name: str, result: SearchResult) -> dict[str, Any]:
    return {
        "query": name,
        "seconds": round(result.timings.total, 6),
        "hits": [[hit.image_id, hit.verified, hit.inliers, hit.confidence] for hit in result.hits],
    }
