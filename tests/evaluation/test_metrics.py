"""Figures of merit, checked against values worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delf_milvus.evaluation.metrics import average_precision, ns_score


def test_average_precision_by_trapezoids() -> None:
    # Found at ranks 1 and 3: ((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 2.
    assert average_precision(["a", "x", "b"], {"a", "b"}) == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert average_precision(["x", "a"], {"a"}) == pytest.approx((0 + 1 / 2) / 2)


def test_junk_neither_helps_nor_hurts() -> None:
    assert average_precision(["j", "a", "k", "b"], {"a", "b"}, {"j", "k"}) == 1.0


def test_what_is_not_in_the_ranking_was_never_found() -> None:
    assert average_precision(["a"], {"a", "b"}) == 0.5
    assert average_precision([], {"a"}) == 0.0


def test_a_query_without_relevant_images_has_no_precision() -> None:
    with pytest.raises(ValueError, match="relevant"):
        average_precision(["a"], set())


def test_ns_counts_the_first_four() -> None:
    assert ns_score(["a", "x", "b", "c", "d"], {"a", "b", "c", "d"}) == 3


@given(st.permutations(list("abcdefgh")), st.sets(st.sampled_from("abcdefgh"), min_size=1))
def test_average_precision_is_a_share_and_one_only_for_a_perfect_ranking(
    ranking: list[str], relevant: set[str]
) -> None:
    value = average_precision(ranking, relevant)
    assert 0 < value <= 1
    assert (value == pytest.approx(1)) == (set(ranking[: len(relevant)]) == relevant)
