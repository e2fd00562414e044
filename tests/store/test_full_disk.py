"""An embedded database whose disk is full: said in one sentence, what is stored stays whole, and there is a way on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_photo, save_photo

from delf_milvus.settings import StoreSettings
from delf_milvus.store.feature_store import FeatureStore

resource = pytest.importorskip("resource")

PHOTOS = 40
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from delf_milvus.cli.main import run
sys.argv[1:2] = []
run()
"""


def ingest(folder: Path, model: Path, most: int) -> tuple[int, dict[str, Any], str]:
    """Ingest in a process none of whose files may have more bytes: its exit code, report and last line of stderr."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(most), "--json", "--uri", "photos.db", "ingest", "photos"],
        cwd=folder,
        env={
            **os.environ,
            "DELF_MILVUS_MODEL": str(model),
            "DELF_MILVUS_EXTRACT__SCALES": "[1.0]",
            "DELF_MILVUS_EXTRACT__LONGEST_SIDE": "96",
            "DELF_MILVUS_EXTRACT__STORED_FEATURES": "20",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr.splitlines()[-1] if done.stderr else ""


def test_an_ingest_onto_a_full_disk_says_so_and_goes_on_when_there_is_room(tmp_path: Path, tiny_model: Path) -> None:
    for seed in range(PHOTOS):
        save_photo(tmp_path / "photos" / f"{seed:02}.png", make_photo(seed, 96, 96))
    code, _, said = ingest(tmp_path, tiny_model, 45_000)
    assert (code, said.startswith("Error: The database at photos.db takes no more while ")) == (3, True), said
    assert said.endswith("make room there or raise its limits, then do the same again.")
    with FeatureStore.open(str(tmp_path / "photos.db"), "delf", None, StoreSettings()) as store:
        records = list(store.list())
        assert len(records) < PHOTOS
        assert {finding.kind for finding in store.fsck().findings} <= {"orphan_features"}
        # What can be found has all of its features.
        keys = [record.key for record in records]
        assert {key: len(features) for key, (_, features) in store.stored(keys).items()} == {
            record.key: record.feature_count for record in records
        }
    code, report, said = ingest(tmp_path, tiny_model, 1_000_000_000)
    assert code == 0, said
    assert (report["unchanged"], report["added"] + report["updated"]) == (len(records), PHOTOS - len(records))
    with FeatureStore.open(str(tmp_path / "photos.db"), "delf", None, StoreSettings()) as store:
        report = store.fsck()
        assert (report.findings, report.images) == ([], PHOTOS)
