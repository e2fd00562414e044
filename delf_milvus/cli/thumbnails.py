"""Query and answers as small pictures in the terminal, in one row above their names.

Kitty's graphics protocol and sixels show them as they are, on terminals that answer that they know one of these;
coloured half blocks show them roughly anywhere. textual-image asks the terminal and speaks to it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delf_milvus.cli.output import data_line, shortened
from delf_milvus.errors import InputError, UsageError, one_line

if TYPE_CHECKING:
    from delf_milvus.imaging.decode import RgbImage
    from delf_milvus.retrieval.answers import SearchResult
    from delf_milvus.settings import DecodeSettings

_CELLS = 22  # columns of one picture
_GAP = 2  # columns
_PIXELS = 12  # of a column, which is more than most terminals have
_LEAST, _MOST = 1, 8  # pictures in the row
# They know no pictures, and would print the question.
_MUTE = {"TERM": ("", "dumb", "linux"), "TERM_PROGRAM": ("Apple_Terminal",)}


class Thumbnails:
    """Shows results as pictures on stdout, or does nothing.

    wanted: None asks the terminal. Raises UsageError where they are wanted and cannot be shown.
    """

    def __init__(self, wanted: bool | None) -> None:
        self._renderable: Any = None
        if wanted is False or (wanted is None and not _might_know_pictures()):
            return
        if sys.stdout.isatty() and not sys.stdin.isatty():
            raise UsageError("--thumbnails asks the terminal what it can show: leave stdin to it.")
        try:
            from textual_image import renderable
        except ModuleNotFoundError as error:
            if wanted:
                raise UsageError("Thumbnails need textual-image: pip install 'delf-milvus[terminal]'.") from error
            return
        knows = renderable.Image in (renderable.TGPImage, renderable.SixelImage)
        if knows:
            self._renderable = renderable.Image
        elif wanted:
            self._renderable = renderable.HalfcellImage

    def show(self, result: SearchResult, photo: Path | None, limits: DecodeSettings) -> None:
        """Print the query, where it has a photo, and its first answers; those that cannot be read are left out."""
        if self._renderable is None:
            return
        from PIL import Image
        from rich.console import Console

        console = Console(file=sys.stdout, force_terminal=True, color_system="truecolor", highlight=False)
        row = _row(result, photo, limits, max(_LEAST, min(_MOST, console.width // (_CELLS + _GAP))))
        if not row:
            return
        width = len(row) * (_CELLS + _GAP)
        console.print(self._renderable(Image.fromarray(_strip([tile for tile, *_ in row])), width=width, height="auto"))
        for line in range(2):
            cells = (shortened(one_line(texts[line]), _CELLS) for _, *texts in row)
            data_line("".join(_padded(cell, _CELLS + _GAP) for cell in cells).rstrip())


def _might_know_pictures() -> bool:
    """Whether somebody watches a terminal that can be asked."""
    mute = any(os.environ.get(name, "") in values for name, values in _MUTE.items())
    return sys.stdout.isatty() and sys.stdin.isatty() and not mute


def _row(
    result: SearchResult, photo: Path | None, limits: DecodeSettings, most: int
) -> list[tuple[RgbImage, str, str]]:
    """Photos with two lines of text each."""
    from delf_milvus.imaging.decode import decode
    from delf_milvus.reporting.pictures import shown_hits

    row: list[tuple[RgbImage, str, str]] = []
    if photo is not None:
        with contextlib.suppress(InputError):
            row.append((decode(photo, limits), "query", photo.name))
    for one in shown_hits(result, limits):
        if len(row) >= most:
            break
        if one.photo is not None:
            row.append((one.photo, f"{one.hit.rank} {one.verdict}", one.hit.image_id))
    return row


def _strip(photos: list[RgbImage]) -> RgbImage:
    """The photos beside each other, each in a square with a gap to its right."""
    import numpy as np

    from delf_milvus.imaging.sheet import fitting

    side, gap = _CELLS * _PIXELS, _GAP * _PIXELS
    strip = np.zeros((side, len(photos) * (side + gap), 3), np.uint8)
    for number, photo in enumerate(photos):
        small, _ = fitting(photo, side)
        y = (side - small.shape[0]) // 2
        x = number * (side + gap)
        strip[y : y + small.shape[0], x : x + small.shape[1]] = small
    return strip


def _padded(text: str, width: int) -> str:
    from rich.cells import set_cell_size

    return set_cell_size(text, width)
