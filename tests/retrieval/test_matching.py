import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from threadpoolctl import threadpool_info
from twins import slow_match

from delf_milvus.retrieval.matching import match, match_and_gather, match_many, single_blas_thread


def unit(rng, count, dim=40):
    descriptors = rng.normal(size=(count, dim)).astype(np.float32)
    return descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True)


def as_bytes(matches):
    return b"".join(part.tobytes() for part in matches)


@pytest.mark.parametrize(("queries", "candidates"), [(1, 1), (3, 700), (700, 3), (300, 300), (257, 513)])
def test_matches_agree_with_the_plain_twin(queries, candidates):
    rng = np.random.default_rng(queries)
    query, candidate = unit(rng, queries), unit(rng, candidates)
    shared = min(queries, candidates) // 2
    candidate[:shared] = query[:shared] + rng.normal(0, 0.05, (shared, 40))
    candidate /= np.linalg.norm(candidate, axis=1, keepdims=True)
    found = match(query, candidate, 0.4)
    expected = slow_match(query, candidate, 0.4)
    assert list(zip(found.query.tolist(), found.candidate.tolist(), strict=True)) == [m[:2] for m in expected]
    np.testing.assert_allclose(found.similarity, [m[2] for m in expected], atol=1e-6)


# Small integers: products are exact, and there are ties everywhere.
small = st.integers(0, 5).flatmap(
    lambda rows: hnp.arrays(np.float32, (rows, 2), elements=st.sampled_from([0.0, 1.0, -1.0, 2.0]))
)


@given(small, small)
@settings(max_examples=200, deadline=None)
def test_matches_are_mutual_one_to_one_and_in_falling_similarity(query, candidate):
    found = match(query, candidate, 0.5)
    assert len(set(found.query.tolist())) == len(found.query)
    assert len(set(found.candidate.tolist())) == len(found.candidate)
    order = list(zip((-found.similarity).tolist(), found.query.tolist(), strict=True))
    assert order == sorted(order)
    if len(found.query):
        products = query @ candidate.T
        np.testing.assert_array_equal(found.similarity, products[found.query, found.candidate])
        np.testing.assert_array_equal(found.similarity, products.max(axis=1)[found.query])
        np.testing.assert_array_equal(found.similarity, products.max(axis=0)[found.candidate])
        assert (found.similarity >= 0.5).all()


def test_of_equal_descriptors_the_first_is_matched():
    one = np.eye(3, dtype=np.float32)[[0, 0, 1]]
    found = match(one, one, 0.5)
    assert found.query.tolist() == [0, 2]
    assert found.candidate.tolist() == [0, 2]


def test_a_photo_without_features_has_no_matches():
    some, none = unit(np.random.default_rng(0), 5), np.empty((0, 40), np.float32)
    for found in (match(some, none, 0.0), match(none, some, 0.0), match(none, none, 0.0)):
        assert [len(part) for part in found] == [0, 0, 0]


def test_descriptors_that_are_not_finite_or_do_not_fit_are_refused():
    some = unit(np.random.default_rng(0), 5)
    broken = some.copy()
    broken[2, 3] = np.nan
    for pair in ((broken, some), (some, broken)):
        with pytest.raises(ValueError, match="finite"):
            match(*pair, 0.5)
    with pytest.raises(ValueError, match="40-d"):
        match(some, some[:, :20], 0.5)
    with pytest.raises(ValueError, match="shape"):
        match(some[0], some, 0.5)


def test_matches_are_the_same_bytes_in_any_batch_order_and_thread():
    rng = np.random.default_rng(1)
    query, candidates = unit(rng, 500), [unit(rng, int(n)) for n in rng.integers(1, 600, 12)]
    alone = [as_bytes(match(query, c, 0.3)) for c in candidates]
    assert [as_bytes(m) for m in match_many(query, candidates, 0.3)] == alone
    assert [as_bytes(m) for m in match_many(query, candidates[::-1], 0.3)] == alone[::-1]
    with ThreadPoolExecutor(4) as pool:
        runs = pool.map(lambda _: match_many(query, candidates, 0.3), range(8))
        assert all([as_bytes(m) for m in run] == alone for run in runs)


def blas_threads():
    return [
        library["num_threads"]
        for library in threadpool_info()
        if library["user_api"] == "blas" and library.get("threading_layer") != "openmp"
    ]


def test_the_limit_on_blas_threads_ends_with_its_last_user():
    before = blas_threads()
    inside, leave = threading.Event(), threading.Event()

    def other():
        with single_blas_thread():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with single_blas_thread():
        thread.start()
        assert inside.wait(10)
        assert set(blas_threads()) == {1}
    assert set(blas_threads()) == {1}
    leave.set()
    thread.join()
    assert blas_threads() == before


@pytest.mark.parametrize(("queries", "stored"), [(1, 1), (3, 700), (700, 3), (257, 513)])
def test_what_is_near_is_gathered_beside_the_same_matches(queries, stored):
    rng = np.random.default_rng(stored)
    query, candidates = unit(rng, queries), [unit(rng, stored), np.empty((0, 40), np.float32), unit(rng, 5)]
    candidates[0][: min(queries, stored)] = query[: min(queries, stored)]
    levels = rng.uniform(-0.2, 0.9, queries).astype(np.float32)
    levels[::7] = np.inf
    matches, near = match_and_gather(query, candidates, 0.3, levels)
    assert [as_bytes(m) for m in matches] == [as_bytes(m) for m in match_many(query, candidates, 0.3)]
    for candidate, found in zip(candidates, near, strict=True):
        products = query @ candidate.T
        np.testing.assert_allclose(found.best, products.max(axis=1, initial=-np.inf), atol=1e-6)
        rows, columns = np.nonzero(products > levels[:, None])
        assert np.array_equal(found.query, rows)
        np.testing.assert_allclose(found.similarity, products[rows, columns], atol=1e-6)
