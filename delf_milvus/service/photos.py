"""Photos on disk: what was uploaded, and what stored images were made of, as far as the settings allow.

A photo is shown only where the path that was stored for it, with all links resolved, lies below one of the folders of
the settings, and the file's SHA-256 is still that of the stored photo: so nothing that was put in its place is shown.
All functions block, and run in a thread of their own.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import PIL.Image

from delf_milvus.errors import InputError, NotFoundError, UsageError, one_line
from delf_milvus.imaging.decode import FORMATS, content_digest, decode, read_bytes
from delf_milvus.settings import DecodeSettings
from delf_milvus.store.keys import image_key
from delf_milvus.store.records import ImageRecord

_CACHE_BYTES = 32_000_000
_QUALITY = 85
_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tif", "GIF": ".gif"}


@dataclass(frozen=True)
class PhotoFile:
    """data: its bytes. media_type: as its content says."""

    data: bytes
    media_type: str


class PhotoFolders:
    """The folders that photos may be shown from, and the one that uploads are kept in.

    Raises UsageError for a folder that does not exist; that of uploads is made.
    """

    def __init__(self, folders: tuple[Path, ...], uploads: Path | None, limits: DecodeSettings, tenant: str) -> None:
        self._limits = limits
        self._tenant = tenant
        self._thumbnails: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._cached = 0
        self._lock = threading.Lock()
        self.uploads: Path | None = None
        if uploads is not None:
            try:
                uploads.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(
                    f"The folder of uploads {one_line(uploads)} cannot be made: {error.strerror}."
                ) from error
            self.uploads = uploads.resolve()
        for folder in folders:
            if not folder.is_dir():
                raise UsageError(f"There is no folder of photos {one_line(folder)}; give --photos one that exists.")
        self._roots = [folder.resolve() for folder in folders] + ([self.uploads] if self.uploads else [])

    def __bool__(self) -> bool:
        return bool(self._roots)

    def may_show(self, record: ImageRecord) -> bool:
        """Whether the photo of an image is there, below one of the folders."""
        return self._place(record) is not None

    def read(self, record: ImageRecord) -> PhotoFile:
        """The photo of an image as it was stored; raises NotFoundError where it may not be shown or has changed."""
        data = self._data(record)
        try:
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
                media_type = PIL.Image.MIME.get(image.format or "", "application/octet-stream")
        except Exception:
            # Of a photo that was stored, so that it is one: a format that Pillow opens otherwise.
            media_type = "application/octet-stream"
        return PhotoFile(data, media_type)

    def thumbnail(self, record: ImageRecord, side: int) -> bytes:
        """The photo upright as a JPEG, its longest side at most `side` pixels; raises NotFoundError as `read` does."""
        if self._place(record) is None:
            raise _absent(record)
        key = record.sha256, side
        with self._lock:
            if key in self._thumbnails:
                self._thumbnails.move_to_end(key)
                return self._thumbnails[key]
        photo = decode(self._data(record), self._limits, record.image_id)
        height, width = photo.shape[:2]
        scale = side / max(height, width)
        if scale < 1:
            size = max(1, round(width * scale)), max(1, round(height * scale))
            photo = np.asarray(cv2.resize(photo, size, interpolation=cv2.INTER_AREA), np.uint8)
        _, encoded = cv2.imencode(".jpg", cv2.cvtColor(photo, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
        made = encoded.tobytes()
        with self._lock:
            if key not in self._thumbnails:
                self._thumbnails[key] = made
                self._cached += len(made)
            while self._cached > _CACHE_BYTES:
                self._cached -= len(self._thumbnails.popitem(last=False)[1])
        return made

    def keep(self, data: bytes, image_id: str) -> Path | None:
        """Keep an uploaded photo; returns its path, None where uploads are not kept.

        The name is made of the image's key and the content, so that no id, whatever it contains, names a path.
        Raises InputError where it cannot be written.
        """
        if self.uploads is None:
            return None
        name = f"{image_key(image_id, self._tenant):013x}-{content_digest(data)[:32]}{_suffix(data)}"
        path = self.uploads / name
        try:
            with tempfile.NamedTemporaryFile(dir=self.uploads, prefix=".", delete=False) as file:
                try:
                    file.write(data)
                    file.flush()
                    os.replace(file.name, path)
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.unlink(file.name)
                    raise
        except OSError as error:
            raise InputError(f"The photo cannot be kept: {error.strerror or 'input/output error'}.") from error
        return path

    def forget(self, uri: str) -> None:
        """Remove an uploaded photo; a path anywhere else is left alone."""
        if self.uploads is not None and uri and (path := Path(uri)).parent == self.uploads:
            with contextlib.suppress(OSError):
                path.unlink()

    def _place(self, record: ImageRecord) -> Path | None:
        if not record.uri or not self._roots or "\0" in record.uri:
            return None
        try:
            path = Path(record.uri).resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            return None
        inside = any(path.is_relative_to(root) for root in self._roots)
        return path if inside and path.is_file() else None

    def _data(self, record: ImageRecord) -> bytes:
        path = self._place(record)
        if path is None:
            raise _absent(record)
        try:
            data = read_bytes(path, self._limits)
        except InputError as error:
            raise _absent(record) from error
        if content_digest(data) != record.sha256:
            raise NotFoundError(f"The photo of {one_line(record.image_id)} has changed since it was stored.")
        return data


def _absent(record: ImageRecord) -> NotFoundError:
    return NotFoundError(
        f"The photo of {one_line(record.image_id)} is not shown: it lies in no folder that the service may show."
    )


def _suffix(data: bytes) -> str:
    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _SUFFIXES.get(image.format or "", ".img")
    except Exception:
        return ".img"
