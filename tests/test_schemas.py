"""The committed schemas are those of the code, and what the program really prints and stores fits them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_photo, save_photo
from jsonschema import Draft202012Validator

from delf_milvus.schemas import schemas, write
from delf_milvus.settings import Settings, load
from delf_milvus.store.codec import chunks_needed
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.transfer import MANIFEST

COMMITTED = Path(__file__).parents[1] / "schemas"
LICENCES = "licences.md"
"""Of what is installed, and not of the code: `tests/test_package.py` checks it."""


def valid(name: str, value: Any) -> bool:
    """Whether a value, as JSON, fits the committed schema; says where it does not."""
    schema = json.loads((COMMITTED / f"{name}.schema.json").read_text(encoding="utf-8"))
    problems = [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(value)]
    assert not problems, problems
    return True


def test_the_committed_schemas_and_pages_are_current(tmp_path: Path) -> None:
    committed = {path.name for path in COMMITTED.iterdir()} - {LICENCES}
    assert [path.name for path in write(tmp_path)] == sorted(committed)
    for path in tmp_path.iterdir():
        assert (COMMITTED / path.name).read_text() == path.read_text(), "run `make schemas`"


@pytest.mark.parametrize("name", schemas())
def test_each_is_a_schema_of_its_dialect(name: str) -> None:
    Draft202012Validator.check_schema(schemas()[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schemas")
    for seed in range(3):
        save_photo(folder / "photos" / f"{seed}.png", make_photo(seed))
    (folder / "photos" / "broken.jpg").write_bytes(b"no photo")
    save_photo(folder / "query.png", np.ascontiguousarray(make_photo(1)[20:220, 30:300]))
    return folder


def printed(folder: Path, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "delf_milvus.cli.main", "--json", *arguments],
        cwd=folder,
        env={**os.environ, "DELF_MILVUS_EXTRACT__PRESET": "fast"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_what_the_commands_print_fits(folder: Path) -> None:
    report = printed(folder, "ingest", "photos")
    assert valid("ingest_report", report)
    assert (report["added"], report["failed"]) == (3, 1)
    result = printed(folder, "search", "query.png")
    assert valid("search_result", result)
    assert result["hits"][0]["transform"] is not None
    assert valid("search_result", printed(folder, "search", "photos/0.png", "--top", "1"))
    assert valid("status", printed(folder, "status"))
    assert valid("export_report", printed(folder, "export", "backup"))
    assert valid("export_manifest", json.loads((folder / "backup" / MANIFEST).read_text()))
    assert valid("import_report", printed(folder, "--uri", "copy.db", "import", "backup"))
    assert valid("status", printed(folder, "--uri", "copy.db", "status"))

    with FeatureStore.open(str(folder / "copy.db"), "delf", None, Settings().store) as store:
        described = {
            name: store._client.describe_collection(f"delf_{name}")["fields"] for name in ("images", "features")
        }
        records = list(store.list())
        rows = store.rows([record.key for record in records])
        columns = store.feature_columns({records[0].key: records[0].feature_count})
    for row in rows.values():
        assert valid("images", {**row, "global_descriptor": [float(value) for value in row["global_descriptor"]]})
    first = {name: values[0].tolist() for name, values in columns.items()}
    assert valid("features", first)
    for name, fields in described.items():
        assert {field["name"]: told(field) for field in fields} == {
            field: wanted["x-milvus"] for field, wanted in schemas()[name]["properties"].items()
        }


def told(field: dict[str, Any]) -> dict[str, Any]:
    """What Milvus says of a field, in the words of `x-milvus`."""
    found = {"type": field["type"].name, "primary": bool(field.get("is_primary", False))}
    if found["type"] == "VARCHAR":
        found["max_length"] = int(field["params"]["max_length"])
    return found


def test_rows_with_more_packed_fields_fit_and_others_do_not(folder: Path) -> None:
    assert chunks_needed(1000, 40) > 1
    packed = {"keypoints": "a", "keypoints_1": "b"}
    row = {
        **dict.fromkeys(("image_id", "uri", "sha256", "model", "ingested_at", "root"), ""),
        **dict.fromkeys(("image_key", "width", "height", "feature_count"), 1),
        "global_descriptor": [0.5],
        "title": {"free": ["metadata"]},
    }
    assert valid("images", {**row, **packed})
    images, features = (Draft202012Validator(schemas()[name]) for name in ("images", "features"))
    assert not images.is_valid(row)
    assert not images.is_valid({**row, **packed, "keypoints_1": 3})
    assert not images.is_valid({**row, **packed, "width": "wide"})
    assert not features.is_valid({"feature_key": 1})


def test_settings_fit_and_unknown_ones_do_not() -> None:
    values = json.loads(load().settings.model_dump_json())
    assert valid("settings", values)
    validator = Draft202012Validator(schemas()["settings"])
    assert not validator.is_valid({**values, "unknown": 1})
    assert not validator.is_valid({**values, "search": {"top": 0}})


@pytest.mark.parametrize(
    "change",
    [{"format": "other"}, {"version": 2}, {"images": -1}, {"extra": 1}, {"parts": [{}]}, {"facts": {}}],
)
def test_the_schema_of_the_manifest_refuses_what_an_import_refuses(change: dict[str, Any]) -> None:
    file = {"file": "images-00000.parquet", "rows": 1, "bytes": 1, "sha256": "0" * 64}
    fingerprint = {"weights": "w", "selection": "norm", "dim": 2, "longest_side": 640, "scales": [1.0], "stride": 16}
    manifest = {
        **dict.fromkeys(("created_at", "software", "backend", "collection", "prefix"), ""),
        "facts": {"fingerprint": fingerprint, "chunks": 1},
        "images": 1,
        "features": 1,
        "parts": [{"images": file, "features": {**file, "file": "features-00000.parquet"}}],
    }
    assert valid("export_manifest", manifest)
    assert not Draft202012Validator(schemas()["export_manifest"]).is_valid({**manifest, **change})
