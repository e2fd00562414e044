"""Which photos behind addresses an ingest takes: `scan` for what fsspec reads, with the same ids and suffixes."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from pathlib import Path

from delf_milvus.errors import UsageError, one_line
from delf_milvus.imaging import remote
from delf_milvus.ingestion.scan import SUFFIXES, TOO_LONG_ID, Failure, Listing, Photo, Row, Scan, bad_line, is_unicode
from delf_milvus.store.schema import MAX_ID_BYTES


def scan_addresses(addresses: Sequence[str], *, id_prefix: str = "", listing: Listing | None = None) -> Scan:
    """The photos below these addresses, and those at them.

    As in a folder, a photo is a file with one of `SUFFIXES`, names with a leading dot are skipped, and an id is the
    path below the address that was given. listing: take the files it names, whatever their suffix; whether they are
    there is seen when they are read.

    Raises InputError for an address that cannot be read and for a listing that names something outside of it;
    UsageError for an address with a secret in it, and where two photos get one id.
    """
    if not is_unicode(id_prefix):
        raise UsageError(f"The id prefix {one_line(id_prefix)} is not valid UTF-8.")
    bases = list(dict.fromkeys(remote.checked(address) for address in addresses))
    gathering = _Gathering(id_prefix)
    if listing is not None:
        if len(bases) > 1:
            raise UsageError("A listing is of one address: ingest them one at a time.")
        for row in listing.rows:
            gathering.take_listed(row, bases[0], listing)
    else:
        for base in bases:
            gathering.walk(base)
    return Scan(
        [photo for _, photo in sorted(gathering.photos.items())],
        sorted(gathering.failures, key=lambda failure: failure.path),
        [],
        addresses=bases,
    )


class _Gathering:
    """What a scan has found so far."""

    def __init__(self, id_prefix: str) -> None:
        self.photos: dict[str, Photo] = {}
        self.failures: list[Failure] = []
        self._id_prefix = id_prefix

    def walk(self, base: str) -> None:
        """Take the photos below an address, or the one that it is of, whatever its name."""
        for address in remote.files(base):
            if address == base:
                folder, _, name = base.rpartition("/")
                self.take(folder, name, name)
                continue
            path = address[len(base) + 1 :]
            hidden = any(part.startswith(".") for part in path.split("/"))
            if not hidden and posixpath.splitext(path)[1].lower() in SUFFIXES:
                self.take(base, path, path)

    def take_listed(self, row: Row, base: str, listing: Listing) -> None:
        """Take the photo that a row names."""
        path = remote.below(base, row.path) if remote.is_address(row.path) else row.path
        if path is None or path.startswith("/"):
            bad_line(listing.source, row.line, f"{one_line(row.path)} lies outside of {one_line(base)}")
        self.take(base, path, path if row.image_id is None else row.image_id, row)

    def take(self, base: str, path: str, name: str, row: Row | None = None) -> None:
        """Take one photo under the id `name`, which the prefix precedes."""
        image_id = self._id_prefix + name
        photo = Photo(Path(path), image_id, Path(), {} if row is None else row.metadata, base=base)
        if photo.place != f"{base}/{path}" or not is_unicode(photo.place + image_id):
            self._fail(f"{base}/{path}", "has a name that no path can have; rename it")
        elif len(image_id.encode()) > MAX_ID_BYTES:
            self._fail(photo.place, f"has an id {TOO_LONG_ID}")
        elif self.photos.setdefault(image_id, photo).place != photo.place:
            raise UsageError(
                f"The id {one_line(image_id)} would stand for both {one_line(self.photos[image_id].place)} and "
                f"{one_line(photo.place)}; ingest them one at a time, each with its own --id-prefix."
            )

    def _fail(self, place: str, problem: str) -> None:
        self.failures.append(Failure(one_line(place), f"{one_line(place)} {problem}."))
