"""Pages: HTML in one file, with the pictures in it, that opens from disk and asks nobody for anything.

Every value of a template is escaped, whatever a stranger called a photo; no page has a script.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from delf_milvus.errors import one_line
from delf_milvus.imaging.decode import RgbImage
from delf_milvus.imaging.draw import write_file
from delf_milvus.imaging.sheet import outlined

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_BYTES = 40_000_000
"""Of all pictures of a page, as they are written: a browser opens that, and a mail hardly more."""

LEFT_OUT = f"This page holds {MOST_BYTES // 1_000_000} MB of pictures already: this one was left out."

_QUALITY = 80
_LARGEST = 16_383  # pixels of a side, of WebP


@dataclass(frozen=True)
class Embedded:
    """A picture in a page. src: a data URI. width, height: pixels. alt: what it shows, for those who do not see it."""

    src: str
    width: int
    height: int
    alt: str


class PictureSpace:
    """Encodes the pictures of one page, while there is space in it."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._left = most_bytes

    def embed(
        self, picture: RgbImage, alt: str, side: int, outline: NDArray[np.float64] | None = None
    ) -> Embedded | None:
        """The picture, (H, W, 3) uint8, shrunk to fit a square of `side` pixels; None where the page is full.

        outline: (N, 2) pixels of it, through which a line is drawn.
        """
        if self._left <= 0:
            return None
        small = outlined(picture, min(side, _LARGEST), outline)
        stream = BytesIO()
        Image.fromarray(small).save(stream, "WEBP", quality=_QUALITY)
        text = base64.b64encode(stream.getbuffer()).decode("ascii")
        if len(text) > self._left:
            self._left = 0
            return None
        self._left -= len(text)
        return Embedded(f"data:image/webp;base64,{text}", small.shape[1], small.shape[0], one_line(alt))


def page(template: str, values: Mapping[str, Any]) -> str:
    """A page of one of the templates beside this file. Texts in `values` are escaped, control characters shown."""
    return _environment().get_template(f"{template}.html").render(values)


def write_page(path: Path, template: str, values: Mapping[str, Any]) -> None:
    """Write a page whole or not at all. Raises InputError."""
    write_file(path, page(template, values).encode())


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("delf_milvus.imaging"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Names of strangers cannot hide in a page what they are.
        finalize=lambda value: one_line(value) if isinstance(value, str) and not hasattr(value, "__html__") else value,
    )
