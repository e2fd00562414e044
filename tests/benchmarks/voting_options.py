"""What each choice in voting, in the number of candidates and in the final score is worth, on several sets.

    python tests/benchmarks/judge.py --data ../shared/data          # once: extracts, and keeps features in runs/judge
    python tests/benchmarks/voting_options.py --cache runs/judge --fingerprint 525136ab99de --stored 500

All photos of the cache are one collection. Queries: every fifth photo of UKBench, every second of the judging places,
the multi-view scenes whole, and, to choose by, every third photo of the other places. For every option its mean average
precision on each set, and the difference to the package's own choice with the 95 % interval of a paired bootstrap; a
star where the interval leaves out zero. Neighbours are searched once, and each pair of photos is matched and verified
once, so that an option costs seconds. A photo is no answer to itself, as if it were not stored.

--parts votes: the images ranked by votes alone. combined: votes, global descriptors and inliers for the candidates, as
a search ranks them, and the rest without inliers.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from judge import SETS, PhotoSet, read_features, truth
from numpy.typing import NDArray

from delf_milvus.evaluation.memory import MemoryCollection
from delf_milvus.evaluation.metrics import average_precision
from delf_milvus.features import ORDINAL_BITS, Features
from delf_milvus.matcher import PhotoMatcher
from delf_milvus.retrieval.evidence import evidence
from delf_milvus.retrieval.matching import match_many
from delf_milvus.retrieval.ranking import INLIER_LEVEL, combined_scores, relative
from delf_milvus.retrieval.search import keypoints
from delf_milvus.retrieval.shortlist import shortlist
from delf_milvus.retrieval.verification import verify_many
from delf_milvus.retrieval.voting import Votes, match_and_recount, vote
from delf_milvus.settings import Settings

SETTINGS = Settings()
CALIBRATION = PhotoMatcher(SETTINGS).calibration
MOST = 240
Floats = NDArray[np.float64]
Keys = NDArray[np.int64]
Similarities = NDArray[np.float32]
Rank = Callable[..., list[int]]
"""Makes a ranking of an option, the query, images, scores, what global descriptors add, and votes."""


@dataclass(frozen=True)
class Option:
    """One way to vote and to rank; the defaults are the package's.

    hits: "best" of each (query feature, image), or "all". weight: "above" the K-th neighbour, "similarity", or "one".
    power: of the weight. burst: power of the number of hits of a feature in an image by which the weight is divided.
    idf: power of the logarithm of how few images a feature's hits lie in.
    size: power of an image's feature count by which its score is divided.
    inliers: what geometry adds. best: how many of the largest values each term is divided by the mean of.
    least: what the inliers are divided by at least.
    bar: false-alarm level up to which a candidate comes before all others, as a search shows them.
    global_weight: of the global descriptors. similar: images that are found by them.
    again: whether the candidates' votes are counted again over all of their features; with the package's weights only.
    """

    name: str
    hits: str = "best"
    weight: str = "above"
    power: float = 1.0
    burst: float = 0.5
    idf: float = 0.0
    size: float = 0.0
    k: int = SETTINGS.search.neighbours
    query_features: int = SETTINGS.extract.plan.query_features
    candidates: int = SETTINGS.search.candidates
    inlier_weight: float = SETTINGS.search.inlier_weight
    inliers: str = "count"
    best: int = 5
    bar: float = 0.0
    least: float = INLIER_LEVEL
    global_weight: float = SETTINGS.search.global_weight
    similar: int = SETTINGS.search.similar_images
    again: bool = True

    @property
    def counts_again(self) -> bool:
        """Whether the votes are the package's, which alone can be counted again."""
        own = self.hits, self.weight, self.power, self.burst, self.idf, self.size
        return self.again and own == (OURS.hits, OURS.weight, OURS.power, OURS.burst, OURS.idf, OURS.size)


OURS = Option("the package's")

VOTES = [
    Option("plain count of hits", hits="all", weight="one", burst=0),
    Option("one vote per (feature, image)", weight="one", burst=0),
    Option("one vote, K 60", weight="one", burst=0, k=60),
    Option("best similarity", weight="similarity", burst=0),
    Option("above K-th, no burst damping", burst=0),
    Option("above K-th, all hits added", hits="all", burst=0),
    Option("divided by hits", burst=1.0),
    Option("weight^1.5", power=1.5),
    Option("weight^2", power=2.0),
    Option("weight^3", power=3.0),
    Option("weight^0.5", power=0.5),
    Option("idf of distinct images", idf=1.0),
    Option("divided by sqrt(image features)", size=0.5),
    Option("divided by image features", size=1.0),
    Option("K 60", k=60),
    Option("K 240", k=240),
    Option("K 240, weight^2", k=240, power=2.0),
    Option("200 query features", query_features=200),
    Option("300 query features", query_features=300),
]

COMBINED = [
    Option("votes of the candidates not counted again", again=False),
    *(Option(f"global weight {w}", global_weight=w) for w in (0, 0.15, 0.35, 0.5, 1.0)),
    *(Option(f"{n} images by global descriptor", similar=n) for n in (100, 300, 3000)),
    Option("K 60", k=60),
    Option("K 240", k=240),
    Option("200 query features", query_features=200),
    Option("300 query features", query_features=300),
    Option("weight^1.5", power=1.5),
    Option("weight^2", power=2.0),
    Option("divided by sqrt(image features)", size=0.5),
    Option("50 candidates", candidates=50),
    Option("200 candidates", candidates=200),
    Option("votes alone, of the candidates", inlier_weight=0.0),
    Option("inliers alone (ties: votes)", inlier_weight=1e6),
    *(Option(f"inlier weight {w}", inlier_weight=w) for w in (0.25, 0.5, 1.0, 1.5, 2.5)),
    Option("mean over the best 1", best=1),
    Option("mean over the best 10", best=10),
    *(Option(f"level of the inliers at least {f}", least=f) for f in (0, 15, 25, 80)),
    Option("logarithm of inliers", inliers="log"),
    Option("square of inliers", inliers="square"),
    Option("similarities of the inliers added", inliers="similar"),
    Option("inliers squared over putatives", inliers="ratio"),
    *(Option(f"inliers above chance, weight {w}", inliers="excess", inlier_weight=w) for w in (0.25, 0.5, 0.75, 1.0)),
    *(Option(f"-log false alarm, weight {w}", inliers="alarm", inlier_weight=w) for w in (0.25, 0.5, 0.75, 1.0)),
    *(Option(f"confidence, weight {w}", inliers="confidence", inlier_weight=w) for w in (0.25, 0.5, 0.75, 1.0)),
    *(Option(f"verified at {b} first", bar=b) for b in (0.1, 0.01, 0.001)),
    *(Option(f"verified at 0.01 first, inlier weight {w}", bar=0.01, inlier_weight=w) for w in (0.0, 0.25, 0.5)),
    *(Option(f"verified at 0.001 first, inlier weight {w}", bar=0.001, inlier_weight=w) for w in (0.0, 0.25, 0.5)),
    Option("K 240, weight^2", k=240, power=2.0),
    Option("K 240, weight^1.5", k=240, power=1.5),
    Option("idf of distinct images", idf=1.0),
    Option("idf of distinct images, K 240", idf=1.0, k=240),
]


def scored(option: Option, keys: Keys, similarities: Similarities, sizes: Floats) -> tuple[Keys, Floats]:
    """Images and scores, falling, by a plain numpy writing of the option."""
    keys, similarities = keys[: option.query_features, : option.k], similarities[: option.query_features, : option.k]
    background = similarities.min(axis=1)
    query = np.repeat(np.arange(len(keys)), keys.shape[1])
    image, similarity = (keys >> ORDINAL_BITS).ravel(), similarities.ravel().astype(np.float64)
    weight = {
        "above": similarity - background[query],
        "similarity": similarity,
        "one": np.ones(len(similarity)),
    }[option.weight] ** option.power
    pair = query * (image.max() + 1) + image
    unique, inverse, count = np.unique(pair, return_inverse=True, return_counts=True)
    if option.hits == "best":
        total = np.zeros(len(unique))
        np.maximum.at(total, inverse, weight)
    else:
        total = np.bincount(inverse, weight)
    total = total / count**option.burst
    of_query, of_image = unique // (image.max() + 1), unique % (image.max() + 1)
    if option.idf:
        distinct = np.bincount(of_query, minlength=len(keys))
        total = total * np.log1p(keys.shape[1] / distinct[of_query]) ** option.idf
    images, inverse = np.unique(of_image, return_inverse=True)
    scores = np.bincount(inverse, total) / sizes[images] ** option.size
    order = np.argsort(-scores, kind="stable")
    return images[order], scores[order]


def shortlisted(
    option: Option, images: Keys, scores: Floats, alike: Floats, others: Keys, sizes: Floats
) -> tuple[Keys, Floats, Floats]:
    """Images, scores with the global descriptors, and what these add, by a plain numpy writing.

    images, scores: by votes. alike: similarity of every image's global descriptor to the query's. others: the images
    that are stored.
    """
    nearest = others[np.argsort(-alike[others], kind="stable")[: option.similar]]
    whole = np.zeros(len(sizes))
    whole[nearest] = np.maximum(alike[nearest] - max(alike[nearest].min(), 0), 0)
    votes = np.zeros(len(sizes))
    votes[images] = scores
    whole = option.global_weight * relative(whole, option.best)
    total = relative(votes, option.best) + whole
    chosen = np.union1d(images, nearest) if option.global_weight else images
    chosen = chosen[np.lexsort((chosen, -total[chosen]))]
    return chosen, total[chosen], whole[chosen]


def voted(option: Option, keys: Keys, similarities: Similarities) -> Votes:
    """The package's votes for an option's numbers of query features and neighbours."""
    return vote(keys[: option.query_features, : option.k], similarities[: option.query_features, : option.k])


class Pairs:
    """Matches and inliers of pairs of photos, each computed once. stored: features that the photos are stored with,
    where these are not the same. share: of these, for each one in the index."""

    def __init__(self, photos: PhotoSet, stored: Sequence[Features] = (), share: float = 1.0) -> None:
        self.photos = photos
        self.share = share
        self.stored = stored or photos.features
        self.known: dict[tuple[int, int, int], Floats] = {}

    def __call__(self, query: int, features: int, images: list[int]) -> Floats:
        """(N, 3 + columns of evidence): inliers, putatives, the sum of the inliers' similarities, and the evidence."""
        new = [i for i in images if (query, features, i) not in self.known]
        if new:
            mine = self.photos.features[query].top(features)
            others = [self.stored[i] for i in new]
            matches = match_many(mine.descriptors, [o.descriptors for o in others], SETTINGS.verify.similarity)
            found = verify_many(
                keypoints(mine),
                [keypoints(o) for o in others],
                matches,
                residual=SETTINGS.verify.residual,
                min_inliers=SETTINGS.verify.min_inliers,
            )
            columns = evidence(keypoints(mine), matches, found)
            for i, m, v, row in zip(new, matches, found, columns, strict=True):
                self.known[query, features, i] = np.array(
                    [v.inliers, len(m.query), m.similarity[v.mask].sum(), *row], np.float64
                )
        return np.array([self.known[query, features, i] for i in images])


def ranked(
    option: Option, query: int, images: Keys, scores: Floats, whole: Floats, votes: Votes, pairs: Pairs
) -> list[int]:
    """The candidates in the order of the combined score. votes: the package's, of the same neighbours."""
    some = images[: option.candidates]
    shortlisted = scores[: option.candidates]
    if option.counts_again:
        mine = pairs.photos.features[query].top(option.query_features)
        descriptors = [pairs.stored[i].descriptors for i in some]
        known = some, descriptors, SETTINGS.verify.similarity, votes, pairs.share
        again = match_and_recount(mine.descriptors, *known)[1]
        shortlisted = relative(again, option.best) + whole[: option.candidates]
    proof = pairs(query, option.query_features, some.tolist())
    inliers, putatives, similar = proof[:, :3].T
    sure = CALIBRATION.assess(proof[:, 3:])
    term = {
        "count": inliers,
        "log": np.log1p(inliers),
        "square": inliers**2,
        "similar": similar,
        "ratio": inliers**2 / np.maximum(putatives, 1),
        "excess": np.maximum(inliers - np.quantile(inliers, 0.75), 0),
        "alarm": -np.log(sure.false_alarm),
        "confidence": sure.confidence,
    }[option.inliers]
    least = option.least if option.inliers == "count" else 0.0
    total = combined_scores(shortlisted, term, option.inlier_weight, option.best, least)
    order = some[np.lexsort((-total, sure.false_alarm > option.bar))]
    return [int(i) for i in np.concatenate([order, images[option.candidates :]])]


def instances_of(names: list[str]) -> dict[str, tuple[str, str]]:
    """Set and instance of every photo that has one."""
    found = {name: (name.split("/")[0], instance) for name, instance in truth(names).items()}
    for name in names:
        if name.startswith("landmarks/") and name not in found:
            found[name] = ("other places", "/".join(name.split("/")[:2]))
    return found


def queries_of(instances: dict[str, tuple[str, str]]) -> list[str]:
    every = {"ukbench": 5, "landmarks": 2, "multiview": 1, "other places": 3}
    chosen: list[str] = []
    for group, step in every.items():
        chosen += [name for name, (g, _) in instances.items() if g == group][::step]
    return chosen


def searched(path: Path, photos: PhotoSet, queries: list[int], features: int) -> tuple[Keys, Similarities]:
    """Neighbours of every query, (N, Q, MOST), kept beside the features."""
    if not path.is_file():
        collection = MemoryCollection(photos.names, photos.features)
        keys = np.full((len(queries), features, MOST), -1, np.int64)
        similarities = np.zeros((len(queries), features, MOST), np.float32)
        started = time.perf_counter()
        for row, number in enumerate(queries):
            mine = photos.features[number].top(features)
            found = collection.neighbours(mine.descriptors, MOST)
            keys[row, : len(mine)], similarities[row, : len(mine)] = found
        print(f"{len(queries)} queries searched in {time.perf_counter() - started:.0f} s", flush=True)
        np.savez(path, keys=keys, similarities=similarities)
    with np.load(path) as archive:
        return archive["keys"], archive["similarities"]


def difference(mine: Floats, base: Floats, draws: int = 5000) -> str:
    change = mine - base
    drawn = change[np.random.default_rng(0).integers(0, len(change), (draws, len(change)))].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    star = "*" if low > 0 or high < 0 else " "
    return f"{mine.mean():.4f} {change.mean():+.4f}{star}[{low:+.4f} {high:+.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/judge"))
    parser.add_argument("--fingerprint", required=True)
    parser.add_argument("--stored", type=int, default=500)
    parser.add_argument("--parts", nargs="*", default=["votes", "combined"], choices=("votes", "combined"))
    parser.add_argument("--only", default="", help="options whose name has this in it")
    options = parser.parse_args()
    prefix = f"{options.fingerprint}-{options.stored}"
    sets = [read_features(options.cache / f"{prefix}-{name}.npz") for name in SETS]
    photos = PhotoSet([n for s in sets for n in s.names], [f for s in sets for f in s.features])
    instances = instances_of(photos.names)
    number = {name: i for i, name in enumerate(photos.names)}
    names = queries_of(instances)
    queries = [number[name] for name in names]
    groups = np.array([instances[name][0] for name in names])
    same: dict[str, set[int]] = {}
    for name, (_, instance) in instances.items():
        same.setdefault(instance, set()).add(number[name])
    all_keys, all_similarities = searched(
        options.cache / f"{prefix}-neighbours.npz", photos, queries, OURS.query_features
    )
    sizes = np.array([len(f) for f in photos.features], np.float64)
    vectors = np.array([f.global_descriptor for f in photos.features])
    pairs = Pairs(photos)

    def measured(option: Option, rank: Rank) -> Floats:
        values = []
        for row, query in enumerate(queries):
            used = int((all_keys[row, :, 0] >= 0).sum())
            images, scores = scored(option, all_keys[row, :used], all_similarities[row, :used], sizes)
            # As if it were not stored: a photo's match with itself sets a level that no other photo reaches.
            images, scores = images[images != query], scores[images != query]
            votes = voted(option, all_keys[row, :used], all_similarities[row, :used])
            order = rank(option, query, *shortlisted(option, images, scores, alike[row], others[row], sizes), votes)
            right = same[instances[names[row]][1]] - {query}
            values.append(average_precision(order, right, {query}))
        return np.array(values)

    used = int((all_keys[0, :, 0] >= 0).sum())
    base = vote(all_keys[0, :used, : OURS.k], all_similarities[0, :used, : OURS.k])
    images, scores = scored(OURS, all_keys[0, :used], all_similarities[0, :used], sizes)
    if not (np.array_equal(images, base.images) and np.allclose(scores, base.scores)):
        raise SystemExit("the plain writing of the package's vote differs from the package's")

    alike = [np.asarray(vectors @ vectors[query], np.float64) for query in queries]
    others = [np.delete(np.arange(len(photos.names)), query) for query in queries]
    plain = shortlisted(OURS, base.images, base.scores, alike[0], np.arange(len(photos.names)), sizes)
    near = np.argsort(-alike[0], kind="stable")[: OURS.similar]
    package = shortlist(base, near, alike[0][near].astype(np.float32), OURS.global_weight)
    if not np.allclose(plain[1], package.scores, atol=1e-6):
        raise SystemExit("the plain writing of the package's shortlist differs from the package's")

    parts: dict[str, tuple[list[Option], Rank]] = {
        "votes": ([replace(one, global_weight=0.0) for one in VOTES], lambda _, __, images, *___: images.tolist()),
        "combined": (COMBINED, lambda *arguments: ranked(*arguments, pairs)),
    }
    for part in options.parts:
        choices, rank = parts[part]
        print(f"{part}: mAP, difference to the package's, 95 % interval; {len(queries)} queries")
        base_option = replace(OURS, global_weight=0.0) if part == "votes" else OURS
        ours = measured(base_option, rank)
        for option in [base_option, *(choice for choice in choices if options.only in choice.name)]:
            values = ours if option is base_option else measured(option, rank)
            columns = [
                f"{group}: {difference(values[groups == group], ours[groups == group])}" for group in np.unique(groups)
            ]
            print(f"{option.name:<34} " + "  ".join(columns), flush=True)


if __name__ == "__main__":
    main()
