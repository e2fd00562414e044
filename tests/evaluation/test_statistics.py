"""Intervals and comparisons, against formulas where there are some and against plain twins."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delf_milvus.evaluation.metrics import global_average_precision
from delf_milvus.evaluation.statistics import difference, interval, reliability, statistic


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(3).normal(5, 2, 400)
    found = interval(values, "mean")
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert interval(values, "mean") == found


def test_a_median_and_a_single_query() -> None:
    assert interval([1, 2, 100], "median").value == 2
    one = interval([0.5], "mean")
    assert (one.value, one.low, one.high) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="at least one query"):
        interval([], "mean")


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.booleans()), min_size=1, max_size=20))
def test_gap_over_queries_is_that_of_the_metric(rows: list[tuple[int, int, bool]]) -> None:
    values = [(float(c), float(i), float(r), 1.0) for c, i, r in rows]
    by_inliers = sorted(values, key=lambda row: -row[1])
    expected = global_average_precision([row[0] for row in by_inliers], [row[2] for row in by_inliers], len(rows))
    assert statistic(values, "gap") == pytest.approx(expected)


def test_a_permutation_test_of_few_queries_is_that_of_all_sign_flips() -> None:
    first, second = [0.2, 0.5, 0.4, 0.9, 0.3], [0.4, 0.6, 0.8, 0.85, 0.7]
    change = np.subtract(second, first)
    means = [abs(np.dot(signs, change)) for signs in itertools.product((1, -1), repeat=5)]
    exact = np.mean([mean >= abs(change.sum()) - 1e-9 for mean in means])
    found = difference(first, second, "mean")
    assert found.p == pytest.approx(exact, abs=0.015)
    assert found.difference == pytest.approx(change.mean())
    assert found.low <= found.difference <= found.high


def test_equal_runs_do_not_differ_and_better_ones_do() -> None:
    values = np.random.default_rng(1).random(200)
    same = difference(values, values, "mean")
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    better = difference(values, values + 0.1, "mean")
    assert better.low > 0
    assert better.p < 0.001
    reverse = difference(values + 0.1, values, "mean")
    assert (reverse.low, reverse.high) == pytest.approx((-better.high, -better.low))
    with pytest.raises(ValueError, match="one shape"):
        difference([1, 2], [1], "mean")


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    found = [interval(random.random(60), "mean") for _ in range(60)]
    assert np.mean([one.low <= 0.5 <= one.high for one in found]) > 0.85


def test_the_calibration_error_is_the_gap_between_confidence_and_right_answers() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(0, 1, 20_000)
    # Half of the queries have a match; an answer is right as often as it is sure, and without a match never.
    answerable = rng.random(len(sure)) < sure
    honest = np.stack([sure, answerable, answerable], axis=1).astype(float)
    assert statistic(honest, "ece") < 0.02
    boasting = honest.copy()
    boasting[:, 0] = 1 - (1 - boasting[:, 0]) / 3
    assert statistic(boasting, "ece") == pytest.approx(np.mean(boasting[:, 0] - sure), abs=0.02)


def test_queries_with_and_without_a_match_weigh_the_same_in_reliability() -> None:
    few = np.array([(0.9, 1.0, 1.0)] * 3 + [(0.9, 0.0, 0.0)] * 300)
    sure, true, weight = reliability(few[None])
    assert weight[0, 9] == pytest.approx(1)
    assert sure[0, 9] == pytest.approx(0.9)
    assert true[0, 9] == pytest.approx(0.5)
    assert statistic(few, "ece") == pytest.approx(0.4)
