"""`delf-milvus eval` as a user meets it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_photo, save_photo
from jsonschema import Draft202012Validator
from test_commands import RUN, call

SCHEMAS = Path(__file__).parents[2] / "schemas"


def valid(name: str, text: str) -> bool:
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    problems = [f"{e.json_path}: {e.message}" for e in Draft202012Validator(schema).iter_errors(json.loads(text))]
    assert not problems, problems
    return True


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of three scenes, two views each, judged once."""
    folder = tmp_path_factory.mktemp("eval")
    for seed in range(3):
        photo = make_photo(seed)
        save_photo(folder / "data" / f"{2 * seed}.png", photo)
        save_photo(folder / "data" / f"{2 * seed + 1}.png", np.ascontiguousarray(photo[20:230, 20:300]))
    save_photo(folder / "strangers" / "5.png", make_photo(50))
    done = call(folder, "eval", "folders", "data", "--group", 2, "--no-match", "strangers", "--out", "first")
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


def test_a_table_on_stdout_and_what_was_written_on_stderr(workplace: Path) -> None:
    lines = (workplace / "stdout").read_text().splitlines()
    assert lines[0].split() == ["figure", "value", "low", "high", "queries", "what"]
    assert lines[1].split()[:5] == ["mAP", "1.0000", "1.0000", "1.0000", "6"]
    assert [line.split("  ")[0] for line in lines[2:-1]][-3:] == [*("false alarms", "calibration error", "seconds")]
    said = (workplace / "stderr").read_text().splitlines()
    assert said[0].startswith("6 photos added")
    pictures = ("precision_recall.png", "inliers.png", "reliability.png")
    assert said[1:] == [f"written: first/{name}" for name in ("report.json", *pictures)]


def test_json_is_the_report_and_fits_its_schema(workplace: Path) -> None:
    again = call(
        workplace, "-q", "--json", "eval", "folders", "data", "--group", 2, "--no-match", "strangers", "--out", "first"
    )
    assert (again.returncode, again.stderr) == (0, "")
    assert json.loads(again.stdout) == json.loads((workplace / "first" / "report.json").read_text())
    assert valid("evaluation_report", again.stdout)


def test_two_reports_are_compared(workplace: Path) -> None:
    command = ["eval", "folders", "data", "--group", 2, "--no-match", "strangers", "--no-ingest"]
    other = call(workplace, *command, "--candidates", 2, "--out", "second")
    assert other.returncode == 0, other.stderr
    table = call(workplace, "eval", "compare", "first", "second/report.json")
    assert table.returncode == 0, table.stderr
    lines = table.stdout.splitlines()
    assert lines[0].split() == ["figure", "A", "B", "B", "-", "A", "low", "high", "p", "queries", "B", "is"]
    assert "  search.candidates: 100, then 2" in lines
    assert valid("evaluation_comparison", call(workplace, "--json", "eval", "compare", "first", "second").stdout)


def test_pairs_and_landmarks(workplace: Path) -> None:
    with (workplace / "pairs.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["a", "b", "homography"])
        rows.writerow(["data/0.png", "data/1.png", "1 0 -20 0 1 -20 0 0 1"])
        rows.writerow(["data/0.png", "missing.png", "1 0 -20 0 1 -20 0 0 1"])
    matched = call(workplace, "--uri", "nowhere/at/all.db", "--json", "eval", "pairs", "pairs.csv", "--out", "pairs")
    assert matched.returncode == 1
    assert "missing.png" in matched.stderr
    assert valid("evaluation_report", matched.stdout)
    assert json.loads(matched.stdout)["figures"]["matching precision"][0] > 0.8
    assert (workplace / "pairs" / "corner_errors.png").is_file()
    (workplace / "recognition.csv").write_text("id,landmarks\n0,a\n2,b\n5,\n")
    (workplace / "labels.csv").write_text("id,landmark_id\n0,a\n1,a\n2,b\n3,b\n4,c\n")
    recognised = call(
        *(workplace, "--json", "eval", "landmarks", "data", "--no-ingest"),
        *("--recognition", "recognition.csv", "--labels", "labels.csv", "--out", "gld"),
    )
    assert recognised.returncode == 0, recognised.stderr
    assert json.loads(recognised.stdout)["figures"]["GAP"][0] > 0.8
    assert valid("evaluation_report", recognised.stdout)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["folders", "nowhere"], 5, "nowhere"),
        (["folders", "data"], 5, "--group N"),
        (["folders", "data", "--group", "4"], 5, "no multiple of 4"),
        (["folders", "data", "--instances", "file"], 2, "--instances"),
        (["folders", "data", "--no-ingest", "--distractors", "strangers"], 2, "--no-ingest"),
        (["folders", "data", "--group", "2", "--no-match", "data"], 5, "--group N"),
        (["folders", "data", "--group", "2", "--out", "stdout"], 5, "stdout"),
        (["revisited", "bad.pkl", "data"], 5, "asks for os.system"),
        (["revisited", "nowhere.pkl", "data"], 5, "does not exist"),
        (["landmarks", "data"], 2, "--images"),
        (["landmarks", "data", "--no-ingest"], 2, "Give a solution"),
        (["pairs", "nowhere.csv"], 5, "nowhere.csv"),
        (["pairs", "stdout"], 2, "must end with"),
        (["compare", "first", "nowhere"], 5, "nowhere"),
        (["compare", "first", "stdout"], 5, "is no report"),
    ],
)
def test_a_mistake_is_one_sentence_and_its_exit_code(
    workplace: Path, arguments: list[str], code: int, words: str
) -> None:
    (workplace / "bad.pkl").write_bytes(b"cos\nsystem\n(S'touch harmed'\ntR.")
    result = call(workplace, "eval", *arguments)
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert words in result.stderr
    assert not (workplace / "harmed").exists()


def test_every_command_has_an_example(workplace: Path) -> None:
    for command in ("folders", "revisited", "landmarks", "pairs", "compare"):
        text = " ".join(call(workplace, "eval", command, "--help").stdout.split())
        assert f"eval {command}" in text.partition("Example: delf-milvus")[2]


def test_an_interrupted_run_says_how_to_go_on_and_does(tmp_path: Path) -> None:
    for seed in range(40):
        save_photo(tmp_path / "data" / f"{seed:02d}.png", make_photo(seed // 2))
    assert call(tmp_path, "ingest", "data").returncode == 0
    command = ["--json", "eval", "folders", "data", "--group", "2", "--no-ingest"]
    process = subprocess.Popen(
        [*RUN, *command],
        cwd=tmp_path,
        env={**os.environ, "DELF_MILVUS_EXTRACT__PRESET": "fast"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - no threads here
    )
    journal = tmp_path / "evaluation" / "queries.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "run the same command again" in err
    before = journal.read_text()
    done = call(tmp_path, *command)
    assert json.loads(done.stdout)["data"]["judged"] == 40
    assert journal.read_text().startswith(before)
    assert len(journal.read_text().splitlines()) == 40


def test_help_loads_no_numpy() -> None:
    program = (
        "import sys\n"
        "from delf_milvus.cli.main import run\n"
        "try:\n    run()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'pymilvus', 'numpy', 'cv2') if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "eval", "folders", "--help"], capture_output=True, text=True, check=True
    )
    assert result.stderr.strip() == "[]"
