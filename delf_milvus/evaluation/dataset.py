"""What every protocol comes down to: photos that are searched, queries, and what is right for each.

Images of a collection have names here: their id, or, where the ground truth knows no folders and suffixes
(`by_stem`), the stem of its last part.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, NoReturn

import numpy as np

from delf_milvus.errors import InputError, UsageError, one_line
from delf_milvus.evaluation.statistics import StatisticName
from delf_milvus.features import Box
from delf_milvus.ingestion.scan import Failure, Photo, scan

Kind = Literal["folders", "revisited", "landmarks", "pairs"]

Value = float | tuple[float, ...]
"""One query's value of a figure."""


@dataclass(frozen=True)
class About:
    """What a figure is. what: in a few words. statistic: of the queries' values. better: higher or lower."""

    what: str
    statistic: StatisticName = "mean"
    better: Literal["higher", "lower"] = "higher"


SECONDS = About("median of a query: decode, extract, search, verify", "median", "lower")

ACCEPTED = About("a right image is accepted at the bar")

FALSE_ALARMS = About("a query without a match is answered at the bar", better="lower")


@dataclass(frozen=True)
class Truth:
    """What is right for one query, by name; junk counts neither way."""

    relevant: frozenset[str] = frozenset()
    junk: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Query:
    """A query photo.

    name: of its own in a data set. truth: what pictures and acceptance go by; no match where nothing is relevant. box:
    the part that is searched for, pixels. levels: further truths by name. labels: of what it shows.
    """

    name: str
    path: Path
    truth: Truth
    box: Box | None = None
    levels: Mapping[str, Truth] = field(default_factory=dict, hash=False)
    labels: frozenset[str] | None = None


@dataclass(frozen=True)
class Found:
    """One image of a ranking, by name."""

    name: str
    verified: bool
    inliers: int
    confidence: float


@dataclass(frozen=True)
class Answer:
    """What a query found, best first, without the images that do not count. seconds: of the whole search."""

    found: tuple[Found, ...]
    seconds: float

    def first(self, junk: Set[str] = frozenset()) -> Found | None:
        """The first that is no junk."""
        return next((one for one in self.found if one.name not in junk), None)


@dataclass(frozen=True)
class DataSet:
    """Ground truth, and where its photos are.

    photos: what is to be in the collection, with ids. roots: folders that all of them lie in. withheld: names of images
    that are no part of the collection's truth even where the collection has them, as photos of queries.
    expected: names of images that the truth speaks of. judge: the figures of one answered query. about: of every
    figure that it gives, in the order they are told in. failures: photos that cannot be read. notes: what to know.
    """

    kind: Kind
    name: str
    queries: Sequence[Query]
    photos: Sequence[Photo]
    roots: Sequence[Path]
    expected: frozenset[str]
    judge: Callable[[Query, Answer], Mapping[str, Value]]
    about: Mapping[str, About]
    by_stem: bool = False
    withheld: frozenset[str] = frozenset()
    failures: Sequence[Failure] = ()
    notes: Sequence[str] = ()

    def name_of(self, image_id: str) -> str:
        """What the truth calls an image of the collection."""
        return PurePosixPath(image_id).stem if self.by_stem else image_id

    def digest(self) -> str:
        """Sixteen hexadecimal digits for the whole ground truth, whatever part of it is run."""
        digest = hashlib.sha256(f"{self.kind} {sorted(self.about)}".encode())
        for query in self.queries:
            truths = {name: [sorted(t.relevant), sorted(t.junk)] for name, t in query.levels.items()}
            truths["truth"] = [sorted(query.truth.relevant), sorted(query.truth.junk)]
            labels = None if query.labels is None else sorted(query.labels)
            digest.update(json.dumps([query.name, query.box, truths, labels], sort_keys=True).encode())
        return digest.hexdigest()[:16]


def evenly(queries: Sequence[Query], limit: int | None) -> list[Query]:
    """At most `limit` queries, drawn one from each of as many equal stretches, with a fixed seed."""
    if limit is None or limit >= len(queries):
        return list(queries)
    random = np.random.default_rng(0)
    bounds = [number * len(queries) // limit for number in range(limit + 1)]
    return [queries[int(random.integers(low, high))] for low, high in itertools.pairwise(bounds)]


def chosen(queries: Sequence[Query], limit: int | None) -> list[Query]:
    """At most `limit` queries that have a match, and as many that have none."""
    with_match = [query for query in queries if query.truth.relevant]
    without = [query for query in queries if not query.truth.relevant]
    return evenly(with_match, limit) + evenly(without, limit)


def folder_name(folder: Path) -> str:
    """What a folder is called, "." and ".." too."""
    return os.path.basename(os.path.abspath(folder))


def distracting(folders: Sequence[Path]) -> tuple[list[Photo], list[Failure]]:
    """The photos of folders that match nothing, each folder's name before their ids.

    Raises InputError for a folder that is not there, UsageError for two folders of one name.
    """
    names = [folder_name(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise UsageError(
            "Two folders of distractors have one name; rename one, for it becomes part of the images' ids."
        )
    photos: list[Photo] = []
    failures: list[Failure] = []
    for folder, name in zip(folders, names, strict=True):
        scanned = scan([folder], id_prefix=f"{name}/")
        photos += scanned.photos
        failures += scanned.failures
    return photos, failures


def by_stem(folder: Path) -> tuple[dict[str, Photo], list[Failure]]:
    """The photos of a folder, at any depth, by the stem of their file name.

    Raises InputError where two have one, or the folder is not there.
    """
    scanned = scan([folder])
    photos: dict[str, Photo] = {}
    for photo in scanned.photos:
        stem = PurePosixPath(photo.image_id).stem
        if stem in photos:
            raise InputError(
                f"{one_line(photo.path)} and {one_line(photos[stem].path)} have one name; "
                "the ground truth could mean either, so remove one."
            )
        photos[stem] = photo
    return photos, scanned.failures


def table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with a header line, as (line, values by column). `columns` must be among its columns.

    Raises InputError, with the line, for what is no such file.
    """
    try:
        if not path.is_file():
            raise InputError(f"{one_line(path)} is not a file; check the path.")
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                bad_line(path, 1, f"it must name the columns {', '.join(columns)}, and lacks {', '.join(missing)}")
            for values in reader:
                if None in values or None in values.values():
                    bad_line(path, reader.line_num, f"it does not have {len(reader.fieldnames or ())} values")
                yield reader.line_num, values
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{one_line(path)} is not CSV in UTF-8 ({error}).") from error
    except OSError as error:
        raise InputError(f"{one_line(path)} cannot be read: {error.strerror or 'input/output error'}.") from error


def bad_line(path: Path, line: int, problem: str) -> NoReturn:
    """Raise InputError for a line of a file."""
    raise InputError(f"{one_line(path)}, line {line}: {problem}.")
