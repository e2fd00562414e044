"""What a weight file is, told without loading it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from models import TINY, write_tiny_model

from delf_milvus.errors import ModelError
from delf_milvus.model.extractor import Extractor
from delf_milvus.model.spec import fingerprint_of, read_header
from delf_milvus.settings import ExtractSettings


def test_the_header_alone_gives_the_extractors_fingerprint(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.safetensors")
    settings = ExtractSettings(preset="fast")
    assert read_header(path)[0] == TINY
    assert fingerprint_of(path, settings) == Extractor(path, settings).fingerprint


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04pickle", b"\xff" * 64])
def test_a_file_that_is_not_safetensors_has_no_fingerprint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a delf-milvus weight file"):
        fingerprint_of(path, ExtractSettings())


def test_a_pyramid_that_this_version_does_not_make_is_refused(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.safetensors")
    content = path.read_bytes()
    assert content.count(b'\\"area\\"') == 1
    path.write_bytes(content.replace(b'\\"area\\"', b'\\"none\\"'))
    with pytest.raises(ModelError, match="unknown pyramid 'none'"):
        read_header(path)


def test_an_index_opens_and_finds_nothing_to_do_without_torch(tmp_path: Path) -> None:
    code = """
import sys
from delf_milvus import DelfIndex
with DelfIndex.open("photos.db") as index:
    assert index.ingest(["."]).added == 0
    assert index.status()["images"] == 0
assert "torch" not in sys.modules
"""
    finished = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
