"""Accuracy against bytes: how many features of an image are in the index, which ones, and in how many bits.

    python tests/benchmarks/judge.py --data DATA --model small --neighbours memory   # once: extracts, in runs/judge
    python tests/benchmarks/memory_curve.py --fingerprint 1dbd98fd6a11 --choose      # what the choices were made by
    python tests/benchmarks/memory_curve.py --fingerprint 1dbd98fd6a11               # the curve

A point is a collection of all photos. memory: what a server holds of an image (code, number and key of each indexed
feature, the global descriptor), disk: what it maps or reads (fields and raw vectors of these, the packed features), as
`delf-milvus plan` works them out. Each point has mean average precision on each set, and the difference to full storage
(the first point) with the 95 % interval of a paired bootstrap; a star where that leaves out zero. A query has 500
features; a photo is no answer to itself. --choose judges by the places that are no judging places alone, among the
churches and every fifth of the objects.

The lists and `nprobe` are as the store chooses them; the vectors in them are floats, which leaves out what codes lose.
--codes compares codes of so many bits, by faiss's IVF_PQ. With --server the index is Milvus's own IVF_PQ, filled
through the store, on the test suite's server (Linux x86-64).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import faiss
import numpy as np
from judge import PATIENT, SETS, PhotoSet, read_features, stored
from voting_options import (
    OURS,
    Keys,
    Option,
    Pairs,
    Similarities,
    difference,
    instances_of,
    ranked,
    scored,
    shortlisted,
    voted,
)

from delf_milvus.evaluation.metrics import average_precision
from delf_milvus.features import ORDINAL_BITS, Features, Fingerprint
from delf_milvus.planning.model import PlanRequest, make_plan
from delf_milvus.settings import IndexedChoice
from delf_milvus.store.choosing import spread
from delf_milvus.store.keys import image_key
from delf_milvus.store.profiles import Wishes, lists_for

NPROBE = 32
GLOBAL_DIM = 128
SAMPLE = 64
"""Vectors for each list that an index is trained with."""


@dataclass(frozen=True)
class Point:
    """A way to store, and to search in it.

    indexed: features in the index; compared: packed. m, nbits: of the codes. global_bits: of each component of a
    global descriptor, 32 or 8. candidates, global_weight, k: as `search` in the settings has them.
    """

    indexed: int = 500
    choice: IndexedChoice = "spread"
    m: int = 20
    nbits: int = 8
    compared: int = 500
    global_bits: int = 32
    candidates: int = OURS.candidates
    global_weight: float = OURS.global_weight
    k: int = OURS.k

    @property
    def option(self) -> Option:
        """How a search votes and ranks."""
        return replace(OURS, candidates=self.candidates, global_weight=self.global_weight, k=self.k)

    @property
    def bytes(self) -> tuple[float, float]:
        """Of memory and of disk, an image."""
        wishes = Wishes(m=self.m, nbits=self.nbits)
        plan = make_plan(PlanRequest(10**6, self.compared, indexed=self.indexed, profile="IVF_PQ", wishes=wishes))
        saved = (32 - self.global_bits) / 8 * GLOBAL_DIM
        return (plan["image.memory"] or 0.0) - saved, plan["image.disk"] or 0.0

    def __str__(self) -> str:
        stored = (
            f"{self.indexed:4d} {self.choice:6s} {f'{self.m}x{self.nbits}':5s} {self.compared:4d} {self.global_bits:2d}"
        )
        return f"{stored} {self.candidates:4d} {self.global_weight:4.2f} {self.k:3d}"


FULL = Point(choice="top")
CURVE = (
    FULL,
    Point(81),
    Point(81, "top", compared=81),
    Point(35),
    Point(174),
    Point(81, "top"),
    Point(11),
    Point(1),
    Point(81, compared=200),
)
CODES = (
    Point(81),
    Point(81, m=40),
    Point(105, nbits=4),
    Point(105, m=10),
    Point(97, nbits=5),
    Point(117, m=10, nbits=5),
)


def parsed(text: str) -> Point:
    """A point as in 81:spread:20:8:500, or 81:spread:20:8:500:candidates=300:global_weight=0.5."""
    given = text.split(":")
    named = dict(one.split("=", 1) for one in given if "=" in one)
    indexed, choice, *numbers = (one for one in given if "=" not in one)
    if choice not in ("top", "spread"):
        raise SystemExit(f"{text}: the choice is top or spread")
    plain = Point(int(indexed), choice, *map(int, numbers))  # type: ignore[arg-type]
    return replace(plain, **{name: float(value) if "weight" in name else int(value) for name, value in named.items()})


class Stores:
    """The features of all photos as a collection stores them, the indexed ones first; made once for all points, for
    the order of a small number of spread features is the first part of that of a large one."""

    def __init__(self, photos: PhotoSet, points: Sequence[Point]) -> None:
        self._photos = photos
        self._most = max([point.indexed for point in points if point.choice == "spread"], default=0)
        self._known: dict[tuple[str, int], list[Features]] = {}

    def __getitem__(self, point: Point) -> list[Features]:
        key = point.choice, point.compared
        if key not in self._known:
            some = (features.top(point.compared) for features in self._photos.features)
            self._known[key] = [spread(one, self._most) if point.choice == "spread" else one for one in some]
        return self._known[key]


class Codes:
    """The indexed features in inverted lists of faiss: as floats, or in codes."""

    def __init__(self, features: list[Features], point: Point, codes: bool) -> None:
        counts = np.array([min(len(f), point.indexed) for f in features])
        images = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        self.keys = images << ORDINAL_BITS | np.concatenate([np.arange(n, dtype=np.int64) for n in counts])
        rows = np.concatenate([f.descriptors[: point.indexed] for f in features])
        lists = lists_for(len(rows))
        factory = f"IVF{lists},{f'PQ{point.m}x{point.nbits}' if codes else 'Flat'}"
        self.index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if codes:
            # Less than the defaults, which take minutes.
            self.index.pq.cp.niter, self.index.pq.cp.max_points_per_centroid = 8, 40
        drawn = np.random.default_rng(0).permutation(len(rows))[: SAMPLE * lists]
        self.index.train(rows[np.sort(drawn)])
        self.index.nprobe = NPROBE
        self.index.add(rows)

    def neighbours(self, descriptors: Similarities, k: int) -> tuple[Keys, Similarities]:
        similarities, rows = self.index.search(descriptors, k)
        return np.where(rows >= 0, self.keys[rows], -1), np.where(rows >= 0, similarities, 0)


class OnServer:
    """Milvus's own index; image keys are turned into numbers."""

    def __init__(self, store: object, names: list[str]) -> None:
        self.store = store
        self.numbers = {image_key(name, ""): number for number, name in enumerate(names)}

    def neighbours(self, descriptors: Similarities, k: int) -> tuple[Keys, Similarities]:
        keys, similarities = self.store.neighbours(descriptors, k)  # type: ignore[attr-defined]
        images = np.array([self.numbers.get(one, -1) for one in (keys >> ORDINAL_BITS).ravel().tolist()], np.int64)
        images = images.reshape(keys.shape)
        return np.where(keys >= 0, images << ORDINAL_BITS | (keys & ((1 << ORDINAL_BITS) - 1)), -1), similarities


class Judge:
    """Average precision of all queries, for points that share what they compare."""

    def __init__(self, photos: PhotoSet, choosing: bool, every: int) -> None:
        instances = instances_of(photos.names)
        step = {"ukbench": 5 * every, "landmarks": 2 * every, "multiview": every, "other places": 3 * every}
        wanted = {"other places"} if choosing else set(step) - {"other places"}
        self.names: list[str] = []
        for group in sorted(wanted):
            self.names += [name for name, (g, _) in instances.items() if g == group][:: step[group]]
        self.groups = np.array([instances[name][0] for name in self.names])
        self.photos = photos
        number = {name: i for i, name in enumerate(photos.names)}
        self.queries = [number[name] for name in self.names]
        self.same: dict[str, set[int]] = {}
        for name, (_, instance) in instances.items():
            self.same.setdefault(instance, set()).add(number[name])
        self.instances = instances
        self.sizes = np.array([len(f) for f in photos.features], np.float64)
        self.vectors = {32: np.array([f.global_descriptor for f in photos.features])}
        self.vectors[8] = rounded(self.vectors[32])
        self.pairs: dict[int, Pairs] = {}

    def values(self, collection: Codes | OnServer, point: Point, features: list[Features]) -> np.ndarray:
        pairs = self.pairs.setdefault(point.compared, Pairs(self.photos, features))
        pairs.share = sum(map(len, features)) / sum(min(len(one), point.indexed) for one in features)
        option, vectors = point.option, self.vectors[point.global_bits]
        found = []
        for name, query in zip(self.names, self.queries, strict=True):
            mine = self.photos.features[query].top(option.query_features)
            keys, similarities = collection.neighbours(mine.descriptors, option.k)
            images, scores = scored(option, keys, similarities, self.sizes)
            # As if it were not stored: a photo's match with itself sets a level that no other photo reaches.
            real = (images != query) & (images >= 0)
            alike = np.asarray(vectors @ self.vectors[32][query], np.float64)
            others = np.delete(np.arange(len(self.sizes)), query)
            chosen = shortlisted(option, images[real], scores[real], alike, others, self.sizes)
            order = ranked(option, query, *chosen, voted(option, keys, similarities), pairs)
            right = self.same[self.instances[name][1]] - {query}
            found.append(average_precision(order, right, {query}))
        return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/judge"))
    parser.add_argument("--fingerprint", required=True)
    parser.add_argument("--stored", type=int, default=500)
    parser.add_argument("--choose", action="store_true", help="by the places that judge nothing")
    parser.add_argument("--every", type=int, default=1, help="of the queries, one in so many")
    parser.add_argument("--points", type=parsed, nargs="+", help="as in 81:spread:20:8:500:candidates=300")
    parser.add_argument("--codes", action="store_true", help="vectors are in codes; by default these are left out")
    parser.add_argument("--server", action="store_true", help="the index is that of a Milvus server")
    parser.add_argument("--save", type=Path, help="JSON file for every point's figures of every query")
    options = parser.parse_args()
    options.points = options.points or (CODES if options.codes else CURVE)
    sets = [read_features(options.cache / f"{options.fingerprint}-{options.stored}-{name}.npz") for name in SETS]
    photos = PhotoSet([n for s in sets for n in s.names], [f for s in sets for f in s.features])
    if options.choose:
        photos = without_judging(photos)
    judge = Judge(photos, options.choose, options.every)
    print(f"{len(photos.names)} photos, {len(judge.names)} queries", flush=True)
    print("indexed, choice, code, compared, bits of the global descriptor, candidates, its weight, k: kB of memory, of")
    print("disk; mAP, difference to the first, 95 % interval", flush=True)
    stores = Stores(photos, options.points)
    known: dict[str, np.ndarray] = {}
    for point in options.points:
        started = time.perf_counter()
        known[str(point)] = values = measured(judge, point, stores[point], options.codes, options.server)
        base = known[str(options.points[0])]
        columns = [
            f"{group}: {difference(values[judge.groups == group], base[judge.groups == group])}"
            for group in np.unique(judge.groups)
        ]
        memory, disk = point.bytes
        seconds = time.perf_counter() - started
        print(f"{point}: {memory / 1e3:5.2f} {disk / 1e3:6.1f}  {'  '.join(columns)}  ({seconds:.0f} s)", flush=True)
        if options.save:
            options.save.write_text(json.dumps({name: one.tolist() for name, one in known.items()}))


def measured(judge: Judge, point: Point, features: list[Features], codes: bool, server: bool) -> np.ndarray:
    if not server:
        return judge.values(Codes(features, point, codes), point, features)
    dim, whole = features[0].dim, GLOBAL_DIM
    model = replace(Fingerprint.elsewhere("memory_curve", dim), global_dim=whole)
    settings = PATIENT.model_copy(
        update={
            "indexed_features": point.indexed,
            "indexed_choice": point.choice,
            "m": point.m,
            "nbits": point.nbits,
            "nprobe": NPROBE,
        }
    )
    given = PhotoSet(judge.photos.names, [f.top(point.compared) for f in judge.photos.features])
    with stored(given, model, point.compared, "", "IVF_PQ", settings) as collection:
        return judge.values(OnServer(collection, judge.photos.names), point, features)


def rounded(vectors: Similarities) -> Similarities:
    """Vectors as an index keeps them in a byte a component, between the least and the largest value of each."""
    low, high = vectors.min(axis=0), vectors.max(axis=0)
    step = (high - low) / 255
    return low + step * np.rint((vectors - low) / step)


def without_judging(photos: PhotoSet) -> PhotoSet:
    """Other places, churches and every fifth of the objects."""
    groups = {name: group for name, (group, _) in instances_of(photos.names).items()}
    kept = [
        number
        for number, name in enumerate(photos.names)
        if groups.get(name, name.split("/")[0]) in ("other places", "churches")
        or (name.startswith("objects/") and number % 5 == 0)
    ]
    return PhotoSet([photos.names[i] for i in kept], [photos.features[i] for i in kept])


if __name__ == "__main__":
    main()
