"""The plan against what was measured, against what deploy/helm works out, and against what any plan must hold to."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delf_milvus.errors import UsageError
from delf_milvus.planning.coefficients import DEFAULTS, Coefficient
from delf_milvus.planning.hardware import Hardware
from delf_milvus.planning.model import Plan, PlanRequest, make_plan
from delf_milvus.settings import Profile

# README.md, Benchmarks, growth: photos of 1000 descriptors, 1000 of a query, Milvus 2.3.5, two cores, nothing beside.
# 1M and 10M are of one machine; the second 1M and 5M of another one, which builds an index in two thirds of the time.
RECORDED = [
    (1_000_000, {"memory": 0.82e9, "search": 0.29, "segments": 2, "build": 220.0, "compare": 0.29}),
    (10_000_000, {"memory": 2.13e9, "search": 0.93, "segments": 4, "build": 4359.0, "compare": 0.26}),
    (1_000_000, {"memory": 0.80e9, "search": 0.28, "segments": 2, "build": 131.0, "compare": 0.25}),
    (5_000_000, {"memory": 1.22e9, "search": 0.49, "segments": 3, "build": 1508.0, "compare": 0.23}),
]


def measured_collection(rows: int, profile: Profile = "IVF_PQ") -> Plan:
    """The plan for a collection of the growth table."""
    request = PlanRequest(
        images=rows // 1000, features=1000, query_features=1000, global_dim=40, profile=profile, release=(2, 3)
    )
    return make_plan(request, Hardware(query_cores=2))


def off(plan: Plan, name: str, measured: float) -> float:
    value = plan[name]
    assert value is not None
    return abs(value / measured - 1)


@pytest.mark.parametrize(("rows", "measured"), RECORDED)
def test_memory_is_met(rows: int, measured: dict[str, float]) -> None:
    # Fitted to 100,000, 5M and 10M: both of 1M are held out.
    assert off(measured_collection(rows), "standalone.memory", measured["memory"]) < 0.2


@pytest.mark.parametrize(("rows", "measured"), RECORDED)
def test_search_times_are_met(rows: int, measured: dict[str, float]) -> None:
    # Fitted to 100,000 and 10M: the others are held out. A plan counts merged segments: one of 1M, which had two.
    plan = measured_collection(rows)
    assert off(plan, "standalone.search", measured["search"]) < 0.25
    assert off(plan, "client.compare", measured["compare"]) < 0.2
    more = measured["segments"] - (plan["segments"] or 0)
    of_segments = 1000 * more * DEFAULTS["search_segment_seconds"].value / 2
    assert ((plan["standalone.search"] or 0) + of_segments) / measured["search"] == pytest.approx(1, abs=0.1)


def test_small_collections_are_fitted_too() -> None:
    assert off(measured_collection(100_000), "standalone.search", 0.14) < 0.05


def test_more_cores_share_segments_and_codes_but_not_the_neighbours_that_are_returned() -> None:
    few = PlanRequest(images=10**6, profile="IVF_PQ", neighbours=120)
    found = {
        (neighbours, cores): make_plan(replace(few, neighbours=neighbours), Hardware(query_cores=cores))
        for neighbours in (120, 240)
        for cores in (2, 200)
    }
    times = {key: plan["standalone.search"] or 0.0 for key, plan in found.items()}
    more = times[240, 2] - times[120, 2]
    assert more > 0
    assert times[240, 200] - times[120, 200] == pytest.approx(more)
    assert times[120, 200] - more == pytest.approx((times[120, 2] - more) / 100)


@pytest.mark.parametrize(("rows", "measured"), RECORDED)
def test_build_times_of_both_machines_are_met(rows: int, measured: dict[str, float]) -> None:
    # Fitted to these and to 100,000: none is held out.
    assert off(measured_collection(rows), "standalone.build", measured["build"]) < 0.35


@pytest.mark.parametrize(
    ("images", "loaded", "disk", "store", "segments"),
    [(200_000, 6.6e9, 2 * 27e9, 60e9, 20), (2_000_000, 66e9, 2 * 271e9, 600e9, 200)],
)
def test_the_cluster_is_the_one_that_the_helm_values_work_out(
    images: int, loaded: float, disk: float, store: float, segments: int
) -> None:
    plan = make_plan(PlanRequest(images=images, features=500, profile="IVF_PQ"))
    assert off(plan, "query.memory", loaded) < 0.05  # what is more are the photos' global descriptors
    assert off(plan, "query.disk", disk) < 0.02
    assert off(plan, "object_store", store) < 0.03
    assert off(plan, "segments", segments) < 0.05
    assert (plan.index, plan.index_params) == ("IVF_PQ", {"nlist": 2048, "m": 20, "nbits": 8})


def test_a_photo_takes_the_bytes_that_the_readme_tells() -> None:
    plan = make_plan(PlanRequest(images=1_000_000, profile="IVF_PQ"))
    room, copies = DEFAULTS["memory_room"].value, DEFAULTS["storage_copies"].value
    assert off(plan, "query.memory", 22e3 * 1e6 * room) < 0.05
    assert off(plan, "query.disk", 136e3 * 1e6 * copies) < 0.02


IMAGES = st.integers(1, 10**10)
FEATURES = st.integers(1, 4096)
EVEN = st.integers(1, 256).map(lambda half: 2 * half)
BYTES = (
    "raw_bytes",
    "index_bytes",
    "standalone.memory",
    "standalone.disk",
    "query.memory",
    "query.disk",
    "object_store",
)


@given(images=IMAGES, features=FEATURES, dim=EVEN, more=st.sampled_from(["images", "features", "dim"]))
def test_bytes_grow_with_images_features_and_components(images: int, features: int, dim: int, more: str) -> None:
    small = PlanRequest(images=images, features=features, dim=dim, profile="IVF_PQ")
    large = replace(small, **{more: getattr(small, more) + 2})
    first, second = make_plan(small), make_plan(large)
    for name in BYTES:
        before, after = first[name], second[name]
        assert before is not None
        assert after is not None
        assert after >= before, name


def test_features_that_are_only_compared_take_disk_and_no_memory() -> None:
    every, some, few = (
        make_plan(PlanRequest(images=10**6, features=features, indexed=indexed, profile="IVF_PQ"))
        for features, indexed in ((500, None), (500, 81), (81, None))
    )
    assert some["image.memory"] == few["image.memory"]
    assert off(some, "image.memory", 528 + 81 * 44) < 0.01
    assert off(every, "image.memory", 528 + 500 * 44) < 0.01
    packed = 63 * (500 - 81)
    assert off(some, "image.disk", (few["image.disk"] or 0) + packed) < 0.01
    assert (some["standalone.search"], some["descriptors"]) == (few["standalone.search"], 81e6)


@given(images=IMAGES, features=FEATURES, indexed=st.integers(1, 4096))
def test_no_more_than_the_stored_features_are_indexed(images: int, features: int, indexed: int) -> None:
    plan = make_plan(PlanRequest(images=images, features=features, indexed=indexed, profile="IVF_PQ"))
    whole = make_plan(PlanRequest(images=images, features=features, profile="IVF_PQ"))
    assert plan["descriptors"] == images * min(features, indexed)
    for name in BYTES:
        assert (plan[name] or 0) <= (whole[name] or 0), name


@given(images=IMAGES, half=st.integers(1, 2048), dim=st.integers(1, 512))
def test_half_the_features_are_half_the_raw_bytes(images: int, half: int, dim: int) -> None:
    whole = make_plan(PlanRequest(images=images, features=2 * half, dim=dim))["raw_bytes"]
    halved = make_plan(PlanRequest(images=images, features=half, dim=dim))["raw_bytes"]
    assert whole is not None
    assert halved is not None
    assert whole == 2 * halved


@given(
    images=IMAGES,
    features=FEATURES,
    dim=st.integers(1, 512),
    profile=st.sampled_from(["auto", "FLAT", "IVF_PQ", "IVF_SQ8", "HNSW", "SCANN", "IVF_RABITQ", "DISKANN"]),
    preset=st.sampled_from(["fast", "standard", "paper"]),
    replicas=st.integers(1, 9),
    rate=st.none() | st.floats(0, 1e6),
)
def test_no_estimate_is_negative_or_endless_and_each_has_a_source(
    images: int, features: int, dim: int, profile: Profile, preset: str, replicas: int, rate: float | None
) -> None:
    request = PlanRequest(
        images=images,
        features=features,
        dim=dim,
        profile=profile,
        preset=preset,  # type: ignore[arg-type]
        replicas=replicas,
        queries_per_second=rate,
    )
    plan = make_plan(request)
    assert len(set(plan.names)) == len(plan.names)
    for one in plan.estimates:
        assert one.source
        assert one.value is None or (one.value >= 0 and math.isfinite(one.value)), one
    assert sum(plan.shares.values()) == pytest.approx(1)
    assert all(share > 0 for share in plan.shares.values())
    for driver in plan.drivers:
        assert 0 < driver.storage <= 1.001, driver


def test_times_of_an_index_that_nobody_measured_are_not_guessed() -> None:
    plan = make_plan(PlanRequest(images=10**6, profile="HNSW", queries_per_second=5))
    for name in ("standalone.search", "standalone.build", "query.rate", "query.nodes", "query.search", "data.nodes"):
        assert plan[name] is None
    assert plan["query.memory"] is not None
    for name in ("lite.memory", "lite.disk", "lite.search"):
        assert plan[name] is None
    assert all(driver.search is None for driver in plan.drivers)


def test_the_nodes_serve_the_rate_that_is_wanted_and_hold_what_is_loaded() -> None:
    asked = PlanRequest(images=10**6, queries_per_second=0.5)
    plan, slow = make_plan(asked), make_plan(replace(asked, queries_per_second=1e-9))
    rate, nodes = plan["query.rate"], plan["query.nodes"]
    assert rate is not None
    assert nodes is not None
    assert nodes * rate >= 0.5 > (nodes - 1) * rate
    assert slow["query.nodes"] == slow["query.nodes_for_memory"] == plan["query.nodes_for_memory"]


def test_each_replica_has_as_many_nodes() -> None:
    plan = make_plan(PlanRequest(images=10**6, queries_per_second=3.9, replicas=3))
    nodes, for_rate = plan["query.nodes"], plan["query.nodes_for_rate"]
    assert nodes is not None
    assert for_rate is not None
    assert for_rate % 3
    assert nodes % 3 == 0
    assert 0 < nodes - for_rate < 3


@pytest.mark.parametrize("release", [(2, 5), (2, 6)])
def test_the_memory_of_all_nodes_is_that_of_their_roles(release: tuple[int, int]) -> None:
    plan = make_plan(PlanRequest(images=10**6, release=release))
    new = release == (2, 6)
    assert ("streaming.memory" in plan.names) == new
    role = "data" if new else "index"
    of = {name: plan[name] or 0 for name in plan.names}
    parts = of["query.memory"] + of[f"{role}.nodes"] * of[f"{role}.memory"] + of["coordinator.memory"]
    parts += 2 * of["proxy.memory"] + (2 * of["streaming.memory"] if new else of["data.memory"])
    assert of["cluster.memory"] == pytest.approx(parts)


def test_replicas_multiply_memory_and_disk_of_query_nodes_and_nothing_else() -> None:
    one, three = (make_plan(PlanRequest(images=10**6, replicas=count)) for count in (1, 3))
    for name in ("query.memory", "query.disk", "query.nodes_for_memory", "object_store", "raw_bytes", "build"):
        before, after = one[name], three[name]
        assert before is not None
        assert after == pytest.approx(before * (3 if name.startswith("query") else 1))


def test_index_nodes_are_those_of_releases_that_have_them() -> None:
    new, old = make_plan(PlanRequest(images=10**6)), make_plan(PlanRequest(images=10**6, release=(2, 5)))
    assert "index.memory" not in new.names
    assert {"index.memory", "index.nodes", "data.memory"} <= set(old.names)


def test_a_plan_of_measured_coefficients_follows_them_and_names_them() -> None:
    mine = {**DEFAULTS, "extract_standard_core_seconds": Coefficient(2.0, "core seconds a photo", "measured here")}
    plan = make_plan(PlanRequest(images=3600), Hardware(extract_cores=2), mine)
    assert plan["extract.cpu"] == 3600
    assert next(one.source for one in plan.estimates if one.name == "extract.cpu") == "measured here"


def test_what_no_plan_can_be_made_for_is_refused() -> None:
    for request in (PlanRequest(images=0), PlanRequest(images=10**13, features=1000)):
        with pytest.raises(UsageError, match=r"10\^15 descriptors"):
            make_plan(request)
    with pytest.raises(UsageError, match=r"needs Milvus 2\.6"):
        make_plan(PlanRequest(images=10**6, profile="IVF_RABITQ", release=(2, 5)))
    for rate in (math.inf, math.nan, -1.0):
        with pytest.raises(UsageError, match="Searches a second are a number"):
            make_plan(PlanRequest(images=10**6, profile="IVF_PQ", queries_per_second=rate))
    with pytest.raises(KeyError):
        make_plan(PlanRequest(images=1))["no such estimate"]
