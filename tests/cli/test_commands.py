"""The command line as a user meets it: output, exit codes, one sentence an error."""

from __future__ import annotations

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

RUN = [sys.executable, "-c", "from delf_milvus.cli.main import run; run()"]


def call(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run delf-milvus in `folder` with the fast preset."""
    return subprocess.run(
        [*RUN, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "DELF_MILVUS_EXTRACT__PRESET": "fast", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with five photos ingested into the default database, and two queries."""
    folder = tmp_path_factory.mktemp("cli")
    for seed in range(4):
        save_photo(folder / "photos" / f"{seed}.png", make_photo(seed))
    save_photo(folder / "photos" / 'with \' "quotes" 😀.png', make_photo(4))
    save_photo(folder / "query.png", np.ascontiguousarray(make_photo(2)[20:220, 30:300]))
    save_photo(folder / "stranger.png", make_photo(77))
    result = call(folder, "--json", "ingest", "photos")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report.keys() >= {
        *("added", "updated", "unchanged", "removed", "failed", "failures", "features", "seconds")
    }  # fmt: skip
    assert (report["added"], report["failures"]) == (5, [])
    return folder


def test_search_prints_a_table_or_one_object(workplace: Path) -> None:
    human = call(workplace, "search", "query.png")
    assert human.returncode == 0
    assert "2.png" in human.stdout.splitlines()[1]
    assert human.stderr == ""
    result = json.loads(call(workplace, "--json", "search", "query.png").stdout)
    assert result.keys() >= {"query", "model", "matched", "hits", "timings"}
    assert result["matched"] is True
    hit = result["hits"][0]
    names = [
        "rank",
        "image_id",
        "uri",
        "verified",
        "compared",
        "inliers",
        "putatives",
        "confidence",
        "false_alarm",
        "score",
    ]
    assert list(hit) == [*names, "transform", "homography", "region", "box", "query_box", "metadata"]
    assert np.shape(hit["transform"]) == (2, 3)
    steps = {"decode", "extract", "neighbours", "vote", "geometry", "match", "verify", "total"}
    assert result["timings"].keys() == steps
    assert result["timings"]["total"] == pytest.approx(sum(result["timings"][s] for s in steps - {"total"}), abs=1e-4)


def test_explaining_one_image(workplace: Path) -> None:
    told = call(workplace, "--json", "search", "query.png", "--explain", "2.png")
    assert told.returncode == 0
    assert json.loads(told.stdout)["verified"] is True
    table = call(workplace, "search", "query.png", "--explain", "0.png")
    assert table.returncode == 1
    assert "vote rank" in table.stdout
    assert "Not verified: " in table.stdout
    unknown = call(workplace, "search", "query.png", "--explain", "missing.png")
    assert (unknown.returncode, unknown.stderr.count("\n")) == (5, 1)


def test_filters_and_tenants_from_a_listing(tmp_path: Path) -> None:
    for seed in range(3):
        save_photo(tmp_path / "photos" / f"{seed}.png", make_photo(seed))
    save_photo(tmp_path / "query.png", np.ascontiguousarray(make_photo(2)[20:220, 30:300]))
    (tmp_path / "list.csv").write_text("path,id,year,note\n0.png,zero,1990,a\n1.png,one,2001,b\n2.png,two,2002,c\n")
    declared = ["--field", "year:integer", "--tenant-field", "shop"]
    missing = call(tmp_path, "ingest", "photos", *declared)
    assert missing.returncode == 2
    assert "--tenant" in missing.stderr
    ingest = ["--tenant", "mine", "--json", "ingest", "photos", "--ids-from", "list.csv"]
    assert json.loads(call(tmp_path, *ingest, *declared).stdout)["added"] == 3
    search = ["--tenant", "mine", "--json", "search", "query.png", "--filter"]
    (hit,) = json.loads(call(tmp_path, *search, "year >= 2002").stdout)["hits"]
    assert (hit["image_id"], hit["metadata"]) == ("two", {"year": 2002, "shop": "mine", "note": "c"})
    assert call(tmp_path, *search, "year < 2002").returncode == 1
    assert call(tmp_path, "--tenant", "another", "search", "query.png").returncode == 1
    # Without a listing the second run leaves what was declared as it is.
    unchanged = json.loads(call(tmp_path, *ingest).stdout)
    assert (unchanged["unchanged"], unchanged["updated"]) == (3, 0)
    (tmp_path / "list.csv").write_text("path,id,year\n2.png,two,1990\n")
    assert json.loads(call(tmp_path, *ingest).stdout)["updated"] == 1
    assert call(tmp_path, *search, "year >= 2002").returncode == 1


def test_no_match_is_exit_code_1(workplace: Path) -> None:
    human = call(workplace, "search", "stranger.png")
    assert (human.returncode, human.stdout) == (1, "no match\n")
    assert "--turned" in human.stderr
    result = call(workplace, "--json", "search", "stranger.png", "--include-unverified", "--top", 2)
    assert result.returncode == 1
    answer = json.loads(result.stdout)
    assert answer["matched"] is False
    assert [hit["verified"] for hit in answer["hits"]] == [False, False]


def test_pictures_are_left_and_named_on_stderr(workplace: Path) -> None:
    result = call(workplace, "search", "query.png", "--out", "pictures")
    assert (workplace / "pictures" / "001_2.png").is_file()
    assert "001_2.png" in result.stderr
    assert call(workplace, "-q", "search", "query.png", "--out", "pictures").stderr == ""


def test_match_needs_no_database(workplace: Path) -> None:
    result = call(workplace, "--uri", "nowhere/at/all.db", "match", "query.png", "photos/2.png", "--out", "pair.png")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("match: ")
    assert (workplace / "pair.png").is_file()
    other = call(workplace, "--json", "match", "query.png", "photos/3.png")
    assert other.returncode == 1
    assert json.loads(other.stdout)["matched"] is False


def test_status_list_show(workplace: Path) -> None:
    status = json.loads(call(workplace, "--json", "status").stdout)
    assert status["images"] == 5
    assert "Milvus Lite" in status["backend"]
    listed = json.loads(call(workplace, "--json", "list").stdout)["images"]
    assert [image["image_id"] for image in listed] == sorted(image["image_id"] for image in listed)
    assert len(call(workplace, "list", "--limit", 2).stdout.splitlines()) == 3
    shown = json.loads(call(workplace, "--json", "show", 'with \' "quotes" 😀.png').stdout)
    assert shown["width"] == 320


def test_delete_says_what_was_not_there(tmp_path: Path) -> None:
    save_photo(tmp_path / "photos" / "0.png", make_photo(0))
    assert call(tmp_path, "ingest", "photos").returncode == 0
    result = call(tmp_path, "--json", "delete", "0.png", "9.png")
    assert result.returncode == 5
    assert json.loads(result.stdout) == {"deleted": ["0.png"], "missing": ["9.png"]}
    assert json.loads(call(tmp_path, "--json", "status").stdout)["images"] == 0


def test_failures_are_listed_and_exit_code_1(tmp_path: Path) -> None:
    save_photo(tmp_path / "photos" / "0.png", make_photo(0))
    (tmp_path / "photos" / "new\nline\x1b[31m.jpg").write_bytes(b"no photo")
    result = call(tmp_path, "ingest", "photos")
    assert result.returncode == 1
    assert result.stdout.startswith("1 added")
    (failure,) = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert r"new\nline\x1b[31m.jpg" in failure
    assert call(tmp_path, "--json", "ingest", "photos").stdout.isascii()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["search", "missing.jpg"], 5, "missing.jpg"),
        (["search", "notes.txt"], 5, "not a photo"),
        (["ingest", "nowhere"], 5, "nowhere"),
        (["--uri", "http://127.0.0.1:9", "status"], 3, "127.0.0.1:9"),
        (["--collection", "other", "search", "query.png"], 4, "delf-milvus ingest"),
        (["--collection", "1; drop", "status"], 2, "name"),
        (["--model", "missing.safetensors", "search", "query.png"], 4, "missing.safetensors"),
        (["search", "query.png", "--preset", "paper"], 4, "scales"),
        (["search", "query.png", "--preset", "huge"], 2, "extract.preset"),
        (["search", "query.png", "--box", "1,2,3"], 2, "--box"),
        (["search", "query.png", "--top", "0"], 2, "search.top"),
        (["search", "query.png", "--filter", "year > 1"], 2, "this collection declares none"),
        (["search", "query.png", "--filter", "("], 2, "ends before"),
        (["--tenant", "a", "search", "query.png"], 2, "has no tenants"),
        (["ingest", "photos", "--field", "year"], 2, "NAME:TYPE"),
        (["ingest", "photos", "--field", "year:date"], 2, "the types are"),
        (["ingest", "photos", "--field", "year:integer=0"], 4, "other declared fields"),
        (["--config", "missing.toml", "status"], 2, "missing.toml"),
        (["show", "nothing"], 5, "nothing"),
    ],
)
def test_a_mistake_is_one_sentence_and_its_exit_code(
    workplace: Path, arguments: list[str], code: int, words: str
) -> None:
    (workplace / "notes.txt").write_text("no photo")
    result = call(workplace, *arguments)
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert words in result.stderr


def test_unknown_options_and_commands_are_usage_errors(workplace: Path) -> None:
    for arguments in (["search"], ["serach", "x"], ["search", "query.png", "--colour"]):
        result = call(workplace, *arguments)
        assert result.returncode == 2
        assert "Usage" in result.stderr


def test_a_locked_database_is_exit_code_3(workplace: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\n"
            "from delf_milvus import DelfIndex\n"
            "index = DelfIndex.open('delf_milvus.db', any_model=True, create=False)\n"
            "print('held', flush=True)\n"
            "sys.stdin.read()",
        ],
        cwd=workplace,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        result = call(workplace, "search", "query.png")
        assert result.returncode == 3
        assert result.stderr.count("\n") == 1
    finally:
        holder.communicate("", timeout=30)


def test_interrupting_ingest_keeps_what_is_stored_and_resumes(tmp_path: Path) -> None:
    for seed in range(160):
        save_photo(tmp_path / "photos" / f"{seed:03d}.png", make_photo(seed))
    process = subprocess.Popen(
        [*RUN, "--json", "ingest", "photos"],
        cwd=tmp_path,
        env={**os.environ, "DELF_MILVUS_EXTRACT__PRESET": "fast"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - no threads here
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "delf_milvus.db").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    first = json.loads(out)
    assert first["interrupted"] is True
    assert "run the same command again" in err
    second = json.loads(call(tmp_path, "--json", "ingest", "photos").stdout)
    assert (second["unchanged"], second["added"]) == (first["added"], 160 - first["added"])


def test_config_show_says_where_values_come_from(workplace: Path) -> None:
    result = call(workplace, "--json", "--uri", "x.db", "config", "show", DELF_MILVUS_TOKEN="root:hunter2")
    values = json.loads(result.stdout)
    assert values["uri"] == {"value": "x.db", "source": "flag"}
    assert values["extract.preset"] == {"value": "fast", "source": "environment"}
    assert values["search.top"] == {"value": 10, "source": "default"}
    assert "hunter2" not in result.stdout


def test_help_and_version_load_neither_torch_nor_pymilvus_nor_numpy(workplace: Path) -> None:
    program = (
        "import sys\n"
        "from delf_milvus.cli.main import run\n"
        "try:\n    run()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'pymilvus', 'numpy', 'cv2', 'pydantic') if m in sys.modules], file=sys.stderr)"
    )
    for argument in ("--help", "--version"):
        result = subprocess.run([sys.executable, "-c", program, argument], capture_output=True, text=True, check=True)
        assert result.stderr.strip() == "[]"


def test_importing_the_package_loads_neither_torch_nor_pymilvus() -> None:
    program = "import sys, delf_milvus; print([m for m in ('torch', 'pymilvus') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_command_has_an_example(workplace: Path) -> None:
    for command in ("ingest", "reindex", "search", "match", "status", "list", "show", "delete"):
        assert f"delf-milvus {command}" in call(workplace, command, "--help").stdout.replace("--uri photos.db ", "")


def test_the_index_is_built_shown_and_dropped(tmp_path: Path) -> None:
    for seed in range(4):
        save_photo(tmp_path / "photos" / f"{seed}.png", make_photo(seed))
    assert call(tmp_path, "ingest", "photos").returncode == 0
    built = json.loads(call(tmp_path, "--json", "index", "build", "--profile", "hnsw").stdout)
    assert (built["index"], built["state"]) == ("HNSW", "Finished")
    assert "nlist" not in call(tmp_path, "index", "status").stdout
    assert json.loads(call(tmp_path, "--json", "index", "drop").stdout) == {"dropped": True}
    assert call(tmp_path, "index", "drop").stdout == "no index\n"
    assert json.loads(call(tmp_path, "--json", "index", "status").stdout)["index"] == "none"
    refused = call(tmp_path, "index", "build", "--profile", "GPU_IVF_PQ")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("Error: Milvus Lite has no GPU_IVF_PQ")
    unknown = call(tmp_path, "index", "build", "--profile", "IVFPQ")
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)
    searched = call(tmp_path, "search", "photos/2.png")
    assert searched.returncode == 0
    assert searched.stderr.startswith("WARNING: the collection delf_features has no index")


def test_tuning_prints_a_table_and_a_line_to_paste(tmp_path: Path) -> None:
    for seed in range(9):
        save_photo(tmp_path / "photos" / f"{seed}.png", make_photo(seed))
    assert call(tmp_path, "ingest", "photos").returncode == 0
    result = call(tmp_path, "-q", "index", "tune", "--profile", "FLAT", "--profile", "IVF_SQ8", "--out", "front.png")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split()[:4] == ["front", "profile", "search", "recall"]
    assert 'store = { profile = "' in result.stdout
    assert (tmp_path / "front.png").is_file()
    values = json.loads(call(tmp_path, "--json", "index", "tune", "--profile", "FLAT").stdout)
    assert len(values["points"]) == 1
    # Neighbours that are equally near may come in another order than in the truth.
    assert values["recommended"]["recall"] > 0.999


def test_export_and_import_move_a_collection(workplace: Path) -> None:
    exported = call(workplace, "export", "backup")
    assert exported.returncode == 0
    assert exported.stdout.startswith("5 images with ")
    assert exported.stderr == ""
    again = call(workplace, "export", "backup")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("Error: backup holds a finished export")
    imported = call(workplace, "--uri", "moved.db", "import", "backup")
    assert imported.stdout.startswith("5 added, 0 replaced, 0 unchanged; ")
    before, after = (
        json.loads(call(workplace, "--json", *uri, "search", "query.png").stdout)["hits"]
        for uri in ((), ("--uri", "moved.db"))
    )
    assert before == after
    assert len(before) > 0
    part = call(workplace, "--json", "--uri", "moved.db", "export", "part", "--prefix", "2")
    assert json.loads(part.stdout)["images"] == 1
    (workplace / "backup" / "images-00000.parquet").write_bytes(b"")
    damaged = call(workplace, "--uri", "other.db", "import", "backup")
    assert (damaged.returncode, damaged.stdout) == (5, "")
    assert damaged.stderr.startswith("Error: backup/images-00000.parquet is damaged")
    assert damaged.stderr.count("\n") == 1
