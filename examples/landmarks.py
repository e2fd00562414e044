"""What place is this? Names as metadata, votes of verified answers, and "unknown" where nothing is proved.

    python examples/landmarks.py                               # drawn places
    python examples/landmarks.py --photos FOLDER --ask PHOTO   # FOLDER has a folder for each place

The name of a place is stored with each of its photos (`ingest --ids-from` does the same from a CSV file). A query's
verified answers vote for their names, each with its inliers. No verified answer, no name.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

# Before torch loads: threads that wait by spinning starve others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parent))

from scenes import scene, view, write

from delf_milvus import DelfIndex, SearchResult

UNKNOWN = "unknown"


def place_of(result: SearchResult) -> tuple[str, int]:
    """The name with most inliers behind it, and these; "unknown" and 0 without a verified answer."""
    votes: Counter[str] = Counter()
    for hit in result.hits:
        if hit.verified:
            votes[hit.metadata["place"]] += hit.inliers
    return votes.most_common(1)[0] if votes else (UNKNOWN, 0)


def store(index: DelfIndex, folder: Path) -> int:
    """Store the photos of a folder of folders, each with its folder's name as the place; returns how many."""
    photos = sorted(path for path in folder.glob("*/*") if path.is_file())
    for path in photos:
        index.add(path, image_id=path.relative_to(folder).as_posix(), metadata={"place": path.parent.name})
    return len(photos)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Recognise places.")
    parser.add_argument("--photos", type=Path, help="folder with a folder of photos for each place")
    parser.add_argument("--ask", type=Path, nargs="*", default=[], help="photos to recognise")
    given = parser.parse_args(arguments)
    wrong = 0
    with tempfile.TemporaryDirectory() as work, DelfIndex.open(Path(work) / "places.db") as index:
        folder = given.photos or write(Path(work) / "photos", places=4, views=2)
        print(f"{store(index, folder)} photos stored")
        for photo in given.ask:
            name, inliers = place_of(index.search(photo))
            print(f"{photo}: {name}, {inliers} inliers")
        if given.photos is None:
            for number, expected in ((0, "place-0"), (3, "place-3"), (70, UNKNOWN), (71, UNKNOWN)):
                name, inliers = place_of(index.search(view(scene(number), 9)))
                wrong += name != expected
                print(f"a new photo of place {number}: {name}, {inliers} inliers")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
