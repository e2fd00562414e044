"""What a writer is about to take away, noted with the collection before it does, so that a kill loses none of it.

Between the moment an image's row is deleted and the moment its features are, or its row is written anew, nothing in the
two collections says that there was such an image. A note does: a property of the images collection.

- A deletion is noted by its number of features: the next writer deletes those that are left.
- An image that is written anew with the metadata it had is noted with that: whoever ingests it again gets it back.
- Each writer has one of a few properties, drawn at random, because no database can change a part of one. It is empty
  when nothing is under way; not every server can drop it.
- A server that refuses notes (an account may lack the right) is written to without them: then a kill may leave features
  of no image, which `fsck` finds, and lose the metadata of the images that were being written.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from delf_milvus.errors import DatabaseError
from delf_milvus.store.connection import AwayError, Connection, DeadlineError
from delf_milvus.store.profiles import Engine

log = logging.getLogger(__name__)

_PROPERTY = "delf_milvus_unfinished_"
_WRITERS = 16


class Unfinished(NamedTuple):
    """One image of a note. feature_count: that it had. metadata: that it is to keep; None for a deletion."""

    feature_count: int
    metadata: Mapping[str, Any] | None = None


class Notes:
    """The notes of one writer on one images collection. The store's write lock is held around it."""

    def __init__(self, database: Connection, images: str) -> None:
        self._db = database
        self._images = images
        self._own = f"{_PROPERTY}{random.SystemRandom().randrange(_WRITERS)}"
        self._texts: dict[str, str] = {}
        self._noted: dict[int, Unfinished] = {}
        self._is_read = False

    @property
    def noted(self) -> Mapping[int, Unfinished]:
        """What is under way, or was when a writer was killed, by image key."""
        return self._noted

    def read(self) -> None:
        """Once: take over what other writers have left. Raises DatabaseError."""
        if self._is_read:
            return
        described = self._db.call("reading notes", self._db.client.describe_collection, self._images)
        properties = described.get("properties") or {}
        self._texts = {name: text for name, text in properties.items() if name.startswith(_PROPERTY) and text}
        for name, text in self._texts.items():
            self._noted |= _parsed(text, f"{name} of {self._images}")
        self._is_read = True

    def add(self, images: Mapping[int, Unfinished]) -> None:
        """Note what is about to begin; returns when it is stored. Raises DatabaseError for a database that is away."""
        if images:
            self._noted |= images
            self._store()

    def remove(self, keys: Iterable[int]) -> None:
        """These are finished."""
        finished = set(keys)
        left = {key: one for key, one in self._noted.items() if key not in finished}
        if left != self._noted or self._texts.keys() - {self._own}:
            self._noted = left
            self._store()

    def _store(self) -> None:
        """All of it under the own name, in one call that also empties the others' that were taken over."""
        text = json.dumps({str(key): [*one] for key, one in self._noted.items()}, default=dict) if self._noted else ""
        texts = {**dict.fromkeys(self._texts, ""), self._own: text}
        if texts == {self._own: self._texts.get(self._own, "")}:
            return
        # Milvus stores only with an alteration the one before it, up to 2.3.5: one kill, and the last was never made.
        times = 2 if self._db.backend == "server" and Engine.of(self._db.version).release < (2, 4) else 1
        alter = self._db.client.alter_collection_properties
        try:
            for _ in range(times):
                self._db.call("noting what is begun", alter, self._images, properties=texts)
        except (AwayError, DeadlineError):
            raise
        except DatabaseError as error:
            log.info("%s", error)
            return
        self._texts = {name: value for name, value in texts.items() if value}


def _parsed(text: str, what: str) -> dict[int, Unfinished]:
    try:
        return {int(key): Unfinished(int(count), kept) for key, (count, kept) in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        log.warning("The property %s is no note of this version, and is left out.", what)
        return {}
