"""How fast rows reach a server: through bulk import and through upserts, each beside pymilvus alone, and a backup.

    python tests/benchmarks/moving.py --images 1000
    python tests/benchmarks/moving.py --uri http://localhost:19530 --storage /mnt/milvus --path /var/lib/milvus/shared

"ingest" is the pipeline of `ingest` with features that are ready at once: by messages, 16 images a write, and as files.
Without --uri the test suite's own server is started. "raw" is pymilvus with the same feature arrays and nothing else,
up to where every row can be found; "ours" is `FeatureStore.write`, which also packs and writes the images' rows. Ratios
count: the machine that runs this runs the server too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from pymilvus import MilvusClient

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "store"))

from milvus_server import WheelServer
from store_samples import random_features

from delf_milvus.features import Features, Fingerprint
from delf_milvus.ingestion.pipeline import Outcome, Outcomes, Work, ingest_files
from delf_milvus.ingestion.scan import Photo, Scan
from delf_milvus.settings import Settings, StoreSettings
from delf_milvus.store import records
from delf_milvus.store.columns import Columns, joined, length
from delf_milvus.store.feature_store import FeatureStore
from delf_milvus.store.records import ImageRecord
from delf_milvus.store.schema import features_spec, to_pymilvus
from delf_milvus.store.transfer import export_collection, import_collection

DIM = 40
MODEL = Fingerprint("benchmark", "norm", DIM, 640, (1.0,), 16)
Items = list[tuple[ImageRecord, Features]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="of 1000 features each")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--parts", nargs="+", default=["bulk", "upserts", "ingest", "backup"])
    parser.add_argument("--uri")
    parser.add_argument("--storage", help="folder that this machine and the server share")
    parser.add_argument("--path", default="", help="how the server calls it")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    items = [(ImageRecord(f"i/{n:06}.jpg"), random_features(rng, 1000, DIM)) for n in range(options.images)]
    spec = features_spec(DIM)
    columns = joined([records.feature_columns(record.key, features, spec, {}) for record, features in items])
    with tempfile.TemporaryDirectory() as work:
        home = Path(work) / "milvus"
        home.mkdir()
        server = None if options.uri else WheelServer(home)
        try:
            uri = options.uri or (server.uri if server else "")
            storage = options.storage or str(server.storage / "stage" if server else "")
            Path(storage).mkdir(exist_ok=True)
            for _ in range(options.rounds):
                measure(uri, storage, options.path, items, columns, Path(work), options.parts)
        finally:
            if server:
                server.kill()


def measure(uri: str, storage: str, path: str, items: Items, columns: Columns, work: Path, parts: list[str]) -> None:
    rows = length(columns)
    client = MilvusClient(uri)

    def timed(name: str, run: Callable[[str], object], beside: float = 0.0) -> float:
        collection = f"bench{uuid.uuid4().hex[:8]}"
        try:
            run_time = run(collection)
            rate = rows / float(str(run_time))
        finally:
            for one in client.list_collections():
                if one.startswith(collection):
                    client.drop_collection(one)
        print(f"{name:42}{rate:10,.0f} rows/s" + (f"{rate / beside:7.2f} x" if beside else ""), flush=True)
        return rate

    def store(collection: str, bulk: bool) -> FeatureStore:
        settings = StoreSettings(bulk_storage=storage if bulk else "", bulk_path=path, bulk_from=min(rows, 500_000))
        return FeatureStore.open(uri, collection, MODEL, settings, max_features=1000)

    def created(collection: str) -> None:
        params = client.prepare_index_params()
        params.add_index("descriptor", index_type="FLAT", metric_type="IP")
        client.create_collection(collection, schema=to_pymilvus(features_spec(DIM)), index_params=params)

    def found(collection: str) -> bool:
        counted = client.query(collection, filter="", output_fields=["count(*)"], consistency_level="Strong")
        return int(counted[0]["count(*)"]) == rows

    def raw_bulk(collection: str) -> float:
        created(collection)
        handler = client._get_connection()
        started = time.perf_counter()
        folder = Path(storage) / collection
        folder.mkdir()
        for name, values in columns.items():
            np.save(folder / f"{name}.npy", values)
        task = handler.do_bulk_insert(
            collection, "", [f"{path or storage}/{collection}/{name}.npy" for name in columns], timeout=60
        )
        while (state := handler.get_bulk_insert_state(task, timeout=60)).state != 6:
            assert state.state not in (1, 7), state.failed_reason
            time.sleep(0.1)
        client.refresh_load(collection, timeout=600)
        while not found(collection):
            time.sleep(0.1)
        return time.perf_counter() - started

    def raw_upsert(collection: str) -> float:
        created(collection)
        names = list(columns)
        started = time.perf_counter()
        for start in range(0, rows, 40_000):
            parts = [columns[name][start : start + 40_000] for name in names]
            values = [list(part) if part.ndim > 1 else part.tolist() for part in parts]
            client.upsert(collection, [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)])
        return time.perf_counter() - started

    def ours(bulk: bool) -> Callable[[str], float]:
        def run(collection: str) -> float:
            with store(collection, bulk) as opened:
                opened._created()
                started = time.perf_counter()
                opened.write(items)
                taken = time.perf_counter() - started
                assert (opened.count_images(), opened.count_features()) == (len(items), rows)
            return taken

        return run

    def ingest(bulk: bool) -> Callable[[str], float]:
        features = {record.image_id: one for record, one in items}
        photos = [Photo(Path(name), name, Path("i")) for name in features]

        def engine(works: Iterable[Work]) -> Outcomes:
            for one in works:
                yield one.photo, Outcome(one.described("ab" * 32), features[one.photo.image_id], False, False)

        def run(collection: str) -> float:
            with store(collection, bulk) as opened:
                opened._created()
                report = ingest_files(Scan(photos, [], []), opened, engine, Settings())
                assert (opened.count_images(), opened.count_features()) == (len(items), rows)
            return report.seconds

        return run

    folder = work / uuid.uuid4().hex

    def backup(collection: str) -> float:
        with store(collection, bulk=False) as opened:
            opened.write(items)
            started = time.perf_counter()
            export_collection(opened, folder)
            return time.perf_counter() - started

    def restore(bulk: bool) -> Callable[[str], float]:
        def run(collection: str) -> float:
            with store(collection, bulk) as opened:
                started = time.perf_counter()
                import_collection(opened, folder)
                taken = time.perf_counter() - started
                assert (opened.count_images(), opened.count_features()) == (len(items), rows)
            return taken

        return run

    if "bulk" in parts:
        raw = timed("bulk import, raw .npy", raw_bulk)
        timed("bulk import, ours", ours(bulk=True), raw)
    if "upserts" in parts:
        raw = timed("upserts, raw row dictionaries", raw_upsert)
        timed("upserts, ours", ours(bulk=False), raw)
    if "ingest" in parts:
        messages = timed("ingest, messages", ingest(bulk=False))
        timed("ingest, files", ingest(bulk=True), messages)
    if "backup" in parts:
        timed("export", backup)
        timed("import, bulk", restore(bulk=True))
        timed("import, upserts", restore(bulk=False))
    client.close()


if __name__ == "__main__":
    main()
