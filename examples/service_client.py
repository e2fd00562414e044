"""Many photos to a running service at once, and searches for parts of them; the service decides how many it computes.

    delf-milvus serve &
    python examples/service_client.py http://127.0.0.1:8080 photos/

A key, where the service asks for one, is read from the variable DELF_MILVUS_KEY.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import PIL.Image

from delf_milvus import AsyncDelfClient

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


async def main(url: str, key: str, folder: Path) -> int:
    """Add the photos of a folder, then search for the middle of each; returns how many were not found first."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    async with AsyncDelfClient(url, key) as client:
        ids = [path.relative_to(folder).as_posix() for path in paths]
        features = await asyncio.gather(*(client.add(path, one) for path, one in zip(paths, ids, strict=True)))
        print(f"{len(paths)} photos with {sum(features)} features added")
        wrong = 0
        results = await asyncio.gather(*(client.search(middle(path), 1, include_unverified=True) for path in paths))
        for one, result in zip(ids, results, strict=True):
            best = result.hits[0] if result.hits else None
            right = best is not None and best.image_id == one
            wrong += not right
            proof = f"{best.inliers} inliers, confidence {best.confidence:.4f}" if best else "no candidate"
            print(f"{'found' if right else 'NOT FOUND':10} {one}: {proof}")
    return wrong


def middle(path: Path) -> PIL.Image.Image:
    """The middle of a photo, three quarters as wide and as high."""
    with PIL.Image.open(path) as photo:
        width, height = photo.size
        return photo.convert("RGB").crop((width // 8, height // 8, width * 7 // 8, height * 7 // 8))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("Usage: python examples/service_client.py URL FOLDER")
    sys.exit(min(1, asyncio.run(main(sys.argv[1], os.environ.get("DELF_MILVUS_KEY", ""), Path(sys.argv[2])))))
