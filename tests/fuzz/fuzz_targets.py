"""What is fuzzed: every reader of the package that bytes of strangers reach.

A reader takes an input and a folder of its own, and returns, or raises an error of `delf_milvus.errors`; everything
else is a finding: another exception, a crash, an input that takes too long or too much memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import pickle
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "store")]

from fuzz import fuzz_mutations as mutations

Reader = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """One reader.

    start: given an empty folder, makes whole inputs and the reader, which may use that folder. megabytes: memory that
    one input may take, beside what reading the whole ones takes.
    """

    start: Callable[[Path], tuple[list[bytes], Reader]]
    mutation: mutations.Mutation
    megabytes: int = 200


def _images(folder: Path) -> tuple[list[bytes], Reader]:
    from PIL import Image

    from delf_milvus.imaging.decode import decode
    from delf_milvus.settings import DecodeSettings

    y, x = np.mgrid[0:96, 0:128]
    colours = np.stack([x * 2, y * 2, (x ^ y) & 255], axis=-1).astype(np.uint8)
    photo = Image.fromarray(colours)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "somewhere"
    seeds = []

    def add(image: Image.Image, kind: str, **options: Any) -> None:
        stream = io.BytesIO()
        if kind in Image.SAVE:
            image.save(stream, kind, **options)
            seeds.append(stream.getvalue())

    Image.init()
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF", "JPEG2000", "MPO"):
        add(photo, kind)
    add(photo, "JPEG", exif=exif, progressive=True)
    add(photo.convert("CMYK"), "JPEG")
    add(photo.convert("RGBA"), "PNG", exif=exif)
    add(photo.convert("P"), "PNG", transparency=3)
    add(photo, "WEBP", lossless=True, exif=exif)
    for compression in ("jpeg", "tiff_lzw", "tiff_deflate", "packbits", "group4"):
        add(photo.convert("1") if compression == "group4" else photo, "TIFF", compression=compression, exif=exif)
    add(Image.fromarray(colours[..., 0].astype(np.uint16) << 8), "TIFF")
    add(Image.fromarray(colours[..., 0].astype(np.float32)), "TIFF")
    add(photo, "GIF", save_all=True, append_images=[photo.rotate(90)])
    add(photo, "WEBP", save_all=True, append_images=[photo.rotate(90)])
    limits = DecodeSettings(max_pixels=1_000_000, max_bytes=10_000_000)

    def read(data: bytes) -> object:
        pixels = decode(data, limits)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert 0 < pixels.shape[0] * pixels.shape[1] <= limits.max_pixels
        return pixels

    return seeds, read


def _feature_files(suffix: str) -> Callable[[Path], tuple[list[bytes], Reader]]:
    def start(folder: Path) -> tuple[list[bytes], Reader]:
        from featurefiles.samples import local_features

        from delf_milvus.featurefiles import delf, hloc, npz, reading
        from delf_milvus.featurefiles.formats import read_with_digest

        path = folder / f"features{suffix}"
        seeds = []
        for seed, optional in enumerate((True, False)):
            path.unlink(missing_ok=True)
            found = local_features(seed, 20, 16, optional=optional, extractor="superpoint-v1", whole=4 * optional)
            if suffix == ".h5":
                hloc.write(path, "db/a.jpg", found)
                hloc.write(path, "b.jpg", found)
            else:
                (npz if suffix == ".npz" else delf).write(path, found)
            seeds.append(path.read_bytes())

        def read(data: bytes) -> object:
            path.write_bytes(data)
            names = hloc.names(path)[:5] if suffix == ".h5" else [""]
            found = [read_with_digest(path, name)[0].features(100, "a file") for name in names]
            # Once its process runs: on some of what follows the HDF5 library loops without end.
            reading.SECONDS = 5.0
            return found

        return seeds, read

    return start


def _weights(folder: Path) -> tuple[list[bytes], Reader]:
    import torch
    from model.models import write_tiny_model

    from delf_milvus.errors import ModelError
    from delf_milvus.model import weights
    from delf_milvus.model.extractor import Extractor
    from delf_milvus.settings import ExtractSettings

    torch.set_num_threads(1)
    path = write_tiny_model(folder / "model.safetensors")
    photo = np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8)
    settings = ExtractSettings(scales=(1.0,), longest_side=80)

    def read(data: bytes) -> object:
        path.write_bytes(data)
        with contextlib.suppress(ModelError):
            weights.initial_trunk(path)
        return Extractor(path, settings).extract(photo, 20)

    return [path.read_bytes()], read


def _calibration(folder: Path) -> tuple[list[bytes], Reader]:
    from delf_milvus.model.spec import BUNDLED
    from delf_milvus.retrieval.confidence import Calibration
    from delf_milvus.retrieval.evidence import NAMES

    path = folder / "calibration.json"
    evidence = np.random.default_rng(0).uniform(0, 50, (70, len(NAMES)))

    def read(data: bytes) -> object:
        path.write_bytes(data)
        found = Calibration.read(path)
        for assessed in (found.assess(evidence), found.assess_pairs(evidence)):
            for share in assessed:
                assert ((share >= 0) & (share <= 1)).all(), "no probability"
        return found

    return [BUNDLED.with_name("delf_resnet50v2.calibration.json").read_bytes()], read


def _listings(folder: Path) -> tuple[list[bytes], Reader]:
    from delf_milvus.errors import InputError
    from delf_milvus.ingestion.scan import read_listing, scan
    from delf_milvus.store.fields import declared, typed_values
    from delf_milvus.store.records import ImageRecord, checked

    photos = folder / "photos"
    (photos / "more").mkdir(parents=True)
    for name in ("a.jpg", "more/b.jpg", "ü.jpg"):
        (photos / name).write_bytes(b"x")
    csv = 'path,id,year,title\na.jpg,first,2020,"A ""house"", red"\nmore/b.jpg,,1999,\nü.jpg,third,0,\n'
    jsonl = '{"path": "a.jpg", "id": "first", "tags": [1, {"a": null}]}\n\n{"path": "more/b.jpg", "year": 1999.0}\n'
    fields = declared({"year": "integer=0", "title": "text=", "price": "number=0", "sold": "boolean=false"})

    def read(data: bytes) -> object:
        for suffix in (".csv", ".jsonl"):
            path = folder / f"listing{suffix}"
            path.write_bytes(data)
            try:
                found = scan([photos], listing=read_listing(path))
            except InputError:
                if suffix == ".jsonl":
                    raise
                continue
            for photo in found.photos:
                assert photo.path.resolve().is_relative_to(photos.resolve()), "a listing leads out of its folder"
                checked(ImageRecord(photo.image_id, photo.place, metadata=photo.metadata))
                typed_values(fields, photo.metadata, "one")
            return found
        return None

    return [csv.encode(), jsonl.encode()], read


def _parquet_listings(folder: Path) -> tuple[list[bytes], Reader]:
    import pyarrow as pa
    from pyarrow import parquet

    from delf_milvus.ingestion.scan import read_listing, scan
    from delf_milvus.store.records import ImageRecord, checked

    photos = folder / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"x")
    path = folder / "listing.parquet"
    rows = [
        {
            "path": "a.jpg",
            "id": "first",
            "year": 2020,
            "price": 1.5,
            "tags": ["red", None],
            "of": {"name": "ü", "n": 1},
        },
        {"path": "b.jpg", "id": None, "year": None, "price": 2.0, "tags": [], "of": None},
    ]
    samples = []
    for compression in ("none", "snappy"):
        parquet.write_table(pa.Table.from_pylist(rows), path, compression=compression)
        samples.append(path.read_bytes())

    def read(data: bytes) -> object:
        path.write_bytes(data)
        found = scan([photos], listing=read_listing(path))
        for photo in found.photos:
            assert photo.path.resolve().is_relative_to(photos.resolve()), "a listing leads out of its folder"
            checked(ImageRecord(photo.image_id, photo.place, metadata=photo.metadata))
        return found

    return samples, read


def _filters(folder: Path) -> tuple[list[bytes], Reader]:
    from dataclasses import replace

    from store_samples import MODEL, random_items

    from delf_milvus.errors import UsageError
    from delf_milvus.service.wire import filter_of
    from delf_milvus.settings import StoreSettings
    from delf_milvus.store.feature_store import FeatureStore

    fields = {"shop": "text", "year": "integer=0", "price": "number=0", "sold": "boolean=false"}
    settings = StoreSettings(fields=fields, tenant_field="shop", tenant="mine")
    store = FeatureStore.open(str(folder / "a.db"), "delf", MODEL, settings, max_features=20)
    for shop in ("mine", "other"):
        items = [(replace(r, metadata={"year": n}), f) for n, (r, f) in enumerate(random_items(1, 5, 3, shop))]
        store.of_tenant(shop).write(items)
    texts = [
        'year >= 2020 and (price < 1.5 or not (sold == true)) && shop like "a\\"%"',
        "year in [1, 2, -3] || year != 4",
        '{"year": {">=": 1, "in": [1, 2, 3]}, "price": 1.5, "shop": "a\\"b\'"}',
    ]

    def read(data: bytes) -> object:
        try:
            given = filter_of(data.decode("utf-8", "replace"))
        except ValueError as error:
            raise UsageError("no JSON") from error
        found = [record.image_id for record in store.list(where=given)]
        assert all(name.startswith("mine/") for name in found), "a filter shows another tenant's images"
        return found

    return [text.encode() for text in texts], read


def _settings(folder: Path) -> tuple[list[bytes], Reader]:
    from delf_milvus.settings import load

    toml = (
        'uri = "http://root:secret-of-the-address@host:1"\ncollection = "c"\ntoken = "secret-token-value"\n'
        '[search]\ntop = 5\n[extract]\nscales = [0.5, 1.0]\n[store]\npassword = "secret-password-value"\n'
        'fields = { year = "integer=0" }\n[service]\nread_keys = "secret-key-of-readers"\nphotos = ["a"]\n'
    )
    dotenv = 'DELF_MILVUS_SEARCH__TOP=5\nDELF_MILVUS_STORE__FIELDS={"year": "integer=0"}\n# note\nOTHER=\'a b\'\n'
    os.chdir(folder)

    def read(data: bytes) -> object:
        kept = dict(os.environ)
        try:
            (folder / ".env").write_bytes(data if data[:1] != b"[" and b"DELF_MILVUS" in data else b"")
            (folder / "delf_milvus.toml").write_bytes(data)
            text = data.decode("utf-8", "replace").replace("\0", "")
            os.environ["DELF_MILVUS_STORE__FIELDS"] = text if text.startswith("{") else "{}"
            return load().rows()
        finally:
            for name in os.environ.keys() - kept.keys():
                del os.environ[name]

    return [toml.encode(), dotenv.encode() and b"[search]\ntop = 3\n", b'# {"a": "text"}\n'], read


def _archives(folder: Path) -> tuple[list[bytes], Reader]:
    from store_samples import MODEL, random_items

    from delf_milvus.settings import StoreSettings
    from delf_milvus.store.feature_store import FeatureStore
    from delf_milvus.store.transfer import export_collection, import_collection

    with FeatureStore.open(str(folder / "from.db"), "delf", MODEL, StoreSettings(), max_features=20) as store:
        store.write(random_items(1, 6, 5))
        export_collection(store, folder / "export")
    seed = mutations.packed_folder({path.name: path.read_bytes() for path in sorted((folder / "export").iterdir())})
    store = FeatureStore.open(str(folder / "to.db"), "delf", MODEL, StoreSettings(), max_features=20)
    given = folder / "given"
    given.mkdir()

    def read(data: bytes) -> object:
        for path in given.iterdir():
            path.unlink()
        for name, content in mutations.unpacked_folder(data).items():
            (given / name).write_bytes(content)
        return import_collection(store, given)

    return [seed], read


def _ground_truth(folder: Path) -> tuple[list[bytes], Reader]:
    from delf_milvus.errors import InputError
    from delf_milvus.evaluation.revisited import read_ground_truth

    entry = {"bbx": np.array([1.5, 2, 30, 40]), "easy": np.array([0, 2]), "hard": np.array([], ">i4"), "junk": [1]}
    truth = {"imlist": ["a", "b", "c"], "qimlist": ["q"], "gnd": [entry]}
    plain = {**truth, "gnd": [{**entry, "bbx": [1.5, 2, 30, 40], "easy": [0, 2], "hard": []}]}
    seeds = [pickle.dumps(truth, protocol) for protocol in range(6)]
    names = [folder / "gnd.pkl", folder / "gnd.json"]

    def read(data: bytes) -> object:
        for path in names:
            path.write_bytes(data)
            try:
                return read_ground_truth(path)
            except InputError:
                if path.suffix == ".json":
                    raise
        return None

    return [*seeds, json.dumps(plain).encode()], read


def _pickle_or_json(rng: random.Random, data: bytes, others: Any) -> bytes:
    return (mutations.of_json if data.startswith(b"{") else mutations.damaged)(rng, data, others)


def _tables(folder: Path) -> tuple[list[bytes], Reader]:
    from delf_milvus.errors import InputError, UsageError
    from delf_milvus.evaluation.landmarks import LandmarksConfig, landmarks_set
    from delf_milvus.evaluation.pairs import read_pairs
    from delf_milvus.training.landmark_csv import photos_by_landmark

    (folder / "queries").mkdir()
    (folder / "train/a/b/c").mkdir(parents=True)
    for name in ("queries/abc1.jpg", "queries/abc2.jpg", "train/a/b/c/abc1.jpg"):
        (folder / name).write_bytes(b"")
    seeds = [
        "id,images,landmarks,Usage,landmark_id\nabc1,abc2 abc3,5,Public,5\nabc2,,None,Private,6\n",
        "a,b,homography\nx.jpg,y.jpg,1 0 3 0 1 2 0 0 1\nx.jpg,z.jpg,1 0 3.5 0 1 2 0 0 1e0\n",
        '{"a": "x.jpg", "b": "y.jpg", "fundamental": [[1, 0, 3], [0, 1, 2], [0, 0, 1]]}\n',
    ]
    table = folder / "table.csv"
    solution = LandmarksConfig(folder / "queries", None, table, table, table)
    readers: list[Callable[[], object]] = [
        lambda: landmarks_set(solution).digest(),
        lambda: photos_by_landmark(table),
        lambda: read_pairs(table),
        lambda: read_pairs(table.rename(table.with_suffix(".jsonl"))),
    ]

    def read(data: bytes) -> object:
        found, problem = [], None
        for reader in readers:
            table.write_bytes(data)
            try:
                found.append(reader())
            except (InputError, UsageError) as error:
                problem = error
        if not found and problem is not None:
            raise problem
        return found

    return [seed.encode() for seed in seeds], read


def _datum(folder: Path) -> tuple[list[bytes], Reader]:
    from model.official_release import write_datum

    from delf_milvus.model.datum import read_datum

    path = folder / "mean.datum"
    write_datum(path, np.arange(12, dtype=np.float32).reshape(3, 4))

    def read(data: bytes) -> object:
        path.write_bytes(data)
        return read_datum(path)

    return [path.read_bytes()], read


_kept: list[object] = []


def _requests(folder: Path) -> tuple[list[bytes], Reader]:
    import httpx
    import torch
    from conftest import make_photo
    from model.models import write_tiny_model
    from service.serving import add, png, serving, settings_of

    from delf_milvus.errors import ServiceError

    torch.set_num_threads(1)
    photo = png(make_photo(1, 64, 48))
    loop = asyncio.new_event_loop()
    settings = settings_of(folder, write_tiny_model(folder / "tiny.safetensors"), uploads=folder / "uploads",
                           requests_per_minute=0, max_body_bytes=3_000_000, max_photo_bytes=1_000_000)  # fmt: skip
    entered = serving(settings)
    # It lives as long as the process does.
    _kept.append(entered)
    service, client = loop.run_until_complete(entered.__aenter__())
    loop.run_until_complete(add(client, 2, "kept.png", year=2001))
    shown = loop.run_until_complete(client.get("/v1/images/kept.png")).json()

    def form(*parts: tuple[str, bytes]) -> bytes:
        lines = b"".join(b"--x\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + body + b"\r\n"
                         for head, body in parts)  # fmt: skip
        return lines + b"--x--\r\n"

    whole = form(('name="photo"; filename="a.png"', photo), ('name="id"', b"a"), ('name="metadata"', b'{"year": 2}'))
    asked = form(('name="photo"; filename="a.png"', photo), ('name="top"', b"3"), ('name="box"', b"1,2,30,40"))
    kind = "multipart/form-data; boundary=x"
    seeds = [
        request("POST", "/v1/search", kind, asked),
        request("POST", "/v1/search?top=3&verified_only=false&filter=year%20%3E%3D%201", "image/png", photo),
        request("POST", "/v1/search?box=1,2,30,40&parts=true&correspondences=true", "application/octet-stream", photo),
        request("POST", "/v1/images", kind, whole),
        request("POST", "/v1/images?id=b&metadata=%7B%22year%22%3A1%7D&replace=true", "image/png", photo),
        request("GET", "/v1/images?prefix=k&limit=5&after=a&filter=%7B%22year%22%3A2001%7D", "", b""),
        request("GET", "/v1/images/kept.png/thumbnail?side=64", "", b""),
        request("DELETE", "/v1/images/a", "", b""),
    ]

    def read(data: bytes) -> object:
        head, _, body = data.partition(b"\n")
        method, target, kind = json.loads(head)
        try:
            asked = client.build_request(method, target, content=body, headers={"content-type": kind} if kind else {})
        except (httpx.InvalidURL, UnicodeEncodeError, ValueError):
            raise ServiceError("httpx does not send this") from None
        answer = loop.run_until_complete(asyncio.wait_for(client.send(asked), 60))
        assert answer.status_code < 500, f"{answer.status_code}: {answer.text[:300]}"
        if answer.status_code >= 400:
            assert answer.json()["error"].keys() == {"kind", "message"}
            raise ServiceError(answer.text, answer.status_code)
        if method != "DELETE" and "/v1/images" not in target:
            kept = loop.run_until_complete(client.get("/v1/images/kept.png"))
            assert kept.status_code == 404 or kept.json()["sha256"] == shown["sha256"]
        assert service.buffered == 0
        return answer

    return seeds, read


def request(method: str, target: str, kind: str, body: bytes) -> bytes:
    """One request as an input: its head as a line of JSON, then its body."""
    return json.dumps([method, target, kind]).encode() + b"\n" + body


def _changed_request(rng: random.Random, data: bytes, others: Any) -> bytes:
    head, _, body = data.partition(b"\n")
    method, target, kind = json.loads(head)
    match rng.randrange(4):
        case 0:
            target = mutations.reworded(rng, target.encode(), [target.encode()]).decode("utf-8", "replace")
        case 1:
            kinds = ("text/html", "", "image/svg+xml", "multipart/form-data", "application/json", "a", "image/")
            charsets = (
                "utf-16", "unicode_escape", "undefined", "punycode", "idna", "rot13", "x", "utf-7", "hex"
            )  # fmt: skip
            kind = rng.choice((*kinds, *(f"multipart/form-data; boundary=x; charset={one}" for one in charsets)))
        case 2:
            body = mutations.reworded(rng, body, [body]) if b"--x" in body else mutations.image(rng, body, [body])
        case _:
            body = mutations.damaged(rng, body, [one.partition(b"\n")[2] for one in others])
    return request(method, target, kind, body)


TARGETS: dict[str, Target] = {
    "images": Target(_images, mutations.image),
    "npz": Target(_feature_files(".npz"), mutations.zip_members, 900),
    "delf": Target(_feature_files(".delf"), mutations.damaged),
    "hloc": Target(_feature_files(".h5"), mutations.damaged, 900),
    "weights": Target(_weights, mutations.safetensors, 400),
    "calibration": Target(_calibration, mutations.of_json),
    "listings": Target(_listings, mutations.reworded),
    "parquet-listings": Target(_parquet_listings, mutations.damaged),
    "filters": Target(_filters, mutations.reworded),
    "settings": Target(_settings, mutations.reworded),
    "archives": Target(_archives, mutations.files, 600),
    "ground-truth": Target(_ground_truth, _pickle_or_json),
    "tables": Target(_tables, mutations.reworded),
    "datum": Target(_datum, mutations.damaged),
    "requests": Target(_requests, _changed_request, 400),
}
