"""Tuning on tiny collections, on both backends."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import make_photo
from milvus_server import Server
from PIL import Image
from pymilvus import MilvusClient

from delf_milvus import DelfIndex, Settings
from delf_milvus.errors import InputError, UsageError
from delf_milvus.evaluation.tuning import TuningConfig, TuningReport, tune, tuning_picture
from delf_milvus.settings import load

FAST = Settings(extract={"preset": "fast"}, search={"neighbours": 20})  # type: ignore[arg-type]


def fill(index: DelfIndex, scenes: int) -> None:
    """Two views of each scene."""
    for seed in range(scenes):
        photo = make_photo(seed)
        index.add(photo, f"{seed}/whole")
        index.add(np.ascontiguousarray(photo[20:230, 20:300]), f"{seed}/part")


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DelfIndex]:
    with DelfIndex.open(tmp_path_factory.mktemp("tuning") / "photos.db", settings=FAST) as index:
        fill(index, 12)
        yield index


@pytest.fixture
def server(milvus: Server) -> Iterator[DelfIndex]:
    name = f"t{uuid.uuid4().hex[:12]}"
    store = FAST.store.model_copy(update={"m": 10, "nbits": 4})  # builds at once
    with DelfIndex.open(milvus.uri, collection=name, settings=FAST.model_copy(update={"store": store})) as index:
        fill(index, 4)
        yield index
    client = MilvusClient(milvus.uri)
    ours = sorted(c for c in client.list_collections() if c.startswith(name))
    for collection in ours:
        client.drop_collection(collection)
    client.close()
    assert ours == [f"{name}_features", f"{name}_images"]


def check(report: TuningReport, indexes: set[str]) -> None:
    assert {point.index for point in report.points} == indexes
    (flat,) = (point for point in report.points if point.index == "FLAT")
    assert (flat.recall, flat.overlap, flat.same_first, flat.average_precision) == (1, 1, 1, 1)
    assert any(point.on_front for point in report.points)
    for point in report.points:
        assert 0 < point.recall <= 1
        assert 0 < point.median_seconds <= point.p95_seconds
        assert point.bytes_a_row > 48
    assert report.recommended in report.points
    assert report.recommended.quality >= 0.99


def test_lite_is_tuned_with_what_it_has_and_left_as_it_was(lite: DelfIndex) -> None:
    before = lite.index_status()
    said: list[str] = []
    report = tune(lite, TuningConfig(queries=4), said.append)
    check(report, {"FLAT", "IVF_SQ8", "HNSW"})
    assert (report.queries, report.sample_images) == (4, 20)
    assert 0.5 * report.total_rows < report.sample_rows < report.total_rows
    assert len(said) == len(report.points) + 1
    assert lite.index_status() == before
    assert lite.store._client.list_collections() == ["delf_features", "delf_images"]
    visited = [point.search["nprobe"] for point in report.points if point.index == "IVF_SQ8"]
    recalls = [point.recall for point in report.points if point.index == "IVF_SQ8"]
    assert visited == sorted(visited)
    assert recalls == sorted(recalls)


@pytest.mark.server
def test_a_server_is_tuned_with_ivf_pq(server: DelfIndex) -> None:
    report = tune(server, TuningConfig(("FLAT", "IVF_PQ"), queries=2), lambda _: None)
    check(report, {"FLAT", "IVF_PQ"})
    assert report.recommended.settings["profile"] in ("FLAT", "IVF_PQ")


def test_the_recommended_line_is_what_the_settings_read(
    lite: DelfIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tune(lite, TuningConfig(("IVF_SQ8",), queries=2, prefer="latency"), lambda _: None)
    monkeypatch.chdir(tmp_path)
    Path("delf_milvus.toml").write_text(report.recommended_toml + "\n")
    from_file = load().settings.store
    assert (from_file.profile, from_file.nprobe) == ("IVF_SQ8", report.recommended.settings["nprobe"])
    Path("delf_milvus.toml").unlink()
    for assignment in report.recommended_environment.split():
        monkeypatch.setenv(*assignment.split("="))
    assert load().settings.store == from_file


def test_the_picture_shows_the_points(lite: DelfIndex, tmp_path: Path) -> None:
    report = tune(lite, TuningConfig(("FLAT", "HNSW"), queries=2), lambda _: None)
    tuning_picture(report, tmp_path / "front.png")
    with Image.open(tmp_path / "front.png") as picture:
        assert len(picture.getcolors(2**20) or ()) > 20


def test_what_cannot_be_tuned_is_said_before_anything_is_copied(lite: DelfIndex, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Milvus Lite has no DISKANN"):
        tune(lite, TuningConfig(("DISKANN",)), lambda _: None)
    with DelfIndex.open(tmp_path / "small.db", settings=FAST) as small:
        fill(small, 2)
        with pytest.raises(InputError, match="4 images with features; tuning needs at least 8"):
            tune(small, TuningConfig(), lambda _: None)
