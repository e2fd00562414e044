import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from twins import exact_neighbours, slow_count, slow_levels, slow_vote

from delf_milvus.features import ORDINAL_BITS
from delf_milvus.retrieval import voting
from delf_milvus.retrieval.voting import match_and_recount, vote


def key(image, ordinal):
    return (image << ORDINAL_BITS) | ordinal


def unit(rng, count, dim=8):
    descriptors = rng.normal(size=(count, dim)).astype(np.float32)
    return descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True)


def assert_same_as_twin(keys, similarities):
    votes = vote(keys, similarities)
    scores, best_hits = slow_vote(keys, similarities)
    assert sorted(votes.images.tolist()) == sorted(scores)
    np.testing.assert_allclose(votes.scores, [scores[i] for i in votes.images.tolist()], rtol=1e-6, atol=1e-9)
    ranked = list(zip((-votes.scores).tolist(), votes.images.tolist(), strict=True))
    assert ranked == sorted(ranked)
    found = {}
    for rank, image in enumerate(votes.images.tolist()):
        rows = range(votes.offsets[rank], votes.offsets[rank + 1])
        assert votes.query[rows].tolist() == sorted(votes.query[rows].tolist())
        found |= {(int(votes.query[r]), image): (float(votes.similarity[r]), int(votes.ordinal[r])) for r in rows}
    assert found == best_hits


@st.composite
def neighbours(draw):
    shape = draw(st.tuples(st.integers(0, 6), st.integers(1, 8)))
    images = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 3)))
    ordinals = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 3)))
    absent = draw(hnp.arrays(np.bool_, shape))
    similarities = draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([-0.5, 0.0, 0.25, 0.5, 0.75, 1.0])))
    return np.where(absent, -1, key(images, ordinals)), similarities


@given(neighbours())
@settings(max_examples=200, deadline=None)
def test_votes_agree_with_the_plain_twin(case):
    assert_same_as_twin(*case)


def test_votes_of_exact_neighbours_agree_with_the_plain_twin():
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(600, 16)).astype(np.float32)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    keys = key(np.arange(600) // 30 * 1_000_003, np.arange(600) % 30)
    query = stored[90:120] + rng.normal(0, 0.02, (30, 16)).astype(np.float32)
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    found = exact_neighbours(query, stored, keys, 40)
    assert_same_as_twin(*found)
    votes = vote(*found)
    assert votes.images[0] == 3 * 1_000_003
    hits = votes.hits(0, 0.9)
    np.testing.assert_array_equal(hits.query, hits.candidate)
    assert len(hits.query) == 30


def test_a_feature_that_hits_an_image_often_is_damped():
    keys = np.array([[key(1, 0), key(1, 1), key(1, 2), key(1, 3), key(9, 0)], [key(2, 0), *key(np.arange(10, 14), 0)]])
    similarities = np.array([[0.9, 0.9, 0.9, 0.9, 0.5]] * 2, np.float32)
    votes = vote(keys, similarities)
    scores = dict(zip(votes.images.tolist(), votes.scores.tolist(), strict=True))
    assert scores[1] == pytest.approx(0.4 / 2)
    assert scores[2] == pytest.approx(0.4)
    assert scores[9] == 0


def test_a_neighbour_listed_twice_counts_once():
    once = vote(np.array([[key(1, 0), key(2, 0), -1]]), np.array([[0.9, 0.5, 0.0]], np.float32))
    twice = vote(np.array([[key(1, 0), key(1, 0), key(2, 0)]]), np.array([[0.9, 0.9, 0.5]], np.float32))
    np.testing.assert_array_equal(once.scores, twice.scores)


def test_without_neighbours_there_are_no_images():
    for shape in ((0, 5), (3, 0), (3, 4)):
        votes = vote(np.full(shape, -1, np.int64), np.zeros(shape, np.float32))
        assert len(votes) == 0
        assert votes.offsets.tolist() == [0]


def test_a_single_neighbour_votes_with_its_similarity():
    votes = vote(np.array([[key(7, 1)], [key(5, 0)], [key(5, 2)]]), np.array([[0.7], [0.5], [0.4]], np.float32))
    assert votes.images.tolist() == [5, 7]
    np.testing.assert_allclose(votes.scores, [0.9, 0.7], rtol=1e-6)


def test_a_single_image_gets_all_votes():
    votes = vote(np.array([[key(7, 1), key(7, 0), -1]]), np.array([[0.7, 0.5, 9.0]], np.float32))
    assert votes.images.tolist() == [7]
    np.testing.assert_allclose(votes.scores, [0.2 / np.sqrt(2)], rtol=1e-6)
    assert votes.ordinal.tolist() == [1]


def test_equal_scores_rank_by_key():
    votes = vote(np.array([[key(8, 0), key(3, 0), key(5, 0)]]), np.full((1, 3), 0.5, np.float32))
    assert votes.images.tolist() == [3, 5, 8]


def test_the_largest_image_key_survives():
    largest = (1 << 51) - 1
    votes = vote(np.array([[key(largest, 4095), key(1, 0)]]), np.array([[0.9, 0.1]], np.float32))
    assert votes.images.tolist() == [largest, 1]
    assert votes.ordinal[0] == 4095


def test_hits_are_one_to_one_and_above_the_threshold():
    keys = np.array([[key(1, 5), key(2, 0)], [key(1, 5), key(2, 1)], [key(1, 6), key(2, 1)], [key(1, 7), key(2, 2)]])
    similarities = np.array([[0.7, 0.1], [0.9, 0.1], [0.8, 0.1], [0.3, 0.1]], np.float32)
    hits = vote(keys, similarities).hits(0, 0.5)
    assert hits.query.tolist() == [1, 2]
    assert hits.candidate.tolist() == [5, 6]
    np.testing.assert_array_equal(hits.similarity, np.array([0.9, 0.8], np.float32))


def test_unequal_shapes_and_missing_similarities_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        vote(np.zeros((2, 3), np.int64), np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="finite"):
        vote(np.zeros((1, 1), np.int64), np.array([[np.nan]], np.float32))
    assert len(vote(np.array([[-1]]), np.array([[np.nan]], np.float32))) == 0


@pytest.mark.parametrize("indexed", [30, 7])
def test_votes_counted_again_equal_the_twins(indexed):
    """Of 12 images of 30 features each, `indexed` are in the index; three images are compared."""
    rng = np.random.default_rng(indexed)
    query, *images = (unit(rng, 30) for _ in range(13))
    keys = np.concatenate([[key(image, n) for n in range(indexed)] for image in range(12)])
    votes = vote(*exact_neighbours(query, np.concatenate([one[:indexed] for one in images]), keys, 20))
    some = np.array([2, 5, 7])
    found = match_and_recount(query, some, [images[i] for i in some], 0.5, votes, 30 / indexed)[1]
    levels = votes.bar
    if indexed < 30:
        others = [
            [float(s) for k, s in zip(*row, strict=True) if k >> ORDINAL_BITS not in some]
            for row in zip(votes.keys.tolist(), votes.similarities, strict=True)
        ]
        levels = slow_levels(query, [images[i] for i in some], others, 30 / indexed, 20)
        assert (np.array(levels) >= votes.levels).all()
    np.testing.assert_allclose(found, [slow_count(query, images[i], levels) for i in some], rtol=1e-4)


def test_votes_counted_again_of_the_whole_index_are_those_counted_first():
    rng = np.random.default_rng(1)
    query, *images = (unit(rng, 30) for _ in range(9))
    # The crowd begins at an image that is not compared, which would miss its farthest hit.
    images[8:] = [-query]
    keys = np.concatenate([[key(image, n) for n in range(30)] for image in range(9)])
    votes = vote(*exact_neighbours(query, np.concatenate(images), keys, 9 * 30))
    compared = votes.images != 8
    some = votes.images[compared]
    found = match_and_recount(query, some, [images[i] for i in some], 0.5, votes, 1.0)[1]
    np.testing.assert_allclose(found, votes.scores[compared], rtol=1e-5)


def test_without_neighbours_nothing_is_counted():
    query = unit(np.random.default_rng(0), 4)
    votes = vote(np.full((4, 3), -1, np.int64), np.zeros((4, 3), np.float32))
    for share in (1.0, 6.0):
        matches, scores = match_and_recount(query, np.array([3]), [query], 0.5, votes, share)
        assert (len(matches[0].query), scores.tolist()) == (4, [0.0])
        assert match_and_recount(query, np.empty(0, np.int64), [], 0.5, votes, share)[1].tolist() == []


@pytest.mark.parametrize("compared", [24, 20])
@pytest.mark.parametrize("indexed", [1, 5])
def test_what_is_dropped_on_the_way_changes_nothing(indexed, compared, monkeypatch):
    """Of many features of which few are in the index, nearly all lie above the level of the index."""
    rng = np.random.default_rng(indexed)
    query, *images = (unit(rng, 60) for _ in range(25))
    keys = np.concatenate([[key(image, n) for n in range(indexed)] for image in range(24)])
    votes = vote(*exact_neighbours(query, np.concatenate([one[:indexed] for one in images]), keys, 12))
    arguments = query, np.arange(compared), images[:compared], 0.5, votes, 60 / indexed
    gathered = []
    gather = voting.match_and_gather

    def counting(*given):
        matches, near = gather(*given)
        gathered.append(len(near[0].query))
        return matches, near

    monkeypatch.setattr(voting, "match_and_gather", counting)
    dropping, few = match_and_recount(*arguments), sum(gathered)
    gathered.clear()
    monkeypatch.setattr(voting, "_GATHERED", 10**6)
    keeping, all_ = match_and_recount(*arguments), sum(gathered)
    assert few < 0.7 * all_
    np.testing.assert_allclose(dropping[1], keeping[1], rtol=1e-6)
    assert [m.query.tolist() for m in dropping[0]] == [m.query.tolist() for m in keeping[0]]
