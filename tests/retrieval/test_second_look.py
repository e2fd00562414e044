"""What sure answers say about the others, on features of real photos."""

from __future__ import annotations

import numpy as np
import pytest
from real_photos import photo

from delf_milvus.evaluation.memory import MemoryCollection
from delf_milvus.features import Features
from delf_milvus.matcher import PhotoMatcher
from delf_milvus.retrieval.search import Judgement, Timings, judge_candidates
from delf_milvus.retrieval.second_look import agreed, surest
from delf_milvus.settings import Settings

SETTINGS = Settings(extract={"preset": "fast"})  # type: ignore[arg-type]
OTHERS = ("camera", "chelsea", "coins", "page", "rocket", "brick")


@pytest.fixture(scope="module")
def matcher() -> PhotoMatcher:
    return PhotoMatcher(SETTINGS)


@pytest.fixture(scope="module")
def stored(matcher: PhotoMatcher) -> dict[str, Features]:
    """A whole photo, its right half, and other photos; the query is the left half."""
    coffee = photo("coffee")
    photos = {"whole": coffee, "right": coffee[:, 310:]} | {name: photo(name) for name in OTHERS}
    return {name: matcher.extractor.extract(np.ascontiguousarray(one), 300) for name, one in photos.items()}


@pytest.fixture(scope="module")
def query(matcher: PhotoMatcher) -> Features:
    return matcher.query_features(np.ascontiguousarray(photo("coffee")[:, :290]))


@pytest.fixture(scope="module")
def judged(query: Features, stored: dict[str, Features]) -> Judgement:
    collection = MemoryCollection(list(stored), list(stored.values()))
    return judge_candidates(query, collection, SETTINGS.search, SETTINGS.verify, Timings())


def look(judged: Judgement, matcher: PhotoMatcher, most: int) -> Judgement:
    search = SETTINGS.search.model_copy(update={"agreement": most})
    return agreed(judged, search, SETTINGS.verify, matcher.calibration, Timings())


def names(judged: Judgement) -> list[str]:
    return [candidate.image_id for candidate in judged.candidates]


def test_what_the_sure_answer_shows_too_comes_second(judged: Judgement, matcher: PhotoMatcher) -> None:
    assert [names(judged)[row] for row in surest(judged, matcher.calibration, 10)] == ["whole"]
    plain = dict(zip(names(judged), judged.scores.tolist(), strict=True))
    looked = look(judged, matcher, 1)
    after = dict(zip(names(looked), looked.scores.tolist(), strict=True))
    assert names(looked)[:2] == ["whole", "right"]
    gained = {name: after[name] - plain[name] for name in plain}
    assert min(gained["whole"], gained["right"]) > 3 * max(gained[name] for name in OTHERS)


def test_proof_stays_that_of_the_query(judged: Judgement, matcher: PhotoMatcher) -> None:
    looked = look(judged, matcher, 3)
    inliers = dict(zip(names(judged), judged.inliers.tolist(), strict=True))
    assert dict(zip(names(looked), looked.inliers.tolist(), strict=True)) == inliers
    assert (np.diff(looked.scores) <= 0).all()


def test_without_a_sure_answer_nothing_changes(
    judged: Judgement, matcher: PhotoMatcher, stored: dict[str, Features]
) -> None:
    assert look(judged, matcher, 0) is judged
    few = MemoryCollection(list(OTHERS), [stored[name] for name in OTHERS])
    strange = judge_candidates(stored["whole"], few, SETTINGS.search, SETTINGS.verify, Timings())
    assert look(strange, matcher, 3) is strange
