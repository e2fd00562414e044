"""Labels of Google Landmarks: the CSV files of the data set, beside its photos.

`train.csv` has a row for each photo (`id`, `landmark_id`), `train_clean.csv` one for each landmark (`landmark_id`,
`images`, ids with spaces between). A photo lies below the folder of the file, at `train/a/b/c/abc0123....jpg`, or
without `train`. Photos that are not there are left out: the data set is published in 500 parts, and few have them all.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from delf_milvus.errors import InputError

_LONGEST_FIELD = 10_000_000
"""Characters of one field: a landmark's list of photos has more than the reader's own limit."""


def photos_by_landmark(file: Path) -> dict[str, list[Path]]:
    """The photos of each landmark that are there, by landmark id, both in order.

    Raises InputError for a file that cannot be read, has other columns, or none of whose photos is there.
    """
    found: dict[str, list[Path]] = {}
    folders = [file.parent / "train", file.parent]
    try:
        for landmark, photo in _rows(file):
            place = Path(*photo[:3]) / f"{photo}.jpg"
            path = next((folder / place for folder in folders if (folder / place).is_file()), None)
            if path is not None:
                found.setdefault(landmark, []).append(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} cannot be read as a CSV file of Google Landmarks ({error}).") from error
    if not found:
        raise InputError(f"None of the photos of {file} is there; they belong at {folders[0] / 'a/b/c/abc....jpg'}.")
    return {landmark: sorted(found[landmark]) for landmark in sorted(found)}


def _rows(file: Path) -> Iterator[tuple[str, str]]:
    """Landmark and photo of each pair; ids that could lead out of the folder are none."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            columns = set(reader.fieldnames or ())
            photos = "id" if "id" in columns else "images"
            if not {"landmark_id", photos} <= columns:
                raise InputError(f"{file} lacks the columns id and landmark_id, or landmark_id and images.")
            for row in reader:
                for photo in (row[photos] or "").split():
                    if photo.isalnum() and len(photo) >= 3:
                        yield row["landmark_id"] or "", photo
    finally:
        csv.field_size_limit(before)
