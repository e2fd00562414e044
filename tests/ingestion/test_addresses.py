"""Photos behind addresses, in storages that fsspec reads: one in memory and the files of this machine."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import fsspec
import pytest
from conftest import make_photo, save_photo
from model.models import write_tiny_model

from delf_milvus import DelfIndex, Settings
from delf_milvus.errors import InputError, UsageError
from delf_milvus.imaging import remote
from delf_milvus.ingestion.addresses import scan_addresses
from delf_milvus.ingestion.scan import read_listing
from delf_milvus.settings import DecodeSettings


@pytest.fixture
def base() -> Iterator[str]:
    """An address of its own in memory, with four photos."""
    base = f"memory://{uuid.uuid4().hex}/photos"
    for seed, name in enumerate(("a.png", "b/c.PNG", "b/d.png", "e.png")):
        put(f"{base}/{name}", encoded(seed))
    put(f"{base}/.hidden/f.png", encoded(9))
    put(f"{base}/notes.txt", b"no photo")
    yield base
    fsspec.filesystem("memory").rm(base, recursive=True)


def encoded(seed: int) -> bytes:
    return bytes(cv2.imencode(".png", make_photo(seed, 160, 120))[1])


def put(address: str, data: bytes) -> None:
    with fsspec.open(address, "wb") as file:
        file.write(data)


def remove(address: str) -> None:
    fsspec.filesystem("memory").rm(address)


def ids(index: DelfIndex) -> list[str]:
    return [record.image_id for record in index.list()]


def test_photos_behind_an_address_are_stored_found_and_left_alone(tiny_index: DelfIndex, base: str) -> None:
    assert tiny_index.ingest([f"{base}/"]).added == 4
    assert ids(tiny_index) == ["a.png", "b/c.PNG", "b/d.png", "e.png"]
    record = tiny_index.show("b/d.png")
    assert (record.uri, record.root) == (f"{base}/b/d.png", base)
    put(f"{base}/e.png", encoded(20))
    again = tiny_index.ingest([base])
    assert (again.updated, again.unchanged) == (1, 3)
    assert tiny_index.search(make_photo(20, 160, 120), include_unverified=True).hits[0].image_id == "e.png"


def test_they_have_the_rows_that_files_of_the_same_names_have(tiny_index: DelfIndex, base: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("a.png", "b/c.PNG", "b/d.png", "e.png")):
        save_photo(tmp_path / "photos" / name, make_photo(seed, 160, 120))
    for place in (base, tmp_path / "photos", f"file://{tmp_path / 'photos'}"):
        tiny_index.ingest([place], id_prefix=f"{place}: ")
    kept = {}
    for record in tiny_index.list():
        place, _, name = record.image_id.partition(": ")
        assert (record.root, record.uri) == (place, f"{place}/{name}")
        kept.setdefault(name, set()).add((record.feature_count, record.width, record.height, record.model))
    assert [len(one) for one in kept.values()] == [1, 1, 1, 1]


def test_prune_removes_what_left_the_storage_and_only_of_that_address(tiny_index: DelfIndex, base: str) -> None:
    tiny_index.ingest([base])
    tiny_index.add(make_photo(8, 160, 120), "added by hand", uri=f"{base}/no such photo.png")
    remove(f"{base}/a.png")
    assert tiny_index.ingest([base], prune=True, dry_run=True).removed == 1
    assert tiny_index.ingest([base], prune=True).removed == 1
    assert ids(tiny_index) == ["added by hand", "b/c.PNG", "b/d.png", "e.png"]


def test_a_photo_that_cannot_be_read_fails_alone(tiny_index: DelfIndex, base: str) -> None:
    put(f"{base}/empty.png", b"")
    put(f"{base}/no photo.png", b"text")
    report = tiny_index.ingest([base])
    assert (report.added, [failure.path for failure in report.failures]) == (
        4,
        [f"{base}/empty.png", f"{base}/no photo.png"],
    )
    assert report.failures[0].error == f"{base}/empty.png is empty."


@pytest.mark.parametrize("same", [True, False])
def test_a_storage_that_does_not_answer_is_no_sign_that_its_photos_are_gone(
    tiny_index: DelfIndex, base: str, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_index.ingest([base])
    other = f"memory://{uuid.uuid4().hex}/photos"
    put(f"{other}/a.png", encoded(0 if same else 30))
    storage = type(fsspec.filesystem("memory"))
    info = storage.info

    def refusing(self: Any, path: str, **options: Any) -> Any:
        if other.removeprefix("memory:/") not in path and path.endswith("a.png"):
            raise PermissionError(13, "Forbidden")
        return info(self, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "info", refusing)
        report = tiny_index.ingest([other])
    assert (report.added, report.updated, report.unchanged) == (0, 0, 0)
    assert [failure.error for failure in report.failures] == [
        f"Whether the stored photo of the id 'a.png' is gone cannot be told ({base}/a.png cannot be read: "
        "[Errno 13] Forbidden): make it readable, give these photos an --id-prefix of their own, or delete the image."
    ]
    assert tiny_index.show("a.png").uri == f"{base}/a.png"
    remove(f"{base}/a.png")
    report = tiny_index.ingest([other])
    assert (report.updated, report.failures) == (1, [])
    assert tiny_index.show("a.png").uri == f"{other}/a.png"


def test_one_photo_has_its_name_as_id_whatever_its_suffix(tiny_index: DelfIndex, base: str) -> None:
    put(f"{base}/b/photo.raw", encoded(7))
    tiny_index.ingest([f"{base}/b/photo.raw"], id_prefix="p/")
    (record,) = tiny_index.list()
    assert (record.image_id, record.uri, record.root) == ("p/photo.raw", f"{base}/b/photo.raw", f"{base}/b")


@pytest.mark.parametrize("limit", [10, 11])
def test_a_photo_of_too_many_bytes_is_not_read_on(base: str, limit: int) -> None:
    put(f"{base}/long.png", b"x" * 11)
    limits = DecodeSettings(max_bytes=limit)
    if limit == 11:
        assert remote.read(f"{base}/long.png", limits) == b"x" * 11
    else:
        with pytest.raises(InputError, match=r"has more bytes than the limit of 10; .*decode\.max_bytes"):
            remote.read(f"{base}/long.png", limits)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=r"folder\.png is not a file"):
        remote.read(f"file://{tmp_path}/folder.png", DecodeSettings())


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_listing_names_photos_below_the_address_with_ids_and_metadata(
    kind: str, tiny_index: DelfIndex, base: str, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {"path": "a.png", "id": "first", "place": "Rome"},
        {"path": f"{base}/b/d.png", "place": "Bern"},
        {"path": "absent.png"},
    ]
    report = tiny_index.ingest([base], ids_from=listing(tmp_path / f"photos.{kind}", rows))
    assert [(one.image_id, dict(one.metadata)) for one in tiny_index.list()] == [
        ("b/d.png", {"place": "Bern"}),
        ("first", {"place": "Rome"}),
    ]
    assert [failure.error for failure in report.failures] == [f"{base}/absent.png does not exist; check the address."]
    # What a listing leaves out is no reason to prune it.
    assert tiny_index.ingest([base], prune=True, ids_from=tmp_path / f"photos.{kind}").removed == 0


@pytest.mark.parametrize("path", ["memory://elsewhere/a.png", "/a.png", "memory://BASE/../a.png", "../a.png"])
def test_a_listing_leads_nowhere_else(path: str, base: str, tmp_path: Path) -> None:
    path = path.replace("memory://BASE", base)
    with pytest.raises(InputError, match=r"line 2: .* (lies outside of|leaves the folder)"):
        scan_addresses([base], listing=read_listing(listing(tmp_path / "photos.csv", [{"path": path}])))


def listing(path: Path, rows: list[dict[str, Any]]) -> Path:
    import csv
    import json

    import pyarrow as pa
    from pyarrow import parquet

    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), restval="")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    "address",
    [
        "s3://KEY:hush@bucket/photos",
        "https://me@photos.example/x",
        "https://photos.example/a.jpg?X-Amz-Signature=hush",
        "ftp://me:hush@photos.example/x?y=hush",
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(UsageError, match="may have no user, password or query") as refused:
        scan_addresses([address])
    assert "hush" not in str(refused.value)
    assert "me@" not in str(refused.value)


@pytest.mark.parametrize("address", ["s3://", "memory:///", "zip://*.png::file:///a.zip", "https://photos.example/#x"])
def test_what_is_no_address_of_photos_is_a_usage_error(address: str) -> None:
    with pytest.raises(UsageError, match="is not an address of photos, as s3://bucket/folder is"):
        scan_addresses([address])


def test_an_unknown_storage_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="nonesuch://photos/x cannot be read here"):
        scan_addresses(["nonesuch://photos/x"])


def test_an_address_of_nothing_is_an_input_error(base: str) -> None:
    with pytest.raises(InputError, match="does not exist, or nothing is in it"):
        scan_addresses([f"{base}/nothing"])


def test_folders_and_addresses_are_ingested_one_after_the_other(
    tiny_index: DelfIndex, base: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="one after the other"):
        tiny_index.ingest([base, tmp_path])


def test_feature_files_are_read_from_folders_alone(tiny_index: DelfIndex) -> None:
    with pytest.raises(UsageError, match="Feature files are read from folders of this machine"):
        tiny_index.ingest_features(["s3://bucket/features"])


def test_two_photos_of_one_id_need_a_prefix(base: str) -> None:
    put(f"{base}/b/a.png", encoded(1))
    with pytest.raises(UsageError, match=r"would stand for both .*; ingest them one at a time"):
        scan_addresses([base, f"{base}/b"])


def test_a_new_model_reads_them_again_and_fetches_nothing_that_was_not_ingested(
    base: str, tmp_path: Path, tiny_settings: Settings
) -> None:
    with DelfIndex.open(tmp_path / "again.db", settings=tiny_settings) as index:
        index.ingest([base])
        index.add(make_photo(8, 160, 120), "of a stranger", uri=f"{base}/a.png")
    remove(f"{base}/b/d.png")
    other = tiny_settings.model_copy(update={"model": str(write_tiny_model(tmp_path / "other.safetensors", 1))})
    with DelfIndex.open(tmp_path / "again.db", settings=other, any_model=True) as index:
        report = index.reindex(allow_missing=True)
        assert report.extracted == 3
        assert [failure.error for failure in report.missing] == [
            f"of a stranger: its photo is not at {base}/a.png.",
            f"{base}/b/d.png does not exist; check the address.",
        ]
        assert [(one.image_id, one.uri, one.root) for one in index.list()] == [
            (name, f"{base}/{name}", base) for name in ("a.png", "b/c.PNG", "e.png")
        ]
