import io
import os
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features

from delf_milvus.errors import ImageError, InputError, one_line
from delf_milvus.imaging.decode import content_digest, decode, read_bytes, source_digest
from delf_milvus.settings import DecodeSettings

LIMITS = DecodeSettings()
Image.init()


def gradient(width: int = 48, height: int = 32) -> np.ndarray:
    """RGB that differs in every corner and channel."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256], axis=-1).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def is_valid(array: np.ndarray) -> bool:
    flags = array.flags
    return array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and flags.c_contiguous and flags.owndata


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_lossless_formats_decode_to_the_same_pixels(kind: str) -> None:
    photo = gradient()
    options = {"lossless": True} if kind == "WEBP" else {}
    result = decode(encoded(Image.fromarray(photo), kind, **options), LIMITS)
    assert is_valid(result)
    np.testing.assert_array_equal(result, photo)


@pytest.mark.parametrize(
    "kind",
    [
        "JPEG",
        "GIF",
        "MPO",
        pytest.param("AVIF", marks=pytest.mark.skipif("AVIF" not in Image.SAVE, reason="Pillow without AVIF")),
        pytest.param("JPEG2000", marks=pytest.mark.skipif(not features.check("jpg_2000"), reason="without JPEG 2000")),
    ],
)
def test_lossy_formats_decode_to_nearly_the_same_pixels(kind: str) -> None:
    photo = gradient()
    result = decode(encoded(Image.fromarray(photo), kind), LIMITS)
    assert is_valid(result)
    assert np.abs(result.astype(int) - photo).mean() < 8


def test_path_text_bytes_image_and_array_of_one_photo_agree(tmp_path: Path) -> None:
    photo = gradient()
    image = Image.fromarray(photo)
    path = tmp_path / "photo.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), image, photo):
        np.testing.assert_array_equal(decode(source, LIMITS), photo)


def test_suffix_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encoded(Image.fromarray(gradient()), "PNG"))
    np.testing.assert_array_equal(decode(path, LIMITS), gradient())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    upright = gradient()
    # What a camera held that way stores: the inverse of each turn of the EXIF standard.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    np.testing.assert_array_equal(decode(data, LIMITS), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_spoils_no_photo() -> None:
    data = encoded(Image.fromarray(gradient()), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    assert decode(data, LIMITS).shape == (32, 48, 3)


def test_cmyk_becomes_rgb() -> None:
    red = Image.new("RGB", (16, 16), (220, 30, 30)).convert("CMYK")
    assert np.abs(decode(encoded(red, "JPEG"), LIMITS).mean(axis=(0, 1)) - (220, 30, 30)).max() < 6


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_is_scaled_and_not_clipped(kind: str) -> None:
    grey = np.linspace(0, 65535, 64 * 4).astype(np.uint16).reshape(4, 64)
    result = decode(encoded(Image.fromarray(grey), kind), LIMITS)
    expected = np.repeat((grey / 257.0)[:, :, None], 3, axis=2)
    assert np.abs(result - expected).max() <= 0.5


def test_dark_grey_of_16_bits_stays_dark() -> None:
    dark = np.full((8, 8), 2570, np.uint16)
    assert (decode(encoded(Image.fromarray(dark), "PNG"), LIMITS) == 10).all()


def test_rgb_of_16_bits_is_scaled() -> None:
    values = (gradient().astype(np.uint16) << 8) + 128
    data = b"P6 48 32 65535\n" + values.astype(">u2").tobytes()
    assert np.abs(decode(data, LIMITS).astype(int) - gradient()).max() <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]]), [0, 128, 255]),
        (np.array([[0.0, 128.0, 255.0]]), [0, 128, 255]),
        (np.array([[-1.0, 0.0, 1.0]]), [0, 128, 255]),
        (np.array([[0.0, 5000.0, 10000.0]]), [0, 128, 255]),
        (np.array([[np.nan, 0.5, np.inf]]), [0, 128, 255]),
        (np.array([[700.0, 700.0, 700.0]]), [0, 0, 0]),
        (np.array([[np.nan, np.nan, np.nan]]), [0, 0, 0]),
    ],
)
def test_float_tiff_is_scaled_by_its_range(values: np.ndarray, expected: list[int]) -> None:
    data = encoded(Image.fromarray(values.astype(np.float32)), "TIFF")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(data, LIMITS)[0, :, 1].tolist() == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 128, 255], [0, 128, 255]), ([0, 32896, 65535], [0, 128, 255]), ([-100000, 0, 100000], [0, 128, 255])],
)
def test_integer_tiff_of_32_bits_is_scaled_by_its_range(values: list[int], expected: list[int]) -> None:
    data = encoded(Image.fromarray(np.array([values], np.int32)), "TIFF")
    assert decode(data, LIMITS)[0, :, 2].tolist() == expected


def test_tiff_of_12_bits_is_scaled_by_its_own_white() -> None:
    packed = bytes([0xFF, 0xF0, 0x00])  # two samples: 4095, 0
    tags = [(256, 3, 2), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 3, 1), (279, 4, 3)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in tags)
    data = b"II*\0" + struct.pack("<I", 12) + packed + b"\0" + directory + struct.pack("<I", 0)
    assert decode(data, LIMITS)[0, :, 0].tolist() == [255, 0]


def test_one_bit_becomes_black_and_white() -> None:
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    assert decode(encoded(bits, "PNG"), LIMITS)[:, :, 0].tolist() == [[0, 255], [255, 0]]


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_lies_on_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    result = decode(encoded(image.convert(mode), "PNG"), LIMITS)
    assert result[0].tolist() == [[255, 255, 255], [0, 0, 0]]


def test_a_palette_with_an_alpha_channel_lies_on_white() -> None:
    image = Image.new("PA", (2, 1))
    image.putpalette([10, 20, 30])
    image.putpixel((0, 0), (0, 0))
    image.putpixel((1, 0), (0, 255))
    assert decode(encoded(image, "TIFF"), LIMITS)[0].tolist() == [[255, 255, 255], [10, 20, 30]]


def test_half_transparent_is_blended_with_white() -> None:
    image = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert decode(encoded(image, "PNG"), LIMITS)[0, 0].tolist() == pytest.approx([255, 127, 127], abs=1)


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_palette_with_transparency_lies_on_white(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    result = decode(encoded(image, "PNG", transparency=transparency), LIMITS)
    assert result[0].tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_comes_the_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode(data, LIMITS) == (255, 0, 0)).all()


def test_one_pixel_is_a_photo() -> None:
    assert decode(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), LIMITS).tolist() == [[[1, 2, 3]]]


def test_the_result_is_a_copy_of_the_array() -> None:
    photo = gradient()
    result = decode(photo[:, ::-1], LIMITS)
    result[:] = 0
    assert is_valid(result)
    assert photo.any()


def test_the_pillow_image_given_is_left_as_it_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(Image.fromarray(gradient()), "PNG", exif=exif)))
    assert decode(image, LIMITS).shape == (48, 32, 3)
    assert image.size == (48, 32)
    assert image.getexif()[0x0112] == 6


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"^query (is an array of|has no pixels)"):
        decode(array, LIMITS, "query")


def test_other_types_are_refused() -> None:
    with pytest.raises(ImageError, match="type int"):
        decode(3, LIMITS)  # type: ignore[arg-type]


def test_a_closed_pillow_image_is_refused() -> None:
    image = Image.open(io.BytesIO(encoded(Image.fromarray(gradient()), "PNG")))
    image.close()
    with pytest.raises(ImageError):
        decode(image, LIMITS)


def test_an_image_of_unsupported_colours_says_so() -> None:
    with pytest.raises(ImageError, match="mode La"):
        decode(Image.new("La", (4, 4)), LIMITS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF"])
def test_truncated_files_are_refused(kind: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"cut\.jpg (is damaged|is not a photo)"):
        decode(path, LIMITS)


@pytest.mark.parametrize(
    "data",
    [
        b"hello, I am text",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\xff\xd8\xff",
        b"RIFF\x00\x00\x00\x00WEBP",
        b"GIF89a",
        b"BM",
        b"P6",
        b"II*\0",
        b"\x00\x00\x00\x20ftypavif",
        b"\0" * 1000,
        png_header(0, 0),
        png_header(0, 7),
        b"P6 0 0 255\n",
        b"GIF89a\0\0\0\0\0\0\0,\0\0\0\0\0\0\0\0\0\x02\0;",
    ],
)
def test_what_is_no_photo_is_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode(data, LIMITS)
    assert str(caught.value).startswith("The image ")
    assert "\n" not in str(caught.value)


def test_empty_bytes_and_files_are_called_empty(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.touch()
    with pytest.raises(ImageError, match=r"photo\.jpg is empty\.$"):
        decode(path, LIMITS)
    with pytest.raises(ImageError, match=r"^The image is empty\.$"):
        decode(b"", LIMITS)


@pytest.mark.parametrize("side", [12_000, 200_000])
def test_a_huge_declared_size_is_refused_before_the_pixels(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: ImageFile.ImageFile) -> None:
        raise AssertionError("the pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=rf"{side} x {side} pixels, more than the limit of 100,000,000"):
            decode(png_header(side, side), LIMITS)


def test_a_huge_webp_is_refused() -> None:
    side = (16_384 - 1).to_bytes(3, "little")
    chunk = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + side + side
    data = b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk
    with pytest.raises(ImageError):
        decode(data, LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF"])
def test_the_limit_of_pixels_is_ours_and_not_pillows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = Image.fromarray(gradient()).convert("L")
    # As a host application may set it; 1536 pixels are above this limit, within the double that Pillow warns of.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decode(encoded(photo, kind), LIMITS).shape == (32, 48, 3)
    assert caught == []
    with pytest.raises(ImageError, match="48 x 32 pixels, more than the limit of 1,535"):
        decode(encoded(photo, kind), DecodeSettings(max_pixels=1535))


def test_the_limit_holds_for_images_and_arrays_too() -> None:
    small = DecodeSettings(max_pixels=1535)
    for source in (gradient(), Image.fromarray(gradient())):
        with pytest.raises(ImageError, match="more than the limit"):
            decode(source, small)


def test_pillows_globals_stay_as_the_host_set_them() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    decode(encoded(Image.fromarray(gradient()), "TIFF"), LIMITS)
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


def test_a_file_above_the_limit_of_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    path.write_bytes(b"x" * 1001)
    with pytest.raises(InputError, match=r"large\.jpg has 1,001 bytes, more than the limit of 1,000"):
        read_bytes(path, DecodeSettings(max_bytes=1000))
    assert len(read_bytes(path, DecodeSettings(max_bytes=1001))) == 1001


def test_missing_files_folders_and_impossible_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jpg does not exist"):
        read_bytes(tmp_path / "gone.jpg", LIMITS)
    with pytest.raises(InputError, match="is a folder"):
        read_bytes(tmp_path, LIMITS)
    with pytest.raises(InputError, match=r"a\\x00b is not a path"):
        read_bytes(Path("a\0b"), LIMITS)
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        read_bytes(tmp_path / ("x" * 300), LIMITS)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "pipe.jpg"
    os.mkfifo(path)
    outcome: list[BaseException] = []

    def read() -> None:
        try:
            read_bytes(path, LIMITS)
        except InputError as error:
            outcome.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert "not a regular file" in str(outcome[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc")
def test_a_file_that_is_longer_than_it_says_is_refused() -> None:
    with pytest.raises(InputError, match="changed while it was read"):
        read_bytes(Path("/proc/self/status"), LIMITS)


def test_a_device_is_refused() -> None:
    with pytest.raises(InputError, match="not a regular file"):
        read_bytes(Path("/dev/zero"), LIMITS)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.jpg"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(InputError, match=r"secret\.jpg cannot be read: Permission denied"):
        read_bytes(path, LIMITS)


@pytest.mark.parametrize("name", ["a b.png", 'it\'s "q".png', "🗼.png", "line\nbreak.png", "é塔.png"])
def test_names_of_every_kind_can_be_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    Image.fromarray(gradient()).save(path)
    assert decode(path, LIMITS).shape == (32, 48, 3)


def test_messages_have_one_line_whatever_the_name_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"two\\nlines\.jpg does not exist"):
        decode(tmp_path / "two\nlines.jpg", LIMITS)
    assert one_line("é 塔\t\udcff") == "é 塔\\t\\udcff"


def test_digests_tell_photos_apart_and_know_the_same_again(tmp_path: Path) -> None:
    photo = gradient()
    image = Image.fromarray(photo)
    data = encoded(image, "PNG")
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    assert content_digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert source_digest(path, LIMITS) == source_digest(str(path), LIMITS) == content_digest(data)
    assert source_digest(data, LIMITS) == content_digest(data)
    assert source_digest(photo, LIMITS) == source_digest(image, LIMITS)
    assert source_digest(photo.reshape(16, 96, 3), LIMITS) != source_digest(photo, LIMITS)
    assert source_digest(photo ^ 1, LIMITS) != source_digest(photo, LIMITS)


def test_many_threads_decode_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    filters = list(warnings.filters)
    photos = [encoded(Image.fromarray(gradient()), kind) for kind in ("PNG", "TIFF", "BMP")] * 40
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda data: decode(data, LIMITS), photos))
    assert all((result == gradient()).all() for result in results)
    assert list(warnings.filters) == filters


SAMPLES = [
    encoded(Image.fromarray(gradient()), kind)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", *(["AVIF"] if "AVIF" in Image.SAVE else []))
]


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(SAMPLES),
    st.floats(0, 1),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_mutated_and_truncated_bytes_decode_or_raise_image_error(
    sample: bytes, kept: float, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(sample[: round(len(sample) * kept)])
    for place, value in changes:
        if data:
            data[int(place * len(data))] = value
    try:
        result = decode(bytes(data), DecodeSettings(max_pixels=1_000_000))
    except ImageError:
        return
    assert is_valid(result)
    assert 0 < result.shape[0] * result.shape[1] <= 1_000_000
