"""Contact sheets: a query and its answers in a grid, each with what is said of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from delf_milvus.imaging.decode import RgbImage
from delf_milvus.imaging.draw import draw_outline
from delf_milvus.imaging.lettering import Lettering

Mark = Literal["query", "verified", "unverified"]

_SIDE = 240  # pixels: of the square that a photo fits
_GAP = 16
_FRAME = 5  # pixels
_MOST_COLUMNS = 5
_MOST_LINES = 4  # of one tile
_FONT_SIZE = 15
_WHITE = (255, 255, 255)
_PAPER = (240, 240, 240)
_INK = (32, 32, 32)
_FAINT = (96, 96, 96)

# Told apart by lightness too, and each tile says the same in words.
_FRAMES: dict[Mark, tuple[int, int, int]] = {
    "query": (32, 32, 32),
    "verified": (0, 114, 178),
    "unverified": (190, 190, 190),
}


@dataclass(frozen=True, eq=False)
class Tile:
    """One photo of a sheet.

    photo: (H, W, 3) uint8, of any size; None where there is none, and `lines` say why. mark: colours the frame. lines:
    written below, each in one line and shortened in the middle. outline: (N, 2) pixels of the photo, of the region that
    matched; drawn where it is given.
    """

    photo: RgbImage | None
    mark: Mark
    lines: Sequence[str]
    outline: NDArray[np.float64] | None = None


def contact_sheet(tiles: Sequence[Tile]) -> RgbImage:
    """The tiles in rows of at most five, in their order; (height, width, 3) uint8 RGB.

    Raises ValueError without tiles.
    """
    if not tiles:
        raise ValueError("a contact sheet needs tiles")
    letters = Lettering(_FONT_SIZE)
    columns = min(_MOST_COLUMNS, max(2, math.ceil(math.sqrt(len(tiles)))), len(tiles))
    rows = math.ceil(len(tiles) / columns)
    lines = min(max(len(tile.lines) for tile in tiles), _MOST_LINES)
    wide, high = _SIDE + _GAP, _SIDE + lines * letters.line_height + 2 * _GAP
    sheet = np.full((rows * high + _GAP, columns * wide + _GAP, 3), _WHITE, np.uint8)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        x, y = _GAP + column * wide, _GAP + row * high
        _draw_photo(sheet[y : y + _SIDE, x : x + _SIDE], tile)
        for line, text in enumerate(tile.lines[:lines]):
            bottom = y + _SIDE + (line + 1) * letters.line_height
            letters.write(sheet, letters.shortened(text, _SIDE), x, bottom, _FAINT if line else _INK)
    return sheet


def fitting(
    photo: RgbImage, side: int, outline: NDArray[np.float64] | None = None
) -> tuple[RgbImage, NDArray[np.float64] | None]:
    """The photo shrunk to fit a square of `side` pixels, a smaller one as it is; and points of it, (N, 2), likewise."""
    factor = min(1.0, side / max(photo.shape[:2]))
    if factor == 1:
        return photo, outline
    size = max(1, round(photo.shape[1] * factor)), max(1, round(photo.shape[0] * factor))
    small = cv2.resize(photo, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    stretch = np.array(size) / np.array(photo.shape[1::-1])
    # Pixel centres lie at integers on both sides.
    return small, None if outline is None else outline * stretch + (stretch - 1) / 2


def outlined(photo: RgbImage, side: int, outline: NDArray[np.float64] | None) -> RgbImage:
    """A copy of the photo that fits a square of `side` pixels, with a closed line through `outline`, (N, 2) pixels."""
    small, points = fitting(photo, side, outline)
    small = small.copy()
    if points is not None and np.isfinite(points).all():
        draw_outline(small, points)
    return small


def _draw_photo(square: RgbImage, tile: Tile) -> None:
    """A tile's frame and photo, drawn in place."""
    square[:] = _FRAMES[tile.mark]
    inside = square[_FRAME:-_FRAME, _FRAME:-_FRAME]
    inside[:] = _PAPER
    if tile.photo is None:
        letters = Lettering(_FONT_SIZE)
        letters.write(inside, "no picture", (inside.shape[1] - letters.width("no picture")) // 2, _SIDE // 2, _FAINT)
        return
    side = inside.shape[0]
    photo = tile.photo
    enlarge = max(1, side // max(photo.shape[:2]))
    if enlarge > 1:
        photo = np.repeat(np.repeat(photo, enlarge, 0), enlarge, 1)
    outline = None if tile.outline is None else tile.outline * enlarge + (enlarge - 1) / 2
    small = outlined(photo, side, outline)
    y, x = (side - small.shape[0]) // 2, (side - small.shape[1]) // 2
    inside[y : y + small.shape[0], x : x + small.shape[1]] = small
