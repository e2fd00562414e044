"""Parts of the photos for the jobs of an array: together they are one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_photo, save_photo
from hypothesis import given
from hypothesis import strategies as st
from milvus_server import Server
from pymilvus import MilvusClient
from stored_rows import rows

from delf_milvus import DelfIndex, Settings
from delf_milvus.errors import UsageError
from delf_milvus.ingestion.scan import Failure, Photo, Scan, scan
from delf_milvus.ingestion.shard import Shard
from delf_milvus.store.keys import image_key

RUN = [sys.executable, "-m", "delf_milvus"]
COUNT = 12


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for seed in range(COUNT):
        save_photo(tmp_path / "photos" / f"{seed}.png", make_photo(seed, 160, 120))
    return tmp_path / "photos"


def environment(model: Path) -> dict[str, str]:
    """One thread: with another number of them the last bits of features differ."""
    own = {"DELF_MILVUS_MODEL": str(model), "DELF_MILVUS_EXTRACT__PRESET": "fast", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


def call(folder: Path, model: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *map(str, arguments)],
        cwd=folder,
        env=environment(model),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@given(st.sets(st.text(max_size=20), max_size=60), st.integers(1, 70), st.sampled_from(["", "shop"]))
def test_shards_partition_the_photos_whatever_their_number(ids: set[str], count: int, tenant: str) -> None:
    root = Path("/photos")
    failures = [Failure("/photos/unread", "/photos/unread cannot be read.")]
    whole = Scan([Photo(root / "x.png", one, root) for one in sorted(ids)], failures, [root])
    parts = [Shard(number, count).of(whole, tenant) for number in range(count)]
    assert sorted(photo.image_id for part in parts for photo in part.photos) == sorted(ids)
    for number, part in enumerate(parts):
        assert [photo.image_id for photo in part.photos] == sorted(photo.image_id for photo in part.photos)
        assert {image_key(photo.image_id, tenant) % count for photo in part.photos} <= {number}
        assert part.others == len(ids) - len(part.photos)
        assert (part.failures, part.roots) == (failures, [root])


def test_which_shard_a_photo_belongs_to_never_changes() -> None:
    assert [one for one in range(8) if Shard(one, 8).takes("a.jpg")] == [0x6FBE8991D5492 % 8]
    assert [one for one in range(8) if Shard(one, 8).takes("a.jpg", "t")] == [0x64A16FBE1DE83 % 8]


@pytest.mark.parametrize(
    "text", ["", "3", "a/b", "1/2/3", "-1/2", "1/-2", "1.0/2", " 0/2", "0/2\n", "1/", "٣/٤", "0/0"]
)
def test_what_names_no_shard_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"--shard takes I/N|at least 1 shard"):
        Shard.parse(text)


@pytest.mark.parametrize("text", ["3/3", "8/2", "1/1"])
def test_shards_are_counted_from_0(text: str) -> None:
    last = int(text[-1]) - 1
    with pytest.raises(UsageError, match=f"no shard {text}: .* the last of {last + 1} is {last}/{last + 1}"):
        Shard.parse(text)
    assert str(Shard.parse(f"{last}/{last + 1}")) == f"{last}/{last + 1}"


def test_shards_together_store_what_one_run_does_and_again_nothing(
    tiny_index: DelfIndex, photos: Path, tmp_path: Path, tiny_settings: Settings
) -> None:
    reports = [tiny_index.ingest([photos], shard=(number, 5)) for number in range(5)]
    assert sum(report.added for report in reports) == COUNT
    assert all(report.added + report.others == COUNT for report in reports)
    again = [tiny_index.ingest([photos], shard=(number, 5)) for number in range(5)]
    assert [(report.added, report.updated) for report in again] == [(0, 0)] * 5
    assert [report.unchanged for report in again] == [report.added for report in reports]
    with DelfIndex.open(tmp_path / "whole.db", settings=tiny_settings) as whole:
        # Other numbers of shards, and no shards at all, agree on what is there.
        assert (whole.ingest([photos]).added, whole.ingest([photos], shard=(1, 2)).added) == (COUNT, 0)
        assert [(one.image_id, one.sha256, one.feature_count) for one in tiny_index.list()] == [
            (one.image_id, one.sha256, one.feature_count) for one in whole.list()
        ]


def test_a_dry_run_of_a_shard_counts_its_own_and_writes_nothing(tiny_index: DelfIndex, photos: Path) -> None:
    counted = [tiny_index.ingest([photos], shard=(number, 3), dry_run=True) for number in range(3)]
    assert sum(report.added for report in counted) == COUNT
    assert not tiny_index.status()["images"]


def test_a_shard_prunes_its_own_part_alone(tiny_index: DelfIndex, photos: Path) -> None:
    tiny_index.ingest([photos])
    gone = {"0.png", "1.png", "2.png", "3.png", "4.png"}
    for name in gone:
        (photos / name).unlink()
    for number in range(3):
        own = {name for name in gone if Shard(number, 3).takes(name)}
        before = {record.image_id for record in tiny_index.list()}
        assert tiny_index.ingest([photos], shard=(number, 3), prune=True, dry_run=True).removed == len(own)
        assert tiny_index.ingest([photos], shard=(number, 3), prune=True).removed == len(own)
        assert before - {record.image_id for record in tiny_index.list()} == own
    assert {record.image_id for record in tiny_index.list()} == {record.image_id for record in tiny_index.list()} - gone


def test_shards_of_a_listing_take_its_ids(tiny_index: DelfIndex, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "listing.csv").write_text("path,id\n0.png,zero\n1.png,one\n2.png,two\n3.png,three\n")
    for number in range(2):
        tiny_index.ingest([photos], ids_from=tmp_path / "listing.csv", shard=(number, 2))
        stored = {record.image_id for record in tiny_index.list()}
        assert {one for one in ("zero", "one", "two", "three") if Shard(number, 2).takes(one)} <= stored
    assert stored == {"zero", "one", "two", "three"}


def test_shards_of_a_tenant_follow_the_keys_that_are_stored(
    photos: Path, tmp_path: Path, tiny_settings: Settings
) -> None:
    own = tiny_settings.model_copy(
        update={"store": tiny_settings.store.model_copy(update={"tenant_field": "shop", "tenant": "a"})}
    )
    with DelfIndex.open(tmp_path / "tenants.db", settings=own) as index:
        for number in range(3):
            before = {record.key for record in index.list()}
            index.ingest([photos], shard=(number, 3), prune=True)
            assert {record.key % 3 for record in index.list() if record.key not in before} <= {number}
        assert len(index.list()) == COUNT


@pytest.mark.parametrize("format", ["npz", "hloc"])
def test_features_that_shards_extracted_are_ingested_by_shards(
    format: str, photos: Path, tmp_path: Path, tiny_model: Path, tiny_index: DelfIndex
) -> None:
    extracted = 0
    for number in range(2):
        arguments = ("extract", "photos", "--out", "features", "--format", format, "--shard", f"{number}/2")
        result = call(tmp_path, tiny_model, "--json", *arguments)
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout)
        assert report["extracted"] + report["others"] == COUNT
        extracted += report["extracted"]
    assert extracted == COUNT
    parts = [tiny_index.ingest_features([tmp_path / "features"], shard=(number, 3)) for number in range(3)]
    assert sum(part.added for part in parts) == COUNT
    assert [record.image_id for record in tiny_index.list()] == [photo.image_id for photo in scan([photos]).photos]
    removed = [tiny_index.ingest_features([tmp_path / "features"], shard=(n, 3), prune=True).removed for n in range(3)]
    assert removed == [0, 0, 0]


def test_the_command_says_what_was_left_to_others_and_what_comes_next(
    photos: Path, tmp_path: Path, tiny_model: Path
) -> None:
    own = sum(Shard(1, 3).takes(photo.image_id) for photo in scan([photos]).photos)
    done = call(tmp_path, tiny_model, "ingest", "photos", "--shard", "1/3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{own} added, ")
    assert done.stdout.endswith(f" s; {COUNT - own} of other shards\n")
    assert "when every shard beside 1/3 has ended, run `delf-milvus index build`" in done.stderr
    for command in (("ingest", "photos"), ("extract", "photos", "--out", "features")):
        refused = call(tmp_path, tiny_model, *command, "--shard", "3/3")
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
        assert "the last of 3 is 2/3" in refused.stderr
    assert not (tmp_path / "features").exists()


@pytest.mark.server
def test_three_jobs_at_once_store_row_for_row_what_one_run_does(
    milvus: Server, name: str, photos: Path, tmp_path: Path, tiny_model: Path
) -> None:
    one, many = f"{name}one", f"{name}many"
    whole = call(tmp_path, tiny_model, "--uri", milvus.uri, "--collection", one, "ingest", "photos")
    assert whole.returncode == 0, whole.stderr
    # The collections are absent: whichever job comes first makes them, and the others meanwhile may try to.
    jobs = [
        subprocess.Popen(
            [*RUN, "--json", "--uri", milvus.uri, "--collection", many, "ingest", "photos", "--shard", f"{number}/3"],
            cwd=tmp_path,
            env=environment(tiny_model),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    ended = [(*job.communicate(timeout=300), job.returncode) for job in jobs]
    assert [code for _, _, code in ended] == [0, 0, 0], ended
    reports = [json.loads(out) for out, _, _ in ended]
    assert sum(report["added"] for report in reports) == COUNT
    assert all(report["added"] + report["others"] == COUNT for report in reports)
    built = call(tmp_path, tiny_model, "--uri", milvus.uri, "--collection", many, "index", "build")
    assert built.returncode == 0, built.stderr
    client = MilvusClient(milvus.uri)
    for suffix, key in (("_features", "feature_key"), ("_images", "image_key")):
        assert rows(client, one + suffix, key) == rows(client, many + suffix, key)
    client.close()
    answers = [
        json.loads(call(tmp_path, tiny_model, "--json", "--uri", milvus.uri, *arguments).stdout)
        for arguments in (("--collection", one, "search", photos / "3.png", "--include-unverified"),
                          ("--collection", many, "search", photos / "3.png", "--include-unverified"))
    ]  # fmt: skip
    assert answers[0]["hits"] == answers[1]["hits"] != []
