"""What the fault tests work on: photos, feature files, collections as they are before a command, and the commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from conftest import make_photo, save_photo
from model.models import write_tiny_model
from store.store_samples import random_features

from delf_milvus import DelfIndex, Settings
from delf_milvus.featurefiles import npz
from delf_milvus.featurefiles.arrays import LocalFeatures
from delf_milvus.settings import ExtractSettings, StoreSettings

COLLECTION = "faults"
EXTRACTOR = "random-v1"
EXTRACT = ExtractSettings(scales=(0.5, 1.0), longest_side=160, stored_features=40)
"""A small pyramid: what is to be killed is the writing, not the network."""

ENVIRONMENT = {
    "DELF_MILVUS_EXTRACT__SCALES": json.dumps(EXTRACT.scales),
    "DELF_MILVUS_EXTRACT__LONGEST_SIDE": str(EXTRACT.longest_side),
    "DELF_MILVUS_EXTRACT__STORED_FEATURES": str(EXTRACT.stored_features),
    # Features differ in their last bits with the number of threads.
    "OMP_NUM_THREADS": "1",
}
"""Of every command: the same settings."""

_MOST_FEATURES = 36


@dataclass(frozen=True)
class Operation:
    """A command that is to be killed.

    before: the collection that it begins with, a folder in `Material.collections`, or "" for none. arguments: the
    command and its arguments, in the folder of the material; {out} is a new path for each run. options: global ones.
    again: exit codes that its run after a kill may have; `delete` is 5 where an id is gone, and an export that had
    just ended is not made again (2).
    """

    before: str
    arguments: tuple[str, ...]
    options: tuple[str, ...] = ()
    again: frozenset[int] = field(default=frozenset({0}))


@dataclass(frozen=True)
class Material:
    """Files that were made for the operations. collections: folder with a Milvus Lite database for each name."""

    folder: Path
    operations: dict[str, Operation]

    @property
    def collections(self) -> Path:
        return self.folder / "collections"


def make(folder: Path, images: int, photos: int) -> Material:
    """Write everything into a folder: `images` feature files, and `photos` drawn photos with two tiny models."""
    names = [f"{number // 50}/{number:04}" for number in range(images)]
    kept, changed = images // 4, images // 2
    collections = folder / "collections"
    collections.mkdir(parents=True)
    for year in (1999, 2000):
        (folder / f"{year}.csv").write_text(_listing(names, year))
    # An earlier state: some images as they will be, some with other features, the rest not there yet. A command that
    # does not say their metadata leaves it as it is.
    for number, name in enumerate(names[:changed]):
        _write(folder / "features" / name, number, version=int(number >= kept))
    (folder / "older.csv").write_text(_listing(names[:changed], 1999))
    _ingest(collections / "older.db", folder / "features", folder / "older.csv")
    for number, name in enumerate(names):
        _write(folder / "features" / name, number)
        _write(folder / "shrunk" / name, number)
    _ingest(collections / "full.db", folder / "features", folder / "1999.csv")
    _ingest(collections / "unpruned.db", folder / "shrunk", folder / "1999.csv")
    for name in names[1::2]:
        (folder / "shrunk" / f"{name}.npz").unlink()
    with _opened(collections / "full.db", any_model=True) as index:
        index.export(folder / "exported")
    for number in range(photos):
        save_photo(folder / "photos" / f"{number:03}.png", make_photo(number, 160, 120))
    models = [write_tiny_model(folder / f"{letter}.safetensors", seed) for seed, letter in enumerate("ab")]
    with _opened(collections / "photos.db", model=models[0]) as index:
        index.ingest([folder / "photos"])
    deleted = tuple(names[::2])
    photos_ingest = Operation("", ("ingest", "photos"), ("--model", str(models[0])))
    operations = {
        "ingest": Operation("", ("ingest", "--features", "features")),
        "update": Operation("older", ("ingest", "--features", "features")),
        "relabel": Operation("full", ("ingest", "--features", "features", "--ids-from", "2000.csv")),
        "prune": Operation("unpruned", ("ingest", "--features", "shrunk", "--prune")),
        "delete": Operation("full", ("delete", *deleted), again=frozenset({0, 5})),
        "import": Operation("older", ("import", "exported")),
        "export": Operation("full", ("export", "{out}"), again=frozenset({0, 2})),
        "photos": photos_ingest,
        "reindex": Operation("photos", ("reindex", "--drop-old"), ("--model", str(models[1]))),
    }
    return Material(folder, operations)


def copy_collection(material: Material, name: str, to: Path) -> None:
    """A copy of a closed Milvus Lite database."""
    shutil.copytree(material.collections / f"{name}.db", to)


def _write(path: Path, number: int, version: int = 0) -> None:
    rng = np.random.default_rng((number, version))
    features = random_features(rng, int(rng.integers(4, _MOST_FEATURES)))
    path.parent.mkdir(parents=True, exist_ok=True)
    npz.write(path.with_name(f"{path.name}.npz"), LocalFeatures.of(features, EXTRACTOR))


def _listing(names: Sequence[str], year: int) -> str:
    """Metadata of feature files: every second one is of that year, and all have a note."""
    rows = [f"{name}.npz,{year if number % 2 else 1990},note {number}" for number, name in enumerate(names)]
    return "\n".join(["path,year,note", *rows]) + "\n"


def _ingest(database: Path, folder: Path, listing: Path) -> None:
    with _opened(database, any_model=True) as index:
        report = index.ingest_features([folder], ids_from=listing)
        assert not report.failures, report.failures[:3]


def _opened(database: Path, **options: Any) -> DelfIndex:
    ours = Settings(extract=EXTRACT, store=StoreSettings(fields={"year": "integer=0"}))
    return DelfIndex.open(database, collection=COLLECTION, settings=ours, **options)
