"""One fault: a command is started, it or its server is killed at a chosen moment, and everything is looked at after.

What must hold after a kill at any moment:

1. `fsck` finds nothing but what `AFTER_A_KILL` names.
2. Every image that is there is, with its features, either as it was before the command or as the command makes it; a
   folder with a manifest is a whole export; the current generation is the old one or the whole new one.
3. The same command, run again, completes.
4. Then both collections equal, row for row, those of a run that nobody disturbed; an export equals its export. The time
   of ingest is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fault_material import COLLECTION, ENVIRONMENT, EXTRACT, Material, Operation, copy_collection
from milvus_server import WheelServer

from delf_milvus import DelfIndex, Settings
from delf_milvus.errors import CollectionError
from delf_milvus.settings import StoreSettings
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.transfer import MANIFEST, read_manifest

AFTER_A_KILL = frozenset({"orphan_features"})
"""Findings of `fsck` that a kill may leave until the command is run again: features whose image was not yet, or is no
longer, there. The guide on operating says so."""

WINDOWS = {
    "after insert features": "features written, image row not",
    "after upsert features": "features written, image row not",
    "after delete images": "image row deleted, features not",
    "open partial images": "export: written, not renamed",
    "open partial features": "export: written, not renamed",
    "rename partial images": "export: one file renamed, not all",
    "rename partial features": "export: files there, manifest not",
    "open partial manifest": "export: files there, manifest not",
    "in create alias current": "reindex: the switch",
    "in alter alias current": "reindex: the switch",
    "after create alias current": "reindex: switched, old one still there",
    "after alter alias current": "reindex: switched, old one still there",
}
"""Phases in which something is half done, by the last event that was noted."""

TOOL = Path(__file__).with_name("watched_tool.py")
PATIENCE = 60.0
"""Seconds for which a command waits for a server that is away."""

_SECONDS = 300
_POLL = 0.002
_PAGE = 1000

Victim = Literal["tool", "server"]


@dataclass(frozen=True)
class Place:
    """A collection of one trial, and what else belongs to it. out: folder for an export."""

    uri: str
    collection: str
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def is_lite(self) -> bool:
        return not self.uri.startswith("http")


@dataclass(frozen=True)
class Stored:
    """Everything in a collection. images: by id, a digest of the image's row and of all its features. loose: features
    of no image, by key. rows: what the database counts. generation, index: as `status` names them."""

    images: Mapping[str, str] = field(default_factory=dict)
    loose: Mapping[str, int] = field(default_factory=dict)
    rows: tuple[int, int] = (0, 0)
    generation: str = ""
    index: str = ""
    findings: Mapping[str, int] = field(default_factory=dict)

    def difference(self, other: Stored) -> str:
        """What is not the same, in words; "" where all is."""
        ours, theirs = asdict(self), asdict(other)
        said = [
            f"{name} {ours[name]}, not {theirs[name]}"
            for name in ("rows", "generation", "index", "findings")
            if ours[name] != theirs[name]
        ]
        ids = sorted(one for one in {*self.images, *other.images} if self.images.get(one) != other.images.get(one))
        said += [f"{len(ids)} images differ: {ids[:3]}"] if ids else []
        said += [f"features of no image: {dict(self.loose)}"] if self.loose != other.loose else []
        return "; ".join(said)


@dataclass(frozen=True)
class Moment:
    """When to kill: so many seconds after an event was noted for the so many-th time, or, without event, after the
    start."""

    seconds: float
    event: str = ""
    occurrence: int = 0


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody disturbed: the events that were noted, each with the seconds until the next, and results."""

    seconds: float
    events: list[tuple[str, float]]
    before: Stored
    after: Stored
    exported: str

    def moment(self, rng: random.Random, *, aimed: bool) -> Moment:
        """A moment of the whole duration; or, aimed, of one kind of event as likely as of any other, and half of those
        at once when it is noted."""
        if not aimed:
            return Moment(rng.uniform(0, self.seconds))
        # What is half done is rare among the events, and what matters.
        kinds = sorted({event for event, _ in self.events})
        dangerous = [event for event in kinds if event in WINDOWS]
        event = rng.choice(dangerous if dangerous and rng.random() < 0.6 else kinds)
        pauses = [seconds for one, seconds in self.events if one == event]
        occurrence = rng.randrange(len(pauses))
        return Moment(rng.choice([0.0, rng.uniform(0, pauses[occurrence])]), event, occurrence)


@dataclass(frozen=True)
class Trial:
    """What happened to one kill. phase: the last event that was noted before it. code: of the killed command, negative
    for a signal. again: of its second run. problems: what does not hold; all is well without any."""

    operation: str
    database: str
    victim: Victim
    aimed: bool
    phase: str
    code: int
    findings: Mapping[str, int]
    again: int
    problems: list[str]

    @property
    def killed(self) -> bool:
        """Whether the kill came before the command's end."""
        return self.victim == "server" or self.code == -signal.SIGKILL


class Trials:
    """Trials of one database: Milvus Lite, or a server."""

    def __init__(self, material: Material, folder: Path, server: WheelServer | None = None) -> None:
        self._material = material
        self._folder = folder
        self._server = server
        self._known: dict[str, Undisturbed] = {}

    @property
    def database(self) -> str:
        """Its name in tables."""
        return "lite" if self._server is None else "server"

    def undisturbed(self, name: str) -> Undisturbed:
        """A run of that operation without any fault, of which one is enough."""
        if name not in self._known:
            operation = self._material.operations[name]
            with _removed(self._place(operation)) as place:
                before = look(place)
                started = time.monotonic()
                process = self._start(place, operation, Moment(0))
                code = process.wait(_SECONDS)
                ended = time.monotonic()
                assert code == 0, f"{name} alone ends with {code}: {_said(place)}"
                notes = _notes(place)
                times = [at for at, _ in notes] + [ended]
                events = [(event, times[i + 1] - times[i]) for i, (_, event) in enumerate(notes)]
                after = look(place)
                assert not after.findings, after.findings
                self._known[name] = Undisturbed(ended - started, events, before, after, _export(place))
        return self._known[name]

    def drawn(self, name: str, rng: random.Random, *, aimed: bool) -> Moment:
        """A moment of that operation."""
        return self.undisturbed(name).moment(rng, aimed=aimed)

    def run(self, name: str, victim: Victim, moment: Moment, patience: float = PATIENCE) -> Trial:
        """Kill once, and look at everything. patience: seconds for which the command waits for its server."""
        operation, alone = self._material.operations[name], self.undisturbed(name)
        with _removed(self._place(operation)) as place:
            problems: list[str] = []
            if victim == "tool":
                code, phase = self._kill_tool(place, operation, moment)
            else:
                code, phase = self._kill_server(place, operation, moment, patience)
                if code not in {0, 3, *operation.again} or (code == 3) != _said(place).startswith("Error: "):
                    problems.append(f"ended with {code}: {_said(place)}")
            left = self._look_aside(place)
            if unknown := left.findings.keys() - AFTER_A_KILL:
                problems.append(f"fsck finds {sorted(unknown)}")
            halves = [
                image_id
                for image_id, digest in left.images.items()
                if digest not in (alone.before.images.get(image_id), alone.after.images.get(image_id))
            ]
            if halves:
                problems.append(f"{len(halves)} images are neither as before nor as after: {sorted(halves)[:3]}")
            switched = left.generation != alone.before.generation and alone.before.images
            if switched and left.images != alone.after.images:
                problems.append("the new generation is current, and not whole")
            if (place.out / MANIFEST).exists() and _export(place) != alone.exported:
                problems.append("an export with a manifest is not the whole one")
            again = subprocess.run(
                [sys.executable, "-m", "delf_milvus", *_arguments(place, operation)],
                cwd=self._material.folder,
                env=_environment(PATIENCE),
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
            if again.returncode not in operation.again or "Traceback" in again.stderr:
                problems.append(f"run again, it ends with {again.returncode}: {again.stderr[-500:]}")
            if difference := look(place).difference(alone.after):
                problems.append(f"run again, {difference}")
            if _export(place) != alone.exported:
                problems.append("run again, the export differs")
        return Trial(
            name, self.database, victim, bool(moment.event), phase, code, left.findings, again.returncode, problems
        )

    def _place(self, operation: Operation) -> Place:
        """A place with the collection that the operation begins with."""
        folder = self._folder / uuid.uuid4().hex[:12]
        folder.mkdir(parents=True)
        if self._server is None:
            place = Place(str(folder / "photos.db"), COLLECTION, folder)
            if operation.before:
                copy_collection(self._material, operation.before, Path(place.uri))
            return place
        place = Place(self._server.uri, f"f{folder.name}", folder)
        if operation.before:
            exported = self._exported(operation.before)
            settings = Settings(extract=EXTRACT)
            with DelfIndex.open(place.uri, collection=place.collection, settings=settings, any_model=True) as index:
                index.import_(exported)
        return place

    def _exported(self, name: str) -> Path:
        exported = self._folder / "exported" / name
        if not exported.exists():
            copy = self._folder / f"{name}.db"
            copy_collection(self._material, name, copy)
            with DelfIndex.open(copy, collection=COLLECTION, any_model=True) as index:
                index.export(exported)
        return exported

    def _start(
        self, place: Place, operation: Operation, moment: Moment, patience: float = PATIENCE
    ) -> subprocess.Popen[bytes]:
        asked = json.dumps(asdict(moment)) if moment.event else ""
        with (place.folder / "said").open("wb") as said:
            return subprocess.Popen(
                [sys.executable, str(TOOL), str(place.folder / "notes"), asked, *_arguments(place, operation)],
                cwd=self._material.folder,
                env=_environment(patience),
                stdout=subprocess.DEVNULL,
                stderr=said,
            )

    def _kill_tool(self, place: Place, operation: Operation, moment: Moment) -> tuple[int, str]:
        process = self._start(place, operation, moment)
        try:
            # An aimed command kills itself: nobody else is as punctual.
            code = process.wait(_SECONDS if moment.event else moment.seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
            if moment.event:
                raise
        return code, next((event for _, event in reversed(_notes(place))), "start")

    def _kill_server(self, place: Place, operation: Operation, moment: Moment, patience: float) -> tuple[int, str]:
        """Kill the server when the command comes to the moment, and start it again; the command is not disturbed."""
        assert self._server is not None
        process = self._start(place, operation, Moment(0), patience)
        try:
            left = moment.occurrence
            while moment.event and process.poll() is None:
                if Counter(event for _, event in _notes(place))[moment.event] > left:
                    break
                time.sleep(_POLL)
            time.sleep(moment.seconds)
            killed = time.monotonic()
            self._server.restart()
            code = process.wait(_SECONDS)
        finally:
            process.kill()
            process.wait()
        return code, next((event for at, event in reversed(_notes(place)) if at <= killed), "start")

    def _look_aside(self, place: Place) -> Stored:
        """What is stored after a kill. Of an embedded database a copy is opened: looking must not mend anything."""
        if not place.is_lite:
            return look(place)
        if not Path(place.uri).exists():
            return Stored()
        copy = Path(shutil.copytree(place.uri, place.folder / "copy.db"))
        return look(Place(str(copy), place.collection, place.folder))


def look(place: Place) -> Stored:
    """Read a collection, whole; an empty one where there is none."""
    try:
        store = FeatureStore.open(place.uri, place.collection, None, StoreSettings(retry_seconds=60), create=False)
    except CollectionError:
        return Stored()
    with store:
        findings = Counter(finding.kind for finding in store.fsck().findings)
        features: dict[int, list[str]] = {}
        for row in _rows(store, "features", ["*"]):
            features.setdefault(int(row["feature_key"]) >> 12, []).append(_text(row))
        images = {}
        for row in _rows(store, "images", ["*", "$meta"]):
            del row["ingested_at"]
            own = sorted(features.pop(int(row["image_key"]), []))
            images[str(row["image_id"])] = hashlib.sha256("\n".join([_text(row), *own]).encode()).hexdigest()
        status = store.status()
        return Stored(
            images,
            {str(key): len(rows) for key, rows in features.items()},
            (status.images, status.features),
            status.generation.removeprefix(place.collection),
            f"{status.index_used} {dict(status.index_params)} {status.index_state}",
            dict(findings),
        )


def _rows(store: FeatureStore, kind: str, fields: list[str]) -> Iterator[dict[str, Any]]:
    with store.connection.asking("reading everything"):
        pages = store.connection.client.query_iterator(
            f"{store.generation}_{kind}", batch_size=_PAGE, filter="", output_fields=fields, consistency_level="Strong"
        )
        while page := pages.next():
            yield from map(dict, page)
        pages.close()


def _text(row: Mapping[str, Any]) -> str:
    return json.dumps(dict(row), sort_keys=True, default=lambda value: [float(one) for one in value])


def _export(place: Place) -> str:
    """What an export holds, the time of its making left out; "" where there is none."""
    if not (place.out / MANIFEST).exists():
        return ""
    manifest = read_manifest(place.out)
    files = sorted(path.name for path in place.out.iterdir())
    return json.dumps([files, manifest.facts.to_json(), [part.model_dump() for part in manifest.parts]])


def _arguments(place: Place, operation: Operation) -> list[str]:
    command = [str(place.out) if argument == "{out}" else argument for argument in operation.arguments]
    return ["--quiet", "--uri", place.uri, "--collection", place.collection, *operation.options, *command]


def _environment(patience: float) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, "DELF_MILVUS_STORE__RETRY_SECONDS": str(patience)}


def _notes(place: Place) -> list[tuple[float, str]]:
    """The times and events that the command noted, whole lines alone."""
    path = place.folder / "notes"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(float(at), event) for at, _, event in (line.partition(" ") for line in lines)]


def _said(place: Place) -> str:
    """The end of what the command said on stderr."""
    lines = (place.folder / "said").read_text(errors="replace").splitlines()
    return lines[-1] if lines else ""


@contextmanager
def _removed(place: Place) -> Iterator[Place]:
    """The place, which is removed in the end, its collections included."""
    try:
        yield place
    finally:
        if not place.is_lite:
            _drop(place)
        shutil.rmtree(place.folder)


def _drop(place: Place) -> None:
    from pymilvus import MilvusClient

    client = MilvusClient(place.uri, dedicated=True)
    for suffix in ("current", "images", "features"):
        client.drop_alias(f"{place.collection}_{suffix}")
    for name in client.list_collections():
        if name.startswith(place.collection):
            client.drop_collection(name)
    client.close()
