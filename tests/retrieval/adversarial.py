"""Matches that are hard for verification, with a known transform: a seeded case for each point of a grid.

Unlike `scenes`, whose keypoints snap to the grids of a pyramid, positions here carry Gaussian noise of a given size,
and any change of scale from 1/4 to 4 is seen by some pair of pyramid levels: those of the `paper` preset.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from drawn_pairs import Scene, jacobian_scale, project
from numpy.typing import NDArray

from delf_milvus.retrieval.matching import Matches
from delf_milvus.retrieval.verification import Keypoints, Verification, verify_many

SIZE = (640, 480)

LEVELS = 2.0 ** (np.arange(-2, 5) / 2)
"""Scales of features, 1 / pyramid scale, in half octaves."""

MATCHES = (5, 10, 20, 50, 100, 300, 1000)
RATIOS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6)
NOISES = (0.0, 2.0, 4.0, 8.0)
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
ROTATIONS = (0, 15, 45, 90, 180)
PERSPECTIVES = (0.0, 0.1, 0.2)

LEAST = 3
"""True inliers below which there is nothing to find."""

CLOSE = 20.0
"""Pixels from the truth within which a true inlier is explained."""


class Case(NamedTuple):
    """A point of the grid.

    matches: putative ones. ratio: share of them that is true. noise: standard deviation, pixels, of a true one's place
    in the image. scale, rotation (degrees), perspective: of the truth, query to image.
    """

    matches: int
    ratio: float
    noise: float = 2.0
    scale: float = 1.0
    rotation: float = 0.0
    perspective: float = 0.0

    @property
    def inliers(self) -> int:
        """How many matches are true."""
        return round(self.matches * self.ratio)


def counts() -> list[tuple[int, float]]:
    """The (matches, ratio) of the grid that hold enough true matches to be found."""
    return [(m, r) for m, r in itertools.product(MATCHES, RATIOS) if Case(m, r).inliers >= LEAST]


def case_of(rng: np.random.Generator, matches: int, ratio: float) -> Case:
    """A case with the rest of the grid drawn."""
    rest = (float(rng.choice(values)) for values in (NOISES, SCALES, ROTATIONS, PERSPECTIVES))
    return Case(matches, ratio, *rest)


def truth_of(rng: np.random.Generator, case: Case) -> NDArray[np.float64]:
    """(3, 3), query to image, around the middle of both photos, with some shear and a shift."""
    angle = np.deg2rad(case.rotation)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = case.scale * turn @ (np.eye(2) + rng.uniform(-0.1, 0.1, (2, 2)))
    centre = np.array(SIZE) / 2
    # Perspective acts on what both photos show: of a query that is seen enlarged, that is a small part.
    shown = np.array(SIZE) / max(1.0, case.scale)
    warp, shift, back = np.eye(3), np.eye(3), np.eye(3)
    warp[2, :2] = rng.choice([-1, 1], 2) * case.perspective / shown
    shift[:2, 2] = -centre
    back[:2, :2] = linear
    back[:2, 2] = centre + rng.uniform(-30, 30, 2)
    return back @ warp @ shift


def make(case: Case, seed: int) -> Scene:
    """Matches of a case in falling similarity: true ones are the more similar, on the whole."""
    rng = np.random.default_rng([seed, case.matches, round(1000 * case.ratio)])
    truth = truth_of(rng, case)
    query, query_scale = places(rng, case.matches)
    image, image_scale = places(rng, case.matches)
    true = case.inliers
    drawn = np.empty((0, 2))
    while len(drawn) < true:
        points = rng.uniform((0, 0), SIZE, (4000, 2))
        seen = project(truth, points)
        drawn = np.concatenate([drawn, points[((seen >= 0) & (seen < SIZE)).all(axis=1)]])
    query[:true] = drawn[:true]
    image[:true] = project(truth, drawn[:true]) + rng.normal(0, case.noise, (true, 2))
    query_scale[:true], image_scale[:true] = levels(rng, jacobian_scale(truth, drawn[:true]))
    order = np.argsort(-(rng.random(case.matches) + 0.3 * (np.arange(case.matches) < true)), kind="stable")
    return Scene(
        Keypoints(query[order].astype(np.float32), query_scale[order].astype(np.float32), SIZE),
        Keypoints(image[order].astype(np.float32), image_scale[order].astype(np.float32), SIZE),
        order < true,
        truth,
    )


def places(rng: np.random.Generator, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points (N, 2) anywhere, and scales (N,) of any level."""
    return rng.uniform((0, 0), SIZE, (count, 2)), rng.choice(LEVELS, count)


def levels(
    rng: np.random.Generator, change: NDArray[np.float64], off: float = 0.3
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scales (N,) in query and image of features that change so (N,); a share of them is seen one level off."""
    steps = np.rint(2 * np.log2(change)) + rng.choice([-1, 0, 1], len(change), p=[off / 2, 1 - off, off / 2])
    top = len(LEVELS) - 1
    steps = np.clip(steps, -top, top).astype(int)
    low, high = np.maximum(0, -steps), np.minimum(top, top - steps)
    level = rng.integers(low, high + 1)
    return LEVELS[level], LEVELS[level + steps]


def unrelated(seed: int, matches: int) -> Scene:
    """Matches of which none is true."""
    rng = np.random.default_rng([seed, matches])
    query, image = places(rng, matches), places(rng, matches)
    return Scene(
        Keypoints(*(a.astype(np.float32) for a in query), SIZE),
        Keypoints(*(a.astype(np.float32) for a in image), SIZE),
        np.zeros(matches, bool),
        np.eye(3),
    )


def facades(seed: int, columns: int, rows: int, *, related: bool, layers: int = 1) -> Scene:
    """Two fronts of like windows, each window matched to one of the other front, which need not be its own.

    related: a third of the windows is matched to its own; otherwise the windows stand in other distances, and any is
    matched to any. layers: features of each window, each of them matched so.
    """
    rng = np.random.default_rng([seed, columns, rows, related])
    step = np.full(2, 60.0) if related else rng.uniform(40, 58, 2)
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
    own, partner = [], []
    for _ in range(layers):
        others = rng.random(len(grid)) >= (1 / 3 if related else 0)
        window = np.arange(len(grid))
        window[others] = rng.permutation(window[others])
        own.append(np.arange(len(grid)))
        partner.append(window)
    order = rng.permutation(layers * len(grid))
    query, image = np.concatenate(own)[order], np.concatenate(partner)[order]
    ones = np.ones(len(order), np.float32)
    return Scene(
        Keypoints((40 + 60.0 * grid[query]).astype(np.float32), ones, SIZE),
        Keypoints((40 + step * grid[image]).astype(np.float32), ones, SIZE),
        (query == image) & related,
        np.eye(3),
    )


def concentrated(seed: int, matches: int, query_extent: float, image_extent: float) -> Scene:
    """Matches of which none is true, all in a window of each photo, of that share of its sides."""
    scene = unrelated(seed, matches)
    for side, extent in ((scene.query, query_extent), (scene.image, image_extent)):
        side.points[:] = side.points * extent + np.array(SIZE) * (1 - extent) / 3
    return scene


def rows_of(scene: Scene, rows: NDArray[np.intp]) -> Scene:
    """The same scene with these matches."""
    query, image, inlier, truth = scene
    return Scene(
        Keypoints(query.points[rows], query.scales[rows], query.size),
        Keypoints(image.points[rows], image.scales[rows], image.size),
        inlier[rows],
        truth,
    )


def reordered(scene: Scene, seed: int, preference: float) -> Scene:
    """The matches in another order of similarity: with 0 any, with 1 the true ones first, with -1 last."""
    noise = np.random.default_rng(seed).random(len(scene.inlier))
    return rows_of(scene, np.argsort(-(noise + preference * scene.inlier), kind="stable"))


def verified(scene: Scene, residual: float = CLOSE) -> Verification:
    """What the package finds in the matches of a scene."""
    rows = np.arange(len(scene.inlier))
    matches = Matches(rows, rows, np.ones(len(rows), np.float32))
    (result,) = verify_many(scene.query, [scene.image], [matches], residual=residual, min_inliers=5)
    return result


def as_bytes(result: Verification) -> tuple[object, ...]:
    """All of a result, comparable to the bit."""
    arrays = (result.mask, result.residuals, np.zeros(0) if result.transform is None else result.transform)
    return (result.inliers, result.cells, result.scale_agreement, *(array.tobytes() for array in arrays))


def explained(transform: NDArray[np.float64] | None, scene: Scene) -> float:
    """Share of the true matches whose place under the transform (2, 3) is within `CLOSE` of the true one."""
    if transform is None or not scene.inlier.any():
        return 0.0
    points = scene.query.points[scene.inlier].astype(np.float64)
    moved = points @ transform[:, :2].T + transform[:, 2]
    return float(np.mean(np.linalg.norm(moved - project(scene.truth, points), axis=1) <= CLOSE))


def found(transform: NDArray[np.float64] | None, scene: Scene) -> bool:
    """Whether the transform is the true one: it explains at least 80 % of the true matches."""
    return explained(transform, scene) >= 0.8
