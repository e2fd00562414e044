"""Pairs of photos with a known geometry: how many of the matches that count as proof are right.

No database is used. Points are in pixels of the photos as decoded upright, pixel centres at integers.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import numpy as np

from delf_milvus.errors import InputError, UsageError, one_line
from delf_milvus.evaluation.dataset import About, Value, bad_line
from delf_milvus.evaluation.journal import Journal, digest_of, size_of
from delf_milvus.evaluation.metrics import corner_error, epipolar_distances, error_area, transfer_distances
from delf_milvus.evaluation.page import Drawn, EvaluationPage
from delf_milvus.evaluation.pictures import corner_errors_picture
from delf_milvus.evaluation.report import REPORT, EvaluationReport, Facts, made_report
from delf_milvus.evaluation.run import Count, fingerprint_values, relevant_settings
from delf_milvus.imaging.decode import read_file
from delf_milvus.ingestion.scan import Failure
from delf_milvus.matcher import PhotoMatcher

THRESHOLDS = (3, 5, 10)
"""Pixels up to which the area under the curve of corner errors is taken."""

JOURNAL = "pairs.jsonl"
CORNER_ERRORS = "corner_errors.png"

_MAX_BYTES = 1 << 28

Matrix = tuple[float, ...]  # nine numbers, row by row


@dataclass(frozen=True)
class Pair:
    """Two photos, and what sends the first's points to the second's: one of two (3, 3) matrices, row by row."""

    name: str
    first: Path
    second: Path
    homography: Matrix | None
    fundamental: Matrix | None


@dataclass(frozen=True)
class PairsConfig:
    """How to judge pairs.

    file: the pairs. out: folder of the results. threshold: pixels up to which a match is right. limit: pairs at most,
    evenly spread. page: an HTML file that tells the same with pictures.
    """

    file: Path
    out: Path
    threshold: float = 10.0
    limit: int | None = None
    page: Path | None = None


@dataclass(frozen=True)
class Matched:
    """What was found for a pair. size: width and height of the first photo. transform: (2, 3), or None. first, second:
    (N, 2) inliers."""

    size: tuple[int, int]
    transform: list[list[float]] | None
    first: list[list[float]]
    second: list[list[float]]
    seconds: float


def read_pairs(path: Path) -> list[Pair]:
    """Read pairs: CSV with a header line, or JSONL, by the suffix (.csv, .jsonl, .ndjson).

    Each row has `a` and `b`, paths relative to the file's folder, and `homography` or `fundamental`: nine numbers, row
    by row, with spaces between in CSV, as a list or as three lists in JSONL. Points are (x, y, 1).

    Raises UsageError for another suffix; InputError, with the line, for a row that is not so or comes twice.
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl", ".ndjson"):
        raise UsageError(f"{one_line(path)} must end with .csv, .jsonl or .ndjson.")
    try:
        text = read_file(path, _MAX_BYTES, "split it").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{one_line(path)} is not in UTF-8.") from error
    pairs: dict[str, Pair] = {}
    for line, row in (_csv_rows if suffix == ".csv" else _jsonl_rows)(path, text):
        pair = _pair(path, line, row)
        if pair.name in pairs:
            bad_line(path, line, f"the pair {one_line(pair.name)} comes twice")
        pairs[pair.name] = pair
    if not pairs:
        raise InputError(f"{one_line(path)} has no pair.")
    return list(pairs.values())


def run_pairs(matcher: PhotoMatcher, config: PairsConfig, progress: Count | None = None) -> EvaluationReport:
    """Match every pair, or take it from the journal of an earlier run; writes report.json and a picture.

    Raises InputError for a file that is not as `read_pairs` says, and where no pair can be judged.
    """
    pairs = read_pairs(config.file)
    taken = [pairs[number] for number in _spread(len(pairs), config.limit)]
    settings, fingerprint = relevant_settings(matcher.settings), fingerprint_values(matcher.settings)
    key = {"software": installed_version("delf-milvus"), "fingerprint": fingerprint, "settings": settings}
    values: dict[str, Mapping[str, Value]] = {}
    drawn: dict[str, Drawn] = {}
    failures: list[Failure] = []
    with Journal(config.out / JOURNAL) as journal:
        for done, pair in enumerate(taken, 1):
            try:
                matched = _matched(matcher, pair, key, journal)
                values[pair.name] = judge_pair(pair, matched, config.threshold)
                if config.page is not None:
                    drawn[pair.name] = Drawn(pair.first, pair.second, matched.first, matched.second, matched.transform)
            except InputError as error:
                failures.append(Failure(pair.name, str(error)))
            if progress is not None:
                progress(done, len(taken), len(failures))
    notes = [f"{len(taken)} of {len(pairs)} pairs were judged, evenly spread."] if len(taken) < len(pairs) else []
    report = made_report(
        "pairs",
        Facts(
            name=config.file.stem,
            digest=digest_of([[one.name, one.homography, one.fundamental] for one in pairs]),
            images="",
            queries=len(pairs),
            no_match=0,
            judged=len(values),
        ),
        fingerprint,
        None,
        {**settings, "threshold": config.threshold},
        _about(config.threshold),
        values,
        failures,
        notes,
    )
    report.write(config.out / REPORT)
    errors = [found for one in values.values() if isinstance(found := one.get(_ERROR), float)]
    judged = sum(f"AUC@{THRESHOLDS[0]} px" in one for one in values.values())
    if not corner_errors_picture(errors, judged, config.out / CORNER_ERRORS):
        (config.out / CORNER_ERRORS).unlink(missing_ok=True)
    if config.page is not None:
        page = EvaluationPage(report, matcher.settings.decode)
        page.add_pairs(drawn)
        page.write(config.page, config.out)
    return report


_ERROR = "corner error"


def judge_pair(pair: Pair, matched: Matched, threshold: float) -> dict[str, Value]:
    """The figures of one pair."""
    if pair.homography is not None:
        distances = transfer_distances(_matrix(pair.homography), matched.first, matched.second)
    else:
        assert pair.fundamental is not None
        distances = epipolar_distances(_matrix(pair.fundamental), matched.first, matched.second)
    right = int((distances <= threshold).sum())
    values: dict[str, Value] = {
        "nothing found": float(not len(distances)),
        "right matches": float(right),
        "seconds": matched.seconds,
    }
    if len(distances):
        values["matching precision"] = right / len(distances)
    if pair.homography is not None:
        error = math.inf
        if matched.transform is not None:
            error = corner_error(matched.transform, _matrix(pair.homography), *matched.size)
        if math.isfinite(error):
            values[_ERROR] = error
        values |= {f"AUC@{limit} px": error_area(error, limit) for limit in THRESHOLDS}
    return values


def _about(threshold: float) -> dict[str, About]:
    return {
        "matching precision": About(f"share of a pair's inliers within {threshold:g} px of the truth"),
        "right matches": About(f"inliers within {threshold:g} px of the truth"),
        "nothing found": About("a pair has no inlier", better="lower"),
        _ERROR: About("median of pairs with a transform, mean px over four corners", "median", "lower"),
        **{f"AUC@{limit} px": About(f"area under the curve of corner errors up to {limit} px") for limit in THRESHOLDS},
        "seconds": About("median of a pair: decode, extract, match, verify", "median", "lower"),
    }


def _matched(matcher: PhotoMatcher, pair: Pair, key: Mapping[str, Any], journal: Journal) -> Matched:
    digest = digest_of([key, pair.name, size_of(pair.first), size_of(pair.second)])
    kept = journal.get(digest)
    if kept is None:
        first, second = matcher.decode(pair.first), matcher.decode(pair.second)
        result = matcher.match(first, second)
        kept = {
            "pair": pair.name,
            **asdict(
                Matched(
                    (first.shape[1], first.shape[0]),
                    result.transform,
                    np.round(result.correspondence.query_points.astype(float), 3).tolist(),
                    np.round(result.correspondence.image_points.astype(float), 3).tolist(),
                    round(result.seconds, 6),
                )
            ),
        }
        journal.add(digest, kept)
    try:
        width, height = kept["size"]
        return Matched((width, height), kept["transform"], kept["first"], kept["second"], float(kept["seconds"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{one_line(pair.name)} has a damaged result; remove {JOURNAL}.") from error


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                bad_line(path, reader.line_num, f"it does not have {len(reader.fieldnames or ())} values")
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{one_line(path)}, line {reader.line_num}: it is not CSV ({error}).") from error


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            yield line, _json_row(path, line, content)


def _json_row(path: Path, line: int, content: str) -> dict[str, Any]:
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        bad_line(path, line, "it is not a JSON object")
    return row


def _pair(path: Path, line: int, row: Mapping[str, Any]) -> Pair:
    names = [row.get(column) for column in ("a", "b")]
    if not all(isinstance(name, str) and name and "\0" not in name for name in names):
        bad_line(path, line, "it must have a and b, the paths of two photos")
    given = {column: row[column] for column in ("homography", "fundamental") if row.get(column)}
    if len(given) != 1:
        bad_line(path, line, "it must have either homography or fundamental, nine numbers")
    matrices = {column: _nine(path, line, column, value) for column, value in given.items()}
    first, second = (path.parent / str(name) for name in names)
    name = f"{names[0]} {names[1]}"
    return Pair(name, first, second, matrices.get("homography"), matrices.get("fundamental"))


def _nine(path: Path, line: int, column: str, value: Any) -> Matrix:
    values = value.replace(",", " ").split() if isinstance(value, str) else value
    if isinstance(values, list) and all(isinstance(row, list) for row in values):
        values = [number for row in values for number in row]
    try:
        numbers = tuple(float(number) for number in values)
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if len(numbers) != 9 or not all(map(math.isfinite, numbers)) or not any(numbers):
        bad_line(path, line, f"{column} must be nine numbers, not all of them 0")
    if column == "homography" and abs(np.linalg.det(_matrix(numbers))) < 1e-300:
        bad_line(path, line, "the homography has no inverse")
    return numbers


def _matrix(numbers: Matrix) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(numbers, np.float64).reshape(3, 3)


def _spread(count: int, limit: int | None) -> Sequence[int]:
    """At most `limit` numbers below `count`, evenly spread."""
    if limit is None or limit >= count:
        return range(count)
    return [number * count // limit for number in range(limit)]
