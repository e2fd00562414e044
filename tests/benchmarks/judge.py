"""Judge a model by retrieval: all sets in one collection, exact-like search, the package's own vote and verification.

    python tests/benchmarks/judge.py --data ../shared/data --model model.safetensors --selection attention

Prints UKBench's N-S (alone, and with every other photo as a distractor) and mean average precision for UKBench, the
judging places of landmarks and the three multi-view scenes, each with everything else as distractors. Features are
kept in --cache, so that a second run with other retrieval settings takes minutes. --save keeps the figures of every
query, and --against FILE of another run prints the mean difference to them with a 95 % interval (paired bootstrap).

The neighbours come from faiss (a dependency of the embedded database): IVF with so many lists visited that its loss
is below what these sets can resolve, which keeps the index's quantisation out of a comparison of models. What an index
of Milvus loses is judged by two runs of one model, `--neighbours exact --save exact.json` and
`--neighbours milvus --profile IVF_PQ --against exact.json`: through the store, on the test suite's own server
(Linux x86-64) or on that of --uri.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from milvus_server import WheelServer

from delf_milvus.evaluation.memory import MemoryCollection
from delf_milvus.evaluation.metrics import average_precision, ns_score
from delf_milvus.features import ORDINAL_BITS, Features, Fingerprint
from delf_milvus.imaging.decode import decode
from delf_milvus.index import candidates_of, named_of
from delf_milvus.model.extractor import Extractor
from delf_milvus.retrieval.answers import AnswerSource, Named
from delf_milvus.retrieval.search import Candidate, Timings, judge_candidates
from delf_milvus.settings import DecodeSettings, Profile, Settings, StoreSettings
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.keys import image_key
from delf_milvus.store.records import ImageRecord

SETS = ("ukbench", "landmarks", "multiview", "churches", "objects")
PATIENT = StoreSettings(timeout=600)
DEEP = 1000
"""Images without verification at most that a ranking goes on with: those that a search can show at most."""

PLACES = Path(__file__).parents[2] / "delf_milvus/evaluation/judging_places.txt"


@dataclass
class PhotoSet:
    """Features of the photos of one set; names are paths relative to the data folder."""

    names: list[str]
    features: list[Features]


def load_set(name: str, data: Path, extractor: Extractor, cache: Path) -> PhotoSet:
    """Features of one set, extracted once for a fingerprint."""
    path = cache / f"{extractor.fingerprint.short}-{extractor.plan.stored_features}-{name}.npz"
    if path.is_file():
        return read_features(path)
    photos = sorted(p for p in (data / name).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    started = time.perf_counter()
    features = [extractor.extract(decode(p, DecodeSettings()), extractor.plan.stored_features) for p in photos]
    print(f"{name}: {len(photos)} photos, {(time.perf_counter() - started) / len(photos):.3f} s each", flush=True)
    photo_set = PhotoSet([p.relative_to(data).as_posix() for p in photos], features)
    write_features(path, photo_set)
    return photo_set


FIELDS = ("locations", "scales", "attention", "descriptors")


def write_features(path: Path, photos: PhotoSet) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        names=photos.names,
        counts=[len(f) for f in photos.features],
        sizes=[(f.width, f.height) for f in photos.features],
        whole=[f.global_descriptor for f in photos.features],
        **{name: np.concatenate([getattr(f, name) for f in photos.features]) for name in FIELDS},
    )


def read_features(path: Path) -> PhotoSet:
    with np.load(path) as archive:
        ends = np.cumsum(archive["counts"])[:-1]
        arrays = [np.split(archive[name], ends) for name in FIELDS]
        rest = archive["sizes"].tolist(), archive["whole"]
        features = [Features(*rows, *size, whole) for *rows, size, whole in zip(*arrays, *rest, strict=True)]
        return PhotoSet([str(name) for name in archive["names"]], features)


def truth(names: list[str]) -> dict[str, str]:
    """Instance of every photo that queries: the others are distractors only."""
    places = set(PLACES.read_text().split())
    instances = {}
    for name in names:
        parts = name.split("/")
        if parts[0] == "ukbench":
            instances[name] = f"ukbench/{int(Path(name).stem.removeprefix('ukbench')) // 4}"
        elif parts[0] == "multiview" or (parts[0] == "landmarks" and parts[1] in places):
            instances[name] = "/".join(parts[:2])
    return instances


Figures = dict[str, dict[str, dict[str, float]]]
"""Set, then name of the figure, then query: its value."""


def alike(names: list[str]) -> dict[str, set[str]]:
    """The photos of the same instance, itself among them, of every photo that queries."""
    instances = truth(names)
    members: dict[str, set[str]] = {}
    for name, instance in instances.items():
        members.setdefault(instance, set()).add(name)
    return {name: members[instance] for name, instance in instances.items()}


def note(figures: Figures, name: str, ranking: list[str], same: set[str]) -> None:
    """Add the figures of one query."""
    group = figures.setdefault(name.split("/", maxsplit=1)[0], {})
    group.setdefault("mAP", {})[name] = average_precision(ranking, same - {name}, {name})
    if name.startswith("ukbench"):
        group.setdefault("N-S", {})[name] = ns_score(ranking, same)


class Without:
    """A collection without one image: what a photo reaches with itself says nothing of how it finds others."""

    def __init__(self, collection: AnswerSource, key: int) -> None:
        self._collection = collection
        self._key = key

    def neighbours(self, descriptors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        keys, similarities = self._collection.neighbours(descriptors, k)
        return np.where(keys >> ORDINAL_BITS == self._key, -1, keys), similarities

    def similar(self, descriptor: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        keys, similarities = self._collection.similar(descriptor, k)
        return keys[keys != self._key], similarities[keys != self._key]

    def candidates(self, image_keys: np.ndarray) -> dict[int, Candidate]:
        return self._collection.candidates(image_keys)

    def named(self, image_keys: np.ndarray) -> dict[int, Named]:
        return self._collection.named(image_keys)


class Stored:
    """Photos in a collection of Milvus, under an index; a `AnswerSource`."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    def neighbours(self, descriptors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self.store.neighbours(descriptors, k)

    def similar(self, descriptor: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self.store.similar(descriptor, k)

    def candidates(self, image_keys: np.ndarray) -> dict[int, Candidate]:
        return candidates_of(self.store.stored(image_keys.tolist()))

    def named(self, image_keys: np.ndarray) -> dict[int, Named]:
        return named_of(self.store.named(image_keys.tolist()))


@contextmanager
def stored(
    photos: PhotoSet, model: Fingerprint, most: int, uri: str, profile: Profile, settings: StoreSettings = PATIENT
) -> Iterator[Stored]:
    """The photos in a collection that is dropped afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        server = None if uri else WheelServer(Path(folder))
        try:
            address = uri or (server.uri if server else "")
            with FeatureStore.open(address, "judge", model, settings, max_features=most) as store:
                for start in range(0, len(photos.names), 50):
                    some = slice(start, start + 50)
                    store.write(
                        [(ImageRecord(n), f) for n, f in zip(photos.names[some], photos.features[some], strict=True)]
                    )
                store.build_index(profile)
                status = store.index_status()
                print(
                    f"{status.index} {dict(status.params)} {dict(status.search)}, {status.total_rows} rows", flush=True
                )
                yield Stored(store)
                for name in ("judge_images", "judge_features"):
                    store.connection.client.drop_collection(name)
        finally:
            if server:
                server.kill()


def judge(photos: PhotoSet, collection: AnswerSource, settings: Settings, queries: list[str]) -> Figures:
    """Figures of every query, by set."""
    same = alike(photos.names)
    figures: Figures = {}
    numbers = {name: number for number, name in enumerate(photos.names)}
    for done, name in enumerate(queries, 1):
        query = photos.features[numbers[name]].top(settings.extract.plan.query_features)
        own = image_key(name, "") if isinstance(collection, Stored) else numbers[name]
        found = judge_candidates(query, Without(collection, own), settings.search, settings.verify, Timings())
        ranking = [candidate.image_id for candidate in found.candidates]
        ranking += [image.image_id for image in collection.named(found.rest[:DEEP]).values()]
        # UKBench counts a photo among the four that it should find, and every photo finds itself.
        note(figures, name, [name, *ranking], same[name])
        if done % 200 == 0:
            print(f"  {done} of {len(queries)} queries", flush=True)
    return figures


def means(figures: Figures) -> str:
    return json.dumps(
        {
            group: {name: round(float(np.mean(list(values.values()))), 4) for name, values in named.items()}
            for group, named in figures.items()
        }
    )


def compare(mine: Figures, theirs: Figures, draws: int = 10_000) -> None:
    """Print the mean difference of every figure with the 95 % interval of a paired bootstrap over the queries."""
    random = np.random.default_rng(0)
    for group, named in mine.items():
        for name, values in named.items():
            other = theirs.get(group, {}).get(name, {})
            change = np.array([values[query] - other[query] for query in values if query in other])
            if len(change):
                drawn = change[random.integers(0, len(change), (draws, len(change)))].mean(axis=1)
                low, high = np.quantile(drawn, [0.025, 0.975])
                print(f"  {group} {name}: {change.mean():+.4f} [{low:+.4f}, {high:+.4f}], {len(change)} queries")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--selection", default="model", choices=("model", "attention", "norm"))
    parser.add_argument("--preset", default="standard", choices=("fast", "standard", "paper"))
    parser.add_argument("--stored", type=int, help="features of a stored photo; default: the preset's")
    parser.add_argument("--global-weight", type=float, default=0.25, help="as search.global_weight")
    parser.add_argument("--cache", type=Path, default=Path("runs/judge"))
    parser.add_argument("--quick", action="store_true", help="every fifth query only")
    parser.add_argument("--alone", action="store_true", help="UKBench without distractors only")
    parser.add_argument("--neighbours", default="memory", choices=("memory", "exact", "milvus"))
    parser.add_argument("--profile", default="IVF_PQ", help="of the index, with --neighbours milvus")
    parser.add_argument("--uri", default="", help="of a server, with --neighbours milvus")
    parser.add_argument("--without", nargs="*", default=[], help="sets of distractors to leave out")
    parser.add_argument("--save", type=Path, help="JSON file for the figures of every query")
    parser.add_argument("--against", type=Path, help="such a file of another run, to compare with")
    options = parser.parse_args()
    extract = {"preset": options.preset, "selection": options.selection, "stored_features": options.stored}
    settings = Settings(extract=extract, search={"global_weight": options.global_weight})
    extractor = Extractor(options.model, settings.extract)
    names = ["ukbench"] if options.alone else [name for name in SETS if name not in options.without]
    sets = {name: load_set(name, options.data, extractor, options.cache) for name in names}
    everything = PhotoSet([n for s in sets.values() for n in s.names], [f for s in sets.values() for f in s.features])
    queries = list(truth(everything.names))
    if options.quick:
        queries = queries[::5]

    def opened(photos: PhotoSet) -> AbstractContextManager[AnswerSource]:
        if options.neighbours == "milvus":
            most = extractor.plan.stored_features
            return stored(photos, extractor.fingerprint, most, options.uri, options.profile)
        exact = options.neighbours == "exact"
        return nullcontext(MemoryCollection(photos.names, photos.features, exact=exact))

    with opened(sets["ukbench"]) as collection:
        alone = judge(sets["ukbench"], collection, settings, [q for q in queries if q.startswith("ukbench")])
    print("ukbench alone:", means(alone), flush=True)
    runs = {"alone": alone}
    if not options.alone:
        with opened(everything) as collection:
            runs["with distractors"] = judge(everything, collection, settings, queries)
        print("with distractors:", means(runs["with distractors"]), flush=True)
    if options.save:
        options.save.write_text(json.dumps(runs))
    if options.against:
        theirs = json.loads(options.against.read_text())
        for run, figures in runs.items():
            print(f"difference, {run}, mean and 95 % interval:")
            compare(figures, theirs.get(run, {}))


if __name__ == "__main__":
    main()
