"""`bench` measures what a plan reads, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
from milvus_server import WheelServer
from pymilvus import MilvusClient

from delf_milvus.errors import CollectionError
from delf_milvus.features import Fingerprint
from delf_milvus.planning import coefficients
from delf_milvus.planning.bench import LEAST_ROWS, BenchConfig, bench
from delf_milvus.planning.model import PlanRequest, make_plan
from delf_milvus.planning.processes import listener, name_of, resident_bytes
from delf_milvus.planning.synthetic import DIM, image
from delf_milvus.settings import Settings, StoreSettings
from delf_milvus.store.feature_store import FeatureStore

QUICK = BenchConfig(minutes=0.01, rows=2 * LEAST_ROWS, presets=())
OWN = Fingerprint("own", "norm", DIM, 640, (1.0,), 16)


def silent(_: str) -> None:
    pass


def interrupted(line: str) -> None:
    """Ctrl-C, once rows were written."""
    if line.startswith("written"):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_bench_with_milvus_lite_leaves_nothing_and_its_file_makes_a_plan(tmp_path: Path) -> None:
    settings = Settings(uri=str(tmp_path / "mine.db"))
    made = bench(settings, QUICK, silent)
    assert list(tmp_path.iterdir()) == []
    measured = {"lite_write_rows_per_second", "lite_code_seconds", "lite_neighbour_seconds", "lite_disk_row_bytes"}
    assert measured <= made.coefficients.keys()
    assert len(made.held_out) == 1
    assert made.coefficients["lite_disk_row_bytes"].value > 4 * DIM
    made.write(tmp_path / "c.json")
    known = coefficients.read(tmp_path / "c.json")
    plan = make_plan(PlanRequest(images=1000), coefficients=known)
    assert next(one.source for one in plan.estimates if one.name == "lite.disk").startswith("measured here 20")


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_of_milvus_lite(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        bench(Settings(uri=str(tmp_path / "mine.db")), QUICK, interrupted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.server
@pytest.mark.slow
def test_a_server_keeps_its_own_collections_and_nothing_of_the_bench(wheel_server: WheelServer) -> None:
    settings = Settings(uri=wheel_server.uri, collection="planned", store=StoreSettings(timeout=120))
    client = MilvusClient(wheel_server.uri)
    before = set(client.list_collections())
    with FeatureStore.open(settings.uri, "planned", OWN, settings.store) as store:
        store.write([image(1, 30)])
    try:
        made = bench(settings, QUICK, silent)
        assert set(client.list_collections()) - before == {"planned_images", "planned_features"}
        with pytest.raises(KeyboardInterrupt):
            bench(settings, QUICK, interrupted)
        assert set(client.list_collections()) - before == {"planned_images", "planned_features"}
        with FeatureStore.open(settings.uri, "planned", OWN, settings.store) as store:
            assert store.count_features() == 30
        assert {"write_rows_per_second", "search_fixed_seconds", "search_code_seconds"} <= made.coefficients.keys()
        assert any("files are not seen" in line for line in made.not_measured)
        # Rows of somebody else under the name that the bench would take.
        with FeatureStore.open(settings.uri, "planned_bench", OWN, settings.store) as store:
            store.write([image(2, 20)])
        with pytest.raises(CollectionError, match="another model"):
            bench(settings, QUICK, silent)
        with FeatureStore.open(settings.uri, "planned_bench", OWN, settings.store) as store:
            assert store.count_features() == 20
    finally:
        for name in set(client.list_collections()) - before:
            client.drop_collection(name)
        client.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_process_that_listens_is_found_and_its_memory_read() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
        assert listener(port) is None
        one.listen()
        assert listener(port) == os.getpid()
    assert listener(port) is None
    here = resident_bytes()
    assert here is not None
    assert here > 10**6
    assert resident_bytes(2**22 + 1) is None
    assert name_of(os.getpid())
    assert name_of(2**22 + 1) == ""
