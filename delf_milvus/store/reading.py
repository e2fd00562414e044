"""Reading one index: neighbours of descriptors, images by id, by key and in order, counts and samples.

Similarities are inner products of unit vectors; larger is nearer. A neighbour whose image has no row (a crash came
between) is to be ignored.

Consistency: reads that decide what is written, and reads of records, are strong. Neighbour searches and reads of packed
features have the level of the settings, by default "Session": they see everything that this process wrote, and what
others wrote a moment ago.
"""

from __future__ import annotations

import difflib
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from delf_milvus.errors import CollectionError, DatabaseError
from delf_milvus.features import ORDINAL_BITS, Features, Float32Array
from delf_milvus.store import records
from delf_milvus.store.attached import SESSION, AttachedCollections
from delf_milvus.store.columns import METADATA, Columns
from delf_milvus.store.filters import Filter, both, expression, quoted
from delf_milvus.store.hits import PADDING_KEY, Hits, joined_hits, search_arrays
from delf_milvus.store.indexing import NO_INDEX
from delf_milvus.store.keys import IMAGE_KEY_BITS, Int64Array, feature_keys, image_key
from delf_milvus.store.records import ImageRecord, Row
from delf_milvus.store.schema import GLOBAL, CollectionFacts, keypoint_fields

Ids = list[str]
Keys = list[int]
Rows = list[Row]

STRONG = "Strong"
_QUERIES = 16384
_HITS = 1_000_000
_KEYS = 1000
_FEATURE_KEYS = 10_000
_FEATURE_BYTES = 30_000_000
_PAGE = 10000
_SAMPLED = 100
_SUGGESTED = 3
_ALIKE = 0.7  # of difflib's ratio: below, it is another id rather than a slip


class StoreReader(AttachedCollections):
    """What reads. Safe to use from many threads."""

    def keys(self, prefix: str = "") -> Keys:
        """The keys of all images whose id starts so, in order of the ids; with a tenant set, only that tenant's."""
        facts = self._attach()
        if facts is None:
            return []
        conditions = [*filter(None, [self._of_tenant(facts)]), *_starting(prefix)]
        found = self._scan(" and ".join(conditions))
        return [key for _, key in sorted((row["image_id"], int(row["image_key"])) for row in found)]

    def tenants(self) -> list[str]:
        """Whose images there are, in order; [""] in a collection without tenants. Reads a few bytes of every image."""
        facts = self._attach()
        if facts is None or not facts.tenant_field:
            return [""]
        return sorted({row[facts.tenant_field] for row in self._scan("", (facts.tenant_field,))})

    def rows(self, image_keys: Sequence[int]) -> dict[int, Row]:
        """Whole rows of those of the images that exist, by key."""
        facts = self._attach()
        if facts is None:
            return {}
        return self._rows(image_keys, (*(one.name for one in facts.images.fields), METADATA))

    def feature_columns(self, counts: Mapping[int, int]) -> Columns:
        """All features of images, given as feature counts by key: in that order, in rising ordinals.

        Raises DatabaseError where one has not all of them.
        """
        facts = self._existing()
        spec = facts.features
        keys = np.concatenate([feature_keys(key, count) for key, count in counts.items()] or [np.empty(0, np.int64)])
        fields = [one.name for one in spec.fields if not one.primary]
        step = min(_FEATURE_KEYS, max(1, _FEATURE_BYTES // (4 * facts.fingerprint.dim + 64)))
        found = self._by_key(self._features, "feature_key", keys.tolist(), fields, STRONG, step)
        if len(found) < len(keys):
            missing = next(key for key in keys.tolist() if key not in found) >> ORDINAL_BITS
            raise DatabaseError(
                f"Features of the image with key {missing} are missing: was it written meanwhile? Try again, and "
                "ingest it again if that does not help."
            )
        return records.columns_of(spec, [found[key] for key in keys.tolist()])

    def records(self, image_ids: Iterable[str]) -> dict[str, ImageRecord]:
        """The records of those of the ids that exist, by id, in the given order."""
        facts = self._attach()
        if facts is None:
            return {}
        owner = self._owner()
        wanted = {image_key(image_id, owner): image_id for image_id in image_ids}
        found = self._records(list(wanted), facts)
        return {wanted[key]: record for key, record in found.items() if record.image_id == wanted[key]}

    def neighbours(self, descriptors: Float32Array, k: int, where: Filter = "") -> tuple[Int64Array, Float32Array]:
        """The k most similar stored descriptors of each query descriptor.

        descriptors: (Q, D) float32 of unit norm. where: only features whose image meets this, in declared fields; see
        `filters`. With a tenant set, only that tenant's. Returns feature keys (Q, k) int64 and similarities (Q, k)
        float32, nearest first, padded with PADDING_KEY and PADDING_SIMILARITY where there are fewer, or no collection
        yet.
        Raises CollectionError for descriptors of another length, UsageError for a filter that does not fit the
        collection, DatabaseError.
        """
        search = partial(search_arrays, self._client)
        calls = self.neighbour_calls(descriptors, k, where)
        return joined_hits(
            [self._reading("searching for neighbours", search, **call) for call in calls], len(descriptors), k
        )

    def neighbour_calls(self, descriptors: Float32Array, k: int, where: Filter = "") -> list[dict[str, Any]]:
        """Arguments of the client's `search`, call by call, whose results are read by `hits`; none while there is no
        collection. Arguments and errors as of `neighbours`."""
        facts = self._attach()
        if facts is None or not len(descriptors):
            return []
        if descriptors.shape[1] != facts.fingerprint.dim:
            raise CollectionError(
                f"The query has descriptors of {descriptors.shape[1]} components, the collection {self._collection!r} "
                f"of {facts.fingerprint.dim}: search with the model that it was made with."
            )
        queries = np.ascontiguousarray(descriptors, dtype=np.float32)
        self._ensure_loaded(self._features)
        common = self._search_call(facts, self._features, "descriptor", k, where)
        step = max(1, min(_QUERIES, _HITS // k))
        return [{**common, "data": list(queries[start : start + step])} for start in range(0, len(queries), step)]

    def similar(self, descriptor: Float32Array, k: int, where: Filter = "") -> tuple[Int64Array, Float32Array]:
        """The k images whose global descriptor is most similar to one, (G,) float32 of unit norm.

        Returns image keys (N,) int64 and similarities (N,) float32, nearest first, N <= k: there may be fewer images,
        and there are none without a collection. where, tenants and errors as for `neighbours`.
        """
        search = partial(search_arrays, self._client)
        calls = self.similar_calls(descriptor, k, where)
        return self.similar_answer([self._reading("searching for images", search, **call) for call in calls])

    def similar_calls(self, descriptor: Float32Array, k: int, where: Filter = "") -> list[dict[str, Any]]:
        """Arguments of the client's `search`, whose result `similar_answer` reads, as `neighbour_calls` gives them."""
        facts = self._attach()
        if facts is None or not len(descriptor):
            return []
        if len(descriptor) != facts.fingerprint.global_dim:
            raise CollectionError(
                f"The query has a global descriptor of {len(descriptor)} components, the collection "
                f"{self._collection!r} of {facts.fingerprint.global_dim}: search with the model that it was made with."
            )
        self._ensure_loaded(self._images)
        return [self._search_call(facts, self._images, GLOBAL, k, where) | {"data": [descriptor]}]

    def similar_answer(self, results: Iterable[Hits]) -> tuple[Int64Array, Float32Array]:
        """What `similar` returns, from the results of `similar_calls` as arrays."""
        keys, similarities = joined_hits(list(results), 1, 0)
        there = keys[0] != PADDING_KEY
        return keys[0, there], similarities[0, there]

    def _search_call(self, facts: CollectionFacts, name: str, vector: str, k: int, where: Filter) -> dict[str, Any]:
        """Arguments of the client's `search` in one of the collections, without the vectors."""
        return {
            "collection_name": name,
            "anns_field": vector,
            "limit": k,
            "filter": both(self._of_tenant(facts), expression(where, facts.declared)),
            "search_params": self._indexing.search_params(name, k),
            # Without any output field Milvus Lite would return all of them.
            "output_fields": ["feature_key" if name == self._features else "image_key"]
            if self._db.backend == "lite"
            else [],
            "consistency_level": self._settings.consistency.capitalize(),
        }

    def stored(self, image_keys: Iterable[int], *, globally: bool = False) -> dict[int, tuple[ImageRecord, Features]]:
        """Record and packed features of those of the images that exist, by image key, in the given order.

        Keypoints and descriptors are rounded as `codec` says. globally: with their global descriptors, which
        verification does not need. Raises DatabaseError, also for damaged features.
        """
        wanted = [int(key) for key in image_keys]
        calls = self.stored_calls(wanted, globally=globally)
        return self.stored_answer(wanted, [self._got(call) for call in calls])

    def stored_calls(self, image_keys: Sequence[int], *, globally: bool = False) -> list[dict[str, Any]]:
        """Arguments of the client's `get`, call by call, whose results `stored_answer` reads."""
        facts = self._attach()
        if facts is None:
            return []
        self._ensure_loaded(self._images)
        whole = [GLOBAL] if globally and facts.fingerprint.global_dim else []
        fields = (*records.record_fields(facts), *keypoint_fields(facts.chunks), *whole)
        return _get_calls(self._images, "image_key", image_keys, fields, self._settings.consistency.capitalize())

    def stored_answer(
        self, image_keys: Sequence[int], results: Iterable[Sequence[Row]]
    ) -> dict[int, tuple[ImageRecord, Features]]:
        """What `stored` returns, from the results of `stored_calls`."""
        rows, facts = _by_primary("image_key", results), self._facts
        return {
            key: (records.record_of(rows[key], facts.tenant_field), records.features_of(rows[key], facts.chunks))
            for key in image_keys
            if facts is not None and key in rows
        }

    def named(self, image_keys: Iterable[int]) -> dict[int, ImageRecord]:
        """Records alone, otherwise as `stored`."""
        wanted = [int(key) for key in image_keys]
        calls = self.named_calls(wanted)
        return self.named_answer(wanted, [self._got(call) for call in calls])

    def named_calls(self, image_keys: Sequence[int]) -> list[dict[str, Any]]:
        """Arguments of the client's `get`, call by call, whose results `named_answer` reads."""
        facts = self._attach()
        if facts is None:
            return []
        fields = records.record_fields(facts)
        return _get_calls(self._images, "image_key", image_keys, fields, self._settings.consistency.capitalize())

    def named_answer(self, image_keys: Sequence[int], results: Iterable[Sequence[Row]]) -> dict[int, ImageRecord]:
        """What `named` returns, from the results of `named_calls`."""
        rows, facts = _by_primary("image_key", results), self._facts
        return {} if facts is None else _records_of(image_keys, rows, facts)

    def sample(self, count: int, seed: int = 0) -> dict[int, tuple[ImageRecord, Features]]:
        """At most `count` images, drawn at random, as `stored` gives them with their global descriptors.

        Image keys are hashes, so the images whose keys lie in any one range are a random sample.
        """
        self._existing()
        space = 1 << IMAGE_KEY_BITS
        total = self.count_images()
        width = space if total <= _KEYS else min(space, math.ceil(space * 1.2 * count / total))
        first = int(np.random.default_rng(seed).integers(space))
        ranges = [(first, min(first + width, space)), (0, max(0, first + width - space))]
        condition = " or ".join(f"(image_key >= {low} and image_key < {high})" for low, high in ranges)
        rows = self._reading(
            "drawing a sample",
            self._client.query,
            self._images,
            filter=condition,
            output_fields=["image_key"],
            limit=_QUERIES,
            consistency_level=SESSION,
        )
        keys = sorted((int(row["image_key"]) for row in rows), key=lambda key: (key - first) % space)[:count]
        found: dict[int, tuple[ImageRecord, Features]] = {}
        for start in range(0, len(keys), _SAMPLED):
            found.update(self.stored(keys[start : start + _SAMPLED], globally=True))
        return found

    def list(
        self,
        prefix: str = "",
        limit: int | None = None,
        root: str | None = None,
        after: str = "",
        where: Filter = "",
    ) -> Iterator[ImageRecord]:
        """The images in the order of their ids.

        prefix: only ids that start so. limit: at most so many. root: only images ingested from this folder. after: only
        ids beyond this one, to go on from an earlier listing. where: only images that meet this; see `filters`. With a
        tenant set, only that tenant's images. Memory holds one id for each image that is listed.

        Raises UsageError for a filter that does not fit the collection.
        """
        facts = self._attach()
        if facts is None:
            return
        conditions = [tenant] if (tenant := self._of_tenant(facts)) else []
        conditions += _starting(prefix)
        if root is not None:
            conditions.append(f"root == {quoted(root)}")
        if after:
            conditions.append(f"image_id > {quoted(after)}")
        if filtered := expression(where, facts.declared):
            conditions.append(f"({filtered})")
        found = ((row["image_id"], int(row["image_key"])) for row in self._scan(" and ".join(conditions)))
        chosen = sorted(found) if limit is None else heapq.nsmallest(limit, found)
        for start in range(0, len(chosen), _KEYS):
            yield from self._records([key for _, key in chosen[start : start + _KEYS]], facts).values()

    def similar_ids(self, image_id: str) -> Ids:
        """At most three stored ids that an unknown one may be meant for, the most likely first.

        Images of the same file name in any folder, then ids that read alike, of those that start with the same folder,
        with the same character, or anyhow: 10,000 of each at most are looked at, so that it takes no longer in a large
        collection.
        """
        facts = self._attach()
        if facts is None:
            return []
        tenant = [condition] if (condition := self._of_tenant(facts)) else []
        folder, slash, _ = image_id.rpartition("/")
        looked: dict[str, None] = {}
        for prefix in dict.fromkeys((folder + slash, image_id[:1], "")):
            rows = self._scan(" and ".join([*tenant, *_starting(prefix)]))
            looked |= dict.fromkeys(row["image_id"] for row in itertools.islice(rows, _PAGE))
        name = PurePosixPath(image_id).name.casefold()
        alike = [one for one in looked if PurePosixPath(one).name.casefold() == name]
        folded = {one.casefold(): one for one in looked}
        close = difflib.get_close_matches(image_id.casefold(), folded, n=_SUGGESTED, cutoff=_ALIKE)
        alike += [folded[one] for one in close]
        return list(dict.fromkeys(alike))[:_SUGGESTED]

    def count_images(self) -> int:
        """Images in the collection."""
        return self._count(self._images)

    def count_features(self) -> int:
        """Features in the collection, among them such as a crash left without their image."""
        return self._count(self._features)

    def _feature_rows(self) -> int:
        """Rows of the features. Without an index they cannot be loaded and counted: then those flushed."""
        if self._indexing.described(self._features) != NO_INDEX:
            return self.count_features()
        return self._indexing.flushed_rows(self._features)

    def _rows(self, keys: Sequence[int], fields: Sequence[str], consistency: str = STRONG) -> dict[int, Row]:
        """Rows of the images collection by primary key."""
        if self._attach() is None:
            return {}
        return self._by_key(self._images, "image_key", keys, fields, consistency)

    def _records(self, keys: Sequence[int], facts: CollectionFacts) -> dict[int, ImageRecord]:
        """Records by image key, those that exist, in the given order."""
        return _records_of(keys, self._rows(keys, records.record_fields(facts)), facts)

    def _by_key(
        self,
        name: str,
        primary: str,
        keys: Sequence[int],
        fields: Sequence[str],
        consistency: str,
        step: int = _KEYS,
    ) -> dict[int, Row]:
        calls = _get_calls(name, primary, keys, fields, consistency, step)
        return _by_primary(primary, (self._got(call) for call in calls))

    def _got(self, call: Mapping[str, Any]) -> Rows:
        """The rows of a call of the client's `get`, all of those that exist."""
        rows: Rows = []
        asked: Mapping[str, Any] | None = call
        while asked is not None:
            answer = self._reading("reading images", self._client.get, **asked)
            rows += answer
            asked = left_out(asked, answer) if self._db.backend == "server" else None
        return rows

    def _scan(self, condition: str, fields: Sequence[str] = ("image_id",)) -> Iterator[Row]:
        """Keys and these fields of the images that meet a condition, in no order.

        Each page, of about `_PAGE` rows, is a range of image keys, which are spread evenly, so that it needs no limit:
        rows beyond a limit come in an order of the server's own. pymilvus's iterators would tell it to keep the order,
        but ask first, without any time limit, what collection it is. A strong read waits for the server's clock, some
        tenths of a second, so only what brings the rows is one.
        """
        if self._attach() is None:
            return
        parts = max(1, math.ceil(self._count(self._images, condition, SESSION) / _PAGE))
        bounds = [(part << IMAGE_KEY_BITS) // parts for part in range(parts + 1)]
        for low, high in itertools.pairwise(bounds):
            first, consistency = low, STRONG
            while first < high:
                rows = self._reading(
                    "listing images",
                    self._client.query,
                    self._images,
                    filter=both(condition, f"image_key >= {first} and image_key < {high}"),
                    output_fields=["image_key", *fields],
                    consistency_level=consistency,
                )
                yield from rows
                # What a server may leave out lies behind the last: see `left_out`.
                more = rows and self._db.backend == "server"
                first, consistency = (max(int(row["image_key"]) for row in rows) + 1 if more else high), SESSION

    def _count(self, name: str, condition: str = "", consistency: str = STRONG) -> int:
        if self._attach() is None:
            return 0
        rows = self._reading(
            "counting",
            self._client.query,
            name,
            filter=condition,
            output_fields=["count(*)"],
            consistency_level=consistency,
        )
        return int(rows[0]["count(*)"])


def _get_calls(
    name: str, primary: str, keys: Sequence[int], fields: Sequence[str], consistency: str, step: int = _KEYS
) -> list[dict[str, Any]]:
    return [
        {
            "collection_name": name,
            "ids": list(keys[start : start + step]),
            "output_fields": [primary, *fields],
            "consistency_level": consistency,
        }
        for start in range(0, len(keys), step)
    ]


def left_out(call: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any] | None:
    """The call of the client's `get` that asks for the keys that an answer lacks; None where that is of no use.

    While somebody replaces a row, a Milvus server (seen with 2.3.5) leaves out rows behind it in the order of keys, and
    says nothing. Asked for without it, they are there. So it is asked again while an answer brings anything: mostly
    never, for mostly nothing is lacking.
    """
    there = {int(row[call["output_fields"][0]]) for row in rows}
    lacking = [key for key in call["ids"] if key not in there]
    return {**call, "ids": lacking} if lacking and there else None


def _by_primary(primary: str, results: Iterable[Sequence[Row]]) -> dict[int, Row]:
    return {int(row[primary]): row for rows in results for row in rows}


def _records_of(keys: Iterable[int], rows: Mapping[int, Row], facts: CollectionFacts) -> dict[int, ImageRecord]:
    return {key: records.record_of(rows[key], facts.tenant_field) for key in keys if key in rows}


def _starting(prefix: str) -> list[str]:
    """The condition that an id starts so, if there is any: a range, because not every version can escape `like`."""
    if not prefix:
        return []
    end = prefix + chr(0x10FFFF)
    return [f"image_id >= {quoted(prefix)} and image_id <= {quoted(end)}"]
