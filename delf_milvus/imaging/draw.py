"""Match pictures: two photos side by side, the inliers between them, and what the transform says."""

from __future__ import annotations

import re
import unicodedata
import uuid
from bisect import bisect_right
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from delf_milvus.errors import InputError, UsageError, one_line
from delf_milvus.features import Float32Array
from delf_milvus.imaging.decode import RgbImage

_LONGEST = 720  # pixels: two photos beside each other still fit a usual screen
_LEAST_HEIGHT = 360  # a panorama shall not make its neighbour a stamp
_LEAST_WIDTH = 240  # nor a tower leave no room for the caption
_GAP = 12  # around the panels
_MARGIN = 12  # around the caption
_OVERHANG = 4  # an outline along the border of the photo shall not lose its outer half
_FONT_SIZE = 18  # pixels
_FONT_WEIGHT = 450
_LINE_HEIGHT = 25
_MOST_CAPTION = 1200  # characters
_MOST_LINES = 8
_BAR = (150, 12)  # width and height of the colour bar
_SUBPIXEL_BITS = 4
_FARTHEST = 1e6  # pixels of the picture: beyond, the outline of a photo is no outline but a degenerate transform

_WHITE = (255, 255, 255)
_PINK = (255, 70, 190)  # in neither end of the lines' colour map, for every kind of colour vision
_PAPER = (240, 240, 240)
_INK = (32, 32, 32)
_CASING = (0, 0, 0)

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def match_picture(
    query: RgbImage,
    image: RgbImage,
    query_points: Float32Array,  # (N, 2)
    image_points: Float32Array,  # (N, 2)
    *,
    residuals: Float32Array | None,  # (N,)
    transform: NDArray[np.float64] | None,  # (2, 3)
    caption: str,
) -> RgbImage:
    """The two photos side by side, with a line from each query keypoint to the image keypoint it matches.

    query, image: (H, W, 3) uint8, of any size. Both are shown at one height, at most 720 pixels; a panorama or a tower
        is centred in its panel instead.
    query_points, image_points: (N, 2) float32, x then y, pixels of the photo each lies in. N may be 0.
    residuals: (N,) float32, distance in pixels between the transformed query keypoint and the image keypoint; colours
        the lines from yellow (least) to blue (most), with a legend. None draws all of them yellow.
    transform: (2, 3) float64, from query to image pixels; the query's outline is drawn on the image.
    caption: written below, wrapped; line breaks are kept, what the font lacks is shown as a box.

    Returns (height, width, 3) uint8 RGB.
    """
    height = _common_height(query, image)
    left, left_view = _panel(query, height)
    right, right_view = _panel(image, height)
    right_x = left.shape[1] + 2 * _GAP
    picture = np.full((height + 2 * _GAP, right_x + right.shape[1] + _GAP, 3), _WHITE, np.uint8)
    picture[_GAP:-_GAP, _GAP : right_x - _GAP] = left
    picture[_GAP:-_GAP, right_x:-_GAP] = right
    starts = _apply(left_view, query_points) + _GAP
    ends = _apply(right_view, image_points) + np.array([right_x, _GAP])
    shares, worst = _shares(residuals, len(starts))
    if transform is not None and np.isfinite(transform).all():
        # A view, so that the outline ends where the panel does.
        around = _GAP - _OVERHANG
        panel = picture[around:-around, right_x - _OVERHANG : -around]
        _draw_outline(panel, _apply(right_view, _apply(transform, _corners(query))) + _OVERHANG)
    _draw_matches(picture, starts, ends, _colours(shares), shares)
    return np.vstack([picture, _caption_strip(caption, picture.shape[1], worst)])


def save_picture(path: Path, picture: RgbImage) -> None:
    """Write the picture, (H, W, 3) uint8 RGB, in the format that the suffix names: .png, .jpg, .jpeg or .webp.

    Missing folders are made. The file appears complete or not at all.

    Raises UsageError for another suffix, InputError where the folder or the file cannot be written.
    """
    name = one_line(path)
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f"{name} must end with one of {', '.join(_FORMATS)}.")
    encoded = BytesIO()
    try:
        Image.fromarray(picture).save(encoded, kind, quality=90)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: a picture of {picture.shape[1]} x {picture.shape[0]} is no {kind}; use .png."
        ) from error
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(encoded.getbuffer())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{name} cannot be written: {error.strerror or 'input/output error'}.") from error


def _common_height(*photos: RgbImage) -> int:
    """The height at which every photo fits a square of `_LONGEST`."""
    fitting = [_LONGEST * min(1.0, photo.shape[0] / photo.shape[1]) for photo in photos]
    return max(int(min(fitting)), _LEAST_HEIGHT)


def _panel(photo: RgbImage, height: int) -> tuple[RgbImage, NDArray[np.float64]]:
    """The photo centred in a panel of this height, and the (2, 3) transform from its pixels to the panel's."""
    factor = min(height / photo.shape[0], _LONGEST / photo.shape[1])
    size = max(1, round(photo.shape[1] * factor)), max(1, round(photo.shape[0] * factor))
    # Pixels that are shown very large should look like pixels.
    enlarging = cv2.INTER_NEAREST if factor > 8 else cv2.INTER_CUBIC
    interpolation = cv2.INTER_AREA if factor < 1 else enlarging
    panel = np.full((height, max(size[0], _LEAST_WIDTH), 3), _PAPER, np.uint8)
    x, y = (panel.shape[1] - size[0]) // 2, (height - size[1]) // 2
    panel[y : y + size[1], x : x + size[0]] = cv2.resize(photo, size, interpolation=interpolation)
    stretch = np.array([size[0] / photo.shape[1], size[1] / photo.shape[0]])
    # Pixel centres lie at integers on both sides.
    offset = (stretch - 1) / 2 + np.array([x, y])
    return panel, np.column_stack([np.diag(stretch), offset])


def _apply(transform: NDArray[np.float64], points: NDArray[np.floating]) -> NDArray[np.float64]:  # (2, 3), (N, 2)
    return points.astype(np.float64) @ transform[:, :2].T + transform[:, 2]


def _corners(photo: RgbImage) -> NDArray[np.float64]:
    right, bottom = photo.shape[1] - 0.5, photo.shape[0] - 0.5
    return np.array([[-0.5, -0.5], [right, -0.5], [right, bottom], [-0.5, bottom]])


def _shares(residuals: Float32Array | None, count: int) -> tuple[NDArray[np.float64], float | None]:
    """Each residual as a share of the largest one, 0..1, and that one; (zeros, None) without residuals."""
    if residuals is None or not count:
        return np.zeros(count), None
    worst = float(np.max(residuals))
    return np.clip(residuals.astype(np.float64) / max(worst, 1e-6), 0, 1), worst


def _colours(shares: NDArray[np.float64]) -> NDArray[np.uint8]:  # (N,) -> (N, 3)
    """Viridis from yellow to blue; its darkest quarter is left out, being lost on a dark photo."""
    levels = np.round(255 - 190 * shares).astype(np.uint8).reshape(-1, 1)
    if not len(levels):
        return np.zeros((0, 3), np.uint8)
    return cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS)[:, 0, ::-1].astype(np.uint8)


def _fixed(point: NDArray[np.float64]) -> tuple[int, int]:
    x, y = np.round(point * (1 << _SUBPIXEL_BITS)).astype(int)
    return int(x), int(y)


def _draw_outline(panel: RgbImage, corners: NDArray[np.float64]) -> None:
    if np.abs(corners).max() > _FARTHEST:
        return
    points = [_fixed(corner) for corner in corners]
    for colour, thickness in ((_CASING, 4), (_PINK, 2)):
        for start, end in zip(points, points[1:] + points[:1], strict=True):
            cv2.line(panel, start, end, colour, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)


def _draw_matches(
    picture: RgbImage,
    starts: NDArray[np.float64],
    ends: NDArray[np.float64],
    colours: NDArray[np.uint8],
    shares: NDArray[np.float64],
) -> None:
    """Lines and keypoints, drawn in place; the more they are, the fainter the lines."""
    if not len(starts):
        return
    worst_first = np.argsort(-shares, kind="stable")
    lines = picture.copy()
    for row in worst_first:
        colour = tuple(colours[row].tolist())
        cv2.line(lines, _fixed(starts[row]), _fixed(ends[row]), colour, 1, cv2.LINE_AA, _SUBPIXEL_BITS)
    opacity = float(np.clip(6 / np.sqrt(len(starts)), 0.3, 0.85))
    cv2.addWeighted(lines, opacity, picture, 1 - opacity, 0, dst=picture)
    radius = 3 if len(starts) <= 150 else 2
    for row in worst_first:
        for point in (starts[row], ends[row]):
            for colour, grown in ((_CASING, radius + 1), (tuple(colours[row].tolist()), radius)):
                shifted = grown << _SUBPIXEL_BITS
                cv2.circle(picture, _fixed(point), shifted, colour, cv2.FILLED, cv2.LINE_AA, _SUBPIXEL_BITS)


def _caption_strip(caption: str, width: int, worst: float | None) -> RgbImage:
    """The caption and, where there are residuals, their legend, (height, width, 3)."""
    font = cv2.FontFace("sans")

    def text_width(text: str) -> int:
        box = cv2.getTextSize((width, _LINE_HEIGHT), text, (0, 0), font, _FONT_SIZE, _FONT_WEIGHT)
        return int(box[2])  # x, y, width, height

    lines = _wrap(_drawable(caption, font), width - 2 * _MARGIN, text_width)
    rows = len(lines) + (worst is not None)
    strip = np.full((_MARGIN + _LINE_HEIGHT * rows, width, 3), _WHITE, np.uint8)
    base = _FONT_SIZE

    def write(text: str, x: int, row: int) -> int:
        cv2.putText(strip, text, (x, base + row * _LINE_HEIGHT), _INK, font, _FONT_SIZE, _FONT_WEIGHT)
        return x + text_width(text)

    for row, line in enumerate(lines):
        write(line, _MARGIN, row)
    if worst is not None:
        x = write("residual  0", _MARGIN, len(lines)) + 10
        bottom = base + len(lines) * _LINE_HEIGHT
        strip[bottom - _BAR[1] : bottom, x : x + _BAR[0]] = _colours(np.linspace(0, 1, _BAR[0]))
        write(f"{worst:.1f} px", x + _BAR[0] + 10, len(lines))
    return strip


def _drawable(text: str, font: cv2.FontFace) -> str:
    """The text, truncated to a caption's length, with a box for each character that the font lacks."""

    def looks(character: str) -> bytes:
        patch = np.zeros((40, 60, 3), np.uint8)
        cv2.putText(patch, character, (10, 30), _WHITE, font, _FONT_SIZE)
        return patch.tobytes()

    # The font draws a question mark in place of what it lacks.
    unknown = looks("?")

    def drawn(character: str) -> str:
        if character in "?\n":
            return character
        if character.isspace():
            return " "
        invalid = "\ud800" <= character <= "\udfff"
        return "□" if invalid or looks(character) == unknown else character

    composed = unicodedata.normalize("NFC", text[:_MOST_CAPTION])
    return "".join(drawn(character) for character in composed)


def _wrap(text: str, width: int, text_width: Callable[[str], int]) -> list[str]:
    """Lines no wider than `width`: broken between words, and inside of a word that is wider by itself."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in re.findall(r"\S+\s*", paragraph):
            if line and text_width(line + word.rstrip()) > width:
                lines.append(line.rstrip())
                line = ""
            rest = word
            while text_width(rest.rstrip()) > width:
                beginnings = [rest[:count] for count in range(1, len(rest) + 1)]
                cut = max(1, bisect_right(beginnings, width, key=text_width))
                lines.append(rest[:cut])
                rest = rest[cut:]
            line += rest
        lines.append(line.rstrip())
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], lines[_MOST_LINES - 1][:-1] + "…"]
    return lines
