"""Views of a photo, and how their hits become one answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delf_milvus.retrieval.answers import Correspondence, Hit
from delf_milvus.retrieval.views import View, joined, views_of

WHOLE = View((0, 0, 100, 60))


def hit(image: str, *, fa: float = 1e-4, score: float = 1.0, verified: bool = True, at: float = 10.0) -> Hit:
    points = (at + np.array([[0, 0], [8, 0], [0, 8], [8, 8]])).astype(np.float32)
    return Hit(
        rank=1,
        image_id=image,
        uri="",
        verified=verified,
        compared=True,
        inliers=4,
        putatives=9,
        confidence=0.9,
        false_alarm=fa,
        score=score,
        transform=[[2.0, 0.0, 5.0], [0.0, 2.0, 7.0]],
        homography=None,
        box=None,
        query_box=None,
        region=1,
        correspondence=Correspondence(points, 2 * points + np.float32([5, 7]), np.zeros(4, np.float32)),
    )


def join(*seen: tuple[View, list[Hit]], top: int = 10, per_region: int = 0, bar: float = 0.01) -> list[Hit]:
    return joined(seen, (100, 60), max_false_alarm=bar, top=top, per_region=per_region)


@given(st.integers(0, 3), st.integers(0, 5), st.integers(0, 5), st.integers(1, 9), st.integers(1, 9))
def test_a_view_shows_each_pixel_where_its_matrix_says(turns: int, x0: int, y0: int, width: int, height: int) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    view = View((x0, y0, x0 + width, y0 + height), turns)
    cut = view.cut(photo)
    assert cut.shape == ((height, width, 3) if turns % 2 == 0 else (width, height, 3))
    for y in range(y0, y0 + height):
        for x in range(x0, x0 + width):
            column, row, one = view.matrix @ (x, y, 1)
            assert one == 1
            assert np.array_equal(photo[y, x], cut[int(row), int(column)])


@pytest.mark.parametrize(
    ("parts", "turned", "count"), [(False, False, 1), (True, False, 6), (False, True, 4), (True, True, 9)]
)
def test_views_lie_in_the_box_and_the_parts_cover_it(parts: bool, turned: bool, count: int) -> None:
    views = views_of((10, 20, 110, 80), parts=parts, turned=turned)
    assert len(views) == count
    assert views[0] == View((10, 20, 110, 80))
    covered = np.zeros((80, 110), bool)
    for view in views[1:] if parts else views:
        x0, y0, x1, y1 = view.box
        assert 10 <= x0 < x1 <= 110
        assert 20 <= y0 < y1 <= 80
        covered[y0:y1, x0:x1] = True
    assert covered[20:, 10:].all()


def test_parts_of_a_photo_of_one_pixel_are_that_pixel() -> None:
    assert {view.box for view in views_of((3, 4, 4, 5), parts=True, turned=False)} == {(3, 4, 4, 5)}


def test_hits_of_a_turned_part_are_moved_into_the_photo() -> None:
    view = View((20, 10, 60, 50), 1)
    (moved,) = join((WHOLE, []), (view, [hit("a")]))
    points = moved.correspondence.query_points
    assert ((points >= (20, 10)) & (points < (60, 50))).all()
    transform = np.array(moved.transform)
    np.testing.assert_allclose(
        points @ transform[:, :2].T + transform[:, 2], moved.correspondence.image_points, atol=1e-3
    )
    assert moved.query_box == (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())


def test_an_image_is_an_answer_once_where_its_proof_is_strongest_and_chances_are_counted() -> None:
    hits = join((WHOLE, [hit("a", fa=1e-3)]), (View((0, 0, 60, 36)), [hit("a", fa=1e-5), hit("b", fa=6e-3)]))
    assert [one.image_id for one in hits] == ["a"]
    assert hits[0].false_alarm == pytest.approx(2e-5)
    assert hits[0].confidence == pytest.approx(0.9 / (0.9 + 2 * 0.1))


def test_answers_come_by_score_and_regions_are_those_of_the_whole_photo() -> None:
    part = View((50, 20, 100, 60))
    seen = ((WHOLE, [hit("a", score=2.0), hit("c", score=1.0)]), (part, [hit("b", score=1.5)]))
    hits = join(*seen)
    assert [(one.rank, one.image_id, one.region) for one in hits] == [(1, "a", 1), (2, "b", 2), (3, "c", 1)]
    assert [one.image_id for one in join(*seen, per_region=1)] == ["a", "b"]
    assert [one.image_id for one in join(*seen, top=1)] == ["a"]


def test_what_is_not_verified_follows_in_the_order_of_the_first_view() -> None:
    loose = [hit("x", verified=False, fa=0.3), hit("b", verified=False, fa=0.5), hit("weak", fa=9e-3)]
    hits = join((WHOLE, loose), (View((0, 0, 60, 36)), [hit("b"), replace(hit("y"), verified=False)]))
    assert [(one.image_id, one.verified) for one in hits] == [("b", True), ("x", False), ("weak", False)]
    assert hits[1].false_alarm == pytest.approx(0.6)
