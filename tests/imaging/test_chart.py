"""Charts show what they are given."""

from __future__ import annotations

import numpy as np
import pytest

from delf_milvus.imaging.chart import Line, Mark, histogram_picture, line_picture, scatter_picture

BLUE, VERMILION = (0, 114, 178), (213, 94, 0)


def pixels(picture: np.ndarray, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the frame's pixels in exactly this colour, without the legend."""
    rows, columns = np.nonzero((picture[:, :768] == colour).all(axis=2))
    return rows, columns


def test_a_line_goes_where_its_points_are() -> None:
    picture = line_picture([Line("up", [0, 1], [0, 1]), Line("flat", [0, 1], [0.5, 0.5])], "x", "y", "caption")
    assert picture.shape == (600, 960, 3)
    rows, columns = pixels(picture, BLUE)
    assert np.corrcoef(rows, columns)[0, 1] < -0.99
    rows, _ = pixels(picture, VERMILION)
    assert np.ptp(rows) <= 6


def test_higher_bars_for_numbers_that_occur_more_often() -> None:
    picture = histogram_picture({"right": [100] * 9 + [40], "wrong": [3] * 10}, "inliers", "share", "caption")
    rows, columns = pixels(picture, BLUE)
    top, far = rows.min(), columns[rows == rows.min()].mean()
    wrong_rows, wrong_columns = pixels(picture, VERMILION)
    # All of one sample in one bin stands higher than nine of ten.
    assert wrong_rows.min() < top
    assert wrong_columns[wrong_rows == wrong_rows.min()].mean() < far


@pytest.mark.parametrize("numbers", [[0], [0, 0, 1], [100_000], list(range(300))])
def test_any_numbers_have_a_histogram(numbers: list[int]) -> None:
    assert len(np.unique(histogram_picture({"a": numbers, "b": []}, "x", "y", "").reshape(-1, 3), axis=0)) > 5


def test_empty_charts_are_refused() -> None:
    with pytest.raises(ValueError, match="points"):
        line_picture([Line("a", [], [])], "x", "y", "")
    with pytest.raises(ValueError, match="numbers"):
        histogram_picture({"a": []}, "x", "y", "")
    with pytest.raises(ValueError, match="above 0"):
        scatter_picture([Mark(0, 1, "a")], "x", "y", "")
