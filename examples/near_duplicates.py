"""Copies among photos: crops, re-encodes, overlays; and how strict to be.

    python examples/near_duplicates.py                  # drawn photos
    python examples/near_duplicates.py --photos FOLDER  # prints the groups of copies among yours

Every photo searches for the others. Two things make an answer a copy: `false_alarm`, the share of queries without a
match whose best answer would be as strong, is at most the bar; and the transform is a scale and a shift, as crops and
re-encodes leave it. Another view of the same thing passes the first, and fails the second.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before torch loads: threads that wait by spinning starve others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from scenes import Image, save, scene

from delf_milvus import DelfIndex, Hit, Settings

BAR = 0.001
"""Stricter than a search's 0.01: every photo is a query here, and each may be mistaken once."""

STRAIGHT = 0.08
"""Most difference of a copy's transform from a scale and a shift, as a share of the scale."""

COPIES: dict[str, Callable[[Image], Image]] = {
    "crop": lambda photo: photo[30:200, 40:290],
    "half": lambda photo: cv2.resize(photo, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "grey": lambda photo: cv2.cvtColor(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB),
    "stamped": lambda photo: cv2.putText(
        photo.copy(), "PREVIEW", (60, 140), cv2.FONT_HERSHEY_DUPLEX, 1.6, (255, 255, 255), 4, cv2.LINE_AA
    ),
}


def from_the_side(photo: Image) -> Image:
    """The same thing, seen at a slant."""
    height, width = photo.shape[:2]
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    seen = np.array([[0, 0], [0.6 * width, 0.06 * height], [0.6 * width, 0.94 * height], [0, height]], np.float32)
    return cv2.warpPerspective(photo, cv2.getPerspectiveTransform(corners, seen), (int(0.6 * width), height))


def draw(folder: Path, originals: int) -> list[set[str]]:
    """Write originals, copies of the first, and another view of it; returns the groups that should be found."""
    save(folder / "0-other-view.jpg", from_the_side(scene(0)))
    groups = []
    for number in range(originals):
        photo = scene(number)
        names = [save(folder / f"{number}.jpg", photo).name]
        if number == 0:
            names += [save(folder / f"{number}-{kind}.jpg", copy(photo), 60).name for kind, copy in COPIES.items()]
            names.append(save(folder / f"{number}-recoded.jpg", photo, 15).name)
            groups.append(set(names))
    return groups


def is_copy(hit: Hit) -> bool:
    """Whether a verified answer's transform is a scale and a shift."""
    if hit.transform is None:
        return False
    turn = np.array(hit.transform)[:, :2]
    scale = np.trace(turn) / 2
    return bool(np.abs(turn / scale - np.eye(2)).max() <= STRAIGHT)


def copies(index: DelfIndex, folder: Path) -> list[set[str]]:
    """Groups of two and more images that are linked by answers which are copies."""
    group = {record.image_id: {record.image_id} for record in index.list()}
    for name in sorted(group):
        for hit in index.search(folder / name).hits:
            if is_copy(hit) and group[hit.image_id] is not group[name]:
                together = group[name] | group[hit.image_id]
                group.update(dict.fromkeys(together, together))
    return [names for name, names in sorted(group.items()) if len(names) > 1 and name == min(names)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Find copies among photos.")
    parser.add_argument("--photos", type=Path, help="folder of your photos")
    parser.add_argument("--bar", type=float, default=BAR, help=f"highest false alarm of a copy; default: {BAR}")
    given = parser.parse_args(arguments)
    settings = Settings(verify={"max_false_alarm": given.bar}, search={"top": 50})
    with tempfile.TemporaryDirectory() as work:
        folder = given.photos or Path(work) / "photos"
        expected = None if given.photos else draw(folder, originals=4)
        with DelfIndex.open(Path(work) / "copies.db", settings=settings) as index:
            report = index.ingest([folder])
            found = copies(index, folder)
    for names in found:
        print(f"copies: {', '.join(sorted(names))}")
    print(f"{report.added} photos, {len(found)} groups of copies")
    return 0 if expected is None or found == expected else 1


if __name__ == "__main__":
    sys.exit(main())
