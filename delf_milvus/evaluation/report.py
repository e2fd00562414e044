"""What an evaluation found: report.json, written and read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from delf_milvus.errors import InputError, one_line
from delf_milvus.evaluation.dataset import About, Kind, Value
from delf_milvus.evaluation.statistics import interval
from delf_milvus.imaging.decode import read_file
from delf_milvus.ingestion.scan import Failure

REPORT = "report.json"

Figure = tuple[float, float, float, int]
"""Value, low and high end of its 95 % bootstrap interval, and the queries that have it."""

_MAX_BYTES = 1 << 30
_DIGITS = 9


@dataclass(frozen=True)
class Facts:
    """Which data were judged. digest: of the ground truth. images: digest of the names in the collection, or "".
    queries: of the ground truth that have a photo; no_match: of them, without a match; judged: in this report."""

    name: str
    digest: str
    images: str
    queries: int
    no_match: int
    judged: int


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class EvaluationReport:
    """What an evaluation found; the fields of `--json` and of report.json.

    kind: the protocol. software: version of delf-milvus. created_at: ISO 8601, UTC. fingerprint: of the model.
    collection: backend, index and size of what was searched, or null. settings: those that results depend on.
    figures: value, low and high end of its 95 % bootstrap interval, and number of queries, by name. about: what each
    is. queries: the values of each query, by figure; for GAP confidence, inliers, right and answerable. failures:
    photos that could not be read. notes: what to know of the figures.
    """

    version: Literal[1]
    kind: Kind
    software: str
    created_at: str
    data: Facts
    fingerprint: dict[str, Any]
    collection: dict[str, Any] | None
    settings: dict[str, Any]
    figures: dict[str, Figure]
    about: dict[str, About]
    queries: dict[str, dict[str, Value]]
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        values: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        return values

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all. Raises InputError."""
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(_ADAPTER.dump_json(self, indent=1) + b"\n")
            partial.replace(path)
        except OSError as error:
            raise InputError(
                f"{one_line(path)} cannot be written: {error.strerror or 'input/output error'}."
            ) from error

    @staticmethod
    def read(path: Path) -> EvaluationReport:
        """Read what `write` wrote; of a folder, its report.json. Raises InputError."""
        path = path / REPORT if path.is_dir() else path
        try:
            return _ADAPTER.validate_json(read_file(path, _MAX_BYTES, "a report is smaller"))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "its text"
            raise InputError(
                f"{one_line(path)} is no report of an evaluation of this version ({one_line(where)}: {first['msg']})."
            ) from None


_ADAPTER = TypeAdapter(EvaluationReport)


def summed_up(queries: Mapping[str, Mapping[str, Value]], about: Mapping[str, About]) -> dict[str, Figure]:
    """The figures of all queries, in the order of `about`; those that no query has are left out."""
    figures: dict[str, Figure] = {}
    for name, what in about.items():
        values = [one[name] for one in queries.values() if name in one]
        if values:
            found = interval(values, what.statistic)
            figures[name] = (rounded(found.value), rounded(found.low), rounded(found.high), len(values))
    return figures


def made_report(
    kind: Kind,
    data: Facts,
    fingerprint: Mapping[str, Any],
    collection: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    about: Mapping[str, About],
    queries: Mapping[str, Mapping[str, Value]],
    failures: Sequence[Failure],
    notes: Sequence[str],
) -> EvaluationReport:
    """A report of now; figures are made of the queries' values. Raises InputError where no query has a value."""
    values = {query: {name: rounded(value) for name, value in one.items()} for query, one in queries.items()}
    figures = summed_up(values, about)
    if not figures:
        raise InputError("No query could be judged; what failed is listed above.")
    return EvaluationReport(
        version=1,
        kind=kind,
        software=installed_version("delf-milvus"),
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        data=data,
        fingerprint=dict(fingerprint),
        collection=None if collection is None else dict(collection),
        settings=dict(settings),
        figures=figures,
        about={name: about[name] for name in figures},
        queries=values,
        failures=list(failures),
        notes=list(notes),
    )


def rounded(value: Any) -> Any:
    """A value as a report has it."""
    if isinstance(value, tuple):
        return tuple(rounded(one) for one in value)
    return round(value, _DIGITS) if math.isfinite(value) else value
