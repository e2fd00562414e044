"""No name that a stranger chose leads out of the folder that it is meant for."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from delf_milvus.errors import NotFoundError
from delf_milvus.imaging.decode import content_digest
from delf_milvus.reporting.pictures import file_name
from delf_milvus.service.photos import PhotoFolders
from delf_milvus.settings import DecodeSettings
from delf_milvus.store.records import ImageRecord
from delf_milvus.store.transfer import ExportedFile

LIMITS = DecodeSettings()

names = st.one_of(
    st.text(st.sampled_from("./\\\0:~%2eab\u2215\u202eü$*?\n"), min_size=1, max_size=40),
    st.sampled_from(["..", "/etc/passwd", "../../x", "C:\\x", "CON", "a/../../b", "-rf", "$(id)", "a\0b", "x" * 5000]),
)


def photo() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@given(called=names)
def test_a_picture_of_an_image_is_one_file_of_its_folder(called: str) -> None:
    made = Path("folder") / f"001_{file_name(called)}.png"
    assert made.parent == Path("folder")
    assert len(made.name.encode()) < 200
    assert made.name.isprintable()


@given(called=names)
def test_a_manifest_names_files_of_an_export_alone(called: str) -> None:
    with pytest.raises(ValidationError):
        ExportedFile(file=called, rows=1, bytes=1, sha256="0" * 64)
    with pytest.raises(ValidationError):
        ExportedFile(file=f"images-00000.parquet{called}", rows=1, bytes=1, sha256="0" * 64)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(called=names)
def test_an_upload_is_kept_under_a_name_of_ours(called: str, tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    folders = PhotoFolders((), uploads, LIMITS, "")
    path = folders.keep(photo(), called)
    assert path is not None
    assert path.parent == uploads.resolve()
    assert folders.read(ImageRecord(called, str(path), content_digest(photo()))).data == photo()
    folders.forget(called)
    folders.forget(f"{uploads}/../{called}")
    assert path.exists()
    folders.forget(str(path))
    assert not path.exists()


def test_no_link_shows_what_lies_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    outside = tmp_path / "secret.png"
    outside.write_bytes(photo())
    (tmp_path / "photos/link.png").symlink_to(outside)
    (tmp_path / "photos/folder").symlink_to(tmp_path, target_is_directory=True)
    folders = PhotoFolders((tmp_path / "photos",), None, LIMITS, "")
    for uri in ("link.png", "folder/secret.png", "../secret.png", "folder/../../secret.png"):
        record = ImageRecord("one", str(tmp_path / "photos" / uri), content_digest(photo()))
        assert not folders.may_show(record)
        with pytest.raises(NotFoundError):
            folders.read(record)
    for uri in (str(outside), "file:///etc/passwd", "http://127.0.0.1/x.png", "\0", "", "~/x", "/proc/self/environ"):
        assert not folders.may_show(ImageRecord("one", uri, content_digest(photo())))
