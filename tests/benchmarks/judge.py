"""Judge a model by retrieval: all sets in one collection, exact-like search, the package's own vote and verification.

    python tests/benchmarks/judge.py --data ../shared/data --model model.safetensors --selection attention

Prints UKBench's N-S (alone, and with every other photo as a distractor) and mean average precision for UKBench, the
judging places of landmarks and the three multi-view scenes, each with everything else as distractors. Features are
kept in --cache, so that a second run with other retrieval settings takes minutes.

The neighbours come from faiss (a dependency of the embedded database): IVF with so many lists visited that its loss
is below what these sets can resolve, which keeps the index's quantisation out of a comparison of models.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from delf_milvus.evaluation.metrics import average_precision, ns_score
from delf_milvus.features import ORDINAL_BITS, Features
from delf_milvus.imaging.decode import decode
from delf_milvus.model.extractor import Extractor
from delf_milvus.retrieval.search import Candidate, Judgement, Timings, judge_candidates
from delf_milvus.settings import DecodeSettings, Settings

SETS = ("ukbench", "landmarks", "multiview", "churches", "objects")
PLACES = Path(__file__).parents[2] / "delf_milvus/evaluation/judging_places.txt"


@dataclass
class Collection:
    """Features of many photos, concatenated; photo i owns rows starts[i] to starts[i + 1]."""

    names: list[str]
    sizes: np.ndarray
    starts: np.ndarray
    locations: np.ndarray
    scales: np.ndarray
    attention: np.ndarray
    descriptors: np.ndarray

    def features(self, photo: int) -> Features:
        rows = slice(self.starts[photo], self.starts[photo + 1])
        width, height = self.sizes[photo]
        return Features(
            self.locations[rows],
            self.scales[rows],
            self.attention[rows],
            self.descriptors[rows],
            int(width),
            int(height),
        )

    def part(self, photos: list[int]) -> Collection:
        chosen = [self.features(i) for i in photos]
        return concatenate([self.names[i] for i in photos], chosen)


def concatenate(names: list[str], features: list[Features]) -> Collection:
    return Collection(
        names,
        np.array([(f.width, f.height) for f in features]),
        np.concatenate([[0], np.cumsum([len(f) for f in features])]),
        np.concatenate([f.locations for f in features]),
        np.concatenate([f.scales for f in features]),
        np.concatenate([f.attention for f in features]),
        np.concatenate([f.descriptors for f in features]),
    )


def load_set(name: str, data: Path, extractor: Extractor, cache: Path) -> Collection:
    """Features of one set, extracted once for a fingerprint."""
    path = cache / f"{extractor.fingerprint.short}-{extractor.plan.stored_features}-{name}.npz"
    if path.is_file():
        with np.load(path) as archive:
            return Collection(
                [str(n) for n in archive["names"]],
                *(archive[k] for k in ("sizes", "starts", "locations", "scales", "attention", "descriptors")),
            )
    photos = sorted(p for p in (data / name).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    started = time.perf_counter()
    features = [extractor.extract(decode(p, DecodeSettings()), extractor.plan.stored_features) for p in photos]
    print(f"{name}: {len(photos)} photos, {(time.perf_counter() - started) / len(photos):.3f} s each", flush=True)
    collection = concatenate([p.relative_to(data).as_posix() for p in photos], features)
    cache.mkdir(parents=True, exist_ok=True)
    np.savez(path, **collection.__dict__)
    return collection


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


class Searcher:
    """The package's search over an in-memory collection."""

    def __init__(self, collection: Collection, settings: Settings) -> None:
        self.collection, self.settings = collection, settings
        counts = np.diff(collection.starts)
        photos = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        ordinals = np.arange(len(photos)) - np.repeat(collection.starts[:-1], counts)
        self.keys = photos << ORDINAL_BITS | ordinals
        dim = collection.descriptors.shape[1]
        lists = max(16, min(4096, len(photos) // 400))
        self.index = faiss.index_factory(dim, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        sample = np.random.default_rng(0).permutation(len(photos))[: lists * 60]
        self.index.train(collection.descriptors[np.sort(sample)])
        self.index.add(collection.descriptors)
        self.index.nprobe = max(8, lists // 32)

    def neighbours(self, descriptors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        similarities, rows = self.index.search(descriptors, k)
        return np.where(rows >= 0, self.keys[rows], -1), similarities

    def candidates(self, image_keys: np.ndarray) -> dict[int, Candidate]:
        names, features = self.collection.names, self.collection.features
        return {photo: Candidate(names[photo], names[photo], features(photo)) for photo in image_keys.tolist()}

    def search(self, query: Features) -> Judgement:
        """Every candidate, in falling score."""
        return judge_candidates(query, self, self.settings.search, self.settings.verify, Timings())


def judge(collection: Collection, settings: Settings, queries: list[str]) -> dict[str, dict[str, float]]:
    """Mean figures by set."""
    searcher = Searcher(collection, settings)
    instances = truth(collection.names)
    members: dict[str, set[str]] = {}
    for name, instance in instances.items():
        members.setdefault(instance, set()).add(name)
    figures: dict[str, dict[str, list[float]]] = {}
    numbers = {name: number for number, name in enumerate(collection.names)}
    for done, name in enumerate(queries, 1):
        query = collection.features(numbers[name]).top(settings.extract.plan.query_features)
        ranking = [candidate.image_id for candidate in searcher.search(query).candidates]
        same = members[instances[name]]
        group = figures.setdefault(name.split("/")[0], {})
        group.setdefault("mAP", []).append(average_precision(ranking, same - {name}, {name}))
        if name.startswith("ukbench"):
            group.setdefault("N-S", []).append(ns_score(ranking, same))
        if done % 200 == 0:
            print(f"  {done} of {len(queries)} queries", flush=True)
    return {group: {k: float(np.mean(v)) for k, v in values.items()} for group, values in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--selection", default="model", choices=("model", "attention", "norm"))
    parser.add_argument("--preset", default="standard", choices=("fast", "standard", "paper"))
    parser.add_argument("--cache", type=Path, default=Path("runs/judge"))
    parser.add_argument("--quick", action="store_true", help="every fifth object of ukbench, no distractors beside")
    options = parser.parse_args()
    settings = Settings(extract={"preset": options.preset, "selection": options.selection})
    extractor = Extractor(options.model, settings.extract)
    sets = {name: load_set(name, options.data, extractor, options.cache) for name in SETS}
    everything = concatenate(
        [n for s in sets.values() for n in s.names], [s.features(i) for s in sets.values() for i in range(len(s.names))]
    )
    queries = list(truth(everything.names))
    if options.quick:
        queries = queries[::5]
    alone = judge(sets["ukbench"], settings, [q for q in queries if q.startswith("ukbench")])
    print("ukbench alone:", json.dumps(alone["ukbench"]), flush=True)
    print("with distractors:", json.dumps(judge(everything, settings, queries)), flush=True)


if __name__ == "__main__":
    main()
