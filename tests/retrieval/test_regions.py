"""Regions: which answers show the same part of a query."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delf_milvus.retrieval.regions import bounds, regions

SIZE = (640, 480)


def inside(box: tuple[float, float, float, float], count: int = 30, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.uniform(box[:2], box[2:], (count, 2)).astype(np.float32)


LEFT, RIGHT = (20, 40, 280, 440), (360, 40, 620, 440)


def test_answers_for_two_things_have_two_regions() -> None:
    answers = [inside(LEFT), inside(RIGHT, seed=1), inside(LEFT, seed=2), inside(RIGHT, seed=3), inside(LEFT, 8, 4)]
    assert regions(answers, SIZE) == [1, 2, 1, 2, 1]


def test_an_answer_for_a_part_of_a_thing_joins_it_and_so_does_one_for_more_of_it() -> None:
    part = (100, 150, 220, 300)
    assert regions([inside(LEFT), inside(part, 10, 1)], SIZE) == [1, 1]
    assert regions([inside(part, 10), inside(LEFT, 40, 1)], SIZE) == [1, 1]


def test_few_strays_elsewhere_change_nothing() -> None:
    strays = np.concatenate([inside(LEFT, 30, 1), inside(RIGHT, 4, 2)])
    assert regions([inside(LEFT), strays, inside(RIGHT, seed=3)], SIZE) == [1, 1, 2]


def test_an_answer_without_inliers_has_no_region() -> None:
    none = np.empty((0, 2), np.float32)
    assert regions([none, inside(LEFT), none], SIZE) == [0, 1, 0]
    assert regions([], SIZE) == []
    assert bounds(none) is None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_points_and_lines_are_regions_too(count: int) -> None:
    line = np.array([(10, 10), (300, 10), (600, 10)], np.float32)[:count]
    assert regions([line, line], SIZE) == [1, 1]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 1000))
def test_numbers_begin_at_one_and_leave_no_gap(counts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    answers = []
    for count in counts:
        corner = rng.uniform((0, 0), (500, 350))
        answers.append(rng.uniform(corner, corner + 100, (count, 2)).astype(np.float32))
    numbers = regions(answers, SIZE)
    assert list(dict.fromkeys(numbers)) == list(range(1, max(numbers) + 1))
    for number, points in zip(numbers, answers, strict=True):
        x0, y0, x1, y1 = bounds(points)  # type: ignore[misc]
        assert (points >= (x0, y0)).all()
        assert (points <= (x1, y1)).all()
        assert number >= 1
