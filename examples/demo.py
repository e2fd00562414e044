"""The main job from end to end, on photos that come with scikit-image; also the check of an installation.

    python examples/demo.py --out demo

Ingests a folder of photos, then searches for distorted views of them whose true transform is known, and for photos
that are not in the folder. Prints a table, leaves match pictures, and exits with 1 if any answer is wrong.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import skimage.data
from numpy.typing import NDArray

from delf_milvus import DelfIndex

Image = NDArray[np.uint8]
Matrix = NDArray[np.float64]

STORED = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "motorcycle_left",
    "page",
    "retina",
    "rocket",
)
UNKNOWN = ("ihc", "moon", "logo", "cell")
TOLERANCE = 0.03
"""Allowed error of the recovered transform, as a share of the stored photo's longest side."""


def sample(name: str) -> Image:
    """A photo of scikit-image's package, RGB."""
    folder = Path(skimage.data.__file__).parent
    path = next(folder.glob(f"{name}.*"))
    return np.array(PIL.Image.open(path).convert("RGB"))


def warped(photo: Image, to_query: Matrix, size: tuple[int, int]) -> tuple[Image, Matrix]:
    """The photo seen through a homography, and the homography from the query back to the photo."""
    border = tuple(int(v) for v in photo.reshape(-1, 3).mean(0))
    query = cv2.warpPerspective(photo, to_query, size, flags=cv2.INTER_AREA, borderValue=border)
    return query, np.linalg.inv(to_query)


def crop(photo: Image) -> tuple[Image, Matrix]:
    height, width = photo.shape[:2]
    x, y = width // 5, height // 6
    shift = np.array([[1, 0, -x], [0, 1, -y], [0, 0, 1]], float)
    return warped(photo, shift, (width * 3 // 5, height * 2 // 3))


def perspective(photo: Image) -> tuple[Image, Matrix]:
    height, width = photo.shape[:2]
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    moved = corners + np.array([[0.05, 0.07], [-0.04, 0.02], [-0.08, -0.06], [0.02, -0.03]]) * (width, height)
    return warped(photo, cv2.getPerspectiveTransform(corners, moved.astype(np.float32)), (width, height))


def turned(photo: Image) -> tuple[Image, Matrix]:
    height, width = photo.shape[:2]
    turn = np.vstack([cv2.getRotationMatrix2D((width / 2, height / 2), 12, 0.9), [0, 0, 1]])
    return warped(photo, turn, (width, height))


def small(photo: Image) -> tuple[Image, Matrix]:
    height, width = photo.shape[:2]
    query, back = warped(photo, np.diag([0.5, 0.5, 1.0]), (width // 2, height // 2))
    return query, back


def relit(photo: Image) -> tuple[Image, Matrix]:
    width = photo.shape[1]
    light = np.linspace(0.45, 1.25, width)[None, :, None]
    return np.clip(photo * light + 12, 0, 255).astype(np.uint8), np.eye(3)


def damaged(photo: Image) -> tuple[Image, Matrix]:
    query, back = crop(photo)
    _, data = cv2.imencode(".jpg", cv2.cvtColor(query, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 12])
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), back


VIEWS: list[tuple[str, str, Callable[[Image], tuple[Image, Matrix]]]] = [
    ("astronaut", "crop", crop),
    ("chelsea", "perspective", perspective),
    ("coffee", "relit", relit),
    ("motorcycle_left", "crop, JPEG 12", damaged),
    ("rocket", "half size", small),
    ("camera", "turned 12 degrees", turned),
    ("astronaut", "perspective", perspective),
    ("page", "crop", crop),
    ("coins", "relit", relit),
    ("hubble_deep_field", "half size", small),
    ("retina", "crop, JPEG 12", damaged),
    ("motorcycle_left", "turned 12 degrees", turned),
]


def transform_error(found: list[list[float]], truth: Matrix, size: tuple[int, int]) -> float:
    """Mean distance, in pixels of the stored photo, between found and true place of a grid of query points."""
    width, height = size
    grid = np.stack(np.meshgrid(np.linspace(0, width, 9), np.linspace(0, height, 9)), -1).reshape(-1, 2)
    points = np.column_stack([grid, np.ones(len(grid))])
    true = points @ truth.T
    return float(np.linalg.norm(points @ np.array(found).T - true[:, :2] / true[:, 2:], axis=1).mean())


def save(path: Path, photo: Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cv2.cvtColor(photo, cv2.COLOR_RGB2BGR))
    return path


def main() -> int:
    # Before torch loads: threads that wait by spinning starve the ones that decode and write.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(description="Ingest sample photos, search for distorted views of them.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for photos, database and pictures")
    out = parser.parse_args().out
    shutil.rmtree(out / "photos.db", ignore_errors=True)

    for name in STORED:
        save(out / "photos" / f"{name}.png", sample(name))
    wrong = 0
    with DelfIndex.open(out / "photos.db") as index:
        report = index.ingest([out / "photos"])
        print(f"{report.added} photos ingested, {report.features} features, {report.seconds:.1f} s\n")
        wrong += report.failed + (report.added != len(STORED))
        print(f"{'query':36}{'best match':24}{'inliers':>7}{'confidence':>12}{'error, px':>11}")

        for number, (name, view, distort) in enumerate(VIEWS):
            query, truth = distort(sample(name))
            path = save(out / "queries" / f"{number:02d}_{name}.png", query)
            result = index.search(path, top_k=3)
            label = f"{name}, {view}"
            if not result.hits or result.hits[0].transform is None:
                print(f"{label:36}{'no match':24}{'':7}{'':12}{'':11}   WRONG")
                wrong += 1
                continue
            best = result.hits[0]
            error = transform_error(best.transform or [], truth, (query.shape[1], query.shape[0]))
            allowed = TOLERANCE * max(sample(name).shape[:2])
            right = best.image_id == f"{name}.png" and error <= allowed
            wrong += not right
            remark = "" if right else "   WRONG"
            print(f"{label:36}{best.image_id:24}{best.inliers:7d}{best.confidence:12.4f}{error:11.1f}{remark}")
            index.draw_hits(path, result, out / "matches" / path.stem)

        for name in UNKNOWN:
            path = save(out / "queries" / f"unknown_{name}.png", sample(name))
            result = index.search(path)
            answer = result.hits[0].image_id if result.matched else "no match"
            wrong += result.matched
            print(f"{name + ', not in the folder':36}{answer:24}{'   WRONG' if result.matched else ''}")
    print(f"\nmatch pictures: {out / 'matches'}")
    print("every answer is right" if not wrong else f"{wrong} answers are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
