"""Reports are written, read, and compared where that makes sense."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from delf_milvus.errors import InputError, UsageError
from delf_milvus.evaluation.comparison import compare
from delf_milvus.evaluation.dataset import SECONDS, About
from delf_milvus.evaluation.report import EvaluationReport, Facts, made_report

ABOUT = {"mAP": About("area"), "GAP": About("sure", "gap"), "alarms": About("bad", better="lower"), "seconds": SECONDS}


def report(shift: float = 0.0, queries: range = range(40), **more: Any) -> EvaluationReport:
    values = {
        f"q{n}": {
            "mAP": min(1.0, 0.3 + (n % 7) / 20 + shift),
            "GAP": (0.5 + n / 100, float(n), float(n % 3 > 0), 1.0),
            "alarms": float(n % 4 == 0) - shift,
            "seconds": 0.1 + n / 1000,
        }
        for n in queries
    }
    return made_report(
        more.get("kind", "folders"),
        more.get("data", Facts("photos", "aa", "bb", 40, 0, len(queries))),
        {"short": more.get("model", "m1")},
        {"search": {"index": "FLAT"}},
        {"extract": {"preset": "fast"}},
        ABOUT,
        values,
        [],
        ["a note"],
    )


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = report()
    made.write(tmp_path / "new" / "report.json")
    assert EvaluationReport.read(tmp_path / "new" / "report.json") == made
    assert EvaluationReport.read(tmp_path / "new") == made
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == made.to_dict()
    value, low, high, queries = made.figures["mAP"]
    assert low < value < high
    assert queries == 40


@pytest.mark.parametrize("change", [{"version": 2}, {"figures": {"mAP": [1, 2]}}, {"kind": "other"}, {"extra": 1}])
def test_what_is_no_report_is_refused_in_one_sentence(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "report.json").write_text(json.dumps({**report().to_dict(), **change}))
    with pytest.raises(InputError, match="is no report") as caught:
        EvaluationReport.read(tmp_path / "report.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="does not exist"):
        EvaluationReport.read(tmp_path / "missing.json")


def test_a_report_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="No query could be judged"):
        report(queries=range(0))


def test_a_better_run_is_told_over_the_common_queries() -> None:
    found = compare(report(), report(0.1, range(10, 40), model="m2"))
    assert found.queries == 30
    by_name = {figure.name: figure for figure in found.figures}
    assert by_name["mAP"].difference == pytest.approx(0.1)
    assert (by_name["mAP"].verdict, by_name["alarms"].verdict) == ("better", "better")
    assert by_name["mAP"].p < 0.01
    assert by_name["GAP"].difference == 0
    assert by_name["GAP"].verdict == "-"
    assert found.changed == ["model: m1, then m2"]
    back = compare(report(0.1), report())
    assert {figure.name: figure.verdict for figure in back.figures}["mAP"] == "worse"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"kind": "landmarks"}, "protocols"),
        ({"data": Facts("photos", "cc", "bb", 44, 4, 44)}, "ground truths .*with 40 .* with 44 queries, 4 of them"),
        ({"data": Facts("photos", "aa", "dd", 40, 0, 40)}, "collections of images"),
        ({"queries": range(50, 60)}, "no query in common"),
    ],
)
def test_reports_of_different_data_are_refused_in_one_sentence(other: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        compare(report(), report(**other))
    assert "\n" not in str(caught.value)


def test_figures_that_one_report_lacks_are_left_out() -> None:
    lacking = report()
    lacking = replace(lacking, figures={"mAP": lacking.figures["mAP"]})
    assert [figure.name for figure in compare(report(), lacking).figures] == ["mAP"]
