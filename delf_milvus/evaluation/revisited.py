"""The revisited Oxford and Paris protocol: queries cropped to a box, three levels of difficulty.

Easy: easy images are right, hard ones and junk do not count. Medium: easy and hard ones are right, junk does not count.
Hard: hard ones are right, easy ones and junk do not count. A query without right images at a level is left out of it.

Source: Radenović et al., "Revisiting Oxford and Paris: large-scale image retrieval benchmarking", CVPR 2018, and the
ground truth published with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delf_milvus.errors import InputError, one_line
from delf_milvus.evaluation.dataset import (
    ACCEPTED,
    SECONDS,
    About,
    Answer,
    DataSet,
    Query,
    Truth,
    Value,
    by_stem,
    distracting,
)
from delf_milvus.evaluation.metrics import average_precision, revisited_precision_at
from delf_milvus.evaluation.unpickling import ForbiddenError, plain_pickle
from delf_milvus.features import Box
from delf_milvus.imaging.decode import read_file

LEVELS = ("easy", "medium", "hard")

KS = (1, 5, 10)

_MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class RevisitedConfig:
    """ground_truth: file as published, or JSON. images: folder of the photos, queries among them. distractors: folders
    of photos that match nothing."""

    ground_truth: Path
    images: Path
    distractors: tuple[Path, ...] = ()


@dataclass(frozen=True)
class GroundTruth:
    """Names of the images that are searched and of the queries; for each query a box and its levels."""

    images: list[str]
    queries: list[str]
    boxes: list[Box]
    levels: list[dict[str, Truth]]


def read_ground_truth(path: Path) -> GroundTruth:
    """Read a ground truth: a pickle as published (gnd_roxford5k.pkl), or the same structure as JSON (.json).

    A pickle is read as data: containers, text, numbers and numpy arrays. The structure is `imlist` and `qimlist`, names
    without a suffix, and `gnd`, for each query `bbx` (x0, y0, x1, y1 in pixels) and the numbers in `imlist` of its
    `easy`, `hard` and `junk` images.

    Raises InputError for anything else.
    """
    data = read_file(path, _MAX_BYTES, "ground truth is smaller")
    name = one_line(path)
    try:
        values = json.loads(data) if path.suffix.lower() == ".json" else plain_pickle(data)
    except ForbiddenError as error:
        raise InputError(
            f"{name} asks for {one_line(error)}, and ground truth needs containers, text, numbers and arrays alone: "
            "nothing else is read from a pickle, so take the published file, or JSON."
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is neither a pickle nor, with the suffix .json, JSON ({one_line(error)}).") from error
    try:
        return _checked(values)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        problem = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
        raise InputError(
            f"{name} is no ground truth of this protocol, with imlist, qimlist and gnd of bbx, easy, hard and junk: "
            f"{problem}."
        ) from error


def revisited_set(config: RevisitedConfig) -> DataSet:
    """Read the ground truth and look for its photos. Raises InputError where no query has a photo."""
    truth = read_ground_truth(config.ground_truth)
    photos, failures = by_stem(config.images)
    wanted = [_stem(name) for name in truth.images]
    queries, lost = [], 0
    for name, box, levels in zip(truth.queries, truth.boxes, truth.levels, strict=True):
        photo = photos.get(_stem(name))
        if photo is None:
            lost += 1
        else:
            queries.append(Query(_stem(name), photo.path, levels["medium"], box, levels))
    if not queries:
        raise InputError(f"{one_line(config.images)} has none of the {lost} query photos, as {truth.queries[0]}.jpg.")
    notes = [f"{lost} of {len(truth.queries)} queries have no photo here, and are left out."] if lost else []
    distractors, more = distracting(config.distractors)
    return DataSet(
        kind="revisited",
        name=config.ground_truth.stem.removeprefix("gnd_"),
        queries=queries,
        photos=[*(photos[name] for name in wanted if name in photos), *distractors],
        roots=[config.images, *config.distractors],
        expected=frozenset(wanted),
        judge=judge,
        about=_about(),
        by_stem=True,
        withheld=frozenset(map(_stem, truth.queries)) - frozenset(wanted),
        failures=[*failures, *more],
        notes=notes,
    )


def judge(query: Query, answer: Answer) -> Mapping[str, Value]:
    """The figures of one query, at every level at which it has right images."""
    ranking = [one.name for one in answer.found]
    values: dict[str, Value] = {"seconds": answer.seconds}
    for name, truth in query.levels.items():
        if truth.relevant:
            values[f"mAP {name}"] = average_precision(ranking, truth.relevant, truth.junk)
            values |= {f"mP@{k} {name}": revisited_precision_at(ranking, truth.relevant, k, truth.junk) for k in KS}
    if query.truth.relevant:
        verified = {one.name for one in answer.found if one.verified}
        values["accepted"] = float(bool(verified & query.truth.relevant))
    return values


def _about() -> dict[str, About]:
    about = {}
    for level in LEVELS:
        about[f"mAP {level}"] = About("average precision by trapezoids")
        about |= {f"mP@{k} {level}": About(f"precision of the first {k}, or up to the last right one") for k in KS}
    return about | {"accepted": ACCEPTED, "seconds": SECONDS}


def _checked(values: Any) -> GroundTruth:
    images, queries = ([str(name) for name in _list(values[key], str)] for key in ("imlist", "qimlist"))
    entries = _list(values["gnd"], dict)
    if len(entries) != len(queries) or not queries:
        raise ValueError(f"{len(entries)} entries for {len(queries)} queries")
    if len(set(map(_stem, images))) < len(images) or len(set(map(_stem, queries))) < len(queries):
        raise ValueError("a name comes twice")
    boxes, levels = [], []
    for entry in entries:
        box = [float(side) for side in _list(entry["bbx"], int | float)]
        if len(box) != 4 or not all(map(math.isfinite, box)) or not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"{box} is no box")
        boxes.append((box[0], box[1], box[2], box[3]))
        easy, hard, junk = (_names(images, entry[key]) for key in ("easy", "hard", "junk"))
        if easy & hard or (easy | hard) & junk:
            raise ValueError("an image is of two kinds for one query")
        levels.append(
            {
                "easy": Truth(easy, hard | junk),
                "medium": Truth(easy | hard, junk),
                "hard": Truth(hard, easy | junk),
            }
        )
    return GroundTruth(images, queries, boxes, levels)


def _names(images: Sequence[str], numbers: Any) -> frozenset[str]:
    rows = _list(numbers, int | float)
    if any(row != int(row) or not 0 <= row < len(images) for row in rows):
        raise ValueError(f"a number is none of its {len(images)} images")
    return frozenset(_stem(images[int(row)]) for row in rows)


def _list(value: Any, of: Any) -> list[Any]:
    if not isinstance(value, list | tuple) or not all(isinstance(one, of) for one in value):
        raise ValueError("something is no list of what it should be")
    return list(value)


def _stem(name: str) -> str:
    """A name as photos are called here: without folders, and without a suffix where it has one of a photo."""
    last = name.rpartition("/")[2]
    stem, dot, suffix = last.rpartition(".")
    return stem if dot and suffix.lower() in ("jpg", "jpeg", "png") else last
