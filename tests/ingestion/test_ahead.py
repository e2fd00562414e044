"""Reading ahead in bounded memory, and many photos at once: the same features as one by one."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import RgbImage, make_photo, save_photo
from model.models import write_tiny_model

from delf_milvus import DelfIndex, Settings
from delf_milvus.errors import InputError
from delf_milvus.features import Features
from delf_milvus.ingestion.ahead import Ahead, PhotoExtraction, ready
from delf_milvus.ingestion.pipeline import ingest_photos
from delf_milvus.ingestion.scan import scan
from delf_milvus.model.extractor import Extractor
from delf_milvus.settings import ExtractSettings, IngestSettings
from delf_milvus.store.keys import image_key


class Together(Extractor):
    """Extracts on the CPU as many photos at once as on a GPU."""

    passes: list[int]

    @property
    def most_together(self) -> int:
        return 8

    def extract_many(self, photos: list[RgbImage], count: int) -> list[Features]:  # type: ignore[override]
        if any(photo.max() == 0 for photo in photos):
            raise RuntimeError("a black photo\nand what follows")
        self.passes.append(len(photos))
        return super().extract_many(photos, count)

    def extract(self, photo: RgbImage, count: int, box: object = None) -> Features:
        return self.extract_many([photo], count)[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def together(model: Path) -> Together:
    extractor = Together(model, ExtractSettings(preset="fast", precision="fp32"))
    extractor.passes = []
    return extractor


class Counted:
    """Doubles numbers, and waits to be let go on; how many began, and how many at most at a time."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.changed = threading.Condition()
        self.begun = self.running = self.most = 0

    def __call__(self, number: int) -> int:
        with self.changed:
            self.begun += 1
            self.running += 1
            self.most = max(self.most, self.running)
            self.changed.notify_all()
        self.go_on.wait()
        with self.changed:
            self.running -= 1
        return 2 * number

    def wait_for(self, begun: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.begun >= begun, timeout=60)


def test_what_is_prepared_comes_in_order_and_no_more_waits_than_asked() -> None:
    doubled = Counted()
    doubled.go_on.set()
    with Ahead(doubled, range(50), IngestSettings(queue=5, decode_threads=3)) as ahead:
        taken = 0
        for number, future in ahead:
            assert (number, future.result()) == (taken, 2 * taken)
            taken += 1
            assert doubled.begun <= taken + 5
    assert taken == 50
    assert doubled.most <= 3


def test_more_threads_and_more_waiting_once_many_are_taken_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    doubled = Counted()
    with Ahead(doubled, range(40), IngestSettings(queue=4)) as ahead:
        taken = iter(ahead)
        next(taken)
        doubled.wait_for(2)
        ahead.widen(1)
        assert doubled.most == 2
        ahead.widen(8)
        doubled.wait_for(4)
        next(taken)
        doubled.wait_for(6)
        ahead.widen(8)
        assert doubled.most == 6
        doubled.go_on.set()
        assert [future.result() for _, future in taken] == [2 * number for number in range(2, 40)]


def test_threads_that_were_asked_for_stay_as_many() -> None:
    doubled = Counted()
    doubled.go_on.set()
    with Ahead(doubled, range(40), IngestSettings(queue=4, decode_threads=1)) as ahead:
        ahead.widen(16)
        assert [future.result() for _, future in ahead] == [2 * number for number in range(40)]
    assert doubled.most == 1


def test_what_was_not_begun_when_it_ends_never_is() -> None:
    doubled = Counted()
    with Ahead(doubled, range(1000), IngestSettings(queue=20, decode_threads=2)) as ahead:
        list(islice(ahead, 1))
        doubled.wait_for(2)
        doubled.go_on.set()
    assert doubled.begun <= 21


def test_the_reason_of_a_failure_is_given_in_place_of_the_result() -> None:
    def fail(_: int) -> int:
        raise InputError("It is damaged; mend it.")

    with Ahead(fail, [1], IngestSettings()) as ahead:
        (outcome,) = [ready(future) for _, future in ahead]
    assert str(outcome) == "It is damaged; mend it."


def test_photos_of_several_sizes_come_back_in_their_order(model: Path, together: Together) -> None:
    sizes = [(160, 120), (120, 160), (160, 120), (96, 96), (160, 120), (120, 160)]
    photos = [(str(number), make_photo(number, *size)) for number, size in enumerate(sizes)]
    extraction = PhotoExtraction(lambda: together)
    assert extraction.at_once == 1
    found = extraction(photos)
    assert extraction.at_once == 8
    assert sorted(together.passes) == [1, 2, 3]
    plain = Extractor(model, ExtractSettings(preset="fast", precision="fp32"))
    for (_, photo), features in zip(photos, found, strict=True):
        alone = plain.extract(photo, plain.plan.stored_features)
        assert isinstance(features, Features)
        np.testing.assert_array_equal(features.locations, alone.locations)
        np.testing.assert_allclose(features.descriptors, alone.descriptors, atol=1e-4)


def test_a_photo_that_breaks_the_network_fails_none_of_those_beside_it(together: Together) -> None:
    photos = [("a.png", make_photo(0)), ("black\n.png", np.zeros((240, 320, 3), np.uint8)), ("c.png", make_photo(1))]
    first, second, third = PhotoExtraction(lambda: together)(photos)
    assert isinstance(first, Features)
    assert isinstance(third, Features)
    assert str(second) == "black\\n.png cannot be extracted: a black photo."


def test_rows_are_the_same_whether_photos_are_extracted_together_or_alone(
    model: Path, together: Together, tmp_path: Path
) -> None:
    for seed in range(12):
        save_photo(tmp_path / "photos" / f"{seed}.png", make_photo(seed, *((160, 120) if seed % 3 else (120, 96))))
    (tmp_path / "photos" / "5.png").write_bytes(b"no photo")
    save_photo(tmp_path / "photos" / "7.png", np.zeros((120, 160, 3), np.uint8))
    settings = Settings(model=str(model), extract={"preset": "fast", "precision": "fp32"})  # type: ignore[arg-type]
    stored = []
    for name in ("together", "alone"):
        with DelfIndex.open(tmp_path / f"{name}.db", settings=settings) as index:
            plain = index._matcher.extractor
            scanned = scan([tmp_path / "photos"])
            extractor = together if name == "together" else plain
            report = ingest_photos(scanned, index._store, lambda: extractor, plain.fingerprint, settings)  # noqa: B023
            assert (report.added, report.failed) == ((10, 2) if name == "together" else (11, 1))
            rows = index._store.stored([image_key(f"{seed}.png") for seed in range(12) if seed != 7])
            stored.append({record.image_id: features for record, features in rows.values()})
    assert max(together.passes) > 1
    one_by_one, at_once = stored
    assert at_once.keys() == one_by_one.keys() == {f"{seed}.png" for seed in range(12) if seed not in (5, 7)}
    for image_id, features in at_once.items():
        alone = one_by_one[image_id]
        np.testing.assert_array_equal(features.locations, alone.locations)
        np.testing.assert_allclose(features.attention, alone.attention, rtol=1e-3)
        # Stored as int8: rounding may fall to the next step.
        np.testing.assert_allclose(features.descriptors, alone.descriptors, atol=2e-2)
