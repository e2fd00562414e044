"""The page of an evaluation: its figures, its plots, and the queries that it did best and worst with, in pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from delf_milvus.errors import InputError
from delf_milvus.evaluation.dataset import Answer, Found, Query
from delf_milvus.evaluation.report import EvaluationReport
from delf_milvus.features import Box, clipped_box
from delf_milvus.imaging.decode import RgbImage, decode
from delf_milvus.imaging.draw import corners, match_picture
from delf_milvus.imaging.report import LEFT_OUT, Embedded, PictureSpace, write_page
from delf_milvus.reporting.search_page import made_by
from delf_milvus.settings import DecodeSettings

_CASES = 6  # of each group
_ANSWERS = 4  # of each query
_CARD_SIDE = 320  # pixels
_PAIR_SIDE = 1000
_PLOT_SIDE = 960
_MOST_FAILURES = 200

_PLOTS = {
    "precision_recall.png": "Precision over recall",
    "inliers.png": "Inliers of right and of wrong answers",
    "reliability.png": "Confidence against the share that is right",
    "corner_errors.png": "Error of the corners under the estimated transform",
}


@dataclass(frozen=True)
class _Card:
    title: str
    picture: Embedded | None
    missing: str
    badge: str = ""
    right: bool = False
    wrong: bool = False
    facts: Sequence[tuple[str, str]] = ()
    wide: bool = False


@dataclass(frozen=True)
class Case:
    """One query or pair: its name, what is said of it, and its photos."""

    name: str
    said: str
    cards: Sequence[_Card]


@dataclass(frozen=True)
class Group:
    """Cases under one heading."""

    title: str
    what: str
    cases: Sequence[Case]

    @property
    def anchor(self) -> str:
        """Its id in the page."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


@dataclass(frozen=True)
class Drawn:
    """A pair of photos: where they are, their inliers (N, 2) each, and the transform (2, 3) or None."""

    first: Path
    second: Path
    first_points: Sequence[Sequence[float]]
    second_points: Sequence[Sequence[float]]
    transform: Sequence[Sequence[float]] | None


class EvaluationPage:
    """Draws the cases of a report and writes its page. limits: of the photos that are read."""

    def __init__(self, report: EvaluationReport, limits: DecodeSettings) -> None:
        self._report = report
        self._limits = limits
        self._space = PictureSpace()
        self._groups: list[Group] = []

    def add_queries(self, answered: Sequence[tuple[Query, Answer]], uris: Mapping[str, str]) -> None:
        """Add the best and the worst queries, and false alarms. uris: where the photos of images are, by name."""
        by_name = {query.name: (query, answer) for query, answer in answered}
        for title, what, names in self._extremes({name: _margin(*one) for name, one in by_name.items()}):
            self._groups.append(Group(title, what, [self._case(*by_name[name], uris) for name in names]))
        alarms = [
            (query, answer)
            for query, answer in answered
            if not query.truth.relevant and any(one.verified for one in answer.found)
        ]
        # The surest mistakes tell the most.
        alarms.sort(key=lambda one: -max(found.confidence for found in one[1].found))
        if alarms:
            what = f"{len(alarms)} queries without a match were answered all the same; the surest come first."
            self._groups.append(Group("False alarms", what, [self._case(*one, uris) for one in alarms[:_CASES]]))

    def add_pairs(self, drawn: Mapping[str, Drawn]) -> None:
        """Add the best and the worst pairs, by name."""
        for title, what, names in self._extremes({name: len(one.first_points) for name, one in drawn.items()}):
            self._groups.append(Group(title, what, [self._pair(name, drawn[name]) for name in names]))

    def write(self, path: Path, out: Path) -> None:
        """Write the page. out: the folder that the plots of the report lie in. Raises InputError."""
        report = self._report
        plots = []
        for file, caption in _PLOTS.items():
            if (out / file).is_file():
                photo, missing = self._read(out / file)
                embedded = None if photo is None else self._space.embed(photo, f"Plot: {caption}", _PLOT_SIDE)
                plots.append({"name": caption, "picture": embedded, "missing": missing or LEFT_OUT})
        beyond = len(report.failures) - _MOST_FAILURES
        failures = [failure.error for failure in report.failures[:_MOST_FAILURES]]
        values = {
            "title": f"Evaluation: {report.data.name}",
            "lead": f"{report.data.judged} of {report.data.queries} "
            f"{'pairs' if report.kind == 'pairs' else 'queries'} were judged, by the protocol “{report.kind}”.",
            "figures": [_figure(report, name) for name in report.figures],
            "notes": report.notes,
            "plots": plots,
            "groups": self._groups,
            "failures": [*failures, *([f"{beyond} more are in the JSON report."] if beyond > 0 else [])],
            "conditions": _conditions(report),
            "made": made_by(),
        }
        write_page(path, "evaluation", values)

    def _extremes(self, margins: Mapping[str, float]) -> list[tuple[str, str, list[str]]]:
        """Title, explanation and names of the best and of the worst, by the report's first figure, and among equal ones
        by their margins."""
        headline = _headline(self._report)
        if headline is None:
            return []
        values = {
            name: float(value)
            for name, one in self._report.queries.items()
            if isinstance(value := one.get(headline), int | float)
        }
        ranked = sorted(values, key=lambda name: (values[name], margins[name], name))
        worst = ranked[: min(_CASES, (len(ranked) + 1) // 2)]
        best = [name for name in reversed(ranked) if name not in worst][:_CASES]
        pairs = self._report.kind == "pairs"
        kind = "pairs" if pairs else "queries"
        among = (
            "; among equal ones, by inliers" if pairs else "; among equal ones, by how much surer right is than wrong"
        )
        return [
            (f"Worst {kind}", f"The lowest {headline}, from the lowest up{among}.", worst),
            *([(f"Best {kind}", f"The highest {headline}{among}.", best)] if best else []),
        ]

    def _said(self, name: str) -> str:
        values = self._report.queries[name]
        told = [
            f"{figure} {value:.3f}"
            for figure, value in values.items()
            if isinstance(value, int | float) and figure != "seconds"
        ]
        return ", ".join(told[:4])

    def _case(self, query: Query, answer: Answer, uris: Mapping[str, str]) -> Case:
        photo, missing = self._read(query.path)
        outline = None
        if photo is not None and query.box is not None:
            outline = corners(photo, _clipped(query.box, photo))
        cards = [self._card("query", photo, missing, f"The query, {query.name}", outline=outline)]
        found = [one for one in answer.found if one.name not in query.truth.junk]
        shown = list(enumerate(found, 1))[:_ANSWERS]
        first_right = next(((rank, one) for rank, one in enumerate(found, 1) if one.name in query.truth.relevant), None)
        if first_right is not None and first_right[0] > _ANSWERS:
            shown.append(first_right)
        cards += [self._answer(rank, one, query, uris) for rank, one in shown]
        said = self._said(query.name)
        if query.truth.relevant and first_right is None:
            said += "; none of its right images was found"
        return Case(query.name, said, cards)

    def _answer(self, rank: int, one: Found, query: Query, uris: Mapping[str, str]) -> _Card:
        right = one.name in query.truth.relevant
        photo, missing = self._read(Path(uris[one.name])) if uris.get(one.name) else (None, "Its place is not known.")
        return self._card(
            f"{rank}. {one.name}",
            photo,
            missing,
            f"Answer {rank}, {one.name}",
            badge=f"{'right' if right else 'wrong'}, {'verified' if one.verified else 'not verified'}",
            right=right and one.verified,
            wrong=not right,
            facts=[("confidence", f"{one.confidence:.4f}"), ("inliers", f"{one.inliers}")],
        )

    def _pair(self, name: str, drawn: Drawn) -> Case:
        photos = [self._read(path) for path in (drawn.first, drawn.second)]
        (first, first_missing), (second, second_missing) = photos
        if first is None or second is None:
            return Case(name, self._said(name), [self._card(name, None, first_missing or second_missing, name)])
        picture = match_picture(
            first,
            second,
            np.array(drawn.first_points, np.float32).reshape(-1, 2),
            np.array(drawn.second_points, np.float32).reshape(-1, 2),
            residuals=None,
            transform=None if drawn.transform is None else np.array(drawn.transform, np.float64),
            caption=f"{len(drawn.first_points)} inliers",
        )
        alt = f"{len(drawn.first_points)} lines between matching keypoints of the two photos"
        embedded = self._space.embed(picture, alt, _PAIR_SIDE)
        return Case(name, self._said(name), [_Card(name, embedded, LEFT_OUT, wide=True)])

    def _card(
        self, title: str, photo: RgbImage | None, missing: str, alt: str, *, outline: Any = None, **more: Any
    ) -> _Card:
        if photo is None:
            return _Card(title, None, f"No picture: {missing}", **more)
        return _Card(title, self._space.embed(photo, alt, _CARD_SIDE, outline), LEFT_OUT, **more)

    def _read(self, path: Path) -> tuple[RgbImage | None, str]:
        try:
            return decode(path, self._limits), ""
        except InputError as error:
            return None, str(error)


def _margin(query: Query, answer: Answer) -> float:
    """How much surer the best right answer is than the best wrong one: -1 to 1."""
    right = [one.confidence for one in answer.found if one.name in query.truth.relevant]
    counted = query.truth.relevant | query.truth.junk
    wrong = [one.confidence for one in answer.found if one.name not in counted]
    return max(right, default=0.0) - max(wrong, default=0.0)


def _clipped(box: Box, photo: RgbImage) -> Box:
    return clipped_box(box, photo.shape[1], photo.shape[0])


def _headline(report: EvaluationReport) -> str | None:
    """The first figure of which more is better and that a query has as one number."""
    for name in report.figures:
        numbers = [one[name] for one in report.queries.values() if name in one]
        if report.about[name].better == "higher" and all(isinstance(value, int | float) for value in numbers):
            return name
    return None


def _figure(report: EvaluationReport, name: str) -> dict[str, Any]:
    value, low, high, queries = report.figures[name]
    span = None
    if all(math.isfinite(one) and 0 <= one <= 1 for one in (value, low, high)):
        span = (round(100 * low, 2), round(max(100 * (high - low), 0.5), 2), round(min(100 * value, 98.5), 2))
    return {
        "name": name,
        "value": f"{value:.4f}",
        "interval": f"{low:.4f} to {high:.4f}",
        "span": span,
        "queries": queries,
        "what": report.about[name].what,
    }


def _conditions(report: EvaluationReport) -> list[tuple[str, str]]:
    """What the figures depend on, as rows."""
    rows = [("software", f"delf-milvus {report.software}"), ("judged at", report.created_at)]

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                add(f"{prefix}.{name}", inner)
        else:
            rows.append((prefix, "-" if value in (None, "") else f"{value}"))

    values = report.to_dict()
    for name in ("data", "collection", "fingerprint", "settings"):
        add(name, values[name])
    return rows
