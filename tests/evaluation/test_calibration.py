"""Calibration on generated photos and the bundled model: who takes part, what it yields, and when it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import make_photo, save_photo

from delf_milvus.errors import ImageError, InputError
from delf_milvus.evaluation.calibration import CalibrationConfig, calibrate, class_photos, family, judging_photos
from delf_milvus.imaging.decode import decode
from delf_milvus.model.spec import BUNDLED
from delf_milvus.retrieval.confidence import Calibration
from delf_milvus.settings import Settings

SETTINGS = Settings(extract={"preset": "fast"})  # type: ignore[arg-type] # validated by pydantic

TAKING_PART = 56
"""Classes of two photos: 112 queries, and a calibration needs 100."""


def write_classes(root: Path, classes: int, *, judging: bool = True) -> Path:
    """Class folders of two small photos; without `judging`, those of every second class cannot be decoded."""
    for number in range(classes):
        for view in range(2):
            path = root / f"class{number:03d}" / f"{view}.png"
            if judging or number % 2 == 0:
                save_photo(path, make_photo(2 * number + view, 96, 80))
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"not a photo")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("calibration"), 2 * TAKING_PART, judging=False)


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def calibration(data: Path, said: list[str]) -> Calibration:
    return calibrate(CalibrationConfig(data), SETTINGS, say=said.append)


def test_classes_are_the_folders_in_the_order_of_their_names(tmp_path: Path) -> None:
    root = write_classes(tmp_path, 4)
    save_photo(root / "class001" / "inside" / "deep.png", make_photo(0, 32, 32))
    save_photo(root / "loose.png", make_photo(1, 32, 32))
    names = [[path.relative_to(root).as_posix() for path in photos] for photos in class_photos(root)]
    assert names == [
        ["class000/0.png", "class000/1.png"],
        ["class001/0.png", "class001/1.png", "class001/inside/deep.png"],
        ["class002/0.png", "class002/1.png"],
        ["class003/0.png", "class003/1.png"],
    ]


def test_fewer_than_four_classes_are_refused(tmp_path: Path) -> None:
    root = write_classes(tmp_path, 3)
    with pytest.raises(InputError, match="has 3 folders of photos; a calibration needs at least 4"):
        class_photos(root)
    with pytest.raises(InputError, match="at least 4"):
        calibrate(CalibrationConfig(root), SETTINGS, say=lambda _: None)


def test_every_second_class_takes_part_and_the_others_judge(
    data: Path, calibration: Calibration, said: list[str]
) -> None:
    # The judging photos here cannot be decoded: the fit succeeds only because it opens none of them.
    judging = judging_photos(data)
    assert {path.parent.name for path in judging} == {f"class{number:03d}" for number in range(1, 2 * TAKING_PART, 2)}
    with pytest.raises(ImageError):
        decode(judging[0], SETTINGS.decode)
    assert said[0] == f"{TAKING_PART} and {TAKING_PART} photos in two halves, 0 more, 0 that match"


def test_without_photos_that_match_the_weights_are_those_of_the_bundled_model(calibration: Calibration) -> None:
    bundled = Calibration.read(BUNDLED.with_suffix(".calibration.json"))
    assert calibration.answers.weights == bundled.answers.weights
    assert calibration.pairs.weights == bundled.pairs.weights
    assert calibration.answers.unrelated != bundled.answers.unrelated
    assert calibration.chance != bundled.chance


def test_photos_that_match_weigh_the_evidence_anew(data: Path, tmp_path: Path) -> None:
    for place in range(12):
        photo = make_photo(2000 + place, 240, 200)
        for view, (x, y) in enumerate([(0, 0), (20, 10), (8, 16)]):
            save_photo(tmp_path / f"place{place:02d}" / f"{view}.png", photo[y : y + 180, x : x + 210].copy())
    save_photo(tmp_path / "left_out" / "0.png", make_photo(1, 64, 64))
    said: list[str] = []
    config = CalibrationConfig(data, matches=tmp_path, exclude=frozenset({"left_out"}))
    calibration = calibrate(config, SETTINGS, say=said.append)
    assert said[0].endswith("0 more, 36 that match")
    many = np.array([[np.log1p(150), np.log1p(200), np.log1p(120), np.log1p(100), 0.25, 1.0, 1.0]])
    few = np.array([[np.log1p(5), np.log1p(30), 0.0, 0.0, 0.3, 0.0, 0.6]])
    for assess in (calibration.assess, calibration.assess_pairs):
        assert assess(many).confidence[0] > 0.9
        assert assess(many).false_alarm[0] < 0.01
        assert assess(few).confidence[0] < 0.5
        assert assess(few).false_alarm[0] > 0.05


def test_classes_of_one_family_may_share_photos(tmp_path: Path) -> None:
    assert family("crocodile_head") == family("crocodile") == "crocodile"
    assert family("snoopy") != family("garfield")


def test_a_calibration_is_read_as_it_was_written(calibration: Calibration, tmp_path: Path) -> None:
    calibration.write(tmp_path / "model.calibration.json")
    assert Calibration.read(tmp_path / "model.calibration.json") == calibration


def test_the_fill_makes_the_collections_larger(data: Path, tmp_path: Path) -> None:
    fill = tmp_path / "fill"
    for seed in range(3):
        save_photo(fill / f"{seed}.png", make_photo(500 + seed, 64, 48))
    said: list[str] = []
    calibrate(CalibrationConfig(data, fill=(fill,), size=TAKING_PART + 2), SETTINGS, say=said.append)
    assert said[0] == f"{TAKING_PART} and {TAKING_PART} photos in two halves, 2 more, 0 that match"


def test_what_is_too_little_is_refused_before_any_photo_is_read(data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    root = write_classes(tmp_path / "few", 4)
    with pytest.raises(InputError, match="too few photos: 4 of 2 classes take part, and a calibration needs 100"):
        calibrate(CalibrationConfig(root), SETTINGS, say=said.append)
    with pytest.raises(InputError, match="has no folders of photos, one a place or thing"):
        calibrate(CalibrationConfig(data, matches=root, exclude=frozenset(f"class{n:03d}" for n in range(4))), SETTINGS)
    with pytest.raises(InputError, match="absent"):
        calibrate(CalibrationConfig(data, fill=(tmp_path / "absent",)), SETTINGS, say=said.append)
    assert said == []
