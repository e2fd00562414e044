"""Queries made hard on purpose, with known truth: which changes of a photo does the search survive?

    python tests/benchmarks/hard_queries.py --data ../shared/data --photos 20

Photos of UKBench and of the multi-view scenes (a quarter of them) are changed by a kind and a degree: several in one
query, partly covered, small on an unrelated photo, rescaled, turned, cropped, blurred, compressed, relit. They are
searched in a collection in memory of all UKBench and multi-view photos and the distractors of --with; stored features
are those that judge.py keeps in --cache. Nothing here trains or fits: these photos judge.

One line a kind and degree, figures twice: for answers from the whole collection, which holds the unchanged photo
itself, and for answers without that photo, where another view of the object must be found.

recall@1: share of the queries whose first answer is right. Of a query of several photos each is a query here, and the
    answers that belong to the others do not count, nor do photos of the class that covers or surrounds a photo.
accepted: share whose first answer is right and passes the bar of confidence.
inliers: median of the first right answer.
in place: share of that answer's inliers that lie where the photo is in the query (median).
wrong: share of the queries with an accepted answer that is wrong.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
from judge import load_set, truth

from delf_milvus.evaluation.calibration import class_photos
from delf_milvus.evaluation.memory import MemoryCollection
from delf_milvus.features import Box, Features
from delf_milvus.imaging.decode import RgbImage
from delf_milvus.matcher import PhotoMatcher
from delf_milvus.retrieval.answers import Hit, answer
from delf_milvus.retrieval.search import Timings
from delf_milvus.retrieval.views import joined, views_of
from delf_milvus.settings import MOST_ANSWERS, Settings

FRAME = 640
"""Longest side, pixels, of the photos before they are changed, and of queries in which they lie."""


@dataclass(frozen=True)
class Part:
    """A photo in a query. name: of the photo. box: where it is, x0, y0, x1, y1 in pixels of the query."""

    name: str
    box: Box


@dataclass(frozen=True)
class Query:
    """A query and its truth. photo: (H, W, 3) uint8 RGB. others: folders of what covers or surrounds the parts."""

    photo: RgbImage
    parts: tuple[Part, ...]
    others: frozenset[str] = frozenset()


class Maker:
    """Makes queries from photos by name, always the same ones.

    data: folder of photos. names: photos to change. unrelated: photos, relative to `data`, to cover and surround with.
    """

    def __init__(self, data: Path, names: Sequence[str], unrelated: Sequence[str], matcher: PhotoMatcher) -> None:
        self.data, self.names, self.unrelated = data, list(names), list(unrelated)
        self.matcher = matcher

    def photo(self, name: str) -> RgbImage:
        photo = self.matcher.decode(self.data / name)
        shrink = FRAME / max(photo.shape[:2])
        return resized(photo, shrink) if shrink < 1 else photo

    def make(self, kind: str, degree: float, number: int) -> Query:
        """The query of a kind made of photo `number`."""
        name = self.names[number]
        random = np.random.default_rng([number, list(KINDS).index(kind)])
        if kind == "together":
            return self._together(number, int(degree))
        photo = self.photo(name)
        if kind in ("covered", "on clutter"):
            stranger = self.unrelated[int(random.integers(len(self.unrelated)))]
            other = self.photo(stranger)
            changed, box = (covered if kind == "covered" else on_clutter)(photo, degree, other, random)
            return Query(changed, (Part(name, box),), frozenset({Path(stranger).parent.as_posix()}))
        changed = CHANGES[kind](photo, degree)
        return Query(changed, (Part(name, whole(changed)),))

    def _together(self, number: int, count: int) -> Query:
        """Photos of different objects side by side, in two columns."""
        stride = max(1, len(self.names) // 4)
        names = [self.names[(number + i * stride) % len(self.names)] for i in range(count)]
        width, height = FRAME // 2, FRAME * 3 // 8
        canvas = np.full((height * ((count + 1) // 2), FRAME, 3), 128, np.uint8)
        parts = []
        for i, name in enumerate(names):
            x, y = i % 2 * width, i // 2 * height
            part = cover(self.photo(name), width, height)
            canvas[y : y + height, x : x + width] = part
            parts.append(Part(name, (x, y, x + width, y + height)))
        return Query(canvas, tuple(parts))


def whole(photo: RgbImage) -> Box:
    return 0, 0, photo.shape[1], photo.shape[0]


def resized(photo: RgbImage, factor: float) -> RgbImage:
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    height, width = (max(1, round(side * factor)) for side in photo.shape[:2])
    return np.asarray(cv2.resize(photo, (width, height), interpolation=method), np.uint8)


def cover(photo: RgbImage, width: int, height: int) -> RgbImage:
    """The middle of a photo, resized so that it fills a rectangle."""
    factor = max(width / photo.shape[1], height / photo.shape[0])
    larger = cv2.resize(
        photo,
        (max(width, round(photo.shape[1] * factor)), max(height, round(photo.shape[0] * factor))),
        interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC,
    )
    x, y = (larger.shape[1] - width) // 2, (larger.shape[0] - height) // 2
    return np.asarray(larger[y : y + height, x : x + width], np.uint8)


def covered(photo: RgbImage, share: float, other: RgbImage, random: np.random.Generator) -> tuple[RgbImage, Box]:
    """A rectangle of an unrelated photo over this share of the photo, anywhere."""
    height, width = photo.shape[:2]
    h, w = round(height * share**0.5), round(width * share**0.5)
    x, y = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
    changed = photo.copy()
    changed[y : y + h, x : x + w] = cover(other, w, h)
    return changed, whole(changed)


def on_clutter(photo: RgbImage, share: float, other: RgbImage, random: np.random.Generator) -> tuple[RgbImage, Box]:
    """The photo on an unrelated one that is larger: with a side of this share of the query's."""
    height, width = (round(FRAME * side / max(photo.shape[:2])) for side in photo.shape[:2])
    small = cover(photo, round(width * share), round(height * share))
    h, w = small.shape[:2]
    x, y = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
    changed = cover(other, width, height)
    changed[y : y + h, x : x + w] = small
    return changed, (x, y, x + w, y + h)


def turned(photo: RgbImage, degrees: float) -> RgbImage:
    """Turned, on a canvas that holds all of it; its corners are of the photo's mean colour."""
    height, width = photo.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    cos, sin = abs(turn[0, 0]), abs(turn[0, 1])
    size = round(width * cos + height * sin), round(width * sin + height * cos)
    turn[:, 2] += np.array(size) / 2 - (width / 2, height / 2)
    mean = tuple(photo.reshape(-1, 3).mean(axis=0).tolist())
    return np.asarray(cv2.warpAffine(photo, turn, size, flags=cv2.INTER_CUBIC, borderValue=mean), np.uint8)


def cropped(photo: RgbImage, share: float) -> RgbImage:
    """The middle of the photo, with this share of its area."""
    height, width = photo.shape[:2]
    h, w = round(height * share**0.5), round(width * share**0.5)
    y, x = (height - h) // 2, (width - w) // 2
    return np.ascontiguousarray(photo[y : y + h, x : x + w])


def blurred(photo: RgbImage, sigma: float) -> RgbImage:
    """A Gaussian blur; its standard deviation in pixels of a photo with a longest side of 640."""
    return np.asarray(cv2.GaussianBlur(photo, (0, 0), sigma * max(photo.shape[:2]) / FRAME), np.uint8)


def compressed(photo: RgbImage, quality: float) -> RgbImage:
    """As a JPEG of this quality."""
    _, data = cv2.imencode(".jpg", cv2.cvtColor(photo, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
    return np.asarray(cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), np.uint8)


def relit(photo: RgbImage, gamma: float) -> RgbImage:
    """Darker (gamma above 1) or brighter."""
    return cv2.LUT(photo, np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)).astype(np.uint8)


def tinted(photo: RgbImage, strength: float) -> RgbImage:
    """A colour cast: red stronger and blue weaker by this share, or the reverse."""
    return np.clip(photo * (1 + strength * np.array([1, 0, -1])), 0, 255).astype(np.uint8)


CHANGES: dict[str, Callable[[RgbImage, float], RgbImage]] = {
    "unchanged": lambda photo, _: photo,
    "rescaled": resized,
    "turned": turned,
    "cropped": cropped,
    "blurred": blurred,
    "compressed": compressed,
    "relit": relit,
    "tinted": tinted,
}

KINDS: dict[str, tuple[float, ...]] = {
    "unchanged": (1,),
    "together": (2, 3, 4),
    "covered": (0.1, 0.2, 0.4, 0.6, 0.8),
    "on clutter": (0.2, 0.3, 0.5, 0.7),
    "rescaled": (0.2, 0.5, 2, 5),
    "turned": (10, 20, 45, 90, 180),
    "cropped": (0.5, 0.25, 0.1),
    "blurred": (2, 4, 8),
    "compressed": (10,),
    "relit": (0.4, 2.5),
    "tinted": (0.4, -0.4),
}
"""Degrees: photos in the query; share of the area covered; share of the query's sides; factor; degrees; share of the
area kept; standard deviation in pixels of 640; quality; gamma; share of red and blue."""


@dataclass(frozen=True)
class Answer:
    """How one photo of a query was answered: first right, accepted, inliers and their share in place, of the right one.

    in_place is nan without a right answer.
    """

    right: bool
    accepted: bool
    inliers: int
    in_place: float


def hits_of_views(
    photo: RgbImage, collection: MemoryCollection, matcher: PhotoMatcher, settings: Settings
) -> list[Hit]:
    """All hits of a search, verified or not, by the views that the settings ask for."""
    height, width = photo.shape[:2]
    search = settings.search.model_copy(update={"top": MOST_ANSWERS})
    seen = []
    for view in views_of((0, 0, width, height), parts=search.parts, turned=search.turned):
        query = matcher.query_features(view.cut(photo))
        box = (0.0, 0.0, float(query.width), float(query.height))
        arguments = (query, collection, search, settings.verify, matcher.calibration, Timings())
        seen.append((view, answer(*arguments, query_box=box, include_unverified=not seen)))
    return joined(
        seen, (width, height), max_false_alarm=settings.verify.max_false_alarm, top=MOST_ANSWERS, per_region=0
    )


def answered(hits: list[Hit], part: Part, right: set[str], junk: set[str]) -> Answer:
    """Judge the hits that are not junk."""
    hits = [hit for hit in hits if hit.compared and hit.image_id not in junk]
    first = next((hit for hit in hits if hit.image_id in right), None)
    if first is None:
        return Answer(False, False, 0, np.nan)
    points = first.correspondence.query_points
    x0, y0, x1, y1 = part.box
    inside = ((points >= (x0, y0)) & (points <= (x1, y1))).all(axis=1)
    is_first = first is hits[0]
    share = float(inside.mean()) if len(inside) else np.nan
    return Answer(is_first, is_first and first.verified, first.inliers, share)


def line(kind: str, degree: float, whole_collection: list[Answer], others: list[Answer], wrong: list[bool]) -> str:
    def figures(answers: list[Answer]) -> str:
        places = [a.in_place for a in answers if not np.isnan(a.in_place)]
        in_place = f"{np.median(places):8.0%}" if places else "       -"
        return (
            f"{np.mean([a.right for a in answers]):8.0%} {np.mean([a.accepted for a in answers]):8.0%} "
            f"{np.median([a.inliers for a in answers]):7.0f} {in_place}"
        )

    count = f"{len(whole_collection):7}"
    return f"{kind:<11} {degree:>6g} {count} |{figures(whole_collection)} |{figures(others)} |{np.mean(wrong):6.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--preset", default="standard", choices=("fast", "standard", "paper"))
    parser.add_argument("--cache", type=Path, default=Path("runs/judge"))
    parser.add_argument("--photos", type=int, default=20, help="queries of each kind and degree")
    parser.add_argument("--parts", action="store_true", help="search as `delf-milvus search --parts` does")
    parser.add_argument("--turned", action="store_true", help="search as `delf-milvus search --turned` does")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--with", nargs="*", default=["churches", "landmarks"], dest="distractors", help="distractors")
    options = parser.parse_args()
    views = {"parts": options.parts, "turned": options.turned}
    settings = Settings(model=options.model, extract={"preset": options.preset}, search=views)
    matcher = PhotoMatcher(settings)
    names: list[str] = []
    features: list[Features] = []
    for name in ("ukbench", "multiview", *options.distractors):
        photos = load_set(name, options.data, matcher.extractor, options.cache)
        names += photos.names
        features += photos.features
    collection = MemoryCollection(names, features)
    instances = truth(names)
    members = defaultdict(set)
    for name, instance in instances.items():
        members[instance].add(name)

    def spread(group: str, count: int) -> list[str]:
        some = [name for name in names if name.startswith(group + "/")]
        return [some[i] for i in np.linspace(0, len(some) - 1, count + 2)[1:-1].astype(int)]

    few = options.photos // 4
    chosen = spread("ukbench", options.photos - few) + spread("multiview", few)
    unrelated = [
        path.relative_to(options.data).as_posix()
        for photos in class_photos(options.data / "objects")
        for path in photos
    ]
    maker = Maker(options.data, chosen, unrelated, matcher)
    print(
        f"{len(names)} photos in the collection, preset {options.preset}, bar {1 - settings.verify.max_false_alarm:g}"
    )
    columns = "recall@1 accepted inliers in place"
    print(f"{'kind':<11} degree queries |{columns} |{columns} | wrong")
    for kind in options.kinds:
        for degree in KINDS[kind]:
            answers: list[Answer] = []
            without: list[Answer] = []
            wrong: list[bool] = []
            for number in range(len(chosen)):
                made = maker.make(kind, degree, number)
                hits = hits_of_views(made.photo, collection, matcher, settings)
                strangers = {name for name in names if Path(name).parent.as_posix() in made.others}
                shown = {part.name: members[instances[part.name]] for part in made.parts}
                for part in made.parts:
                    right = shown[part.name]
                    junk = strangers.union(*shown.values()) - right
                    answers.append(answered(hits, part, right, junk))
                    own = {part.name}
                    without.append(answered(hits, part, right - own, junk | own))
                known = strangers.union(*shown.values())
                wrong.append(any(hit.verified and hit.image_id not in known for hit in hits))
            print(line(kind, degree, answers, without, wrong), flush=True)


if __name__ == "__main__":
    main()
