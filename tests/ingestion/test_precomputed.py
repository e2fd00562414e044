"""Features that were made elsewhere, from files to answers on Milvus Lite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from conftest import make_photo, save_photo
from featurefiles.samples import local_features, sift
from model.models import write_tiny_model

from delf_milvus.errors import CollectionError, InputError, ModelError, UsageError
from delf_milvus.evaluation.recalibration import RecalibrationConfig, recalibrate
from delf_milvus.featurefiles import hloc, npz
from delf_milvus.featurefiles.arrays import LocalFeatures
from delf_milvus.featurefiles.folder import FeatureFolder
from delf_milvus.features import Features, Fingerprint
from delf_milvus.index import DelfIndex
from delf_milvus.ingestion.extraction import extract_photos
from delf_milvus.ingestion.scan import scan
from delf_milvus.matcher import PhotoMatcher
from delf_milvus.settings import Settings, VerifySettings
from delf_milvus.store.records import ImageRecord

SCENES = 5


def scene(seed: int) -> npt.NDArray[np.uint8]:
    """A generated photo with enough corners for SIFT."""
    return make_photo(seed, 640, 480)


def write_npz(folder: Path, name: str, found: LocalFeatures) -> None:
    path = folder / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    npz.write(path, found)


def write_h5(folder: Path, name: str, found: LocalFeatures) -> None:
    pytest.importorskip("h5py", reason="needs the extra hloc")
    folder.mkdir(parents=True, exist_ok=True)
    hloc.write(folder / "all.h5", name, found)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., DelfIndex]:
    def opened(**options: object) -> DelfIndex:
        return DelfIndex.open(tmp_path / "test.db", any_model=True, **options)

    return opened


@pytest.mark.parametrize("has_scales", [True, False])
@pytest.mark.parametrize("write", [write_npz, write_h5])
def test_sift_features_are_ingested_searched_and_verified(
    write: Callable[[Path, str, LocalFeatures], None],
    has_scales: bool,
    tmp_path: Path,
    opened: Callable[..., DelfIndex],
) -> None:
    folder = tmp_path / "features"
    for seed in range(SCENES):
        found = sift(scene(seed))
        write(folder, f"db/{seed}.jpg", found if has_scales else replace(found, scales=None))
    query = sift(np.ascontiguousarray(scene(2)[20:460, 30:620]))
    npz.write(tmp_path / "query.npz", query if has_scales else replace(query, scales=None))
    with opened() as index:
        report = index.ingest_features([folder], "sift-opencv")
        assert (report.added, report.failures) == (SCENES, [])
        assert index.made_elsewhere == "sift-opencv"
        status = index.status()
        assert (status["made_elsewhere"], status["fingerprint"]["dim"]) == ("sift-opencv", 128)
        result = index.search(index.read_features(tmp_path / "query.npz"))
        assert result.matched
        assert not result.calibrated
        best = result.hits[0]
        assert (best.image_id, best.verified) == ("db/2.jpg", True)
        assert best.transform is not None
        # The query's corner (0, 0) is (30, 20) of the photo.
        assert np.allclose(np.array(best.transform), [[1, 0, 30], [0, 1, 20]], atol=2)
        assert np.allclose(np.array(best.transform)[:, :2], np.eye(2), atol=0.03)
    with opened() as index:
        again = index.ingest_features([folder], "sift-opencv")
        assert (again.unchanged, again.added, again.updated) == (SCENES, 0, 0)


@pytest.mark.parametrize("format", ["npz", "hloc"])
def test_extracted_features_answer_as_their_photos_do(format: str, tmp_path: Path) -> None:
    if format == "hloc":
        pytest.importorskip("h5py", reason="needs the extra hloc")
    photos = tmp_path / "photos"
    for seed in range(SCENES):
        save_photo(photos / ("more" if seed == 4 else ".") / f"{seed}.png", make_photo(seed))
    save_photo(tmp_path / "query.png", np.ascontiguousarray(make_photo(2)[20:220, 30:300]))
    settings = Settings(model=str(write_tiny_model(tmp_path / "tiny.safetensors")))
    matcher = PhotoMatcher(settings)
    for paths, out in (([photos], "features"), ([tmp_path / "query.png"], "queries")):
        folder = FeatureFolder(tmp_path / out, format, matcher.fingerprint)  # type: ignore[arg-type]
        report = extract_photos(scan(paths), folder, lambda: matcher.extractor, settings)
        assert report.failures == []
    place = "queries/query.png.npz" if format == "npz" else "queries/features.h5#query.png"

    with DelfIndex.open(tmp_path / "a.db", settings=settings) as index:
        index.ingest([photos])
        expected = index.search(tmp_path / "query.png", include_unverified=True)
        ids = [record.image_id for record in index.list()]
    with DelfIndex.open(tmp_path / "b.db", settings=settings, any_model=True) as index:
        assert index.ingest_features([tmp_path / "features"]).added == SCENES
        assert [record.image_id for record in index.list()] == ids
        features = index.read_features(tmp_path / place)
        found = index.search(features, include_unverified=True)
    # No index of its own kind: photos are searched there too, by the model that its features name.
    with DelfIndex.open(tmp_path / "b.db", settings=settings) as index:
        photo = index.search(tmp_path / "query.png", include_unverified=True)
    answers = [
        [{name: value for name, value in hit.to_dict().items() if name != "uri"} for hit in result.hits]
        for result in (expected, found, photo)
    ]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0]["image_id"] == "2.png"
    assert expected.model == found.model


def test_ids_are_names_below_the_folder_without_suffix(tmp_path: Path, opened: Callable[..., DelfIndex]) -> None:
    for name in ("a.jpg", "day/b", "day/c.npz.jpg"):
        write_npz(tmp_path / "f", name, local_features(0, 20, 8))
    with opened() as index:
        index.ingest_features([tmp_path / "f"], "net", id_prefix="x/")
        assert [record.image_id for record in index.list()] == ["x/a.jpg", "x/day/b", "x/day/c.npz.jpg"]
        assert index.show("x/day/b").uri == str(tmp_path / "f" / "day" / "b.npz")


def test_features_beyond_the_limit_are_cut_by_score(tmp_path: Path, opened: Callable[..., DelfIndex]) -> None:
    found = local_features(0, 50, 8)
    write_npz(tmp_path / "f", "a", found)
    settings = Settings(extract={"stored_features": 12})
    with opened(settings=settings) as index:
        index.ingest_features([tmp_path / "f"], "net")
        ((_, stored),) = index.store.sample(1, 0).values()
    assert len(stored) == 12
    assert found.scores is not None
    assert np.allclose(stored.attention, np.sort(found.scores)[::-1][:12], atol=2e-3)


def test_makers_and_lengths_are_never_mixed(tmp_path: Path, opened: Callable[..., DelfIndex]) -> None:
    write_npz(tmp_path / "a", "a", local_features(0, 20, 8))
    write_npz(tmp_path / "b", "b", local_features(0, 20, 16))
    write_npz(tmp_path / "c", "c", local_features(0, 20, 8, extractor="other-net"))
    write_npz(tmp_path / "d", "d", local_features(0, 20, 8))
    write_npz(tmp_path / "d", "e", local_features(0, 20, 16))
    with opened() as index:
        index.ingest_features([tmp_path / "a"], "net")
        with pytest.raises(CollectionError, match="dim: 8 here, 16 there"):
            index.ingest_features([tmp_path / "b"], "net")
        with pytest.raises(CollectionError, match="weights: net here, net-2 there"):
            index.ingest_features([tmp_path / "a"], "net-2")
        with pytest.raises(CollectionError, match="weights: net here, other-net there"):
            index.ingest_features([tmp_path / "c"], "net")
        report = index.ingest_features([tmp_path / "d"], "net")
        assert (report.added, len(report.failures)) == (1, 1)
        assert "dim: 8 here, 16 there" in report.failures[0].error
        for place, problem in (("b/b.npz", "dim: 8 here, 16 there"), ("c/c.npz", "weights: net here, other-net there")):
            with pytest.raises(CollectionError, match=problem):
                index.read_features(tmp_path / place)
    with pytest.raises(CollectionError, match=r"made elsewhere \(net, 8 components\)"):
        DelfIndex.open(tmp_path / "test.db")


def test_what_needs_the_model_says_that_there_is_none(tmp_path: Path, opened: Callable[..., DelfIndex]) -> None:
    write_npz(tmp_path / "a", "a", local_features(0, 20, 8))
    photo = save_photo(tmp_path / "photo.png", make_photo(0))
    with opened() as index:
        index.ingest_features([tmp_path / "a"], "net")
        needs: list[Callable[[], object]] = [
            lambda: index.search(photo),
            lambda: index.explain(photo, "a"),
            lambda: index.add(photo, "b"),
            lambda: index.ingest([photo]),
            index.reindex,
            index.require_model,
        ]
        for one in needs:
            with pytest.raises(CollectionError, match=r"made elsewhere \(net"):
                one()
        check = next(check for check in DelfIndex.doctor(client=index.store.connection.client) if check.name == "model")
        assert (check.state, "net" in check.what) == ("ok", True)


def test_features_of_unknown_make_are_refused(tmp_path: Path, opened: Callable[..., DelfIndex]) -> None:
    write_npz(tmp_path / "a", "a", local_features(0, 20, 8))
    with opened() as index:
        with pytest.raises(UsageError, match="--features-name"):
            index.ingest_features([tmp_path / "a"])
        with pytest.raises(UsageError, match="named by at most 100 letters"):
            index.ingest_features([tmp_path / "a"], "a/b")
        assert not index.status()["exists"]


def test_a_query_for_our_own_collection_must_say_who_made_it(tmp_path: Path) -> None:
    settings = Settings(model=str(write_tiny_model(tmp_path / "tiny.safetensors")))
    photo = save_photo(tmp_path / "photos" / "a.png", make_photo(0))
    npz.write(tmp_path / "q.npz", local_features(0, 20, 16))
    with DelfIndex.open(tmp_path / "test.db", settings=settings) as index:
        index.ingest([photo])
        with pytest.raises(CollectionError, match="does not say which model made its features"):
            index.read_features(tmp_path / "q.npz")


def test_damaged_files_are_listed_and_the_others_stored(tmp_path: Path, opened: Callable[..., DelfIndex]) -> None:
    folder = tmp_path / "f"
    write_npz(folder, "good", local_features(0, 20, 8))
    write_npz(folder, "nan", replace(local_features(1, 20, 8), keypoints=np.full((20, 2), np.nan, np.float32)))
    (folder / "bad.npz").write_bytes(b"PK nothing")
    (folder / "old.delf").write_bytes(b"nothing")
    with opened() as index:
        report = index.ingest_features([folder], "net")
    assert report.added == 1
    assert sorted(Path(failure.path).name for failure in report.failures) == ["bad.npz", "nan.npz", "old.delf"]
    assert all(failure.error.count("\n") == 0 for failure in report.failures)


def test_a_photo_without_features_is_stored_as_such(tmp_path: Path, opened: Callable[..., DelfIndex]) -> None:
    write_npz(tmp_path / "f", "a", local_features(0, 20, 8))
    write_npz(tmp_path / "f", "none", local_features(0, 0, 8))
    with opened() as index:
        report = index.ingest_features([tmp_path / "f"], "net")
        assert (report.added, report.sparse) == (2, ["none"])


def test_nothing_readable_is_one_sentence(tmp_path: Path, opened: Callable[..., DelfIndex]) -> None:
    (tmp_path / "f").mkdir()
    with opened() as index, pytest.raises(InputError, match="None of these feature files can be read"):
        index.ingest_features([tmp_path / "f"], "net")
    (tmp_path / "photo.png").write_bytes(b"")
    with opened() as index, pytest.raises(UsageError, match="is not a feature file"):
        index.ingest_features([tmp_path / "photo.png"], "net")


def test_two_files_of_one_id_are_told(tmp_path: Path, opened: Callable[..., DelfIndex]) -> None:
    write_npz(tmp_path / "f", "a", local_features(0, 20, 8))
    (tmp_path / "f" / "a.delf").write_bytes(b"")
    with opened() as index, pytest.raises(UsageError, match="would stand for both"):
        index.ingest_features([tmp_path / "f"], "net")


def test_prune_removes_what_left_the_disk(tmp_path: Path, opened: Callable[..., DelfIndex]) -> None:
    for name in ("a", "b"):
        write_npz(tmp_path / "f", name, local_features(0, 20, 8))
    with opened() as index:
        index.ingest_features([tmp_path / "f"], "net")
        (tmp_path / "f" / "a.npz").unlink()
        report = index.ingest_features([tmp_path / "f"], "net", prune=True)
        assert (report.removed, report.unchanged) == (1, 1)
        assert [record.image_id for record in index.list()] == ["b"]


def test_prune_removes_what_left_an_h5_file(tmp_path: Path, opened: Callable[..., DelfIndex]) -> None:
    h5py = pytest.importorskip("h5py", reason="needs the extra hloc")
    for name in ("db/a", "db/b"):
        write_h5(tmp_path, name, local_features(0, 20, 8))
    with opened() as index:
        index.ingest_features([tmp_path / "all.h5"], "net")
        with h5py.File(tmp_path / "all.h5", "a") as file:
            del file["db/a"]
        report = index.ingest_features([tmp_path / "all.h5"], "net", prune=True)
        assert (report.removed, report.unchanged) == (1, 1)
        # What cannot be read is not gone.
        (tmp_path / "all.h5").write_bytes(b"damaged")
        report = index.ingest_features([tmp_path / "all.h5"], "net", prune=True)
        assert (report.removed, len(report.failures)) == (0, 1)


def test_a_listing_gives_ids_and_metadata(tmp_path: Path, opened: Callable[..., DelfIndex]) -> None:
    for name in ("a.jpg", "b.jpg"):
        write_npz(tmp_path / "f", name, local_features(0, 20, 8))
    (tmp_path / "list.csv").write_text("path,id,year\na.jpg.npz,,1990\nb.jpg.npz,second,2001\n")
    with opened() as index:
        index.ingest_features([tmp_path / "f"], "net", ids_from=tmp_path / "list.csv")
        records = {record.image_id: record.metadata for record in index.list()}
    assert records == {"a.jpg": {"year": "1990"}, "second": {"year": "2001"}}


def test_features_from_memory(tmp_path: Path) -> None:
    photos = [sift(scene(seed)).features(300, "memory") for seed in range(SCENES)]
    made_by = Fingerprint.elsewhere("sift-opencv", 128)
    with DelfIndex.open(tmp_path / "test.db", made_by=made_by) as index:
        for seed, features in enumerate(photos):
            index.add_features(features, f"{seed}", {"seed": seed})
        hit = index.search(photos[3]).hits[0]
        assert (hit.image_id, hit.metadata, hit.verified) == ("3", {"seed": 3}, True)
        boxed = index.search(photos[3], box=(0, 0, 320, 480))
        assert 0 < boxed.query_features < len(photos[3])
        with pytest.raises(CollectionError, match="components"):
            index.add_features(local_features(0, 20, 8).features(20, "memory"), "wrong")
        assert isinstance(index.read_features(_saved(tmp_path, photos[3])), Features)


def _saved(folder: Path, features: Features) -> Path:
    npz.write(folder / "q.npz", LocalFeatures.of(features))
    return folder / "q.npz"


def test_stored_features_calibrate_their_collection_without_a_model(tmp_path: Path) -> None:
    settings = Settings(model=str(tmp_path / "absent.safetensors"), search={"neighbours": 20})
    made_by = Fingerprint.elsewhere("net", 8)
    with DelfIndex.open(tmp_path / "test.db", settings=settings, made_by=made_by) as index:
        items = [
            (ImageRecord(f"{number % 4}/{number}", "", "", ""), local_features(number, 20, 8).features(20, "memory"))
            for number in range(130)
        ]
        index.store.write(items)
        index.store.ensure_index()
        bundled = settings.model_copy(update={"model": "bundled"})
        with pytest.raises(ModelError, match="There is no model file"):
            index.calibration  # noqa: B018 - the property reads it
    with DelfIndex.open(tmp_path / "test.db", settings=bundled, any_model=True) as index:
        calibration, report = recalibrate(index, RecalibrationConfig())
        calibration.write(tmp_path / "own.json")
    assert (report.queries, report.failed) == (130, 0)
    assert report.after <= 0.05
    own = bundled.model_copy(update={"verify": VerifySettings(calibration=str(tmp_path / "own.json"))})
    with DelfIndex.open(tmp_path / "test.db", settings=own, any_model=True) as index:
        assert index.search(items[0][1]).calibrated


def test_too_many_fields_are_told_before_anything_is_written(tmp_path: Path, opened: Callable[..., DelfIndex]) -> None:
    write_npz(tmp_path / "f", "a", local_features(0, 20, 2048))
    settings = Settings(extract={"stored_features": 4096})
    with opened(settings=settings) as index:
        with pytest.raises(CollectionError, match="keep fewer with --count"):
            index.ingest_features([tmp_path / "f"], "net")
        assert not index.status()["exists"]
