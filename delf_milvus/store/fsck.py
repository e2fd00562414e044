"""Finds, and mends, what does not fit together in the two collections.

One pass over both collections in the order of their keys, joined image by image; memory holds one page of each and the
findings. Nobody may write meanwhile: what an ingest has half written looks like damage.

Which one is the truth: the feature rows are, because the packed text was made of them and is rounded. Only where the
rows are no features (not finite, not of unit norm, not in falling attention) they are written anew from the text. Of
an image that has more features than its collection indexes, the others are in the text alone: where that is unreadable
they are lost.

Keys are spread evenly, being hashes, so a page is a range of them: pymilvus's iterators ask some things without any
time limit. Milvus Lite walks all keys on every query, so there it is keys in few large ranges, and the rows by key.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from delf_milvus.features import MAX_FEATURES, ORDINAL_BITS, Features
from delf_milvus.store import records
from delf_milvus.store.codec import rounding_differences, unpack
from delf_milvus.store.columns import METADATA, write_columns
from delf_milvus.store.connection import Connection
from delf_milvus.store.keys import IMAGE_KEY_BITS, feature_keys, image_key
from delf_milvus.store.records import Row
from delf_milvus.store.schema import GLOBAL, CollectionFacts, keypoint_fields

REMEDIES = {
    "orphan_features": "features without an image row: --repair deletes them",
    "lost_features": "images that lost features: --repair deletes the image, ingest it again",
    "surplus_features": "features beyond the image's count: --repair deletes them",
    "stale_fields": "features whose declared fields are not the image's: --repair copies the image's",
    "misfiled_features": "features whose image_key is not that of their key: --repair rewrites them",
    "damaged_features": "feature rows that are no features: --repair rewrites them from the packed ones",
    "packed_geometry": "packed features that differ from the rows: --repair packs the rows again",
    "duplicate_keys": "rows that share a primary key: --repair leaves one of each",
    "wrong_key": "images whose key is not that of their id: --repair deletes them, ingest them again",
    "other_model": "images of another model: --repair deletes them, ingest them again",
}
"""Kinds of findings, each with what it is and what `repair` does."""

_ARRAYS = ("locations", "scales", "attention", "descriptors")
_DROPS = frozenset(("lost_features", "wrong_key", "other_model"))
_PAGE_BYTES = 8_000_000
_PAGE_ROWS = 10_000
_IMAGES = 200
_RANGE = 200_000
_KEYS = 2048
_PAST = 1 << 63
_STRONG = "Strong"
_SESSION = "Session"


@dataclass(frozen=True)
class Finding:
    """One kind of damage of one image.

    kind: a key of `REMEDIES`. image_id: "" where there is no image row. rows: rows concerned. what: one phrase.
    mended: whether it is gone after the repair.
    """

    kind: str
    image_key: int
    image_id: str
    rows: int
    what: str
    mended: bool = False


@dataclass
class FsckReport:
    """What was looked at and what was found. images, features: rows read, each primary key once."""

    images: int = 0
    features: int = 0
    findings: list[Finding] = field(default_factory=list)
    repaired: bool = False
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong now: nothing was found, or all of it is mended."""
        return all(finding.mended for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The fields of `--json`."""
        return {**asdict(self), "clean": self.clean}


Progress = Callable[[int, int], None]
"""Called with the rows read so far and the rows there are."""


class _Damage(NamedTuple):
    kind: str
    rows: int
    what: str


class Fsck:
    """A check of one pair of collections. `features`, `images`: their names. facts: what they were made for."""

    def __init__(self, database: Connection, features: str, images: str, facts: CollectionFacts) -> None:
        self._db = database
        self._features = features
        self._images = images
        self._facts = facts
        self._names = [one.name for one in facts.declared]
        self._feature_fields = tuple(one.name for one in facts.features.fields if not one.primary)
        self._image_fields = (*records.RECORD_FIELDS, *self._names, *keypoint_fields(facts.chunks))

    def run(self, repair: bool, progress: Progress | None = None) -> FsckReport:
        """Read everything, and with `repair` mend what is found. Raises DatabaseError."""
        started = time.monotonic()
        report = FsckReport(repaired=repair)
        # These wait for everything that was written before; nobody writes after, so later reads need not wait.
        totals = {name: self._count(name, consistency=_STRONG) for name in (self._images, self._features)}
        damaged: dict[int, tuple[str, list[_Damage]]] = {}
        for key, image, rows in self._joined(totals):
            report.images += image is not None
            report.features += len(rows)
            found = self._examine(key, image, rows)
            if found:
                damaged[key] = (_name(image), found)
            if progress is not None:
                progress(report.images + report.features, sum(totals.values()))
        twice: dict[str, list[int]] = {}
        for name, primary, seen in (
            (self._images, "image_key", report.images),
            (self._features, "feature_key", report.features),
        ):
            if self._db.backend == "server" and self._count(name) > seen:
                twice[name] = self._duplicates(name, primary)
        if repair:
            for name, keys in twice.items():
                self._single(name, keys)
            for key in damaged:
                self._mend(key)
            # Without waiting, a server shows what was deleted for a moment more, even to who deleted it.
            for name in totals:
                self._count(name, consistency=_STRONG)
        for name, keys in twice.items():
            mended = repair and self._occurrences(name, keys) == len(keys)
            shift = 0 if name == self._images else ORDINAL_BITS
            owners, counts = np.unique(np.array(keys, np.int64) >> shift, return_counts=True)
            report.findings += [
                Finding("duplicate_keys", owner, "", count, f"stored more than once in {name}", mended)
                for owner, count in zip(owners.tolist(), counts.tolist(), strict=True)
            ]
        for key, (image_id, found) in damaged.items():
            mended = repair and not self._examine(key, *self._read(key))
            report.findings += [Finding(one.kind, key, image_id, one.rows, one.what, mended) for one in found]
        report.seconds = time.monotonic() - started
        return report

    def _examine(self, key: int, image: Row | None, rows: list[Row]) -> list[_Damage]:
        """What is wrong with one image. rows: all its features, in the order of their keys."""
        if image is None:
            return [_Damage("orphan_features", len(rows), "no image row")] if rows else []
        count = int(image["feature_count"])
        tenant = str(image[self._facts.tenant_field]) if self._facts.tenant_field else ""
        if image_key(image["image_id"], tenant) != key:
            return [_Damage("wrong_key", 1 + len(rows), "the key is not that of the id")]
        if image["model"] != self._facts.fingerprint.short:
            model = f"model {image['model']}, the collection has {self._facts.fingerprint.short}"
            return [_Damage("other_model", 1 + len(rows), model)]
        ours = [row for row in rows if _ordinal(row) < count]
        if len(ours) < count:
            return [_Damage("lost_features", count - len(ours), f"{len(ours)} of {count} features")]
        found = []
        if len(rows) > count:
            found.append(_Damage("surplus_features", len(rows) - count, f"{len(rows)} rows, {count} features"))
        misfiled = sum(int(row["image_key"]) != key for row in ours)
        if misfiled:
            found.append(_Damage("misfiled_features", misfiled, "image_key differs from the key"))
        stale = sum(any(row[name] != image[name] for name in self._names) for row in ours)
        if stale:
            found.append(_Damage("stale_fields", stale, f"{', '.join(self._names)} differ from the image's"))
        compared = self._compared(self._of_rows(image, ours), self._of_text(image), count)
        return [*found, *compared] if all(one.kind not in _DROPS for one in compared) else compared

    def _compared(self, exact: Features | str, packed: Features | str, count: int) -> list[_Damage]:
        """What is wrong with the `count` features of the rows or with the packed ones, each given as they are or why
        they are none."""
        fits = isinstance(packed, Features) and self._facts.rows_of(len(packed)) == count
        if isinstance(exact, str):
            if fits:
                return [_Damage("damaged_features", count, exact)]
            return [_Damage("lost_features", count, f"neither the rows nor the packed features are sound: {exact}")]
        if isinstance(packed, str):
            differing = [packed]
        else:
            differing = rounding_differences(packed.top(count) if fits else packed, exact)
        if not differing:
            return []
        if self._whole(exact, packed) is None:
            return [_Damage("lost_features", 1, f"those that only the packed ones have: {'; '.join(differing)}")]
        return [_Damage("packed_geometry", 1, "; ".join(differing))]

    def _of_rows(self, image: Row, rows: list[Row]) -> Features | str:
        """The features that the rows say, or why they are none."""
        try:
            return Features(
                np.array([[row["x"], row["y"]] for row in rows], np.float32).reshape(len(rows), 2),
                np.array([row["scale"] for row in rows], np.float32),
                np.array([row["attention"] for row in rows], np.float32),
                np.array([row["descriptor"] for row in rows], np.float32).reshape(-1, self._facts.fingerprint.dim),
                int(image["width"]),
                int(image["height"]),
            )
        except ValueError as error:
            return f"the rows are no features ({error})"

    def _of_text(self, image: Row) -> Features | str:
        """The features that are packed in the image's row, or why they are none."""
        try:
            return unpack("".join(image[name] for name in keypoint_fields(self._facts.chunks)))
        except ValueError as error:
            return f"unreadable ({error})"

    def _whole(self, exact: Features, packed: Features | str) -> Features | None:
        """All features of an image, the rows' and, where there may be more, those that are in the text alone; None
        where these are lost."""
        if len(exact) != self._facts.indexed:
            return exact
        if isinstance(packed, str) or len(packed) < len(exact):
            return None
        parts = {name: np.concatenate([getattr(exact, name), getattr(packed, name)[len(exact) :]]) for name in _ARRAYS}
        try:
            return Features(**parts, width=exact.width, height=exact.height)
        except ValueError:
            return None

    def _mend(self, key: int) -> None:
        """Read one image again and mend it."""
        image, rows = self._read(key)
        kinds = {one.kind for one in self._examine(key, image, rows)}
        keys = [int(row["feature_key"]) for row in rows]
        if kinds & _DROPS or "orphan_features" in kinds:
            self._delete(self._images, [] if image is None else [key])
            self._delete(self._features, keys)
        elif image is not None:
            count = int(image["feature_count"])
            if "surplus_features" in kinds:
                self._delete(self._features, keys[count:])
            if kinds & {"damaged_features", "misfiled_features", "stale_fields"}:
                exact, packed = self._of_rows(image, rows[:count]), self._of_text(image)
                sound = exact if isinstance(exact, Features) else packed
                if isinstance(sound, Features):
                    sound, spec = sound.top(count), self._facts.features
                    write_columns(self._db, self._features, spec, records.feature_columns(key, sound, spec, image))
            if "packed_geometry" in kinds:
                exact = self._of_rows(image, rows[:count])
                whole = self._whole(exact, self._of_text(image)) if isinstance(exact, Features) else None
                if whole is not None:
                    record = records.record_of(image, self._facts.tenant_field)
                    row = records.image_row(record, whole, self._facts)
                    self._write(self._images, [{**row, GLOBAL: image[GLOBAL]}])

    def _read(self, key: int) -> tuple[Row | None, list[Row]]:
        """One image's row, with its metadata, and all its features."""
        images = self._get(self._images, "image_key", [key], (*self._image_fields, METADATA, GLOBAL))
        # A key that is no image's has no features: theirs would not fit an INT64.
        keys = feature_keys(key, MAX_FEATURES).tolist() if 0 <= key < 1 << IMAGE_KEY_BITS else []
        return (images[0] if images else None), self._get(self._features, "feature_key", keys, self._feature_fields)

    def _joined(self, totals: dict[str, int]) -> Iterator[tuple[int, Row | None, list[Row]]]:
        """Every image key of either collection, in rising order, with its row and its features."""
        # Every call of Milvus Lite costs a walk over all keys, however few rows it returns.
        size = max(1, _PAGE_BYTES // (4 * self._facts.fingerprint.dim + 64))
        size = min(size, _PAGE_ROWS) if self._db.backend == "server" else size
        images = self._ordered(self._images, "image_key", self._image_fields, _IMAGES, totals[self._images])
        pages = self._ordered(self._features, "feature_key", self._feature_fields, size, totals[self._features])
        groups = _grouped(row for page in pages for row in page)
        rows = (row for page in images for row in page)
        image, group = next(rows, None), next(groups, None)
        while image is not None or group is not None:
            image_first = _PAST if image is None else int(image["image_key"])
            group_first, group_rows = group or (_PAST, [])
            first = min(image_first, group_first)
            here = image if image_first == first else None
            theirs = group_rows if group_first == first else []
            yield first, here, theirs
            if here is not None:
                image = next(rows, None)
            if theirs:
                group = next(groups, None)

    def _ordered(self, name: str, primary: str, fields: Sequence[str], page: int, total: int) -> Iterator[list[Row]]:
        """All rows in rising order of their key, in pages of about `page` rows."""
        if self._db.backend == "server":
            # Two at least, because a server wants a condition or a limit.
            yield from self._ranges(name, primary, fields, total // page + 2)
            return
        for rows in self._ranges(name, primary, (), total // _RANGE + 1):
            keys = [int(row[primary]) for row in rows]
            for start in range(0, len(keys), page):
                yield self._get(name, primary, keys[start : start + page], fields, page)

    def _ranges(self, name: str, primary: str, fields: Sequence[str], parts: int) -> Iterator[list[Row]]:
        """All rows in rising order of their key, of so many ranges of keys one after the other."""
        bits = IMAGE_KEY_BITS + (ORDINAL_BITS if primary == "feature_key" else 0)
        bounds = np.linspace(0, 2.0**bits, parts + 1)[1:-1].astype(np.int64).tolist()
        first: int | None = None
        for end in [*bounds, None]:
            limits = [] if first is None else [f"{primary} >= {first}"]
            limits += [] if end is None else [f"{primary} < {end}"]
            found = self._db.call(
                "reading rows",
                self._db.client.query,
                name,
                filter=" and ".join(limits),
                output_fields=[primary, *fields],
                consistency_level=_SESSION,
            )
            rows = sorted(found, key=lambda row: int(row[primary]))
            if rows:
                yield rows
            # What a server may leave out lies behind the last: see `left_out`.
            first = int(rows[-1][primary]) + 1 if rows else end

    def _duplicates(self, name: str, primary: str) -> list[int]:
        """Keys that a collection holds more than once: counts see every row, reads one row a key."""
        found: list[int] = []
        for page in self._ordered(name, primary, (), _PAGE_ROWS, self._count(name)):
            self._halve(name, primary, [int(row[primary]) for row in page], found)
        return found

    def _halve(self, name: str, primary: str, keys: list[int], found: list[int]) -> None:
        if self._count(name, f"{primary} >= {keys[0]} and {primary} <= {keys[-1]}") <= len(keys):
            return
        if len(keys) == 1:
            found.append(keys[0])
            return
        middle = len(keys) // 2
        self._halve(name, primary, keys[:middle], found)
        self._halve(name, primary, keys[middle:], found)

    def _single(self, name: str, keys: list[int]) -> None:
        """Leave one row of each key: the one that reads see."""
        images = name == self._images
        fields = (*self._image_fields, METADATA, GLOBAL) if images else self._feature_fields
        rows = self._get(name, "image_key" if images else "feature_key", keys, fields)
        if images:
            rows = [records.described(row, records.record_of(row, self._facts.tenant_field)) for row in rows]
        self._delete(name, keys)
        self._write(name, rows)

    def _occurrences(self, name: str, keys: list[int]) -> int:
        primary = "image_key" if name == self._images else "feature_key"
        parts = [keys[start : start + _KEYS] for start in range(0, len(keys), _KEYS)]
        return sum(self._count(name, f"{primary} in {part}") for part in parts)

    def _get(self, name: str, primary: str, keys: Sequence[int], fields: Sequence[str], step: int = _KEYS) -> list[Row]:
        """Those of the rows that exist, in rising order of their key; `step` keys a call."""
        rows: list[Row] = []
        for start in range(0, len(keys), step):
            rows += self._db.call(
                "reading rows",
                self._db.client.get,
                name,
                ids=list(keys[start : start + step]),
                output_fields=[primary, *fields],
                consistency_level=_SESSION,
            )
        return sorted(rows, key=lambda row: int(row[primary]))

    def _count(self, name: str, condition: str = "", consistency: str = _SESSION) -> int:
        rows = self._db.call(
            "counting",
            self._db.client.query,
            name,
            filter=condition,
            output_fields=["count(*)"],
            consistency_level=consistency,
        )
        return int(rows[0]["count(*)"])

    def _delete(self, name: str, keys: Sequence[int]) -> None:
        """Delete by key, the last ones first, so that what a crash leaves has no gap."""
        for end in range(len(keys), 0, -_KEYS):
            self._db.call("deleting", self._db.client.delete, name, ids=list(keys[max(0, end - _KEYS) : end]))

    def _write(self, name: str, rows: Sequence[Row]) -> None:
        images = name == self._images
        spec = self._facts.images if images else self._facts.features
        for start in range(0, len(rows), _KEYS):
            part = rows[start : start + _KEYS]
            columns = records.image_columns(part, spec) if images else records.columns_of(spec, part)
            write_columns(self._db, name, spec, columns)


def _grouped(rows: Iterator[Row]) -> Iterator[tuple[int, list[Row]]]:
    """Feature rows in the order of their keys, by the image that the key names."""
    group: list[Row] = []
    for row in rows:
        if group and _owner(group[0]) != _owner(row):
            yield _owner(group[0]), group
            group = []
        group.append(row)
    if group:
        yield _owner(group[0]), group


def _owner(row: Row) -> int:
    return int(row["feature_key"]) >> ORDINAL_BITS


def _ordinal(row: Row) -> int:
    return int(row["feature_key"]) & (MAX_FEATURES - 1)


def _name(image: Row | None) -> str:
    return "" if image is None else str(image["image_id"])
