"""Folders as strangers fill them, through the commands: damaged photos, files that are none, names of any kind.

What single readers do with millions of damaged inputs is in tests/fuzz; here is what the commands make of it.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest
from conftest import make_photo, save_photo
from fuzz import fuzz_mutations
from fuzz.fuzz_targets import TARGETS
from test_commands import call

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="makes files that other systems do not allow"),
]

GOOD = 4
DAMAGED = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos`: a few good ones, and what else there may be."""
    place = tmp_path_factory.mktemp("strangers")
    photos = place / "photos"
    for seed in range(GOOD):
        save_photo(photos / f"good {seed}.png", make_photo(seed))
    rng = random.Random("folders")
    seeds, _ = TARGETS["images"].start(place)
    suffixes = [".jpg", ".png", ".webp", ".tif", ".gif", ".bmp", ".JPEG"]
    for number in range(DAMAGED):
        data = fuzz_mutations.image(rng, rng.choice(seeds), seeds)
        (photos / f"damaged {number}{rng.choice(suffixes)}").write_bytes(data)
    for name in (
        "line\nbreak.png",
        "\x1b[31mred\x1b[0m.png",
        "\u202egnp.exe.png",
        "-rf.png",
        "$(touch x).png",
        "%s{0}.png",
    ):
        (photos / name).write_bytes(b"no photo")
    (photos / os.fsdecode(b"\xff\xfe no text.png")).write_bytes(b"no photo")
    (photos / ("long " + "n" * 240 + ".png")).write_bytes(b"no photo")
    (photos / "empty.png").write_bytes(b"")
    (photos / "a folder.png").mkdir()
    os.mkfifo(photos / "pipe.png")
    (photos / "nowhere.png").symlink_to("missing.png")
    (photos / "loop.png").symlink_to("loop.png")
    (photos / "around").symlink_to(".")
    (photos / "device.png").symlink_to("/dev/zero")
    return place


@pytest.mark.parametrize("threads", [1, 3])
def test_what_can_be_read_is_stored_and_the_rest_is_named(folder: Path, tmp_path: Path, threads: int) -> None:
    uri = ["--uri", str(tmp_path / "strangers.db"), "--json"]
    result = call(folder, *uri, "ingest", "photos", DELF_MILVUS_INGEST__DECODE_THREADS=str(threads))
    assert result.returncode == 1, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    report = json.loads(result.stdout)
    assert report["failed"] == len(report["failures"]) > DAMAGED // 4
    assert report["added"] > GOOD
    stored = {one["image_id"] for one in json.loads(call(folder, *uri, "list").stdout)["images"]}
    assert {f"good {seed}.png" for seed in range(GOOD)} <= stored
    assert len(stored) == report["added"]
    failed = {one["path"] for one in report["failures"]}
    assert len(failed) == report["failed"]
    assert all("\n" not in one["error"] and one["error"] for one in report["failures"])
    again = json.loads(call(folder, *uri, "ingest", "photos").stdout)
    assert (again["added"], again["updated"], again["unchanged"]) == (0, 0, report["added"])
    assert call(folder, *uri, "fsck").returncode == 0


def test_what_a_name_would_do_to_a_terminal_is_not_done(folder: Path, tmp_path: Path) -> None:
    result = call(folder, "--uri", tmp_path / "names.db", "ingest", "photos")
    assert result.returncode == 1
    for text in (result.stdout, result.stderr):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "Traceback" not in text
    assert not (folder / "x").exists()


def test_queries_that_cannot_be_read_leave_the_others_their_answers(folder: Path, tmp_path: Path) -> None:
    uri = ["--uri", str(tmp_path / "queries.db"), "--json"]
    for seed in range(GOOD):
        save_photo(tmp_path / "stored" / f"good {seed}.png", make_photo(seed))
    assert call(folder, *uri, "ingest", tmp_path / "stored").returncode == 0
    queries = sorted(path for path in (folder / "photos").glob("damaged 1*"))
    result = call(folder, *uri, "search", *queries, folder / "photos/good 1.png")
    assert result.returncode == 1, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert answers[-1]["matched"] is True
    assert answers[-1]["hits"][0]["image_id"] == "good 1.png"
    assert 1 < len(answers) < len(queries)
