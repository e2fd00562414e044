"""Recalibration on a real collection of small generated photos: what it measures, where it is used, when it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cli.test_commands import call
from conftest import make_photo, save_photo

from delf_milvus import DelfIndex, Settings
from delf_milvus.errors import InputError, ModelError, UsageError
from delf_milvus.evaluation.recalibration import LEAST, RecalibrationConfig, recalibrate
from delf_milvus.retrieval.confidence import Calibration

SETTINGS = Settings(extract={"preset": "fast"}, search={"candidates": 20})  # type: ignore[arg-type]
FOLDERS = 65


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two views of each of 65 things in folders of their own, stored; and 130 photos of other things."""
    root = tmp_path_factory.mktemp("recalibration")
    for seed in range(FOLDERS):
        photo = make_photo(seed, 112, 96)
        save_photo(root / "photos" / f"thing{seed}" / "a.png", photo)
        save_photo(root / "photos" / f"thing{seed}" / "b.png", np.ascontiguousarray(photo[6:, 8:]))
    for seed in range(2 * FOLDERS):
        save_photo(root / "strangers" / f"{seed}.png", make_photo(1000 + seed, 112, 96))
    with DelfIndex.open(root / "delf_milvus.db", settings=SETTINGS) as index:
        assert index.ingest([root / "photos"]).added == 2 * FOLDERS
    return root


@pytest.fixture
def index(workplace: Path) -> Iterator[DelfIndex]:
    with DelfIndex.open(workplace / "delf_milvus.db", settings=SETTINGS, create=False) as index:
        yield index


def share_answered(index: DelfIndex, calibration: Calibration, photos: list[Path]) -> float:
    bar = index.settings.verify.max_false_alarm
    found = [calibration.assess(index.judge(index.query(p).features).evidence).false_alarm for p in photos]
    return float(np.mean([bool((each <= bar).any()) for each in found]))


def test_photos_without_a_match_set_the_bar(index: DelfIndex, workplace: Path) -> None:
    done: list[tuple[int, int]] = []
    calibration, report = recalibrate(
        index, RecalibrationConfig(workplace / "strangers"), lambda *counts: done.append(counts)
    )
    assert (report.queries, report.failed, report.bar) == (2 * FOLDERS, 0, 0.01)
    assert done[-1] == (2 * FOLDERS, 2 * FOLDERS)
    assert calibration.answers.weights == index.calibration.answers.weights
    assert calibration != index.calibration
    photos = sorted((workplace / "strangers").iterdir())
    assert report.before == pytest.approx(share_answered(index, index.calibration, photos))
    assert share_answered(index, calibration, photos) <= 0.03
    assert report.after <= 0.06


def test_stored_images_ask_and_those_of_their_folder_do_not_count(index: DelfIndex) -> None:
    calibration, report = recalibrate(index, RecalibrationConfig())
    assert report.queries == 2 * FOLDERS
    # Had the other view of the same thing counted as wrong, no evidence at all would be enough afterwards.
    judged = index.judge(index.query(np.ascontiguousarray(make_photo(3, 112, 96)[4:90, 5:100])).features)
    assert judged.candidates[0].image_id.startswith("thing3/")
    assert calibration.assess(judged.evidence).false_alarm[0] < 0.05


def test_the_same_collection_gives_the_same_calibration(index: DelfIndex) -> None:
    config = RecalibrationConfig(limit=LEAST)
    assert recalibrate(index, config) == recalibrate(index, config)


def test_what_cannot_be_measured_is_refused(index: DelfIndex, workplace: Path, tmp_path: Path) -> None:
    save_photo(tmp_path / "few" / "1.png", make_photo(1, 64, 64))
    with pytest.raises(InputError, match=f"has 1 photos, of which 1000 at most ask; a calibration needs {LEAST}"):
        recalibrate(index, RecalibrationConfig(tmp_path / "few"))
    for number in range(LEAST):
        (tmp_path / "few" / f"none{number}.png").write_bytes(b"no photo")
    with pytest.raises(InputError, match=f"1 photos that can be read; a calibration needs {LEAST}"):
        recalibrate(index, RecalibrationConfig(tmp_path / "few"))
    with pytest.raises(InputError, match="is not a folder"):
        recalibrate(index, RecalibrationConfig(tmp_path / "absent"))
    with DelfIndex.open(tmp_path / "flat.db", settings=SETTINGS) as flat:
        flat.ingest([workplace / "photos" / "thing0"])
        with pytest.raises(UsageError, match="lie in one folder"):
            recalibrate(flat, RecalibrationConfig())


def test_the_command_writes_a_file_that_search_then_uses(workplace: Path) -> None:
    done = call(workplace, "--json", "calibrate", "strangers", "--out", "own.json", "--limit", 126)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["queries"], report["failed"]) == (126, 0)
    assert "DELF_MILVUS_VERIFY__CALIBRATION=own.json" in done.stderr
    query = ["--json", "search", "photos/thing5/a.png", "--include-unverified"]
    plain = json.loads(call(workplace, *query).stdout)["hits"][0]
    own = json.loads(call(workplace, *query, DELF_MILVUS_VERIFY__CALIBRATION="own.json").stdout)["hits"][0]
    assert (own["image_id"], own["inliers"]) == (plain["image_id"], plain["inliers"])
    assert own["false_alarm"] != plain["false_alarm"]


def test_the_bar_can_be_given_to_search(workplace: Path) -> None:
    query = ("search", "photos/thing5/a.png", "--max-false-alarm")
    assert call(workplace, *query, "0.5").returncode == 0
    assert call(workplace, *query, "1e-300").returncode == 1
    refused = call(workplace, *query, "2")
    assert refused.returncode == 2
    assert "max_false_alarm" in refused.stderr


def test_a_file_that_is_no_calibration_is_one_sentence(workplace: Path) -> None:
    (workplace / "broken.json").write_text("{}")
    done = call(workplace, "search", "photos/thing5/a.png", DELF_MILVUS_VERIFY__CALIBRATION="broken.json")
    assert done.returncode == ModelError.exit_code
    assert done.stderr.startswith("Error: broken.json is not a calibration of this version")
