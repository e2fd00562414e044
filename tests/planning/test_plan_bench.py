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
from delf_milvus.planning.bench import (
    FEATURES,
    LEAST_ROWS,
    MOST_ROWS,
    BenchConfig,
    _cores,
    _fit_memory,
    _fit_search,
    _Notes,
    _Searched,
    bench,
)
from delf_milvus.planning.model import PlanRequest, make_plan
from delf_milvus.planning.processes import listener, name_of, resident_bytes
from delf_milvus.planning.synthetic import DIM, image
from delf_milvus.settings import Settings, StoreSettings
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.profiles import Engine

QUICK = BenchConfig(minutes=0.01, rows=2 * LEAST_ROWS, presets=())
OWN = Fingerprint("own", "norm", DIM, 640, (1.0,), 16)


def silent(_: str) -> None:
    pass


def interrupted(line: str) -> None:
    """Ctrl-C, once rows were written."""
    if line.startswith("written"):
        signal.raise_signal(signal.SIGINT)


def assert_fitted_or_said(made: coefficients.CoefficientFile, names: set[str]) -> None:
    """So few rows may not tell how a search grows."""
    if names <= made.coefficients.keys():
        assert len(made.held_out) == 1
    else:
        assert not names & made.coefficients.keys()
        assert sum(line.startswith("search: ") for line in made.not_measured) == 1


@pytest.mark.parametrize("lite", [True, False])
@pytest.mark.parametrize(
    ("microseconds", "fitted"),
    [
        ((110, 140, 120, 180), True),
        ((140, 110, 120, 100), False),  # faster with more codes
        ((1, 140, 60, 400), False),  # less than nothing without any
        ((110, 140, 120, 500), False),  # the last one is far from what the others tell
    ],
)
def test_search_times_that_do_not_tell_how_they_grow_are_no_coefficients(
    lite: bool, microseconds: tuple[float, ...], fitted: bool
) -> None:
    codes = (1000, 4000, 2000, 8000)
    notes = _Notes(silent)
    found = [_Searched(many, 1e-6 * each, not lite) for many, each in zip(codes, microseconds, strict=True)]
    _fit_search(found, found, 10**5, lite, notes)
    prefix = "lite_" if lite else "search_"
    assert all(name.startswith(prefix) and one.value > 0 for name, one in notes.measured.items())
    assert (bool(notes.measured), len(notes.held_out), len(notes.missing)) == (fitted, fitted, not fitted)
    if not lite and fitted:
        assert notes.measured["search_code_seconds"].value == pytest.approx(10e-9 * _cores())
        of_one, each = (notes.measured[f"search_{name}_seconds"].value for name in ("segment", "neighbour_core"))
        assert of_one + 120 * each == pytest.approx(100e-6 * _cores())


@pytest.mark.parametrize(
    ("more", "segment", "neighbours"),
    [
        ((0, 0, 120, 120), 60, 40),
        ((0, 0, 240, 240), 120, 0),  # more than what one segment took: noise, and never less than nothing
        ((0, 0, -50, -50), None, None),  # faster with more segments: not seen
    ],
)
def test_a_segment_takes_what_a_search_took_less_once_it_was_merged(
    more: tuple[float, ...], segment: float | None, neighbours: float | None
) -> None:
    notes = _Notes(silent)
    codes, merged = (1000, 4000, 2000, 8000), (110, 140, 120, 180)
    after = [_Searched(many, 1e-6 * each, 1) for many, each in zip(codes, merged, strict=True)]
    before = [
        _Searched(one.codes, one.seconds + 1e-6 * extra, number)
        for one, extra, number in zip(after, more, (1, 1, 3, 3), strict=True)
    ]
    _fit_search(after, before, 10**5, False, notes)
    found = {name: notes.measured[f"search_{name}_seconds"] for name in ("segment", "neighbour", "code")}
    assert found["code"].value == pytest.approx(10e-9 * _cores())
    if segment is None:
        assert "as by default" in found["segment"].source
        assert found["segment"].value / _cores() + 120 * found["neighbour"].value == pytest.approx(100e-6)
    else:
        assert found["segment"].value == pytest.approx(1e-6 * segment * _cores())
        assert 120 * found["neighbour"].value == pytest.approx(1e-6 * (neighbours or 0))


@pytest.mark.parametrize("grown", [0, 150e6, 250e6, 400e6, 900e6])
def test_a_plan_of_measured_memory_tells_what_was_measured(grown: float) -> None:
    notes = _Notes(silent)
    before, rows = 230_000_000, MOST_ROWS
    _fit_memory(
        before, int(before + grown), rows, lite=False, alone=True, engine=Engine.of("Milvus 2.3.5"), notes=notes
    )
    request = PlanRequest(rows // FEATURES, FEATURES, global_dim=DIM, profile="IVF_PQ", release=(2, 3))
    told = make_plan(request, coefficients={**coefficients.DEFAULTS, **notes.measured})["standalone.memory"]
    # Below the bytes of the rows' fields alone nothing is left to fit.
    assert told == pytest.approx(before + max(grown, 0.1399e9), rel=0.01)
    assert notes.measured["memory_base_bytes"].value >= before


@pytest.mark.slow
def test_bench_with_milvus_lite_leaves_nothing_and_its_file_makes_a_plan(tmp_path: Path) -> None:
    settings = Settings(uri=str(tmp_path / "mine.db"))
    made = bench(settings, QUICK, silent)
    assert list(tmp_path.iterdir()) == []
    assert {"lite_write_rows_per_second", "lite_disk_row_bytes"} <= made.coefficients.keys()
    assert_fitted_or_said(made, {"lite_code_seconds", "lite_neighbour_seconds"})
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
        assert "write_rows_per_second" in made.coefficients
        names = ("neighbour", "neighbour_core", "segment", "code")
        assert_fitted_or_said(made, {f"search_{name}_seconds" for name in names})
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
