"""A scatter chart: points of several series, a logarithmic and a linear axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from delf_milvus.imaging.decode import RgbImage

_WIDTH, _HEIGHT = 960, 600  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 190, 24, 96  # of the frame from the borders
_FONT_SIZE = 15
_FONT_WEIGHT = 420
_RADIUS = 6
_INK = (32, 32, 32)
_GRID = (224, 224, 224)

# Okabe and Ito's colours, which every kind of colour vision tells apart.
_COLOURS = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (120, 120, 120),
    (0, 0, 0),
    (240, 228, 66),
)


@dataclass(frozen=True)
class Mark:
    """One point: x above 0, y, the series that colours it, a label, and whether it is filled."""

    x: float
    y: float
    series: str
    label: str = ""
    filled: bool = True


def scatter_picture(marks: Sequence[Mark], x_label: str, y_label: str, caption: str) -> RgbImage:
    """The marks over a logarithmic x and a linear y axis, with a legend; (600, 960, 3) uint8 RGB.

    Raises ValueError without marks, or for an x that is not above 0.
    """
    if not marks or min(mark.x for mark in marks) <= 0:
        raise ValueError("a chart needs marks with x above 0")
    picture = np.full((_HEIGHT, _WIDTH, 3), 255, np.uint8)
    font = cv2.FontFace("sans")

    def write(text: str, x: float, y: float, colour: tuple[int, int, int] = _INK, size: int = _FONT_SIZE) -> None:
        cv2.putText(picture, text, (round(x), round(y)), colour, font, size, _FONT_WEIGHT)

    low_x, high_x = math.log10(min(m.x for m in marks)), math.log10(max(m.x for m in marks))
    low_x, high_x = low_x - 0.1, high_x + 0.1
    low_y, high_y = min(m.y for m in marks), max(m.y for m in marks)
    margin = max(0.05 * (high_y - low_y), 0.005)
    low_y, high_y = low_y - margin, high_y + margin
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(x: float, y: float) -> tuple[int, int]:
        return (
            round(_LEFT + (math.log10(x) - low_x) / (high_x - low_x) * (right - _LEFT)),
            round(bottom - (y - low_y) / (high_y - low_y) * (bottom - _TOP)),
        )

    for tick in _log_ticks(low_x, high_x):
        x, _ = place(tick, low_y)
        cv2.line(picture, (x, _TOP), (x, bottom), _GRID, 1)
        write(f"{tick:g}", x - 12, bottom + 20)
    for tick in _ticks(low_y, high_y):
        _, y = place(10**low_x, tick)
        cv2.line(picture, (_LEFT, y), (right, y), _GRID, 1)
        write(f"{tick:.3g}", 20, y + 5)
    cv2.rectangle(picture, (_LEFT, _TOP), (right, bottom), _INK, 1)
    write(x_label, (_LEFT + right) / 2 - 70, bottom + 42)
    write(y_label, 12, 16)
    write(caption, 12, _HEIGHT - 16)
    names = list(dict.fromkeys(mark.series for mark in marks))
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}
    for mark in marks:
        at = place(mark.x, mark.y)
        colour = colours[mark.series]
        cv2.circle(picture, at, _RADIUS, colour, cv2.FILLED if mark.filled else 2, cv2.LINE_AA)
        write(mark.label, at[0] + 9, at[1] + 4, colour, 11)
    for number, name in enumerate(names):
        y = _TOP + 14 + 24 * number
        cv2.circle(picture, (right + 20, y), _RADIUS, colours[name], cv2.FILLED, cv2.LINE_AA)
        write(name, right + 34, y + 5)
    return picture


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two exponents."""
    ticks = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in (1, 2, 5)]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _ticks(low: float, high: float) -> list[float]:
    """About five round values between two."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(number * step, 10) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
