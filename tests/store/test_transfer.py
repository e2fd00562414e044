"""Export and import on a real Milvus Lite."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from store_samples import MODEL, OTHER_MODEL, random_features, random_items

from delf_milvus.errors import CollectionError, DatabaseError, InputError, UsageError
from delf_milvus.features import Features, Fingerprint, file_digest
from delf_milvus.settings import StoreSettings
from delf_milvus.store import transfer
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.records import ImageRecord
from delf_milvus.store.transfer import MANIFEST, export_collection, import_collection, read_manifest

Items = list[tuple[ImageRecord, Features]]


def open_store(path: Path, fingerprint: Fingerprint | None = MODEL, max_features: int = 100) -> FeatureStore:
    return FeatureStore.open(str(path), "delf", fingerprint, StoreSettings(), max_features=max_features)


def varied_items() -> Items:
    """Images with metadata, with one feature, with none."""
    rng = np.random.default_rng(5)
    return [
        *random_items(1, 12, 100),
        (
            ImageRecord("ü/one.jpg", metadata={"title": "Größe \u2028", "tags": [1, None, {"a": "b"}]}),
            random_features(rng, 1),
        ),
        (ImageRecord("none.jpg", metadata={"n": 1.5}), random_features(rng, 0)),
    ]


@pytest.fixture
def items() -> Items:
    return varied_items()


@pytest.fixture
def exported(tmp_path: Path, items: Items) -> Path:
    with open_store(tmp_path / "from.db") as store:
        store.write(items)
        export_collection(store, tmp_path / "export")
    return tmp_path / "export"


def answers(store: FeatureStore, items: Items) -> list[object]:
    """Everything that can be asked of a store: records, packed features, rows of features, neighbours."""
    keys = [record.key for record, _ in items]
    counts = {record.key: len(features) for record, features in items}
    rows = store.rows(keys)
    packed = [{name: value for name, value in rows[key].items() if name != "global_descriptor"} for key in keys]
    columns = store.feature_columns(counts)
    found = store.neighbours(items[0][1].descriptors, 20)
    arrays = [*(columns[name] for name in sorted(columns)), found[0], *(rows[key]["global_descriptor"] for key in keys)]
    exact = [np.asarray(one).tolist() for one in arrays]
    # Of its own descriptor a feature is sure; the last bits depend on the order in which a backend sums up.
    assert np.allclose(found[1][:, 0], 1, atol=1e-5)
    return [packed, exact, store.count_features(), store.count_images()]


def test_what_is_restored_answers_identically(tmp_path: Path, exported: Path, items: Items) -> None:
    with open_store(tmp_path / "from.db") as store:
        before = answers(store, items)
    with open_store(tmp_path / "to.db", fingerprint=None) as store:
        report = import_collection(store, exported)
        assert (report.added, report.replaced, report.unchanged, report.features) == (14, 0, 0, 1201)
        assert answers(store, items) == before
        assert store.stored_fingerprint == MODEL


def test_the_exported_descriptors_are_those_that_were_written(exported: Path, items: Items) -> None:
    tables = [parquet.read_table(exported / name) for name in ("images-00000.parquet", "features-00000.parquet")]
    ids = tables[0].column("image_id").to_pylist()
    written = {record.image_id: features for record, features in items}
    assert ids == sorted(written)
    descriptors = np.concatenate([written[image_id].descriptors for image_id in ids])
    np.testing.assert_array_equal(np.array(tables[1].column("descriptor").to_pylist(), np.float32), descriptors)


def test_small_groups_and_parts_hold_the_same(tmp_path: Path, items: Items, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_GROUP_FEATURES", 150)
    monkeypatch.setattr(transfer, "_GROUP_IMAGES", 5)
    monkeypatch.setattr(transfer, "_PART_FEATURES", 400)
    with open_store(tmp_path / "from.db") as store:
        store.write(items)
        seen: list[tuple[int, int]] = []
        report = export_collection(store, tmp_path / "export", progress=lambda *counts: seen.append(counts))
        before = answers(store, items)
    assert seen == [(0, 14), (5, 14), (10, 14), (14, 14)]
    assert len(read_manifest(tmp_path / "export").parts) == 3
    assert report.files == 7
    with open_store(tmp_path / "to.db") as store:
        import_collection(store, tmp_path / "export")
        assert answers(store, items) == before


def test_importing_again_leaves_what_is_unchanged_and_replaces_the_rest(
    tmp_path: Path, exported: Path, items: Items
) -> None:
    with open_store(tmp_path / "to.db") as store:
        store.write([(items[0][0], random_features(np.random.default_rng(9), 70)), *random_items(3, 1, 20, "mine")])
        first = import_collection(store, exported)
        assert (first.added, first.replaced, first.unchanged) == (13, 1, 0)
        assert (store.count_images(), store.count_features()) == (15, 1221)
        store.describe([ImageRecord("none.jpg", metadata={"n": 2})])
        second = import_collection(store, exported)
        assert (second.added, second.replaced, second.unchanged, second.features) == (0, 1, 13, 0)
        assert store.records(["none.jpg"])["none.jpg"].metadata == {"n": 1.5}


def test_a_prefix_picks_images_on_both_sides(tmp_path: Path, exported: Path) -> None:
    with open_store(tmp_path / "from.db") as store:
        assert export_collection(store, tmp_path / "some", prefix="img/0000").images == 10
    with open_store(tmp_path / "to.db") as store:
        assert import_collection(store, exported, prefix="ü/").added == 1
        assert [record.image_id for record in store.list()] == ["ü/one.jpg"]


def test_an_empty_collection_is_restored_empty(tmp_path: Path) -> None:
    with open_store(tmp_path / "from.db") as store:
        store.write(random_items(1, 1, 5))
        store.delete(["img/00000.jpg"])
        assert export_collection(store, tmp_path / "export").images == 0
    with open_store(tmp_path / "to.db", fingerprint=None) as store:
        assert import_collection(store, tmp_path / "export").added == 0
        assert (store.count_images(), store.stored_fingerprint) == (0, MODEL)


def test_there_must_be_something_to_export(tmp_path: Path) -> None:
    with open_store(tmp_path / "from.db") as store, pytest.raises(CollectionError, match="no collection to export"):
        export_collection(store, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_an_image_without_its_features_ends_an_export(tmp_path: Path, items: Items) -> None:
    with open_store(tmp_path / "from.db") as store:
        store.write(items)
        store._client.delete("delf_features", ids=[items[0][0].key << 12])
        with pytest.raises(DatabaseError, match="are missing"):
            export_collection(store, tmp_path / "export")
    assert list((tmp_path / "export").iterdir()) == []


@pytest.mark.parametrize("present", ["notes.txt", MANIFEST])
def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, items: Items, present: str) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / present).write_text("mine")
    (folder / "images-00000.parquet").write_text("old")
    with open_store(tmp_path / "from.db") as store:
        store.write(items[:1])
        with pytest.raises(UsageError, match="choose a new folder"):
            export_collection(store, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([present, "images-00000.parquet"])


def in_a_process(code: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).parent), *arguments],
        capture_output=True,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )


EXPORTING = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from pathlib import Path
    from delf_milvus.errors import DelfMilvusError
    from delf_milvus.store import transfer
    from test_transfer import open_store
    {patch}
    with open_store(Path(sys.argv[2])) as store:
        try:
            transfer.export_collection(store, Path(sys.argv[3]))
        except DelfMilvusError as error:
            print(type(error).__name__, error)
"""


@pytest.mark.parametrize("step", ["file_digest", "_synchronised"])
def test_a_killed_export_is_no_export_and_the_next_one_is_whole(tmp_path: Path, items: Items, step: str) -> None:
    with open_store(tmp_path / "from.db") as store:
        store.write(items)
        before = answers(store, items)
    patch = f"import os; transfer.{step} = lambda *_: os.kill(os.getpid(), 9)"
    done = in_a_process(EXPORTING.format(patch=patch), str(tmp_path / "from.db"), str(tmp_path / "export"))
    assert done.returncode == -signal.SIGKILL
    assert any((tmp_path / "export").iterdir())
    with open_store(tmp_path / "to.db") as store, pytest.raises(InputError, match="interrupted"):
        import_collection(store, tmp_path / "export")
    with open_store(tmp_path / "from.db") as store:
        export_collection(store, tmp_path / "export")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "features-00000.parquet",
        "images-00000.parquet",
        MANIFEST,
    ]
    with open_store(tmp_path / "to.db") as store:
        import_collection(store, tmp_path / "export")
        assert answers(store, items) == before


@pytest.fixture(params=["tmpfs", "limit"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and what a process does before it writes there, so that little fits into it."""
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "limit":
        yield folder, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder, "pass"
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, items: Items, small_disk: tuple[Path, str]
) -> None:
    folder, before = small_disk
    with open_store(tmp_path / "from.db") as store:
        store.write(items)
    # The database has files that are larger: only the export is limited.
    code = EXPORTING.format(patch="").replace("        try:", f"        {before}\n        try:")
    done = in_a_process(code, str(tmp_path / "from.db"), str(folder / "export"))
    assert done.stdout.startswith("InputError The export into")
    assert done.stdout.count("\n") == 1
    assert "No space left" in done.stdout or "File too large" in done.stdout
    assert list((folder / "export").iterdir()) == []


def test_a_killed_import_shows_nothing_halfway_and_the_next_one_completes(
    tmp_path: Path, items: Items, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_GROUP_FEATURES", 300)
    with open_store(tmp_path / "from.db") as store:
        store.write(items)
        export_collection(store, tmp_path / "export")
        before = answers(store, items)
    code = """
        import os, sys
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        from delf_milvus.store import transfer, writing
        from test_transfer import open_store
        left = 4
        write = writing.write_columns
        def killing(*arguments, **options):
            global left
            left -= 1
            if not left:
                os.kill(os.getpid(), 9)
            write(*arguments, **options)
        writing.write_columns = killing
        transfer._BATCH_BYTES = 1
        with open_store(Path(sys.argv[2])) as store:
            transfer.import_collection(store, Path(sys.argv[3]))
    """
    done = in_a_process(code, str(tmp_path / "to.db"), str(tmp_path / "export"))
    assert done.returncode == -signal.SIGKILL
    with open_store(tmp_path / "to.db") as store:
        there = list(store.list())
        assert 0 < len(there) < len(items)
        store.feature_columns({record.key: record.feature_count for record in there})
        report = import_collection(store, tmp_path / "export")
        assert (report.unchanged, report.added) == (len(there), len(items) - len(there))
        assert answers(store, items) == before


def edited(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def rewritten(folder: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Another table under a name, the manifest made to agree with it: what only the rows can give away."""
    kind = name.partition("-")[0]
    parquet.write_table(change(parquet.read_table(folder / name)), folder / name)
    described = {
        "rows": parquet.read_metadata(folder / name).num_rows,
        "bytes": (folder / name).stat().st_size,
        "sha256": file_digest(folder / name),
    }
    edited(folder, lambda manifest: manifest["parts"][0][kind].update(described))


def shuffled(table: pa.Table) -> pa.Table:
    return table.take([*range(1, table.num_rows), 0])


def with_column(name: str, change: Callable[[list], list]) -> Callable[[pa.Table], pa.Table]:
    def changed(table: pa.Table) -> pa.Table:
        position = table.schema.get_field_index(name)
        field = table.schema.field(position)
        return table.set_column(position, field, pa.array(change(table.column(name).to_pylist()), field.type))

    return changed


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


IMAGES, FEATURES = "images-00000.parquet", "features-00000.parquet"

BEFORE_ANYTHING: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "manifest cut": lambda folder: cut(folder / MANIFEST),
    "unknown key": lambda folder: edited(folder, lambda m: m.update(extra=1)),
    "other format": lambda folder: edited(folder, lambda m: m.update(version=2)),
    "path": lambda folder: edited(folder, lambda m: m["parts"][0]["images"].update(file="../images-00000.parquet")),
    "kinds": lambda folder: edited(folder, lambda m: m["parts"][0]["images"].update(file=FEATURES)),
    "sums": lambda folder: edited(folder, lambda m: m.update(images=15)),
    "too many fields": lambda folder: edited(folder, lambda m: m["facts"].update(chunks=10**12)),
    "too long": lambda folder: edited(folder, lambda m: m["facts"]["fingerprint"].update(dim=10**12)),
    "negative": lambda folder: edited(folder, lambda m: m.update(images=-1)),
    "indexed negative": lambda folder: edited(folder, lambda m: m["facts"].update(indexed=-1)),
    "indexed too many": lambda folder: edited(folder, lambda m: m["facts"].update(indexed=10**12)),
    "choice unknown": lambda folder: edited(folder, lambda m: m["facts"].update(indexed_choice="best")),
    "part twice": lambda folder: edited(folder, lambda m: m.update(images=28, features=2402, parts=m["parts"] * 2)),
    "file missing": lambda folder: (folder / IMAGES).unlink(),
    "file cut": lambda folder: cut(folder / FEATURES),
    "byte flipped": lambda folder: flip(folder / IMAGES),
    "no parquet": lambda folder: (
        (folder / IMAGES).write_bytes(b"x" * 50),
        edited(
            folder,
            lambda m: m["parts"][0]["images"].update(bytes=50, sha256=file_digest(folder / IMAGES)),
        ),
    ),
    "column missing": lambda folder: rewritten(folder, FEATURES, lambda table: table.drop_columns(["x"])),
    "rows missing": lambda folder: rewritten(folder, FEATURES, lambda table: table.slice(1)),
}

BY_ITS_ROWS: dict[str, Callable[[Path], object]] = {
    "features of another image": lambda folder: rewritten(folder, FEATURES, shuffled),
    "image twice": lambda folder: (
        rewritten(folder, IMAGES, lambda table: pa.concat_tables([table.slice(0, 1), table.slice(0, 1)])),
        rewritten(folder, FEATURES, lambda table: pa.concat_tables([table.slice(0, 100), table.slice(0, 100)])),
        edited(folder, lambda m: m.update(images=2, features=200)),
    ),
    "not finite": lambda folder: rewritten(folder, FEATURES, with_column("x", lambda x: [float("nan"), *x[1:]])),
    "not of unit norm": lambda folder: rewritten(
        folder, FEATURES, with_column("descriptor", lambda d: [[5.0] * MODEL.dim, *d[1:]])
    ),
    "id of another key": lambda folder: rewritten(folder, IMAGES, with_column("image_id", lambda ids: ["a", *ids[1:]])),
    "packed features of another": lambda folder: rewritten(
        folder, IMAGES, with_column("keypoints", lambda texts: [texts[-2], *texts[1:]])
    ),
    "metadata no JSON": lambda folder: rewritten(folder, IMAGES, with_column("metadata", lambda m: ["{", *m[1:]])),
    "metadata no object": lambda folder: rewritten(folder, IMAGES, with_column("metadata", lambda m: ["[]", *m[1:]])),
    "metadata deep": lambda folder: rewritten(
        folder, IMAGES, with_column("metadata", lambda m: ["[" * 100_000, *m[1:]])
    ),
    "count too large": lambda folder: rewritten(
        folder, IMAGES, with_column("feature_count", lambda counts: [1 << 40, *counts[1:]])
    ),
}


@pytest.mark.parametrize("damage", BEFORE_ANYTHING)
def test_a_damaged_export_is_refused_before_anything_is_written(tmp_path: Path, exported: Path, damage: str) -> None:
    BEFORE_ANYTHING[damage](exported)
    with open_store(tmp_path / "to.db") as store:
        with pytest.raises(InputError, match=r"damaged|no export|cannot be read") as error:
            import_collection(store, exported)
        assert "\n" not in str(error.value)
        assert store.facts is None


@pytest.mark.parametrize("damage", BY_ITS_ROWS)
def test_rows_that_do_not_belong_together_are_refused(tmp_path: Path, exported: Path, damage: str) -> None:
    BY_ITS_ROWS[damage](exported)
    with open_store(tmp_path / "to.db") as store:
        with pytest.raises(InputError, match="damaged") as error:
            import_collection(store, exported)
        assert "\n" not in str(error.value)
        assert store.count_images() == 0


def test_another_model_is_refused_before_anything_is_written(tmp_path: Path, exported: Path) -> None:
    with open_store(tmp_path / "to.db", OTHER_MODEL) as store:
        with pytest.raises(CollectionError, match=r"weights: weights-a here, weights-b there"):
            import_collection(store, exported)
        assert store.facts is None
        store.write(random_items(1, 2, 30))
    with open_store(tmp_path / "to.db", fingerprint=None) as store:
        with pytest.raises(CollectionError, match="weights-a"):
            import_collection(store, exported)
        assert store.count_images() == 2


def test_another_schema_version_is_refused(tmp_path: Path, exported: Path) -> None:
    edited(exported, lambda manifest: manifest["facts"].update(schema_version=2))
    with open_store(tmp_path / "to.db") as store, pytest.raises(CollectionError, match="schema version 2"):
        import_collection(store, exported)


def test_a_collection_for_fewer_features_is_refused_and_one_for_more_is_filled(tmp_path: Path) -> None:
    large = replace(MODEL, dim=100)
    items = [(ImageRecord("a"), random_features(np.random.default_rng(1), 20, 100))]
    few, many = (tmp_path / "few.db", 20), (tmp_path / "many.db", 1000)
    for (path, most), name in ((few, "few"), (many, "many")):
        with open_store(path, large, most) as store:
            store.write(items)
            export_collection(store, tmp_path / name)
    with open_store(*few[:1], large, few[1]) as store, pytest.raises(CollectionError, match="fewer features"):
        import_collection(store, tmp_path / "many")
    with open_store(tmp_path / "to.db", large, 1000) as store:
        store.write([(ImageRecord("b"), items[0][1])])
        import_collection(store, tmp_path / "few")
        assert len(store.stored([items[0][0].key])[items[0][0].key][1]) == 20


def test_a_footer_whose_names_are_no_text_is_refused(tmp_path: Path, exported: Path) -> None:
    manifest = json.loads((exported / MANIFEST).read_text())
    entry = manifest["parts"][0]["images"]
    path = exported / entry["file"]
    path.write_bytes(path.read_bytes().replace(b"image_id", b"image_\xd9d"))
    entry["sha256"] = file_digest(path)
    (exported / MANIFEST).write_text(json.dumps(manifest))
    with (
        open_store(tmp_path / "to.db") as store,
        pytest.raises(InputError, match=r"images-00000\.parquet is damaged"),
    ):
        import_collection(store, exported)
