"""Figures of merit, checked against values worked out by hand and against plain twins."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delf_milvus.evaluation.metrics import (
    average_precision,
    average_precision_at,
    corner_error,
    epipolar_distances,
    error_area,
    global_average_precision,
    interpolated_precision,
    ns_score,
    precision_at,
    precision_recall,
    recall_at,
    revisited_precision_at,
    transfer_distances,
)

LETTERS = "abcdefgh"
rankings = st.permutations(list(LETTERS))
some = st.sets(st.sampled_from(LETTERS), min_size=1)


def test_average_precision_by_trapezoids() -> None:
    # Found at ranks 1 and 3: ((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 2.
    assert average_precision(["a", "x", "b"], {"a", "b"}) == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert average_precision(["x", "a"], {"a"}) == pytest.approx((0 + 1 / 2) / 2)


def test_junk_neither_helps_nor_hurts() -> None:
    assert average_precision(["j", "a", "k", "b"], {"a", "b"}, {"j", "k"}) == 1.0


def test_what_is_not_in_the_ranking_was_never_found() -> None:
    assert average_precision(["a"], {"a", "b"}) == 0.5
    assert average_precision([], {"a"}) == 0.0
    assert average_precision_at(["a"], {"a", "b"}, 100) == 0.5
    assert recall_at([], {"a"}, 10) == precision_at([], {"a"}, 10) == revisited_precision_at([], {"a"}, 10) == 0


def test_a_query_without_relevant_images_has_no_figure() -> None:
    for metric in (average_precision, lambda r, s: precision_at(r, s, 1), lambda r, s: recall_at(r, s, 1)):
        with pytest.raises(ValueError, match="relevant"):
            metric(["a"], set())
    with pytest.raises(ValueError, match="answer"):
        global_average_precision([1], [True], 0)


def test_ns_counts_the_first_four() -> None:
    assert ns_score(["a", "x", "b", "c", "d"], {"a", "b", "c", "d"}) == 3


def test_precision_and_recall_at_k() -> None:
    ranking, relevant = ["j", "x", "a", "b", "y"], {"a", "b", "c"}
    assert [recall_at(ranking, relevant, k, {"j"}) for k in (1, 2, 5)] == [0, 1, 1]
    assert [precision_at(ranking, relevant, k, {"j"}) for k in (1, 2, 3, 10)] == [0, 1 / 2, 2 / 3, 2 / 3]


def test_the_revisited_precision_divides_by_the_place_of_the_last_positive() -> None:
    assert revisited_precision_at(["a", "x", "b", "y", "z"], {"a", "b"}, 10) == pytest.approx(2 / 3)
    assert revisited_precision_at(["a", "b", "x", "y", "z"], {"a", "b"}, 10) == 1
    assert revisited_precision_at(["a", "x", "b", "y", "z"], {"a", "b"}, 1) == 1
    # One positive is missing: it stands at place 4 at best.
    assert revisited_precision_at(["a", "x", "y"], {"a", "b"}, 10) == pytest.approx(1 / 4)
    assert revisited_precision_at(["a", "x", "y"], {"a", "b"}, 2) == pytest.approx(1 / 2)


def test_the_retrieval_example_of_google_landmarks() -> None:
    # Two of three found at once: (1 + 1) / 3. One of two found at the second place: (1 / 2) / 2.
    first = average_precision_at(["a", "b", "x"], {"a", "b", "c"}, 100)
    second = average_precision_at(["x", "a"], {"a", "b"}, 100)
    assert (first + second) / 2 == pytest.approx(0.458333, abs=1e-6)


def test_relevant_images_beyond_k_do_not_count_at_k() -> None:
    assert average_precision_at(["a", "b"], {"a", "b", "c"}, 2) == 1
    assert average_precision_at(["x", "y", "a"], {"a"}, 2) == 0


def test_the_recognition_examples_of_google_landmarks() -> None:
    # The surest prediction is wrong, for a query without a landmark; the next is right, at precision 1 / 2; a third is
    # wrong. Three queries have a landmark.
    assert global_average_precision([10.0, 15.0, 0.1], [True, False, False], 3) == pytest.approx(0.166667, abs=1e-6)
    # Right at once, for one of three.
    assert global_average_precision([0.3, 0.2], [True, False], 3) == pytest.approx(0.333333, abs=1e-6)
    assert global_average_precision([], [], 2) == 0


def plain_gap(confidences: list[float], right: list[bool], answerable: int) -> float:
    total, found = 0.0, 0
    order = sorted(range(len(right)), key=lambda i: -confidences[i])
    for rank, i in enumerate(order, 1):
        if right[i]:
            found += 1
            total += found / rank
    return total / answerable


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=30), st.integers(0, 5))
def test_global_average_precision_is_that_of_its_plain_twin(pairs: list[tuple[int, bool]], more: int) -> None:
    confidences, right = [float(c) for c, _ in pairs], [r for _, r in pairs]
    answerable = sum(right) + more + 1
    value = global_average_precision(confidences, right, answerable)
    assert value == pytest.approx(plain_gap(confidences, right, answerable))
    assert 0 <= value <= 1


def test_the_curve_of_first_answers_counts_queries_without_an_answer() -> None:
    recall, precision, least = precision_recall([0.9, 0.8, 0.8, 0.1], [True, True, False, False], 3)
    assert recall == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert precision == pytest.approx([1, 2 / 3, 1 / 2])
    assert list(least) == [0.9, 0.8, 0.1]


@given(rankings, some)
def test_average_precision_is_a_share_and_one_only_for_a_perfect_ranking(
    ranking: list[str], relevant: set[str]
) -> None:
    value = average_precision(ranking, relevant)
    assert 0 < value <= 1
    assert (value == pytest.approx(1)) == (set(ranking[: len(relevant)]) == relevant)


AT = {
    "average_precision": lambda r, s, j=(): average_precision(r, s, j),
    "average_precision_at": lambda r, s, j=(): average_precision_at(r, s, 5, j),
    "recall_at": lambda r, s, j=(): recall_at(r, s, 5, j),
    "precision_at": lambda r, s, j=(): precision_at(r, s, 5, j),
    "revisited_precision_at": lambda r, s, j=(): revisited_precision_at(r, s, 5, j),
}


@pytest.mark.parametrize("name", AT)
@given(ranking=rankings, relevant=some, cut=st.integers(0, 8))
def test_every_figure_of_a_ranking_is_a_share_and_one_for_a_perfect_one(
    name: str, ranking: list[str], relevant: set[str], cut: int
) -> None:
    metric = AT[name]
    assert 0 <= metric(ranking[:cut], relevant) <= 1
    assert metric(sorted(relevant) + sorted(set(LETTERS) - relevant), relevant) == pytest.approx(1)


@pytest.mark.parametrize("name", AT)
@given(ranking=rankings, relevant=some, data=st.data())
def test_what_comes_after_the_last_relevant_image_is_of_no_account(
    name: str, ranking: list[str], relevant: set[str], data: st.DataObject
) -> None:
    last = max(ranking.index(image) for image in relevant) + 1
    tail = data.draw(st.permutations(ranking[last:]))
    assert AT[name](ranking, relevant) == AT[name](ranking[:last] + list(tail), relevant)


@pytest.mark.parametrize("name", AT)
@given(ranking=rankings, relevant=some, junk=st.sets(st.sampled_from(LETTERS)))
def test_junk_is_as_if_it_were_not_there(name: str, ranking: list[str], relevant: set[str], junk: set[str]) -> None:
    junk -= relevant
    without = [image for image in ranking if image not in junk]
    assert AT[name](ranking, relevant, junk) == AT[name](without, relevant)


def plain_interpolated(ranking: list[str], relevant: set[str], level: float) -> float:
    best = 0.0
    for end in range(1, len(ranking) + 1):
        found = len(relevant & set(ranking[:end]))
        if found and found / len(relevant) >= level - 1e-9:
            best = max(best, found / end)
    return best


@given(rankings, some, st.integers(0, 8))
def test_interpolated_precision_is_that_of_its_plain_twin(ranking: list[str], relevant: set[str], cut: int) -> None:
    levels = np.linspace(0, 1, 11)
    curve = interpolated_precision(ranking[:cut], relevant, levels)
    assert curve == pytest.approx([plain_interpolated(ranking[:cut], relevant, level) for level in levels])
    assert (np.diff(curve) <= 0).all()


HOMOGRAPHY = np.array([[1.1, 0.1, 5], [-0.05, 0.9, 3], [1e-4, -2e-4, 1]])
points = st.lists(st.tuples(st.floats(-400, 400), st.floats(-400, 400)), min_size=1, max_size=8)


@given(points, points)
def test_transfer_and_epipolar_distances_are_those_of_their_plain_twins(
    first: list[tuple[float, float]], second: list[tuple[float, float]]
) -> None:
    size = min(len(first), len(second))
    first, second = first[:size], second[:size]
    fundamental = np.array([[0, -0.001, 0.3], [0.002, 0, -0.5], [-0.4, 0.6, 1.0]])
    for (x, y), (u, v), one, other in zip(
        first,
        second,
        transfer_distances(HOMOGRAPHY, first, second),
        epipolar_distances(fundamental, first, second),
        strict=True,
    ):
        a, b, c = HOMOGRAPHY @ [x, y, 1]
        assert one == pytest.approx(np.hypot(a / c - u, b / c - v))
        line, back = fundamental @ [x, y, 1], fundamental.T @ [u, v, 1]
        gap = abs(line @ [u, v, 1])
        assert other == pytest.approx((gap / np.hypot(*line[:2]) + gap / np.hypot(*back[:2])) / 2)


def test_a_rectified_pair_has_rows_as_epipolar_lines() -> None:
    rows = [[0, 0, 0], [0, 0, -1], [0, 1, 0]]
    assert epipolar_distances(rows, [[5, 7], [1, 1]], [[90, 7], [2, 4]]) == pytest.approx([0, 3])


def test_the_sign_of_a_homography_is_free_and_what_lies_behind_is_infinitely_far() -> None:
    matrix = np.array([[1, 0, 0], [0, 1, 0], [-0.01, 0, 1.0]])
    for sign in (1, -1):
        near, far = transfer_distances(sign * matrix, [[50, 0], [200, 0]], [[100, 0], [0, 0]])
        assert near == pytest.approx(0)
        assert far == np.inf


def test_the_corner_error_is_the_mean_over_four_corners() -> None:
    truth = [[2, 0, 0], [0, 2, 0], [0, 0, 1]]
    assert corner_error([[2, 0, 3], [0, 2, 4]], truth, 640, 480) == pytest.approx(5)
    # Off by 0, 10, 10 and 0 pixels.
    assert corner_error([[2 + 10 / 99, 0, 0], [0, 2, 0]], truth, 100, 50) == pytest.approx(5)


def test_the_area_of_errors_is_that_under_their_curve() -> None:
    errors, threshold = [0.0, 1.0, 2.5, 9.0, np.inf], 5.0
    steps = np.linspace(0, threshold, 100_001)[:-1]
    shares = [np.mean(np.array(errors) <= step) for step in steps[::100]]
    area = np.mean([error_area(error, threshold) for error in errors])
    assert area == pytest.approx(np.mean(shares), abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(error_area(e, threshold) for e in errors))
