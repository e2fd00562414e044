"""The picture of the README: two views of a drawn street, matched.

    python examples/pictures/draw.py

writes `match.jpg` beside this file, with the bundled model.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

# Before torch loads: threads that wait by spinning starve others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from scenes import Image, clipped, colour, save, view

from delf_milvus import PhotoMatcher, Settings

WIDTH, HEIGHT = 480, 320
OUT = Path(__file__).parent / "match.jpg"


def street(seed: int) -> Image:
    """A row of houses of its own for each seed."""
    rng = np.random.default_rng([seed, 7])
    scale = 2
    width, height = WIDTH * scale, HEIGHT * scale
    low, high = rng.integers(120, 200, 3), rng.integers(200, 255, 3)
    image = (low + (high - low) * np.linspace(0, 1, height)[:, None, None]) * np.ones((1, width, 1))
    image = np.ascontiguousarray(image, dtype=np.uint8)
    for _ in range(5):
        centre = (int(rng.integers(0, width)), int(rng.integers(0, height // 3)))
        axes = (int(rng.integers(30, 120)), int(rng.integers(10, 30)))
        cv2.ellipse(image, centre, axes, 0, 0, 360, colour(rng, 215, 250), -1, cv2.LINE_AA)
    ground = int(height * 0.86)
    left = -int(rng.integers(0, 60))
    while left < width:
        right = left + int(rng.integers(110, 260))
        _house(image, rng, left, right, ground)
        left = right + int(rng.integers(0, 14))
    cv2.rectangle(image, (0, ground), (width, height), colour(rng, 80, 140), -1)
    for _ in range(140):
        x, y = int(rng.integers(0, width)), int(rng.integers(ground, height))
        cv2.rectangle(image, (x, y), (x + int(rng.integers(6, 30)), y + 5), colour(rng, 60, 170), -1)
    for _ in range(3):
        _tree(image, rng, int(rng.integers(0, width)), ground)
    noise = rng.normal(0, 5, image.shape)
    smooth = cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    return clipped(smooth + cv2.resize(noise, (WIDTH, HEIGHT)))


def _house(image: Image, rng: np.random.Generator, left: int, right: int, ground: int) -> None:
    top = ground - int(rng.integers(180, 420))
    wall, frame, pane, roof = (colour(rng, *span) for span in ((110, 235), (60, 250), (20, 110), (50, 150)))
    cv2.rectangle(image, (left, top), (right, ground), wall, -1)
    middle, peak = (left + right) // 2 + int(rng.integers(-30, 30)), top - int(rng.integers(15, 110))
    gables = [
        [(left - 8, top), (right + 8, top), (middle, peak)],
        [(left - 8, top), (right + 8, top), (right - 25, peak), (left + 25, peak)],
        [(left, top), (left, peak), (middle, peak + 20), (middle, peak), (right, peak), (right, top)],
    ]
    cv2.fillPoly(image, [np.array(gables[int(rng.integers(0, 3))])], roof, cv2.LINE_AA)
    columns, step = int(rng.integers(2, 5)), int(rng.integers(52, 96))
    spacing = (right - left) / columns
    size = spacing * rng.uniform(0.35, 0.7), step * rng.uniform(0.45, 0.75)
    arched, shutters, bars = rng.random(3) < 0.5
    for y in range(top + 18, ground - step, step):
        for column in range(columns):
            x = int(left + spacing * (column + 0.5) - size[0] / 2)
            far, low = x + int(size[0]), y + int(size[1])
            if shutters:
                side = int(size[0] * 0.35)
                cv2.rectangle(image, (x - side, y), (far + side, low), roof, -1)
            cv2.rectangle(image, (x - 3, y - 3), (far + 3, low + 3), frame, -1)
            shade = tuple(int(value) for value in np.clip(np.array(pane) + rng.integers(-20, 60), 0, 255))
            cv2.rectangle(image, (x, y), (far, low), shade, -1)
            if arched:
                half = int(size[0] / 2)
                cv2.ellipse(image, (x + half, y), (half + 3, half), 0, 180, 360, frame, -1, cv2.LINE_AA)
            if bars:
                cv2.line(image, ((x + far) // 2, y), ((x + far) // 2, low), frame, 3)
                cv2.line(image, (x, (y + low) // 2), (far, (y + low) // 2), frame, 3)
        if rng.random() < 0.4:
            cv2.line(image, (left, y - 10), (right, y - 10), frame, 4)
    door = left + int(rng.integers(10, max(11, right - left - 50)))
    cv2.rectangle(image, (door, ground - 62), (door + 40, ground), roof, -1)
    cv2.circle(image, (door + 32, ground - 30), 4, frame, -1, cv2.LINE_AA)
    sign = "".join(rng.choice(list("ABCDEFGHIKLMNOPRSTUVWZ"), int(rng.integers(3, 7))))
    cv2.rectangle(image, (left + 6, ground - 96), (right - 6, ground - 66), frame, -1)
    cv2.putText(image, sign, (left + 16, ground - 74), cv2.FONT_HERSHEY_DUPLEX, 0.8, pane, 2, cv2.LINE_AA)


def _tree(image: Image, rng: np.random.Generator, x: int, ground: int) -> None:
    top = ground - int(rng.integers(80, 180))
    cv2.rectangle(image, (x - 6, top), (x + 6, ground + 6), colour(rng, 50, 90), -1)
    for _ in range(25):
        place = (x + int(rng.normal(0, 26)), top + int(rng.normal(0, 24)))
        green = (int(rng.integers(30, 110)), int(rng.integers(90, 170)), int(rng.integers(30, 90)))
        cv2.circle(image, place, int(rng.integers(6, 20)), green, -1, cv2.LINE_AA)


def main() -> None:
    photo = street(3)
    with tempfile.TemporaryDirectory() as folder:
        first = save(Path(folder) / "a.png", view(photo, 5))
        second = save(Path(folder) / "b.png", photo)
        matcher = PhotoMatcher(Settings())
        pair = matcher.match(first, second)
        picture = Path(folder) / "match.png"
        matcher.draw(first, second, pair, picture)
        drawn = cv2.imread(str(picture))
    assert drawn is not None
    cv2.imwrite(str(OUT), drawn, [cv2.IMWRITE_JPEG_QUALITY, 70])
    print(f"{OUT}: {OUT.stat().st_size} bytes; {pair.inliers} inliers of {pair.putatives}")


if __name__ == "__main__":
    main()
