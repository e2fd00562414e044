"""The store on a real Milvus Lite."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException
from store_samples import DIM, GLOBAL_DIM, MODEL, OTHER_MODEL, random_features, random_items

from delf_milvus.errors import CollectionError, DatabaseError, InputError, UsageError
from delf_milvus.features import Features
from delf_milvus.settings import StoreSettings
from delf_milvus.store import writing
from delf_milvus.store.columns import Columns
from delf_milvus.store.connection import Connection
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.filters import quoted
from delf_milvus.store.hits import PADDING_KEY, PADDING_SIMILARITY
from delf_milvus.store.keys import feature_keys, image_key, split_keys
from delf_milvus.store.records import ImageRecord
from delf_milvus.store.schema import CollectionSpec

RNG = np.random.default_rng(11)


def open_store(folder: Path, **options: object) -> FeatureStore:
    arguments = {"fingerprint": MODEL, "settings": StoreSettings(), "max_features": 100, **options}
    return FeatureStore.open(str(folder / "photos.db"), "delf", **arguments)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeatureStore]:
    with open_store(tmp_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    """40 images of 100 features that no test changes."""
    with open_store(tmp_path_factory.mktemp("filled")) as opened:
        opened.write(random_items(1, 40, 100))
        opened.ensure_index()
        yield opened


def all_features(items: list[tuple[ImageRecord, Features]]) -> tuple[np.ndarray, np.ndarray]:
    keys = [feature_keys(record.key, len(features)) for record, features in items]
    return np.concatenate(keys), np.concatenate([features.descriptors for _, features in items])


def feature_rows(store: FeatureStore, image_id: str) -> list[int]:
    """Ordinals of the feature rows that are really there."""
    keys = feature_keys(image_key(image_id), 200).tolist()
    store.count_features()  # loads them
    rows = store._client.get("delf_features", ids=keys, output_fields=["feature_key"])
    return sorted(split_keys(np.array([row["feature_key"] for row in rows], dtype=np.int64))[1].tolist())


def test_an_image_comes_back_as_it_was_written(store: FeatureStore) -> None:
    features = random_features(RNG, 60)
    record = ImageRecord("a b/ü😀.jpg", "/photos/a b/ü😀.jpg", "12" * 32, "/photos", {"year": 1999, "tags": ["x", "y"]})
    store.write([(record, features)])
    found = store.records(["missing", record.image_id])
    assert list(found) == [record.image_id]
    known = found[record.image_id]
    assert replace(record, width=640, height=480, feature_count=60, model=MODEL.short) == replace(known, ingested_at="")
    assert known.ingested_at.endswith("+00:00")
    ((read, back),) = store.stored([record.key, 5]).values()
    assert read == known
    assert np.abs(back.locations - features.locations).max() < 0.01
    assert (np.sum(back.descriptors * features.descriptors, axis=1) > 0.999).all()
    (row,) = store._client.get("delf_features", ids=[int(feature_keys(record.key, 4)[3])])
    assert (row["x"], row["y"]) == tuple(features.locations[3].tolist())
    assert (row["scale"], row["attention"]) == (features.scales[3], features.attention[3])
    assert np.array_equal(np.float32(row["descriptor"]), features.descriptors[3])


def test_neighbours_of_a_small_collection_are_exact(filled: FeatureStore) -> None:
    keys, descriptors = all_features(random_items(1, 40, 100))
    queries = random_features(np.random.default_rng(2), 50, around=50).descriptors
    found, similarities = filled.neighbours(queries, 20)
    exact = queries @ descriptors.T
    assert np.allclose(similarities, -np.sort(-exact, axis=1)[:, :20], atol=1e-5)
    places = {key: place for place, key in enumerate(keys.tolist())}
    for row in range(50):
        assert np.allclose([exact[row, places[key]] for key in found[row].tolist()], similarities[row], atol=1e-5)
    assert found.dtype == np.int64
    assert similarities.dtype == np.float32


def test_neighbours_are_padded_where_there_are_fewer(store: FeatureStore) -> None:
    queries = random_features(RNG, 3).descriptors
    for _ in range(2):
        keys, similarities = store.neighbours(queries, 5)
        assert (keys == PADDING_KEY).all()
        assert (similarities == PADDING_SIMILARITY).all()
        store.write([(ImageRecord("empty"), random_features(RNG, 0))])
    store.write([(ImageRecord("a"), random_features(RNG, 2))])
    keys, similarities = store.neighbours(queries, 5)
    assert (split_keys(keys[:, :2])[0] == image_key("a")).all()
    assert (keys[:, 2:] == PADDING_KEY).all()
    assert store.neighbours(queries[:0], 5)[0].shape == (0, 5)


def test_images_are_found_by_their_global_descriptor(filled: FeatureStore) -> None:
    items = random_items(1, 40, 100)
    vectors = np.array([features.global_descriptor for _, features in items])
    keys = np.array([record.key for record, _ in items])
    found, similarities = filled.similar(vectors[7], 10)
    exact = vectors @ vectors[7]
    assert np.array_equal(found, keys[np.argsort(-exact)[:10]])
    assert np.allclose(similarities, -np.sort(-exact)[:10], atol=1e-5)
    everything = filled.similar(vectors[7], 1000)
    assert sorted(everything[0].tolist()) == sorted(keys.tolist())
    assert (np.diff(everything[1]) <= 0).all()


def test_a_global_descriptor_survives_an_update_of_metadata_and_is_read_where_asked_for(store: FeatureStore) -> None:
    assert [len(found) for found in store.similar(random_features(RNG, 0).global_descriptor, 5)] == [0, 0]
    record, features = random_items(1, 1, 10)[0]
    store.write([(record, features)])
    store.describe([replace(record, uri="elsewhere")])
    assert np.allclose(store.similar(features.global_descriptor, 5)[1], [1], atol=1e-5)
    for globally, length in ((False, 0), (True, GLOBAL_DIM)):
        ((_, stored),) = store.stored([record.key], globally=globally).values()
        assert len(stored.global_descriptor) == length
    assert np.allclose(stored.global_descriptor, features.global_descriptor, atol=1e-6)
    store.write([(record, replace(features, global_descriptor=np.zeros(0, np.float32)))])
    assert np.allclose(store.similar(features.global_descriptor, 5)[1], [0])


def test_a_model_without_a_global_descriptor_stores_the_mean_of_the_local_ones(tmp_path: Path) -> None:
    with FeatureStore.open(str(tmp_path / "f.db"), "delf", OTHER_MODEL, StoreSettings()) as other:
        record, features = random_items(1, 1, 10)[0]
        other.write([(record, replace(features, global_descriptor=np.zeros(0, np.float32)))])
        row = other.rows([record.key])[record.key]
        mean = features.attention @ features.descriptors
        assert np.allclose(row["global_descriptor"], mean / np.linalg.norm(mean), atol=1e-5)
        with pytest.raises(CollectionError, match="6 components"):
            other.similar(features.global_descriptor, 5)


def test_more_queries_than_one_call_takes_are_split(filled: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = random_features(np.random.default_rng(2), 50, around=50).descriptors
    whole = filled.neighbours(queries, 10)
    monkeypatch.setattr("delf_milvus.store.reading._HITS", 70)
    parts = filled.neighbours(queries, 10)
    assert np.array_equal(whole[0], parts[0])
    assert np.allclose(whole[1], parts[1], atol=1e-5)


def test_queries_of_another_length_are_refused(filled: FeatureStore) -> None:
    with pytest.raises(CollectionError, match="8 components"):
        filled.neighbours(random_features(RNG, 3, dim=8).descriptors, 5)
    with pytest.raises(CollectionError, match="8 components"):
        filled.write([(ImageRecord("x"), random_features(RNG, 3, dim=8))])
    with pytest.raises(CollectionError, match="global descriptor of 2 components"):
        filled.similar(np.float32([0.6, 0.8]), 5)
    longer = replace(random_features(RNG, 3), global_descriptor=np.float32([0.6, 0.8]))
    with pytest.raises(CollectionError, match="global descriptor of 2 components"):
        filled.write([(ImageRecord("x"), longer)])


def test_an_image_without_features_is_stored(store: FeatureStore) -> None:
    store.write([(ImageRecord("plain wall"), random_features(RNG, 0))])
    assert store.count_images() == 1
    assert store.count_features() == 0
    ((record, features),) = store.stored([image_key("plain wall")]).values()
    assert (record.feature_count, len(features)) == (0, 0)
    assert store.delete(["plain wall"]) == ["plain wall"]


def test_an_update_leaves_nothing_of_the_old_version(store: FeatureStore) -> None:
    store.write([(ImageRecord("a", metadata={"old": 1}), random_features(RNG, 90))])
    store.write([(ImageRecord("b"), random_features(RNG, 5))])
    fewer = random_features(RNG, 30)
    store.write([(ImageRecord("a", metadata={"new": 2}), fewer)])
    assert feature_rows(store, "a") == list(range(30))
    assert store.records(["a"])["a"].metadata == {"new": 2}
    assert store.count_features() == 35
    assert np.allclose(store.neighbours(fewer.descriptors, 1)[1], 1, atol=1e-5)


def test_of_an_id_given_twice_the_last_one_counts(store: FeatureStore) -> None:
    store.write([(ImageRecord("a"), random_features(RNG, 9)), (ImageRecord("a"), random_features(RNG, 4))])
    assert feature_rows(store, "a") == list(range(4))
    assert store.count_images() == 1


def test_deleting_removes_image_and_features(store: FeatureStore) -> None:
    store.write(random_items(3, 3, 20))
    assert store.delete(["img/00001.jpg", "missing"]) == ["img/00001.jpg"]
    assert store.delete(["img/00001.jpg"]) == []
    assert store.records(["img/00001.jpg"]) == {}
    assert feature_rows(store, "img/00001.jpg") == []
    assert (store.count_images(), store.count_features()) == (2, 40)


def test_batches_stay_below_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path, settings=StoreSettings(batch_bytes=100_000)) as store:
        sizes: list[int] = []
        write = writing.write_columns

        def measured(database: Connection, name: str, spec: CollectionSpec, columns: Columns, **options: bool) -> None:
            sizes.append(sum(values.nbytes for values in columns.values()))
            write(database, name, spec, columns, **options)

        monkeypatch.setattr(writing, "write_columns", measured)
        store.write(random_items(4, 40, 100))
        assert len(sizes) > 3
        assert max(sizes) <= 100_000
        assert (store.count_images(), store.count_features()) == (40, 4000)


def test_listing_is_in_order_and_goes_on_where_it_ended(store: FeatureStore) -> None:
    images = [
        (ImageRecord(f"{part}/{n:04}", root=f"/{part}"), random_features(RNG, 0)) for n in range(1500) for part in "ab"
    ]
    odd = ["c%d", "c_d", 'q"uote', "tab\tnew\nline", "back\\slash", "é", "😀", "a/' or 1 == 1"]
    images += [(ImageRecord(name), random_features(RNG, 0)) for name in odd]
    store.write(images)
    names = sorted(record.image_id for record, _ in images)
    assert [record.image_id for record in store.list()] == names
    assert [record.image_id for record in store.list(limit=7)] == names[:7]
    assert [record.image_id for record in store.list(after=names[6], limit=3)] == names[7:10]
    assert [record.image_id for record in store.list(prefix="b/12")] == [f"b/{n:04}" for n in range(1200, 1300)]
    assert [record.image_id for record in store.list(root="/b", limit=2)] == ["b/0000", "b/0001"]
    assert list(store.list(root="/")) == list(store.list(prefix="nothing")) == []
    for name in odd:
        assert name in [record.image_id for record in store.list(prefix=name)]
        assert [record.image_id for record in store.list(prefix=name)] == [n for n in names if n.startswith(name)]
    assert set(store.records(names)) == set(names)


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    items = random_items(5, 10, 100)
    queries = items[3][1].descriptors
    with open_store(tmp_path) as store:
        store.write(items)
        before = store.neighbours(queries, 5)
    with open_store(tmp_path, fingerprint=None, create=False) as store:
        assert store.stored_fingerprint == MODEL
        assert store.count_images() == 10
        after = store.neighbours(queries, 5)
        assert np.array_equal(before[0], after[0])
        assert np.allclose(before[1], after[1], atol=1e-5)
        store.write(random_items(6, 1, 10, "more"))
        assert store.records(["more/00000.jpg"])["more/00000.jpg"].model == MODEL.short


def test_the_index_changes_when_the_collection_has_grown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    items = random_items(7, 60, 100)
    keys, descriptors = all_features(items)
    queries = random_features(np.random.default_rng(8), 80, around=50).descriptors
    exact = keys[np.argsort(-(queries @ descriptors.T), axis=1)[:, :20]]
    with open_store(tmp_path, index_from=5000) as store:
        store.write(items[:40])
        store.ensure_index()
        status = store.status()
        assert (status.index_asked, status.index_used, status.substitute_for) == ("auto", "FLAT", "")
        store.write(items[40:])
        store.ensure_index()
        status = store.status()
        assert (status.index_used, status.substitute_for) == ("IVF_SQ8", "IVF_PQ")
        assert status.index_params == {"nlist": 64}
        assert (status.images, status.features) == (60, 6000)
        assert status.backend.startswith("Milvus Lite 3")
        found = store.neighbours(queries, 20)[0]
    with open_store(tmp_path, index_from=5000) as store:
        assert np.array_equal(store.neighbours(queries, 20)[0], found)
        store.write(random_items(9, 1, 50, "late"))
        store.ensure_index()
        assert store.status().index_used == "IVF_SQ8"
        assert store.neighbours(queries, 20)[0].min() >= 0
    recall = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(found.tolist(), exact.tolist(), strict=True)])
    assert recall > 0.9
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("profile", ["IVF_PQ", "HNSW"])
def test_a_profile_that_is_asked_for_is_used_or_replaced_by_name(tmp_path: Path, profile: str) -> None:
    items = random_items(10, 5, 100)
    with open_store(tmp_path, settings=StoreSettings(profile=profile)) as store:
        store.write(items)
        store.ensure_index()
        status = store.status()
        expected = ("IVF_SQ8", "IVF_PQ") if profile == "IVF_PQ" else ("HNSW", "")
        assert (status.index_asked, status.index_used, status.substitute_for) == (profile, *expected)
    with open_store(tmp_path, settings=StoreSettings(profile=profile)) as store:
        keys, similarities = store.neighbours(items[2][1].descriptors, 1)
        assert np.mean(split_keys(keys)[0] == items[2][0].key) > 0.95
        assert np.mean(similarities > 0.99) > 0.95


def test_a_collection_of_another_model_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.write(random_items(1, 1, 5))
    with pytest.raises(CollectionError, match=r"weights: weights-a here, weights-b there; scales") as caught:
        open_store(tmp_path, fingerprint=OTHER_MODEL)
    assert "--collection" in str(caught.value)
    with open_store(tmp_path, fingerprint=None) as store:
        assert store.delete(["img/00000.jpg"]) == ["img/00000.jpg"]


def test_collections_of_other_software_or_another_version_are_refused(tmp_path: Path) -> None:
    client = MilvusClient(str(tmp_path / "photos.db"))
    client.create_collection("delf_images", dimension=4)
    with pytest.raises(CollectionError, match=r"'delf_images' .* other software"):
        FeatureStore.open("", "delf", MODEL, StoreSettings(), client=client)
    client.drop_collection("delf_images")
    schema = client.create_schema(auto_id=False)
    schema.add_field("feature_key", DataType.INT64, is_primary=True)
    schema.add_field("descriptor", DataType.FLOAT_VECTOR, dim=DIM)
    client.create_collection("delf_features", schema=schema, properties={"delf_milvus": '{"schema_version": 99}'})
    with pytest.raises(CollectionError, match="another version of delf-milvus"):
        FeatureStore.open("", "delf", MODEL, StoreSettings(), client=client)
    client.close()


def test_an_absent_collection_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(CollectionError, match=r"There is no collection 'delf' in .*photos.db; run `delf-milvus ingest"):
        open_store(tmp_path, create=False)
    assert not (tmp_path / "photos.db").exists()
    with open_store(tmp_path) as store:
        assert (store.count_images(), store.count_features()) == (0, 0)
        assert list(store.list()) == []
        assert store.records(["a"]) == store.stored([1]) == {}
        assert store.delete(["a"]) == []
        assert not store.status().exists
        store.ensure_index()
    with pytest.raises(CollectionError, match="no collection"):
        open_store(tmp_path, create=False)
    with open_store(tmp_path, fingerprint=None) as store, pytest.raises(UsageError, match="no model"):
        store.write(random_items(1, 1, 1))


@pytest.mark.parametrize("name", ["", "9lives", "a-b", "a b", "ü", "x" * 300, "a;drop"])
def test_names_that_no_collection_can_have_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a collection"):
        FeatureStore.open(str(tmp_path / "photos.db"), name, MODEL, StoreSettings())


def test_paths_that_are_no_database_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file.db").write_text("SQLite format 3")
    for name, error, message in (
        ("file.db", DatabaseError, "is a file"),
        ("missing/photos.db", DatabaseError, "does not exist"),
        ("photos", UsageError, r"ends in \.db"),
    ):
        for create in (True, False):
            with pytest.raises(error, match=message):
                FeatureStore.open(str(tmp_path / name), "delf", MODEL, StoreSettings(), create=create)
    with pytest.raises(UsageError, match="no address"):
        FeatureStore.open("ftp://user:secret@host", "delf", MODEL, StoreSettings())
    assert (tmp_path / "file.db").read_text() == "SQLite format 3"


def test_an_unreachable_server_is_said_at_once_and_without_secrets(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(DatabaseError) as caught:
        FeatureStore.open(f"http://me:s3cret@{address}", "delf", MODEL, StoreSettings(timeout=5), token="t0ken")
    assert time.monotonic() - started < 8
    message = str(caught.value)
    assert message == f"Cannot reach the database at http://{address} while connecting: is it running?"
    assert capfd.readouterr().err == ""


HOLDER = """
    import sys, time
    from delf_milvus.settings import StoreSettings
    from delf_milvus.store.feature_store import FeatureStore
    sys.path.insert(0, sys.argv[2])
    from store_samples import MODEL, random_items
    store = FeatureStore.open(sys.argv[1], "delf", MODEL, StoreSettings())
    store.write(random_items(1, 2, 10))
    print("ready", flush=True)
    sys.stdin.read()
    store.close()
"""


def test_a_database_open_in_another_process_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "photos.db")
    # A proxy in the environment must not get between the process and its own embedded database.
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), path, str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(DatabaseError, match=r"photos\.db is open in another process"):
            open_store(tmp_path)
        assert capfd.readouterr().err == ""
        assert holder.stdin is not None
        holder.stdin.close()
        assert holder.wait(20) == 0
    with open_store(tmp_path, create=False) as store:
        assert store.count_images() == 2


def test_closing_frees_an_embedded_database_for_other_processes(tmp_path: Path) -> None:
    first = open_store(tmp_path)
    second = open_store(tmp_path)
    first.close()
    second.write(random_items(1, 1, 5))
    assert second.count_images() == 1
    second.close()
    second.close()
    code = f"from milvus_lite.db import MilvusLite; MilvusLite({str(tmp_path / 'photos.db')!r}).close()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_client_that_was_handed_in_stays_open_and_its_collections_untouched(tmp_path: Path) -> None:
    client = MilvusClient(str(tmp_path / "shop.db"))
    client.create_collection("products", dimension=4)
    client.insert("products", [{"id": 1, "vector": [1.0, 0, 0, 0]}])
    with FeatureStore.open("ignored", "delf", MODEL, StoreSettings(), client=client) as store:
        store.write(random_items(1, 2, 10))
        store.ensure_index()
        assert store.neighbours(random_features(RNG, 2).descriptors, 3)[0].min() >= 0
    with FeatureStore.open(str(tmp_path / "shop.db"), "delf", MODEL, StoreSettings()) as store:
        assert store.count_images() == 2
    assert sorted(client.list_collections()) == ["delf_features", "delf_images", "products"]
    assert len(client.get("products", ids=[1])) == 1
    client.close()


@pytest.mark.parametrize("calls", range(1, 7))
def test_a_kill_at_any_step_of_a_write_leaves_no_image_without_its_features(tmp_path: Path, calls: int) -> None:
    """The process kills itself with the n-th call that changes the database."""
    code = """
        import os, signal, sys
        sys.path.insert(0, sys.argv[2])
        from store_samples import MODEL, random_items
        from delf_milvus.settings import StoreSettings
        from delf_milvus.store import writing
        from delf_milvus.store.feature_store import FeatureStore
        store = FeatureStore.open(sys.argv[1], "delf", MODEL, StoreSettings(batch_bytes=100_000))
        store.write(random_items(1, 3, 100) + random_items(1, 1, 100, "untouched"))
        left = int(sys.argv[3])
        def killing(call):
            def called(*arguments, **options):
                global left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)
            return called
        store._client.insert, store._client.delete = killing(store._client.insert), killing(store._client.delete)
        writing.write_columns = killing(writing.write_columns)
        store.write(random_items(2, 3, 40) + random_items(2, 25, 100, "new"))
    """
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(code),
            str(tmp_path / "photos.db"),
            str(Path(__file__).parent),
            str(calls),
        ],
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    with open_store(tmp_path, create=False) as store:
        records = list(store.list())
        assert "untouched/00000.jpg" in {record.image_id for record in records}
        for record in records:
            assert feature_rows(store, record.image_id) == list(range(record.feature_count))
        again = random_items(2, 3, 40) + random_items(2, 25, 20, "new")
        store.write(again)
        assert store.count_features() == 3 * 40 + 25 * 20 + 100
        for record, features in again:
            assert feature_rows(store, record.image_id) == list(range(len(features)))


EXCHANGE = ("release_collection", "flush", "drop_index", "create_index", "load_collection")


@pytest.mark.parametrize("step", EXCHANGE)
def test_a_kill_at_any_step_of_an_exchange_of_the_index_is_repaired(tmp_path: Path, step: str) -> None:
    """The process kills itself instead of taking the step."""
    code = """
        import os, signal, sys
        sys.path.insert(0, sys.argv[2])
        from store_samples import MODEL, random_items
        from delf_milvus.settings import StoreSettings
        from delf_milvus.store.feature_store import FeatureStore
        store = FeatureStore.open(sys.argv[1], "delf", MODEL, StoreSettings(), index_from=1000)
        store.write(random_items(1, 20, 100))
        setattr(store._client, sys.argv[3], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        store.ensure_index()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "photos.db"), str(Path(__file__).parent), step],
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    items = random_items(1, 20, 100)
    with open_store(tmp_path, create=False, index_from=1000) as store:
        before = store.status()
        assert before.index_used == {"create_index": "none", "load_collection": "IVF_SQ8"}.get(step, "FLAT")
        assert (store.neighbours(items[3][1].descriptors, 1)[1] > 0.99).mean() > 0.95
        store.ensure_index()
        after = store.status()
        assert (after.index_used, after.index_state) == ("IVF_SQ8", "Finished")
        assert (after.images, after.features) == (20, 2000)
        assert (store.neighbours(items[3][1].descriptors, 1)[1] > 0.99).mean() > 0.95


class LikeAServer(MilvusClient):
    """Milvus Lite, but like a server it loads no collection without an index."""

    def load_collection(self, collection_name: str, *arguments: object, **options: object) -> None:
        if not self.list_indexes(collection_name):
            raise MilvusException(700, f"index not found[collection={collection_name}]")
        super().load_collection(collection_name, *arguments, **options)


def test_collections_without_an_index_have_one_again_before_they_are_loaded(tmp_path: Path) -> None:
    client = LikeAServer(str(tmp_path / "photos.db"))
    items = random_items(1, 20, 100)

    def opened(**options: object) -> FeatureStore:
        return FeatureStore.open("", "delf", MODEL, StoreSettings(), client=client, **options)

    with opened() as store:
        store.write(items)
        store.ensure_index()
        for name, vector in (("delf_features", "descriptor"), ("delf_images", "global_descriptor")):
            client.release_collection(name)
            client.drop_index(name, vector)
        with pytest.raises(MilvusException, match="index not found"):
            client.load_collection("delf_features")
    with opened(index_from=5000, create=False) as store:
        status = store.status()
        assert (status.index_used, status.index_state, status.features) == ("none", "no index", 2000)
        assert client.list_indexes("delf_images") == ["global_descriptor"]
        assert np.allclose(store.neighbours(items[3][1].descriptors, 1)[1], 1, atol=1e-5)
        status = store.status()
        assert (status.index_used, status.index_state, status.features) == ("FLAT", "Finished", 2000)
        client.release_collection("delf_features")
        client.drop_index("delf_features", "descriptor")
        store.ensure_index()
        assert store.status().index_used == "FLAT"
    client.release_collection("delf_features")
    client.drop_index("delf_features", "descriptor")
    with opened(index_from=1000) as store:
        assert (store.neighbours(items[3][1].descriptors, 1)[1] > 0.99).mean() > 0.95
        status = store.status()
        assert (status.index_used, status.index_params, status.substitute_for) == ("IVF_SQ8", {"nlist": 32}, "IVF_PQ")
    client.close()


@pytest.mark.parametrize("fields", [{"year": "integer=0"}, {"year": "integer=0", "tag": "text="}])
def test_an_index_of_another_field_is_not_taken_for_that_of_the_vectors(tmp_path: Path, fields: dict[str, str]) -> None:
    items = random_items(1, 20, 50)
    with open_store(tmp_path, settings=StoreSettings(fields=fields)) as store:
        store.write(items)
        store.ensure_index()
        for name, vector in (("delf_features", "descriptor"), ("delf_images", "global_descriptor")):
            store._client.release_collection(name)
            store._client.drop_index(name, vector)
            params = store._client.prepare_index_params()
            for field in fields:
                params.add_index(field, index_type="INVERTED", index_name=field)
            store._client.create_index(name, params)
        assert store.status().index_used == "none"
    with open_store(tmp_path, settings=StoreSettings(fields=fields)) as store:
        assert np.allclose(store.neighbours(items[3][1].descriptors, 1)[1], 1, atol=1e-5)
        assert store.status().index_used == "FLAT"
        assert sorted(store._client.list_indexes("delf_features")) == sorted(["descriptor", *fields])


def test_an_exchange_of_the_index_leaves_the_fields_theirs(tmp_path: Path) -> None:
    settings = StoreSettings(fields={"year": "integer=0", "tag": "text="})
    with open_store(tmp_path, settings=settings, index_from=1000) as store:
        store.write(random_items(1, 20, 100))
        assert store.status().index_used == "FLAT"
        store.ensure_index()
        assert store.status().index_used == "IVF_SQ8"
        assert sorted(store._client.list_indexes("delf_features")) == ["descriptor", "tag", "year"]


def test_an_exchange_of_the_index_that_failed_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise MilvusException(1, "no memory")

    items = random_items(1, 20, 100)
    with open_store(tmp_path, index_from=1000) as store:
        store.write(items)
        with monkeypatch.context() as patch:
            patch.setattr(store._client, "create_index", failing)
            with pytest.raises(DatabaseError, match="building the index IVF_SQ8: no memory"):
                store.ensure_index()
        assert store.status().index_used == "none"
        store.ensure_index()
        assert store.status().index_used == "IVF_SQ8"
        assert (store.neighbours(items[3][1].descriptors, 1)[1] > 0.99).mean() > 0.95


def test_searching_from_many_threads_beside_a_writer(store: FeatureStore) -> None:
    items = random_items(12, 20, 50)
    store.write(items[:10])
    queries = items[0][1].descriptors[:20]
    expected = feature_keys(items[0][0].key, 20)
    failures: list[BaseException | str] = []
    stop = threading.Event()

    def search() -> None:
        try:
            while not stop.is_set():
                keys, _ = store.neighbours(queries, 1)
                if not np.array_equal(keys[:, 0], expected):
                    failures.append("wrong neighbours")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for start in range(10, 20, 2):
        store.write(items[start : start + 2])
        store.ensure_index()
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.count_images() == 20


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (ImageRecord(""), "not empty"),
        (ImageRecord("x" * 1025), "1025 bytes"),
        (ImageRecord("ü" * 513), "1026 bytes"),
        (ImageRecord("\udcff.jpg"), "not valid Unicode"),
        (ImageRecord("nul\0"), "NUL"),
        (ImageRecord("a", uri="u" * 9000), "9000 bytes"),
        (ImageRecord("a", metadata={"uri": "x"}), "'uri': that name is reserved"),
        (ImageRecord("a", metadata={"$meta": 1}), "reserved"),
        (ImageRecord("a", metadata={"keypoints_1": 1}), "reserved"),
        (ImageRecord("a", metadata={"when": float("nan")}), "JSON"),
        (ImageRecord("a", metadata={"what": object()}), "JSON"),
        (ImageRecord("a", metadata={"long": "x" * 70_000}), "70.* bytes"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    filled: FeatureStore, record: ImageRecord, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        filled.write([(ImageRecord("good"), random_features(RNG, 3)), (record, random_features(RNG, 3))])
    assert filled.records(["good"]) == {}


def test_more_features_than_the_collection_was_made_for_are_refused(filled: FeatureStore) -> None:
    with pytest.raises(CollectionError, match="4000 features of image 'big'"):
        filled.write([(ImageRecord("big"), random_features(RNG, 4000))])


def test_an_id_of_the_longest_length_is_stored(store: FeatureStore) -> None:
    names = ["x" * 1024, "ü" * 512, "😀" * 256]
    store.write([(ImageRecord(name), random_features(RNG, 1)) for name in names])
    assert set(store.records(names)) == set(names)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40))
def test_no_text_breaks_out_of_its_quotes(filled: FeatureStore, text: str) -> None:
    assert list(filled._scan(f"image_id == {quoted(text)}")) == []
    found = filled._scan(f'image_id == "img/00003.jpg" and image_id != {quoted(text)}')
    assert [row["image_id"] for row in found] == ["img/00003.jpg"]


def test_ids_that_may_have_been_meant(store: FeatureStore) -> None:
    assert store.similar_ids("tower.jpg") == []
    names = ["holidays/tower.jpg", "holidays/towers.jpg", "holidays/beach.jpg", "work/Tower.jpg", "work/plan.png"]
    store.write([(ImageRecord(name), random_features(RNG, 0)) for name in names])
    assert store.similar_ids("holidays/twoer.jpg")[0] == "holidays/tower.jpg"
    # The same file name comes first, whatever folder it lies in and however it is written.
    assert set(store.similar_ids("elsewhere/tower.JPG")[:2]) == {"holidays/tower.jpg", "work/Tower.jpg"}
    assert store.similar_ids("hoIidays/beech.jpg")[0] == "holidays/beach.jpg"
    assert store.similar_ids("q'\"uite\\ another") == store.similar_ids("") == []


def test_collections_released_or_dropped_meanwhile(store: FeatureStore) -> None:
    items = random_items(1, 1, 5)
    store.write(items)
    store._client.release_collection("delf_images")
    store._client.release_collection("delf_features")
    assert len(store.records(["img/00000.jpg"])) == 1
    assert store.neighbours(items[0][1].descriptors, 1)[0].min() > 0
    store._client.drop_collection("delf_features")
    with pytest.raises(CollectionError, match="somebody else dropped it"):
        store.neighbours(items[0][1].descriptors, 1)


def test_damaged_features_are_said_with_what_to_do(store: FeatureStore) -> None:
    store.write(random_items(1, 1, 5))
    key = image_key("img/00000.jpg")
    (row,) = store._client.get("delf_images", ids=[key])
    store._client.upsert("delf_images", [{**row, "keypoints": row["keypoints"][:-8]}])
    with pytest.raises(DatabaseError, match=r"'img/00000\.jpg' cannot be read, ingest it again"):
        store.stored([key])


def test_images_of_many_features_fill_several_fields(tmp_path: Path) -> None:
    features = random_features(RNG, 4096, dim=DIM)
    with open_store(tmp_path, max_features=4096) as store:
        store.write([(ImageRecord("big"), features)])
        ((_, back),) = store.stored([image_key("big")]).values()
        assert len(back) == 4096
        assert store.count_features() == 4096


def test_failures_print_nothing_but_those_of_other_users_of_pymilvus(tmp_path: Path) -> None:
    code = """
        import sys
        from delf_milvus.errors import DelfMilvusError
        from delf_milvus.settings import StoreSettings
        from delf_milvus.store.feature_store import FeatureStore
        sys.path.insert(0, sys.argv[2])
        from store_samples import DIM, MODEL, random_items
        for uri in ("http://127.0.0.1:9", sys.argv[1] + "/photos.db"):
            try:
                store = FeatureStore.open(uri, "delf", MODEL, StoreSettings(timeout=5), index_from=100)
                items = random_items(1, 2, 100)
                store.write(items)
                store.ensure_index()
                store._client.drop_collection("delf_features")
                store.neighbours(items[0][1].descriptors, 3)
            except DelfMilvusError as error:
                print(error)
        print("others:", file=sys.stderr, flush=True)
        try:
            store._client.query("nope", filter="id in [1]")
        except Exception:
            pass
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(Path(__file__).parent)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["Cannot", "A"]
    ours, _, others = done.stderr.partition("others:\n")
    assert ours == ""
    assert "does not exist" in others


def test_describing_rewrites_place_and_metadata_and_leaves_features(store: FeatureStore) -> None:
    store.write([(ImageRecord("a", "old", metadata={"one": 1}), random_features(RNG, 30)), *random_items(2, 1, 10)])
    key = image_key("a")
    before = store.stored([key])[key][1]
    store.describe([ImageRecord("a", "new", root="/r", metadata={"two": "ü"}), ImageRecord("absent")])
    record, features = store.stored([key])[key]
    assert (record.uri, record.root, record.feature_count, dict(record.metadata)) == ("new", "/r", 30, {"two": "ü"})
    np.testing.assert_array_equal(features.descriptors, before.descriptors)
    np.testing.assert_array_equal(features.locations, before.locations)
    assert len(list(store.list())) == 2
    assert split_keys(store.neighbours(features.descriptors[:5], 1)[0])[0].ravel().tolist() == [key] * 5


def test_writing_and_searching_print_nothing(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from store_samples import MODEL, random_items
        from delf_milvus.settings import StoreSettings
        from delf_milvus.store.feature_store import FeatureStore
        items = random_items(1, 3, 50)
        with FeatureStore.open({str(tmp_path / "a.db")!r}, "delf", MODEL, StoreSettings()) as store:
            store.write(items)
            store.ensure_index()
            store.neighbours(items[0][1].descriptors, 5)
            store.delete([items[0][0].image_id])
        """
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


@pytest.mark.parametrize("closed", ["before Python starts", "by the process", "as a file object"])
def test_a_process_without_stderr_can_do_everything(tmp_path: Path, closed: str) -> None:
    code = """
        import os, sys
        closed = sys.argv[3]
        assert (sys.stderr is None) == (closed == "before Python starts")
        if closed == "by the process":
            os.close(2)
        elif closed == "as a file object":
            sys.stderr.close()
        sys.path.insert(0, sys.argv[2])
        from store_samples import MODEL, random_items
        from delf_milvus.settings import StoreSettings
        from delf_milvus.store.feature_store import FeatureStore
        items = random_items(1, 20, 100)
        for _ in range(2):
            with FeatureStore.open(sys.argv[1], "delf", MODEL, StoreSettings(), index_from=1000) as store:
                store.write(items)
                store.ensure_index()
                found = store.neighbours(items[0][1].descriptors, 1)[1]
                status = store.status()
        print(status.index_used, status.features, (found > 0.99).mean() > 0.95)
    """
    program = [sys.executable, "-c", textwrap.dedent(code)]
    if closed == "before Python starts":
        program = ["sh", "-c", 'exec "$@" 2>&-', "sh", *program]
    done = subprocess.run(
        [*program, str(tmp_path / "photos.db"), str(Path(__file__).parent), closed],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout == "IVF_SQ8 2000 True\n"
    with open_store(tmp_path, create=False, index_from=1000) as store:
        assert store.count_features() == 2000
