"""Charts: points over a logarithmic axis, lines of shares, and how often numbers occur. One colour a series."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from delf_milvus.imaging.decode import RgbImage

_WIDTH, _HEIGHT = 960, 600  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 190, 24, 96  # of the frame from the borders
_FONT_SIZE = 15
_FONT_WEIGHT = 420
_RADIUS = 6
_OPACITY = 0.45  # of bars, so that those behind are seen
_BIN_GROWTH = 1.19  # of a histogram's bins: four of them double the number
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


@dataclass(frozen=True)
class Line:
    """One line: its name in the legend, and points, x and y from 0 to 1, in the order they are joined."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def scatter_picture(marks: Sequence[Mark], x_label: str, y_label: str, caption: str) -> RgbImage:
    """The marks over a logarithmic x and a linear y axis, with a legend; (600, 960, 3) uint8 RGB.

    Raises ValueError without marks, or for an x that is not above 0.
    """
    if not marks or min(mark.x for mark in marks) <= 0:
        raise ValueError("a chart needs marks with x above 0")
    low_x, high_x = math.log10(min(m.x for m in marks)) - 0.1, math.log10(max(m.x for m in marks)) + 0.1
    low_y, high_y = min(m.y for m in marks), max(m.y for m in marks)
    margin = max(0.05 * (high_y - low_y), 0.005)
    chart = _Chart((low_x, high_x), (low_y - margin, high_y + margin), x_label, y_label, caption)
    chart.grid(
        [(math.log10(tick), f"{tick:g}") for tick in _log_ticks(low_x, high_x)],
        [(tick, f"{tick:.3g}") for tick in _ticks(low_y - margin, high_y + margin)],
    )
    colours = chart.legend([mark.series for mark in marks])
    for mark in marks:
        at = chart.place(math.log10(mark.x), mark.y)
        colour = colours[mark.series]
        cv2.circle(chart.picture, at, _RADIUS, colour, cv2.FILLED if mark.filled else 2, cv2.LINE_AA)
        chart.write(mark.label, at[0] + 9, at[1] + 4, colour, 11)
    return chart.picture


def line_picture(lines: Sequence[Line], x_label: str, y_label: str, caption: str, *, x_end: float = 1.0) -> RgbImage:
    """Lines over two axes from 0 to 1, with a legend; (600, 960, 3) uint8 RGB. A line of one point is a dot.

    x_end: what the x axis calls its 1. Raises ValueError without points.
    """
    if not any(len(line.x) for line in lines):
        raise ValueError("a chart needs points")
    chart = _Chart((-0.02, 1.02), (-0.02, 1.02), x_label, y_label, caption)
    shares = [tick / 5 for tick in range(6)]
    chart.grid([(share, f"{share * x_end:g}") for share in shares], [(share, f"{share:g}") for share in shares])
    colours = chart.legend([line.name for line in lines])
    for line in lines:
        points = [chart.place(x, y) for x, y in zip(line.x, line.y, strict=True)]
        cv2.polylines(chart.picture, [np.array(points, np.int32)], False, colours[line.name], 2, cv2.LINE_AA)
        for point in points if len(points) <= 20 else ():
            cv2.circle(chart.picture, point, 3, colours[line.name], cv2.FILLED, cv2.LINE_AA)
    return chart.picture


def histogram_picture(samples: Mapping[str, Sequence[int]], x_label: str, y_label: str, caption: str) -> RgbImage:
    """How often whole numbers from 0 occur in each sample, as a share of it; (600, 960, 3) uint8 RGB.

    The bins widen with the numbers, so that the few and the many are both told apart. Raises ValueError without
    numbers.
    """
    if not any(len(sample) for sample in samples.values()):
        raise ValueError("a histogram needs numbers")
    edges = _bins(max(max(sample) for sample in samples.values() if len(sample)))
    shares = {
        name: np.histogram(sample, edges)[0] / max(len(sample), 1) for name, sample in samples.items() if len(sample)
    }
    highest = max(float(share.max()) for share in shares.values())
    chart = _Chart((-0.3, len(edges) - 0.7), (0, 1.08 * highest), x_label, y_label, caption)
    places = [(float(np.interp(tick, edges, range(len(edges)))), f"{tick}") for tick in _round_numbers(edges[-1])]
    chart.grid(places, [(tick, f"{100 * tick:g} %") for tick in _ticks(0, 1.08 * highest)])
    colours = chart.legend([f"{name} ({len(samples[name])})" for name in shares])
    outlines = []
    for share, colour in zip(shares.values(), colours.values(), strict=True):
        first, last = np.flatnonzero(share)[[0, -1]].tolist()
        heights = np.repeat([0, *share[first : last + 1], 0], 2)[1:-1]
        steps = np.repeat(np.arange(first, last + 2, dtype=np.float64), 2).tolist()
        points = np.array([chart.place(x, y) for x, y in zip(steps, heights, strict=True)], np.int32)
        filled = chart.picture.copy()
        cv2.fillPoly(filled, [points], colour)
        cv2.addWeighted(filled, _OPACITY, chart.picture, 1 - _OPACITY, 0, dst=chart.picture)
        outlines.append((points, colour))
    for points, colour in outlines:
        cv2.polylines(chart.picture, [points], False, colour, 2, cv2.LINE_AA)
    return chart.picture


class _Chart:
    """A frame with two linear axes, and what is written around it."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], x_label: str, y_label: str, caption: str
    ) -> None:
        self.picture: RgbImage = np.full((_HEIGHT, _WIDTH, 3), 255, np.uint8)
        self._font = cv2.FontFace("sans")
        self._x, self._y = x, y
        self._right, self._bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        self.write(x_label, (_LEFT + self._right) / 2 - 70, self._bottom + 42)
        self.write(y_label, 12, 16)
        self.write(caption, 12, _HEIGHT - 16)

    def write(self, text: str, x: float, y: float, colour: tuple[int, int, int] = _INK, size: int = _FONT_SIZE) -> None:
        """Write from this pixel to the right."""
        cv2.putText(self.picture, text, (round(x), round(y)), colour, self._font, size, _FONT_WEIGHT)

    def place(self, x: float, y: float) -> tuple[int, int]:
        """The pixel of a point."""
        (low_x, high_x), (low_y, high_y) = self._x, self._y
        return (
            round(_LEFT + (x - low_x) / (high_x - low_x) * (self._right - _LEFT)),
            round(self._bottom - (y - low_y) / (high_y - low_y) * (self._bottom - _TOP)),
        )

    def grid(self, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]) -> None:
        """Lines across the frame with their texts, and the frame."""
        for tick, text in x_ticks:
            x, _ = self.place(tick, self._y[0])
            cv2.line(self.picture, (x, _TOP), (x, self._bottom), _GRID, 1)
            width = cv2.getTextSize((_WIDTH, _HEIGHT), text, (0, 0), self._font, _FONT_SIZE, _FONT_WEIGHT)[2]
            self.write(text, x - width / 2, self._bottom + 20)
        for tick, text in y_ticks:
            _, y = self.place(self._x[0], tick)
            cv2.line(self.picture, (_LEFT, y), (self._right, y), _GRID, 1)
            self.write(text, 20, y + 5)
        cv2.rectangle(self.picture, (_LEFT, _TOP), (self._right, self._bottom), _INK, 1)

    def legend(self, names: Sequence[str]) -> dict[str, tuple[int, int, int]]:
        """A dot and a name for each series; returns their colours."""
        colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(dict.fromkeys(names))}
        for number, (name, colour) in enumerate(colours.items()):
            y = _TOP + 14 + 24 * number
            cv2.circle(self.picture, (self._right + 20, y), _RADIUS, colour, cv2.FILLED, cv2.LINE_AA)
            self.write(name, self._right + 34, y + 5)
        return colours


def _bins(largest: int) -> list[int]:
    """Edges of bins from 0 to beyond the largest number; each as wide as a fifth of what it starts with, at least 1."""
    edges = [0, 1]
    while edges[-1] <= largest:
        edges.append(max(edges[-1] + 1, round(edges[-1] * _BIN_GROWTH)))
    return edges


def _round_numbers(largest: int) -> list[int]:
    """0, and 1, 2 and 5 times powers of ten up to a number."""
    return [0, *(int(tick) for tick in _log_ticks(0, math.log10(max(largest, 1))))]


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
