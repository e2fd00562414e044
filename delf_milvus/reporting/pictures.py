"""The answers to a query as pictures: one match picture a hit, and a contact sheet of all.

The photos of the answers are read from where they were ingested from. One that is there no more, or is no photo any
more, stops nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from delf_milvus.errors import InputError
from delf_milvus.features import Box
from delf_milvus.imaging.decode import RgbImage, decode
from delf_milvus.imaging.draw import corners, match_picture, save_picture
from delf_milvus.imaging.sheet import Mark, Tile, contact_sheet, fitting
from delf_milvus.retrieval.answers import Hit, SearchResult
from delf_milvus.settings import DecodeSettings

log = logging.getLogger(__name__)

SHEET = "contact_sheet.png"

_MOST_TILES = 60
_TILE_SIDE = 480  # pixels: larger than any tile, and small enough to keep them all


@dataclass(frozen=True, eq=False)
class Shown:
    """A hit and its photo, (H, W, 3) uint8; None where it cannot be read, and `missing` says why."""

    hit: Hit
    photo: RgbImage | None
    missing: str = ""

    @property
    def verdict(self) -> str:
        """ "verified", "not verified" or "not compared"."""
        if not self.hit.compared:
            return "not compared"
        return "verified" if self.hit.verified else "not verified"


def shown(hit: Hit, limits: DecodeSettings) -> Shown:
    """A hit with its photo, where that can still be read."""
    if not hit.uri:
        return Shown(hit, None, "It was stored without the place of its photo.")
    try:
        return Shown(hit, decode(Path(hit.uri), limits))
    except InputError as error:
        return Shown(hit, None, str(error))


def shown_hits(result: SearchResult, limits: DecodeSettings) -> Iterator[Shown]:
    """The hits with their photos, one after the other: those of a long answer do not fit the memory together."""
    return (shown(hit, limits) for hit in result.hits)


def query_outline(query: RgbImage, hit: Hit, box: Box | None) -> NDArray[np.float64] | None:
    """Where on the hit's photo the query lies, or the part of it that was searched for: (4, 2) pixels; None without a
    transform."""
    if hit.transform is None:
        return None
    transform = np.array(hit.transform)
    outline: NDArray[np.float64] = corners(query, box) @ transform[:, :2].T + transform[:, 2]
    return outline


def hit_picture(query: RgbImage, one: Shown, box: Box | None = None) -> RgbImage:
    """The match picture of a hit whose photo is there: see `match_picture`."""
    assert one.photo is not None, "asked for hits with a photo only"
    hit = one.hit
    caption = (
        f"{hit.image_id}: {hit.inliers} inliers of {hit.putatives}, confidence {hit.confidence:.4f}, {one.verdict}"
    )
    return match_picture(
        query,
        one.photo,
        hit.correspondence.query_points,
        hit.correspondence.image_points,
        residuals=hit.correspondence.residuals,
        transform=None if hit.transform is None else np.array(hit.transform),
        caption=caption,
        box=box,
    )


def save_hits(
    query: RgbImage,
    result: SearchResult,
    folder: Path,
    limits: DecodeSettings,
    *,
    box: Box | None = None,
    sheet: bool = False,
) -> list[Path]:
    """Write the match picture of each hit that was compared, and with `sheet` a contact sheet of the query and the
    first 60 hits; returns their paths.

    query: (H, W, 3) uint8. box: the part of it that was searched for, or None. A hit whose photo cannot be read gets no
    picture, and a place on the sheet that says so. Raises InputError for a folder that cannot be written.
    """
    paths = []
    tiles = [_shrunk(query, "query", ["query", result.query], None if box is None else corners(query, box))]
    for number, one in enumerate(shown_hits(result, limits)):
        if sheet and number < _MOST_TILES:
            tiles.append(_tile(query, one, box))
        if one.photo is None:
            log.warning("no picture of hit %d: %s", one.hit.rank, one.missing)
        elif one.hit.compared:
            paths.append(folder / f"{one.hit.rank:03d}_{file_name(one.hit.image_id)}.png")
            save_picture(paths[-1], hit_picture(query, one, box))
    if sheet:
        paths.append(folder / SHEET)
        save_picture(paths[-1], contact_sheet(tiles))
    return paths


def file_name(name: str) -> str:
    """A name without its suffix, as part of a file's name: letters, digits and -_. alone, at most 150 bytes."""
    stem = name.rpartition(".")[0] or name
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in stem)
    return safe.encode()[-150:].decode(errors="ignore")


def _tile(query: RgbImage, one: Shown, box: Box | None) -> Tile:
    hit = one.hit
    lines = [f"{hit.rank}. {hit.image_id}", f"{one.verdict}, {hit.confidence:.4f}" if hit.compared else one.verdict]
    if hit.compared:
        lines.append(f"{hit.inliers} inliers of {hit.putatives}")
    mark: Mark = "verified" if hit.verified else "unverified"
    if one.photo is None:
        return Tile(None, mark, lines)
    return _shrunk(one.photo, mark, lines, query_outline(query, hit, box) if hit.verified else None)


def _shrunk(photo: RgbImage, mark: Mark, lines: Sequence[str], outline: NDArray[np.float64] | None) -> Tile:
    small, points = fitting(photo, _TILE_SIDE, outline)
    return Tile(small, mark, lines, points)
