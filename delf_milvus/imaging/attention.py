"""Attention pictures: where on a photo the network looks, and which keypoints it keeps."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from delf_milvus.features import Features, Float32Array
from delf_milvus.imaging.decode import RgbImage
from delf_milvus.imaging.lettering import Lettering

_LONGEST = 720  # pixels of a panel
_LEAST = 240  # pixels: of a panel, so that there is room for the words
_GAP = 12
_OPACITY = 0.7  # of the map, over the greyed photo
_FADE = 0.08  # of the colours' range
_CIRCLES = 0.8  # opacity of the keypoints
_LEAST_ATTENTION = 1e-12  # logarithms need more than zero
_MOST_RANGE = 1e4  # between the ends of the colours
_BAR = (150, 12)  # width and height of the colour bar
_MOST_LINES = 4
_SUBPIXEL_BITS = 4
_WHITE = (255, 255, 255)
_PAPER = (240, 240, 240)
_INK = (32, 32, 32)
_CASING = (0, 0, 0)


def attention_picture(
    photo: RgbImage,
    features: Features,
    attention: Float32Array,  # (h, w)
    *,
    cell: int,
    caption: str,
) -> RgbImage:
    """The photo with its keypoints beside the greyed photo under its attention map.

    photo: (H, W, 3) uint8, of any size; both panels are at most 720 pixels long. features: the keypoints that are kept;
    each is a circle as wide as the cell of the network's grid that it stands for, in the colour of its attention, the
    best on top. attention: (h, w) float32, the map over the whole photo at any resolution. cell: pixels of that grid,
    at the scale 1. caption: written below, wrapped.

    Returns (height, width, 3) uint8 RGB. Colours (cividis, which every kind of colour vision reads alike) go by the
    logarithm of the attention, from the weakest keypoint that is kept to the highest of the map, with a legend; of the
    map what is weaker stays grey.
    """
    height, width = photo.shape[:2]
    factor = _LONGEST / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    small = cv2.resize(photo, size, interpolation=interpolation).astype(np.uint8, copy=False)
    ends = _ends(features, attention)
    panels = [_with_keypoints(small, features, cell, ends), _with_map(small, attention, ends)]
    panels = [_padded(panel) for panel in panels]
    beside = size[0] <= size[1] * 2
    gap = np.full((panels[0].shape[0], _GAP, 3) if beside else (_GAP, panels[0].shape[1], 3), _WHITE, np.uint8)
    body = np.concatenate([panels[0], gap, panels[1]], axis=1 if beside else 0)
    framed = np.pad(body, ((_GAP, 0), (_GAP, _GAP), (0, 0)), constant_values=255)
    return np.vstack([framed, _legend(framed.shape[1], ends, caption)])


def _ends(features: Features, attention: Float32Array) -> tuple[float, float]:
    """The attention at both ends of the colours."""
    high = max(float(attention.max()), *features.attention[:1].tolist(), _LEAST_ATTENTION)
    low = float(features.attention[-1]) if len(features) else high / 100
    return min(max(low, high / _MOST_RANGE), high / 2), high


def _shares(values: NDArray[np.floating], ends: tuple[float, float]) -> NDArray[np.float64]:
    """Where values lie between the ends, 0 to 1, by their logarithms; negative below."""
    low, high = ends
    logarithms = np.log(np.maximum(values.astype(np.float64), low / _MOST_RANGE))
    shares: NDArray[np.float64] = (logarithms - np.log(low)) / (np.log(high) - np.log(low))
    return shares


def _colours(shares: NDArray[np.float64]) -> RgbImage:  # (h, w) -> (h, w, 3)
    """Cividis without its darkest fifth, which is lost on a dark photo."""
    levels = np.round(255 * (0.2 + 0.8 * np.clip(shares, 0, 1))).astype(np.uint8)
    coloured: RgbImage = cv2.applyColorMap(levels, cv2.COLORMAP_CIVIDIS)[..., ::-1].astype(np.uint8)
    return coloured


def _with_keypoints(small: RgbImage, features: Features, cell: int, ends: tuple[float, float]) -> RgbImage:
    if not len(features):
        return small
    picture = small.copy()
    stretch = np.array([small.shape[1] / features.width, small.shape[0] / features.height])
    places = features.locations.astype(np.float64) * stretch + (stretch - 1) / 2
    radii = features.scales.astype(np.float64) * cell / 2 * stretch.mean()
    colours = _colours(_shares(features.attention[:, None], ends))[:, 0].tolist()
    for row, colour in reversed(list(enumerate(colours))):
        x, y = np.round(places[row] * (1 << _SUBPIXEL_BITS)).astype(int).tolist()
        radius = round(float(np.clip(radii[row], 2, 4 * _LONGEST)) * (1 << _SUBPIXEL_BITS))
        for ink, thickness in ((_CASING, 3), (tuple(colour), 2)):
            cv2.circle(picture, (x, y), radius, ink, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
    return cv2.addWeighted(picture, _CIRCLES, small, 1 - _CIRCLES, 0).astype(np.uint8)


def _with_map(small: RgbImage, attention: Float32Array, ends: tuple[float, float]) -> RgbImage:
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float64)
    heat = cv2.resize(attention, (small.shape[1], small.shape[0]), interpolation=cv2.INTER_LINEAR)
    shares = _shares(heat.astype(np.float64), ends)
    # Fades in, so that the bar between kept and not kept is no hard edge.
    opacity = (_OPACITY * np.clip((shares + _FADE) / (2 * _FADE), 0, 1))[..., None]
    return np.round(opacity * _colours(shares) + (1 - opacity) * grey).astype(np.uint8)


def _padded(panel: RgbImage) -> RgbImage:
    """The panel in the middle of one that is at least 240 pixels wide and high."""
    more = [max(0, _LEAST - side) for side in panel.shape[:2]]
    sides = [(one // 2, one - one // 2) for one in more]
    # np.pad takes one value for all channels, and paper is grey.
    return np.pad(panel, (*sides, (0, 0)), constant_values=_PAPER[0])


def _legend(width: int, ends: tuple[float, float], caption: str) -> RgbImage:
    letters = Lettering()
    lines = letters.wrapped(caption, width - 2 * _GAP, _MOST_LINES)
    strip = np.full((_GAP + letters.line_height * (len(lines) + 1), width, 3), _WHITE, np.uint8)
    for row, line in enumerate(lines):
        letters.write(strip, line, _GAP, letters.size + row * letters.line_height, _INK)
    bottom = letters.size + len(lines) * letters.line_height
    x = letters.write(strip, f"attention  {ends[0]:.2g}", _GAP, bottom, _INK) + 10
    end = min(x + _BAR[0], width)
    strip[bottom - _BAR[1] : bottom, x:end] = _colours(np.linspace(0, 1, _BAR[0])[None])[:, : end - x]
    letters.write(strip, f"{ends[1]:.2g}, logarithmic", end + 10, bottom, _INK)
    return strip
