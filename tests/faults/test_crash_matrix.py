"""A few kills of every command that writes, on Milvus Lite and on a real server; `crash_matrix.py` does hundreds."""

from __future__ import annotations

import random

import pytest
from crash_matrix import OPERATIONS, report
from fault_material import Material, make
from fault_trials import Moment, Trial, Trials, Victim
from milvus_server import WheelServer

SEED = 11


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make(tmp_path_factory.mktemp("material"), images=64, photos=8)


@pytest.fixture(scope="module")
def embedded(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(material, tmp_path_factory.mktemp("places"))


@pytest.fixture(scope="module")
def served(material: Material, tmp_path_factory: pytest.TempPathFactory, wheel_server: WheelServer) -> Trials:
    return Trials(material, tmp_path_factory.mktemp("places"), wheel_server)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_command_killed_anywhere_is_completed_by_running_it_again(embedded: Trials, operation: str) -> None:
    moment = embedded.drawn(operation, random.Random(f"{SEED} {operation}"), aimed=True)
    trial = embedded.run(operation, "tool", moment)
    assert trial.problems == []


@pytest.mark.parametrize(
    ("operation", "event"),
    [
        ("ingest", "after insert features"),
        ("update", "after delete images"),
        ("prune", "after delete images"),
        ("delete", "in delete features"),
        ("export", "open partial features"),
        ("reindex", "after create index features"),
    ],
)
def test_a_kill_in_the_midst_of_things_is_mended_by_the_same_command(
    embedded: Trials, operation: str, event: str
) -> None:
    trial = embedded.run(operation, "tool", Moment(0.0, event))
    assert (trial.killed, trial.phase, trial.problems) == (True, event, [])


@pytest.mark.server
@pytest.mark.parametrize(
    ("operation", "victim", "event"),
    [
        ("update", "tool", "after delete images"),
        ("prune", "tool", "after delete images"),
        ("reindex", "tool", "after create alias current"),
        ("ingest", "server", "after insert features"),
        ("delete", "server", "after delete images"),
    ],
)
def test_a_kill_of_the_tool_or_of_its_server_is_mended_by_the_same_command(
    served: Trials, operation: str, victim: Victim, event: str
) -> None:
    trial = served.run(operation, victim, Moment(0.0, event))
    assert (trial.killed, trial.problems) == (True, [])


def test_the_report_says_what_did_not_hold() -> None:
    sound = Trial("delete", "lite", "tool", True, "after delete images", -9, {"orphan_features": 3}, 5, [])
    late = Trial("delete", "lite", "tool", False, "after delete features", 0, {}, 5, [])
    broken = Trial(
        "delete", "lite", "tool", True, "in delete images", -9, {}, 3, ["run again, rows (1, 2), not (0, 0)"]
    )
    text = report([sound, late, broken])
    assert "| delete | lite | tool | 2 | 1 | 1 | 1 | 1 |" in text
    assert "| image row deleted, features not | 1 |" in text
    assert "FAILED delete, lite, tool killed in delete images: ['run again, rows (1, 2), not (0, 0)']" in text
