"""A rebuild for another model, on Milvus Lite and a real server: nothing is lost, and who searches notices nothing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RgbImage, make_photo, save_photo
from model.models import write_tiny_model
from pymilvus import MilvusClient

from delf_milvus import DelfIndex, Settings
from delf_milvus.errors import CollectionError, UsageError
from delf_milvus.settings import ExtractSettings, StoreSettings
from delf_milvus.store.feature_store import FeatureStore

EXTRACT = ExtractSettings(scales=(0.5, 1.0), longest_side=320, stored_features=60, query_features=60)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An old and a new model."""
    folder = tmp_path_factory.mktemp("models")
    return tuple(write_tiny_model(folder / f"{seed}.safetensors", seed) for seed in (0, 1))  # type: ignore[return-value]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for seed in range(6):
        save_photo(tmp_path / "photos" / f"{seed}.png", make_photo(seed, 160, 120))
    return tmp_path / "photos"


ON_BOTH = pytest.mark.parametrize("place", ["lite", pytest.param("server", marks=pytest.mark.server)], indirect=True)
IN_A_DATABASE = pytest.mark.parametrize(
    "place", ["lite", pytest.param("database", marks=pytest.mark.server)], indirect=True
)


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, models: tuple[Path, Path]) -> Iterator[Settings]:
    """Settings with the old model, and a collection of their own; on Milvus Lite unless asked for otherwise."""
    name = f"r{uuid.uuid4().hex[:12]}"
    kind = getattr(request, "param", "lite")
    uri = str(tmp_path / "photos.db") if kind == "lite" else request.getfixturevalue("milvus").uri
    database = name if kind == "database" else ""
    if database:
        root = MilvusClient(uri, dedicated=True)
        root.create_database(database)
    store = StoreSettings(db_name=database)
    yield Settings(uri=uri, collection=name, model=str(models[0]), extract=EXTRACT, store=store)
    client = MilvusClient(uri, db_name=database, dedicated=True)
    for suffix in ("current", "images", "features"):
        client.drop_alias(f"{name}_{suffix}")
    for collection in client.list_collections():
        if collection.startswith(name):
            client.drop_collection(collection)
    client.close()
    if database:
        root.drop_database(database)
        root.close()


def rebuild(place: Settings, model: Path, **options: Any) -> Any:
    with DelfIndex.open(settings=place, model=model, create=False, any_model=True) as index:
        return index.reindex(**options)


def answers(index: DelfIndex, seeds: range = range(3)) -> list[list[dict[str, Any]]]:
    results = [index.search(cropped(seed), include_unverified=True) for seed in seeds]
    return [[hit.to_dict() for hit in result.hits] for result in results]


def cropped(seed: int) -> RgbImage:
    return np.ascontiguousarray(make_photo(seed, 160, 120)[10:110, 15:150])


def as_tenant(place: Settings, tenant: str, **values: Any) -> Settings:
    return place.model_copy(update={"store": place.store.model_copy(update={"tenant": tenant, **values})})


@ON_BOTH
def test_a_rebuild_takes_every_tenant_and_keeps_them_apart(
    place: Settings, models: tuple[Path, Path], photos: Path, tmp_path: Path
) -> None:
    # Both tenants have photos of the same ids, not all of them with the same content.
    other = tmp_path / "other"
    for seed in (0, 1, 9):
        save_photo(other / f"{min(seed, 2)}.png", make_photo(seed, 160, 120))
    apart = {"tenant_field": "owner", "fields": {"year": "integer=0"}}
    for tenant, folder in (("a", photos), ("b", other)):
        with DelfIndex.open(settings=as_tenant(place, tenant, **apart)) as index:
            index.ingest([folder])
            if tenant == "b":
                index.delete(["0.png"])
    with (
        DelfIndex.open(settings=as_tenant(place, "b"), model=models[1], create=False, any_model=True) as index,
        pytest.raises(UsageError, match="leave --tenant out"),
    ):
        index.reindex()
    report = rebuild(place, models[1])
    assert (report.switched, report.extracted, report.images, report.removed) == (True, 8, 8, 0)
    fresh = place.model_copy(update={"collection": f"{place.collection}f", "model": str(models[1])})
    for tenant, folder in (("a", photos), ("b", other)):
        mine = as_tenant(place, tenant).model_copy(update={"model": str(models[1])})
        with (
            DelfIndex.open(settings=as_tenant(fresh, tenant, **apart)) as plain,
            DelfIndex.open(settings=mine, create=False) as index,
        ):
            plain.ingest([folder])
            if tenant == "b":
                plain.delete(["0.png"])
            assert [one.image_id for one in index.list()] == [one.image_id for one in plain.list()]
            assert answers(index) == answers(plain)
            assert {one.tenant for one in index.list()} == {tenant}
    # A tenant whose last image is deleted from the current generation is still emptied in one that is filled later.
    with DelfIndex.open(settings=as_tenant(place, "b"), model=models[1], create=False) as index:
        index.delete([one.image_id for one in index.list()])
    again = rebuild(place, models[0])
    assert (again.switched, again.removed, again.images) == (True, 2, 6)


def test_a_rebuilt_collection_indexes_as_many_features_as_before(
    place: Settings, models: tuple[Path, Path], photos: Path
) -> None:
    few = place.store.model_copy(update={"indexed_features": 20})
    with DelfIndex.open(settings=place.model_copy(update={"store": few})) as index:
        index.ingest([photos])
    assert rebuild(place, models[1]).switched
    with DelfIndex.open(settings=place, model=models[1], create=False) as index:
        assert index.status()["features"] == 6 * 20
        assert {record.feature_count for record in index.list()} == {20}
        assert answers(index)
        # Unchanged photos are left alone, and changed ones indexed as the others.
        save_photo(photos / "0.png", make_photo(7, 160, 120))
        report = index.ingest([photos])
        assert (report.updated, report.unchanged, index.status()["features"]) == (1, 5, 6 * 20)


@ON_BOTH
def test_a_rebuilt_collection_answers_as_a_fresh_one_and_its_readers_notice_nothing(
    place: Settings, models: tuple[Path, Path], photos: Path
) -> None:
    listing = photos.parent / "photos.csv"
    listing.write_text("path,id,year\n" + "".join(f"{s}.png,photo {s},{1990 + s}\n" for s in range(6)))
    with DelfIndex.open(settings=place) as reader:
        reader.ingest([photos], ids_from=listing)
        before = answers(reader)
        old_records = reader.list()
        during: list[bool] = []

        def look(_: object) -> None:
            during.append(answers(reader, range(1)) == before[:1])

        report = rebuild(place, models[1], progress=look)
        assert (report.switched, report.extracted, report.images, report.missing) == (True, 6, 6, [])
        assert (report.previous, report.generation) == (place.collection, f"{place.collection}_g2")
        assert len(during) > 6
        assert all(during)
        # After the switch, the reader goes on with what it opened; what it wrote would be seen by nobody.
        assert answers(reader) == before
        with pytest.raises(CollectionError, match="open it again"):
            reader.add(make_photo(7), "7")
        with pytest.raises(CollectionError, match="open it again"):
            reader.delete(["photo 1"])

    with pytest.raises(CollectionError, match="another model"):
        DelfIndex.open(settings=place, create=False)
    fresh = place.model_copy(update={"collection": f"{place.collection}_fresh", "model": str(models[1])})
    with DelfIndex.open(settings=fresh) as index:
        index.ingest([photos], ids_from=listing)
        expected = answers(index)
    with DelfIndex.open(settings=place, model=models[1], create=False) as index:
        assert answers(index) == expected
        assert expected != before
        for old, new in zip(old_records, index.list(), strict=True):
            for kept in ("image_id", "uri", "root", "sha256", "metadata", "ingested_at"):
                assert getattr(new, kept) == getattr(old, kept)
        status = index.status()
        assert (status["generation"], status["alias"]) == (report.generation, f"{place.collection}_current")
        report = index.ingest([photos], ids_from=listing)
        assert (report.unchanged, report.added) == (6, 0)


def test_what_happens_to_the_old_collection_meanwhile_is_caught_up(
    place: Settings, models: tuple[Path, Path], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DelfIndex.open(settings=place) as writer:
        writer.ingest([photos])
        done = False
        switch = FeatureStore.become_current

        def at_the_switch(store: FeatureStore) -> None:
            writer.add(save_photo(photos / "last.png", make_photo(33, 160, 120)), "last.png")
            switch(store)
            # From here on others write to the new collection, and a late look at the old one must not undo that.
            with DelfIndex.open(settings=place, model=models[1], create=False) as other:
                assert other.delete(["2.png"]) == ["2.png"]
                other.add(save_photo(photos / "3.png", make_photo(34, 160, 120)), "3.png", {"new": True})

        monkeypatch.setattr(FeatureStore, "become_current", at_the_switch)

        def meddle(_: object) -> None:
            nonlocal done
            if not done:
                done = True
                save_photo(photos / "1.png", make_photo(31, 160, 120))
                save_photo(photos / "late.png", make_photo(32, 160, 120))
                writer.ingest([photos])
                writer.delete(["0.png"])

        report = rebuild(place, models[1], progress=meddle)
        assert (report.switched, report.removed) == (True, 1)
        expected = {record.image_id: record.sha256 for record in writer.list()}
        expected.pop("2.png")
        expected["3.png"] = hashlib.sha256((photos / "3.png").read_bytes()).hexdigest()
    with DelfIndex.open(settings=place, model=models[1], create=False) as index:
        assert {record.image_id: record.sha256 for record in index.list()} == expected
        assert {"late.png", "last.png"} < expected.keys()
        assert index.show("3.png").metadata == {"new": True}
        best = index.search(make_photo(31, 160, 120), include_unverified=True).hits[0]
        assert best.image_id == "1.png"


def test_missing_photos_hold_the_switch_and_old_generations_stay_until_dropped(
    place: Settings, models: tuple[Path, Path], photos: Path
) -> None:
    with DelfIndex.open(settings=place) as index:
        index.ingest([photos])
        index.add(make_photo(9, 160, 120), "no file")
    (photos / "2.png").unlink()
    (photos / "3.png").write_bytes(b"no photo")
    report = rebuild(place, models[1])
    assert not report.switched
    assert {Path(failure.path).name for failure in report.missing} == {"2.png", "3.png", ""}
    with DelfIndex.open(settings=place, create=False) as index:
        assert len(index.list()) == 7
    report = rebuild(place, models[1], allow_missing=True)
    assert (report.switched, report.extracted, report.images, len(report.missing)) == (True, 0, 4, 3)
    # The way back: the old generation is still there, and only what changed since is extracted.
    save_photo(photos / "new.png", make_photo(10, 160, 120))
    with DelfIndex.open(settings=place, model=models[1], create=False) as index:
        index.add(photos / "new.png", "new.png")
    report = rebuild(place, models[0])
    assert (report.switched, report.extracted, report.generation) == (True, 1, place.collection)
    with DelfIndex.open(settings=place, create=False) as index:
        assert len(index.list()) == 5


def test_an_old_version_of_a_photo_that_is_gone_does_not_come_back(
    place: Settings, models: tuple[Path, Path], photos: Path
) -> None:
    with DelfIndex.open(settings=place) as index:
        index.ingest([photos])
    assert rebuild(place, models[1]).switched
    for name in ("2.png", "3.png", "4.png"):
        save_photo(photos / name, make_photo(40, 160, 120))
    with DelfIndex.open(settings=place, model=models[1], create=False) as index:
        index.ingest([photos])
    (photos / "1.png").unlink()
    (photos / "2.png").unlink()
    (photos / "3.png").write_bytes(b"no photo")
    report = rebuild(place, models[0], allow_missing=True)
    # The generation that was left has the others as they were, 1.png too.
    assert {Path(failure.path).name for failure in report.missing} == {"2.png", "3.png"}
    assert (report.switched, report.extracted, report.images) == (True, 1, 4)
    with DelfIndex.open(settings=place, create=False) as index:
        assert {record.image_id for record in index.list()} == {"0.png", "1.png", "4.png", "5.png"}
        assert index.fsck().findings == []


def test_names_of_others_are_left_alone(place: Settings, models: tuple[Path, Path], photos: Path) -> None:
    with DelfIndex.open(settings=place) as index:
        index.ingest([photos])
    client = MilvusClient(place.uri, dedicated=True)
    try:
        theirs = f"{place.collection}_g2_images"
        client.create_collection(theirs, dimension=4)
        client.create_collection(f"{place.collection}_theirs", dimension=4)
        client.create_alias(f"{place.collection}_theirs", f"{place.collection}_current")
        with pytest.raises(CollectionError, match="somebody else"):
            rebuild(place, models[1])
        client.drop_alias(f"{place.collection}_current")
        report = rebuild(place, models[1], drop_old=True)
        assert report.generation == f"{place.collection}_g3"
        assert client.has_collection(theirs)
    finally:
        client.close()


@IN_A_DATABASE
def test_a_killed_rebuild_goes_on_where_it_was(place: Settings, models: tuple[Path, Path], photos: Path) -> None:
    for seed in range(6, 40):
        save_photo(photos / f"{seed}.png", make_photo(seed, 160, 120))
    with DelfIndex.open(settings=place) as index:
        index.ingest([photos])
    program = textwrap.dedent(
        f"""
        import os, signal, time
        from pymilvus.exceptions import MilvusException
        from delf_milvus import DelfIndex, Settings
        settings = Settings.model_validate_json({place.model_dump_json()!r})
        def stop(progress):
            while progress.extracted >= 24:
                try:
                    client = index.store.connection.client
                    rows = client.query("{place.collection}_g2_images", filter="", output_fields=["count(*)"])
                except MilvusException:
                    rows = [{{"count(*)": 0}}]
                if rows[0]["count(*)"]:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0.1)
        with DelfIndex.open(settings=settings, model={str(models[1])!r}, create=False, any_model=True) as index:
            index.reindex(progress=stop)
        """
    )
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with DelfIndex.open(settings=place, create=False) as index:
        assert len(index.list()) == 40
    report = rebuild(place, models[1], drop_old=True)
    assert (report.switched, report.images, report.dropped) == (True, 40, [place.collection])
    assert 5 <= report.extracted < 40
    client = MilvusClient(place.uri, db_name=place.store.db_name, dedicated=True)
    left = [name for name in client.list_collections() if name.startswith(place.collection)]
    assert sorted(left) == [f"{place.collection}_g2_features", f"{place.collection}_g2_images"]
    # Whoever reads with plain Milvus finds the current generation under the plain names.
    for suffix in ("images", "features"):
        described = client.describe_collection(f"{place.collection}_{suffix}")
        assert described["collection_name"] == f"{place.collection}_g2_{suffix}"
    client.close()
    again = rebuild(place, models[1])
    assert (again.switched, again.extracted, again.images) == (True, 0, 40)


def test_the_command_says_what_it_did(tmp_path: Path, models: tuple[Path, Path], photos: Path) -> None:
    environment = {
        **os.environ,
        "DELF_MILVUS_EXTRACT__LONGEST_SIDE": "320",
        "DELF_MILVUS_EXTRACT__STORED_FEATURES": "60",
    }

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from delf_milvus.cli.main import run; run()", *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    old, new = models
    assert call("--model", old, "reindex").returncode == 4
    assert call("--model", old, "ingest", "photos").returncode == 0
    (photos / "4.png").unlink()
    refused = call("reindex", "--model", new)
    assert refused.returncode == 1
    assert "missing: 4.png: its photo is not at" in refused.stderr
    assert "--allow-missing" in refused.stderr
    done = call("--json", "reindex", "--model", new, "--allow-missing", "--drop-old")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert (report["switched"], report["images"], report["dropped"]) == (True, 5, ["delf"])
    status = json.loads(call("--json", "status").stdout)
    assert (status["generation"], status["alias"], status["images"]) == ("delf_g2", "delf_current", 5)
    again = call("reindex", "--model", new)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("5 images in delf_g2, 0 extracted")
