"""DelfIndex: a collection of photos that can be asked what shows the same thing as a photo.

The only file in which model, store and retrieval meet.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from delf_milvus.errors import CollectionError, InputError, ModelError, NotFoundError, UsageError, one_line
from delf_milvus.featurefiles.arrays import LocalFeatures
from delf_milvus.featurefiles.formats import read_place
from delf_milvus.features import Box, Features, Fingerprint, clipped_box
from delf_milvus.imaging.decode import Source, source_digest
from delf_milvus.imaging.remote import is_address
from delf_milvus.ingestion.addresses import scan_addresses
from delf_milvus.ingestion.pipeline import Engine, IngestReport, Progress, gone, ingest_files, photos_here
from delf_milvus.ingestion.precomputed import gone_features, ingest_features, maker_of, scan_features
from delf_milvus.ingestion.reindex import ReindexReport, reindex
from delf_milvus.ingestion.scan import Scan, read_listing, scan
from delf_milvus.ingestion.shard import Shard
from delf_milvus.matcher import PairResult, PhotoMatcher
from delf_milvus.reporting.pictures import save_hits
from delf_milvus.reporting.search_page import SearchPage
from delf_milvus.retrieval.answers import Hit, Named, SearchResult, answer
from delf_milvus.retrieval.confidence import Calibration
from delf_milvus.retrieval.explain import Explanation, explain
from delf_milvus.retrieval.search import Candidate, Judgement, Timings, judge_candidates, shortlisted
from delf_milvus.retrieval.views import View, joined, views_of
from delf_milvus.settings import MOST_ANSWERS, Profile, SearchSettings, Settings, VerifySettings
from delf_milvus.store.connection import Connection
from delf_milvus.store.doctor import Check, examine
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.filters import Filter
from delf_milvus.store.fsck import FsckReport
from delf_milvus.store.indexing import BuildProgress
from delf_milvus.store.records import ImageRecord
from delf_milvus.store.transfer import ExportReport, ImportReport, export_collection, import_collection
from delf_milvus.store.upkeep import CompactionReport

if TYPE_CHECKING:
    from pymilvus import MilvusClient


log = logging.getLogger(__name__)


class DelfIndex:
    """Photos in Milvus, searchable by what they show.

    Use `DelfIndex.open(uri)`, or hand in a client that you own: `DelfIndex(client=client, collection="products")`.
    Searching is safe from several threads. A context manager; `close` releases what was opened here and never a
    client that was handed in.
    """

    def __init__(
        self,
        *,
        client: MilvusClient | Connection | None = None,
        collection: str | None = None,
        model: str | Path | None = None,
        settings: Settings | None = None,
        create: bool = True,
        any_model: bool = False,
        made_by: Fingerprint | None = None,
    ) -> None:
        """Open the collection over `client`, or over the database that `settings.uri` names.

        collection, model: override the settings. create: make the collection at the first write if it is absent.
        any_model: accept a collection of any model; such an index can list, show and delete, ingest and search features
        that were made elsewhere, but no photos. made_by: for a collection of features made elsewhere, who made them:
        `Fingerprint.elsewhere("superpoint-v1", 256)`; instead of a model.

        Raises DatabaseError, CollectionError or ModelError.
        """
        settings = settings or Settings()
        changes = {"collection": collection, "model": None if model is None else str(model)}
        self.settings = settings.model_copy(update={k: v for k, v in changes.items() if v is not None})
        self._matcher = PhotoMatcher(self.settings)
        self._added = False
        self._store = FeatureStore.open(
            self.settings.uri,
            self.settings.collection,
            made_by or (None if any_model else self._matcher.fingerprint),
            self.settings.store,
            token=self.settings.token.get_secret_value(),
            client=client,
            max_features=self.settings.extract.plan.stored_features,
            create=create,
        )

    @classmethod
    def open(
        cls,
        uri: str | Path | None = None,
        *,
        collection: str | None = None,
        token: str | None = None,
        model: str | Path | None = None,
        settings: Settings | None = None,
        create: bool = True,
        any_model: bool = False,
        made_by: Fingerprint | None = None,
    ) -> DelfIndex:
        """Open the database at `uri`: a path (embedded) or http(s)://host:port; the rest as for the constructor."""
        return cls(
            collection=collection,
            model=model,
            settings=(settings or Settings()).with_database(None if uri is None else str(uri), token),
            create=create,
            any_model=any_model,
            made_by=made_by,
        )

    def searching(self, search: SearchSettings | None = None, verify: VerifySettings | None = None) -> DelfIndex:
        """This index with other settings for searches alone, over the same database and model; never closed itself."""
        given = {"search": search, "verify": verify}
        other = copy.copy(self)
        other.settings = self.settings.model_copy(update={name: one for name, one in given.items() if one is not None})
        return other

    def load_model(self) -> None:
        """Load the network now instead of at the first photo. Raises ModelError."""
        _ = self._matcher.extractor

    @property
    def made_elsewhere(self) -> str:
        """Who made the features of the collection, where no model of ours did; else ""."""
        fingerprint = self._fingerprint
        return fingerprint.made_elsewhere if fingerprint else ""

    @property
    def _fingerprint(self) -> Fingerprint | None:
        """Of the collection, or of the one that would be made; None where any would do."""
        return self._store.stored_fingerprint or self._store.expected_fingerprint

    def require_model(self) -> None:
        """Raise CollectionError unless the collection is of this index's model, whatever it was opened with."""
        self._store.expect(self._matcher.fingerprint)

    def ingest(
        self,
        paths: Sequence[str | Path],
        *,
        id_prefix: str = "",
        ids_from: str | Path | None = None,
        prune: bool = False,
        dry_run: bool = False,
        shard: tuple[int, int] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> IngestReport:
        """Store the photos of folders; an image's id is `id_prefix` and its POSIX path relative to its folder.

        paths: folders and photos; or addresses of them, such as `s3://bucket/photos`, for whatever fsspec reads. Stored
        photos with the same content and model are left alone. ids_from: a CSV, JSONL or Parquet file with `path`,
        optional `id` and metadata; only its photos are ingested. prune: remove images of these folders whose file is
        gone. Where `settings.ingest.engine` is `ray`, the workers of a Ray cluster read and extract, and this process
        writes. A photo that fails is listed in the report and stops nothing else. shard: (i, n) takes, and prunes, part
        i of n alone, counted from 0, by the images' keys; n such calls, in any processes, store what one without it
        does, but leave the index of the descriptors as it is: when all have ended, call `build_index` once.

        Raises InputError for a path that does not exist, UsageError for two photos with one id, for folders together
        with addresses, for a shard that there is none, for a `store.bulk_storage` that cannot be used and where Ray is
        asked for and not installed, ClusterError, DatabaseError.
        """
        self._check_own()
        engine = self._engine(dry_run)
        listing = None if ids_from is None else read_listing(Path(ids_from))
        part = None if shard is None else Shard(*shard)
        addresses = [str(path) for path in paths if is_address(str(path))]
        if addresses and len(addresses) < len(paths):
            raise UsageError("Folders and addresses have rules of their own: ingest them one after the other.")
        if addresses:
            scanned = scan_addresses(addresses, id_prefix=id_prefix, listing=listing)
        else:
            roots, follow_links = [Path(path) for path in paths], self.settings.ingest.follow_links
            scanned = scan(roots, id_prefix=id_prefix, follow_links=follow_links, listing=listing)
        report = ingest_files(
            self._part(scanned, part), self._store, engine, self.settings, dry_run=dry_run, progress=progress
        )
        missing = partial(gone, self._store, scanned, report.failures)
        return self._ingested(report, missing if prune else None, dry_run, part)

    def ingest_features(
        self,
        paths: Sequence[str | Path],
        name: str = "",
        *,
        id_prefix: str = "",
        ids_from: str | Path | None = None,
        prune: bool = False,
        dry_run: bool = False,
        shard: tuple[int, int] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> IngestReport:
        """Store features that were made elsewhere, from `.npz`, `.delf` and `.h5` files and from folders of them.

        name: who made them, where the files do not say. An image's id is the path of its file without the suffix, or
        its name in an `.h5` file. Of each image the `stored_features` of highest score are kept, their descriptors
        scaled to unit L2 norm; descriptors of norm zero are left out. The other arguments as of `ingest`. An index
        opened with `any_model` makes an absent collection for what the first file says.

        Raises UsageError where nothing says who made them, or for two of one id; CollectionError where the collection
        has features of another extractor; InputError for a path that does not exist; DatabaseError.
        """
        if any(is_address(str(path)) for path in paths):
            raise UsageError("Feature files are read from folders of this machine: copy them to one.")
        listing = None if ids_from is None else read_listing(Path(ids_from))
        roots = [Path(path) for path in paths]
        part = None if shard is None else Shard(*shard)
        scanned = scan_features(
            roots, id_prefix=id_prefix, follow_links=self.settings.ingest.follow_links, listing=listing
        )
        made_by = maker_of(scanned, name) or self._fingerprint
        if made_by is None:
            raise InputError("None of these feature files can be read; `--features` takes .npz, .delf and .h5 files.")
        self._store.expect(made_by)
        report = ingest_features(
            self._part(scanned, part),
            self._store,
            made_by,
            self.settings,
            name=name,
            dry_run=dry_run,
            progress=progress,
        )
        missing = partial(gone_features, self._store, scanned, report.failures)
        return self._ingested(report, missing if prune else None, dry_run, part)

    def _engine(self, dry_run: bool) -> Engine:
        """What reads and extracts photos."""
        if self.settings.ingest.engine == "ray":
            from delf_milvus.ingestion.distributed import OnRay

            return OnRay(self.settings, self._matcher.fingerprint, dry_run=dry_run)
        return photos_here(lambda: self._matcher.extractor, self._matcher.fingerprint, self.settings, dry_run=dry_run)

    def _part(self, scanned: Scan, shard: Shard | None) -> Scan:
        return scanned if shard is None else shard.of(scanned, self.settings.store.tenant)

    def _ingested(
        self, report: IngestReport, missing: Callable[[], Sequence[str]] | None, dry_run: bool, shard: Shard | None
    ) -> IngestReport:
        """The end of every ingest: remove what `missing` finds, where that is asked for, and build the index."""
        if missing is not None and not report.interrupted and not report.stopped:
            tenant = self.settings.store.tenant
            ids = [one for one in missing() if shard is None or shard.takes(one, tenant)]
            report.removed = len(ids) if dry_run else len(self._store.delete(ids))
        # Exchanging an index releases the features, which other shards still read and write.
        if not dry_run and shard is None:
            self._store.ensure_index()
            self._added = False
        return report

    def reindex(
        self,
        *,
        allow_missing: bool = False,
        drop_old: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> ReindexReport:
        """Rebuild the collection for the model of this index, which was opened with `any_model`, and switch to it.

        The photos are read again from where they were ingested from. Indexes that are open on the old generation go on
        reading it; new ones find the new generation, and so does this one afterwards. Nothing is switched while photos
        are missing, unless `allow_missing`. drop_old: drop every other generation in the end. A collection of this
        model already is left as it is.

        Raises CollectionError where the database has no aliases, DatabaseError.
        """
        old, fingerprint = self._store, self._matcher.fingerprint
        if old.stored_fingerprint is None:
            raise CollectionError("There is no collection to rebuild yet; run `delf-milvus ingest FOLDER` first.")
        if name := self.made_elsewhere:
            raise CollectionError(
                f"This collection holds features made elsewhere ({name}), which no model here can make again: ingest "
                "new ones into another collection with `ingest --features`."
            )
        if old.stored_fingerprint == fingerprint:
            report = ReindexReport(old.generation, old.generation, images=old.count_images(), switched=True)
        else:
            plan = self.settings.extract.plan
            new = old.rebuilt(fingerprint, plan.stored_features)
            report = reindex(
                old,
                new,
                lambda: self._matcher.extractor,
                fingerprint,
                self.settings,
                allow_missing=allow_missing,
                progress=progress,
            )
            if report.switched:
                self._store = new
        if drop_old and report.switched:
            report.dropped = self._store.drop_others()
        return report

    def add(self, image: Source, image_id: str, metadata: Mapping[str, Any] | None = None, uri: str = "") -> int:
        """Store one photo (path, bytes, PIL image or RGB uint8 array (H, W, 3)), replacing what has its id.

        The index of the descriptors is brought up to date by the next `ingest` or by `close`. Returns the number of
        features stored. Raises ImageError when it cannot be decoded, InputError for an id or
        metadata that cannot be stored, DatabaseError.
        """
        self._check_own()
        extractor = self._matcher.extractor
        photo = self._matcher.decode(image, image_id)
        features = extractor.extract(photo, extractor.plan.stored_features)
        record = ImageRecord(
            image_id=image_id,
            uri=uri or (str(Path(image).absolute()) if isinstance(image, str | Path) else ""),
            sha256=source_digest(image, self.settings.decode, image_id),
            metadata=dict(metadata or {}),
        )
        self._store.write([(record, features)])
        self._added = True
        return len(features)

    def add_features(
        self, features: Features, image_id: str, metadata: Mapping[str, Any] | None = None, uri: str = ""
    ) -> None:
        """Store the features of one photo as they are, replacing what has its id; who made them is the caller's word.

        The index of the descriptors is brought up to date as by `add`. Raises CollectionError for descriptors of
        another length or too many features, InputError for an id or metadata that cannot be stored, DatabaseError.
        """
        record = ImageRecord(image_id=image_id, uri=uri, sha256=features.digest, metadata=dict(metadata or {}))
        self._store.write([(record, features)])
        self._added = True

    def read_features(self, place: str | Path) -> Features:
        """The features of a query in a `.npz` or `.delf` file, or of `features.h5#name`, for this collection.

        Raises InputError for a file that cannot be used, CollectionError where it says that another extractor made them
        than the collection's, or does not say that this model did.
        """
        found = read_place(place)
        stored = self._fingerprint
        features = found.features(self.settings.extract.plan.query_features, str(place))
        if stored is not None and len(features):
            _check_maker(found, stored, str(place))
        return features

    def search(
        self,
        image: Source | Features,
        top_k: int | None = None,
        *,
        box: Box | None = None,
        filter: Filter = "",
        include_unverified: bool = False,
    ) -> SearchResult:
        """Find the stored images that show the same thing as a photo.

        image: path, bytes, PIL image or RGB uint8 array (H, W, 3); or features, of what made the collection's: then no
        model is loaded. top_k: answers at most, else the settings'.
        box: x0, y0, x1, y1 in pixels, the part of the photo to search for. filter: only images that meet it, in
        declared fields: `{"tenant": "a", "year": {">=": 2020}}`, whose values are escaped, or an expression in Milvus's
        language, `'tenant == "a" and year >= 2020'`.

        Raises ImageError when the photo cannot be decoded, UsageError for a box outside of it or a filter that does not
        fit the collection, CollectionError for features of another length, DatabaseError.
        """
        queries = self.queries(image, top_k, box)
        source = _StoreSource(self._store, filter)
        found = [
            answer(
                query.features,
                source,
                query.search,
                self.settings.verify,
                self._matcher.calibration,
                query.timings,
                query_box=query.box,
                include_unverified=include_unverified and number == 0,
            )
            if len(query.features)
            else []
            for number, query in enumerate(queries)
        ]
        return self.result(queries, found, top_k)

    def query(self, image: Source | Features, top_k: int | None = None, box: Box | None = None) -> Query:
        """The first stage of a `search` for one view, which needs no database: arguments and errors as there."""
        return self._queries(image, top_k, box, one=True)[0]

    def queries(self, image: Source | Features, top_k: int | None = None, box: Box | None = None) -> list[Query]:
        """The same for all views that the settings ask for (`search.parts`, `search.turned`)."""
        return self._queries(image, top_k, box, one=False)

    def _queries(self, image: Source | Features, top_k: int | None, box: Box | None, *, one: bool) -> list[Query]:
        search = self.settings.search
        if top_k is not None:
            if top_k < 1:
                raise UsageError(f"The number of answers must be at least 1, not {top_k}.")
            search = search.model_copy(update={"top": top_k})
        timings = Timings()
        name = str(image) if isinstance(image, str | Path) else ""
        made_by = self._fingerprint or self._matcher.fingerprint

        def made(features: Features, search: SearchSettings, box: Box, view: View, size: tuple[int, int]) -> Query:
            return Query(name, made_by.short, features, search, box, timings, self.calibrated, view, size)

        if isinstance(image, Features):
            if not one and (search.parts or search.turned):
                raise UsageError("Parts and turned views are extracted from a photo; search with one, or without them.")
            clipped = clipped_box(box, image.width, image.height)
            (view,) = views_of(clipped, parts=False, turned=False)
            features = _inside(image, box).top(self.settings.extract.plan.query_features)
            return [made(features, search, clipped, view, (image.width, image.height))]
        self._check_own()
        with timings.measure("decode"):
            photo = self._matcher.decode(image)
        height, width = photo.shape[:2]
        clipped = clipped_box(box, width, height)
        views = views_of(clipped, parts=search.parts, turned=search.turned)
        if one or len(views) == 1:
            with timings.measure("extract"):
                features = self._matcher.query_features(photo, box)
            return [made(features, search, clipped, views[0], (width, height))]
        # What is left out of one view's answers may be wanted beside those of the others.
        all_hits = search.model_copy(update={"top": MOST_ANSWERS, "per_region": 0})
        found = []
        for view in views:
            with timings.measure("extract"):
                features = self._matcher.query_features(view.cut(photo))
            whole = (0.0, 0.0, float(features.width), float(features.height))
            found.append(made(features, all_hits, whole, view, (width, height)))
        return found

    def result(self, queries: Sequence[Query], found: Sequence[list[Hit]], top_k: int | None = None) -> SearchResult:
        """The last stage of a `search`: the answer of all its views with these hits."""
        if len(queries) == 1:
            return queries[0].result(found[0])
        search = self.settings.search
        hits = joined(
            [(query.view, hits) for query, hits in zip(queries, found, strict=True)],
            queries[0].size,
            max_false_alarm=self.settings.verify.max_false_alarm,
            top=top_k or search.top,
            per_region=search.per_region,
        )
        return queries[0].result(hits)

    def judge(self, features: Features, *, filter: Filter = "") -> Judgement:
        """Candidates of a query that was extracted already, with all their evidence, before any bar is applied.

        Raises UsageError for a filter that does not fit the collection, CollectionError, DatabaseError.
        """
        source = _StoreSource(self._store, filter)
        return judge_candidates(features, source, self.settings.search, self.settings.verify, Timings())

    def explain(
        self, image: Source | Features, image_id: str, *, box: Box | None = None, filter: Filter = ""
    ) -> Explanation:
        """What each stage of `search` thinks of one stored image; arguments and errors as there.

        Raises NotFoundError for an image that is not stored.
        """
        key = self.show(image_id).key
        query = self.query(image, None, box)
        source = _StoreSource(self._store, filter)
        chosen = shortlisted(query.features, source, query.search, query.timings)
        wanted = np.append(chosen.images[: query.search.candidates], key)
        stored = source.candidates(np.unique(wanted))
        return explain(
            query.features, chosen, key, stored, query.search, self.settings.verify, self._matcher.calibration
        )

    def match(self, first: Source, second: Source) -> PairResult:
        """Compare two photos; the database is not used. Raises ImageError."""
        return self._matcher.match(first, second)

    def draw_hits(
        self,
        photo: Source,
        result: SearchResult,
        folder: str | Path,
        *,
        box: Box | None = None,
        sheet: bool = False,
    ) -> list[Path]:
        """Write one match picture for each hit into `folder`; returns their paths.

        box: the part of the photo that was searched for. sheet: add a contact sheet of all. A hit whose photo is no
        longer where it was ingested from, or is no photo any more, gets no picture. Raises ImageError where the query
        cannot be decoded, InputError for a folder that cannot be written.
        """
        query = self._matcher.decode(photo)
        if box is not None:
            box = clipped_box(box, query.shape[1], query.shape[0])
        return save_hits(query, result, Path(folder), self.settings.decode, box=box, sheet=sheet)

    def search_page(self) -> SearchPage:
        """An empty page, to which the results of searches in this collection are added: see `SearchPage`."""
        return SearchPage(f"the collection {self.settings.collection}", self.settings.decode)

    def delete(self, image_ids: Sequence[str]) -> list[str]:
        """Delete images; returns the ids that were there. Raises DatabaseError."""
        return self._store.delete(image_ids)

    def list(
        self, prefix: str = "", limit: int | None = None, *, after: str = "", filter: Filter = ""
    ) -> list[ImageRecord]:
        """The stored images whose id starts with `prefix`, in order of their ids.

        after: only ids beyond this one, to go on from an earlier listing. filter: as of `search`; raises UsageError.
        """
        return list(self._store.list(prefix=prefix, limit=limit, after=after, where=filter))

    def show(self, image_id: str) -> ImageRecord:
        """What is stored of one image; raises NotFoundError."""
        record = self._store.records([image_id]).get(image_id)
        if record is None:
            meant = self.meant(image_id)
            raise NotFoundError(
                f"No image {one_line(image_id)} is stored{meant or '; `delf-milvus list` shows the ids.'}"
            )
        return record

    def meant(self, image_id: str) -> str:
        """What to say after an unknown id: ": did you mean a.jpg?", or nothing."""
        ids = [one_line(one) for one in self._store.similar_ids(image_id)]
        return f": did you mean {' or '.join(ids)}?" if ids else ""

    def export(
        self, folder: str | Path, *, prefix: str = "", progress: Callable[[int, int], None] | None = None
    ) -> ExportReport:
        """Write the collection, or its images whose id starts with `prefix`, into a new folder of Parquet files.

        progress: called with images done and images in all. Raises UsageError for a folder that holds other things,
        InputError when it cannot be written, DatabaseError.
        """
        return export_collection(self._store, Path(folder), prefix=prefix, progress=progress)

    def import_(
        self, folder: str | Path, *, prefix: str = "", progress: Callable[[int, int], None] | None = None
    ) -> ImportReport:
        """Store what `export` wrote, replacing images of the same id; what is stored unchanged is left alone.

        An index opened with `any_model` makes an absent collection for the exported model. Raises InputError for a
        folder that is no whole export, CollectionError for another model, DatabaseError.
        """
        report = import_collection(self._store, Path(folder), prefix=prefix, progress=progress)
        self._store.ensure_index()
        return report

    def status(self) -> dict[str, Any]:
        """Database, collection, index and model, as plain values."""
        return asdict(self._store.status())

    def build_index(
        self, profile: Profile | None = None, progress: Callable[[BuildProgress], None] | None = None
    ) -> None:
        """Build exactly the index of a profile, or of the settings' one, whatever there was before, and load it.

        With the setting "auto" it stays until it has too few lists for what was added. progress: called with the rows
        that are in the index, of all. Raises UsageError, before anything changes, for a profile that this server
        cannot build; CollectionError without a collection; DatabaseError.
        """
        self._store.build_index(profile, progress)
        self._added = False

    def drop_index(self) -> bool:
        """Release the features and drop their index: frees the memory that they take. Whether there was one.

        The next search or ingest builds it again, as `build_index` does at once.
        """
        return self._store.drop_index()

    def index_status(self) -> dict[str, Any]:
        """The index of the descriptors, as plain values; nothing is loaded or built for it."""
        return asdict(self._store.index_status(self.settings.search.neighbours))

    @property
    def store(self) -> FeatureStore:
        """The collections below, for tools that measure them; closed with this index."""
        return self._store

    @property
    def calibration(self) -> Calibration:
        """What a number of inliers means with this model; raises ModelError."""
        return self._matcher.calibration

    @property
    def calibrated(self) -> bool:
        """Whether the calibration was measured with the collection's features, or given by the settings."""
        return bool(self.settings.verify.calibration) or (not self.made_elsewhere and self._matcher.calibrated)

    def fsck(self, repair: bool = False, progress: Callable[[int, int], None] | None = None) -> FsckReport:
        """Look for what does not fit together in the database, and with `repair` mend it.

        Nobody may write meanwhile. progress: called with the rows read and the rows there are. Raises DatabaseError,
        CollectionError where there is no collection.
        """
        return self._store.fsck(repair, progress)

    def compact(self, progress: Callable[[str], None] | None = None) -> CompactionReport:
        """Merge small segments and drop deleted rows, and wait until that is done. Raises DatabaseError."""
        return self._store.compact(progress)

    @staticmethod
    def doctor(
        settings: Settings | None = None, *, client: MilvusClient | None = None, read_only: bool = False
    ) -> Iterator[Check]:
        """Check database, rights, versions, schema, model, clock and space; nothing that is found raises.

        read_only: without the checks that create, fill and drop a scratch collection.
        """
        settings = settings or Settings()
        try:
            fingerprint = PhotoMatcher(settings).fingerprint
        except ModelError as error:
            fingerprint = None
            yield Check("model file", "fail", str(error), "check --model")
        yield from examine(
            settings.uri,
            settings.collection,
            settings.store,
            fingerprint,
            token=settings.token.get_secret_value(),
            client=client,
            read_only=read_only,
        )

    def _check_own(self) -> None:
        """Raise CollectionError where photos cannot be extracted for this collection."""
        if name := self.made_elsewhere:
            raise CollectionError(
                f"This collection holds features made elsewhere ({name}), so photos cannot be extracted for it: give "
                "feature files with --features."
            )

    def close(self) -> None:
        """Bring the index up to date if photos were added, and release the database unless its client was handed in."""
        try:
            if self._added:
                self._store.ensure_index()
        finally:
            self._store.close()

    def __enter__(self) -> DelfIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, eq=False)
class Query:
    """A query photo after extraction, and how it is searched for.

    name: its path, or "". model: short fingerprint. box: the part searched for, pixels of what the features were
    extracted from: the photo, or where there are several views the view. calibrated: as of `SearchResult`. size: of the
    photo, (width, height).
    """

    name: str
    model: str
    features: Features
    search: SearchSettings
    box: Box
    timings: Timings
    calibrated: bool
    view: View
    size: tuple[int, int]

    def result(self, hits: list[Hit]) -> SearchResult:
        """The answer with these hits."""
        return SearchResult(
            query=self.name,
            model=self.model,
            matched=any(hit.verified for hit in hits),
            hits=hits,
            timings=self.timings,
            query_features=len(self.features),
            calibrated=self.calibrated,
        )


def candidates_of(stored: Mapping[int, tuple[ImageRecord, Features]]) -> dict[int, Candidate]:
    """What the store returns as what the search takes, by image key."""
    return {
        key: Candidate(record.image_id, record.uri, features, record.metadata, record.feature_count)
        for key, (record, features) in stored.items()
    }


def named_of(records: Mapping[int, ImageRecord]) -> dict[int, Named]:
    """The same for images that were not compared."""
    return {key: Named(record.image_id, record.uri, record.metadata) for key, record in records.items()}


class _StoreSource:
    """The store as the search sees it."""

    def __init__(self, store: FeatureStore, where: Filter) -> None:
        self._store = store
        self._where = where

    def neighbours(
        self, descriptors: npt.NDArray[np.float32], k: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        return self._store.neighbours(descriptors, k, self._where)

    def similar(
        self, descriptor: npt.NDArray[np.float32], k: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        return self._store.similar(descriptor, k, self._where)

    def candidates(self, image_keys: npt.NDArray[np.int64]) -> dict[int, Candidate]:
        return candidates_of(self._store.stored(image_keys))

    def named(self, image_keys: npt.NDArray[np.int64]) -> dict[int, Named]:
        return named_of(self._store.named(image_keys))


def _inside(features: Features, box: Box | None) -> Features:
    """The features whose keypoints lie in the box."""
    if box is None:
        return features
    low, high = np.array(clipped_box(box, features.width, features.height)).reshape(2, 2)
    inside = np.all((features.locations >= low) & (features.locations <= high), axis=1)
    return features.take(np.flatnonzero(inside))


def _check_maker(found: LocalFeatures, stored: Fingerprint, place: str) -> None:
    """Raise unless a query's features can be compared with the stored ones, as far as anybody can tell."""
    try:
        said = found.fingerprint
    except ValueError as error:
        raise InputError(f"{one_line(place)} cannot be used as a feature file: {error}.") from error
    if said is None and not stored.made_elsewhere:
        raise CollectionError(
            f"{one_line(place)} does not say which model made its features; extract them with --format npz or hloc for "
            "a collection that a model of ours made."
        )
    dim = found.descriptors.shape[1]
    if said is None and dim != stored.dim:
        said = Fingerprint.elsewhere(stored.weights, dim, stored.global_dim)
    if said is not None and said != stored:
        differences = "; ".join(stored.differences(said))
        raise CollectionError(
            f"{one_line(place)} has features of another extractor than the collection ({differences}): search with the "
            "one that it was made with."
        )
