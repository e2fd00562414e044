"""The shortlist adds votes and global similarities as its definition says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delf_milvus.features import ORDINAL_BITS
from delf_milvus.retrieval.shortlist import NOBODY, Shortlist, shortlist
from delf_milvus.retrieval.voting import Votes, vote


def votes_for(images: list[int], seed: int = 0, features: int = 12) -> Votes:
    """Votes of some query features for these images."""
    rng = np.random.default_rng(seed)
    if not images:
        return vote(np.full((2, 3), -1, np.int64), np.zeros((2, 3), np.float32))
    keys = rng.choice(np.array(images), (features, 5)) << ORDINAL_BITS | rng.integers(0, 50, (features, 5))
    return vote(keys, rng.uniform(0.2, 1, (features, 5)).astype(np.float32))


def slow_shortlist(votes: Votes, keys: list[int], similarities: list[float], weight: float) -> list[tuple[float, int]]:
    local = dict(zip(votes.images.tolist(), votes.scores.tolist(), strict=True))
    crowd = max(min(similarities), 0) if len(keys) > 1 else 0
    whole = {key: max(s - crowd, 0) for key, s in zip(keys, similarities, strict=True)}
    total = []
    for image in set(local) | set(whole):
        score = 0.0
        for term, factor in ((local, 1.0), (whole, weight)):
            best = sorted(term.values())[-5:]
            level = sum(best) / min(5, len(set(local) | set(whole))) if best else 0
            score += factor * term.get(image, 0) / level if level > 0 else 0
        total.append((-score, image))
    return sorted(total)


images = st.lists(st.integers(0, 40), unique=True, max_size=12)


@given(images, images, st.integers(0, 5), st.sampled_from([0.0, 0.25, 2.0]))
def test_the_shortlist_equals_its_slow_twin(voted: list[int], found: list[int], seed: int, weight: float) -> None:
    votes = votes_for(voted, seed)
    similarities = np.random.default_rng(seed).uniform(-1, 1, len(found)).astype(np.float32)
    made = shortlist(votes, np.array(found, np.int64), similarities, weight)
    expected = slow_shortlist(votes, found, similarities.tolist(), weight)
    assert sorted(made.images.tolist()) == sorted(image for _, image in expected)
    np.testing.assert_allclose(made.scores, [-score for score, _ in expected], atol=1e-6)
    assert (np.diff(made.scores) <= 0).all()
    for rank, image in enumerate(made.images.tolist()):
        assert np.isnan(made.similarities[rank]) == (image not in found)
        assert (made.rows[rank] < 0) == (image not in votes.images)


def test_with_the_same_votes_counted_again_the_scores_stay() -> None:
    votes = votes_for([3, 5, 9, 11, 12, 20])
    made = shortlist(votes, np.array([5, 7]), np.array([0.9, 0.1], np.float32), 0.25)
    own = np.where(made.rows >= 0, np.append(votes.scores, 0.0)[made.rows], 0.0)
    np.testing.assert_allclose(made.recounted(range(len(made)), own), made.scores)
    fewer = made.recounted([0, 2], own[[0, 2]])
    np.testing.assert_allclose(fewer - made.whole[[0, 2]], own[[0, 2]] / own[[0, 2]].mean())


def test_without_global_descriptors_the_order_is_that_of_the_votes() -> None:
    votes = votes_for([3, 5, 9])
    made = shortlist(votes, *NOBODY, 0.25)
    assert np.array_equal(made.images, votes.images)
    np.testing.assert_allclose(made.scores, votes.scores / votes.scores[:5].mean())


def test_hits_are_those_of_the_votes_and_none_for_an_image_without_any() -> None:
    votes = votes_for([3, 5])
    made = shortlist(votes, np.array([7, 5]), np.array([0.9, 0.1], np.float32), 10.0)
    assert made.images[0] == 7
    assert len(made.hits(0).query) == 0
    for rank, image in enumerate(made.images.tolist()):
        if image != 7:
            own = votes.hits(votes.images.tolist().index(image), 0.3)
            assert np.array_equal(made.hits(rank, 0.3).query, own.query)


@pytest.mark.parametrize("similarities", [[0.4, 0.4], [-0.2, -0.9]])
def test_images_that_are_no_more_similar_than_the_crowd_gain_nothing(similarities: list[float]) -> None:
    made: Shortlist = shortlist(votes_for([]), np.array([2, 1]), np.array(similarities, np.float32), 1.0)
    assert made.images.tolist() == [1, 2]
    assert made.scores.tolist() == [0, 0]
