"""`doctor`, `fsck` and `compact` as an operator meets them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from milvus_server import COMPOSE
from test_commands import call

sys.path.insert(0, str(Path(__file__).parents[1] / "store"))

from store_samples import MODEL, random_items

from delf_milvus.settings import StoreSettings
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.keys import image_key
from delf_milvus.store.profiles import ROW_OVERHEAD


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A folder whose database has three images, one of them without its row."""
    uri = str(tmp_path / "delf_milvus.db")
    with FeatureStore.open(uri, "delf", MODEL, StoreSettings(), max_features=100) as store:
        store.write(random_items(1, 3, 20))
        store._client.delete("delf_images", ids=[image_key("img/00001.jpg")])
    return tmp_path


def test_fsck_lists_mends_and_ends_with_its_exit_code(damaged: Path) -> None:
    found = call(damaged, "fsck")
    assert found.returncode == 1
    assert found.stdout.splitlines()[-1].startswith("1 findings in 2 images and 60 features, 0 mended")
    assert "orphan_features: features without an image row: --repair deletes them" in found.stderr
    report = json.loads(call(damaged, "--json", "fsck").stdout)
    assert (report["clean"], report["repaired"], report["features"]) == (False, False, 60)
    (finding,) = report["findings"]
    assert (finding["kind"], finding["rows"], finding["mended"]) == ("orphan_features", 20, False)
    mended = call(damaged, "fsck", "--repair")
    assert (mended.returncode, "1 mended" in mended.stdout) == (0, True)
    clean = call(damaged, "fsck")
    assert (clean.returncode, clean.stderr) == (0, "")
    assert clean.stdout.startswith("0 findings in 2 images and 40 features")


def test_doctor_is_exit_code_3_when_a_check_fails(damaged: Path) -> None:
    # The collection is of another model than the bundled one.
    sick = call(damaged, "--json", "doctor")
    assert sick.returncode == 3
    answer = json.loads(sick.stdout)
    assert [check["name"] for check in answer["checks"] if check["state"] == "fail"] == ["model"]
    assert answer["fail"] == 1
    table = call(damaged, "--collection", "other", "doctor", "--read-only")
    assert table.returncode == 0
    assert table.stdout.splitlines()[0].split() == ["state", "check", "seen", "to", "do"]
    missing = call(damaged, "--model", "missing.safetensors", "doctor", "--read-only")
    assert missing.returncode == 3
    assert "missing.safetensors" in missing.stdout


def test_compact_and_status(damaged: Path) -> None:
    assert "by itself" in call(damaged, "compact").stdout
    status = json.loads(call(damaged, "--json", "status").stdout)
    assert (status["indexed_rows"], status["index_total_rows"]) == (60, 60)
    assert status["memory_bytes"] == 60 * (4 * MODEL.dim + ROW_OVERHEAD)


def test_operating_on_nothing_is_one_sentence(tmp_path: Path) -> None:
    for command in ("fsck", "compact"):
        result = call(tmp_path, command)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (4, "", 1)


def test_every_command_has_an_example(tmp_path: Path) -> None:
    for command in ("doctor", "fsck", "compact"):
        words = call(tmp_path, command, "--help").stdout.replace("--uri http://localhost:19530 ", "")
        assert f"delf-milvus {command}" in words


def test_compose_publishes_one_port_on_the_loopback_interface_and_knows_no_secret() -> None:
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert {name: service.get("ports", []) for name, service in services.items()} == {
        "etcd": [],
        "minio": [],
        "milvus": ["${MILVUS_BIND:-127.0.0.1}:${MILVUS_PORT:-19530}:19530"],
    }
    secrets = [
        value
        for service in services.values()
        for name, value in service["environment"].items()
        if any(word in name for word in ("USER", "PASSWORD", "KEY"))
    ]
    assert len(secrets) == 5
    assert all(":?" in value for value in secrets)
    for service in services.values():
        assert {"healthcheck", "volumes", "mem_limit", "cpus"} <= service.keys()
    example = (COMPOSE.parent / ".env.example").read_text().splitlines()
    assigned = [line for line in example if line and not line.startswith("#")]
    assert assigned == ["MINIO_ROOT_USER=", "MINIO_ROOT_PASSWORD=", "MILVUS_ROOT_PASSWORD="]
