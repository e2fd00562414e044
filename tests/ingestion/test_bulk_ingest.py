"""`ingest` into a real Milvus server that imports files: what it stores is what messages would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_photo, save_photo
from file_imports import as_files, count_imports
from milvus_server import Server
from pymilvus import MilvusClient
from stored_rows import rows

from delf_milvus import DelfIndex, Settings
from delf_milvus.errors import UsageError
from delf_milvus.ingestion import pipeline
from delf_milvus.model.extractor import Extractor
from delf_milvus.store.feature_store import FeatureStore

PHOTOS = 24
ENOUGH = 400
"""Rows for an import: those of some six photos."""


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_imports(monkeypatch)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each write."""
    found: list[int] = []
    write = FeatureStore.write
    monkeypatch.setattr(FeatureStore, "write", lambda self, items: (found.append(len(items)), write(self, items))[1])
    return found


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for seed in range(PHOTOS):
        save_photo(folder / f"{seed:02}.png", make_photo(seed, 160, 120))
    return folder


def opened(milvus: Server, name: str, model: Path, **store: Any) -> DelfIndex:
    given: dict[str, Any] = {"model": str(model), "extract": {"preset": "fast"}, "store": store}
    return DelfIndex.open(milvus.uri, collection=name, settings=Settings(**given))


@pytest.mark.server
def test_a_storage_of_imports_that_cannot_be_used_is_told_before_any_photo_is_extracted(
    milvus: Server, name: str, photos: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extracted: list[Any] = []
    extract = Extractor.extract
    monkeypatch.setattr(
        Extractor,
        "extract",
        lambda self, *given, **named: (extracted.append(given), extract(self, *given, **named))[1],
    )
    absent = str(milvus.storage / "absent")
    with opened(milvus, name, tiny_model, bulk_storage=absent, bulk_from=ENOUGH) as index:
        with pytest.raises(UsageError, match=r"store\.bulk_storage .*absent' cannot be used"):
            index.ingest([photos])
        assert index.store.facts is None
    assert not extracted
    with opened(milvus, name, tiny_model) as index:
        index.ingest([photos])
    assert extracted


@pytest.mark.server
@pytest.mark.parametrize("indexed", [None, 20])
def test_an_ingest_gathers_new_photos_for_imports_and_stores_what_messages_would(
    milvus: Server,
    name: str,
    photos: Path,
    tiny_model: Path,
    imported: list[int],
    written: list[int],
    indexed: int | None,
) -> None:
    common = {"indexed_features": indexed}
    with opened(milvus, f"{name}_files", tiny_model, **common, **as_files(milvus, ENOUGH)) as files:
        report = files.ingest([photos])
        assert report.added == PHOTOS
        assert imported
        assert min(imported) >= ENOUGH
        assert max(imported) < 2 * ENOUGH
        stored = files.store.count_features()
        assert sum(imported) > stored - ENOUGH
        assert len(written) == len(imported) + (sum(imported) < stored)
        assert files.search(photos / "07.png").hits[0].image_id == "07.png"

        with opened(milvus, f"{name}_messages", tiny_model, **common) as messages:
            messages.ingest([photos])
            before = len(imported)
            client = MilvusClient(milvus.uri)
            for suffix, key in (("_features", "feature_key"), ("_images", "image_key")):
                assert rows(client, f"{name}_files{suffix}", key) == rows(client, f"{name}_messages{suffix}", key)
            client.close()

            # What replaces others is not gathered: it would not exist while an import lasts.
            written.clear()
            for seed in range(PHOTOS):
                save_photo(photos / f"{seed:02}.png", make_photo(100 + seed, 160, 120))
            assert files.ingest([photos]).updated == PHOTOS
            assert len(imported) == before
            assert written == [16, 8]
            assert files.fsck().findings == []


@pytest.mark.server
def test_new_photos_wait_for_others_only_so_long(
    milvus: Server,
    name: str,
    photos: Path,
    tiny_model: Path,
    imported: list[int],
    written: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "_GATHERED_SECONDS", 0.0)
    with opened(milvus, name, tiny_model, **as_files(milvus, ENOUGH)) as index:
        assert index.ingest([photos]).added == PHOTOS
    assert imported == []
    assert written == [1] * PHOTOS
