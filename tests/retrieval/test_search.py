"""The whole search against its plain, slow twin, on features of real photos."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from real_photos import photo
from twins import exact_neighbours, slow_count, slow_match, slow_verify, slow_vote

from delf_milvus.evaluation.memory import MemoryCollection
from delf_milvus.features import ORDINAL_BITS, Features
from delf_milvus.matcher import PhotoMatcher
from delf_milvus.retrieval.answers import answer
from delf_milvus.retrieval.ranking import combined_scores
from delf_milvus.retrieval.search import Timings, judge_candidates, shortlisted
from delf_milvus.retrieval.voting import vote
from delf_milvus.settings import Settings

SETTINGS = Settings(extract={"preset": "fast"})  # type: ignore[arg-type]
NAMES = ("astronaut", "camera", "chelsea", "coffee", "coins", "page", "rocket", "brick")


@pytest.fixture(scope="module")
def matcher() -> PhotoMatcher:
    return PhotoMatcher(SETTINGS)


@pytest.fixture(scope="module")
def stored(matcher: PhotoMatcher) -> list[Features]:
    return [matcher.extractor.extract(photo(name), 200) for name in NAMES]


@pytest.fixture(scope="module")
def queries(matcher: PhotoMatcher) -> list[Features]:
    """Crops of the stored photos, and one photo that is not stored."""
    crops = []
    for name in NAMES[:6]:
        whole = photo(name)
        height, width = whole.shape[:2]
        crops.append(np.ascontiguousarray(whole[height // 6 : -height // 8, width // 5 : -width // 10]))
    return [matcher.query_features(image).top(200) for image in [*crops, photo("moon")]]


def slow_search(query: Features, stored: list[Features]) -> tuple[list[int], dict[int, int]]:
    """Ranking and inliers by exact neighbours and global similarities, dictionary loops and skimage's RANSAC."""
    descriptors = np.concatenate([f.descriptors for f in stored])
    keys = np.concatenate([np.arange(len(f)) | i << ORDINAL_BITS for i, f in enumerate(stored)])
    _, similarities = exact_neighbours(query.descriptors, descriptors, keys, SETTINGS.search.neighbours)
    crowd = similarities.min(axis=1)
    votes = {image: slow_count(query.descriptors, f.descriptors, crowd) for image, f in enumerate(stored)}
    alike = {image: float(query.global_descriptor @ f.global_descriptor) for image, f in enumerate(stored)}
    above = {image: max(one - max(min(alike.values()), 0), 0) for image, one in alike.items()}
    images = sorted(alike)
    inliers = {}
    for image in images:
        pairs = slow_match(query.descriptors, stored[image].descriptors, SETTINGS.verify.similarity)
        points = query.locations[[q for q, _, _ in pairs]], stored[image].locations[[c for _, c, _ in pairs]]
        residual = SETTINGS.verify.residual * max(stored[image].width, stored[image].height) / 640
        inliers[image] = int(slow_verify(*points, residual, trials=300).sum())
    terms = ([votes.get(i, 0) for i in images], [above[i] for i in images], [inliers[i] for i in images])
    levels = [sum(sorted(term)[-5:]) / 5 for term in terms]
    levels = [levels[0], levels[1] or 1.0, max(levels[2], 40)]
    weights = (1, SETTINGS.search.global_weight, SETTINGS.search.inlier_weight)
    scores = sum(w * np.array(term) / level for w, term, level in zip(weights, terms, levels, strict=True))
    return [images[i] for i in np.argsort(-scores, kind="stable")], inliers


def test_fast_and_slow_search_agree_on_real_features(queries: list[Features], stored: list[Features]) -> None:
    collection = MemoryCollection(NAMES, stored)
    for number, query in enumerate(queries):
        fast = judge_candidates(query, collection, SETTINGS.search, SETTINGS.verify, Timings())
        ranking, inliers = slow_search(query, stored)
        assert {NAMES.index(c.image_id) for c in fast.candidates} == set(ranking)
        if number < 6:
            assert NAMES.index(fast.candidates[0].image_id) == ranking[0] == number
            # Geometry that RANSAC finds is found; counts differ, since ours counts places and not matches.
            assert fast.verifications[0].mask.sum() >= 0.8 * inliers[number]


def test_votes_equal_the_twins_on_real_features(queries: list[Features], stored: list[Features]) -> None:
    collection = MemoryCollection(NAMES, stored)
    for query in queries:
        keys, similarities = collection.neighbours(query.descriptors, 60)
        votes = vote(keys, similarities)
        expected, _ = slow_vote(keys, similarities)
        assert set(votes.images.tolist()) == set(expected)
        np.testing.assert_allclose(votes.scores, [expected[i] for i in votes.images.tolist()], rtol=1e-5)


def test_what_the_index_leaves_out_counts_for_the_candidates_all_the_same(
    queries: list[Features], stored: list[Features]
) -> None:
    class Partly(MemoryCollection):
        """Only a fifth of each image's features is in the index."""

        def neighbours(self, descriptors, k):  # type: ignore[no-untyped-def]
            keys, similarities = super().neighbours(descriptors, sum(map(len, self.features)))
            places = np.argsort(keys % (1 << ORDINAL_BITS) >= 40, axis=1, kind="stable")[:, :k]
            return np.take_along_axis(keys, places, 1), np.take_along_axis(similarities, places, 1)

        def candidates(self, image_keys):  # type: ignore[no-untyped-def]
            return {key: replace(one, indexed=40) for key, one in super().candidates(image_keys).items()}

    search = SETTINGS.search.model_copy(update={"neighbours": 30})
    for number, query in enumerate(queries[:6]):
        scores = []
        for collection in (MemoryCollection(NAMES, stored), Partly(NAMES, stored)):
            judged = judge_candidates(query, collection, search, SETTINGS.verify, Timings())
            assert judged.candidates[0].image_id == NAMES[number]
            scores.append({c.image_id: s for c, s in zip(judged.candidates, judged.scores, strict=True)})
        assert scores[1] == pytest.approx(scores[0], abs=0.02)


def test_an_image_whose_row_is_missing_is_no_candidate(queries: list[Features], stored: list[Features]) -> None:
    class Crashed(MemoryCollection):
        def candidates(self, image_keys):  # type: ignore[no-untyped-def]
            found = super().candidates(image_keys)
            found.pop(0, None)
            return found

    judged = judge_candidates(queries[0], Crashed(NAMES, stored), SETTINGS.search, SETTINGS.verify, Timings())
    assert "astronaut" not in {candidate.image_id for candidate in judged.candidates}
    assert len(judged.candidates) == len(judged.scores) == len(judged.inliers) == len(NAMES) - 1


def test_hits_beyond_what_a_row_knows_are_left_out(queries: list[Features], stored: list[Features]) -> None:
    shorter = MemoryCollection(NAMES, stored)
    shorter.features = [features.top(50) for features in stored]
    search = SETTINGS.search.model_copy(update={"mode": "hits"})
    judged = judge_candidates(queries[0], shorter, search, SETTINGS.verify, Timings())
    assert all((m.candidate < 50).all() for m in judged.matches)
    assert any(len(m.candidate) for m in judged.matches)


def test_images_with_too_few_votes_to_be_verified_follow_the_candidates(
    matcher: PhotoMatcher, queries: list[Features], stored: list[Features]
) -> None:
    search = SETTINGS.search.model_copy(update={"candidates": 3, "top": 6})
    collection, box = MemoryCollection(NAMES, stored), (0.0, 0.0, 9999.0, 9999.0)
    arguments = (queries[0], collection, search, SETTINGS.verify, matcher.calibration, Timings())
    hits = answer(*arguments, query_box=box, include_unverified=True)
    ranking = [NAMES[image] for image in shortlisted(queries[0], collection, search, Timings()).images.tolist()]
    assert {hit.image_id for hit in hits[:3]} == set(ranking[:3])
    assert [hit.image_id for hit in hits[3:]] == ranking[3:6]
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5, 6]
    assert (np.diff([hit.score for hit in hits[1:]]) <= 0).all()
    for hit in hits[3:]:
        assert (hit.verified, hit.inliers, hit.confidence, hit.false_alarm) == (False, 0, 0.0, 1.0)
        assert hit.transform is None
        assert hit.box is None
    assert [hit.image_id for hit in answer(*arguments, query_box=box)] == ["astronaut"]


def test_a_second_look_lists_no_image_twice(
    matcher: PhotoMatcher, queries: list[Features], stored: list[Features]
) -> None:
    search = SETTINGS.search.model_copy(update={"candidates": 3, "top": 20, "expand": 2})
    hits = answer(
        queries[0],
        MemoryCollection(NAMES, stored),
        search,
        SETTINGS.verify,
        matcher.calibration,
        Timings(),
        query_box=(0.0, 0.0, 9999.0, 9999.0),
        include_unverified=True,
    )
    names = [hit.image_id for hit in hits]
    assert len(names) == len(set(names)) == len(NAMES)
    assert names[0] == "astronaut"


def test_an_empty_collection_has_no_candidates(queries: list[Features]) -> None:
    class Nothing:
        def neighbours(self, descriptors, k):  # type: ignore[no-untyped-def]
            return np.full((len(descriptors), k), -1, np.int64), np.full((len(descriptors), k), -1, np.float32)

        def similar(self, descriptor, k):  # type: ignore[no-untyped-def]
            return np.empty(0, np.int64), np.empty(0, np.float32)

        def candidates(self, image_keys):  # type: ignore[no-untyped-def]
            assert len(image_keys) == 0
            return {}

    judged = judge_candidates(queries[0], Nothing(), SETTINGS.search, SETTINGS.verify, Timings())
    assert judged.candidates == []


@pytest.mark.parametrize(
    ("shortlisted", "inliers", "expected"),
    [
        ([2, 1, 1], [0, 0, 0], [2, 1, 1]),
        ([1, 1], [300, 100], [1 + 0.75 * 1.5, 1 + 0.75 * 0.5]),
        ([1, 1], [20, 4], [1 + 0.75 * 20 / 40, 1 + 0.75 * 4 / 40]),
        ([], [], []),
        ([0, 0], [0, 0], [0, 0]),
    ],
)
def test_inliers_are_added_by_their_own_level(
    shortlisted: list[float], inliers: list[float], expected: list[float]
) -> None:
    np.testing.assert_allclose(combined_scores(shortlisted, inliers, 0.75), expected)
