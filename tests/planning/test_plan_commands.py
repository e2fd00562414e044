"""`plan` as a user meets it, and its two files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner, Result

from delf_milvus.cli.main import app
from delf_milvus.errors import InputError, UsageError
from delf_milvus.planning import coefficients, hardware
from delf_milvus.planning.coefficients import DEFAULTS, Coefficient, CoefficientFile
from delf_milvus.schemas import schemas


def plan(folder: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.chdir(folder)
    return CliRunner().invoke(app, list(arguments))


def test_the_page_fits_a_terminal_and_names_the_source_of_each_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = plan(tmp_path, "plan", "--images", "1.5B", "--queries-per-second", "20", monkeypatch=monkeypatch)
    assert told.exit_code == 0, told.output
    lines = told.output.splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 120
    assert lines[0] == "1.5B photos, Milvus 2.6"
    letters = {line[0] for line in lines if line[1:3] == "  "}
    table = lines[2 : lines.index("")]
    assert {line.split()[-1] for line in table} == letters
    assert not any("not measured" in line for line in table)
    assert list(tmp_path.iterdir()) == []


def test_the_object_has_every_estimate_and_follows_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "delf_milvus.toml").write_text(
        "[store]\nnprobe = 64\nnbits = 4\nindexed_features = 100\n", encoding="utf-8"
    )
    told = plan(tmp_path, "--json", "plan", "--images", "10M", "--preset", "paper", monkeypatch=monkeypatch)
    made = json.loads(told.output)
    assert made["request"]["features"] == 1000
    assert made["request"]["preset"] == "paper"
    assert made["index_params"] == {"nlist": 2048, "m": 20, "nbits": 4}
    values = {one["name"]: one["value"] for one in made["estimates"]}
    Draft202012Validator(schemas()["plan"]).validate(made)
    assert values["nprobe"] == 64
    assert values["raw_bytes"] == 10**9 * 160
    told = plan(tmp_path, "--json", "plan", "--images", "10M", "--indexed", "50", monkeypatch=monkeypatch)
    assert json.loads(told.output)["request"]["indexed"] == 50


def test_files_of_hardware_and_of_coefficients_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.toml").write_text("gpus = 4\nextract_cores = 100\n", encoding="utf-8")
    mine = {"gpu_standard_photos_per_second": Coefficient(100.0, "photos a second", "measured here 2026-01-01")}
    CoefficientFile.of(mine, made_at="2026-01-01T00:00:00+00:00", machine="mine").write(tmp_path / "own.json")
    told = plan(
        tmp_path,
        *("--json", "plan", "--images", "400k", "--hardware", "own.toml", "--coefficients", "own.json"),
        monkeypatch=monkeypatch,
    )
    estimates = {one["name"]: one for one in json.loads(told.output)["estimates"]}
    assert estimates["extract.gpu"]["value"] == 1000
    assert estimates["extract.gpu"]["source"] == "measured here 2026-01-01"
    assert estimates["extract.cpu"]["value"] == pytest.approx(4000 * DEFAULTS["extract_standard_core_seconds"].value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--images", "many"), "write 250000"),
        (("--images", "0"), "1 to 10"),
        (("--images", "1M", "--profile", "BEST"), "There is no profile"),
        (("--images", "1M", "--milvus", "new"), "--milvus is a release like 2.6"),
        (("--images", "1M", "--dim", "7", "--profile", "PAPER"), "cannot split descriptors of 7"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = plan(tmp_path, "plan", *arguments, monkeypatch=monkeypatch)
    assert isinstance(refused.exception, UsageError)
    assert message in str(refused.exception)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 2},
        {"extra": 1},
        {"coefficients": {"unheard_of": {"value": 1, "unit": "", "source": ""}}},
        {"coefficients": {"write_rows_per_second": {"value": -1, "unit": "", "source": ""}}},
        {"coefficients": {"write_rows_per_second": {"value": 0, "unit": "", "source": ""}}},
    ],
)
def test_files_that_bench_did_not_write_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    whole = CoefficientFile.of({}, made_at="", machine="").model_dump()
    Draft202012Validator(schemas()["coefficients"]).validate(whole)
    file.write_text(json.dumps(whole), encoding="utf-8")
    assert coefficients.read(file) == DEFAULTS
    file.write_text(json.dumps({**whole, **change}), encoding="utf-8")
    with pytest.raises(UsageError, match=r"c\.json"):
        coefficients.read(file)


def test_files_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    for read in (coefficients.read, hardware.read):
        with pytest.raises(InputError, match="cannot be read"):
            read(tmp_path / "missing")
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UsageError):
            read(tmp_path / "binary")


@pytest.mark.parametrize("text", ["query_cores = 0", "speed = 3", "query_cores ==", "query_memory_gib = nan"])
def test_hardware_that_makes_no_sense_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "h.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"h\.toml"):
        hardware.read(tmp_path / "h.toml")


def test_a_plan_needs_neither_network_nor_database() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from delf_milvus.cli.main import app\n"
        "done = CliRunner().invoke(app, ['plan', '--images', '10M']); assert done.exit_code == 0, done\n"
        "assert not {'torch', 'pymilvus', 'milvus_lite'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
