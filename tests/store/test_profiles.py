import pytest

from delf_milvus.errors import UsageError
from delf_milvus.settings import Profile
from delf_milvus.store.profiles import (
    INDEX_FROM,
    PROFILES,
    Engine,
    Wishes,
    choose,
    lists_for,
    memory_bytes,
    rows_in_segment,
    search_params,
)

LITE = Engine.of("Milvus Lite 3.2.2")
OLD = Engine.of("Milvus 2.3.5-lite")  # as the wheel for tests says: a full server
NEW = Engine.of("Milvus 2.6.4")
GPU = Engine.of("Milvus 2.6.4-gpu")
CLOUD = Engine.of("Zilliz Cloud Vector Database(Compatible with Milvus 2.5)")


def test_the_version_says_what_the_other_end_can_do() -> None:
    assert Engine("lite", (3, 2), gpu=False, managed=False) == LITE
    assert Engine("server", (2, 3), gpu=False, managed=False) == OLD
    assert Engine("server", (2, 6), gpu=True, managed=False) == GPU
    assert Engine("server", (2, 5), gpu=False, managed=True) == CLOUD
    assert Engine.of("Milvus master-abcdef").release > (2, 6)


def test_a_small_collection_is_searched_exactly() -> None:
    assert choose("auto", LITE, 40, INDEX_FROM - 1).index_type == "FLAT"
    assert choose("auto", OLD, 40, 0).index_type == "FLAT"


def test_a_server_gets_ivf_pq_at_size() -> None:
    profile = choose("auto", OLD, 40, 1_000_000)
    assert (profile.index_type, profile.index_params) == ("IVF_PQ", {"nlist": 1024, "m": 20, "nbits": 8})
    assert profile.substitute_for == ""
    assert profile.build_params("server") == {"nlist": 1024, "m": 20, "nbits": 8}


def test_a_managed_service_gets_the_only_index_it_has() -> None:
    assert choose("auto", CLOUD, 40, 10).index_type == "AUTOINDEX"
    with pytest.raises(UsageError, match="Zilliz Cloud has no IVF_PQ"):
        choose("IVF_PQ", CLOUD, 40, 10**6)


@pytest.mark.parametrize("asked", ["auto", "IVF_PQ", "PAPER"])
def test_milvus_lite_gets_a_named_substitute_for_ivf_pq(asked: Profile) -> None:
    profile = choose(asked, LITE, 40, 1_000_000)
    assert (profile.index_type, profile.substitute_for, profile.asked) == ("IVF_SQ8", "IVF_PQ", asked)


@pytest.mark.parametrize("asked", PROFILES)
@pytest.mark.parametrize("rows", [0, 10, 100_000, 10**8])
def test_milvus_lite_is_sent_only_what_it_has(asked: Profile, rows: int) -> None:
    if asked in ("auto", "FLAT", "IVF_PQ", "PAPER", "IVF_SQ8", "HNSW"):
        assert choose(asked, LITE, 40, rows).index_type in ("FLAT", "IVF_SQ8", "HNSW")
    else:
        with pytest.raises(UsageError, match=f"Milvus Lite has no {asked}: use a Milvus server"):
            choose(asked, LITE, 40, rows)


def test_milvus_lite_reads_nested_parameters_only() -> None:
    params = choose("IVF_SQ8", LITE, 40, 1_000_000).build_params("lite")
    assert params == {"nlist": 1024, "params": {"nlist": 1024}}


def test_the_papers_index_is_a_profile_of_its_own() -> None:
    profile = choose("PAPER", OLD, 40, 10**6)
    assert (profile.index_type, profile.index_params) == ("IVF_PQ", {"nlist": 8192, "m": 10, "nbits": 5})
    with pytest.raises(UsageError, match="PAPER cannot split descriptors of 128 components into 10"):
        choose("PAPER", OLD, 128, 10**6)


@pytest.mark.parametrize(
    ("asked", "engine", "message"),
    [
        ("IVF_RABITQ", OLD, "IVF_RABITQ needs Milvus 2.6 or newer, this server is 2.3"),
        ("DISKANN", OLD, "DISKANN needs Milvus 2.4 or newer"),
        ("GPU_IVF_PQ", OLD, "GPU_IVF_PQ needs Milvus 2.4 or newer"),
        ("GPU_IVF_PQ", NEW, "needs a server built for GPUs, and this one is not: choose IVF_PQ"),
        ("SCANN", Engine.of("Milvus 2.2.16"), "SCANN needs Milvus 2.3"),
    ],
)
def test_what_this_server_cannot_do_is_refused(asked: Profile, engine: Engine, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose(asked, engine, 40, 10**6)


@pytest.mark.parametrize("asked", ["IVF_RABITQ", "DISKANN", "SCANN", "GPU_IVF_PQ", "HNSW", "IVF_SQ8"])
def test_a_server_that_can_is_sent_what_was_asked_for(asked: Profile) -> None:
    assert choose(asked, GPU, 40, 10**6).index_type == asked


def test_parameters_that_were_asked_for_are_used_or_refused() -> None:
    profile = choose("IVF_PQ", OLD, 40, 10**6, wishes=Wishes(300, 8, 4))
    assert profile.index_params == {"nlist": 300, "m": 8, "nbits": 4}
    with pytest.raises(UsageError, match="40 components into 7 sub-vectors: m is one of 1, 2, 4, 5, 8, 10, 20, 40"):
        choose("IVF_PQ", OLD, 40, 10**6, wishes=Wishes(m=7))
    with pytest.raises(UsageError, match="4 to 8 bits"):
        choose("GPU_IVF_PQ", GPU, 40, 10**6, wishes=Wishes(nbits=3))


@pytest.mark.parametrize(("dim", "parts"), [(40, 20), (128, 64), (1, 1), (2, 1), (7, 1), (9, 3), (45, 15)])
def test_sub_vectors_divide_the_descriptor(dim: int, parts: int) -> None:
    assert choose("IVF_PQ", OLD, dim, 10**6).index_params["m"] == parts


def test_lists_grow_with_the_square_root_and_stay_in_the_limits() -> None:
    assert [lists_for(rows) for rows in (0, 10**5, 10**7, 10**12)] == [16, 256, 4096, 65536]


def test_lists_are_those_of_a_segment_however_large_the_collection() -> None:
    assert rows_in_segment(OLD, 40, 10**9) == (512 << 20) // 208
    assert rows_in_segment(NEW, 40, 10**9) == (1024 << 20) // 208
    lists = [choose("IVF_PQ", NEW, 40, rows).index_params["nlist"] for rows in (10**6, 10**7, 10**8, 10**9)]
    assert lists == [1024, 2048, 2048, 2048]
    assert choose("IVF_SQ8", LITE, 40, 10**8).index_params["nlist"] == 8192


def test_an_index_is_kept_until_its_lists_are_off_by_a_factor_of_four() -> None:
    profile = choose("IVF_SQ8", OLD, 40, 10**6)
    assert profile.fits("IVF_SQ8", {"nlist": 512})
    assert profile.fits("IVF_SQ8", {"nlist": 2048})
    assert not profile.fits("IVF_SQ8", {"nlist": 256})
    assert not profile.fits("IVF_SQ8", {"nlist": 4096})
    assert not profile.fits("FLAT", {})
    assert choose("FLAT", LITE, 40, 5).fits("FLAT", {})
    assert not choose("IVF_PQ", OLD, 40, 10**6).fits("IVF_PQ", {"nlist": 1024, "m": 10, "nbits": 5})


def test_search_parameters_follow_the_index_that_is_there() -> None:
    assert search_params("FLAT", {}, 120) == {}
    assert search_params("IVF_SQ8", {"nlist": 1024}, 120) == {"nprobe": 32}
    assert search_params("GPU_IVF_PQ", {"nlist": 1024}, 120, nprobe=7) == {"nprobe": 7}
    assert search_params("IVF_PQ", {"nlist": 16}, 120) == {"nprobe": 16}
    assert search_params("HNSW", {}, 300) == {"ef": 300}
    assert search_params("HNSW", {}, 100, ef=512) == {"ef": 512}
    assert search_params("SCANN", {"nlist": 64}, 120, nprobe=100, refine=1.5) == {"nprobe": 64, "reorder_k": 180}
    assert search_params("DISKANN", {}, 120) == {"search_list": 128}
    assert search_params("AUTOINDEX", {}, 120) == {}


def test_memory_is_what_the_code_of_a_row_and_its_other_fields_take() -> None:
    pq = {"nlist": 1024, "m": 20, "nbits": 8}
    assert memory_bytes("IVF_PQ", pq, 40, 10**6) == 10**6 * (20 + 8 + 48) + 1024 * 160
    assert memory_bytes("FLAT", {}, 40, 10**6) == 10**6 * (160 + 48)
    order = [memory_bytes(t, p, 40, 10**6) for t, p in (("IVF_PQ", pq), ("IVF_SQ8", {}), ("FLAT", {}), ("HNSW", {}))]
    assert order == sorted(order)
