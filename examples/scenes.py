"""Photos for the examples where no folder of your own is given: drawn murals, and other views of them.

    python examples/scenes.py photos --places 6 --views 3

writes `photos/place-0/view-0.jpg` and so on. The same seed draws the same mural, so examples and tests know what
is right.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""RGB, (H, W, 3)."""

WIDTH, HEIGHT = 320, 240


def scene(seed: int) -> Image:
    """A mural of its own for each seed: shapes and letters over a smooth ground."""
    rng = np.random.default_rng([seed, 5])
    width, height = 2 * WIDTH, 2 * HEIGHT
    image = cv2.resize(rng.integers(0, 255, (4, 5, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(70):
        ink = colour(rng, 0, 255)
        x, y, size = int(rng.integers(0, width)), int(rng.integers(0, height)), int(rng.integers(8, width // 5))
        turn, kind = float(rng.uniform(0, 180)), int(rng.integers(0, 5))
        steps = np.array([x, y]) + np.cumsum(rng.normal(0, size / 3, (int(rng.integers(3, 8)), 2)), 0)
        if kind == 0:
            cv2.circle(image, (x, y), size // 2, ink, -1, cv2.LINE_AA)
        elif kind == 1:
            corners = cv2.boxPoints(((x, y), (size, size * rng.uniform(0.2, 1)), turn))
            cv2.fillPoly(image, [corners.astype(np.int32)], ink, cv2.LINE_AA)
        elif kind == 2:
            axes = (size, max(3, int(size * rng.uniform(0.2, 0.8))))
            end, thick = int(rng.integers(90, 360)), int(rng.integers(3, 14))
            cv2.ellipse(image, (x, y), axes, turn, 0, end, ink, thick, cv2.LINE_AA)
        elif kind == 3:
            cv2.fillPoly(image, [steps.astype(np.int32)], ink, cv2.LINE_AA)
        else:
            letters = "".join(rng.choice(list("ABDEGHKMNQRSWXZ235689&"), int(rng.integers(1, 5))))
            font, thick = int(rng.integers(0, 8)), int(rng.integers(2, 7))
            cv2.putText(image, letters, (x, y), font, rng.uniform(0.8, 3), ink, thick, cv2.LINE_AA)
    small = cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    return clipped(small + rng.normal(0, 5, small.shape))


def view(photo: Image, seed: int) -> Image:
    """The same thing from another place, in other light; seed 0 is the photo itself."""
    if seed == 0:
        return photo
    rng = np.random.default_rng([seed, 11])
    height, width = photo.shape[:2]
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    inside = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * rng.uniform(0.0, 0.1, (4, 2)) * (width, height)
    turn = cv2.getPerspectiveTransform((corners + inside).astype(np.float32), corners)
    seen = cv2.warpPerspective(photo, turn, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    light = np.linspace(*rng.uniform(0.75, 1.2, 2), width)[None, :, None] * rng.uniform(0.92, 1.08, 3)
    return clipped(seen * light + rng.normal(0, 4, seen.shape))


def save(path: Path, photo: Image, quality: int = 90) -> Path:
    """Write an RGB photo; the suffix says the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if path.suffix.lower() in (".jpg", ".jpeg") else []
    if not cv2.imwrite(str(path), cv2.cvtColor(photo, cv2.COLOR_RGB2BGR), options):
        raise OSError(f"{path} cannot be written")
    return path


def write(folder: Path, places: int, views: int) -> Path:
    """`views` photos of each of `places` murals, a folder for each."""
    for place in range(places):
        for number in range(views):
            save(folder / f"place-{place}" / f"view-{number}.jpg", view(scene(place), number))
    return folder


def colour(rng: np.random.Generator, low: int, high: int) -> tuple[int, ...]:
    """A random one, each channel in [low, high)."""
    return tuple(int(value) for value in rng.integers(low, high, 3))


def clipped(image: NDArray[np.floating]) -> Image:
    """Rounded down to bytes."""
    return np.clip(image, 0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw murals, and other views of them.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--places", type=int, default=6)
    parser.add_argument("--views", type=int, default=3)
    arguments = parser.parse_args()
    write(arguments.folder, arguments.places, arguments.views)
    print(f"{arguments.places * arguments.views} photos in {arguments.folder}")


if __name__ == "__main__":
    main()
