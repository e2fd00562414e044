from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from drawn_pairs import project, random_truth, scene, transform_error
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import slow_verify

from delf_milvus.retrieval.frame import FRAME
from delf_milvus.retrieval.matching import Matches
from delf_milvus.retrieval.verification import Keypoints, matched_box, verify, verify_many

RESIDUAL = 25.0
SIZE = (640, 480)


def run(s, residual=RESIDUAL, min_inliers=5):
    return verify(
        s.query.points,
        s.query.scales,
        s.image.points,
        s.image.scales,
        query_size=s.query.size,
        image_size=s.image.size,
        residual=residual,
        min_inliers=min_inliers,
    )


def points_only(query, image, scale=1.0):
    query, image = np.asarray(query, np.float32), np.asarray(image, np.float32)
    ones = np.ones(len(query), np.float32)
    return verify(query, ones, image, ones * scale, query_size=SIZE, image_size=SIZE, residual=RESIDUAL, min_inliers=5)


def as_bytes(result):
    transform = b"" if result.transform is None else result.transform.tobytes()
    return (result.inliers, result.cells, result.scale_agreement, result.mask.tobytes(), transform,
            result.residuals.tobytes())  # fmt: skip


def share_recovered(s, mask):
    return (mask & s.inlier).sum() / s.inlier.sum()


CASES = [
    # matches, inlier ratio, scenes of which at least this share must be recovered
    (8, 0.9, 0.9),
    (20, 0.5, 0.95),
    (50, 0.3, 0.95),
    (100, 0.2, 0.95),
    (200, 0.1, 0.9),
    (300, 0.4, 1.0),
    (300, 0.07, 0.85),
    (1000, 0.05, 0.85),
    (1000, 0.6, 1.0),
]
VIEWS = {
    "upright": {},
    "tilted": {"perspective": 0.3, "shear": 0.2},
    "turned 10": {"rotation": 10},
    "turned 45": {"rotation": -45},
    "turned 90": {"rotation": 90},
    "turned 180": {"rotation": 180},
    "smaller": {"scale": 0.4},
    "larger": {"scale": 2.5},
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("matches", "ratio", "least"), CASES)
def test_the_true_transform_is_found(matches, ratio, least, view):
    rng = np.random.default_rng([matches, round(100 * ratio), list(VIEWS).index(view)])
    found = 0
    for _ in range(12):
        s = scene(rng, matches, ratio, random_truth(rng, **VIEWS[view]))
        result = run(s)
        assert np.isfinite(result.residuals).all()
        found += share_recovered(s, result.mask) >= 0.6 and transform_error(result.transform, s) < RESIDUAL
    # Perspective that an affine transform cannot follow costs inliers, not proof.
    assert found / 12 >= least - (0.25 if view == "tilted" else 0.1)


@pytest.mark.slow
def test_recall_is_no_worse_than_that_of_the_reference():
    rng = np.random.default_rng(3)
    for matches, ratio in ((40, 0.5), (100, 0.25), (200, 0.12)):
        scenes = [scene(rng, matches, ratio, random_truth(rng)) for _ in range(8)]
        ours = [share_recovered(s, run(s).mask) for s in scenes]
        reference = [
            share_recovered(s, slow_verify(s.query.points, s.image.points, RESIDUAL, trials=500)) for s in scenes
        ]
        assert np.mean(np.array(ours) >= 0.6) >= np.mean(np.array(reference) >= 0.6)
        assert np.mean(ours) >= np.mean(reference) - 0.02


def test_inliers_are_those_of_the_reference_where_all_is_easy():
    rng = np.random.default_rng(4)
    for _ in range(3):
        s = scene(rng, 60, 0.7, random_truth(rng, scale=1.0, shear=0.05), noise=1.0)
        mask = slow_verify(s.query.points, s.image.points, RESIDUAL, trials=300)
        assert (run(s).mask == mask).mean() > 0.9


@pytest.mark.parametrize(("matches", "most"), [(30, 6), (150, 9), (300, 13)])
def test_unrelated_photos_reach_only_what_chance_gives(matches, most):
    rng = np.random.default_rng(matches)
    counts = [run(scene(rng, matches, 0, np.eye(3))).inliers for _ in range(100)]
    assert np.quantile(counts, 0.95) <= most


@pytest.mark.parametrize(("scale", "rotation"), [(0.3, 0), (0.3, 60), (2.0, 0), (3.0, -30), (3.0, 180)])
def test_keypoints_without_scales_bind_no_transform_to_one_zoom(scale, rotation):
    rng = np.random.default_rng([round(10 * scale), rotation % 360])
    found = 0
    for _ in range(12):
        s = scene(rng, 200, 0.3, random_truth(rng, scale=scale, rotation=rotation))
        ones = np.ones(200, np.float32)
        s = s._replace(query=s.query._replace(scales=ones), image=s.image._replace(scales=ones))
        result = run(s)
        found += result.transform is not None and share_recovered(s, result.mask) >= 0.8
    assert found >= 11


def test_sizes_and_residuals_are_those_of_the_stored_photo():
    rng = np.random.default_rng(5)
    s = scene(rng, 60, 0.6, random_truth(rng, scale=1.0))
    base = run(s)
    for factor in (0.5, 4.0):
        larger = s._replace(
            image=Keypoints(
                s.image.points * np.float32(factor),
                s.image.scales * np.float32(factor),
                (int(640 * factor), int(480 * factor)),
            )
        )
        result = run(larger)
        np.testing.assert_array_equal(result.mask, base.mask)
        np.testing.assert_allclose(result.transform, base.transform * factor, rtol=1e-6)
        np.testing.assert_allclose(result.residuals, base.residuals * factor, rtol=1e-3)
        assert result.residuals[result.mask].max() <= RESIDUAL * max(larger.image.size) / FRAME * (1 + 1e-6)
    assert (result.inliers, result.cells, result.scale_agreement) == (base.inliers, base.cells, base.scale_agreement)


def test_residuals_are_the_distances_under_the_transform():
    rng = np.random.default_rng(6)
    s = scene(rng, 60, 0.6, random_truth(rng))
    result = run(s)
    moved = s.query.points @ result.transform[:, :2].T + result.transform[:, 2]
    np.testing.assert_allclose(result.residuals, np.linalg.norm(moved - s.image.points, axis=1), atol=1e-2)
    np.testing.assert_array_equal(result.mask, result.residuals <= RESIDUAL)


def test_an_exact_affine_transform_is_recovered_exactly():
    rng = np.random.default_rng(7)
    truth = np.array([[1.1, 0.2, 30.0], [-0.1, 0.9, 20.0], [0, 0, 1]])
    query = rng.uniform((0, 0), SIZE, (200, 2))
    result = points_only(query, project(truth, query))
    assert result.mask.all()
    assert result.cells > 50
    assert result.scale_agreement == 1
    # The preference for similarities is worth a fraction of a pixel.
    np.testing.assert_allclose(
        project(np.vstack([result.transform, (0, 0, 1)]), query), project(truth, query), atol=0.5
    )


def test_windows_of_several_scales_count_as_one_place():
    rng = np.random.default_rng(8)
    places = rng.uniform(50, 430, (6, 2))
    query, image = np.repeat(places, 12, axis=0), np.repeat(places * 0.8 + 20, 12, axis=0)
    result = points_only(query, image, 0.8)
    assert result.mask.all()
    assert result.inliers == 6


def test_one_place_matched_to_many_counts_once():
    rng = np.random.default_rng(9)
    places = rng.uniform(50, 430, (6, 2))
    query = np.vstack([places, np.tile(places[:1], (10, 1))])
    image = np.vstack([places, places[0] + rng.uniform(-20, 20, (10, 2))])
    assert points_only(query, image).inliers <= 6


def test_a_repeated_pattern_does_not_beat_the_truth():
    # A facade: every window also matches windows one and two columns further, as often as its own.
    rng = np.random.default_rng(10)
    grid = np.stack(np.meshgrid(np.arange(60, 600, 60.0), np.arange(60, 440, 60.0)), -1).reshape(-1, 2)
    step, rest = np.array([60, 0]), rng.uniform((0, 0), SIZE, (20, 2))
    query = np.vstack([grid, grid[: len(grid) // 2], grid[len(grid) // 3 :], rest])
    image = np.vstack([grid, grid[: len(grid) // 2] + step, grid[len(grid) // 3 :] + 2 * step, rest])
    order = rng.permutation(len(query))
    result = points_only(query[order], image[order])
    np.testing.assert_allclose(result.transform, [[1, 0, 0], [0, 1, 0]], atol=0.2)
    assert result.inliers >= len(grid) + 10


LINE = np.linspace((20, 30), (600, 400), 30)
DEGENERATE = {
    "all at one point": (np.full((30, 2), 100.0), np.full((30, 2), 200.0)),
    "one point in the image": (np.random.default_rng(0).uniform(0, 480, (30, 2)), np.full((30, 2), 200.0)),
    "one point in the query": (np.full((30, 2), 200.0), np.random.default_rng(0).uniform(0, 480, (30, 2))),
    "on one line in both": (LINE, LINE + 5),
    "on one line in the image": (np.random.default_rng(0).uniform((0, 195), (600, 205), (30, 2)), LINE),
    "two places": (np.repeat([[10.0, 10], [300, 300]], 10, axis=0), np.repeat([[10.0, 10], [300, 300]], 10, axis=0)),
    "fewer than three": (LINE[:2], LINE[:2]),
    "none": (np.empty((0, 2)), np.empty((0, 2))),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_matches_prove_nothing(case):
    query, image = DEGENERATE[case]
    result = points_only(query, image)
    assert result.inliers == 0
    assert result.transform is None
    assert not result.mask.any()
    assert result.residuals.shape == (len(query),)


def test_a_mirrored_photo_is_no_proof():
    rng = np.random.default_rng(11)
    query = rng.uniform((0, 0), SIZE, (100, 2))
    result = points_only(query, query * (-1, 1) + (640, 0))
    assert result.inliers < 30
    assert result.transform is None or np.linalg.det(result.transform[:, :2]) > 0


def test_fewer_places_than_asked_for_make_a_similarity_only():
    rng = np.random.default_rng(12)
    query = rng.uniform((0, 0), SIZE, (12, 2))
    image = query * (1.0, 0.9)
    transform = points_only(query, image).transform
    assert abs(transform[0, 0] - transform[1, 1]) > 0.05
    ones = np.ones(12, np.float32)
    transform = verify(
        query, ones, image, ones, query_size=SIZE, image_size=SIZE, residual=RESIDUAL, min_inliers=13
    ).transform
    assert transform[0, 0] == pytest.approx(transform[1, 1])
    assert transform[0, 1] == pytest.approx(-transform[1, 0])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("field", range(4))
def test_impossible_values_are_refused(field, value):
    rng = np.random.default_rng(13)
    s = scene(rng, 20, 0.5, np.eye(3))
    arrays = [s.query.points, s.query.scales, s.image.points, s.image.scales]
    arrays[field] = arrays[field].copy()
    arrays[field].flat[3] = value
    if field in (1, 3) and np.isfinite(value):
        assert np.isfinite(
            verify(*arrays, query_size=SIZE, image_size=SIZE, residual=RESIDUAL, min_inliers=5).residuals
        ).all()
    else:
        with pytest.raises(ValueError, match=r"finite|must lie"):
            verify(*arrays, query_size=SIZE, image_size=SIZE, residual=RESIDUAL, min_inliers=5)


def test_arguments_that_make_no_sense_are_refused():
    points, scales = np.zeros((4, 2), np.float32), np.ones(4, np.float32)
    good = {"query_size": SIZE, "image_size": SIZE, "residual": RESIDUAL, "min_inliers": 5}
    for arrays, change, message in (
        ((points, scales[:3], points, scales), {}, "shape"),
        ((points, scales, points[:3], scales[:3]), {}, "two ends"),
        ((points, scales, points, -scales), {}, "positive"),
        ((points, scales, points, scales), {"residual": 0.0}, "residual"),
        ((points, scales, points, scales), {"residual": np.nan}, "residual"),
        ((points, scales, points, scales), {"image_size": (0, 480)}, "pixel"),
    ):
        with pytest.raises(ValueError, match=message):
            verify(*arrays, **(good | change))


@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.sampled_from([1, 8, 64, 640]))
@settings(max_examples=150, deadline=None)
def test_any_matches_give_a_sound_result(seed, count, extent):
    rng = np.random.default_rng(seed)
    query = rng.integers(0, extent, (count, 2)).astype(np.float32)
    image = rng.integers(0, extent, (count, 2)).astype(np.float32)
    scales = 2 ** rng.uniform(-3, 3, (2, count)).astype(np.float32)
    result = verify(
        query, scales[0], image, scales[1], query_size=SIZE, image_size=SIZE, residual=RESIDUAL, min_inliers=5
    )
    assert np.isfinite(result.residuals).all()
    assert 0 <= result.scale_agreement <= 1
    assert result.inliers <= result.mask.sum()
    assert (result.transform is None) == (result.inliers == 0) == (not result.mask.any())
    if result.transform is not None:
        stretch = np.linalg.svd(result.transform[:, :2], compute_uv=False)
        assert np.linalg.det(result.transform[:, :2]) > 0
        assert stretch[0] / stretch[1] <= 4 * (1 + 1e-6)
        assert 1 <= result.cells <= result.mask.sum()


def test_results_are_the_same_bytes_in_any_batch_order_and_thread():
    rng = np.random.default_rng(14)
    scenes = [scene(rng, int(n), 0.3, random_truth(rng)) for n in rng.integers(10, 400, 12)]
    alone = [as_bytes(run(s)) for s in scenes]
    # One query, whose features are those of all scenes in a row.
    query = Keypoints(
        np.concatenate([s.query.points for s in scenes]), np.concatenate([s.query.scales for s in scenes]), SIZE
    )
    first = np.cumsum([0, *(len(s.query.points) for s in scenes)])
    matches = [Matches(np.arange(a, b), np.arange(b - a), np.ones(b - a, np.float32)) for a, b in pairwise(first)]
    images = [s.image for s in scenes]

    def many(step):
        found = verify_many(query, images[::step], matches[::step], residual=RESIDUAL, min_inliers=5)
        return [as_bytes(result) for result in found]

    assert many(1) == alone
    assert many(-1) == alone[::-1]
    with ThreadPoolExecutor(4) as pool:
        assert all(result == alone for result in pool.map(many, [1] * 8))


def test_the_matched_box_is_the_part_of_the_query_that_the_image_shows():
    none = np.empty((0, 2), np.float32)
    shrink = np.array([[0.5, 0, 100], [0, 0.5, 50]])
    assert matched_box(shrink, (0, 0, 200, 100), SIZE, none) == (100, 50, 200, 100)
    assert matched_box(shrink, (-400, 0, 200, 100), SIZE, none) == (0, 50, 200, 100)
    assert matched_box(shrink * 100, (0, 0, 639, 479), (30, 20), np.ones((1, 2), np.float32)) == (1, 1, 1, 1)
    grow = np.array([[100.0, 0, -3000], [0, 100, -3000]])
    assert matched_box(grow, (0, 0, 639, 479), SIZE, none) == (0, 0, 639, 479)
    quarter_turn = np.array([[0.0, -1, 300], [1, 0, 0]])
    np.testing.assert_allclose(matched_box(quarter_turn, (0, 0, 200, 100), SIZE, none), (200, 0, 300, 200), atol=1e-3)


def test_without_a_transform_the_matched_box_bounds_the_inliers():
    inliers = np.array([[10, 20], [50, 700], [30, 5]], np.float32)
    assert matched_box(None, (0, 0, 10, 10), SIZE, inliers) == (10, 5, 50, 479)
    outside = np.array([[1.0, 0, 5000], [0, 1, 5000]])
    assert matched_box(outside, (0, 0, 10, 10), SIZE, inliers) == (10, 5, 50, 479)
    with pytest.raises(ValueError, match="no region"):
        matched_box(None, (0, 0, 10, 10), SIZE, np.empty((0, 2), np.float32))
