import pytest

from delf_milvus.store.profiles import INDEX_FROM, Asked, choose, search_params


def test_a_small_collection_is_searched_exactly() -> None:
    assert choose("auto", "lite", 40, INDEX_FROM - 1).index_type == "FLAT"
    assert choose("auto", "server", 40, 0).index_type == "FLAT"


def test_a_server_gets_ivf_pq_at_size() -> None:
    profile = choose("auto", "server", 40, 1_000_000)
    assert (profile.index_type, profile.index_params) == ("IVF_PQ", {"nlist": 1024, "m": 20, "nbits": 8})
    assert profile.substitute_for == ""
    assert profile.build_params("server") == {"nlist": 1024, "m": 20, "nbits": 8}


@pytest.mark.parametrize("asked", ["auto", "IVF_PQ"])
def test_milvus_lite_gets_a_named_substitute_for_ivf_pq(asked: Asked) -> None:
    profile = choose(asked, "lite", 40, 1_000_000)
    assert (profile.index_type, profile.substitute_for, profile.asked) == ("IVF_SQ8", "IVF_PQ", asked)


@pytest.mark.parametrize("asked", ["auto", "FLAT", "IVF_SQ8", "IVF_PQ", "HNSW"])
@pytest.mark.parametrize("rows", [0, 10, 100_000, 10**8])
def test_ivf_pq_is_never_sent_to_milvus_lite(asked: Asked, rows: int) -> None:
    assert choose(asked, "lite", 40, rows).index_type != "IVF_PQ"


def test_milvus_lite_reads_nested_parameters_only() -> None:
    params = choose("IVF_SQ8", "lite", 40, 1_000_000).build_params("lite")
    assert params == {"nlist": 1024, "params": {"nlist": 1024}}


@pytest.mark.parametrize(("dim", "parts"), [(40, 20), (128, 64), (1, 1), (2, 1), (7, 1), (9, 3), (45, 15)])
def test_sub_vectors_divide_the_descriptor(dim: int, parts: int) -> None:
    assert choose("IVF_PQ", "server", dim, 10**6).index_params["m"] == parts


def test_lists_grow_with_the_square_root_and_stay_in_the_limits() -> None:
    lists = [choose("IVF_SQ8", "server", 40, rows).index_params["nlist"] for rows in (0, 10**5, 10**7, 10**12)]
    assert lists == [16, 256, 4096, 65536]


def test_an_index_is_kept_until_its_lists_are_off_by_a_factor_of_four() -> None:
    profile = choose("IVF_SQ8", "server", 40, 10**6)
    assert profile.fits("IVF_SQ8", {"nlist": 512})
    assert profile.fits("IVF_SQ8", {"nlist": 2048})
    assert not profile.fits("IVF_SQ8", {"nlist": 256})
    assert not profile.fits("IVF_SQ8", {"nlist": 4096})
    assert not profile.fits("FLAT", {})
    assert choose("FLAT", "lite", 40, 5).fits("FLAT", {})


def test_search_parameters_follow_the_index_that_is_there() -> None:
    assert search_params("FLAT", {}, 32, 120) == {}
    assert search_params("IVF_SQ8", {"nlist": 1024}, 32, 120) == {"nprobe": 32}
    assert search_params("IVF_PQ", {"nlist": 16}, 32, 120) == {"nprobe": 16}
    assert search_params("HNSW", {}, 32, 300) == {"ef": 300}
