"""Features that were made elsewhere, from their files to stored rows: the pipeline of photos without the network.

A photo's id is the name of its file below the folder that was given, without the suffix of the feature file
(`a/b.jpg.npz` and `a/b.npz` are `a/b.jpg` and `a/b`), or the name of its group in an `.h5` file. So features that
`extract` wrote have the ids that their photos would have.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from delf_milvus.errors import CollectionError, InputError, UsageError, one_line
from delf_milvus.featurefiles import hloc
from delf_milvus.featurefiles.arrays import LocalFeatures, damaged, maker
from delf_milvus.featurefiles.formats import MANY, SUFFIXES, read_with_digest, split_place
from delf_milvus.features import Features, Fingerprint
from delf_milvus.ingestion.pipeline import Here, IngestReport, Prepared, Progress, Work, ingest_files, prepared
from delf_milvus.ingestion.scan import Failure, Listing, Photo, Scan, scan
from delf_milvus.settings import Settings
from delf_milvus.store.codec import chunks_needed
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.records import ImageRecord

_MOST_CHUNKS = 40
"""VARCHAR fields of an image at most: a collection of Milvus has 64 fields."""


def scan_features(
    paths: Sequence[Path], *, id_prefix: str = "", follow_links: bool = True, listing: Listing | None = None
) -> Scan:
    """The photos that the feature files in these folders, and these files, are of.

    Arguments and errors as of `scan`; UsageError also for a file of another kind and for photos of one id.
    """
    found = scan(paths, follow_links=follow_links, listing=listing, suffixes=SUFFIXES)
    given = {Path(os.path.abspath(path)) for path in paths}
    photos: dict[str, Photo] = {}
    failures, roots = list(found.failures), list(found.roots)
    for file in found.photos:
        if file.path.suffix.lower() not in SUFFIXES:
            ends = ", ".join(sorted(SUFFIXES))
            raise UsageError(f"{one_line(file.path)} is not a feature file; it must end with one of {ends}.")
        try:
            inside = _photos(file, listing is not None)
        except InputError as error:
            failures.append(Failure(str(file.path), str(error)))
            continue
        if file.path in given and file.path.suffix.lower() in MANY:
            inside = [replace(photo, root=file.path) for photo in inside]
            roots.append(file.path)
        for photo in inside:
            image_id = id_prefix + photo.image_id
            other = photos.setdefault(image_id, replace(photo, image_id=image_id))
            if other.place != photo.place:
                raise UsageError(
                    f"The id {one_line(image_id)} would stand for both {one_line(other.place)} and "
                    f"{one_line(photo.place)}; ingest them one at a time, each with its own --id-prefix."
                )
    return Scan([photo for _, photo in sorted(photos.items())], failures, roots)


def _photos(file: Photo, listed: bool) -> list[Photo]:
    if file.path.suffix.lower() not in MANY:
        name, suffix = file.path.name, file.path.suffix
        # A listing may have given it an id of its own.
        image_id = file.image_id.removesuffix(suffix) if file.image_id.endswith(name) else file.image_id
        return [replace(file, image_id=image_id)]
    if listed:
        raise UsageError("A listing names photos or .npz and .delf files, not what is inside an .h5 file.")
    return [replace(file, image_id=name, inside=name) for name in hloc.names(file.path)]


def maker_of(scanned: Scan, name: str = "") -> Fingerprint | None:
    """Who made the features, by the first file that can be read; None where none can.

    name: who made those of files that do not say. Raises UsageError where neither says it, or where the name cannot be
    one.
    """
    for photo in scanned.photos:
        try:
            found, _ = read_with_digest(photo.path, photo.inside)
            if not len(found.keypoints):
                continue
            return _maker(found, name, photo.place)
        except InputError:
            continue
    return None


def _maker(found: LocalFeatures, name: str, source: str) -> Fingerprint:
    """Raises UsageError where neither file nor name says it, InputError where the file's entry is damaged."""
    dim = found.descriptors.shape[1]
    try:
        said = found.fingerprint
    except ValueError as error:
        damaged(source, str(error), error)
    if said is not None:
        return said
    if not name:
        raise UsageError(
            f"{one_line(source)} does not say who made its features: name that with --features-name, as in "
            "superpoint-v1."
        )
    try:
        return maker(name, dim, found.global_dim)
    except ValueError as error:
        raise UsageError(f"--features-name {one_line(name)}: {error}.") from error


def usable(found: LocalFeatures, fingerprint: Fingerprint, count: int, name: str, source: str) -> Features:
    """The features of a file for a collection of this fingerprint, the best `count`; raises InputError."""
    if not len(found.keypoints):
        found = replace(found, descriptors=np.empty((0, fingerprint.dim), np.float32))
    features = found.features(count, source)
    said = _maker(found, name, source)
    if said != fingerprint:
        differences = "; ".join(fingerprint.differences(said))
        raise InputError(f"{one_line(source)} has features of another extractor than the collection ({differences}).")
    return features


def ingest_features(
    scanned: Scan,
    store: FeatureStore,
    fingerprint: Fingerprint,
    settings: Settings,
    *,
    name: str = "",
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> IngestReport:
    """Store the features of scanned files, of each photo the `stored_features` of highest score.

    name: who made those of files that do not say. Raises CollectionError for features too large to be stored,
    DatabaseError.
    """
    count = settings.extract.plan.stored_features
    if (chunks := chunks_needed(count, fingerprint.dim)) > _MOST_CHUNKS:
        raise CollectionError(
            f"{count} features of {fingerprint.dim} components would take {chunks} fields of an image's row, more than "
            f"{_MOST_CHUNKS}: keep fewer with --count {count * _MOST_CHUNKS // chunks}."
        )

    def prepare(work: Work) -> Prepared[Features]:
        photo = work.photo
        found, digest = read_with_digest(photo.path, photo.inside)
        features = usable(found, fingerprint, count, name, photo.place)
        return prepared(work.described(digest), work.stored, fingerprint, _is_there, lambda: features)

    engine = Here(prepare, _AsTheyAre(), settings.ingest, dry_run)
    return ingest_files(scanned, store, engine, settings, dry_run=dry_run, progress=progress)


class _AsTheyAre:
    """Features that were extracted elsewhere."""

    at_once = 1

    def __call__(self, contents: Sequence[tuple[str, Features]], /) -> list[Features | InputError]:
        return [features for _, features in contents]


def gone_features(store: FeatureStore, scanned: Scan, failures: Sequence[Failure]) -> list[str]:
    """Ids of the stored images of these roots whose features have left the disk, or the `.h5` file.

    What could not be read is not gone: nobody looked.
    """
    unread = [split_place(failure.path)[0] for failure in failures]
    places = {photo.place for photo in scanned.photos}
    missing = []
    for root in scanned.roots:
        for record in store.list(root=str(root)):
            file, inside = split_place(record.uri)
            seen = not any(place == file or place in file.parents for place in unread)
            left = record.uri not in places if inside else not os.path.lexists(record.uri)
            if seen and left:
                missing.append(record.image_id)
    return missing


def _is_there(record: ImageRecord) -> bool:
    return os.path.isfile(record.uri) or split_place(record.uri)[0].is_file()
