"""Two reports of one data set, figure by figure, over the queries that both have."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from delf_milvus.errors import UsageError
from delf_milvus.evaluation.dataset import Kind
from delf_milvus.evaluation.report import EvaluationReport, rounded
from delf_milvus.evaluation.statistics import difference


@dataclass(frozen=True)
class ComparedFigure:
    """One figure of two reports.

    first, second: over the common queries. difference: second less first; low, high: its 95 % interval, by a paired
    bootstrap. p: of a sign-flip permutation test, two-sided. better: higher or lower. queries: how many are common.
    """

    name: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float
    better: Literal["higher", "lower"]
    queries: int

    @property
    def verdict(self) -> str:
        """Which report is better, where the interval leaves no doubt."""
        if self.low <= 0 <= self.high:
            return "-"
        return "better" if (self.difference > 0) == (self.better == "higher") else "worse"


@dataclass(frozen=True)
class Comparison:
    """The second report held against the first; the fields of `--json`.

    changed: settings, model, index and software in which the two differ, as "name: first, then second".
    """

    kind: Kind
    data: str
    queries: int
    changed: list[str]
    figures: list[ComparedFigure]

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return asdict(self)


def compare(first: EvaluationReport, second: EvaluationReport) -> Comparison:
    """Compare every figure that both reports have, over the queries that both have.

    Raises UsageError for reports of different data sets, or without a common query.
    """
    for what, mine, theirs, named in (
        ("protocols", first.kind, second.kind, (first.kind, second.kind)),
        ("ground truths", first.data.digest, second.data.digest, (_asked(first), _asked(second))),
        ("collections of images", first.data.images, second.data.images, (_size(first), _size(second))),
    ):
        if mine != theirs:
            raise UsageError(
                f"The reports are of different {what} ({named[0]} and {named[1]}), so their figures do not compare."
            )
    common = [query for query in first.queries if query in second.queries]
    if not common:
        raise UsageError("The reports have no query in common, so there is nothing to compare.")
    figures = []
    for name in first.figures:
        both = [query for query in common if name in first.queries[query] and name in second.queries[query]]
        if name not in second.figures or not both:
            continue
        one, other = ([report.queries[query][name] for query in both] for report in (first, second))
        found = difference(one, other, first.about[name].statistic)
        numbers = {field: rounded(value) for field, value in asdict(found).items()}
        figures.append(ComparedFigure(name, **numbers, better=first.about[name].better, queries=len(both)))
    return Comparison(first.kind, first.data.name, len(common), _changed(first, second), figures)


def _asked(report: EvaluationReport) -> str:
    return f"{report.data.name} with {report.data.queries} queries, {report.data.no_match} of them without a match"


def _size(report: EvaluationReport) -> str:
    return f"{(report.collection or {}).get('images', 'unknown')} images"


def _changed(first: EvaluationReport, second: EvaluationReport) -> list[str]:
    sides = []
    for report in (first, second):
        values = {**_leaves(report.settings), "model": report.fingerprint.get("short", ""), "software": report.software}
        if report.collection is not None:
            values |= _leaves({"index": report.collection.get("search", {})})
        sides.append(values)
    one, other = sides
    return [
        f"{name}: {one.get(name, '-')}, then {other.get(name, '-')}"
        for name in dict.fromkeys((*one, *other))
        if one.get(name) != other.get(name)
    ]


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves
