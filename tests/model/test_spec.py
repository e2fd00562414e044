"""What a weight file is, told without loading it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from agreement import agreement
from conftest import make_photo
from models import TINY, write_tiny_model

from delf_milvus.errors import ModelError
from delf_milvus.matcher import PhotoMatcher
from delf_milvus.model.extractor import Extractor
from delf_milvus.model.spec import NAMED, fingerprint_of, read_header, resolve
from delf_milvus.settings import ExtractSettings, Settings


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


def test_models_of_the_package_have_names_and_files_may_be_called_like_them(tmp_path: Path) -> None:
    assert resolve(None) == resolve("bundled") == NAMED["bundled"]
    assert resolve("small") == NAMED["small"] != NAMED["bundled"]
    own = write_tiny_model(tmp_path / "small")
    assert resolve(own) == own
    with pytest.raises(ModelError, match=r"give --model a \.safetensors file, bundled or small"):
        resolve("smal")


@pytest.mark.parametrize("name", NAMED)
def test_every_model_of_the_package_is_calibrated(name: str) -> None:
    assert PhotoMatcher(Settings(model=name)).calibrated


def test_the_small_model_gives_features_like_the_large_ones() -> None:
    settings = ExtractSettings(preset="fast", precision="fp32")
    large, small = (Extractor(name, settings).extract(make_photo(1), 200) for name in ("bundled", "small"))
    common, cosine = agreement(large, small)
    assert common > 0.5
    assert cosine > 0.85
    assert large.global_descriptor @ small.global_descriptor > 0.85
