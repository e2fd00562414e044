"""One part of the photos, for one job of an array: parts that the jobs agree on without talking to each other.

Contract: for any number of parts each image key belongs to exactly one of them. Which one depends on nothing but the
key, so a job that is run again, on whatever machine, takes the same photos and those added to its part since.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from delf_milvus.errors import UsageError, one_line
from delf_milvus.ingestion.scan import Scan
from delf_milvus.store.keys import image_key


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`, counted from 0: the images whose key leaves that remainder when divided by `count`.

    Raises UsageError where there is no such part.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"Photos are divided into at least 1 shard, not {self.count}.")
        if not 0 <= self.number < self.count:
            raise UsageError(
                f"There is no shard {self}: shards are counted from 0, so the last of {self.count} is "
                f"{self.count - 1}/{self.count}."
            )

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `I/N`; raises UsageError."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if found is None:
            raise UsageError(
                f"--shard takes I/N, as in 0/8 for the first of eight and 7/8 for the last, not {one_line(text)}."
            )
        return cls(int(found[1]), int(found[2]))

    def takes(self, image_id: str, tenant: str = "") -> bool:
        """Whether an image belongs to this part."""
        return image_key(image_id, tenant) % self.count == self.number

    def of(self, scanned: Scan, tenant: str = "") -> Scan:
        """This part of what was scanned.

        Failures stay with every part: below a folder that could not be read may lie photos of each.
        """
        photos = [photo for photo in scanned.photos if self.takes(photo.image_id, tenant)]
        return replace(scanned, photos=photos, others=scanned.others + len(scanned.photos) - len(photos))
