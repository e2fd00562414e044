"""Instances by folder or by order: every photo searches for the others of its instance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    distracting,
    folder_name,
)
from delf_milvus.evaluation.metrics import average_precision, ns_score, precision_at, recall_at
from delf_milvus.ingestion.scan import Photo, scan

KS = (1, 5, 10)

_UKBENCH = 4


@dataclass(frozen=True)
class FoldersConfig:
    """What is in a folder.

    instances: "folder", the first folder below `data`, or "parent", the folder that a photo lies in. group: instead, so
    many photos in a row, in order of their names, show one thing. distractors: folders of photos that match nothing.
    no_match: folders of queries that have no match, which are not in the collection.
    """

    data: Path
    instances: Literal["folder", "parent"] = "folder"
    group: int | None = None
    distractors: tuple[Path, ...] = ()
    no_match: tuple[Path, ...] = ()


def folders_set(config: FoldersConfig) -> DataSet:
    """Read the folders. Raises InputError where no instance has two photos, or the photos do not fill their groups."""
    if not config.data.is_dir():
        raise InputError(f"{one_line(config.data)} is not a folder; check the path.")
    scanned = scan([config.data])
    distractors, failures = distracting(config.distractors)
    absent, more = distracting(config.no_match)
    others, queried = ({photo.path.resolve() for photo in some} for some in (distractors, absent))
    if others & queried:
        raise UsageError("A photo is both a distractor and a query without a match; give --distractors other folders.")
    apart = others | queried
    photos = [photo for photo in scanned.photos if photo.path.resolve() not in apart]
    ids = {photo.image_id for photo in photos}
    twice = sorted(ids & {photo.image_id for photo in (*distractors, *absent)})
    if twice:
        raise UsageError(f"{one_line(twice[0])} is a photo of two folders; rename the folder of distractors.")
    instances = _instances(photos, config)
    members: dict[str, set[str]] = {}
    for image_id, instance in instances.items():
        members.setdefault(instance, set()).add(image_id)
    queries = [
        Query(photo.image_id, photo.path, Truth(frozenset(same - {photo.image_id}), frozenset({photo.image_id})))
        for photo in photos
        if len(same := members.get(instances.get(photo.image_id, ""), set())) > 1
    ]
    if not queries:
        raise InputError(
            f"{one_line(config.data)} has no folder with two photos, so no query has a match; with --group N, N photos "
            "in a row show one thing."
        )
    queries += [Query(photo.image_id, photo.path, Truth()) for photo in absent]
    name, notes = folder_name(config.data), []
    if alone := len(photos) + len(absent) - len(queries):
        notes.append(f"{alone} photos of {one_line(name)} are alone in their instance, and only distract.")
    return DataSet(
        kind="folders",
        name=name,
        queries=queries,
        photos=[*photos, *distractors],
        roots=[config.data, *config.distractors],
        expected=frozenset(ids | {photo.image_id for photo in distractors}),
        judge=_judge_groups if config.group == _UKBENCH else judge,
        about=_about(config),
        failures=[*scanned.failures, *failures, *more],
        notes=notes,
    )


def _instances(photos: list[Photo], config: FoldersConfig) -> dict[str, str]:
    """The instance of each photo that has one, by its id; photos come in order of their ids."""
    if config.group is not None:
        if len(photos) % config.group:
            raise InputError(
                f"{one_line(config.data)} has {len(photos)} photos, no multiple of {config.group}: a group lacks some."
            )
        return {photo.image_id: str(number // config.group) for number, photo in enumerate(photos)}
    folders = {}
    for photo in photos:
        folder, slash, _ = (
            photo.image_id.partition("/") if config.instances == "folder" else photo.image_id.rpartition("/")
        )
        if slash:
            folders[photo.image_id] = folder
    return folders


def _about(config: FoldersConfig) -> dict[str, About]:
    about = {"mAP": About("average precision by trapezoids")}
    if config.group == _UKBENCH:
        about["N-S"] = About("right images among the first four, the query's own among them")
    about["recall@1"] = About("the first image is right")
    about |= {f"recall@{k}": About(f"a right image is among the first {k}") for k in KS[1:]}
    about["precision@1"] = About("the first image is right")
    about |= {f"precision@{k}": About(f"right share of the first {k}, or of as many as are right") for k in KS[1:]}
    about["accepted"] = ACCEPTED
    about["wrong accepted"] = About("a wrong image is accepted at the bar", better="lower")
    if config.no_match:
        about["false alarms"] = FALSE_ALARMS
        about["calibration error"] = About(
            "of the confidence of first answers, half of the queries with a match", "ece", "lower"
        )
    about["seconds"] = SECONDS
    return about


def judge(query: Query, answer: Answer) -> Mapping[str, Value]:
    """The figures of one query."""
    relevant, junk = query.truth.relevant, query.truth.junk
    verified = {one.name for one in answer.found if one.verified} - junk
    values: dict[str, Value] = {"seconds": answer.seconds}
    first = answer.first(junk)
    if first is not None:
        right = float(first.name in relevant)
        values["calibration error"] = (first.confidence, right, float(bool(relevant)))
    else:
        values["calibration error"] = (0.0, 0.0, float(bool(relevant)))
    if not relevant:
        return values | {"false alarms": float(bool(verified))}
    ranking = [one.name for one in answer.found]
    values["mAP"] = average_precision(ranking, relevant, junk)
    values |= {f"recall@{k}": recall_at(ranking, relevant, k, junk) for k in KS}
    values |= {f"precision@{k}": precision_at(ranking, relevant, k, junk) for k in KS}
    values["accepted"] = float(bool(verified & relevant))
    values["wrong accepted"] = float(bool(verified - relevant))
    return values


def _judge_groups(query: Query, answer: Answer) -> Mapping[str, Value]:
    values = dict(judge(query, answer))
    if query.truth.relevant:
        values["N-S"] = float(ns_score([one.name for one in answer.found], query.truth.relevant | query.truth.junk))
    return values
