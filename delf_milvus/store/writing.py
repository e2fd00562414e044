"""Writing one index: images with their features, their metadata, and deleting them.

Invariants, which hold after a crash at any point:

- An image exists if and only if its row in the images collection does, and then all its features are there.
- While an image's row is deleted, to be written anew or for good, a note says so until that is done: see `unfinished`.
- The features of one image, row or no row, have the ordinals 0 to m - 1 without a gap: features are written in rising
  and deleted in falling order. So one look at ordinal n tells whether an earlier, larger version left anything beyond.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from delf_milvus.errors import CollectionError, DatabaseError
from delf_milvus.features import MAX_FEATURES, ORDINAL_BITS, Features
from delf_milvus.store import generations, records
from delf_milvus.store.bulk import BulkImport
from delf_milvus.store.choosing import spread
from delf_milvus.store.codec import chunks_needed
from delf_milvus.store.columns import Columns, joined, length, slices, write_columns
from delf_milvus.store.keys import feature_keys, image_key
from delf_milvus.store.reading import STRONG, Ids, Keys, StoreReader
from delf_milvus.store.records import ImageRecord, Row
from delf_milvus.store.schema import GLOBAL, CollectionSpec, keypoint_fields
from delf_milvus.store.unfinished import Notes, Unfinished

_DELETED = 16384
_NOTED = 1000
_DESCRIBED = 100
_COUNTED = 1000
_FLUSHED = 10_000


class StoreWriter(StoreReader):
    """What writes; writes of several threads queue up."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._bulk = BulkImport(self._db, self._features, self._settings)
        self._notes = Notes(self._db, self._images)
        self._took_over = False
        self._unflushed = 0

    def write(self, items: Sequence[tuple[ImageRecord, Features]]) -> None:
        """Store images with their features, replacing images of the same id; of an id given twice the last one counts.

        Everything is checked before anything is written. Then, so that a crash leaves no image half-visible:

        1. delete the rows of images that exist already: from here on they do not exist; a note has the metadata that
           they had and are to have again,
        2. write the features, in rising ordinals,
        3. delete the features that an earlier version has beyond the new ones, in falling ordinals,
        4. write the images' rows: from here on the images exist.

        Raises InputError (an id or metadata that cannot be stored), CollectionError (features of another length, or
        more than the collection was made for), DatabaseError.
        """
        latest = {record.image_id: (self.typed(record), features) for record, features in items}
        if not latest:
            return
        with self._db.write_lock, self._bulk.guarded():
            facts = self._created()
            self._check_current()
            fingerprint = facts.fingerprint
            complete: dict[int, tuple[ImageRecord, Features]] = {}
            for record, features in latest.values():
                if features.dim != fingerprint.dim:
                    raise CollectionError(
                        f"Image {record.image_id!r} has descriptors of {features.dim} components, the collection "
                        f"{self._collection!r} of {fingerprint.dim}: use the model that it was made with."
                    )
                if fingerprint.global_dim and len(features.global_descriptor) not in (0, fingerprint.global_dim):
                    raise CollectionError(
                        f"Image {record.image_id!r} has a global descriptor of {len(features.global_descriptor)} "
                        f"components, the collection {self._collection!r} of {fingerprint.global_dim}: use the model "
                        "that it was made with."
                    )
                if record.key in complete:
                    _check_collision(complete[record.key][0].image_id, record.image_id)
                if facts.indexed_choice == "spread" and len(features) > facts.indexed:
                    features = spread(features, facts.indexed)
                complete[record.key] = (records.completed(record, features, facts), features)
                if chunks_needed(len(features), fingerprint.dim) > facts.chunks:
                    # It may fit all the same, but that must be known now.
                    records.image_row(record, features, facts)
            columns = {
                key: records.feature_columns(key, features.top(record.feature_count), facts.features, record.metadata)
                for key, (record, features) in complete.items()
            }
            metadata = {key: record.metadata for key, (record, _) in complete.items() if record.metadata}
            self._replace({key: record.image_id for key, (record, _) in complete.items()}, columns, metadata)
            # Packed while the server imports.
            rows = [records.image_row(record, features, facts) for record, features in complete.values()]
            self._bulk.finish()
            self._write_images(rows)
            self._notes.remove(complete)
            self._flush_often()

    def imports_from(self) -> int | None:
        """Feature rows of new images from which a write goes through the server's bulk import; None where none does.

        Raises UsageError for a storage of imports that cannot be used, before anything is made for it.
        """
        self._bulk.open_storage()
        return self._settings.bulk_from if self._bulk.enabled else None

    def rows_of(self, features: int) -> int:
        """How many feature rows an image of so many features has, here or in the collection that is yet to be made."""
        return (self._attach() or self._planned()).rows_of(features)

    def restore(self, image_rows: Mapping[int, Row], columns: Mapping[int, Columns], *, now: bool = True) -> None:
        """Store images as they are, by key: their rows, and the columns of their features in rising ordinals.

        The caller has checked them. The steps are those of `write`. Not `now`: the images do not exist before `settle`
        and then `restore_rows`, so that one wait for imports of files serves any number of calls.
        """
        with self._db.write_lock, self._bulk.guarded():
            self._replace({key: row["image_id"] for key, row in image_rows.items()}, columns)
            if now:
                self._bulk.finish()
                self._write_images(list(image_rows.values()))
            self._flush_often()

    def settle(self) -> None:
        """Wait until all features of earlier calls of `restore` can be found."""
        with self._db.write_lock, self._bulk.guarded():
            self._bulk.finish()

    def restore_rows(self, image_rows: Sequence[Row]) -> None:
        """Write the rows of images whose features are there."""
        with self._db.write_lock:
            self._write_images(image_rows)

    def typed(self, record: ImageRecord) -> ImageRecord:
        """The record as this collection stores it: checked, declared fields typed, tenant filled in.

        Raises InputError for what cannot be stored, and UsageError where the collection keeps tenants apart and none
        is set.
        """
        return records.typed(record, self._attach() or self._planned(), self._owner())

    def describe(self, changed: Sequence[ImageRecord]) -> None:
        """Rewrite uri, root and metadata of stored images; their features stay. Ids that are not stored are left out.

        Where a declared field changes, its copies in the features change with it: as in `write`, the image does not
        exist meanwhile.

        Raises InputError (metadata that cannot be stored) and DatabaseError.
        """
        changed = [self.typed(record) for record in changed]
        with self._db.write_lock:
            facts = self._attach()
            if facts is None:
                return
            self._check_current()
            names = [field.name for field in facts.declared]
            fields = (*records.RECORD_FIELDS, *names, *keypoint_fields(facts.chunks), GLOBAL)
            for start in range(0, len(changed), _DESCRIBED):
                batch = {record.key: record for record in changed[start : start + _DESCRIBED]}
                found = self._rows(list(batch), fields)
                self._indexing.outdated |= bool(found)
                moved = [key for key, row in found.items() if any(row[n] != batch[key].metadata[n] for n in names)]
                # Read while the images still exist: one that lost features stays as it is.
                columns = [
                    self._redeclared(key, int(found[key]["feature_count"]), batch[key].metadata) for key in moved
                ]
                self._delete_rows(self._images, moved)
                self._write_columns(self._features, facts.features, columns)
                self._write_images([records.described(row, batch[key]) for key, row in found.items()])
            self._flush_often()

    def delete(self, image_ids: Iterable[str]) -> Ids:
        """Delete images: their rows first, then their features. Returns the ids that existed, in the given order.

        What a killed writer has left of them is deleted too, and all that a killed deletion has left.
        """
        with self._db.write_lock:
            if self._attach() is None:
                return []
            self._check_current()
            self._take_over()
            asked = list(image_ids)
            found = {record.key: record for record in self.records(asked).values()}
            # Killed while they were written anew: nobody knows with how many features.
            owner, noted = self._owner(), self._notes.noted
            torn = {key: MAX_FEATURES for one in asked if (key := image_key(one, owner)) in noted and key not in found}
            self._delete_features(torn)
            self._notes.remove(torn)
            self._indexing.outdated |= bool(found) or bool(torn)
            keys = list(found)
            for start in range(0, len(keys), _NOTED):
                counts = {key: found[key].feature_count for key in keys[start : start + _NOTED]}
                self._notes.add({key: Unfinished(count) for key, count in counts.items()})
                self._delete_rows(self._images, list(counts))
                self._delete_features(counts)
                self._notes.remove(counts)
            self._flush_often()
        return [record.image_id for record in found.values()]

    def interrupted(self, image_ids: Iterable[str]) -> dict[str, Mapping[str, Any]]:
        """Metadata of those of the ids that a killed writer was writing anew, and that do not exist since.

        Raises DatabaseError.
        """
        with self._db.write_lock:
            if self._attach() is None:
                return {}
            self._notes.read()
            owner, noted = self._owner(), self._notes.noted
            kept = {one: noted[key].metadata for one in image_ids if (key := image_key(one, owner)) in noted}
        return {image_id: metadata for image_id, metadata in kept.items() if metadata is not None}

    def _take_over(self) -> None:
        """Once: end the deletions that killed writers have noted."""
        if self._took_over:
            return
        self._notes.read()
        noted = dict(self._notes.noted)
        # Those that are there were not begun, or are done.
        there = self._rows(list(noted), ("image_id",)) if noted else {}
        deleted = {key: one.feature_count for key, one in noted.items() if key not in there and one.metadata is None}
        self._indexing.outdated |= bool(deleted)
        self._delete_features(deleted)
        self._notes.remove([*there, *deleted])
        self._took_over = True

    def _replace(
        self,
        ids: Mapping[int, str],
        columns: Mapping[int, Columns],
        metadata: Mapping[int, Mapping[str, Any]] = MappingProxyType({}),
    ) -> None:
        """The first three steps of `write`, for these images by key; `_bulk.finish` comes before the fourth.

        metadata: that they will have. What an image has already may be known to nobody else; other metadata is the
        caller's, who has it still.
        """
        facts = self._existing()
        self._bulk.recover()
        self._take_over()
        stored = self._rows(list(ids), records.record_fields(facts))
        for key, row in stored.items():
            _check_collision(row["image_id"], ids[key])
        there = self._there({key: length(one) for key, one in columns.items() if key not in stored})
        leftovers = _leftovers(columns, stored, there)
        self._indexing.outdated = True
        had = {key: records.record_of(stored[key], facts.tenant_field) for key in metadata if key in stored}
        self._notes.add(
            {
                key: Unfinished(one.feature_count, one.metadata)
                for key, one in had.items()
                if one.metadata == metadata[key]
            }
        )
        self._delete_rows(self._images, list(stored))
        self._write_features(
            columns, {key for key in columns if key not in stored and key << ORDINAL_BITS not in there}
        )
        self._delete_rows(self._features, leftovers)

    def _flush_often(self) -> None:
        """Every so many rows, on Milvus Lite, which looks one by one through all that came or went since the last
        flush, and by itself flushes at 128 MB: until then a search would take several times as long."""
        if self._db.backend == "lite" and self._unflushed >= max(_FLUSHED, self._indexing.least_segment):
            self._unflushed = 0
            self._indexing.flush([name for name in (self._features, self._images) if name in self._loaded])

    def _check_current(self) -> None:
        """Raise CollectionError where the collection was rebuilt since this store was opened: nobody would see what is
        written to the old generation."""
        if not self._is_made and generations.current(self._db, self._collection) != self._generation:
            raise CollectionError(
                f"The collection {self._collection!r} at {self._db.where} was rebuilt for another model meanwhile: "
                "open it again to write."
            )

    def _there(self, counts: Mapping[int, int]) -> set[int]:
        """Of images without a row, that get so many features: the keys of their first feature and of the one beyond
        the last, as far as a crash left them."""
        looked = [
            key << ORDINAL_BITS | ordinal for key, n in counts.items() for ordinal in {0, n} if ordinal < MAX_FEATURES
        ]
        return set(self._by_key(self._features, "feature_key", looked, (), STRONG))

    def _write_features(self, written: Mapping[int, Columns], new: Set[int]) -> None:
        """As files where they are many and new, else as messages. new: images without any feature."""
        parts = {key: columns for key, columns in written.items() if length(columns)}
        spec = self._existing().features
        # Neither an import nor an insert replaces anything.
        fresh = sorted(key for key in parts if key in new)
        if self._bulk.enabled and sum(length(parts[key]) for key in fresh) >= self._settings.bulk_from:
            self._bulk.start(spec, joined([parts.pop(key) for key in fresh]))
            fresh = []
        inserted = [parts.pop(key) for key in fresh]
        self._write_columns(self._features, spec, inserted, new=True)
        self._write_columns(self._features, spec, list(parts.values()))
        if self._db.backend == "server" and self._met_another_writer(inserted):
            self._write_columns(self._features, spec, inserted)

    def _met_another_writer(self, inserted: Sequence[Columns]) -> bool:
        """Whether somebody inserted features of the same images at the same time. Of two who did, at least the one who
        looks last sees it, for both look when they have inserted theirs."""
        first = [int(columns["feature_key"][0]) for columns in inserted]
        for start in range(0, len(first), _COUNTED):
            keys = first[start : start + _COUNTED]
            if self._count(self._features, f"feature_key in {keys}") > len(keys):
                return True
        return False

    def _write_columns(self, name: str, spec: CollectionSpec, parts: Sequence[Columns], *, new: bool = False) -> None:
        for batch in slices(joined(parts), self._settings.batch_bytes) if parts else ():
            write_columns(self._db, name, spec, batch, new=new)
            self._unflushed += length(batch)

    def _write_images(self, rows: Sequence[Row]) -> None:
        spec = self._existing().images
        # An array's text would take longer than everything else here.
        sizes = [sum(v.nbytes if isinstance(v, np.ndarray) else len(str(v)) for v in row.values()) for row in rows]
        for batch in records.batches(rows, sizes, self._settings.batch_bytes):
            write_columns(self._db, self._images, spec, records.image_columns(batch, spec))

    def _redeclared(self, key: int, count: int, metadata: Mapping[str, Any]) -> Columns:
        """The features of an image with other values of its declared fields."""
        spec = self._existing().features
        changed = {one.name: records.repeated(spec, one.name, metadata[one.name], count) for one in spec.filtered}
        return self.feature_columns({key: count}) | changed

    def _delete_features(self, counts: Mapping[int, int]) -> None:
        """Delete the features of images, given as feature counts by key."""
        keys = [feature_keys(key, count) for key, count in counts.items() if count]
        self._delete_rows(self._features, np.concatenate(keys).tolist() if keys else [])

    def _delete_rows(self, name: str, keys: Sequence[int]) -> None:
        """Delete by primary key, the last ones first."""
        for end in range(len(keys), 0, -_DELETED):
            self._db.call("deleting", self._client.delete, name, ids=list(keys[max(0, end - _DELETED) : end]))
        self._unflushed += len(keys)


def _leftovers(written: Mapping[int, Columns], stored: Mapping[int, Row], there: Set[int]) -> Keys:
    """Keys of features, in rising order, that earlier versions of these images have beyond the new ones. there: as of
    `_there`."""
    keys: list[npt.NDArray[np.int64]] = []
    for key, columns in written.items():
        count = length(columns)
        if key in stored:
            keys.append(feature_keys(key, max(count, int(stored[key]["feature_count"])), count))
        elif count < MAX_FEATURES and key << ORDINAL_BITS | count in there:
            keys.append(feature_keys(key, MAX_FEATURES, count))
    return np.concatenate(keys).tolist() if keys else []


def _check_collision(earlier: str, image_id: str) -> None:
    if earlier != image_id:
        raise DatabaseError(f"The ids {earlier!r} and {image_id!r} happen to have the same key: rename one of them.")
