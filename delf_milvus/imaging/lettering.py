"""Text on pictures: any script that the font has, wrapped, or shortened in the middle, to a width."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable

import cv2
import numpy as np

from delf_milvus.imaging.decode import RgbImage

_WHITE = (255, 255, 255)
_ELLIPSIS = "…"
_MOST_CHARACTERS = 1200

Colour = tuple[int, int, int]


class Lettering:
    """A font of one size, in pixels, and weight."""

    def __init__(self, size: int = 18, weight: int = 450) -> None:
        self.size = size
        self.line_height = round(size * 25 / 18)
        self._weight = weight
        self._font = cv2.FontFace("sans")
        # The font draws a question mark in place of what it lacks.
        self._unknown = self._looks("?")

    def width(self, text: str) -> int:
        """Pixels from the first to the last."""
        box = cv2.getTextSize((1 << 14, self.line_height), text, (0, 0), self._font, self.size, self._weight)
        return int(box[2])  # x, y, width, height

    def write(self, picture: RgbImage, text: str, x: int, baseline: int, colour: Colour) -> int:
        """Write from this pixel to the right, in place; returns where the text ends."""
        cv2.putText(picture, text, (x, baseline), colour, self._font, self.size, self._weight)
        return x + self.width(text)

    def drawable(self, text: str) -> str:
        """The text, cut to 1200 characters, with a box for each character that the font lacks."""
        composed = unicodedata.normalize("NFC", text[:_MOST_CHARACTERS])
        return "".join(self._drawn(character) for character in composed)

    def wrapped(self, text: str, width: int, most: int) -> list[str]:
        """Lines no wider than `width` and at most so many: broken between words, and inside of a word that is wider by
        itself; line breaks are kept."""
        lines = _wrap(self.drawable(text), width, self.width)
        if len(lines) > most:
            lines = [*lines[: most - 1], lines[most - 1][:-1] + _ELLIPSIS]
        return lines

    def shortened(self, text: str, width: int) -> str:
        """The text in one line, without its middle where it is wider than `width`: paths differ at their ends."""
        text = self.drawable(" ".join(text.split()))
        if self.width(text) <= width:
            return text

        def kept(count: int) -> str:
            return text[: (count + 1) // 2] + _ELLIPSIS + text[len(text) - count // 2 :]

        most = bisect_right(range(1, len(text)), width, key=lambda count: self.width(kept(count)))
        return kept(most)

    def _looks(self, character: str) -> bytes:
        patch = np.zeros((40, 60, 3), np.uint8)
        cv2.putText(patch, character, (10, 30), _WHITE, self._font, 18)
        return patch.tobytes()

    def _drawn(self, character: str) -> str:
        if character in "?\n":
            return character
        if character.isspace():
            return " "
        invalid = "\ud800" <= character <= "\udfff"
        return "□" if invalid or self._looks(character) == self._unknown else character


def _wrap(text: str, width: int, text_width: Callable[[str], int]) -> list[str]:
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
    return lines
