"""Match pictures: two photos side by side, the inliers between them, and what the transform says."""

from __future__ import annotations

import uuid
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from delf_milvus.errors import InputError, UsageError, one_line
from delf_milvus.features import Box, Float32Array
from delf_milvus.imaging.decode import RgbImage
from delf_milvus.imaging.lettering import Lettering

_LONGEST = 720  # pixels: two photos beside each other still fit a usual screen
_LEAST_HEIGHT = 360  # a panorama shall not make its neighbour a stamp
_LEAST_WIDTH = 240  # nor a tower leave no room for the caption
_GAP = 12  # around the panels
_MARGIN = 12  # around the caption
_OVERHANG = 4  # an outline along the border of the photo shall not lose its outer half
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
    box: Box | None = None,
) -> RgbImage:
    """The two photos side by side, with a line from each query keypoint to the image keypoint it matches.

    query, image: (H, W, 3) uint8, of any size. Both are shown at one height, at most 720 pixels; a panorama or a tower
        is centred in its panel instead.
    query_points, image_points: (N, 2) float32, x then y, pixels of the photo each lies in. N may be 0.
    residuals: (N,) float32, distance in pixels between the transformed query keypoint and the image keypoint; colours
        the lines from yellow (least) to blue (most), with a legend. None draws all of them yellow.
    transform: (2, 3) float64, from query to image pixels; the query's outline is drawn on the image.
    caption: written below, wrapped; line breaks are kept, what the font lacks is shown as a box.
    box: x0, y0, x1, y1, the part of the query that was searched for: outlined there, and its outline on the image is
        drawn instead of the whole query's.

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
    # Views, so that an outline ends where the panel does.
    around = _GAP - _OVERHANG
    if box is not None:
        panel = picture[around:-around, around : right_x - around]
        draw_outline(panel, _apply(left_view, corners(query, box)) + _OVERHANG)
    if transform is not None and np.isfinite(transform).all():
        panel = picture[around:-around, right_x - _OVERHANG : -around]
        draw_outline(panel, _apply(right_view, _apply(transform, corners(query, box))) + _OVERHANG)
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
    write_file(path, encoded.getvalue())


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; missing folders are made. Raises InputError."""
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{one_line(path)} cannot be written: {error.strerror or 'input/output error'}.") from error


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


def corners(photo: RgbImage, box: Box | None = None) -> NDArray[np.float64]:
    """The corners, (4, 2), of a photo or of a box in it (x0, y0, x1, y1): around its pixels, whose centres lie at
    integers."""
    x0, y0, x1, y1 = box or (0, 0, photo.shape[1], photo.shape[0])
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64) - 0.5


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


def draw_outline(panel: RgbImage, corners: NDArray[np.float64]) -> None:
    """Draw a closed line through points (N, 2) of the panel, in place; none for a degenerate transform's."""
    if not np.abs(corners).max() <= _FARTHEST:
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
    letters = Lettering()
    lines = letters.wrapped(caption, width - 2 * _MARGIN, _MOST_LINES)
    rows = len(lines) + (worst is not None)
    strip = np.full((_MARGIN + letters.line_height * rows, width, 3), _WHITE, np.uint8)
    for row, line in enumerate(lines):
        letters.write(strip, line, _MARGIN, letters.size + row * letters.line_height, _INK)
    if worst is not None:
        bottom = letters.size + len(lines) * letters.line_height
        x = letters.write(strip, "residual  0", _MARGIN, bottom, _INK) + 10
        strip[bottom - _BAR[1] : bottom, x : x + _BAR[0]] = _colours(np.linspace(0, 1, _BAR[0]))
        letters.write(strip, f"{worst:.1f} px", x + _BAR[0] + 10, bottom, _INK)
    return strip
