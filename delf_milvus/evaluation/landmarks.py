"""The Google Landmarks challenges: recognition, with queries that show no landmark, and retrieval.

Files are CSV as published: the retrieval solution has `id` and `images` (ids with spaces between), the recognition
solution `id` and `landmarks`, both perhaps `Usage`; labels have `id` and `landmark_id`, or `landmark_id` and `images`.
Queries whose usage is Ignored are left out.

Source: Weyand et al., "Google Landmarks Dataset v2", CVPR 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from delf_milvus.errors import InputError, UsageError, one_line
from delf_milvus.evaluation.dataset import (
    ACCEPTED,
    FALSE_ALARMS,
    SECONDS,
    About,
    Answer,
    DataSet,
    Query,
    Truth,
    Value,
    bad_line,
    by_stem,
    table,
)
from delf_milvus.evaluation.metrics import average_precision_at
from delf_milvus.ingestion.scan import Photo

K = 100


@dataclass(frozen=True)
class LandmarksConfig:
    """queries: folder of the query photos. images: folder of the photos that are searched; none where a collection has
    them already. retrieval, recognition: solutions, at least one. labels: landmarks of the images, for recognition.
    usage: only queries of it, "public" or "private"; all but the ignored for none.
    """

    queries: Path
    images: Path | None = None
    retrieval: Path | None = None
    recognition: Path | None = None
    labels: Path | None = None
    usage: str | None = None


def landmarks_set(config: LandmarksConfig) -> DataSet:
    """Read the solutions and look for the photos.

    Raises UsageError without a solution, or for recognition without labels; InputError for a file that is not as
    published, and where no query has a photo.
    """
    if config.retrieval is None and config.recognition is None:
        raise UsageError("Give a solution: --retrieval, or --recognition with --labels.")
    if config.recognition is not None and config.labels is None:
        raise UsageError("--recognition needs --labels, a CSV of id and landmark_id: which landmark an image shows.")
    right = {} if config.retrieval is None else _solution(config.retrieval, "images", config.usage)
    shown = {} if config.recognition is None else _solution(config.recognition, "landmarks", config.usage)
    labels = {} if config.labels is None or config.recognition is None else read_labels(config.labels)
    members: dict[str, set[str]] = {}
    for image, landmark in labels.items():
        members.setdefault(landmark, set()).add(image)
    photos, failures = by_stem(config.queries)
    names = sorted(right.keys() | shown.keys())
    queries = []
    for name in (one for one in names if one in photos):
        relevant = right.get(name)
        if relevant is None:
            relevant = frozenset().union(*(members.get(landmark, set()) for landmark in shown[name]))
        levels = {"retrieval": Truth(right[name])} if name in right else {}
        queries.append(Query(name, photos[name].path, Truth(relevant), levels=levels, labels=shown.get(name)))
    if not queries:
        raise InputError(f"{one_line(config.queries)} has a photo of none of the {len(names)} queries: id.jpg each.")
    lost = len(names) - len(queries)
    stored: dict[str, Photo] = {}
    if config.images is not None:
        stored, more = by_stem(config.images)
        failures = [*failures, *more]

    def judge(query: Query, answer: Answer) -> Mapping[str, Value]:
        return _judge(query, answer, labels)

    return DataSet(
        kind="landmarks",
        name=(config.recognition or config.retrieval or config.queries).stem,
        queries=queries,
        photos=list(stored.values()),
        roots=[] if config.images is None else [config.images],
        expected=frozenset(labels) | frozenset().union(*right.values()),
        judge=judge,
        about=_about(config),
        by_stem=True,
        failures=failures,
        notes=[f"{lost} of {len(names)} queries have no photo here, and are left out."] if lost else [],
    )


def read_labels(path: Path) -> dict[str, str]:
    """The landmark of each image, by the image's id. Raises InputError."""
    labels: dict[str, str] = {}
    for line, row in table(path, ["landmark_id"]):
        if "id" not in row and "images" not in row:
            bad_line(path, 1, "beside landmark_id it must have the column id, or images")
        for image in [row["id"]] if "id" in row else row["images"].split():
            if labels.setdefault(image, row["landmark_id"]) != row["landmark_id"]:
                bad_line(path, line, f"the image {one_line(image)} has another landmark in an earlier line")
    return labels


def _solution(path: Path, column: str, usage: str | None) -> dict[str, frozenset[str]]:
    """Images, or landmarks, of each query that counts, by its id."""
    solution: dict[str, frozenset[str]] = {}
    for line, row in table(path, ["id", column]):
        if row["id"] in solution:
            bad_line(path, line, f"the query {one_line(row['id'])} comes twice")
        whose = (row.get("Usage") or "").lower()
        if whose == "ignored" or (usage is not None and whose != usage):
            continue
        solution[row["id"]] = frozenset(row[column].split()) - {"None"}
    if not solution:
        raise InputError(f"{one_line(path)} has no query{'' if usage is None else f' of the usage {usage}'}.")
    return solution


def _judge(query: Query, answer: Answer, labels: Mapping[str, str]) -> Mapping[str, Value]:
    values: dict[str, Value] = {"seconds": answer.seconds}
    verified = {one.name for one in answer.found if one.verified}
    if "retrieval" in query.levels and query.levels["retrieval"].relevant:
        ranking = [one.name for one in answer.found]
        values[f"mAP@{K}"] = average_precision_at(ranking, query.levels["retrieval"].relevant, K)
    if query.labels is not None:
        first = next((one for one in answer.found if one.name in labels), None)
        answerable = float(bool(query.labels))
        if first is None:
            values["GAP"] = (-1.0, 0.0, 0.0, answerable)
        else:
            right = labels[first.name] in query.labels
            values["GAP"] = (first.confidence, float(first.inliers), float(right), answerable)
            if query.labels:
                values["recognised"] = float(right and first.verified)
        if query.labels and first is None:
            values["recognised"] = 0.0
    if query.truth.relevant:
        values["accepted"] = float(bool(verified & query.truth.relevant))
    elif not query.labels:
        values["false alarms"] = float(bool(verified))
    return values


def _about(config: LandmarksConfig) -> dict[str, About]:
    about = {}
    if config.retrieval is not None:
        about[f"mAP@{K}"] = About(f"precision at each right image of the first {K}")
    if config.recognition is not None:
        about["GAP"] = About("precision at each right landmark, surest first", "gap")
        about["recognised"] = About("the first answer shows the landmark, and is accepted at the bar")
    return about | {"accepted": ACCEPTED, "false alarms": FALSE_ALARMS, "seconds": SECONDS}
