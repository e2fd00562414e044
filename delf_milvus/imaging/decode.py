"""Photos of strangers become RGB arrays, or one sentence that says why not.

Contract: whatever the bytes are, `decode` returns an array of shape (H, W, 3), uint8, upright, or raises `ImageError`.
The size a file declares is judged before its pixels are decoded. Every function may be called from any thread, and
nothing global of Pillow is changed, because a host application has its own use for it.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.Image import Transpose

from delf_milvus.errors import ImageError, ImageFormatError, ImageTooLargeError, InputError, one_line
from delf_milvus.settings import DecodeSettings

RgbImage: TypeAlias = NDArray[np.uint8]  # (H, W, 3)
Source: TypeAlias = str | Path | bytes | Image.Image | RgbImage

# Pillow also knows formats whose readers start other programs (EPS) or that are no photos. MPO comes with JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF", "JPEG2000")

TOO_LARGE = "shrink it, or raise the setting decode.max_bytes"
"""What to do about a photo of too many bytes."""

_ORIENTATION_TAG = 0x0112
_BITS_PER_SAMPLE_TAG = 258
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}

_warning_filters = threading.Lock()


def read_file(path: Path, max_bytes: int, too_large: str) -> bytes:
    """The content of a regular file.

    too_large: what to do about a file of more than `max_bytes`, the end of that message.

    Raises InputError for a folder, a special file (a pipe, a device: never opened), and a file that is missing, too
    large, being written, or cannot be read for any other reason.
    """
    name = one_line(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{name} is a folder, not a file.")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{name} is not a regular file but a pipe, a socket or a device; copy it to a file first.")
        if status.st_size > max_bytes:
            raise InputError(f"{name} has {status.st_size:,} bytes, more than the limit of {max_bytes:,}; {too_large}.")
        with open(path, "rb", opener=_open_without_waiting) as file:
            data = file.read(status.st_size + 1)
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist; check the path.") from error
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or 'input/output error'}.") from error
    except ValueError as error:
        raise InputError(f"{name} is not a path that the system accepts.") from error
    if len(data) != status.st_size:
        raise InputError(f"{name} changed while it was read; try again when it is complete.")
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    # A pipe that takes the file's place between stat and open would otherwise block until somebody writes to it.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_bytes(path: Path, limits: DecodeSettings) -> bytes:
    """The bytes of a photo, still encoded: at least one, at most `limits.max_bytes`.

    Raises InputError as `read_file` does, ImageError for an empty file.
    """
    data = read_file(path, limits.max_bytes, TOO_LARGE)
    if not data:
        raise ImageError(f"{one_line(path)} is empty.")
    return data


def decode(source: Source, limits: DecodeSettings, name: str | None = None) -> RgbImage:
    """The photo as RGB, upright.

    source: a path, the bytes of a file (the format is told by the content, never by a suffix), a Pillow image (its
        current frame), or an array of shape (H, W, 3), uint8.
    name: what messages call the photo; the path where there is one.

    Returns (H, W, 3) uint8, contiguous and owned by the caller. EXIF orientation is applied, transparency lies on
    white, of an animation comes the first frame. 16 bits are scaled to 8. Grey of 32 bits declares no range: one that
    fits 0..255 (floats also 0..1, integers also 0..65535) is taken as such, any other is stretched from its least to
    its greatest value.

    Raises ImageError for anything that is not a photo within the limits, InputError for a path that cannot be read.
    """
    if isinstance(source, str | Path):
        name = one_line(name or source)
        return _decode_bytes(read_bytes(Path(source), limits), limits, name)
    name = one_line(name or "The image")
    if isinstance(source, bytes):
        return _decode_bytes(source, limits, name)
    if isinstance(source, Image.Image):
        return _decode_image(source, limits, name)
    if isinstance(source, np.ndarray):
        return _checked_array(source, limits, name)
    raise ImageError(
        f"{name} is a value of type {type(source).__name__}; give a path, bytes, a Pillow image or an RGB array."
    )


def content_digest(data: bytes) -> str:
    """SHA-256 of the bytes, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def source_digest(source: Source, limits: DecodeSettings, name: str | None = None) -> str:
    """SHA-256, hexadecimal, of what the photo is: of the file's bytes, or of shape and pixels as decoded.

    A Pillow image and the array it decodes to have the same digest.

    Raises what `read_bytes` raises for a path, what `decode` raises for a Pillow image or an array.
    """
    if isinstance(source, str | Path):
        return content_digest(read_bytes(Path(source), limits))
    if isinstance(source, bytes):
        return content_digest(source)
    pixels = decode(source, limits, name)
    digest = hashlib.sha256(f"rgb {pixels.shape[0]} {pixels.shape[1]} ".encode())
    digest.update(pixels.data)
    return digest.hexdigest()


def _checked_array(array: NDArray[Any], limits: DecodeSettings, name: str) -> RgbImage:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(
            f"{name} is an array of {array.dtype} and shape {array.shape}; give RGB as uint8, (height, width, 3)."
        )
    _check_size(array.shape[1], array.shape[0], limits, name)
    return np.array(array, order="C", copy=True)


def _check_size(width: int, height: int, limits: DecodeSettings, name: str) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height}).")
    if width * height > limits.max_pixels:
        raise ImageTooLargeError(
            f"{name} has {width} x {height} pixels, more than the limit of {limits.max_pixels:,}; "
            "shrink it, or raise the setting decode.max_pixels."
        )


def _decode_bytes(data: bytes, limits: DecodeSettings, name: str) -> RgbImage:
    if not data:
        raise ImageError(f"{name} is empty.")
    with _as_image_errors(name), _open(data, name) as image:
        return _decode_image(image, limits, name)


def _open(data: bytes, name: str) -> ImageFile.ImageFile:
    """`Image.open` without its check of the size, which warns and fails by limits of its own."""
    Image.init()
    prefix = data[:16]
    for format_name in FORMATS:
        if format_name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[format_name]
        # `accept` answers with a text where this Pillow was built without the codec.
        if accept is None or accept(prefix) is True:
            try:
                return factory(io.BytesIO(data), "")
            except (MemoryError, Image.DecompressionBombError):
                raise
            except Exception as error:
                raise ImageError(f"{name} is not a photo, or its header is damaged.") from error
    raise ImageFormatError(f"{name} is not a photo of a supported format; convert it to JPEG, PNG or WebP.")


def _decode_image(image: Image.Image, limits: DecodeSettings, name: str) -> RgbImage:
    with _as_image_errors(name):
        _check_size(*image.size, limits, name)
        with _without_bomb_warning(image):
            image.load()
        rgb = _to_rgb(image, name)
        turn = _UPRIGHT.get(_orientation(image))
        if turn is not None:
            rgb = rgb.transpose(turn)
        return np.array(rgb, dtype=np.uint8, order="C")


@contextmanager
def _as_image_errors(name: str) -> Iterator[None]:
    # Decoders meet hostile bytes with nearly every exception there is.
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"{name} needs more memory to decode than there is; shrink it.") from error
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            f"{name} has more pixels than Pillow accepts; shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except Exception as error:
        raise ImageError(f"{name} is damaged or cut short; replace it by an intact copy.") from error


@contextmanager
def _without_bomb_warning(image: Image.Image) -> Iterator[None]:
    """Some decoders repeat Pillow's check of the size, for photos that our own limit has admitted."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is None or image.width * image.height <= limit:
        yield
        return
    # The filters are the whole process's, so they are touched for photos of this size only.
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 where there is none or the EXIF block is damaged: that alone spoils no photo."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_grey(image)).convert("RGB")
    try:
        if not image.has_transparency_data:
            return image if image.mode == "RGB" else image.convert("RGB")
        coloured = image.convert("RGBA")
    except ValueError as error:
        raise ImageError(
            f"{name} has colours of mode {image.mode}, which is not supported; convert it to RGB."
        ) from error
    paper = Image.new("RGB", image.size, "white")
    paper.paste(coloured, mask=coloured.getchannel("A"))
    return paper


def _to_grey(image: Image.Image) -> NDArray[np.uint8]:
    """Grey of 16 bits, 32 bits or floats as (H, W) uint8."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        bits = min(_declared_bits(image), 16)
        table = (np.arange(1 << 16) * (255 / ((1 << bits) - 1))).round().clip(max=255).astype(np.uint8)
        return np.take(table, values)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if image.format == "PPM" and image.mode == "I":
        low, high = 0.0, 65535.0
    else:
        for usual in (1.0, 255.0) if image.mode == "F" else (255.0, 65535.0):
            if low >= 0 and high <= usual:
                low, high = 0.0, usual
                break
    scaled = (values.astype(np.float64) - low) * (255 / max(high - low, 1e-30))
    return np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255).round().astype(np.uint8)


def _declared_bits(image: Image.Image) -> int:
    """Bits of a sample of grey: TIFF has 12 as well as 16."""
    tags = getattr(image, "tag_v2", {})
    return int(tags.get(_BITS_PER_SAMPLE_TAG, (16,))[0])
