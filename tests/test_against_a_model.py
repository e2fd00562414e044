"""An index against a plain dictionary: whatever is done to it in whatever order, it holds what the dictionary holds.

Short in the suite; `HYPOTHESIS_PROFILE=long python -m pytest -x -n0 -s tests/test_against_a_model.py` takes some ninety
minutes, searches anew each time and begins with the steps that failed the last time.

A crash is a call that changes the database and that is never made: the exception goes past everything, as nothing
handles its class, and the handle is abandoned. Of Milvus Lite, which this process has open, the files are copied at
that moment, as a kill would leave them, and the copy is opened instead.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RgbImage, make_photo, save_photo
from hypothesis import HealthCheck, Verbosity, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from milvus_server import Server
from model.models import write_tiny_model
from pymilvus import MilvusClient

from delf_milvus import DelfIndex, Settings
from delf_milvus.features import Features
from delf_milvus.settings import ExtractSettings, StoreSettings
from delf_milvus.store.codec import pack, unpack
from delf_milvus.store.connection import Connection
from delf_milvus.store.keys import image_key

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
VARIANTS = 5
NAMES = ("a.png", "b.png", "more/c.png", "more/d.png")
ADDED = ("x", "more/y")
CHANGES = ("writing", "deleting", "noting what is begun")
EXTRACT = ExtractSettings(scales=(0.5, 1.0), longest_side=128, stored_features=16, query_features=16)


class KilledError(BaseException):
    """Instead of a call that changes the database."""


@dataclass(frozen=True)
class Image:
    """What the model knows of a stored image. variant: which photo. file: whether it was ingested from the folder."""

    variant: int
    year: int
    file: bool


@dataclass
class World:
    """What all machines share. models: two weight files. pictures: a photo of each variant."""

    folder: Path
    models: tuple[Path, Path]
    uri: str
    known: dict[tuple[int, int], Features]

    def photo(self, variant: int) -> RgbImage:
        return make_photo(variant, 128, 96)


class Collection(RuleBasedStateMachine):
    """The rules. `world` is set by the test."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.folder = self.world.folder / uuid.uuid4().hex[:12]
        self.files: dict[str, int] = {}
        self.stored: dict[str, Image] = {}
        self.left: dict[str, Image] = {}
        self.model = 0
        self.uri = self.world.uri or str(self.folder / "0.db")
        self.name = f"m{self.folder.name}"
        for variant in range(VARIANTS):
            save_photo(self.folder / "singles" / f"{variant}.png", self.world.photo(variant))
        (self.folder / "photos").mkdir()
        self.index = self.opened()

    def opened(self, **options: Any) -> DelfIndex:
        store = StoreSettings(fields={"year": "integer=0"})
        ours = Settings(uri=self.uri, collection=self.name, extract=EXTRACT, store=store)
        return DelfIndex.open(settings=ours, model=self.world.models[options.pop("model", self.model)], **options)

    @initialize()
    def first_image(self) -> None:
        self.add(ADDED[0], 0, 0)

    @rule(name=st.sampled_from(NAMES), variant=st.integers(0, VARIANTS - 1))
    def write_file(self, name: str, variant: int) -> None:
        save_photo(self.folder / "photos" / name, self.world.photo(variant))
        self.files[name] = variant

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def remove_file(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.files)))
        (self.folder / "photos" / name).unlink()
        del self.files[name]

    @rule(image_id=st.sampled_from(ADDED), variant=st.integers(0, VARIANTS - 1), year=st.integers(0, 2))
    def add(self, image_id: str, variant: int, year: int) -> None:
        place = self.folder / "singles" / f"{variant}.png"
        self.index.add(place, image_id, {"year": year, "note": f"about {variant}"})
        self.stored[image_id] = Image(variant, year, False)

    @rule(image_ids=st.lists(st.sampled_from((*NAMES, *ADDED, "unknown")), max_size=4, unique=True))
    def delete(self, image_ids: list[str]) -> None:
        assert self.index.delete(image_ids) == [one for one in image_ids if one in self.stored]
        for image_id in image_ids:
            self.stored.pop(image_id, None)

    @rule(prune=st.booleans())
    def ingest(self, prune: bool) -> None:
        self.ingested(prune)
        self.stored = self.after_ingest(prune)

    @rule(year=st.integers(0, 2))
    def ingest_with_a_listing(self, year: int) -> None:
        listing = self.folder / "listing.csv"
        listing.write_text("path,year\n" + "".join(f"{name},{year}\n" for name in sorted(self.files)))
        self.index.ingest([self.folder / "photos"], ids_from=listing)
        self.stored |= {name: Image(variant, year, True) for name, variant in self.files.items()}

    @rule(allow_missing=st.booleans(), drop_old=st.booleans())
    def reindex(self, allow_missing: bool, drop_old: bool) -> None:
        """What the generation of the other model, if there is one, has of the same content is kept as it is."""
        self.index.close()
        other = 1 - self.model
        with self.opened(model=other, any_model=True, create=False) as index:
            report = index.reindex(allow_missing=allow_missing, drop_old=drop_old)
        kept = {
            one for one, image in self.stored.items() if one in self.left and self.left[one].variant == image.variant
        }
        missing = {
            name for name, image in self.stored.items() if image.file and name not in self.files and name not in kept
        }
        made = {
            name: replace(image, variant=self.files[name]) if image.file and name not in kept else image
            for name, image in self.stored.items()
            if name not in missing
        }
        assert {failure.path for failure in report.missing} == {str(self.folder / "photos" / name) for name in missing}
        assert report.switched == (allow_missing or not missing)
        if report.switched:
            self.model = other
            self.stored, self.left = made, {} if drop_old else self.stored
        else:
            self.left = made
        self.index = self.opened(create=False)

    @rule()
    def restart(self) -> None:
        self.index.close()
        self.index = self.opened(create=False)

    @rule(
        calls=st.integers(0, 8),
        what=st.sampled_from(["ingest", "prune", "add", "delete"]),
        image_id=st.sampled_from(ADDED),
        variant=st.integers(0, VARIANTS - 1),
    )
    def crash(self, calls: int, what: str, image_id: str, variant: int) -> None:
        """A command is killed and run again: in between, every image that it writes or deletes is as before, as after,
        or not there. `add` writes its image even where nothing changes."""
        before = self.stored
        place = self.folder / "singles" / f"{variant}.png"
        steps: dict[str, tuple[Callable[[], object], dict[str, Image]]] = {
            "ingest": (lambda: self.ingested(False), self.after_ingest(False)),
            "prune": (lambda: self.ingested(True), self.after_ingest(True)),
            "add": (
                lambda: self.index.add(place, image_id, {"year": 1, "note": f"about {variant}"}),
                {**before, image_id: Image(variant, 1, False)},
            ),
            "delete": (
                lambda: self.index.delete([image_id, *NAMES]),
                {one: image for one, image in before.items() if one not in (image_id, *NAMES)},
            ),
        }
        step, after = steps[what]
        if not self.killed(step, calls):
            self.stored = after
            return
        findings = {finding.kind for finding in self.index.fsck().findings}
        assert findings <= {"orphan_features"}
        there = {record.image_id: int(record.metadata["year"]) for record in self.index.list()}
        for one in {*before, *after, *there}:
            either = [None if image is None else image.year for image in (before.get(one), after.get(one))]
            written = before.get(one) != after.get(one) or (what == "add" and one == image_id)
            assert there.get(one) in ([*either, None] if written else either)
        step()
        self.stored = after

    def ingested(self, prune: bool) -> None:
        report = self.index.ingest([self.folder / "photos"], prune=prune)
        assert report.failures == []

    def after_ingest(self, prune: bool) -> dict[str, Image]:
        """A photo without a listing keeps the year that it has."""
        new = {
            name: Image(variant, self.stored[name].year if name in self.stored else 0, True)
            for name, variant in self.files.items()
        }
        kept = {one: image for one, image in self.stored.items() if not (prune and image.file and one not in new)}
        return kept | new

    def killed(self, step: Callable[[], object], calls: int) -> bool:
        """Whether the step came to so many changes of the database; then the index is what a kill leaves."""
        call = Connection.call
        left = calls

        def counting(connection: Connection, doing: str, *arguments: Any, **options: Any) -> Any:
            nonlocal left
            if doing in CHANGES:
                left -= 1
                if left < 0:
                    raise KilledError
            return call(connection, doing, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Connection, "call", counting)
            try:
                step()
            except KilledError:
                pass
            else:
                return False
        abandoned = self.index
        if not self.world.uri:
            self.uri = str(self.folder / f"{uuid.uuid4().hex[:12]}.db")
            shutil.copytree(abandoned.settings.uri, self.uri)
        self.index = self.opened(create=False)
        # What it does now is done to files that nobody looks at again, or, on a server, is nothing.
        abandoned._added = False
        abandoned.close()
        return True

    @invariant()
    def everything_is_equal(self) -> None:
        if not hasattr(self, "index"):
            return
        listed = {record.image_id: record for record in self.index.list()}
        assert {one: int(record.metadata["year"]) for one, record in listed.items()} == {
            one: image.year for one, image in self.stored.items()
        }
        for year in (0, 1):
            filtered = [record.image_id for record in self.index.list(filter={"year": year})]
            assert filtered == sorted(one for one, image in self.stored.items() if image.year == year)
        expected = {one: self.features(image.variant) for one, image in self.stored.items()}
        status = self.index.status()
        assert (status["images"], status["features"]) == (len(expected), sum(map(len, expected.values())))
        store = self.index._store
        found = store.stored([image_key(one) for one in expected], globally=True)
        assert {record.image_id for record, _ in found.values()} == set(expected)
        for record, features in found.values():
            rounded = unpack(pack(expected[record.image_id]))
            for name in ("locations", "scales", "attention", "descriptors"):
                np.testing.assert_array_equal(getattr(features, name), getattr(rounded, name))
        assert self.index.fsck().findings == []

    @precondition(lambda self: self.stored)
    @rule(data=st.data(), narrowed=st.booleans())
    def search(self, data: st.DataObject, narrowed: bool) -> None:
        """Stored features find their image, or one of the same photo, first; a filter leaves out the others."""
        image = self.stored[data.draw(st.sampled_from(sorted(self.stored)))]
        where = {"year": image.year} if narrowed else ""
        alike = {
            one
            for one, other in self.stored.items()
            if other.variant == image.variant and not (narrowed and other.year != image.year)
        }
        found = self.index.search(self.features(image.variant), filter=where, include_unverified=True)
        assert {hit.image_id for hit in found.hits[: len(alike)]} == alike
        if narrowed:
            assert {self.stored[hit.image_id].year for hit in found.hits} == {image.year}

    def features(self, variant: int) -> Features:
        """What the current model sees in a photo."""
        key = (variant, self.model)
        if key not in self.world.known:
            extractor = self.index._matcher.extractor
            self.world.known[key] = extractor.extract(self.world.photo(variant), extractor.plan.stored_features)
        return self.world.known[key]

    def teardown(self) -> None:
        self.index.close()
        shutil.rmtree(self.folder)
        if self.world.uri:
            client = MilvusClient(self.world.uri, dedicated=True)
            for suffix in ("current", "images", "features"):
                client.drop_alias(f"{self.name}_{suffix}")
            for one in client.list_collections():
                if one.startswith(self.name):
                    client.drop_collection(one)
            client.close()


@pytest.fixture
def world(tmp_path: Path) -> World:
    models = tuple(write_tiny_model(tmp_path / f"{seed}.safetensors", seed) for seed in (0, 1))
    return World(tmp_path, (models[0], models[1]), "", {})


def check(world: World, examples: int, steps: int, long: int) -> None:
    class Machine(Collection):
        pass

    Machine.world = world
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=long if LONG else examples,
            stateful_step_count=3 * steps if LONG else steps,
            derandomize=not LONG,
            database=DirectoryBasedExampleDatabase(".hypothesis/examples") if LONG else None,
            verbosity=Verbosity.verbose if LONG else Verbosity.normal,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_an_embedded_collection_holds_what_a_dictionary_holds(world: World) -> None:
    check(world, 6, 15, long=200)


@pytest.mark.server
def test_a_collection_on_a_server_holds_what_a_dictionary_holds(world: World, milvus: Server) -> None:
    world.uri = milvus.uri
    check(world, 2, 10, long=20)
